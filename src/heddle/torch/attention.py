"""How torch computes ``attend``, in order of preference."""

from __future__ import annotations

from heddle.attention.attend import IMPLEMENTATIONS, REFERENCE, Implementation

from . import sdpa

IMPLEMENTATIONS["torch"] = {
    "sdpa": Implementation(sdpa.unsupported, sdpa.sdpa, sdpa.sdpa_backward),
    "reference": REFERENCE,
}
