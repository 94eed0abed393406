"""Options of the benchmarks that take several numbers."""

from __future__ import annotations


def integers(option: str, text: str) -> list[int]:
    """``"2048,4096"`` as positive numbers, none for ``""``.

    Raises:
        ValueError: anything else, by the option's name.
    """
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        found = [0]
    if any(n < 1 for n in found):
        raise ValueError(f"--{option} must be positive whole numbers as in 2,4, got {text!r}")
    return found


def counts(option: str, text: str) -> list[int]:
    """The same, one at least and each greater than the one before.

    Raises:
        ValueError: anything else, by the option's name.
    """
    found = integers(option, text)
    if not found or sorted(set(found)) != found:
        raise ValueError(f"--{option} must be positive whole numbers in order as in 1,2,4, got {text!r}")
    return found
