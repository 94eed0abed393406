"""Every case on a CUDA device against the oracle. Not collected by name: test_cases.py runs it, a group at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_cases import CASES, IDS, LARGE, LARGE_IDS, Case, oracle
from heddle import attend, implementations

#: of the largest value of each array: rounding of the inputs' dtype, times the few roundings on the way.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def run(case: Case, arrays: dict[str, torch.Tensor], implementation: str) -> dict[str, torch.Tensor]:
    query, key, value = (arrays[name].detach().requires_grad_() for name in ("query", "key", "value"))
    out, lse = attend(query, key, value, case.mask(), scale=case.scale, implementation=implementation, return_lse=True)
    dq, dk, dv = torch.autograd.grad((out, lse), (query, key, value), (arrays["d_out"], arrays["d_lse"].float()))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=[*IDS, *LARGE_IDS])
@pytest.mark.parametrize("implementation", ["triton", "sdpa", "flex"])
def test_case(implementation, case, dtype):
    arrays = {name: torch.from_numpy(a).to("cuda", dtype) for name, a in case.arrays().items()}
    why = implementations(*(arrays[name] for name in ("query", "key", "value")), case.mask())[implementation]
    if why is not None:
        assert implementation == "flex", why
        pytest.skip(why)
    want = oracle(case, {name: a.double().cpu().numpy() for name, a in arrays.items()})
    got = run(case, arrays, implementation)
    if implementation == "triton":  # no atomics: bit by bit
        assert all(torch.equal(a, got[name]) for name, a in run(case, arrays, implementation).items())
    if implementation == "triton" and case.q_len * case.heads // case.kv_heads <= 16:
        with torch.no_grad():  # split over the keys
            query, key, value = (arrays[name] for name in ("query", "key", "value"))
            decoded = attend(query, key, value, case.mask(), scale=case.scale, implementation="triton", return_lse=True)
            got |= dict(zip(("out", "lse"), decoded))
    for name, array in got.items():
        have, expected = array.detach().double().cpu().numpy(), want[name]
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(have == -np.inf, ~finite, err_msg=name)
        bound = TOLERANCE[dtype] * max(1.0, np.abs(expected[finite]).max(initial=0.0))
        np.testing.assert_allclose(have[finite], expected[finite], rtol=0, atol=bound, err_msg=name)
