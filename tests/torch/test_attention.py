"""Every torch implementation against the float64 oracle: out, lse and, through both, dq, dk, dv."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import CASES, IDS, Case, oracle, segments
from heddle import Mask, attend, implementations, merge
from heddle.torch import sdpa

#: of the largest value of each array: rounding of the inputs' dtype, times the few roundings on the way.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def tensors(case: Case, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """The case's arrays, rounded to ``dtype``, which the oracle then takes as exact."""
    return {name: torch.from_numpy(array).to(dtype) for name, array in case.arrays(seed).items()}


def run(case: Case, arrays: dict[str, torch.Tensor], implementation: str, mask: Mask | None = None):
    q, k, v = (arrays[name].detach().requires_grad_() for name in ("query", "key", "value"))
    mask = case.mask() if mask is None else mask
    out, lse = attend(q, k, v, mask, scale=case.scale, implementation=implementation, return_lse=True)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (arrays["d_out"], arrays["d_lse"].to(lse.dtype)))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def check(case: Case, implementation: str, arrays: dict[str, torch.Tensor], got=None) -> None:
    want = oracle(case, {name: a.detach().cpu().double().numpy() for name, a in arrays.items()})
    got = run(case, arrays, implementation) if got is None else got
    for name, value in got.items():
        have, expected = value.detach().cpu().double().numpy(), want[name]
        finite = np.isfinite(expected)  # only lse's -inf isn't
        np.testing.assert_array_equal(np.isfinite(have), finite, err_msg=name)
        dtype = value.dtype if name == "lse" else arrays["query"].dtype
        bound = TOLERANCE[dtype] * max(1.0, np.abs(expected[finite]).max(initial=0.0))
        np.testing.assert_allclose(have[finite], expected[finite], rtol=0, atol=bound, err_msg=name)


