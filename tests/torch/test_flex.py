"""FlexAttention's blocks, from a mask's tiles. Its kernels give an lse on CUDA alone (tests/gpu runs them)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from attention_cases import CASES, IDS, Case, oracle, segments
from heddle import Mask, attend, implementations, merge
from heddle.torch import flex


def tensors(case: Case) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in case.arrays().items()}


def compare(case: Case, arrays: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    want = oracle(case, {name: a.numpy() for name, a in arrays.items()})
    for name, array in got.items():
        have, expected = array.detach().numpy(), want[name]
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(have == -np.inf, ~finite, err_msg=name)
        bound = 5e-6 * max(1.0, np.abs(expected[finite]).max(initial=0.0))
        np.testing.assert_allclose(have[finite], expected[finite], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_blocks(case, monkeypatch):
    """Every visible pair is in a block that is visited; blocks without the elementwise test hold no other pairs."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    mask = (case.mask() or Mask.full(case.q_len, case.kv_len)).on(torch.zeros(1))
    coverage = mask.coverage(16, 16, case.kv_len)
    blocks = flex.block_mask(mask, case.kv_len)
    visited, full = (np.zeros(coverage.shape, int) for _ in range(2))
    lists = (
        (blocks.kv_num_blocks, blocks.kv_indices, visited),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, full),
    )
    for counts, indices, table in lists:
        for row, tile in np.ndindex(coverage.shape[:2]):
            np.add.at(table[row, tile], indices[row, 0, tile, : counts[row, 0, tile]].numpy(), 1)
    assert (visited + full <= 1).all()  # none twice
    assert (coverage[full == 1] == 1).all()
    assert (coverage[visited + full == 0] == 0).all()


def dense(query, key, value, *, block_mask, scale, enable_gqa, return_aux):
    """What FlexAttention is to compute: all pairs, and of those the ones that mask_mod lets through."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert return_aux == AuxRequest(lse=True)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    sizes = (*query.shape[:2], query.shape[2], key.shape[2])
    index = [torch.arange(n).reshape([-1 if axis == at else 1 for at in range(4)]) for axis, n in enumerate(sizes)]
    seen = block_mask.mask_mod(*index).expand(sizes)
    weights = torch.where(seen, (scale * query @ key.mT).exp(), 0.0)
    total = weights.sum(-1)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log())
    return (weights / torch.where(empty, 1.0, total)[..., None]) @ value, AuxOutput(lse=lse)


@pytest.fixture(autouse=True)
def _dense(monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: dense)


CHOSEN = [case for case in CASES if min(case.dim, case.value_dim or case.dim) >= 16]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name.replace(" ", "-"))
def test_case(case):
    arrays = tensors(case)
    query, key, value = (arrays[name].requires_grad_() for name in ("query", "key", "value"))
    mask = (case.mask() or Mask.full(case.q_len, case.kv_len)).on(query)
    out, lse = flex.flex(query, key, value, mask, case.scale or case.dim**-0.5)
    grads = torch.autograd.grad((out, lse), (query, key, value), (arrays["d_out"], arrays["d_lse"]))
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads)))
    compare(case, {name: a.detach() for name, a in arrays.items()}, got)


def test_backward_of_a_part_of_the_keys():
    """From out and lse over all keys, as ring attention has them: the parts' gradients add up to the whole's."""
    case = Case("part", 50, 50, lambda: Mask.documents(segments(20, 22, padding=8)), heads=4, kv_heads=2)
    arrays, mask = tensors(case), case.mask()
    query, key, value, d_out, d_lse = arrays.values()
    parts = []
    for first, past in ((0, 27), (27, 50)):
        part = Mask(np.clip(mask.start - first, 0, None), np.clip(mask.stop - first, 0, past - first)).on(query)
        parts.append((key[:, first:past], value[:, first:past], part))
    out, lse = merge([attend(query, *part, implementation="reference", return_lse=True) for part in parts])
    (dq_0, *d_0), (dq_1, *d_1) = (flex.flex_backward(query, *p, 0.25, out, lse, d_out, d_lse) for p in parts)
    dk, dv = (torch.cat(pair, dim=1) for pair in zip(d_0, d_1))
    compare(case, arrays, {"dq": dq_0 + dq_1, "dk": dk, "dv": dv})


COMPILED = """
import numpy as np, torch
from torch.nn.attention.flex_attention import flex_attention
from attention_cases import segments
from heddle import Mask, attend
from heddle.torch import flex

compiled = torch.compile(flex_attention, dynamic=False)  # dynamic, upstream writes C++ that does not compile
for mask in (
    Mask.documents(segments(200, 90, 150, padding=60)),
    Mask.window(500, 60, prefix=140),
    Mask.documents(np.concatenate([segments(300, 200), segments(10, 490)])),
):
    query, key, value = torch.randn(3, mask.start.shape[0], 500, 2, 32)
    blocks = flex.block_mask(mask.on(query), 500)
    with torch.no_grad():
        out = compiled(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=blocks).transpose(1, 2)
    torch.testing.assert_close(out, attend(query, key, value, mask, implementation="reference"), rtol=0, atol=1e-5)
print("same")
"""


@pytest.mark.slow
def test_the_kernel_visits_these_blocks():
    """On CPU the compiled kernel gives an output but no lse: enough to see that it reads the lists as meant."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "same\n", done.stderr


def test_what_isnt_supported_is_said():
    query = torch.zeros(1, 4, 2, 16)
    why = "FlexAttention gives an lse and gradients on cuda alone, the arrays are on cpu"
    assert implementations(query, query, query)["flex"] == why
    with pytest.raises(NotImplementedError, match=why):
        attend(query, query, query, implementation="flex")
