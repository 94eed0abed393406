"""The configuration of a LongNet language model."""

from __future__ import annotations

from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from heddle.attention.dilated_patterns import check_patterns
from heddle.attention.xpos import check_position


@no_type_check  # transformers' own check of the fields' types, by strict, takes what no field has too
@strict
class LongNetConfig(PretrainedConfig):
    """A decoder-only LongNet (arXiv 2307.02486, section 4 and appendix A, whose sizes are the defaults).

    Args:
        vocab_size: the paper's tokenizer, tiktoken's cl100k_base, has 100,277 tokens.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the model's sizes.
        segment_lengths, dilation_rates: w and r of each pattern.
        position: ``"xpos"`` (arXiv 2212.10554), as in the paper, or ``"rope"``.
        rope_theta: base of RoPE's wavelengths, which XPOS has too.
        xpos_scale_base: tokens over which XPOS's scores fade by a power of its ζ.
        hidden_act: between the feed-forward network's projections, as transformers names it.
        layer_norm_eps: of all norms.
        dropout: of attention's weights, of the feed-forward network and of both outputs.
        tie_word_embeddings: whether the head is the embedding's matrix.
        max_position_embeddings: the length it is trained for; a hint, nothing stops there.

    Raises:
        ValueError: heads that don't divide the hidden size, or give an odd size; patterns as of
            :func:`heddle.attention.dilated.dilated_attention`; a value out of range.
    """

    model_type = "longnet"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 100_277
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    segment_lengths: list[int] | tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 6, 12)
    position: str = "xpos"
    rope_theta: float = 10000.0
    xpos_scale_base: float = 512.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size must be a multiple of twice num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")
        patterns = check_patterns(self.segment_lengths, self.dilation_rates)
        self.segment_lengths, self.dilation_rates = ([p[i] for p in patterns] for i in (0, 1))
        check_position(self.position, self.segment_lengths, self.xpos_scale_base)

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.hidden_size // self.num_attention_heads
