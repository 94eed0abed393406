"""Text into training rows: corpora, tokenizers, packing. Imports no framework."""
