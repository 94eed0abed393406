"""The JAX wing."""

from . import attention as attention
