"""GGUF files: what they say of a model, and that a broken one is one clear line."""

import numpy as np
import pytest
import tiny_gguf
from tiny_models import SIZES, hugging_face

from heddle.data.gguf import GGUF
from heddle.data.locate import locate


def test_the_embedded_file():
    file = GGUF.open(locate())
    assert file is GGUF.open(locate())  # parsed once
    assert file.attention_heads() == (9, 3)
    config = file.config()
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["head_dim"]) == (1e-05, True, 64)
    assert file.shapes["blk.0.attn_k.weight"] == (192, 576)
    tensor = file.tensor("blk.0.attn_k.weight")
    assert (tensor.shape, tensor.dtype) == ((192, 576), np.float32)
    assert 0.01 < tensor.std() < 1


@pytest.mark.parametrize("name", ["llama", "llama, tied", "llama, head_dim", "qwen2", "qwen3"])
def test_a_models_configuration(name, tmp_path):
    theirs = hugging_face(name).config
    config = GGUF(tiny_gguf.write(tmp_path / "m.gguf", hugging_face(name))).config()
    for field in (*SIZES, "tie_word_embeddings", "rope_parameters", "rms_norm_eps"):
        if field not in ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert config[field] == getattr(theirs, field), field


def test_windows_and_scaling(tmp_path):
    def config(name="llama", **fields):
        named = {key.replace("__", "."): value for key, value in fields.items()}
        return GGUF(tiny_gguf.write(tmp_path / "m.gguf", hugging_face(name), fields=named)).config()

    assert config(attention__sliding_window=7)["model_type"] == "mistral"
    assert config(attention__sliding_window=7)["sliding_window"] == 7
    window = config("qwen2", attention__sliding_window=7)
    assert (window["use_sliding_window"], window["max_window_layers"]) == (True, 0)
    linear = config(rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert linear["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 24}
    assert config(**yarn)["rope_parameters"]["original_max_position_embeddings"] == 24
    with pytest.raises(ValueError, match="rope scaling must be none, linear or yarn; got 'longrope'"):
        config(rope__scaling__type="longrope")
    with pytest.raises(ValueError, match=r"llama\.block_count is missing"):
        config(block_count=None)


def test_broken_files_are_one_clear_line(tmp_path):
    whole = tiny_gguf.write(tmp_path / "whole.gguf", hugging_face("llama")).read_bytes()
    path = tmp_path / "broken.gguf"
    broken = [
        whole[:-40],
        whole[: len(whole) // 2],
        whole[:100],
        whole[:4],
        b"",
        b"\xff" * 100,
        b"GGUF" + b"\xff" * 100,
    ]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path}: not a whole GGUF file") as caught:
            GGUF.open(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        GGUF.open(tmp_path / "nowhere")


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", hugging_face("llama"))
    first = GGUF.open(path)
    tiny_gguf.write(path, hugging_face("qwen2"))
    assert GGUF.open(path).config()["model_type"] == "qwen2"
    assert first.config()["model_type"] == "llama"
