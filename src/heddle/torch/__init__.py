"""The PyTorch wing."""

from . import attention as attention
