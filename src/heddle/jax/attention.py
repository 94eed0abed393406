"""How JAX computes ``attend``."""

from __future__ import annotations

from heddle.attention.attend import IMPLEMENTATIONS, REFERENCE

IMPLEMENTATIONS["jax"] = {"reference": REFERENCE}
