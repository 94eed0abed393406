"""The PyTorch wing. Importing it also makes ``attn_implementation="heddle"`` known to Hugging Face transformers."""

from . import attention as attention
from .huggingface import register_when_imported

register_when_imported()
