"""How JAX computes ``attend``, in order of preference."""

from __future__ import annotations

from heddle.attention.attend import IMPLEMENTATIONS, REFERENCE, Implementation

from . import xla

IMPLEMENTATIONS["jax"] = {
    "xla": Implementation(xla.unsupported, xla.xla, xla.xla_backward),
    "reference": REFERENCE,
}
