"""LongNet's language model: torch's folder and logits, documents, decoding, generation."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import tokens

from heddle.data.packing import NO_TARGET, Batch
from heddle.data.tokenizers import Tokenizer
from heddle.jax import LongNetConfig, LongNetLM, Transformer, generate
from heddle.jax.checkpoint import load
from heddle.jax.lm import lm
from heddle.torch import longnet as torch_wing

SIZES = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "segment_lengths": (4, 7, 12), "dilation_rates": (1, 2, 5), "xpos_scale_base": 20.0,
    "max_position_embeddings": 96, "eos_token_id": (2, 3),
}  # fmt: skip
CONFIG = LongNetConfig(**SIZES)
run = jax.jit(lambda model, *arguments, **options: model(*arguments, **options))


@pytest.fixture(scope="module")
def model() -> LongNetLM:
    return LongNetLM(replace(CONFIG, num_hidden_layers=1), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("options", [{}, {"position": "rope", "tie_word_embeddings": True, "hidden_act": "relu"}])
def test_one_folder_for_both_wings(options, tmp_path):
    sizes = SIZES | {"segment_lengths": [4, 7, 12], "dilation_rates": [1, 2, 5], "eos_token_id": [2, 3]} | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch_wing.LongNetLM(torch_wing.LongNetConfig(**sizes, dropout=0.1)).eval()
        for parameter in theirs.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "torch")
    ours, ids = LongNetLM.from_pretrained(tmp_path / "torch"), tokens(2, 40)
    assert ours.config == LongNetConfig(**(SIZES | options), dropout=0.1)
    with torch.inference_mode():
        want = theirs(torch.from_numpy(ids).long()).logits.numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(run(ours, jnp.asarray(ids)), want, rtol=0, atol=1e-4)

    ours.save_pretrained(tmp_path / "jax")
    back = torch_wing.LongNetLM.from_pretrained(tmp_path / "jax").eval()
    with torch.inference_mode():
        np.testing.assert_array_equal(back(torch.from_numpy(ids).long()).logits.numpy(), want)
    assert isinstance(load(tmp_path / "jax"), LongNetLM)
    with pytest.raises(ValueError, match=r"model_type must be one of .*; got 'longnet'"):
        Transformer.from_pretrained(tmp_path / "jax")
    with pytest.raises(ValueError, match="a LongNet can't be replicated, got parscale_n"):
        load(tmp_path / "jax", parscale_n=2)


def test_packed_documents_are_each_document_alone(model):
    ids, segments = tokens(1, 32), np.repeat([4, 0, -1], [13, 17, 2])[None].astype(np.int32)
    packed = np.asarray(run(model, jnp.asarray(ids), segment_ids=jnp.asarray(segments)))
    assert np.isfinite(packed).all()
    for begin, end in ((0, 13), (13, 30)):
        np.testing.assert_allclose(packed[:, begin:end], run(model, ids[:, begin:end]), rtol=0, atol=5e-5)


def test_it_trains(model):
    """Each parameter gets a gradient, the same with layers recomputed."""
    ids, segments = tokens(1, 24), np.repeat([0, 1, -1], [9, 13, 2])[None].astype(np.int32)
    targets = np.where(segments >= 0, np.roll(ids, -1, axis=1), NO_TARGET)
    batch = Batch(*map(jnp.asarray, (ids, segments, np.zeros_like(ids), targets)))
    again = nnx.clone(model)
    again.remat = True
    loss = jax.jit(jax.grad(lambda model, batch: lm(model, batch, None)[0]))
    for a, b in zip(jax.tree.leaves(loss(model, batch)), jax.tree.leaves(loss(again, batch)), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    named = jax.tree_util.tree_leaves_with_path(loss(model, batch))
    still = {jax.tree_util.keystr(path) for path, leaf in named if not np.abs(leaf).max() > 1e-6}
    assert {name for name in still if "k_proj" not in name or "bias" not in name} == set()


@pytest.mark.parametrize("position", ["xpos", "rope"])
def test_decoding_is_the_full_forward(position):
    """Past three boundaries of every pattern, and of their common multiple, where XPOS counts anew."""
    config = LongNetConfig(**(SIZES | {"num_hidden_layers": 1, "position": position}))
    model, ids, lengths = LongNetLM(config, rngs=nnx.Rngs(0)), tokens(2, 90), np.array([40, 33])
    full = np.asarray(run(model, jnp.asarray(ids)))
    real = np.arange(40) < lengths[:, None]
    out, cache = run(
        model, jnp.asarray(ids[:, :40]), segment_ids=jnp.where(real, 0, -1), cache=model.empty_cache(2, 10**6)
    )
    np.testing.assert_allclose(np.asarray(out)[real], full[:, :40][real], rtol=0, atol=5e-5)
    for step in range(50):
        now = np.take_along_axis(ids, (lengths + step)[:, None], axis=1)
        out, cache = run(model, jnp.asarray(now), cache=cache)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(out[row, 0], full[row, length + step], rtol=0, atol=5e-5)


def test_generation_is_torchs(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = torch_wing.LongNetLM(torch_wing.LongNetConfig(**SIZES | {"eos_token_id": None})).eval()
        for parameter in theirs.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "model")
    ours, prompts = LongNetLM.from_pretrained(tmp_path / "model"), [tokens(n, seed=n).tolist() for n in (5, 33)]
    found = generate(ours, Tokenizer.bytes(), prompts, max_tokens=30, stop_ids=())
    for prompt, completion in zip(prompts, found, strict=True):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)
        assert list(completion.tokens) == want[0, len(prompt) :].tolist()


def test_magneto_initialization():
    config = LongNetConfig(**(SIZES | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}))
    model, gain = LongNetLM(config, rngs=nnx.Rngs(0)), np.sqrt(np.log(8))
    attention, ffn = model.layers[0].self_attn, model.layers[3].feed_forward
    for projection, times in (
        (attention.q_proj, 1),
        (attention.k_proj, 1),
        (attention.v_proj, gain),
        (attention.out_proj, gain),
    ):
        assert np.std(projection.weight[...]) == pytest.approx(times * 256**-0.5, rel=0.02)
        assert not projection.bias[...].any()
    for linear in (ffn.linear1, ffn.linear2):
        assert np.std(linear.weight[...]) == pytest.approx(gain * np.sqrt(2 / (256 + 768)), rel=0.02)
    for weight in (model.embedding, model.head.weight):
        assert np.std(weight[...]) == pytest.approx(1 / 16, rel=0.03)


def test_what_cannot_be(tmp_path):
    for changes, message in [
        ({"hidden_size": 36}, "hidden_size must be a multiple of twice num_attention_heads, got 36 and 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of silu"),
        ({"position": "alibi"}, "position must be one of rope, xpos, got 'alibi'"),
        ({"dilation_rates": (1, 2)}, "must be of one length, got 3 and 2"),
        ({"xpos_scale_base": 1.0}, "xpos_scale_base must be at least a 64th"),
    ]:
        with pytest.raises(ValueError, match=message):
            LongNetConfig(**(SIZES | changes))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict() | {"window": 3}))
    with pytest.raises(ValueError, match="fields that aren't supported for model_type 'longnet': window"):
        LongNetConfig.from_json_file(tmp_path)
    with pytest.raises(ValueError, match="model_type must be 'longnet', got 'llama'"):
        LongNetConfig.from_dict({"model_type": "llama"})
    assert LongNetConfig.from_dict(CONFIG.to_dict()) == CONFIG
