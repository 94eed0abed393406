"""Small folders as Meta publishes Llama, and a vocabulary in tiktoken's form."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny_gguf import interleaved
from tiny_models import SIZES

#: Of each tensor in a layer, Meta's name and the axis that ranks share.
LAYER = {
    "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
}  # fmt: skip


def llama(**changes: Any) -> transformers.PreTrainedModel:
    """A random Llama whose sizes two ranks can share."""
    config = transformers.LlamaConfig(**(SIZES | {"vocab_size": 200, "rms_norm_eps": 1e-5} | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def write(
    folder: Path,
    model: transformers.PreTrainedModel,
    ranks: int = 1,
    embedding_axis: int = 0,
    params: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The model as ``ranks`` files; ``params`` add to what ``params.json`` would hold, or with None take away."""
    config: Any = model.config
    said = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size, "multiple_of": 64,
        "ffn_dim_multiplier": 0.75, "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
    } | (params or {})  # fmt: skip
    tensors: dict[str, tuple[torch.Tensor, int | None]] = {"rope.freqs": (torch.ones(4), None)}
    for name, tensor in model.state_dict().items():
        if name == "model.embed_tokens.weight":
            tensors["tok_embeddings.weight"] = tensor, embedding_axis
        elif name == "model.norm.weight":
            tensors["norm.weight"] = tensor, None
        elif name == "lm_head.weight":
            if not config.tie_word_embeddings:
                tensors["output.weight"] = tensor, 0
        else:
            _, _, layer, rest = name.split(".", 3)
            theirs, axis = LAYER[rest.removesuffix(".weight")]
            if theirs[-2:] in ("wq", "wk"):
                heads = config.num_attention_heads if theirs[-1] == "q" else config.num_key_value_heads
                tensor = torch.from_numpy(np.ascontiguousarray(interleaved(tensor.numpy(), heads)))
            tensors[f"layers.{layer}.{theirs}.weight"] = tensor, axis
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    for rank in range(ranks):
        part = {
            name: (tensor if axis is None else tensor.chunk(ranks, axis)[rank]).to(dtype).clone()
            for name, (tensor, axis) in tensors.items()
        }
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    return folder


def write_vocabulary(folder: Path, words: list[str]) -> dict[bytes, int]:
    """``tokenizer.model`` of all bytes and of whatever pairs lead to these words."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in words:
        data = word.encode()
        for end in range(2, len(data) + 1):
            ranks.setdefault(data[:end], len(ranks))
    lines = [base64.b64encode(token) + f" {rank}".encode() for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return ranks
