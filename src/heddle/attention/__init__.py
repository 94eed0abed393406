"""The core: attention over visible keys, and its merge, for NumPy, torch and JAX arrays; imports no framework."""

from .attend import attend as attend
from .attend import implementations as implementations
from .mask import PADDING_SEGMENT_ID as PADDING_SEGMENT_ID
from .mask import Mask as Mask
from .merge import merge as merge
