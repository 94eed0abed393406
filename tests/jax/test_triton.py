"""JAX's ``triton`` without a GPU: its launches lowered for CUDA, and their numbers by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from heddle import attend, implementations

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
ENVIRONMENT |= {"PYTHONPATH": str(Path(__file__).parent.parent)}


def session(cases: str, **environment: str) -> subprocess.CompletedProcess:
    """A test session of its own, without conftest.py: Triton can't read kernels that the shape checks wrap."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        [*command, Path(__file__).with_name(cases)],
        env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_lowered_for_cuda():
    done = session("lowered_cases.py")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_interpreted():
    devices = "--xla_force_host_platform_device_count=2"
    done = session("interpreted_launch_cases.py", TRITON_INTERPRET="1", XLA_FLAGS=devices)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_on_a_cpu_it_is_refused():
    query = jnp.zeros((1, 4, 2, 8))
    assert implementations(query, query, query)["triton"] == "its kernels run on CUDA, the arrays are on cpu"
    with pytest.raises(NotImplementedError, match="its kernels run on CUDA"):
        attend(query, query, query, implementation="triton")
