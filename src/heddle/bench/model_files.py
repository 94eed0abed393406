"""A model in the files that peers read, its weights in float32: a Hugging Face folder, a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from heddle.data.locate import locate, read_json

if TYPE_CHECKING:
    from heddle.data.tokenizers import Tokenizer
    from heddle.jax import Transformer


def write_folder(model: Transformer, tokenizer: Tokenizer, out: Path) -> None:
    """A Hugging Face folder of a model in memory, whose answers only their length ends: it names no end of text."""
    model.save_pretrained(out, tokenizer)
    for name in ("config.json", "generation_config.json"):
        if (out / name).is_file():
            (out / name).write_text(json.dumps(read_json(out / name) | {"eos_token_id": None}, indent=2) + "\n")


def gguf_file(name: str | Path | None) -> Path:
    """The GGUF file that a model is, for a peer that reads nothing else.

    Raises:
        ValueError: the model is something else.
    """
    path = locate(name)
    if path.suffix != ".gguf":
        raise ValueError("it reads GGUF files alone")
    return path


def write_gguf(source: Path, out: Path) -> None:
    """A GGUF file's copy whose tensors are float32."""
    from gguf import GGUFReader, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], (*field.types, None)[1])
    writer.add_file_type(0)  # all float32
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in tensor.shape[::-1]]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
