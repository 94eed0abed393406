"""ParScale in the one Transformer: the torch model's and the oracle's logits, the cache, generation, the warm start."""

import json
import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parscale_oracle as oracle
import pytest
import tiny_gguf
import torch
from flax import nnx
from tiny_models import SIZES, hugging_face, tokens

from heddle.data.packing import NO_TARGET, Batch
from heddle.data.tokenizers import Tokenizer
from heddle.jax import KVCache, ModelConfig, Transformer, generate, stream
from heddle.jax.generation import Past
from heddle.jax.lm import lm
from heddle.jax.parscale import is_new
from heddle.torch.parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM

VARIANTS = {
    "prefix": {},
    "no prefix": {"parscale_n_tokens": 0},
    "all prefixes, joint": {"parscale_prefix_scope": "all", "enable_cross_attn": True},
    "joint in a layer, replica rope, tied": {
        "enable_cross_attn": True, "parscale_cross_attn_layers": [1], "enable_replica_rope": True, "parscale_n": 2,
        "tie_word_embeddings": True,
    },
    "sublayer, replica rope, window": {
        "enable_cross_attn": True, "parscale_cross_attn_mode": "sublayer", "enable_replica_rope": True,
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    },
}  # fmt: skip
JOINT, SUBLAYER = "all prefixes, joint", "sublayer, replica rope, window"
IDS = tokens(2, 12)
run = jax.jit(lambda model, *arguments, **options: model(*arguments, **options))
BYTES = Tokenizer.bytes()


