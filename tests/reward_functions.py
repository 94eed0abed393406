"""Rewards that behave in every way, for processes of a pool, which find them here by name."""

import os
import time


def length(completion, **_):
    return len(completion)


def answer(completion, answer, **_):
    return completion == answer


def not_for_x(prompt, **_):
    return None if prompt == "x" else 0.5


def raises_at_b(completion, **_):
    if "b" in completion:
        raise KeyError("no b here")
    return 1.0


def hangs_at_c(completion, **_):
    while "c" in completion:
        time.sleep(0.01)
    return 2


def dies_at_d(completion, **_):
    if "d" in completion:
        os._exit(7)
    return 3.0


def leaves_at_d(completion, **_):
    if "d" in completion:
        raise SystemExit("bye")
    return 3.0


def words(**_):
    return "many"


def infinite(**_):
    return float("inf")


def low_bytes(completion, **_):
    """A reward that a model of random weights gets some of."""
    return sum(letter < "`" for letter in completion) / 4


not_a_function = 3
