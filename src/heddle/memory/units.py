"""Bytes as people write them."""

from __future__ import annotations

import re

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse(option: str, text: str) -> int:
    """``16GiB`` as a number of bytes.

    Raises:
        ValueError: anything but a positive number with one of the units; it names the option.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", text.strip())
    unit = next((size for name, size in UNITS.items() if match and match[2].lower() == name.lower()), None)
    if match is None or unit is None or not float(match[1]) > 0:
        raise ValueError(f"{option} must be a positive number of {', '.join(UNITS)}, such as 16GiB; got {text!r}")
    return round(float(match[1]) * unit)


def show(count: int) -> str:
    """A number of bytes in the largest unit of which it is at least one.

    >>> [show(n) for n in (0, 512, 2048, 3 * 2**29)]
    ['0 B', '512 B', '2.00 KiB', '1.50 GiB']
    """
    unit = next((name for name, size in reversed(UNITS.items()) if count >= size), None)
    return f"{count} B" if unit is None else f"{count / UNITS[unit]:.2f} {unit}"
