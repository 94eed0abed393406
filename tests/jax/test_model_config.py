"""The configuration: what config.json files say, in every form they come, or a refusal by name."""

import json
import logging

import pytest
import transformers
from tiny_models import CASES, SIZES, hugging_face

from heddle.attention.rope import Rope
from heddle.jax import ModelConfig

#: SmolLM2-135M-Instruct's own config.json.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}


def test_a_real_configuration():
    config = ModelConfig.from_dict(SMOLLM2)
    assert (config.kv_heads, config.dim, config.rotary.theta, config.tie_word_embeddings) == (3, 64, 1e5, True)
    assert config.windows == (None,) * 30
    assert hash(config) == hash(ModelConfig.from_dict(SMOLLM2))


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_we_write_and_we_what_it_writes(name, tmp_path, caplog, monkeypatch):
    theirs = hugging_face(name).config
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ModelConfig.from_json_file(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(ours.to_dict()))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert not caplog.records
    for field in {*SIZES, "rope_parameters", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings"}:
        assert getattr(again, field, None) == (getattr(theirs, field, None) or getattr(again, field, None)), field
    for field in ("attention_bias", "mlp_bias", "sliding_window", "layer_types"):
        assert getattr(again, field, None) == getattr(theirs, field, None), field
    assert ModelConfig.from_json_file(tmp_path / "ours") == ours


def test_every_way_to_write_the_rotary_parameters():
    parameters = {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
    }  # fmt: skip
    new = LLAMA | {"rope_parameters": {**parameters, "rope_type": "llama3", "rope_theta": 5e5}}
    old = LLAMA | {"rope_scaling": {**parameters, "rope_type": "llama3"}, "rope_theta": 5e5}
    older = LLAMA | {"rope_scaling": {**parameters, "type": "llama3"}, "rope_theta": 5e5}
    rope = ModelConfig.from_dict(new).rotary
    assert rope.rule == "llama3"
    assert rope.factor == 32.0
    assert rope == ModelConfig.from_dict(old).rotary == ModelConfig.from_dict(older).rotary


def test_defaults_are_each_familys_own():
    few = {name: LLAMA[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        given = few | {"model_type": model_type, "num_attention_heads": 32, "hidden_size": 256}
        ours, theirs = ModelConfig.from_dict(given), transformers.AutoConfig.for_model(**given)
        for field in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "sliding_window"):
            assert getattr(ours, field) == getattr(theirs, field, None), (model_type, field)
        assert ours.dim == (getattr(theirs, "head_dim", None) or 8)


def test_a_window_turned_off_is_none():
    assert ModelConfig.from_dict({**LLAMA, "model_type": "mistral", "sliding_window": None}).windows == (None, None)
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 7, "max_window_layers": 1}
    assert ModelConfig.from_dict({**qwen, "use_sliding_window": False}).windows == (None, None)
    assert ModelConfig.from_dict({**qwen, "use_sliding_window": True}).windows == (None, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size must be a multiple of num_attention_heads"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_act": "swish9000"}, "hidden_act must be one of .*; got 'swish9000'"),
        ({"hidden_size": "32"}, "hidden_size must be int, got '32'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool, got 1"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id must be int"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        ({"model_type": "mamba"}, "model_type must be one of llama, mistral, qwen2, qwen3, .*; got 'mamba'"),
        ({"quantization_config": {"bits": 4}}, "aren't supported for model_type 'llama': quantization_config"),
        ({"num_experts": 8, "logit_scale": 2.0}, "aren't supported for model_type 'llama': logit_scale, num_experts"),
        ({"use_sliding_window": True}, "aren't supported for model_type 'llama': use_sliding_window"),
        ({"pretraining_tp": 2}, "pretraining_tp must be 1, got 2"),
        ({"rope_interleaved": True}, "rope_interleaved must be False, got True"),
        ({"rope_scaling": {"type": "spiral"}}, "rope rule must be one of .*, got 'spiral'"),
        ({"sliding_window": 5}, "layer_types of model_type 'llama' can't be"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias must be false for model_type 'mistral'"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias must be false for model_type 'qwen2'"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types must hold .* for each of 2 layers"),
        ({"hidden_size": None, "vocab_size": None}, "fields that are missing: vocab_size, hidden_size"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(LLAMA | changes)


def test_a_rope_of_another_head_dim_is_refused():
    few = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    with pytest.raises(ValueError, match="rope must be of head_dim 8, got 16"):
        ModelConfig(**few, num_attention_heads=4, rope=Rope(16))


def test_files_that_hold_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        ModelConfig.from_json_file(tmp_path)
    cases = {"{": "not JSON", "[]": "must hold a JSON object, got list", '{"a": 1}': "model_type must be one of"}
    for text, message in cases.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            ModelConfig.from_json_file(tmp_path)


def test_the_embedded_models_configuration():
    # Its GGUF file doesn't say how the weights were drawn.
    given = SMOLLM2 | {"initializer_range": ModelConfig.initializer_range}
    assert ModelConfig.from_pretrained() == ModelConfig.from_dict(given)
