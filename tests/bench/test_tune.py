import pytest

from heddle.bench import tune
from heddle.bench.timing import Timing
from heddle.cli import app
from heddle.kernels import plan


def test_candidates_are_tiles_the_plan_takes():
    for kernel in plan.KERNELS:
        tiles = tune.candidates(kernel)
        assert len(set(tiles)) == len(tiles) >= 12
        for tile in tiles:
            with plan.override(**{kernel: tile}):
                assert plan.tile(kernel, 64, 64, 2, 90) == tile


def test_the_lowest_median_is_best():
    timings = {"a": Timing((1.0, 9.0, 9.0)), "b": Timing((2.0, 3.0, 8.0)), "c": Timing((3.0, 3.0, 3.0))}
    assert tune.best(timings) == "b"


def test_without_a_device_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NotImplementedError, match="on a CUDA device, and torch finds none here"):
        app(["bench", "tune"], standalone_mode=False)


@pytest.mark.parametrize(("option", "value"), [("--repeats", "0"), ("--head-dim", "300"), ("--head-dim", "x")])
def test_options_that_cannot_be(option, value):
    with pytest.raises(ValueError, match=f"{option} must be"):
        app(["bench", "tune", option, value], standalone_mode=False)
