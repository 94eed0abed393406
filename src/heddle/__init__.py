"""Heddle: structured attention in LLMs, for PyTorch and JAX.

    attend(query, key, value, mask)   attention of each query over the keys its mask lets it see
    merge([(out, lse), ...])          attention over the union of disjoint sets of keys

The wings, imported by name: ``heddle.torch`` and ``heddle.jax``.
"""

from .attention import PADDING_SEGMENT_ID as PADDING_SEGMENT_ID
from .attention import Mask as Mask
from .attention import attend as attend
from .attention import implementations as implementations
from .attention import merge as merge

__version__ = "0.1.0"
