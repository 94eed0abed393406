"""``cudnn`` without a GPU: which masks it has words for, the gradients put together from its own, and its lowering."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_cases import CASES, IDS, Case, oracle, segments
from heddle import Mask, attend, implementations
from heddle.attention.attend import IMPLEMENTATIONS, REFERENCE
from heddle.jax import cudnn
from heddle.jax.cudnn import Kind, kind_of


def dense(kind: Kind, batch: int, q_len: int, kv_len: int) -> np.ndarray:
    """All pairs that ``kind`` means, as cuDNN's documentation has it."""
    query, key = np.arange(q_len)[:, None], np.arange(kv_len)
    seen = np.ones((batch, q_len, kv_len), bool)
    if kind.causal:
        seen &= key <= query
    if kind.window is not None:
        seen &= key > query - kind.window
    if kind.lengths is not None:
        q_lengths, kv_lengths = (np.array(lengths)[:, None, None] for lengths in kind.lengths)
        seen &= (query < q_lengths) & (key < kv_lengths)
    return seen


KINDS = {
    "full": Kind(False, None, None),
    "full-cross": Kind(False, None, None),
    "causal": Kind(True, None, None),
    "causal-odd-length": Kind(True, None, None),
    "multi-query": Kind(True, None, None),
    "window": Kind(True, 13, None),
    "window-of-one": Kind(True, 1, None),
    "window-wider-than-the-sequence": Kind(True, None, None),
    "right-padded": Kind(True, None, ((40, 3, 17), (40, 3, 17))),
    "one-document-and-padding": Kind(True, None, ((70,), (70,))),
    "decode": Kind(False, None, ((1, 1, 1), (77, 1, 40))),
    "many-queries-one-key": Kind(False, None, None),
    "one-query-one-key": Kind(True, None, None),
}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_kind_means_what_the_mask_does(case):
    """Whatever mask cuDNN has a word for, it is the right one."""
    mask = case.mask() or Mask.full(case.q_len, case.kv_len)
    kind = kind_of(mask, case.batch, case.kv_len)
    if isinstance(kind, Kind):
        want = np.broadcast_to(mask.dense(case.kv_len), (case.batch, case.q_len, case.kv_len))
        np.testing.assert_array_equal(dense(kind, case.batch, case.q_len, case.kv_len), want)
    assert kind == KINDS.get(case.name.replace(" ", "-"), kind)


def test_padded_without_causality():
    mask = Mask.lengths(np.array([20, 7]), 20, causal=False)
    assert kind_of(mask, 2, 20) == Kind(False, None, ((20, 7), (20, 7)))


NONE = {
    "documents": Mask.documents(segments(30, 34)),
    "an offset": Mask.causal(20, 70, 50),
    "sinks": Mask.window(64, 9, prefix=3),
    "a window both ways": Mask.window(64, 9, causal=False),
    "padding first": Mask.documents(np.repeat([[-1, 0]], [13, 37], axis=1)),
    "nobody sees anything": Mask.documents(segments(padding=20)),
}


@pytest.mark.parametrize("mask", NONE.values(), ids=list(NONE))
def test_masks_that_it_cannot_say(mask):
    why = kind_of(mask, 1, 70 if mask.q_len == 20 and int(mask.stop.max()) == 70 else mask.q_len)
    assert isinstance(why, str)
    assert why.startswith("cuDNN ")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(cudnn, "device_of", lambda array: type("Device", (), {"platform": "gpu"}))


def test_reasons(gpu):
    def why(mask=None, dtype="bfloat16", dim=64, value_dim=64):
        query, value = jnp.zeros((1, 16, 2, dim), dtype), jnp.zeros((1, 16, 2, value_dim), dtype)
        return implementations(query, query, value, mask)["cudnn"]

    assert why() is None
    assert why(Mask.causal(16)) is None
    assert why(dtype="float32") == "cuDNN takes bfloat16 and float16, not float32"
    assert "got 64 and 32" in (why(value_dim=32) or "")
    assert "got 20 and 20" in (why(dim=20, value_dim=20) or "")
    assert "not this one" in (why(Mask.documents(segments(7, 9))) or "")

    query, mask = jnp.zeros((1, 16, 2, 64), "bfloat16"), Mask.causal(16).on(jnp.zeros(()))
    reasons = []
    jax.jit(lambda q, m: reasons.append(implementations(q, q, q, m)["cudnn"]))(query, mask)
    jax.jit(lambda q: reasons.append(implementations(q, q, q, mask)["cudnn"]))(query)
    assert "let jit close over it" in reasons[0]
    assert reasons[1] is None


def test_on_a_cpu_it_is_refused():
    query = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="cuDNN runs on CUDA, the arrays are on cpu"):
        attend(query, query, query, implementation="cudnn")


# ---------------------------------------------------------------- gradients: cuDNN's own knows none of the lse


@jax.custom_vjp
def _without_gradient_of(lse):
    return lse


_without_gradient_of.defvjp(lambda lse: (lse, None), lambda _, d_lse: (jnp.zeros_like(d_lse),))


