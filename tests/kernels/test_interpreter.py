"""The kernels' numbers without a GPU: every case under Triton's interpreter, which has to be chosen before import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["test_case and float32", "test_case and float16", "not test_case"])
def test_interpreted(chosen):
    """A test session of its own, without conftest.py: the interpreter can't run kernels that the shape checks wrap."""
    cases = Path(__file__).with_name("interpreted_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, cases, "-k", chosen], env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


COMPILED = """
import numpy as np, torch, heddle, heddle.torch
segments = torch.tensor(np.repeat([4, 0, -1], [18, 13, 5])[None], dtype=torch.int32)

def layers(q, k, v, segments):
    mask = heddle.Mask.documents(segments)
    for _ in range(2):
        q, lse = heddle.attend(q, k, v, mask, implementation="triton", return_lse=True)
    return q, torch.where(torch.isfinite(lse), lse, 0.0)

def both(function, n):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    out, lse = function(q, k, v, segments[:, :n])
    (out.square().sum() + lse.sin().sum()).backward()
    return out, lse, q.grad, k.grad, v.grad

compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
for n in (36, 20):
    for have, want in zip(both(compiled, n), both(layers, n)):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-5)

def decode(q, k, v, lengths):
    return heddle.attend(q, k, v, heddle.Mask.lengths(lengths, 1), implementation="triton")

one, keys = torch.randn(2, 1, 4, 16), torch.randn(2, 50, 2, 16)
lengths = torch.tensor([50, 3])
have = torch.compile(decode, fullgraph=True, backend="aot_eager")(one, keys, keys, lengths)
torch.testing.assert_close(have, decode(one, keys, keys, lengths), rtol=0, atol=1e-6)
print("same")
"""


@pytest.mark.slow
def test_compiled_whole():
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "same\n", done.stderr
