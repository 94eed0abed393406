"""GGUF files: what they say of a model in the words of a Hugging Face ``config.json``, and their tensors as float32."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

#: GGUF architectures that are served, as Hugging Face model types.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FACTORS = "rope_freqs.weight"  #: Llama 3's stretching of the rotary wavelengths, as a tensor


class GGUF:
    """A GGUF file, memory-mapped (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole GGUF file.
    """

    def __init__(self, path: str | Path):
        from gguf import GGUFReader

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            reader = GGUFReader(self.path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # a broken file can fail anywhere in the reader
            raise ValueError(f"{path}: not a whole GGUF file: {error}") from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        #: Name to shape, outputs first as in torch.
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in self._tensors.items()
        }

    @classmethod
    def open(cls, path: str | Path) -> GGUF:
        """As the class, but parsed once while the file stays the same: a vocabulary takes seconds to read."""
        path = Path(path).resolve()
        stat = path.stat() if path.is_file() else None
        return _opened(path, stat and (stat.st_mtime_ns, stat.st_size))

    def tensor(self, name: str) -> Float[np.ndarray, ...]:
        """A tensor dequantised to float32."""
        from gguf import dequantize

        stored = self._tensors[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor {name} is of type {stored.tensor_type.name}, which can't be read"
            ) from None
        return np.asarray(values, dtype=np.float32).reshape(self.shapes[name])

    def attention_heads(self) -> tuple[int, int]:
        """How many query heads and key/value heads there are."""
        heads = self._number("attention.head_count")
        return heads, self._number("attention.head_count_kv", heads)

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``, as Hugging Face would have it.

        Raises:
            ValueError: an architecture or rotary rule that isn't served, or a field that is missing.
        """
        architecture = self.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{self.path}: architecture must be one of {', '.join(ARCHITECTURES)}; got {architecture!r}"
            )
        heads, kv_heads = self.attention_heads()
        window = self._number("attention.sliding_window", 0)
        config: dict[str, Any] = {
            "model_type": "mistral" if architecture == "llama" and window else ARCHITECTURES[architecture],
            "vocab_size": self.shapes.get("token_embd.weight", (0,))[0],
            "hidden_size": self._number("embedding_length"),
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self._number("attention.key_length", self._number("embedding_length") // heads),
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "rope_parameters": self._rope(),
        }
        if window:
            config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
            if config["model_type"] == "mistral":
                del config["use_sliding_window"], config["max_window_layers"]
        if architecture == "llama" and "blk.0.attn_q.bias" in self.shapes:
            config["attention_bias"] = True
        for role in ("bos", "eos", "padding"):
            if (token := self.metadata.get(f"tokenizer.ggml.{role}_token_id")) is not None:
                config["pad_token_id" if role == "padding" else f"{role}_token_id"] = token
        return config

    def _rope(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self._float("rope.freq_base", 10000.0)}
        if ROPE_FACTORS in self.shapes:
            # The file keeps Llama 3's rule only as its result. Its three other parameters have never varied; that
            # they fit is checked where the tensor is loaded.
            return rope | {
                "rope_type": "llama3",
                "factor": float(self.tensor(ROPE_FACTORS).max()),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        rule = self._get("rope.scaling.type", "none")
        if rule in ("linear", "yarn"):
            rope |= {"rope_type": rule, "factor": self._float("rope.scaling.factor")}
            if rule == "yarn":
                rope["original_max_position_embeddings"] = self._number("rope.scaling.original_context_length")
        elif rule != "none":
            raise ValueError(f"{self.path}: rope scaling must be none, linear or yarn; got {rule!r}")
        return rope

    def _get(self, name: str, default: Any = None) -> Any:
        key = f"{self.metadata.get('general.architecture')}.{name}"
        value = self.metadata.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: {key} is missing")
        return value

    def _number(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, list):  # one a layer
            if len(set(value)) != 1:
                raise ValueError(f"{self.path}: {name} must be the same in all layers, got {value}")
            value = value[0]
        return int(value)

    def _float(self, name: str, default: float | None = None) -> float:
        return float(str(np.float32(self._get(name, default))))  # 1e-05, not float32's 9.999999747378752e-06


@functools.lru_cache(maxsize=2)
def _opened(path: Path, version: tuple[int, int] | None) -> GGUF:
    return GGUF(path)
