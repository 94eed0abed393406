"""ParScale as a Hugging Face model: transformers' Qwen2, run as P replicas that are summed before the head.

Importing this module makes ``qwen2_parscale`` known to transformers' Auto classes. With one replica everything is
transformers' own; with more, attention is :mod:`heddle.attention.replicas`'. State-dict names are the released models'.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_masks_for_generate, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

from heddle.attention.replicas import (
    aggregate,
    hidden_key,
    replica_rows,
    replicate,
    stack_replicas,
)

from .huggingface import IMPLEMENTATIONS, dilation
from .parscale_config import Qwen2ParScaleConfig as Qwen2ParScaleConfig
from .parscale_config import is_parscale
from .parscale_layers import (
    PrefixMLP,
    Qwen2ParScaleAttention,
    Qwen2ParScaleDecoderLayer,
    ZeroLinear,
)

CROSS_ATTN_BIAS = -4.0  #: at the start other replicas' keys weigh exp(-4) of one's own
PREFIX_V_RANGE = 0.1  #: of initializer_range
HIDING_TOKENS = 128  #: that show where queries point


class ParscaleCache(DynamicCache):
    """A cache whose rows are all replicas' (replica-major), reordered by the numbers of the sequences.

    It holds keys and values of tokens alone: prefixes stay in their layers. Any other cache of transformers does too.
    """

    def __init__(self, config: Qwen2ParScaleConfig, **kwargs: Any):
        super().__init__(config=config, **kwargs)
        self.replicas = config.parscale_n

    def _rows(self, indices: Tensor) -> Tensor:
        layers: list[Any] = self.layers
        keys = next((layer.keys for layer in layers if layer.get_seq_length()), None)
        return indices if keys is None else replica_rows(indices, keys.shape[0] // self.replicas, self.replicas)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``i`` goes on as ``beam_idx[i]`` did (beam search)."""
        super().reorder_cache(self._rows(beam_idx))  # type: ignore[arg-type]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        super().batch_select_indices(self._rows(indices))


# ---------------------------------------------------------------- the model


