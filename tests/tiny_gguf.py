"""Small GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers

HEAD = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(
    path: Path,
    model: transformers.PreTrainedModel,
    tokenizer: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """The model as a GGUF file; ``fields`` and ``tensors`` add to what it would hold, or with None take away."""
    config: Any = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        values["attention.key_length"] = config.head_dim
    for name, value in (values | (fields or {})).items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{name}", value)
    for name, value in (tokenizer or {}).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool}[type(value)](name, value)

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    written: dict[str, np.ndarray | None] = {}
    for name, tensor in state.items():
        if name in HEAD:
            written[HEAD[name]] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        rest, suffix = rest.rsplit(".", 1)
        if architecture == "llama" and LAYER[rest] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if LAYER[rest] == "attn_q" else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        written[f"blk.{layer}.{LAYER[rest]}.{suffix}"] = tensor
    for name, array in (written | (tensors or {})).items():
        if array is not None and array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        elif array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with each rotated pair next to each other, as llama.cpp has them for Llama."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