@cache
def theirs(name: str) -> Qwen2ParScaleForCausalLM:
    """A variant in torch, every parameter random, those too that start at 0."""
    sizes = SIZES | {"parscale_n": 3, "parscale_n_tokens": 4, "parscale_attn_smooth": 0.1, "rms_norm_eps": 1e-3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ParScaleForCausalLM(Qwen2ParScaleConfig(**(sizes | VARIANTS[name])))
        for parameter_name, parameter in model.named_parameters():
            parameter.data.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a variant, as torch saves it."""

    @cache
    def saved(name) -> Path:
        path = tmp_path_factory.mktemp("model")
        theirs(name).save_pretrained(path)
        return path

    return saved


@pytest.fixture(scope="module")
def ours(folder):
    return cache(lambda name: Transformer.from_pretrained(folder(name)))


@cache
def tiny(**changes) -> Transformer:
    """A byte-level model whose replicas differ, all of its parameters random."""
    config = ModelConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3, model_type="qwen2_parscale",
        **{"parscale_n": 3, "parscale_n_tokens": 4, "enable_cross_attn": True} | changes,
    )  # fmt: skip
    return randomized(Transformer(config, rngs=nnx.Rngs(0)))


def randomized(model: Transformer) -> Transformer:
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape) if leaf.ndim != 1 else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


# ---------------------------------------------------------------------- one folder, one model


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_torch_and_of_the_oracle(name, ours):
    found = np.asarray(run(ours(name), jnp.asarray(IDS)))
    with torch.inference_mode():
        expected = theirs(name)(torch.from_numpy(IDS).long()).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    if "window" not in name:
        state = {key: value.double().numpy() for key, value in theirs(name).state_dict().items()}
        for row, ids in zip(found, IDS, strict=True):
            np.testing.assert_allclose(row, oracle.model(theirs(name).config, state, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_loads_what_is_saved(name, ours, tmp_path):
    ours(name).save_pretrained(tmp_path / "model")
    again, info = Qwen2ParScaleForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    for key, tensor in theirs(name).state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    fields = [key for key in again.config.to_dict() if key.startswith(("parscale", "enable_"))]
    for field in fields:
        assert getattr(again.config, field) == getattr(theirs(name).config, field), field


def test_one_replica_is_the_base_model_bit_for_bit(tmp_path):
    hugging_face("qwen2").save_pretrained(tmp_path / "base")
    base = Transformer.from_pretrained(tmp_path / "base")
    options = {"parscale_n": 1, "enable_cross_attn": True}
    one = Transformer.from_pretrained(tmp_path / "base", **options)
    assert one.config.model_type == "qwen2_parscale"
    np.testing.assert_array_equal(run(one, IDS), run(base, IDS))
    one.save_pretrained(tmp_path / "one")
    theirs = Qwen2ParScaleForCausalLM.from_pretrained(tmp_path / "one")
    assert (theirs.config.parscale_n, theirs.config.enable_cross_attn) == (1, True)
    np.testing.assert_array_equal(run(Transformer.from_pretrained(tmp_path / "one"), IDS), run(base, IDS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parscale_n": 0}, "parscale_n must be at least 1, got 0"),
        ({"parscale_n": True}, "parscale_n must be int, got True"),
        ({"parscale_n_tokens": -1}, "parscale_n_tokens must be at least 0, got -1"),
        ({"parscale_attn_smooth": 1.0}, r"parscale_attn_smooth must be in \[0, 1\), got 1.0"),
        ({"parscale_prefix_scope": "some"}, "parscale_prefix_scope must be one of own, all; got 'some'"),
        ({"parscale_cross_attn_mode": "dual"}, "parscale_cross_attn_mode must be one of joint, sublayer; got 'dual'"),
        ({"parscale_cross_attn_layers": [1, 2]}, r"parscale_cross_attn_layers must be in \[0, 2\), got 2"),
        ({"parscale_prefix_mlp": 4}, "parscale_prefix_mlp must be 0, got 4"),
        ({"parscale_x": 4}, "aren't supported for model_type 'qwen2_parscale': parscale_x"),
        ({"model_type": "llama", "parscale_n": 4}, "aren't supported for model_type 'llama': .*parscale_n"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message, folder):
    config = json.loads((folder("prefix") / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(config | changes)


def test_released_checkpoints_configurations_are_read():
    config = ModelConfig.from_dict(
        {
            "architectures": ["Qwen2ParScaleForCausalLM"], "model_type": "qwen2_parscale", "attention_dropout": 0.0,
            "auto_map": {"AutoModelForCausalLM": "modeling_qwen2_parscale.Qwen2ParScaleForCausalLM"},
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 100, "rope_theta": 1e6, "rope_scaling": None,
            "sliding_window": 100, "use_sliding_window": False, "max_window_layers": 3, "use_cache": True,
            "parscale_n": 8, "parscale_n_tokens": 48, "parscale_attn_smooth": 0.1, "torch_dtype": "bfloat16",
        }
    )  # fmt: skip
    assert (config.parscale_n, config.parscale_attn_smooth, config.qkv_bias, config.output_bias) == (
        8,
        0.1,
        True,
        False,
    )
    assert ModelConfig.from_dict(config.to_dict()) == config


# ---------------------------------------------------------------------- forward


@pytest.mark.parametrize("name", [JOINT, SUBLAYER])
def test_packed_documents_are_each_document_alone(name, ours):
    model, ids = ours(name), tokens(1, 15)
    segments = np.repeat([4, 0, -1], [6, 7, 2])[None].astype(np.int32)
    packed = np.asarray(run(model, jnp.asarray(ids), segment_ids=jnp.asarray(segments)))
    assert np.isfinite(packed).all()
    for begin, end in ((0, 6), (6, 13)):
        alone = run(model, jnp.asarray(ids[:, begin:end]))
        np.testing.assert_allclose(packed[:, begin:end], alone, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", [JOINT, SUBLAYER])
def test_each_replica_may_have_its_own_input(name, ours):
    ids, padded = tokens(2, 3, 9), np.zeros((2, 3, 9), np.int32)
    padded[0, 1, :4] = padded[1, 2, :2] = -1  # before a shorter replica's first token
    found = run(ours(name), jnp.asarray(ids), segment_ids=jnp.asarray(padded))
    model, mask = theirs(name), torch.from_numpy(padded + 1)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids).long(), mask, position_ids=torch.arange(9)[None].repeat(2, 1)).logits
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
    same = np.repeat(ids[:, :1], 3, axis=1)
    np.testing.assert_allclose(run(ours(name), same), run(ours(name), ids[:, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [JOINT, SUBLAYER])
def test_the_future_is_not_seen(name, ours):
    model, replicas = ours(name), theirs(name).config.parscale_n
    ids = tokens(1, replicas, 8)
    before = run(model, jnp.asarray(ids))
    for replica in range(replicas):
        changed = ids.copy()
        changed[0, replica, 5] += 1
        after = np.asarray(run(model, jnp.asarray(changed)))
        np.testing.assert_array_equal(after[:, :5], before[:, :5])
        assert np.abs(after[:, 5] - before[:, 5]).max() > 1e-3


@pytest.mark.parametrize("mode", ["joint", "sublayer"])
def test_gradients_reach_all_parameters_and_are_the_same_when_layers_are_recomputed(mode):
    model = tiny(parscale_cross_attn_mode=mode)
    ids = jnp.asarray(tokens(2, 10))
    segments = jnp.repeat(jnp.array([0, 1, -1]), jnp.array([4, 5, 1]))[None].repeat(2, 0)
    targets = jnp.where(segments == -1, NO_TARGET, jnp.roll(ids, -1, 1))
    positions = jnp.tile(jnp.array([*range(4), *range(5), 0]), (2, 1))
    batch = Batch(tokens=ids, targets=targets, segment_ids=segments, positions=positions)
    again = nnx.clone(model)
    again.remat = True
    gradient = jax.jit(jax.grad(lambda model, batch: lm(model, batch, jax.random.key(0))[0]))
    expected, found = gradient(model, batch), gradient(again, batch)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        # Before the first self-attention replicas are still the same, and it doesn't matter which of them is looked at.
        first = jax.tree_util.keystr(path, simple=True, separator=".").startswith(
            ("layers.0.cross.q", "layers.0.cross.k")
        )
        if mode == "sublayer" and first:
            np.testing.assert_allclose(a, 0, atol=1e-8)
        else:
            assert np.abs(a).max() > 1e-6, path
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_new_parameters_are_told_from_the_bases():
    for mode in ("joint", "sublayer"):
        model, base = tiny(parscale_cross_attn_mode=mode), tiny(parscale_n=1)
        leaves = jax.tree_util.tree_leaves_with_path(model)
        assert sum(not is_new(path) for path, _ in leaves) == len(jax.tree.leaves(base))
        assert len(jax.tree.leaves(nnx.state(model, is_new))) == sum(is_new(path) for path, _ in leaves) > 8
    # The paper's and the page's number of extra parameters, without cross-attention.
    model, d, replicas = tiny(enable_cross_attn=False), 32, 3
    extra = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, is_new)))
    assert extra == replicas * d**2 + d + replicas * d + replicas + 2 * replicas * 2 * 4 * 8 * 2


# ---------------------------------------------------------------------- the cache, generation


@pytest.mark.parametrize("name", [JOINT, SUBLAYER])
def test_cached_decoding_of_a_ragged_batch_is_the_full_forward(name, ours):
    model, lengths, more = ours(name), np.array([9, 4, 12]), 3
    ids = tokens(3, 12 + more)
    full = np.asarray(run(model, jnp.asarray(ids)))
    cache = KVCache.empty(model.config, 3, 20)
    assert (cache.batch, cache.replicas) == (3, model.config.parscale_n)
    outs = []
    for begin, end in ((0, 5), (5, 12)):  # the prompts in pieces, then a token at a time
        padding = np.where(np.arange(begin, end) < lengths[:, None], 0, -1).astype(np.int32)
        out, cache = run(model, jnp.asarray(ids[:, begin:end]), segment_ids=jnp.asarray(padding), cache=cache)
        outs.append(out)
    out = np.concatenate(outs, axis=1)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(out[row, :n], full[row, :n], rtol=0, atol=3e-5)
    for step in range(more):
        now = np.take_along_axis(ids, (lengths + step)[:, None], axis=1)
        out, cache = run(model, jnp.asarray(now), cache=cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(out[row, 0], full[row, n + step], rtol=0, atol=3e-5)
    np.testing.assert_array_equal(cache.lengths, lengths + more)
    assert cache.max_len == 20  # the prefixes aren't in it


def test_a_cache_takes_a_prompt_for_each_replica_and_refuses_holes():
    model, ids = tiny(), tokens(1, 3, 9)
    padding = np.zeros((1, 3, 9), np.int32)
    padding[0, 1, :7] = -1
    full = run(model, ids, segment_ids=padding)
    cache, outs = KVCache.empty(model.config, 1, 12), []
    for begin, end in ((0, 4), (4, 8), (8, 9)):  # the second replica begins in the second piece
        piece = slice(begin, end)
        out, cache = run(model, ids[:, :, piece], segment_ids=padding[:, :, piece], cache=cache)
        outs.append(out)
    # Where the second replica is padding it still counts in the sum, with whatever it computed.
    np.testing.assert_allclose(np.concatenate(outs, axis=1)[:, 7:], full[:, 7:], rtol=0, atol=3e-5)
    np.testing.assert_array_equal(cache.starts, [0, 7, 0])
    hole = np.zeros((1, 3, 2), np.int32)
    hole[0, 1, 0] = -1
    with pytest.raises(ValueError, match="segment_ids of a replica must be -1 only before its first token"):
        model(jnp.asarray(ids[:, :, :2]), segment_ids=jnp.asarray(hole), cache=cache)
    with pytest.raises(ValueError, match="cache must be of 3 replicas, got 1"):
        model(jnp.asarray(ids[:, 0]), cache=KVCache.empty(tiny(parscale_n=1).config, 1, 12))
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \(batch, seq\) or \(batch, 3, seq\)"):
        model(jnp.asarray(ids[:, :2]))


def test_a_ragged_batch_generates_what_each_prompt_does_alone():
    model, prompts = tiny(), [tokens(n, seed=n).tolist() for n in (3, 40, 11)]
    together = generate(model, BYTES, prompts, max_tokens=12, stop_ids=())
    for prompt, completion in zip(prompts, together, strict=True):
        ids = np.zeros((1, 64), np.int32)  # what comes after doesn't matter
        ids[0, : len(prompt) + 12] = [*prompt, *completion.tokens]
        chosen = np.asarray(run(model, jnp.asarray(ids)))[0].argmax(axis=-1)
        assert chosen[len(prompt) - 1 :][:12].tolist() == list(completion.tokens)
        assert generate(model, BYTES, [prompt], max_tokens=12, stop_ids=()) == [completion]


def test_generation_from_a_prompt_for_each_replica_is_torchs(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    peer = Qwen2ParScaleForCausalLM.from_pretrained(tmp_path / "model")
    lengths, width = (4, 40, 37), 40
    prompt = [tokens(n, seed=n).tolist() for n in lengths]
    ids = np.stack([np.pad(row, (width - len(row), 0)) for row in prompt])[None]
    mask = np.stack([np.arange(width) >= width - n for n in lengths])[None]
    expected = peer.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long(), max_new_tokens=9, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    alone, *_ = both = generate(model, BYTES, [prompt, prompt[1]], max_tokens=9, stop_ids=())
    assert list(alone.tokens) == expected[0, width:].tolist()
    assert (alone.prompt_tokens, both[1].prompt_tokens) == (40, 40)
    assert both[1] == generate(model, BYTES, [prompt[1]], max_tokens=9, stop_ids=())[0]
    texts = ["a document", "another one", "a third"]
    [completion] = generate(model, BYTES, [texts], max_tokens=3, stop_ids=())
    assert completion == generate(model, BYTES, [[BYTES.encode(t) for t in texts]], max_tokens=3, stop_ids=())[0]
    with pytest.raises(ValueError, match=r"prompts\[0\] must be text, ids or one of them for each replica \(3\)"):
        generate(model, BYTES, [texts[:2]])
    with pytest.raises(ValueError, match=r"prompts\[0\]\[1\] must hold at least one token"):
        generate(model, BYTES, [["a", "", "b"]])
    with pytest.raises(ValueError, match="prompt must be one for all replicas where there is a past"):
        stream(model, BYTES, texts, past=Past())


def test_a_conversation_goes_on_in_its_cache():
    model, past = tiny(), Past()
    first = tokens(20, seed=1).tolist()
    answer = [piece.token for piece in stream(model, BYTES, first, max_tokens=5, past=past, stop_ids=())]
    second = [*first, *answer, *tokens(6, seed=2).tolist()]
    went_on = [piece.token for piece in stream(model, BYTES, second, max_tokens=5, past=past, stop_ids=())]
    assert list(generate(model, BYTES, [second], max_tokens=5, stop_ids=())[0].tokens) == went_on


# ---------------------------------------------------------------------- warm start


@pytest.mark.parametrize(
    ("source", "mode"), [("qwen2", "joint"), ("llama, llama3, tied", "sublayer"), ("gguf", "joint")]
)
def test_a_model_starts_from_plain_weights(source, mode, tmp_path, caplog):
    if source == "gguf":
        path = tmp_path / "tiny.gguf"
        tiny_gguf.write(path, hugging_face("llama"))
    else:
        path = tmp_path
        hugging_face(source).save_pretrained(path)
    options = {"parscale_n": 4, "parscale_n_tokens": 6, "enable_cross_attn": True, "parscale_cross_attn_mode": mode}
    base = Transformer.from_pretrained(path)
    with pytest.raises(ValueError, match=r"rngs must be given, as in rngs=nnx.Rngs\(0\): .* lacks aggregate.down.bias"):
        Transformer.from_pretrained(path, **options)
    with caplog.at_level(logging.WARNING):
        model = Transformer.from_pretrained(path, rngs=nnx.Rngs(3), **options)
    assert "new parameters, to be trained: aggregate.down.bias" in caplog.text
    named = dict(jax.tree_util.tree_leaves_with_path(model))
    for path_, leaf in jax.tree_util.tree_leaves_with_path(base):
        np.testing.assert_array_equal(named[path_], leaf)
    again = Transformer.from_pretrained(path, rngs=nnx.Rngs(3), **options)
    assert all(map(np.array_equal, jax.tree.leaves(model), jax.tree.leaves(again)))
    replicas = model.layers[0].attention.replicas
    std = base.config.initializer_range
    assert replicas.prefix_v[...].std() == pytest.approx(0.1 * std, rel=0.2)
    assert (replicas.prefix_k[...] - replicas.prefix_k[...].mean(2, keepdims=True)).std() > 0.7 * std
    if mode == "joint":
        assert not replicas.cross_proj.weight[...].any()
        np.testing.assert_array_equal(replicas.cross_bias[...], -4)
    else:
        assert not model.layers[0].cross.o.weight[...].any()


def test_only_bases_that_fit_are_taken(tmp_path):
    hugging_face("mistral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ParScale starts from llama, qwen2, qwen2_parscale models, got 'mistral'"):
        Transformer.from_pretrained(tmp_path, parscale_n=2, rngs=nnx.Rngs(0))
    hugging_face("llama, biases, gelu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention_bias and mlp_bias must be false in a Llama model"):
        Transformer.from_pretrained(tmp_path, parscale_n=2, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_smollm2_as_four_replicas_answers_sensibly():
    text = Path(find_spec("heapq").origin).read_text()
    base, tokenizer = Transformer.from_pretrained(), Tokenizer.from_pretrained()
    model = Transformer.from_pretrained(parscale_n=4, enable_cross_attn=True, rngs=nnx.Rngs(0))
    question = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    [answer] = generate(model, tokenizer, [tokenizer.encode(question, add_special=False)], max_tokens=12)
    assert "Paris" in answer.text
    ids = jnp.asarray(tokenizer.encode(text))[None, :256]

    def loss(model) -> float:
        chosen = jax.nn.log_softmax(run(model, ids)[:, :-1])
        return -float(jnp.take_along_axis(chosen, ids[:, 1:, None], axis=-1).mean())

    assert loss(model) == pytest.approx(loss(base), rel=0.02)
