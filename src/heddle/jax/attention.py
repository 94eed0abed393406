"""How JAX computes ``attend``, in order of preference."""

from __future__ import annotations

from heddle.attention.attend import IMPLEMENTATIONS, REFERENCE, Implementation

from . import cudnn, triton, xla

IMPLEMENTATIONS["jax"] = {
    "triton": Implementation(triton.unsupported, triton.flash, triton.flash_backward),
    "xla": Implementation(xla.unsupported, xla.xla, xla.xla_backward),
    "cudnn": Implementation(cudnn.unsupported, cudnn.cudnn, cudnn.cudnn_backward),
    "reference": REFERENCE,
}
