"""Dilated attention's nnx modules: against the oracle, and against torch's modules with the same weights."""

from __future__ import annotations

import dilated_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from heddle.jax import DilatedAttention, MultiheadDilatedAttention
from heddle.torch import dilated as torch_wing

LISTS = (8, 12), (1, 3)
IDS = np.array([[0] * 9 + [1] * 9 + [-1] * 2, [4] * 20])
PADDING = np.arange(20)[None] >= np.array([[20], [17]])
PACKED = {"segment_ids": IDS, "key_padding_mask": PADDING}


@pytest.mark.parametrize("tokens", [{}, PACKED], ids=["plain", "packed"])
def test_equals_the_oracle(tokens):
    """With heads that share key heads, and gradients."""
    rng = np.random.default_rng(0)
    query, d_out = rng.normal(size=(2, 2, 20, 6, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 20, 3, 4)).astype(np.float32)
    want = oracle.dilated(
        query, key, value, *LISTS, True, **tokens, scale=0.3, d_out=d_out, d_lse=np.zeros(query.shape[:3])
    )
    module = DilatedAttention(*LISTS, softmax_scale=0.3, op="reference")

    @jax.jit
    def run(*inputs):
        out, pull = jax.vjp(lambda *x: module(*x, True, **tokens), *inputs)
        return out, *pull(d_out)

    for got, expected in zip(run(query, key, value), (want[0], *want[2:])):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def pair(**options):
    """The torch module, with parameters of which none is 0 or 1, and its twin."""
    theirs = torch_wing.MultiheadDilatedAttention(24, 6, LISTS[1], LISTS[0], **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    ours = MultiheadDilatedAttention(24, 6, LISTS[1], LISTS[0], **options, rngs=nnx.Rngs(0))
    ours.load_state_dict({name: tensor.numpy() for name, tensor in theirs.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize("options", [{}, {"bias": False, "layer_norm": False}], ids=["default", "bare"])
@pytest.mark.parametrize("packed", [False, True])
def test_one_checkpoint_for_both_wings(options, packed):
    """The same outputs, and the same gradients of input and parameters."""
    ours, theirs = pair(**options)
    rng = np.random.default_rng(0)
    x, d_out = rng.normal(size=(2, 2, 20, 24)).astype(np.float32)
    tokens = PACKED if packed else {}
    asked = torch.from_numpy(x).requires_grad_()
    want, _ = theirs(asked, asked, asked, is_causal=True, **{k: torch.from_numpy(v) for k, v in tokens.items()})
    want.backward(torch.from_numpy(d_out))

    graph, parameters = nnx.split(ours)

    @jax.jit
    def run(parameters, x):
        apply = lambda parameters, x: nnx.merge(graph, parameters)(x, x, x, is_causal=True, **tokens)[0]  # noqa: E731
        out, pull = jax.vjp(apply, parameters, x)
        return out, *pull(jnp.asarray(d_out))

    out, d_parameters, d_x = run(parameters, x)
    np.testing.assert_allclose(out, want.detach(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(d_x, asked.grad, rtol=1e-4, atol=1e-4)
    got = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(d_parameters)}
    assert got.keys() == theirs.state_dict().keys() == ours.state_dict().keys()
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(got[name].T, parameter.grad, rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_checkpoint_goes_back():
    ours, theirs = pair()
    kept = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, kept[name])
    with pytest.raises(ValueError, match=r"got norm.bias missing for \(24,\); odd \(1,\) for none"):
        ours.load_state_dict({n: a for n, a in ours.state_dict().items() if n != "norm.bias"} | {"odd": np.ones(1)})


def test_as_torch_takes_its_arguments():
    ours, _ = pair()
    x = np.random.default_rng(0).normal(size=(2, 20, 24)).astype(np.float32)
    padding = np.where(PADDING, -np.inf, 0).astype(np.float32)
    np.testing.assert_array_equal(ours(x, x, x, jnp.asarray(padding))[0], ours(x, x, x, jnp.asarray(PADDING))[0])
    alone, weights = ours(x[0], x[0], x[0])
    np.testing.assert_allclose(alone, ours(x, x, x)[0][0], rtol=0, atol=1e-6)
    assert weights is None


def test_magneto_initialization():
    module = MultiheadDilatedAttention(256, 4, [1], [8], gamma_init=3.0, rngs=nnx.Rngs(0))
    for projection, gain in ((module.q_proj, 1), (module.k_proj, 1), (module.v_proj, 3), (module.out_proj, 3)):
        assert np.std(projection.weight[...]) == pytest.approx(gain * 256**-0.5, rel=0.02)
        assert not projection.bias[...].any()


def test_dropout(unhooked):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 32, 4, 8)).astype(np.float32)
    value, keys = np.ones_like(query), jax.random.split(jax.random.key(0), 2)
    module = DilatedAttention((16, 32), (1, 2), attention_dropout=0.5)
    one, again, other = (np.asarray(module(query, key, value, dropout_rng=k)) for k in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert 0.9 < one.mean() < 1.1  # what is left is scaled up
    assert one.std() > 0.1
    with pytest.raises(ValueError, match=r"dropout_rng must be a key where attention_dropout is 0.5, got None"):
        module(query, key, value)
    module.eval()
    np.testing.assert_allclose(module(query, key, value), value, rtol=1e-6)


def test_what_cannot_be(unhooked):
    module, x = MultiheadDilatedAttention(8, 2, [1], [4], rngs=nnx.Rngs(0)), jnp.zeros((1, 4, 8))
    for run, message in [
        (lambda: module(x, x, x, need_weights=True), "need_weights must be False"),
        (lambda: module(x, x, x, attn_mask=x), "attn_mask must be None"),
        (lambda: module(x, x[:, :3], x[:, :3]), "query and key must have one length, got 4 and 3"),
        (lambda: MultiheadDilatedAttention(8, 3, [1], [4], rngs=nnx.Rngs(0)), "embed_dim must be a multiple"),
        (lambda: DilatedAttention([4], [1, 2]), "must be of one length, got 1 and 2"),
        (lambda: DilatedAttention([4], [1], attention_dropout=1.0), "attention_dropout must be at least 0 and less"),
    ]:
        with pytest.raises(ValueError, match=message):
            run()
