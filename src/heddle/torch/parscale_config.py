"""The configuration of a ParScale model: Qwen2's, and how its replicas run and look at each other."""

from __future__ import annotations

from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from .huggingface import dilation

#: Checkpoints of these types are taken as they are, or as the start of a ParScale model.
BASES = ("qwen2", "llama")
MODES = ("joint", "sublayer")
SCOPES = ("own", "all")


@no_type_check  # transformers' own check of the fields' types, by strict, takes what no field has too
@strict
class Qwen2ParScaleConfig(Qwen2Config):
    """Qwen2's configuration, and ParScale's (arXiv 2505.10475).

    Args:
        parscale_n: P, the number of replicas. 1: Qwen2 itself; nothing below has an effect.
        parscale_n_tokens: learned prefix keys of each replica in each layer.
        parscale_attn_smooth: ε of the replicas' weights ``(1 - ε) w + ε / P``; the released checkpoints say 0.1.
        parscale_prefix_scope: a replica sees its ``"own"`` prefix, as released models do, or ``"all"`` replicas'.
        parscale_prefix_mlp: hidden size of an MLP through which the prefixes are trained, folded away when the model is
            saved; 0: none.
        enable_cross_attn: replicas look at each other.
        parscale_cross_attn_layers: in which layers; None: all.
        parscale_cross_attn_mode: ``"joint"``: in self-attention's own softmax; ``"sublayer"``: before self-attention.
        enable_replica_rope: turn queries and keys between replicas by the replica's index.
        attention_bias: whether query, key and value projections have a bias: Qwen2's do, Llama's don't.
        head_dim: None: ``hidden_size / num_attention_heads``.
        attention: ``{"kind": "dilated", "segment_lengths": [...], "dilation_rates": [...]}``: a replica attends to its
            own tokens by LongNet's patterns (arXiv 2307.02486). None: plain attention.

    Raises:
        ValueError: a value out of range.
    """

    model_type = "qwen2_parscale"

    parscale_n: int = 1
    parscale_n_tokens: int = 48
    parscale_attn_smooth: float = 0.01
    parscale_prefix_scope: str = "own"
    parscale_prefix_mlp: int = 0
    enable_cross_attn: bool = False
    parscale_cross_attn_layers: list[int] | tuple[int, ...] | None = None
    parscale_cross_attn_mode: str = "joint"
    enable_replica_rope: bool = False
    attention_bias: bool = True
    head_dim: int | None = None
    attention: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise ValueError if a ParScale value is out of range; a model does so too, as fields may be set later."""
        if self.parscale_n < 1:
            raise ValueError(f"parscale_n must be at least 1, got {self.parscale_n}")
        for name in ("parscale_n_tokens", "parscale_prefix_mlp"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.parscale_attn_smooth < 1:
            raise ValueError(f"parscale_attn_smooth must be in [0, 1), got {self.parscale_attn_smooth}")
        for name, known in (("parscale_prefix_scope", SCOPES), ("parscale_cross_attn_mode", MODES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        dilation(self)
        wrong = [i for i in self.parscale_cross_attn_layers or () if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"parscale_cross_attn_layers must be in [0, {self.num_hidden_layers}), got {', '.join(map(str, wrong))}"
            )

    def cross_attn_mode(self, layer: int) -> str | None:
        """How the replicas look at each other in this layer: ``"joint"``, ``"sublayer"`` or None, not at all."""
        layers = self.parscale_cross_attn_layers
        enabled = self.parscale_n > 1 and self.enable_cross_attn and (layers is None or layer in layers)
        return self.parscale_cross_attn_mode if enabled else None

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers has it; Qwen2's and Llama's configurations become those of a ParScale model of theirs."""
        values, kwargs = super().get_config_dict(*args, **kwargs)
        return _from_base(values), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers has it, but what ``kwargs`` change is checked too."""
        changes = {name: kwargs.pop(name) for name in list(kwargs) if is_parscale(name)}
        return super().from_dict(config_dict | changes, **kwargs)

    @classmethod
    def from_base(cls, base: dict[str, Any], **changes: Any) -> Any:
        """The configuration of a ParScale model that starts from a Qwen2 or Llama of configuration ``base``."""
        return cls.from_dict(_from_base(base), **changes)


def is_parscale(name: str) -> bool:
    """Whether a field of the configuration is ParScale's."""
    return name.startswith("parscale_") or name in ("enable_cross_attn", "enable_replica_rope")


def _from_base(values: dict[str, Any]) -> dict[str, Any]:
    own, kind = Qwen2ParScaleConfig.model_type, values.get("model_type", Qwen2ParScaleConfig.model_type)
    if kind == own:
        return {name: value for name, value in values.items() if name != "auto_map"}  # code of released checkpoints
    if kind not in BASES:
        raise ValueError(f"model_type must be one of {', '.join((own, *BASES))}, got {kind!r}")
    base = AutoConfig.for_model(kind, **{k: v for k, v in values.items() if k != "model_type"}).to_dict()
    if kind == "llama" and (base["attention_bias"] or base["mlp_bias"]):
        raise ValueError("attention_bias and mlp_bias must be false in a Llama checkpoint, as Qwen2 lacks them")
    for name in ("mlp_bias", "pretraining_tp", "transformers_version", "quantization_config"):
        base.pop(name, None)
    return base | {"model_type": own, "architectures": ["Qwen2ParScaleForCausalLM"]}