class Qwen2ParScalePreTrainedModel(Qwen2PreTrainedModel):
    config: Qwen2ParScaleConfig
    config_class = Qwen2ParScaleConfig
    _no_split_modules = ["Qwen2ParScaleDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Qwen2ParScaleDecoderLayer,
        "attentions": Qwen2ParScaleAttention,
    }

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """transformers' own with one replica; with more, one of :data:`IMPLEMENTATIONS`, by default heddle's choice.

        With dilation heddle's, in either case.
        """
        if dilation(self.config) is not None and requested_attention not in (None, "heddle"):
            raise ValueError(f"attn_implementation must be 'heddle' with dilation, got {requested_attention!r}")
        if self.config.parscale_n > 1 or dilation(self.config) is not None:
            requested_attention = requested_attention or "heddle"
            if requested_attention not in IMPLEMENTATIONS:
                raise ValueError(
                    f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)} with parscale_n > 1, "
                    f"got {requested_attention!r}"
                )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # A model that starts from pretrained weights nearly keeps what it computed: new parts start at or near nothing.
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Qwen2ParScaleAttention):
            if module.prefix_k is not None:
                init.normal_(module.prefix_k, 0.0, std)
                init.normal_(module.prefix_v, 0.0, PREFIX_V_RANGE * std)
            if module.cross_attn_bias is not None:
                init.constant_(module.cross_attn_bias, CROSS_ATTN_BIAS)
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """transformers' own; prefixes that are new to the checkpoint start hidden, see :meth:`hide_prefixes`.

        With ``gguf_file`` the checkpoint is a GGUF file in the folder, as transformers reads it.
        """
        if kwargs.get("gguf_file") is not None:
            names = ("gguf_file", "dtype", "revision", "cache_dir", "token", "local_files_only")
            base = AutoModelForCausalLM.from_pretrained(*args, **{k: kwargs.pop(k) for k in names if k in kwargs})
            changes = {name: kwargs.pop(name) for name in list(kwargs) if is_parscale(name)}
            config = Qwen2ParScaleConfig.from_base(base.config.to_dict(), **changes)
            args, kwargs = (None,), kwargs | {"config": config, "state_dict": base.state_dict(), "dtype": base.dtype}
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if any(key.endswith("prefix_k") for key in info["missing_keys"]) and model.device.type != "meta":
            model.hide_prefixes()
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def hide_prefixes(self) -> None:
        """Move every layer's prefix keys by the key that its queries see least, found by one run over random tokens."""

        def hide(attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
            query, key, _ = attention.heads(kwargs["hidden_states"], kwargs["position_embeddings"])
            center = hidden_key(query.transpose(1, 2), key.shape[1], scale=attention.scaling)
            attention.prefix_k += center[None, :, None].to(attention.prefix_k.dtype)

        model: Any = self.base_model
        attentions = [layer.self_attn for layer in model.layers if layer.self_attn.prefix_k is not None]
        hooks = [attention.register_forward_pre_hook(hide, with_kwargs=True) for attention in attentions]
        length = min(HIDING_TOKENS, self.config.max_position_embeddings)
        ids = torch.randint(self.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        try:
            model(ids.to(model.embed_tokens.weight.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


class Qwen2ParScaleModel(Qwen2ParScalePreTrainedModel, Qwen2Model):
    """transformers' Qwen2Model on ``parscale_n`` replicas of its input, summed after the final norm.

    Raises:
        ValueError: a configuration out of range.
    """

    def __init__(self, config: Qwen2ParScaleConfig):
        config.check()
        Qwen2PreTrainedModel.__init__(self, config)  # not Qwen2Model's, whose layers would be built in vain
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(Qwen2ParScaleDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in config.layer_types  # type: ignore[operator]
        if config.parscale_n > 1:
            size, replicas = config.hidden_size, config.parscale_n
            self.aggregate_layer = nn.Sequential(nn.Linear(replicas * size, size), nn.SiLU(), nn.Linear(size, replicas))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As Qwen2Model's, and each replica may get its own input.

        Args:
            input_ids: ``(batch, seq)`` for all replicas, or ``(batch, replicas, seq)``, aligned by position.
            attention_mask: ``(batch, keys)`` or ``(batch, replicas, keys)``, 0 for padding at either end.
            position_ids, segment_ids: ``(batch | 1, seq)``, the same for all replicas. Documents packed into a row are
                told by positions that begin again at 0, or by ids as :meth:`heddle.Mask.documents` takes them.
            past_key_values: any cache of transformers; its rows are the replicas', replica-major.
            inputs_embeds: instead of ids, ``(batch, seq, hidden)`` or ``(batch, replicas, seq, hidden)``.

        Returns:
            transformers' output, ``last_hidden_state`` of shape ``(batch, seq, hidden)``. ``hidden_states``, if asked
            for, are the replicas', rows replica-major.

        Raises:
            ValueError: both or none of ids and embeddings, shapes that don't fit the replicas.
            NotImplementedError: ``output_attentions`` with more than one replica.
        """
        replicas = self.config.parscale_n
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        assert inputs_embeds is not None
        if kwargs.get("output_attentions") and replicas > 1:
            raise NotImplementedError("output_attentions isn't served with parscale_n > 1: no weights are kept")
        if use_cache is None:
            use_cache = self.config.use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
            if not inputs_embeds.requires_grad:  # a frozen backbone: else reentrant checkpoints drop the gradient
                inputs_embeds = inputs_embeds.detach().requires_grad_()
        if replicas > 1 or inputs_embeds.ndim == 4:
            if use_cache and past_key_values is None:
                past_key_values = ParscaleCache(self.config)
            if not isinstance(attention_mask, dict):
                attention_mask = self.masks(inputs_embeds, attention_mask, position_ids, past_key_values)
            inputs_embeds = self._rows("inputs_embeds", inputs_embeds, 3)
            position_ids = self._shared_rows("position_ids", position_ids, inputs_embeds)
            if "segment_ids" in kwargs:
                kwargs["segment_ids"] = self._shared_rows("segment_ids", kwargs["segment_ids"], inputs_embeds)
        kwargs["return_dict"] = True
        outputs = super().forward(
            attention_mask=attention_mask,  # type: ignore[arg-type]
            position_ids=position_ids,  # type: ignore[arg-type]
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,  # type: ignore[arg-type]
            use_cache=use_cache,
            **kwargs,
        )
        if replicas > 1:
            outputs.last_hidden_state = aggregate(
                outputs.last_hidden_state,
                self.aggregate_layer,
                replicas=replicas,
                smoothing=self.config.parscale_attn_smooth,
            )
        return outputs

    def masks(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> dict[str, Tensor]:
        """The replicas' masks by layer type, as the ``attention_mask`` that :meth:`forward` takes too."""
        config = copy.copy(self.config)
        if config.parscale_n > 1:
            config._attn_implementation = "heddle"  # whichever computes it, a mask is intervals of keys
        rows = self._rows("inputs_embeds", inputs_embeds, 3)
        arguments: dict[str, Any] = {
            "config": config,
            "inputs_embeds": rows,
            "attention_mask": None if attention_mask is None else self._rows("attention_mask", attention_mask, 2),
            "past_key_values": cache,
            "position_ids": self._shared_rows("position_ids", position_ids, rows),
        }
        masks = {"full_attention": create_causal_mask(**arguments)}
        if self.has_sliding_layers:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        return masks  # type: ignore[return-value]

    def _rows(self, name: str, x: Tensor, ndim: int) -> Tensor:
        """``x`` of all replicas, or of each (one axis more), as rows."""
        replicas = self.config.parscale_n
        if x.ndim == ndim:
            return replicate(x, replicas)
        if x.ndim != ndim + 1 or x.shape[1] != replicas:
            raise ValueError(
                f"{name} must have {ndim} axes, or {ndim + 1} with {replicas} replicas second, got {tuple(x.shape)}"
            )
        return stack_replicas(x)

    def _shared_rows(self, name: str, x: Tensor | None, rows: Tensor) -> Tensor | None:
        """What all replicas share, one row or as many as the batch has, as rows."""
        if x is None or x.shape[0] in (1, rows.shape[0]):
            return x
        if x.ndim != 2 or x.shape[0] * self.config.parscale_n != rows.shape[0]:
            raise ValueError(f"{name} must have shape (batch, seq), the same for all replicas, got {tuple(x.shape)}")
        return replicate(x, self.config.parscale_n)


class Qwen2ParScaleForCausalLM(Qwen2ParScalePreTrainedModel, Qwen2ForCausalLM):
    """transformers' Qwen2ForCausalLM over :class:`Qwen2ParScaleModel`; the head runs once, not once a replica.

    ``from_pretrained`` takes released ParScale checkpoints, and Qwen2's and Llama's: with ``parscale_n=4`` and the like
    a ParScale model starts from them, and transformers says which parameters are new.
    """

    def __init__(self, config: Qwen2ParScaleConfig):
        Qwen2PreTrainedModel.__init__(self, config)
        self.model = Qwen2ParScaleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """What this model has beyond Qwen2 (or Llama), by name: to train it alone, or to save it beside an adapter."""
        marks = ("prefix_", "cross_attn", "aggregate_layer")
        return {name: p for name, p in self.named_parameters() if any(mark in name for mark in marks)}

    # ------------------------------------------------------------ generation

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' ``generate``; prompts may be ``(batch, replicas, seq)``, padded on the left, a mask likewise.

        Then the sequences returned begin with the first replica's prompt.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is not None and ids.ndim == 3:
            mask = kwargs.pop("attention_mask", None)
            mask = torch.ones_like(ids) if mask is None else mask
            if mask.shape != ids.shape:
                raise ValueError(
                    f"attention_mask must have the prompts' shape {tuple(ids.shape)}, got {tuple(mask.shape)}"
                )
            kwargs |= {"replica_input_ids": ids, "replica_attention_mask": mask}
            kwargs["attention_mask"] = mask.any(1).to(mask.dtype)
            ids = ids[:, 0]
        return super().generate(ids, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *args: Any,
        replica_input_ids: Tensor | None = None,
        replica_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, with each replica's prompt at first and its padding ever after."""
        prepared = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, **kwargs
        )
        if replica_input_ids is not None and replica_attention_mask is not None:
            new = input_ids.shape[1] - replica_input_ids.shape[-1]
            prepared["attention_mask"] = nn.functional.pad(replica_attention_mask, (0, new), value=1)
            if prepared["input_ids"].shape[1] == input_ids.shape[1]:  # the first time, and always without a cache
                later = input_ids[:, None, replica_input_ids.shape[-1] :].expand(-1, replica_input_ids.shape[1], -1)
                prepared["input_ids"] = torch.cat([replica_input_ids, later], -1)
        return prepared

    def create_masks_for_generate(
        self,
        config: Qwen2ParScaleConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Masks before the (compiled) forward, as transformers calls for with a static cache."""
        if config.parscale_n == 1:
            return create_masks_for_generate(
                config, inputs_embeds, attention_mask, past_key_values, position_ids, **kwargs
            )
        return self.model.masks(inputs_embeds, attention_mask, position_ids, past_key_values)

    def _reorder_cache(self, past_key_values: Cache, beam_idx: Tensor) -> Cache:
        if not isinstance(past_key_values, ParscaleCache):
            beam_idx = replica_rows(beam_idx, beam_idx.shape[0], self.config.parscale_n)
        past_key_values.reorder_cache(beam_idx)  # type: ignore[arg-type]
        return past_key_values

    # ------------------------------------------------------------ saving

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """transformers' own, with the prefixes' MLP folded away: what is saved is an ordinary ParScale checkpoint."""
        if not self.config.parscale_prefix_mlp:
            return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        state_dict = fold_prefixes(self, dict(self.state_dict() if state_dict is None else state_dict))
        hidden, self.config.parscale_prefix_mlp = self.config.parscale_prefix_mlp, 0
        try:
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        finally:
            self.config.parscale_prefix_mlp = hidden


@torch.no_grad()
def fold_prefixes(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's whole (unsharded) state dict with the prefixes' MLPs applied and gone."""
    state_dict = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, PrefixMLP):
            layer = name.removesuffix("prefix_mlp")
            weights = {key: state_dict.pop(f"{name}.{key}") for key in module.state_dict()}
            names = [f"{layer}prefix_k", f"{layer}prefix_v"]
            folded = torch.func.functional_call(module, weights, tuple(state_dict[key] for key in names))
            state_dict.update(zip(names, (x.contiguous() for x in folded), strict=True))
    return state_dict


AutoConfig.register("qwen2_parscale", Qwen2ParScaleConfig, exist_ok=True)
AutoModel.register(Qwen2ParScaleConfig, Qwen2ParScaleModel, exist_ok=True)
AutoModelForCausalLM.register(Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM, exist_ok=True)
