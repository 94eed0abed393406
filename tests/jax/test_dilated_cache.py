"""Dilated attention as an option of the transformer: the torch models' logits, documents, decoding from rings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tiny_models import SIZES, THETA, tokens

import heddle.torch.huggingface  # noqa: F401 (registers attn_implementation="heddle")
from heddle.attention.dilated_patterns import cache_length
from heddle.data.tokenizers import Tokenizer
from heddle.jax import KVCache, ModelConfig, Transformer, generate, stream
from heddle.jax.dilated_cache import DilatedKVCache
from heddle.jax.generation import Past
from heddle.torch.parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM

W, R = (4, 7, 12), (1, 2, 5)  # w % r > 0, and more offsets than heads
DILATED = {"kind": "dilated", "segment_lengths": list(W), "dilation_rates": list(R)}
PARSCALE = {"model_type": "qwen2_parscale", "parscale_n": 3, "parscale_n_tokens": 4, "enable_cross_attn": True}
MODELS = {"llama": {}, "parscale": PARSCALE}
BYTES = Tokenizer.bytes()
run = jax.jit(lambda model, *arguments, **options: model(*arguments, **options))


def tiny(name: str = "llama", **changes) -> Transformer:
    options = {
        "attention": DILATED,
        **SIZES,
        "vocab_size": 257,
        "num_hidden_layers": 1,
        "model_type": "llama",
        **MODELS[name],
        **changes,
    }
    model = Transformer(ModelConfig.from_dict(options), rngs=nnx.Rngs(0))
    for layer in model.layers:  # where a new ParScale model ignores the other replicas
        if layer.attention.replicas is not None:
            proj = layer.attention.replicas.cross_proj.weight
            proj[...] = 0.3 * jax.random.normal(jax.random.key(1), proj.shape)
    return model


# ---------------------------------------------------------------------- the whole sequence


@pytest.mark.parametrize("family", ["qwen2", "parscale"])
def test_one_folder_gives_torchs_logits(family, tmp_path):
    sizes = SIZES | {"rope_parameters": THETA | {"rope_type": "default"}, "attention": DILATED}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "parscale":
            scaled = {name: value for name, value in PARSCALE.items() if name != "model_type"}
            theirs = Qwen2ParScaleForCausalLM(Qwen2ParScaleConfig(**sizes, **scaled))
        else:
            config = transformers.AutoConfig.for_model(family, **sizes)
            theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="heddle")
        for name, parameter in theirs.named_parameters():
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    theirs.eval().save_pretrained(tmp_path / "torch")
    ours, ids = Transformer.from_pretrained(tmp_path / "torch"), tokens(2, 40)
    assert (ours.config.attention.segment_lengths, ours.config.attention.dilation_rates) == (W, R)
    with torch.inference_mode():
        want = theirs(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(run(ours, jnp.asarray(ids)), want, rtol=0, atol=1e-4)
    ours.save_pretrained(tmp_path / "jax")
    back = type(theirs).from_pretrained(
        tmp_path / "jax", **({} if family == "parscale" else {"attn_implementation": "heddle"})
    )
    assert back.config.attention == DILATED
    with torch.inference_mode():
        np.testing.assert_array_equal(back(torch.from_numpy(ids).long()).logits.numpy(), want)


def test_packed_documents_are_each_document_alone():
    model, ids = tiny("parscale"), tokens(1, 40)
    segments = np.repeat([4, 0, 9, -1], [13, 4, 21, 2])[None].astype(np.int32)
    packed = np.asarray(run(model, jnp.asarray(ids), segment_ids=jnp.asarray(segments)))
    assert np.isfinite(packed).all()
    for begin, end in ((0, 13), (13, 17), (17, 38)):
        alone = run(model, jnp.asarray(ids[:, begin:end]))
        np.testing.assert_allclose(packed[:, begin:end], alone, rtol=0, atol=5e-5)


def test_gradients_with_layers_recomputed_are_the_same():
    ids, segments = jnp.asarray(tokens(1, 24)), jnp.asarray(np.repeat([0, 1, -1], [9, 13, 2])[None])

    def loss(model, ids, segments):
        chosen = jax.nn.log_softmax(model(ids, segment_ids=segments)[:, :-1])
        return -jnp.take_along_axis(chosen, ids[:, 1:, None], axis=-1)[:, :21].mean()

    model = tiny("parscale")
    again = nnx.clone(model)
    again.remat = True
    expected, found = (jax.jit(jax.grad(loss))(m, ids, segments) for m in (model, again))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize(("name", "pieces"), [("llama", (32, 8)), ("parscale", (3, 1, 36))])
def test_decoding_a_ragged_batch_is_the_full_forward(name, pieces):
    """Prompts and answers past three boundaries of every pattern; rows that are done wait for the others."""
    model, lengths, more = tiny(name), np.array([35, 5, 40]), 40
    ids = tokens(3, 80)
    full, found = np.asarray(run(model, jnp.asarray(ids))), [[] for _ in lengths]
    cache, begin = model.empty_cache(3, 96), 0
    for size in pieces:
        index = np.arange(begin, begin + size)
        real = index < lengths[:, None]
        out, cache = run(model, jnp.asarray(ids[:, index]), segment_ids=jnp.where(real, 0, -1), cache=cache)
        for row in range(3):
            found[row] += list(np.asarray(out[row])[real[row]])
        begin += size
    at = lengths.copy()
    for step in range(more):
        real = np.array([True, step % 7 != 3, step < 25])
        now = ids[np.arange(3), at][:, None]
        out, cache = run(model, jnp.asarray(now), segment_ids=jnp.where(real, 0, -1)[:, None], cache=cache)
        for row in np.flatnonzero(real):
            found[row].append(np.asarray(out[row, 0]))
        at += real
    np.testing.assert_array_equal(cache.lengths, at)
    for row in range(3):
        np.testing.assert_allclose(found[row], full[row, : at[row]], rtol=0, atol=1e-4)


def test_replicas_that_begin_later():
    model, ids = tiny("parscale"), tokens(1, 3, 31)
    padding = np.zeros((1, 3, 31), np.int32)
    padding[0, 1, :9], padding[0, 2, :2] = -1, -1
    full = run(model, ids, segment_ids=padding)
    cache, outs = model.empty_cache(1, 40), []
    for begin, end in ((0, 7), (7, 8), (8, 15), (15, 31)):
        piece = slice(begin, end)
        out, cache = run(model, ids[:, :, piece], segment_ids=padding[:, :, piece], cache=cache)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1)[:, 9:], full[:, 9:], rtol=0, atol=5e-5)


def test_a_batch_generates_what_each_prompt_does_alone():
    model, prompts = tiny(), [tokens(n, seed=n).tolist() for n in (3, 45, 11)]
    together = generate(model, BYTES, prompts, max_tokens=40, stop_ids=())
    for prompt, completion in zip(prompts, together, strict=True):
        ids = np.zeros((1, 96), np.int32)  # what comes after doesn't matter
        ids[0, : len(prompt) + 40] = [*prompt, *completion.tokens]
        chosen = np.asarray(run(model, jnp.asarray(ids)))[0].argmax(axis=-1)
        assert chosen[len(prompt) - 1 :][:40].tolist() == list(completion.tokens)


def test_a_conversation_goes_on_or_is_read_again():
    model, past, prompt = tiny(), Past(), tokens(20, seed=1).tolist()
    for extra in ([65, 66], [67] * 9):
        answer = [piece.token for piece in stream(model, BYTES, prompt, max_tokens=5, past=past, stop_ids=())]
        assert answer == list(generate(model, BYTES, [prompt], max_tokens=5, stop_ids=())[0].tokens)
        prompt = [*prompt, *answer, *extra]
    other = [*prompt[:9], 70, 71]  # from a segment that is gone
    again = [piece.token for piece in stream(model, BYTES, other, max_tokens=5, past=past, stop_ids=())]
    assert again == list(generate(model, BYTES, [other], max_tokens=5, stop_ids=())[0].tokens)


# ---------------------------------------------------------------------- the cache


def test_its_size_is_bounded():
    model = tiny()
    sizes = [model.empty_cache(2, max_len).nbytes for max_len in (50, 96, 10**6)]
    assert len(set(sizes)) == 1
    assert sizes[0] <= 2 * 2 * 2 * 4 * cache_length(W, R) * 8 * 4 + 2 * 4  # k and v, batch, layers, heads
    assert model.empty_cache(2, 5).nbytes < sizes[0] < 2 * model.empty_cache(2, 96, jnp.bfloat16).nbytes


def test_it_grows():
    model, ids = tiny(), tokens(1, 30)
    out, small = run(model, jnp.asarray(ids[:, :5]), cache=model.empty_cache(1, 5))
    small = small.grow(40)
    assert [x.shape for x in jax.tree.leaves(small)] == [x.shape for x in jax.tree.leaves(model.empty_cache(1, 40))]
    out, _ = run(model, jnp.asarray(ids[:, 5:]), cache=small)
    np.testing.assert_allclose(out, run(model, jnp.asarray(ids))[:, 5:], rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="max_len must be at least the cache's 40, got 8"):
        small.grow(8)


def test_it_goes_back_within_a_segment():
    model, ids = tiny(), tokens(1, 32)
    full = run(model, jnp.asarray(ids))
    _, cache = run(model, jnp.asarray(ids[:, :27]), cache=model.empty_cache(1, 40))
    assert cache.truncate(np.array([20])) is None  # where a segment of 4 begins, but 7 and 12 have gone on to others
    _, cache = run(model, jnp.asarray(ids[:, 27:31]), cache=cache)
    out, _ = run(model, jnp.asarray(ids[:, 29:]), cache=cache.truncate(np.array([29])))
    np.testing.assert_allclose(out, full[:, 29:], rtol=0, atol=5e-5)
    assert cache.truncate(np.array([0])).lengths == 0


def test_a_donated_cache_is_written_in_place():
    model = tiny()
    cache = model.empty_cache(2, 64)
    structure, leaves = jax.tree.structure(model), jax.tree.leaves(model)

    def steps(leaves, cache):
        def step(_, state):
            cache, token = state
            logits, cache = jax.tree.unflatten(structure, leaves)(token, cache=cache)
            return cache, logits.argmax(-1)

        return jax.lax.fori_loop(0, 5, step, (cache, jnp.ones((2, 1), jnp.int32)))

    arrays = jax.tree.leaves((cache.keys, cache.values))
    where = [array.unsafe_buffer_pointer() for array in arrays]
    compiled = jax.jit(steps, donate_argnums=1).lower(leaves, cache).compile()
    shapes = {"f32[" + ",".join(map(str, array.shape)) + "]" for array in arrays}
    assert len(shapes) == 3
    text = compiled.as_text().splitlines()
    assert not [line for line in text if " copy(" in line and any(shape in line for shape in shapes)]
    after, _ = compiled(leaves, cache)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves((after.keys, after.values))] == where


def test_what_cannot_be():
    model = tiny()
    for wrong, message in [
        ({"kind": "dilated"}, r'attention must be \{"kind": "dense"\} or'),
        ({"kind": "sparse"}, "attention must be"),
        ("dilated", "attention must be"),
        (DILATED | {"segment_lengths": [4]}, "must be of one length, got 1 and 3"),
        (DILATED | {"dilation_rates": [0, 1, 2]}, "dilation_rates must hold positive integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny(attention=wrong)
    assert tiny(attention={"kind": "dense"}).config.attention is None
    with pytest.raises(ValueError, match="sliding_window must be none where attention is dilated, got 4"):
        tiny(model_type="mistral", sliding_window=4)
    with pytest.raises(ValueError, match=r"model\.empty_cache makes its cache"):
        KVCache.empty(model.config, 1, 8)
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, float16, got int8"):
        model.empty_cache(1, 8, jnp.int8)
    with pytest.raises(ValueError, match="cache must have room for 9 tokens of sequence 0, got max_len 8"):
        model(jnp.asarray(tokens(1, 9)), cache=model.empty_cache(1, 8))
    assert isinstance(model.empty_cache(1, 8), DilatedKVCache)
