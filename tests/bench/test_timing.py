"""Rounds, quartiles and the machine's description."""

import statistics

import pytest

from heddle.bench.timing import Timing, interleave, machine


def test_median_and_quartiles():
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert Timing((7.0,)).quartiles == (7.0, 7.0)


def test_each_step_runs_once_a_round_and_follows_each_other_step():
    calls = []
    steps = {name: (lambda index, name=name: calls.append((index, name))) for name in "abc"}
    timings = interleave(steps, repeats=6, warm_up=2)
    assert [index for index, _ in calls] == [i for i in range(-2, 6) for _ in range(3)]
    rounds = ["".join(name for _, name in calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds[2:]} == {"a", "b", "c"}
    assert all(len(timing.seconds) == 6 for timing in timings.values())
    assert all(statistics.median(timing.seconds) == timing.median for timing in timings.values())


def test_repeats_are_checked():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        interleave({"a": lambda index: None}, repeats=0)


def test_the_machine_is_described():
    described = machine()
    assert described["cores"] >= 1
    assert described["memory_gib"] > 0
    assert described["processor"]
    assert described["versions"]["heddle-attention"]
    assert described["date"].endswith("+00:00")
