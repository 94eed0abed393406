"""The kernels on a CUDA device. Each group in a process of its own: one that hangs takes no other along."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = Path(__file__).parent


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("implementation", ["triton", "sdpa", "flex"])
def test_cases(implementation, dtype):
    """Without conftest.py: Triton can't compile kernels that the shape checks wrap."""
    environment = {**os.environ, "PYTHONPATH": str(GPU.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-W", "ignore", GPU / "gpu_cases.py", "-k", f"{implementation} and {dtype}"],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
