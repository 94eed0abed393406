"""Checkpoints: from and to Hugging Face folders, from GGUF; a broken one is one clear line."""

import json
import logging
import warnings

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_gguf
import tiny_meta
import torch
import transformers
from flax import nnx
from tiny_models import CASES, LLAMA3, SIZES, hugging_face, logits, tokens

from heddle.data.tokenizers import Tokenizer
from heddle.jax import ModelConfig, Transformer
from heddle.jax.checkpoint import INDEX, SINGLE, save

IDS = tokens(2, 24)
run = jax.jit(lambda model, ids: model(ids))


@pytest.fixture
def folder(tmp_path):
    hugging_face("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def error_of(*arguments, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Transformer.from_pretrained(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize(
    "name", ["llama, biases, gelu", "llama, llama3, tied", "mistral, window", "qwen2", "qwen3, window"]
)
@pytest.mark.parametrize("shard", [5 * 10**9, 20_000])
def test_transformers_loads_what_is_saved_without_a_warning(name, shard, tmp_path, caplog, monkeypatch):
    hugging_face(name).save_pretrained(tmp_path / "theirs")
    model = Transformer.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", max_shard_bytes=shard)
    assert (tmp_path / "ours" / (INDEX if shard < 10**9 else SINGLE)).exists()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any(info.values())
    assert again.dtype == torch.float32
    for key, tensor in hugging_face(name).state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    # And back.
    reloaded = Transformer.from_pretrained(tmp_path / "ours")
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(reloaded), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sharded_folder_of_transformers_loads(tmp_path):
    model = hugging_face("llama, tied")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    np.testing.assert_allclose(run(Transformer.from_pretrained(tmp_path), IDS), logits(model, IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_on_the_way(dtype, tmp_path):
    model = Transformer.from_pretrained(_saved(tmp_path / "a", getattr(torch, dtype)), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(dtype)}
    model.save_pretrained(tmp_path / "b")
    theirs = [safetensors.numpy.load_file(tmp_path / name / SINGLE) for name in "ab"]
    assert theirs[0].keys() == theirs[1].keys()
    for key, tensor in theirs[0].items():
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor, theirs[1][key])
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == dtype
    # On a CPU "auto" computes in float32, whatever is stored.
    model = Transformer.from_pretrained(tmp_path / "a")
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}


def _saved(path, dtype):
    transformers.AutoModelForCausalLM.from_config(hugging_face("llama").config).to(dtype).save_pretrained(path)
    return path


