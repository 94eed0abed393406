"""Schedules and the optimiser: what they do at each step, to which parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heddle.jax.optimizer import make_optimizer, make_schedule
from heddle.options import OPTIMIZERS, TrainingOptions


def rates(**options):
    options = TrainingOptions(learning_rate=1.0, **options)
    return [float(make_schedule(options)(step)) for step in range(options.max_steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_the_warm_up_is_linear_and_ends_at_the_peak(schedule):
    rising = rates(max_steps=20, warmup_steps=5, schedule=schedule)[:6]
    np.testing.assert_allclose(rising, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rtol=1e-6)
    assert rates(max_steps=20, warmup_steps=0, schedule=schedule)[0] == 1.0
    assert rates(max_steps=20, warmup_steps=1, schedule=schedule)[0] == 1.0
    np.testing.assert_allclose(rates(max_steps=4, warmup_steps=4, schedule=schedule), [0.25, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(rates(max_steps=2, warmup_steps=4, schedule=schedule), [0.25, 0.5], rtol=1e-6)


def test_constant_stays():
    assert rates(max_steps=10, schedule="constant") == [1.0] * 10


def test_cosine_falls_along_half_a_cosine():
    steps = np.arange(100)
    expected = np.where(steps < 20, (steps + 1) / 20, 0.1 + 0.9 * (1 + np.cos(np.pi * (steps - 20) / 80)) / 2)
    np.testing.assert_allclose(rates(max_steps=100, warmup_steps=20, final_share=0.1), expected, rtol=1e-5)


def test_wsd_stays_and_falls_linearly_at_the_end():
    wsd = rates(max_steps=100, warmup_steps=10, schedule="wsd", decay_share=0.3, final_share=0.0)
    assert wsd[10:71] == [1.0] * 61
    np.testing.assert_allclose(wsd[70:], 1 - np.arange(30) / 30, rtol=1e-5, atol=1e-6)
    assert rates(max_steps=10, schedule="wsd", decay_share=0.0) == [1.0] * 10
    assert rates(max_steps=10, warmup_steps=8, schedule="wsd", decay_share=1.0, final_share=0.5)[7:] == [1.0, 1.0, 0.75]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_matrices_decay(optimizer):
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    tx = make_optimizer(TrainingOptions(optimizer=optimizer, weight_decay=0.25))
    updates, _ = tx.update({"matrix": jnp.zeros((2, 2)), "norm": jnp.zeros(2)}, tx.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.25)
    np.testing.assert_allclose(updates["norm"], 0)


def test_the_gradient_is_clipped_by_its_global_norm():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    for clip, expected in ((5.0, [3.0, 4.0]), (None, [30.0, 40.0])):
        tx = make_optimizer(TrainingOptions(clip=clip, beta1=0.0))
        _, state = tx.update(gradient, tx.init(params), params)
        first_moments = state[1][0].mu
        np.testing.assert_allclose([first_moments["a"][0], first_moments["b"][0]], expected, rtol=1e-6)


def first_update(params, gradient, **options):
    tx = make_optimizer(TrainingOptions(weight_decay=0.0, clip=None, **options))
    return tx.update(gradient, tx.init(params), params)[0]


def test_muon_orthogonalises_the_layers_matrices_and_leaves_the_rest_to_adamw():
    keys = jax.random.split(jax.random.key(0), 3)
    gradient = {
        "layers": {"q": {"weight": jax.random.normal(keys[0], (24, 16)), "bias": jax.random.normal(keys[1], (16,))}},
        "head": {"weight": jax.random.normal(keys[2], (16, 31))},
        "embedding": jax.random.normal(keys[2], (31, 16)),
    }
    params = jax.tree.map(jnp.ones_like, gradient)
    update = first_update(params, gradient, optimizer="muon")
    ours = np.asarray(update["layers"]["q"]["weight"])
    # The nearest orthogonal matrix, about (Newton-Schulz stops early), at a root mean square of 0.2.
    left, _, right = np.linalg.svd(np.asarray(gradient["layers"]["q"]["weight"], np.float64), full_matrices=False)
    expected = -0.2 * np.sqrt(24) * left @ right
    assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.97
    assert np.sqrt((ours**2).mean()) == pytest.approx(0.2, rel=0.25)
    adamw = first_update(params, gradient, optimizer="adamw")
    for path in (("layers", "q", "bias"), ("head", "weight"), ("embedding",)):
        a, b = update, adamw
        for key in path:
            a, b = a[key], b[key]
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_adafactor_keeps_a_row_and_a_column_of_moments_and_scales_by_the_parameter():
    params = {"w": 3.0 * jnp.ones((128, 256))}
    gradient = {"w": jax.random.normal(jax.random.key(0), (128, 256))}
    tx = make_optimizer(TrainingOptions(optimizer="adafactor", weight_decay=0.0))
    held = sum(x.size for x in jax.tree.leaves(tx.init(params)))
    assert held < 2 * (128 + 256)
    update = first_update(params, gradient, optimizer="adafactor")["w"]
    np.testing.assert_array_equal(np.sign(update), -np.sign(gradient["w"]))
    assert float(jnp.sqrt(jnp.square(update).mean())) == pytest.approx(3.0, rel=0.1)  # a step of the rate's share
