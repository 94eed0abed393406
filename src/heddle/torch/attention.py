"""How torch computes ``attend``, in order of preference."""

from __future__ import annotations

from heddle.attention.attend import IMPLEMENTATIONS, REFERENCE, Implementation

from . import flex, sdpa, triton

IMPLEMENTATIONS["torch"] = {
    "triton": Implementation(triton.unsupported, triton.flash, triton.flash_backward),
    "sdpa": Implementation(sdpa.unsupported, sdpa.sdpa, sdpa.sdpa_backward),
    "flex": Implementation(flex.unsupported, flex.flex, flex.flex_backward),
    "reference": REFERENCE,
}