def test_a_tied_head_that_is_stored_all_the_same_and_old_buffers_are_passed_over(tmp_path):
    model = hugging_face("llama, tied")
    model.save_pretrained(tmp_path)
    stored = safetensors.numpy.load_file(tmp_path / SINGLE)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    stored["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(stored, tmp_path / SINGLE)
    np.testing.assert_allclose(run(Transformer.from_pretrained(tmp_path), IDS), logits(model, IDS), rtol=0, atol=1e-4)


def test_all_that_does_not_fit_is_told_at_once(folder):
    stored = safetensors.numpy.load_file(folder / SINGLE)
    del stored["model.norm.weight"], stored["model.layers.0.mlp.up_proj.weight"]
    stored["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    stored["lm_head.weight"] = np.zeros((198, 32), np.float32)
    safetensors.numpy.save_file(stored, folder / SINGLE)
    assert error_of(folder) == (
        f"{folder}: tensors don't fit the configuration: "
        "missing: model.layers.0.mlp.up_proj.weight, model.norm.weight; "
        "not expected: model.layers.2.mlp.up_proj.weight; "
        "of another shape: lm_head.weight (198, 32) instead of (199, 32)"
    )


def test_broken_folders_are_one_clear_line(folder, tmp_path):
    assert error_of(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such file or folder"
    whole = (folder / SINGLE).read_bytes()
    for data in (whole[:-3], whole[: len(whole) // 2], whole[:100], b"", b"\xff" * 64):
        (folder / SINGLE).write_bytes(data)
        assert f"{folder / SINGLE}: not a whole safetensors file" in error_of(folder)
    (folder / SINGLE).unlink()
    assert error_of(folder) == f"{folder}: holds neither {SINGLE} nor {INDEX}"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert error_of(folder) == f"{folder}: lacks 1.safetensors, 2.safetensors, which {INDEX} names"
    for index in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": None}}, {"weight_map": ["a"]}):
        (folder / INDEX).write_text(json.dumps(index))
        assert error_of(folder) == f"{folder / INDEX}: weight_map must name a file for each tensor"
    (folder / INDEX).write_text("{")
    assert f"{folder / INDEX}: not JSON" in error_of(folder)
    (folder / "config.json").unlink()
    assert error_of(folder) == f"{folder / 'config.json'}: no such file"
    (tmp_path / "model.bin").write_bytes(b"")
    assert "must be a folder with a config.json and safetensors, or Meta's, or a .gguf file" in error_of(
        tmp_path / "model.bin"
    )


def test_quantised_tensors_and_other_dtypes_are_refused(folder):
    assert error_of(folder, dtype="int8") == "dtype must be auto, float32, bfloat16 or float16; got int8"
    stored = safetensors.numpy.load_file(folder / SINGLE)
    stored["model.norm.weight"] = stored["model.norm.weight"].astype(np.int8)
    safetensors.numpy.save_file(stored, folder / SINGLE)
    assert error_of(folder).endswith("tensors must be F32, F16, BF16, F64; model.norm.weight is I8")


# ---------------------------------------------------------------------- saving


def tiny() -> Transformer:
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return Transformer(ModelConfig(**sizes, num_attention_heads=2), rngs=nnx.Rngs(0))


def test_saving_replaces_a_saved_model_and_nothing_else(tmp_path):
    model, target = tiny(), tmp_path / "deep" / "model"
    save(model, target, max_shard_bytes=2000)
    assert len(list(target.glob("*.safetensors"))) > 2
    save(model, target, Tokenizer.bytes())
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == names
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be new, empty or a saved model, but it holds notes\.txt"):
        save(model, target)
    assert (target / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        save(model, target / "notes.txt")
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1"):
        save(model, target, max_shard_bytes=0)


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    save(tiny(), tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    class Broken:
        stop_ids = ()

        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(tiny(), tmp_path / "model", Broken())
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_tokenizers_stop_ids_are_saved(tmp_path):
    tokenizer = Tokenizer.bytes()
    tokenizer.stop_ids = (10, 256)
    save(tiny(), tmp_path / "model", tokenizer)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [10, 256]
    assert Tokenizer.from_pretrained(tmp_path / "model").stop_ids == (10, 256)


# ---------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2", "qwen2, tied", "qwen3"])
def test_logits_of_a_gguf_file(name, tmp_path):
    path = tiny_gguf.write(tmp_path / "model.gguf", hugging_face(name))
    model = Transformer.from_pretrained(path)
    np.testing.assert_allclose(run(model, IDS), logits(hugging_face(name), IDS), rtol=0, atol=1e-4)


def test_quantised_weights_are_dequantised(tmp_path):
    model = hugging_face("llama")
    path = tiny_gguf.write(tmp_path / "model.gguf", model, kind=gguf.GGMLQuantizationType.Q8_0)
    expected = logits(model, IDS)
    error = np.abs(run(Transformer.from_pretrained(path), IDS) - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.05


def test_llama3s_rotary_rule_is_read_from_its_tensor(tmp_path):
    rope = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(**(SIZES | {"rope_parameters": rope}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain = 500000.0 ** -(np.arange(0, 8, 2) / 8)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() == 32
    path = tiny_gguf.write(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": factors})
    ours = Transformer.from_pretrained(path)
    assert ours.config.rotary.rule == "llama3"
    np.testing.assert_allclose(run(ours, IDS), logits(model, IDS), rtol=0, atol=1e-4)
    factors[1] *= 1.1
    tiny_gguf.write(path, model, tensors={"rope_freqs.weight": factors})
    assert error_of(path) == f"{path}: rope_freqs.weight isn't what Llama 3's rule gives"


def test_gguf_files_that_do_not_fit_are_refused(tmp_path):
    path, model = tmp_path / "model.gguf", hugging_face("llama")
    tiny_gguf.write(path, model, tensors={"output_norm.weight": None, "blk.0.extra.weight": np.ones(3, np.float32)})
    assert error_of(path) == (
        f"{path}: tensors don't fit the configuration: missing: output_norm.weight; not expected: blk.0.extra.weight"
    )


# ---------------------------------------------------------------------- Meta's folders


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "tied, split by width", "llama3"])
def test_logits_of_metas_files(kind, ranks, tmp_path):
    changes, params = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {}
    if kind == "llama3":
        rope = LLAMA3 | {"factor": 5.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
        changes, params = {"rope_parameters": rope}, {"use_scaled_rope": True, "rope_scaling_factor": 5}
    tied = kind.startswith("tied")
    model = tiny_meta.llama(**changes, tie_word_embeddings=tied)
    folder = tiny_meta.write(tmp_path, model, ranks, embedding_axis=int(tied), params=params)
    ours = Transformer.from_pretrained(folder)
    assert ours.config == ModelConfig.from_pretrained(folder)
    np.testing.assert_allclose(run(ours, IDS), logits(model, IDS), rtol=0, atol=1e-4)


def test_metas_files_of_half_precision_and_such_that_do_not_fit(tmp_path):
    model = tiny_meta.llama()
    folder = tiny_meta.write(tmp_path, model, 2, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    expected = logits(model, IDS)
    np.testing.assert_allclose(run(Transformer.from_pretrained(folder), IDS), expected, rtol=0, atol=1e-4)
    tiny_meta.write(folder, model, 2, params={"multiple_of": 96, "n_layers": 1})
    assert error_of(folder) == (
        f"{folder}: tensors don't fit the configuration: not expected: "
        + ", ".join(f"layers.1.{name}.weight" for name in sorted(name for name, _ in tiny_meta.LAYER.values()))
        + "; of another shape: layers.0.feed_forward.w1.weight (64, 32) instead of (96, 32), "
        "layers.0.feed_forward.w2.weight (32, 64) instead of (32, 96), "
        "layers.0.feed_forward.w3.weight (64, 32) instead of (96, 32)"
    )


def test_the_table_of_names_covers_every_family():
    for name in CASES:
        leaves = jax.tree.leaves(nnx.eval_shape(lambda c=name: Transformer(_config(c), rngs=nnx.Rngs(0))))
        assert len(leaves) == len(dict(hugging_face(name).named_parameters())), name


def _config(name):
    return ModelConfig.from_dict(hugging_face(name).config.to_diff_dict())
