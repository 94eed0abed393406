"""The kernels on a CUDA device. Each group in a process of its own: one that hangs takes no other along."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = Path(__file__).parent


def session(cases: str, chosen: str, **environment: str) -> subprocess.CompletedProcess:
    """A test session without conftest.py: Triton can't compile kernels that the shape checks wrap."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if folder := os.environ.get("HEDDLE_CASES"):  # make gpu-check counts them in its page
        framework = "JAX" if cases.startswith("jax") else "torch"
        name = f"{framework}, {chosen.replace('test_case and ', '').replace(' and ', ', ')}"
        command += ["--junit-xml", str(Path(folder).resolve() / f"{name}.xml")]
    return subprocess.run(
        [*command, "-W", "ignore", GPU / cases, "-k", chosen],
        env={**os.environ, "PYTHONPATH": str(GPU.parent), **environment},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("implementation", ["triton", "sdpa", "flex"])
def test_cases(implementation, dtype):
    done = session("gpu_cases.py", f"{implementation} and {dtype}")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


#: conftest.py has chosen the CPU; and JAX would take most of the memory, which the other sessions want.
ON_CUDA = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("implementation", ["triton", "cudnn", "xla"])
def test_jax_cases(implementation, dtype):
    done = session("jax_cases.py", f"test_case and {implementation} and {dtype}", **ON_CUDA)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_jax_transformations():
    done = session("jax_cases.py", "not test_case", **ON_CUDA)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
