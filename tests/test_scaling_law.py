"""ParScale's law, and its fit to losses that were made by it."""

import numpy as np
import pytest

from heddle.scaling_law import LAWS, fit, growth, loss, relative


def test_growth_gives_equal_losses():
    for law in LAWS:
        assert growth(1, law) == 1
        for replicas in (2, 8):
            larger = loss(1e9 * growth(replicas, law), 1, law)
            assert larger == pytest.approx(loss(1e9, replicas, law), rel=1e-12)
    assert growth(8, "stack") == pytest.approx(1.818, abs=1e-3)
    assert growth(8, "pile") == pytest.approx(1.696, abs=1e-3)


@pytest.mark.parametrize("law", LAWS)
def test_the_fit_finds_the_k_that_made_the_losses(law):
    c = LAWS[law]
    counts = [1, 2, 4, 8]
    found = fit(counts, [loss(1e9, p, law) for p in counts], alpha=c["alpha"], floor=c["E"])
    assert found.k == pytest.approx(c["k"], rel=1e-5)
    assert found.one == pytest.approx(loss(1e9, 1, law), rel=1e-6)
    assert relative(8, found.k, found.one, c["alpha"], c["E"]) == pytest.approx(loss(1e9, 8, law), rel=1e-6)


def test_the_fits_error_is_that_of_fits_to_other_seeds():
    rng, counts = np.random.default_rng(0), [1, 2, 4, 8] * 3
    true = [relative(p, 0.3, 2.0, 0.19, 0.5) for p in counts]
    fits = [fit(counts, list(true + rng.normal(0, 0.005, len(counts))), alpha=0.19, floor=0.5) for _ in range(200)]
    spread = np.std([each.k for each in fits])
    assert np.mean([each.k_error for each in fits]) == pytest.approx(spread, rel=0.2)
    assert np.mean([each.k for each in fits]) == pytest.approx(0.3, abs=3 * spread / 200**0.5)


def test_replicas_that_do_harm_have_a_negative_k():
    assert fit([1, 2, 4], [2.0, 2.01, 2.02], alpha=0.19).k < 0


@pytest.mark.parametrize("counts", [[], [1, 1, 1], [1, 2]])
def test_too_few_runs_are_refused(counts):
    with pytest.raises(ValueError, match="replicas must be two different numbers"):
        fit(counts, [2.0] * len(counts), alpha=0.19)