@contextmanager
def small_calls():
    """Bounds so small that short sequences come to every kind of call."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BLOCK", 8), ("SMALL", 16), ("STRETCH", 5), ("CAUSAL_FROM", {"cpu": 6})):
            patch.setattr(sdpa, name, value)
        sdpa._rows.cache_clear()
        yield
    sdpa._rows.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_case(case, implementation, dtype):
    check(case, implementation, tensors(case, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_case_in_half_precision(case, dtype):
    check(case, "sdpa", tensors(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_case_cut_small(case):
    with small_calls():
        check(case, "sdpa", tensors(case, torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cases_on_cuda(dtype):
    for case in (*CASES, *LONG):
        check(case, "sdpa", {name: a.cuda() for name, a in tensors(case, dtype).items()})


LONG = [
    Case("causal square with a call of its own", 900, 900, lambda: Mask.causal(900)),
    Case("rectangle and square", 800, 1000, lambda: Mask.causal(800, 1000, 200), heads=4, kv_heads=2),
    Case("long and short documents", 1500, 1500, lambda: Mask.documents(segments(900, 40, 200, 360)), heads=4),
    Case("window", 700, 700, lambda: Mask.window(700, 150, prefix=5)),
]


@pytest.mark.parametrize("case", LONG, ids=[case.name.replace(" ", "-") for case in LONG])
def test_long(case):
    check(case, "sdpa", tensors(case))


# ---------------------------------------------------------------- which calls a mask comes to


@st.composite
def masks(draw) -> tuple[Mask, int]:
    """A mask sewn from stretches of every pattern, and a number of keys."""
    kv_len, start, stop = draw(st.integers(1, 40)), [], []
    for _ in range(draw(st.integers(1, 6))):
        n, first, width = draw(st.integers(1, 14)), draw(st.integers(0, 40)), draw(st.integers(0, 40))
        low, high = draw(st.sampled_from([(0, 0), (0, 1), (1, 1), (1, 0), (-1, 2)]))
        start += [first + low * i for i in range(n)]
        stop += [first + width + high * i for i in range(n)]
    return Mask(np.array([start]), np.array([stop]), draw(st.sampled_from([0, 0, 3, 50]))), kv_len


def computed(mask: Mask, kv_len: int) -> tuple[np.ndarray, int]:
    """How often the calls a mask comes to visit each pair that they let through, and how many pairs they compute."""
    times, pairs, at = np.zeros((mask.q_len, kv_len), int), 0, 0
    prefix = min(mask.prefix, kv_len)
    start, stop, apart = (a[0] for a in sdpa.split_prefix(mask.start, mask.stop, prefix, kv_len))
    for queries, parts in sdpa.runs(start, stop, apart, prefix, sdpa.CAUSAL_FROM["cpu"]):
        assert queries.start == at < queries.stop
        at = queries.stop
        for keys, kind in parts:
            assert 0 <= keys.start < keys.stop <= kv_len
            block = times[queries, keys]
            if kind == "causal":
                n, width = block.shape
                assert n <= width
                block += np.tri(n, width, width - n, dtype=int)
            elif kind == "masked":
                assert len(block) <= sdpa.BLOCK
                key = np.arange(keys.start, keys.stop)
                block += (start[queries, None] <= key) & (key < stop[queries, None])
            else:
                block += 1
            pairs += block.size // (2 if kind == "causal" and len(block) >= sdpa.CAUSAL_FROM["cpu"] else 1)
    assert at == mask.q_len
    return times, pairs


@settings(max_examples=300, deadline=None)
@given(masks())
def test_runs_visit_each_visible_pair_once(mask_and_keys):
    mask, kv_len = mask_and_keys
    with small_calls():
        times, _ = computed(mask, kv_len)
    np.testing.assert_array_equal(times, mask.dense(kv_len)[0])


@pytest.mark.parametrize(
    "mask",
    [
        Mask.documents(segments(*[512] * 16)),
        Mask.documents(segments(*range(20, 220, 4), padding=1000)),
        Mask.documents(segments(*[256] * 16), causal=False),
        Mask.window(4096, 256),
        Mask.window(4096, 256, causal=False, prefix=4),
        Mask.documents(segments(*[500] * 8)) & Mask.window(4000, 300),
    ],
    ids=["documents", "many documents and padding", "both ways", "window", "window both ways", "window in documents"],
)
def test_computed_pairs_follow_visible_pairs(mask):
    """A short causal square is computed whole, so twice as many and a little are the worst."""
    _, pairs = computed(mask, mask.q_len)
    assert pairs <= 2.1 * mask.visible(mask.q_len)


@pytest.mark.parametrize(
    ("rows", "kv_heads", "calls"),
    [
        ([(30, 10), (30, 10), (30, 10)], 4, [slice(None)]),
        ([(30, 10), (30, 10), (10, 30)], 4, [slice(0, 1), slice(1, 2), slice(2, 3)]),
        ([(30, 10), (30, 10), (30, 10)], 2, [slice(0, 1), slice(1, 2), slice(2, 3)]),
    ],
    ids=["equal rows", "different rows", "grouped heads"],
)
def test_a_batch_of_equal_rows_is_computed_at_once(rows, kv_heads, calls):
    q, k = torch.zeros(3, 40, 4, 8), torch.zeros(3, 40, kv_heads, 8)
    mask = Mask.documents(np.concatenate([segments(*row) for row in rows])).on(q)
    assert [batch for batch, _ in sdpa.work(q, k, mask.start, mask.stop, 0, 1.0)] == calls


# ---------------------------------------------------------------- what torch may hand over

DECODE = next(case for case in CASES if case.name == "decode")
GROUPED = Case("grouped", 70, 70, lambda: Mask.documents(segments(20, 33, padding=17)), batch=2, heads=4, kv_heads=2)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
        lambda x: torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]],
    ],
    ids=["heads first", "dims first", "every other element", "part of a longer sequence"],
)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_any_strides(layout, kv_heads):
    case = replace(GROUPED, kv_heads=kv_heads)
    arrays = {name: layout(a) for name, a in tensors(case).items()}
    check(case, "sdpa", arrays)


def test_expanded_arrays():
    case = replace(GROUPED, kv_heads=4)
    arrays = tensors(case)
    for name, axis in (("key", 2), ("value", 0), ("d_out", 1)):
        arrays[name] = arrays[name].narrow(axis, 0, 1).expand_as(arrays[name])
    check(case, "sdpa", arrays)


@pytest.mark.parametrize("scale", [-0.3, 0.0, -0.0])
def test_a_scale_that_isnt_positive(scale):
    for case in (GROUPED, DECODE, LONG[0]):
        case = replace(case, scale=scale)
        check(case, "sdpa", tensors(case))


@pytest.mark.parametrize("padding", [1, 17])
def test_an_infinite_gradient_of_an_empty_lse_is_none(padding):
    """As comes back from ``lse.square()``, say."""
    case = replace(GROUPED, q_len=53 + padding, kv_len=53 + padding)
    case = replace(case, mask=lambda: Mask.documents(segments(20, 33, padding=padding)))
    arrays = tensors(case)
    arrays["d_lse"][:, 53:] = -torch.inf
    got = run(case, arrays, "sdpa")
    arrays["d_lse"][:, 53:] = 0
    check(case, "sdpa", arrays, got)


def test_the_gradient_of_one_output_alone():
    arrays = tensors(GROUPED)
    for used, unused in (("d_out", "d_lse"), ("d_lse", "d_out")):
        q, k, v = (arrays[name].detach().requires_grad_() for name in ("query", "key", "value"))
        out, lse = attend(q, k, v, GROUPED.mask(), implementation="sdpa", return_lse=True)
        grads = torch.autograd.grad(out if used == "d_out" else lse, (q, k, v), arrays[used])
        zeroed = {**arrays, unused: torch.zeros_like(arrays[unused])}
        want = run(GROUPED, zeroed, "sdpa")
        for name, gradient in zip(("dq", "dk", "dv"), grads):
            torch.testing.assert_close(gradient, want[name], rtol=0, atol=5e-6)


def test_no_gradient_through_lse_widens_nothing(monkeypatch):
    widths = []
    kernel = sdpa._backward
    monkeypatch.setattr(sdpa, "_backward", lambda d_out, *rest: widths.append(d_out.shape[-1]) or kernel(d_out, *rest))
    arrays = tensors(GROUPED)
    query = arrays["query"].requires_grad_()
    attend(query, arrays["key"], arrays["value"], GROUPED.mask(), implementation="sdpa").sum().backward()
    assert set(widths) == {GROUPED.dim}


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_backward_of_a_part_of_the_keys(kv_heads):
    """From out and lse over all keys, as ring attention has them: the parts' gradients add up to the whole's."""
    case = Case("part", 90, 90, lambda: Mask.documents(segments(30, 44, padding=16)), heads=4, kv_heads=kv_heads)
    arrays, mask = tensors(case), case.mask()
    query, key, value, d_out, d_lse = arrays.values()
    split = 37
    parts = []
    for first, past in ((0, split), (split, 90)):
        part = Mask(np.clip(mask.start - first, 0, None), np.clip(mask.stop - first, 0, past - first)).on(query)
        parts.append((key[:, first:past], value[:, first:past], part))
    out, lse = merge([attend(query, *part, implementation="sdpa", return_lse=True) for part in parts])
    grads = [sdpa.sdpa_backward(query, *part, 0.25, out, lse, d_out, d_lse) for part in parts]
    (dq_0, *d_0), (dq_1, *d_1) = grads
    dk, dv = (torch.cat(pair, dim=1) for pair in zip(d_0, d_1))
    check(case, "sdpa", arrays, {"out": out, "lse": lse, "dq": dq_0 + dq_1, "dk": dk, "dv": dv})


def test_repetition_is_bit_identical():
    for case in (GROUPED, *LONG):
        arrays = tensors(case)
        first, second = run(case, arrays, "sdpa"), run(case, arrays, "sdpa")
        for name in first:
            assert torch.equal(first[name], second[name]), name


def operands(case: Case, dtype: torch.dtype):
    arrays = tensors(case, dtype)
    query, key, value = (arrays[name].requires_grad_() for name in ("query", "key", "value"))
    mask = case.mask().on(query)
    return arrays, (query, key, value, mask.start, mask.stop, mask.prefix, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value_dim", [8, 24])
def test_opcheck(dtype, value_dim):
    case = replace(GROUPED, dim=16, value_dim=value_dim)
    arrays, forward = operands(case, dtype)
    torch.library.opcheck(sdpa._sdpa, forward)
    out, lse = (x.detach() for x in sdpa._sdpa(*forward))
    for d_lse in (None, arrays["d_lse"].to(lse.dtype)):
        inputs = (arrays["d_out"], d_lse, *(x.detach() for x in forward[:3]), out, lse, *forward[3:])
        torch.library.opcheck(sdpa._sdpa_backward, inputs)


COMPILED = """
import numpy as np, torch, heddle, heddle.torch
segments = torch.tensor(np.repeat([4, 0, -1], [30, 25, 9])[None], dtype=torch.int32)

