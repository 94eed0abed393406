"""The files that peers read: the same weights in float32, the same tokens, and nothing but length ends an answer."""

import json

import numpy as np
import pytest
import tiny_gguf
import torch
import transformers
from gguf import GGMLQuantizationType
from tiny_models import hugging_face

from heddle.bench import model_files
from heddle.data.gguf import GGUF
from heddle.data.tokenizers import Tokenizer
from heddle.jax import Transformer


def test_a_folder_is_the_same_model_without_an_end_of_text(tmp_path):
    hugging_face("llama, bytes").save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"eos_token_id": 256}))
    model = Transformer.from_pretrained(tmp_path / "theirs", dtype="float32")
    assert model.config.eos_ids == (256,)
    model_files.write_folder(model, Tokenizer.bytes(), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert (again.config.eos_token_id, again.generation_config.eos_token_id) == (None, None)
    first = hugging_face("llama, bytes").state_dict()
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=0)
    text = "a heddle, ein Webgeschirr: ü"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")(text)["input_ids"] == [*text.encode()]


def test_a_gguf_file_in_float32_is_the_same_model(tmp_path):
    """What llama.cpp is given: no other tensors than ours, nor another vocabulary."""
    words = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.bos_token_id": 1}
    kind = GGMLQuantizationType.F16
    path = tiny_gguf.write(tmp_path / "tiny.gguf", hugging_face("llama"), words, kind=kind)
    model_files.write_gguf(path, tmp_path / "wide.gguf")
    narrow, wide = GGUF.open(path), GGUF.open(tmp_path / "wide.gguf")
    assert wide.config() == narrow.config()
    apart = {"general.file_type"}
    assert {k: v for k, v in wide.metadata.items() if k not in apart and not k.startswith("GGUF")} == {
        k: v for k, v in narrow.metadata.items() if k not in apart and not k.startswith("GGUF")
    }
    for name in narrow.shapes:
        np.testing.assert_array_equal(wide.tensor(name), narrow.tensor(name))


def test_what_is_no_gguf_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it reads GGUF files alone"):
        model_files.gguf_file(tmp_path)
