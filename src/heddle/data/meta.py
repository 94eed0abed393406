"""Llama as Meta publishes it: ``params.json`` and ``consolidated.00.pth``, one file a rank of its model parallelism."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from .locate import read_json
from .pth import Pth

PARAMS = "params.json"
#: Meta's names, by Hugging Face's; {} is the layer. Rotated pairs lie next to each other, as in GGUF.
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attention.wq.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attention.wk.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attention.wv.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attention.wo.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.feed_forward.w3.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
#: Which axis ranks share; of the rest each has the whole.
_COLUMNS = re.compile(r"layers\.\d+\.(attention\.w[qkv]|feed_forward\.w[13])\.weight|output\.weight")
_ROWS = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_NUMBERS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_batch_size",
}  # fmt: skip


class Meta:
    """A folder of Meta's, its weights memory-mapped.

    Raises:
        FileNotFoundError: no ``params.json``, or no ``consolidated.00.pth``.
        ValueError: files that are broken, parameters that aren't supported, ranks that don't go together.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.params = {name: value for name, value in read_json(self.path / PARAMS).items() if value is not None}
        if unknown := sorted(set(self.params) - _NUMBERS):
            raise self._error(f"parameters that aren't supported: {', '.join(unknown)}")
        for name in ("dim", "n_layers", "n_heads"):
            if not isinstance(value := self.params.get(name), int) or value < 1:
                raise self._error(f"{name} must be an integer of at least 1, got {value!r}")
        for name, value in self.params.items():
            if name != "vocab_size" and not (isinstance(value, (int, float)) and (value > 0 or value is False)):
                raise self._error(f"{name} must be a positive number, got {value!r}")
        files = sorted(self.path.glob("consolidated.*.pth"))
        names = [f"consolidated.{rank:02}.pth" for rank in range(max(len(files), 1))]
        if [file.name for file in files] != names:
            found = ", ".join(file.name for file in files) or "none"
            raise FileNotFoundError(f"{self.path}: must hold {', '.join(names)}, found {found}")
        self._shards = [Pth(file) for file in files]
        stored = {name: kind for name, kind in self._shards[0].dtypes.items() if name != "rope.freqs"}  # made anew
        self.shapes: dict[str, tuple[int, ...]] = {name: self._joined(name) for name in stored}
        #: What most tensors are stored in.
        self.dtype = max(stored.values(), key=list(stored.values()).count, default="float32")

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether this is a folder of Meta's, and not one of Hugging Face's."""
        return (path / PARAMS).is_file() and not (path / "config.json").is_file()

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, the ranks' parts joined."""
        axis = self._axis(name)
        if axis is None:
            return self._shards[0].tensor(name)
        return np.concatenate([shard.tensor(name) for shard in self._shards], axis=axis)

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``, as Hugging Face would have it.

        Two things aren't in ``params.json`` and follow from the rest: the context each generation was trained with, and
        the factor of Llama 3's rule, 32 in the small models of Llama 3.2 and 8 in those of 3.1 and 3.3.
        ``max_seq_len`` and ``rope_scaling_factor`` say otherwise where they are given.
        """
        params = self.params
        dim, heads, eps = params["dim"], params["n_heads"], params.get("norm_eps", 1e-5)
        theta, scaled = params.get("rope_theta", 10000.0), params.get("use_scaled_rope", False)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(theta)}
        context = 131072 if scaled else 8192 if theta > 10000 else 2048 if eps < 1e-5 else 4096
        if scaled:
            rope |= {
                "rope_type": "llama3",
                "factor": float(params.get("rope_scaling_factor", 32 if dim < 4096 else 8)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        vocab_size = params.get("vocab_size", -1)
        if vocab_size < 1:  # Llama 2 leaves it to the tokenizer
            vocab_size = self.shapes.get(_EMBEDDING, (0,))[0]
        return {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": dim,
            "intermediate_size": self._ffn(dim),
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads", heads),
            "max_position_embeddings": params.get("max_seq_len", context),
            "rms_norm_eps": eps,
            "tie_word_embeddings": _HEAD not in self.shapes,
            "rope_parameters": rope,
        }

    def _ffn(self, dim: int) -> int:
        """Two thirds of four times the width, since the network is gated, times the multiplier, in whole multiples."""
        size = int(self.params.get("ffn_dim_multiplier", 1) * int(2 * 4 * dim / 3))
        multiple = self.params.get("multiple_of", 256)
        return -(-size // multiple) * multiple

    def _axis(self, name: str) -> int | None:
        if len(self._shards) == 1:
            return None
        if name == _EMBEDDING:  # by width in Llama 2, by vocabulary since Llama 3
            return 0 if self._shards[0].shapes[name][-1] == self.params["dim"] else 1
        return 0 if _COLUMNS.fullmatch(name) else 1 if _ROWS.fullmatch(name) else None

    def _joined(self, name: str) -> tuple[int, ...]:
        shapes = [shard.shapes.get(name) for shard in self._shards]
        first, axis = self._shards[0].shapes[name], self._axis(name)
        if any(shape != first for shape in shapes):
            raise self._error(f"{name} must be of one shape in all files, got {', '.join(map(str, shapes))}")
        if axis is None:
            return first
        return tuple(n * len(shapes) if i == axis else n for i, n in enumerate(first))

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")