def layer(q, k, v, segments):
    out, lse = heddle.attend(q, k, v, heddle.Mask.documents(segments), implementation="sdpa", return_lse=True)
    return out * 2, torch.where(torch.isfinite(lse), lse, 0.0)

def both(function, n):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    out, lse = function(q, k, v, segments[:, :n])
    (out.square().sum() + lse.sin().sum()).backward()
    return out, lse, q.grad, k.grad, v.grad

compiled = torch.compile(layer, fullgraph=True, backend="{backend}")
for n in (64, 50):
    for have, want in zip(both(compiled, n), both(layer, n)):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-5)
print("same")
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_forward_and_backward(backend):
    program = COMPILED.replace("{backend}", backend)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "same\n", done.stderr


def test_what_isnt_supported_is_said():
    q = torch.zeros(1, 4, 2, 8, device="meta")
    assert implementations(q, q, q)["sdpa"] == "it runs on cpu and cuda, the arrays are on meta"
    with pytest.raises(NotImplementedError, match="'sdpa' doesn't serve this case: it runs on cpu and cuda"):
        attend(q, q, q, implementation="sdpa")


def test_sdpa_is_what_a_cpu_gets():
    q = torch.zeros(1, 4, 2, 8)
    assert next(name for name, why in implementations(q, q, q).items() if why is None) == "sdpa"
