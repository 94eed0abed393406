"""The Triton kernels under Triton's interpreter. Not collected by name: test_interpreter.py runs it, interpreting."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from attention_cases import CASES, IDS, Case, oracle, segments
from heddle import Mask, attend, implementations, merge
from heddle.kernels import plan
from heddle.torch import triton as launcher

#: of the largest value of each array: the interpreter rounds as the kernels do, to float16 between the products.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3}
#: Small, so that short sequences have several; the sizes differ, so that nothing can mistake one for the other.
TILES = {
    "forward": plan.Tile(32, 16, 4, 1),
    "backward_kv": plan.Tile(16, 32, 4, 1),
    "backward_q": plan.Tile(32, 16, 4, 1),
    "decode": plan.Tile(16, 16, 4, 1),
}
LARGER = {name: plan.Tile(64, 32, 4, 1) for name in ("forward", "backward_kv", "backward_q")}
LONG = 90  #: queries from which on the larger tiles save a minute


@pytest.fixture(autouse=True)
def _small_tiles():
    with plan.override(**TILES):
        yield


@pytest.fixture(autouse=True)
def _empty_is_nan(monkeypatch):
    """What a kernel forgets to write shows."""
    empty = torch.empty

    def nan(*args, **kwargs):
        array = empty(*args, **kwargs)
        return array.fill_(torch.nan) if array.is_floating_point() else array

    monkeypatch.setattr(torch, "empty", nan)


def tensors(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    arrays = {name: torch.from_numpy(array).to(dtype) for name, array in case.arrays().items()}
    return {**arrays, "d_lse": arrays["d_lse"].float()}


def compare(case: Case, arrays: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    dtype = arrays["query"].dtype
    want = oracle(case, {name: a.double().numpy() for name, a in arrays.items()})
    for name, array in got.items():
        have, expected = array.detach().double().numpy(), want[name]
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(have == -np.inf, ~finite, err_msg=name)
        tolerance = TOLERANCE[torch.float32 if name == "lse" and dtype == torch.float32 else dtype]
        bound = tolerance * max(1.0, np.abs(expected[finite]).max(initial=0.0))
        np.testing.assert_allclose(have[finite], expected[finite], rtol=0, atol=bound, err_msg=name)


def run(case: Case, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    query, key, value = (arrays[name].detach().requires_grad_() for name in ("query", "key", "value"))
    out, lse = attend(query, key, value, case.mask(), scale=case.scale, implementation="triton", return_lse=True)
    assert out.dtype == query.dtype
    assert lse.dtype == torch.float32
    dq, dk, dv = torch.autograd.grad((out, lse), (query, key, value), (arrays["d_out"], arrays["d_lse"]))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_case(case, dtype):
    arrays = tensors(case, dtype)
    with plan.override(**(LARGER if case.q_len >= LONG else {})):
        compare(case, arrays, run(case, arrays))
    if case.q_len * case.heads // case.kv_heads <= launcher.DECODE_ROWS:  # without a gradient: split over the keys
        with torch.no_grad():
            out, lse = attend(
                *(arrays[name] for name in ("query", "key", "value")),
                case.mask(), scale=case.scale, implementation="triton", return_lse=True,
            )  # fmt: skip
        compare(case, arrays, {"out": out, "lse": lse})


GROUPED = Case("grouped", 70, 70, lambda: Mask.documents(segments(20, 33, padding=17)), batch=2, heads=4, kv_heads=2)
DECODE = Case("decode", 1, 200, lambda: Mask.window(1, 150, 200, 190, prefix=9), batch=2, heads=8, kv_heads=2, dim=24)


def test_repetition_is_bit_identical():
    arrays = tensors(GROUPED, torch.float16)
    first, second = run(GROUPED, arrays), run(GROUPED, arrays)
    for name, array in first.items():
        assert torch.equal(array, second[name]), name


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_any_number_of_splits(programs, monkeypatch):
    monkeypatch.setattr(plan, "plan_decode", functools.partial(_with_programs, plan.plan_decode, programs))
    arrays = tensors(DECODE, torch.float32)
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    out, lse = attend(query, key, value, DECODE.mask(), implementation="triton", return_lse=True)
    compare(DECODE, arrays, {"out": out, "lse": lse})


def _with_programs(function, programs, problem, block, _):
    return function(problem, block, programs)


@pytest.mark.parametrize("case", [GROUPED, DECODE], ids=["sequence", "decode"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
        lambda x: torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]],
    ],
    ids=["heads first", "every other element", "part of a longer sequence"],
)
def test_any_strides(case, layout):
    arrays = {name: layout(a) if a.ndim == 4 else a for name, a in tensors(case, torch.float32).items()}
    with torch.no_grad():
        query, key, value = (arrays[name] for name in ("query", "key", "value"))
        out = attend(query, key, value, case.mask(), implementation="triton")
    compare(case, arrays, {"out": out})
    if case is GROUPED:
        compare(case, arrays, run(case, arrays))


@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (128, 128)], ids=str)
def test_any_tile(tile):
    blocks = {name: plan.Tile(*tile, 4, 1) for name in ("forward", "backward_kv", "backward_q")}
    with plan.override(**blocks):
        compare(GROUPED, arrays := tensors(GROUPED, torch.float32), run(GROUPED, arrays))


def test_backward_of_a_part_of_the_keys():
    """From out and lse over all keys, as ring attention has them: the parts' gradients add up to the whole's."""
    arrays, mask = tensors(GROUPED, torch.float32), GROUPED.mask()
    query, key, value, d_out, d_lse = arrays.values()
    parts = []
    for first, past in ((0, 37), (37, 70)):
        part = Mask(np.clip(mask.start - first, 0, None), np.clip(mask.stop - first, 0, past - first)).on(query)
        parts.append((key[:, first:past], value[:, first:past], part))
    out, lse = merge([attend(query, *part, implementation="triton", return_lse=True) for part in parts])
    (dq_0, *d_0), (dq_1, *d_1) = (launcher.flash_backward(query, *part, 0.25, out, lse, d_out, d_lse) for part in parts)
    dk, dv = (torch.cat(pair, dim=1) for pair in zip(d_0, d_1))
    compare(GROUPED, arrays, {"out": out, "lse": lse, "dq": dq_0 + dq_1, "dk": dk, "dv": dv})


def test_opcheck():
    case = Case("short", 20, 20, lambda: Mask.documents(segments(9, 8, padding=3)), heads=2, kv_heads=1)
    arrays = tensors(case, torch.float32)
    query, key, value = (arrays[name].requires_grad_() for name in ("query", "key", "value"))
    mask = case.mask().on(query)
    tiles = [list(TILES[name]) for name in ("forward", "backward_kv", "backward_q")]
    schedules, numbers = launcher._schedules(mask, tiles, case.kv_len), [n for tile in tiles for n in tile]
    bounds = (mask.start, mask.stop)
    torch.library.opcheck(launcher._flash, (query, key, value, *bounds, *schedules, 0, 0.25, numbers))
    out, lse = attend(query, key, value, mask, implementation="triton", return_lse=True)
    plain = [x.detach() for x in (query, key, value, out, lse)]
    for d_lse in (None, arrays["d_lse"]):
        inputs = (arrays["d_out"], d_lse, *plain, *bounds, *schedules[1:], 0, 0.25, numbers)
        torch.library.opcheck(launcher._flash_backward, inputs)
    mask = Mask.lengths(torch.tensor([12]), 1)
    inputs = (plain[0][:, :1], *plain[1:3], mask.start.int(), mask.stop.int(), 0, 0.25, list(TILES["decode"]))
    torch.library.opcheck(launcher._decode, inputs)


def test_the_interpreters_bfloat16_is_refused():
    query = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    assert implementations(query, query, query)["triton"] == "Triton's interpreter computes bfloat16 wrongly"


def test_triton_comes_first():
    query = torch.zeros(1, 4, 2, 8)
    assert next(name for name, why in implementations(query, query, query).items() if why is None) == "triton"
