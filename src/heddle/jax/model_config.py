"""What a Hugging Face ``config.json`` says of a model: every field is read, known to be harmless, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from heddle.attention.dilated_patterns import check_patterns, patterns_of_option
from heddle.attention.rope import Rope
from heddle.data.locate import locate, read_json

#: The model types, each with the defaults in which transformers' configuration class differs from ModelConfig.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
    "qwen2_parscale": {
        "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "attention_bias": True,
    },
}  # fmt: skip
PARSCALE = "qwen2_parscale"
PARSCALE_BASES = ("llama", "qwen2", PARSCALE)  #: model types whose weights a ParScale model may start from
CROSS_ATTN_MODES = ("joint", "sublayer")
PREFIX_SCOPES = ("own", "all")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
FULL, SLIDING = "full_attention", "sliding_attention"

_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
_WINDOW = {"use_sliding_window", "max_window_layers"}  # Qwen's way to say layer_types
_WINDOW_TYPES = ("qwen2", "qwen3", PARSCALE)
#: Fields that change nothing here, whatever they say.
_HARMLESS = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "dtype", "is_llama_config",
    "max_length", "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
    "use_cache",
}  # fmt: skip
#: Fields that change nothing as long as they say this.
_ONLY = {
    "attention_dropout": 0, "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "output_attentions": False,
    "output_hidden_states": False, "parscale_prefix_mlp": 0, "pretraining_tp": 1, "return_dict": True,
    "rope_interleaved": False,
}  # fmt: skip


@dataclass(frozen=True)
class Dilation:
    """Dilated attention (arXiv 2307.02486): w and r of each pattern.

    Raises:
        ValueError: as of :func:`heddle.attention.dilated.dilated_attention`.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    def __post_init__(self):
        patterns = check_patterns(self.segment_lengths, self.dilation_rates)
        for i, name in enumerate(("segment_lengths", "dilation_rates")):
            object.__setattr__(self, name, tuple(pattern[i] for pattern in patterns))

    @classmethod
    def from_dict(cls, option: Any) -> Dilation | None:
        """What ``attention`` says in a ``config.json``; None: ``{"kind": "dense"}`` or nothing.

        Raises:
            ValueError: another kind, other fields; as of the class.
        """
        patterns = patterns_of_option(option)
        return None if patterns is None else cls(*zip(*patterns, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`from_dict`."""
        return {
            "kind": "dilated", "segment_lengths": [*self.segment_lengths], "dilation_rates": [*self.dilation_rates],
        }  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of Llama's kind; the fields are those of a Hugging Face ``config.json``.

    ``num_key_value_heads``, ``head_dim``, ``rope`` and ``layer_types`` follow from the rest where they are None.
    ``attention_bias`` gives q, k, v and o a bias (llama, qwen3; qwen2 always has those of q, k and v; in qwen2_parscale
    those of q, k and v); ``layer_types`` says which layers see ``sliding_window`` keys only; with ``attention`` all are
    dilated. Hashable, so static under jax.jit.

    ParScale (arXiv 2505.10475), in model type qwen2_parscale: ``parscale_n`` replicas, with ``parscale_n_tokens``
    learned prefix keys in each layer, of which a replica sees its ``"own"`` or ``"all"`` (``parscale_prefix_scope``);
    ``parscale_attn_smooth`` is the ε of their weights in the sum. With ``enable_cross_attn`` they look at each other in
    ``parscale_cross_attn_layers`` (None: all), in self-attention's own softmax (``"joint"``) or before it
    (``"sublayer"``); ``enable_replica_rope`` turns these queries and keys by the replica's index.

    Raises:
        ValueError: sizes that don't go together, a feature that the model type lacks, an unknown activation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope: Rope | None = None
    model_type: str = "llama"
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    parscale_n: int = 1
    parscale_n_tokens: int = 48
    parscale_attn_smooth: float = 0.01
    parscale_prefix_scope: str = "own"
    enable_cross_attn: bool = False
    parscale_cross_attn_layers: tuple[int, ...] | None = None
    parscale_cross_attn_mode: str = "joint"
    enable_replica_rope: bool = False
    attention: Dilation | None = None

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}; got {self.model_type!r}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
        self._fill_heads()
        self._fill_layer_types()
        for name, types in {"attention_bias": ("llama", "qwen3", PARSCALE), "mlp_bias": ("llama",)}.items():
            if getattr(self, name) and self.model_type not in types:
                raise ValueError(f"{name} must be false for model_type {self.model_type!r}, got true")
        if self.attention is not None and self.sliding_window is not None:
            raise ValueError(f"sliding_window must be none where attention is dilated, got {self.sliding_window}")
        self._check_parscale()

    def _check_parscale(self) -> None:
        if self.parscale_n < 1:
            raise ValueError(f"parscale_n must be at least 1, got {self.parscale_n}")
        if self.parscale_n > 1 and self.model_type != PARSCALE:
            raise ValueError(f"parscale_n must be 1 for model_type {self.model_type!r}, got {self.parscale_n}")
        if self.parscale_n_tokens < 0:
            raise ValueError(f"parscale_n_tokens must be at least 0, got {self.parscale_n_tokens}")
        if not 0 <= self.parscale_attn_smooth < 1:
            raise ValueError(f"parscale_attn_smooth must be in [0, 1), got {self.parscale_attn_smooth}")
        known = {"parscale_prefix_scope": PREFIX_SCOPES, "parscale_cross_attn_mode": CROSS_ATTN_MODES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}")
        wrong = [i for i in self.parscale_cross_attn_layers or () if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"parscale_cross_attn_layers must be in [0, {self.num_hidden_layers}), got {', '.join(map(str, wrong))}"
            )

    def _fill_heads(self) -> None:
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.kv_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    "hidden_size must be a multiple of num_attention_heads where head_dim isn't given, got "
                    f"{self.hidden_size} and {self.num_attention_heads}"
                )
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        if self.rope is None:
            self._set("rope", Rope.from_config({"max_position_embeddings": self.max_position_embeddings}, self.dim))
        if self.rotary.head_dim != self.dim:
            raise ValueError(f"rope must be of head_dim {self.dim}, got {self.rotary.head_dim}")

    def _fill_layer_types(self) -> None:
        kind = FULL if self.sliding_window is None else SLIDING
        kinds = self.layer_types or (kind,) * self.num_hidden_layers
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= {FULL, SLIDING}:
            raise ValueError(
                f"layer_types must hold {FULL} or {SLIDING} for each of {self.num_hidden_layers} layers, got {kinds}"
            )
        if SLIDING not in kinds:
            self._set("sliding_window", None)
        elif self.sliding_window is None:
            raise ValueError(f"sliding_window must be given where layer_types holds {SLIDING}")
        elif self.model_type == "llama" or (self.model_type == "mistral" and FULL in kinds):
            raise ValueError(f"layer_types of model_type {self.model_type!r} can't be {kinds}")
        self._set("layer_types", kinds)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    # The optional fields, filled in; and what follows from the model type.

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads  # pyright: ignore[reportReturnType]

    @property
    def dim(self) -> int:
        """The size of a head."""
        return self.head_dim  # pyright: ignore[reportReturnType]

    @property
    def rotary(self) -> Rope:
        return self.rope  # pyright: ignore[reportReturnType]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many keys each layer's queries see, their own among them; None: all."""
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types or ())

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.attention_bias and self.model_type != PARSCALE

    @property
    def qk_norm(self) -> bool:
        """Whether each head's query and key pass an RMSNorm before they are rotated."""
        return self.model_type == "qwen3"

    @property
    def eos_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else eos

    def cross_attn_mode(self, layer: int) -> str | None:
        """How replicas look at each other in this layer: ``"joint"``, ``"sublayer"`` or None, not at all."""
        layers = self.parscale_cross_attn_layers
        enabled = self.parscale_n > 1 and self.enable_cross_attn and (layers is None or layer in layers)
        return self.parscale_cross_attn_mode if enabled else None

    def with_parscale(self, **options: Any) -> ModelConfig:
        """The ParScale model that starts from such a model's weights, with these of the ``parscale_*`` fields changed.

        Raises:
            ValueError: no such field, a value out of range, a model type or a feature that ParScale's lacks.
        """
        if unknown := sorted(set(options) - set(PARSCALE_FIELDS)):
            raise ValueError(f"ParScale's options are {', '.join(PARSCALE_FIELDS)}; got {', '.join(unknown)}")
        if self.model_type not in PARSCALE_BASES:
            raise ValueError(f"ParScale starts from {', '.join(PARSCALE_BASES)} models, got {self.model_type!r}")
        if self.model_type == "llama" and (self.attention_bias or self.mlp_bias):
            raise ValueError("attention_bias and mlp_bias must be false in a Llama model that ParScale starts from")
        types = {field.name: str(field.type) for field in fields(self)}
        values = {n: None if value is None else _typed(n, value, types[n]) for n, value in options.items()}
        return replace(self, model_type=PARSCALE, attention_bias=self.qkv_bias, **values)

    # ------------------------------------------------------------------ config.json

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """From the contents of a Hugging Face ``config.json``.

        Raises:
            ValueError: a model type, field or value that isn't supported, by name; a field that is missing.
        """
        given = {name: value for name, value in config.items() if value is not None}
        model_type = given.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}; got {model_type!r}")
        apart = {"rope", "attention", *(() if model_type == PARSCALE else PARSCALE_FIELDS)}
        own = {field.name: field for field in fields(cls) if field.name not in apart}
        known = {*own, "attention", *_ROPE, *_HARMLESS, *_ONLY, *(_WINDOW if model_type in _WINDOW_TYPES else ())}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"fields that aren't supported for model_type {model_type!r}: {', '.join(unknown)}")
        if missing := [name for name, field in own.items() if field.default is MISSING and name not in given]:
            raise ValueError(f"fields that are missing: {', '.join(missing)}")
        for name, only in _ONLY.items():
            if given.get(name, only) != only:
                raise ValueError(f"{name} must be {only}, got {given[name]!r}")

        values = {name: _typed(name, given[name], str(own[name].type)) for name in own if name in given}
        for name, default in MODEL_TYPES[model_type].items():
            if name not in config:
                values[name] = default
        if model_type in _WINDOW_TYPES:
            if not given.get("use_sliding_window", False):
                values.pop("sliding_window", None)
            elif "layer_types" not in values and "sliding_window" in values:
                first = given.get("max_window_layers", 28)
                layers = range(values["num_hidden_layers"])
                values["layer_types"] = tuple(SLIDING if layer >= first else FULL for layer in layers)
        values["attention"] = Dilation.from_dict(given.get("attention"))
        plain = cls(**values)
        rope = {name: given[name] for name in _ROPE if name in given}
        rope["max_position_embeddings"] = plain.max_position_embeddings
        return cls(**values, rope=Rope.from_config(rope, plain.dim))

    @classmethod
    def from_json_file(cls, path: str | Path) -> ModelConfig:
        """From a ``config.json``, or from the folder that holds one.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or not a supported model; the message begins with the path.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        config = read_json(file)
        try:
            return cls.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_pretrained(cls, name: str | Path | None = None) -> ModelConfig:
        """Of a folder (Hugging Face's or Meta's), a GGUF file or a name on the hub; None: of the embedded model.

        Raises:
            FileNotFoundError, ValueError: as :func:`heddle.data.locate.locate` and :meth:`from_json_file`.
        """
        from heddle.data.gguf import GGUF
        from heddle.data.meta import Meta

        path = locate(name, weights=False)
        if path.suffix == ".gguf":
            return cls.from_dict(GGUF.open(path).config())
        return cls.from_dict(Meta(path).config()) if Meta.is_at(path) else cls.from_json_file(path)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that transformers 5 loads as the same model."""
        config = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _SAVED_APART}
        name = "Qwen2ParScale" if self.model_type == PARSCALE else self.model_type.capitalize()
        config["architectures"] = [f"{name}ForCausalLM"]
        config["rope_parameters"] = _rope_parameters(self.rotary)
        if self.model_type in ("llama", "qwen3", PARSCALE):
            config["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            config["mlp_bias"] = self.mlp_bias
        else:
            config["sliding_window"] = self.sliding_window
        if self.model_type in _WINDOW_TYPES:
            config["use_sliding_window"] = self.sliding_window is not None
            config["layer_types"] = self.layer_types
        if self.model_type == PARSCALE:
            config |= {name: getattr(self, name) for name in PARSCALE_FIELDS}
        if self.attention is not None:
            config["attention"] = self.attention.to_dict()
        return json.loads(json.dumps(config))  # tuples as lists


PARSCALE_FIELDS = tuple(f.name for f in fields(ModelConfig) if f.name.startswith(("parscale_", "enable_")))
_SAVED_APART = {"rope", "attention_bias", "mlp_bias", "sliding_window", "layer_types", "attention", *PARSCALE_FIELDS}
_KINDS: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "tuple[int, ...]": (list, tuple),
    "tuple[str, ...]": (list, tuple),
}


def _typed(name: str, value: Any, annotation: str) -> Any:
    """A JSON value as its field's type; a list becomes a tuple."""
    for kind in annotation.split(" | "):
        accepted = _KINDS.get(kind)
        if accepted is None or not isinstance(value, accepted) or (isinstance(value, bool) and accepted is not bool):
            continue
        if not isinstance(value, (list, tuple)):
            return value
        element = _KINDS[kind.removeprefix("tuple[").removesuffix(", ...]")]
        if all(isinstance(item, element) and not isinstance(item, bool) for item in value):
            return tuple(value)
    raise ValueError(f"{name} must be {annotation.replace('tuple', 'list').removesuffix(' | None')}, got {value!r}")


def _rope_parameters(rope: Rope) -> dict[str, Any]:
    """``rope_parameters`` as transformers 5 writes them."""
    apart = {"head_dim", "theta", "rule", "max_position", "original_max_position"}
    parameters: dict[str, Any] = {"rope_type": rope.rule, "rope_theta": rope.theta}
    for field in fields(rope):
        value = getattr(rope, field.name)
        if field.name not in apart and value != field.default:
            parameters[field.name] = value
    if rope.rule in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = rope.original_max_position
    return parameters
