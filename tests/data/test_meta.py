"""Meta's folders: the configurations of the published models, and what isn't right with one."""

import json

import numpy as np
import pytest
import tiny_meta
import torch

from heddle.data.meta import Meta
from heddle.data.tokenizers import LLAMA3_SPECIAL, Tokenizer

#: params.json of published models, and of their Hugging Face folders: intermediate size, context, rotary rule, factor.
PUBLISHED = {
    "Llama 1 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
        (11008, 2048, "default", None),
    ),
    "Llama 2 70B": (
        {
            "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
            "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1,
        },
        (28672, 4096, "default", None),
    ),
    "Llama 3 8B": (
        {
            "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
            "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
        },
        (14336, 8192, "default", None),
    ),
    "Llama 3.1 8B": (
        {
            "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
            "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-05, "rope_theta": 500000.0,
            "use_scaled_rope": True,
        },
        (14336, 131072, "llama3", 8.0),
    ),
    "Llama 3.2 1B": (
        {
            "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
            "ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0,
            "use_scaled_rope": True,
        },
        (8192, 131072, "llama3", 32.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name, tmp_path):
    params, (ffn, context, rule, factor) = PUBLISHED[name]
    (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save({"tok_embeddings.weight": torch.zeros(7, params["dim"])}, tmp_path / "consolidated.00.pth")
    config = Meta(tmp_path).config()
    rope = config["rope_parameters"]
    assert (config["intermediate_size"], config["max_position_embeddings"]) == (ffn, context)
    assert (rope["rope_type"], rope.get("factor")) == (rule, factor)
    assert rope["rope_theta"] == params.get("rope_theta", 10000.0)
    assert config["vocab_size"] == (7 if params["vocab_size"] < 0 else 128256)
    assert config["num_key_value_heads"] == params.get("n_kv_heads", params["n_heads"])


def error_of(folder) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Meta(folder)
    return str(caught.value)


def test_what_is_wrong_with_a_folder(tmp_path):
    model = tiny_meta.llama()
    folder = tiny_meta.write(tmp_path, model, ranks=2, params={"quantization_args": {}})
    assert error_of(folder) == f"{folder}: parameters that aren't supported: quantization_args"
    tiny_meta.write(folder, model, ranks=2, params={"n_layers": 0})
    assert error_of(folder) == f"{folder}: n_layers must be an integer of at least 1, got 0"
    tiny_meta.write(folder, model, ranks=2, params={"norm_eps": "small"})
    assert error_of(folder) == f"{folder}: norm_eps must be a positive number, got 'small'"
    tiny_meta.write(folder, model, ranks=2)
    torch.save({"tok_embeddings.weight": torch.zeros(3, 32)}, folder / "consolidated.01.pth")
    assert (
        error_of(folder) == f"{folder}: tok_embeddings.weight must be of one shape in all files, got (100, 32), (3, 32)"
    )
    torch.save({"tok_embeddings.weight": torch.zeros(100, 32)}, folder / "consolidated.01.pth")
    assert "layers.0.self" not in (message := error_of(folder))
    assert "must be of one shape in all files, got" in message
    assert message.endswith(", None")
    (folder / "consolidated.00.pth").unlink()
    assert error_of(folder) == f"{folder}: must hold consolidated.00.pth, found consolidated.01.pth"
    (folder / "consolidated.01.pth").unlink()
    assert error_of(folder) == f"{folder}: must hold consolidated.00.pth, found none"


def merged(ranks: dict[bytes, int], text: str) -> list[int]:
    """Byte-pair encoding of one piece as tiktoken defines it: while there is one, the pair of the lowest rank."""
    parts = [bytes([byte]) for byte in text.encode()]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, 10**9) for a, b in zip(parts, parts[1:], strict=False)]
        if (best := min(pairs)) == 10**9:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def test_llama_3s_vocabulary(tmp_path):
    ranks = tiny_meta.write_vocabulary(tmp_path, [" the", "heddle", "there", " weft", "ddl", "über"])
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == len(ranks) + LLAMA3_SPECIAL
    for word in ("heddle", "heddles", "thethere", "addled", " weft", "überall", "日本"):
        ids = tokenizer.encode(word, add_special=False)
        assert ids == merged(ranks, word), word
        assert tokenizer.decode(ids) == word
    text = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    ids = [id_ - len(ranks) for id_ in tokenizer.encode(text)]
    assert [id_ for id_ in ids if id_ >= 0] == [0, 6, 7, 9]  # as in Llama 3, from 128,000 on, with a bos before
    assert [stop - len(ranks) for stop in tokenizer.stop_ids] == [1, 8, 9]
    names = [tokenizer.backend.id_to_token(len(ranks) + i) for i in (2, 3, 5, 11, 255)]
    assert names == [f"<|reserved_special_token_{i}|>" for i in (0, 1, 2, 3, 247)]
    assert np.asarray(tokenizer.encode("hi there")).min() >= 0


def test_a_sentencepiece_model_is_told_apart(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>")
    with pytest.raises(ValueError, match=r"put the tokenizer\.json of its Hugging Face folder beside it"):
        Tokenizer.from_pretrained(tmp_path)
