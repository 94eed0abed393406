"""How torch computes ``attend``."""

from __future__ import annotations

from heddle.attention.attend import IMPLEMENTATIONS, REFERENCE

IMPLEMENTATIONS["torch"] = {"reference": REFERENCE}
