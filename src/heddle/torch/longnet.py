"""LongNet as a Hugging Face model: a decoder-only language model with dilated attention, arXiv 2307.02486.

MAGNETO's layers and initialization (arXiv 2210.06423), XPOS or RoPE, and for decoding a cache whose size doesn't grow
with the sequence. Importing this module makes ``longnet`` known to transformers' Auto classes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from heddle.attention.dilated_grids import document_positions
from heddle.attention.mask import PADDING_SEGMENT_ID
from heddle.attention.rope import rotate
from heddle.attention.xpos import Tables, position_tables

from .dilated import ImprovedMultiheadDilatedAttention
from .dilated_layers import DilatedTransformerEncoderLayer
from .dilated_layers import LongNet as LongNet
from .huggingface import IMPLEMENTATIONS
from .longnet_cache import LongNetCache
from .longnet_config import LongNetConfig as LongNetConfig


class Sequences(NamedTuple):
    """What the layers have to know of the rows: where tokens stand, and which are none."""

    tables: tuple[Tables, Tables]  #: of queries and of keys
    lengths: Int[Tensor, " batch"] | None  #: a row's tokens, before its padding; None: all
    segment_ids: Int[Tensor, "batch seq"] | None


class LongNetAttention(ImprovedMultiheadDilatedAttention):
    """Causal dilated attention with position embedding, and a cache."""

    def forward(  # type: ignore[override]
        self, x: Tensor, sequences: Sequences, layer: int, cache: LongNetCache | None = None
    ) -> Tensor:
        query, key, value = self.heads(x, x, x)
        query, key = (rotate(x, *tables) for x, tables in zip((query, key), sequences.tables, strict=True))
        query, key = query.to(value.dtype), key.to(value.dtype)
        if cache is None:
            out = self.attention(query, key, value, True, segment_ids=sequences.segment_ids)
        else:
            out = cache.attend(layer, query, key, value, sequences.lengths, implementation=self.attention.op)
        return self.output(out)


class LongNetLayer(GradientCheckpointingLayer, DilatedTransformerEncoderLayer):
    """:class:`~heddle.torch.dilated_layers.DilatedTransformerEncoderLayer`, causal, with positions and a cache."""

    attention_type = LongNetAttention

    def __init__(self, config: LongNetConfig, index: int):
        gain = math.sqrt(math.log(2 * config.num_hidden_layers))  # of a decoder-only model
        super().__init__(
            config.hidden_size, config.num_attention_heads, config.segment_lengths, config.dilation_rates,
            config.intermediate_size, config.dropout, ACT2FN[config.hidden_act], config.layer_norm_eps, gain,
        )  # fmt: skip
        self.index = index
        attention, ffn = self.self_attn, self.feed_forward
        for linear in (attention.q_proj, attention.k_proj):  # transformers initializes each module by itself
            linear.gain = 1.0  # type: ignore[assignment]
        for linear in (attention.v_proj, attention.out_proj, ffn.linear1, ffn.linear2):
            linear.gain = gain  # type: ignore[assignment]
        self.self_attn.attention.op = IMPLEMENTATIONS[str(config._attn_implementation)]

    def forward(  # type: ignore[override]
        self, x: Tensor, sequences: Sequences, past_key_values: LongNetCache | None = None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.norm(x), sequences, self.index, past_key_values))
        return x + self.feed_forward(x)


class LongNetPreTrainedModel(PreTrainedModel):
    config: LongNetConfig
    config_class = LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongNetLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True  # what its cache has dropped it can't go back to

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """One of :data:`~heddle.torch.huggingface.IMPLEMENTATIONS`, by default heddle's choice."""
        requested_attention = requested_attention or "heddle"
        if requested_attention not in IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {requested_attention!r}"
            )
        return requested_attention

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        size = self.config.hidden_size
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and hasattr(module, "gain"):
            init.xavier_normal_(module.weight, module.gain)  # type: ignore[arg-type]
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, 0.0, size**-0.5)