@pytest.fixture
def stand_in(monkeypatch):
    """In cuDNN's place the reference, whose lse then has no gradient either, and garbage where queries are padding."""

    def attention(query, key, value, *, q_seqlen=None, kv_seqlen=None, scale, mask_type, sliding_window_length,
                  return_residual):  # fmt: skip
        assert return_residual
        lengths = None if q_seqlen is None else tuple(tuple(np.asarray(n).tolist()) for n in (q_seqlen, kv_seqlen))
        kind = Kind("CAUSAL" in mask_type.name, sliding_window_length, lengths)
        assert (lengths is not None) == ("PADDING" in mask_type.name)
        seen = dense(kind, query.shape[0], query.shape[1], key.shape[1])
        start, stop = seen.argmax(-1), np.where(seen.any(-1), seen.shape[-1] - seen[..., ::-1].argmax(-1), 0)
        out, lse = REFERENCE.run(query, key, value, Mask(start, stop).on(query), scale)
        out, lse = (jnp.where(seen.any(-1)[(...,) + (None,) * (x.ndim - 2)], x, 7.0) for x in (out, lse))
        return out, _without_gradient_of(jnp.swapaxes(lse, 1, 2))

    monkeypatch.setattr(cudnn, "_attention", lambda: attention)


@pytest.mark.parametrize(
    ("name", "through"),
    [("right-padded", "out"), ("right-padded", "lse"), ("right-padded", "both"), ("window", "both"),
     ("multi-query", "both")],
)  # fmt: skip
@pytest.mark.usefixtures("stand_in")
def test_gradients(name, through):
    case = CASES[IDS.index(name)]
    arrays = {name: jnp.asarray(a) for name, a in case.arrays().items()}
    arrays["d_out"] *= through != "lse"
    arrays["d_lse"] *= through != "out"
    query, key, value, d_out, d_lse = arrays.values()
    mask = case.mask().on(query)
    sees = (np.asarray(mask.counts(case.kv_len)) > 0)[..., None]

    def forward(query, key, value):
        out, lse = cudnn.cudnn(query, key, value, mask, case.dim**-0.5)
        return {"out": (out,), "lse": (lse,), "both": (out, lse)}[through]

    cotangents = {"out": (d_out,), "lse": (d_lse,), "both": (d_out, d_lse)}[through]
    results, pull = jax.vjp(forward, query, key, value)
    want = oracle(case, {name: np.asarray(a, np.float64) for name, a in arrays.items()})
    names = {"out": ["out"], "lse": ["lse"], "both": ["out", "lse"]}[through]
    for name, have in zip([*names, "dq", "dk", "dv"], [*results, *pull(cotangents)]):
        expected = want[name]
        if name == "lse":
            np.testing.assert_array_equal(have == -np.inf, np.broadcast_to(~sees, have.shape))
            have, expected = np.where(sees, have, 0), np.where(sees, expected, 0)
        np.testing.assert_allclose(have, expected, atol=1e-5 * max(1, np.abs(expected).max()), err_msg=name)


@pytest.mark.usefixtures("stand_in")
def test_backward_over_parts_of_the_keys():
    """Given out and lse over all keys, the gradients of parts add up to the whole's, as ring attention has it."""
    case = Case("full", 30, 40, heads=4, kv_heads=2)
    arrays = {name: jnp.asarray(a) for name, a in case.arrays().items()}
    query, key, value, d_out, d_lse = arrays.values()
    out, lse = REFERENCE.run(query, key, value, Mask.full(30, 40, like=query), 0.25)
    dq, parts = 0, []
    for first, past in ((0, 24), (24, 40)):
        d_query, *rest = IMPLEMENTATIONS["jax"]["cudnn"].backward(
            query, key[:, first:past], value[:, first:past], Mask.full(30, past - first, like=query), 0.25,
            out, lse, d_out, d_lse,
        )  # fmt: skip
        dq, parts = dq + d_query, [*parts, rest]
    want = oracle(case, {name: np.asarray(a, np.float64) for name, a in arrays.items()})
    dk, dv = (jnp.concatenate(pair, axis=1) for pair in zip(*parts))
    for name, have in {"dq": dq, "dk": dk, "dv": dv}.items():
        np.testing.assert_allclose(have, want[name], atol=2e-5, err_msg=name)


# ---------------------------------------------------------------- lowering

LOWERED = {
    "full": (lambda: Mask.full(64, 64), "NO_MASK", 0),
    "causal": (lambda: Mask.causal(64), "CAUSAL", 0),
    "window": (lambda: Mask.window(64, 16), "CAUSAL", 16),
    "padded": (lambda: Mask.lengths(np.array([64, 30]), 64, causal=False), "PADDING", 0),
    "padded and causal": (lambda: Mask.lengths(np.array([64, 30]), 64), "PADDING_CAUSAL", 0),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowered_for_cuda(name, gpu, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)
    build, mask_type, window = LOWERED[name]
    query = jax.ShapeDtypeStruct((2, 64, 8, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)
    mask = build().on(jnp.zeros(()))

    def loss(query, key, value):
        out = attend(query, key, value, mask, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
    # d_lse is no array of zeros here: one forward and one backward, no more.
    assert ["Backward" in call for call in calls] == [False, True]
    for call in calls:
        assert f"mask_type\\22: \\22{mask_type}\\22" in call
        assert f"sliding_window_length\\22: {window}" in call
