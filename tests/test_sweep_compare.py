"""Sweeps beside each other."""

import json
import sys

import pytest
from pages import assets, figures_in

from heddle import cli
from heddle.scaling_law import relative
from heddle.sweep_compare import compare


def sweep(folder, k, *, spread=0.01, replicas=(1, 2, 4, 8), **values):
    """A finished sweep whose losses follow the law, a constant apart for each seed."""
    runs = [
        {
            "values": {"training.seed": seed, "parscale.parscale_n": p, **values},
            "loss": relative(p, k, 2.0, 0.1894, 0.0) + spread * (seed - 1),
        }
        for seed in range(3)
        for p in replicas
    ]
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    return folder


def test_means_paired_differences_and_the_law(tmp_path):
    folders = [sweep(tmp_path / "none", 0.1), sweep(tmp_path / "joint", 0.3)]
    text = compare(folders, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    for name, k in ("none", 0.1), ("joint", 0.3):
        figures = record["sweeps"][name]
        assert figures["fit"]["k"] == pytest.approx(k, rel=0.01)
        assert [p["replicas"] for p in figures["points"]] == [1, 2, 4, 8]
        assert figures["points"][0]["losses"] == pytest.approx([1.99, 2.0, 2.01])
        eight = figures["points"][-1]
        assert eight["standard_error"] == pytest.approx(0.01 / 3**0.5)
        # The seeds' own differences are no error of what replicas gain.
        assert eight["gain"] == pytest.approx(2.0 - relative(8, k, 2.0, 0.1894, 0.0))
        assert eight["gain_error"] == pytest.approx(0, abs=1e-12)
        assert figures["points"][0]["gain"] is None
    assert "joint: k = 0.300 ± " in text
    page = (tmp_path / "out" / "compare.html").read_text()
    assert not assets(page).loaded
    ((curves, _, _),) = figures_in(page)
    assert [curve["name"] for curve in curves] == ["none", "none, law", "joint", "joint, law"]
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert json.loads(compare(folders, tmp_path / "out", as_json=True)) == record


def test_a_sweep_without_one_replica_or_with_one_seed_has_no_gain_or_error(tmp_path):
    record = json.loads(compare([sweep(tmp_path / "joint", 0.3, replicas=(2, 4))], tmp_path, as_json=True))
    assert [p["gain"] for p in record["sweeps"]["joint"]["points"]] == [None, None]


def test_errors_are_one_line(tmp_path, monkeypatch, capfd):
    one = sweep(tmp_path / "one", 0.1)
    other = sweep(tmp_path / "rates", 0.1, **{"training.learning_rate": 1e-3})
    for arguments, said in (
        ([tmp_path / "none"], "must hold a finished sweep, but it has no sweep.json"),
        ([other], "must be a sweep over parscale.parscale_n and seeds alone"),
        ([one, one], "each of another name, got one, one"),
        ([one, "--law", "third"], "--law must be one of stack, pile, got third"),
    ):
        monkeypatch.setattr(sys, "argv", ["heddle", "sweep", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, error = capfd.readouterr()
        assert (exit.value.code, out) == (2, "")
        assert said in error
        assert error.count("\n") == 1