class LongNetModel(LongNetPreTrainedModel):
    """The layers, without a head. Embeddings are multiplied by ``sqrt(hidden_size)``, as in MAGNETO's own code."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LongNetLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' models.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: ``(batch, past + seq)``, 0 for padding, wherever it stands: it is as if it weren't there.
            position_ids: ``(batch | 1, seq)``: where they begin again at 0, another document does. Otherwise without
                effect, as a token's position is how many stand before it.
            past_key_values: what was read before: a :class:`LongNetCache`.
            inputs_embeds: instead of ids, ``(batch, seq, hidden)``.
            use_cache: whether to return a cache; None: as configured, but not while training or with documents.
            segment_ids: ``(batch, seq)``, packed documents by number, -1 for padding.
            output_hidden_states: whether to return the layers' inputs and the last output.

        Raises:
            ValueError: both or none of ids and embeddings; another cache; a mask of another length; documents with a
                cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        assert isinstance(x, Tensor)
        cache, real = past_key_values, None
        if cache is not None and not isinstance(cache, LongNetCache):
            raise ValueError(f"past_key_values must be a LongNetCache, got a {type(cache).__name__}")
        columns = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None:
            if attention_mask.shape != (x.shape[0], columns + x.shape[1]):
                raise ValueError(
                    f"attention_mask must have shape {(x.shape[0], columns + x.shape[1])}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            real = attention_mask[:, columns:].bool()
        if segment_ids is None and position_ids is not None:
            segment_ids = _documents(position_ids, real, x)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and segment_ids is None
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and cache is None:
            cache = LongNetCache(self.config)
        if cache is not None and segment_ids is not None:
            raise ValueError("packed documents take no cache: give use_cache=False, or each document alone")
        x, sequences, back = self._sequences(self.dropout(x * self.config.hidden_size**0.5), real, segment_ids, cache)
        hidden = [x]
        for layer in self.layers:
            x = layer(x, sequences, past_key_values=cache)
            hidden.append(x)
        hidden[-1] = self.norm(x)
        if back is not None:
            hidden = [h[back] for h in (hidden if output_hidden_states else hidden[-1:])]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[-1],  # type: ignore[arg-type]
            past_key_values=cache,
            hidden_states=tuple(hidden) if output_hidden_states else None,  # type: ignore[arg-type]
        )

    def _sequences(
        self, x: Tensor, real: Tensor | None, segment_ids: Tensor | None, cache: LongNetCache | None
    ) -> tuple[Tensor, Sequences, tuple[Tensor, Tensor] | None]:
        """The rows with their padding behind their tokens, what the layers have to know of them, and the places that
        put tokens back to where they stood."""
        config, lengths, back = self.config, None, None
        places = torch.arange(x.shape[1], device=x.device)[None]
        if segment_ids is not None:
            segment_ids = segment_ids.expand(x.shape[:2])
            if real is not None:
                segment_ids = segment_ids.masked_fill(~real, PADDING_SEGMENT_ID)
            positions = document_positions(segment_ids)
        else:
            if real is not None and (torch.compiler.is_compiling() or not bool(real.all())):
                order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
                rows = torch.arange(x.shape[0], device=x.device)[:, None]
                x, back, lengths = x[rows, order], (rows, order.argsort(1)), real.sum(1)
            positions = places if cache is None else places + cache.lengths(x)[:, None]
        tables = position_tables(
            config.position, positions.expand(x.shape[:2]), config.head_dim, config.segment_lengths,
            theta=config.rope_theta, scale_base=config.xpos_scale_base,
        )  # fmt: skip
        return x, Sequences(tables, lengths, segment_ids), back


def _documents(position_ids: Tensor, real: Tensor | None, x: Tensor) -> Tensor | None:
    """Numbers of the documents that positions tell; None if there is but one a row."""
    begins = (position_ids == 0).expand(x.shape[:2])
    begins = begins if real is None else begins & real
    if x.shape[1] == 1 or (not torch.compiler.is_compiling() and not bool((begins.sum(1) > 1).any())):
        return None
    return begins.cumsum(1)


class LongNetLM(LongNetPreTrainedModel, GenerationMixin):
    """:class:`LongNetModel` with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' causal language models; see :meth:`LongNetModel.forward`.

        Args:
            labels: ``(batch, seq)``: the ids, which are shifted here, -100 where there is no loss.
            logits_to_keep: for how many last tokens to compute logits, 0 for all; or for which.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, segment_ids,
            output_hidden_states, return_dict=True,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation must be left out, got {generation_config.cache_implementation!r}: "
                "LongNet's cache is of bounded size already"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LongNetCache(self.config)


AutoConfig.register("longnet", LongNetConfig, exist_ok=True)
AutoModel.register(LongNetConfig, LongNetModel, exist_ok=True)
AutoModelForCausalLM.register(LongNetConfig, LongNetLM, exist_ok=True)
