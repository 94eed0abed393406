"""The kernels' machine code without a GPU: for sm_80 and sm_90 they compile, fit and spill no registers."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_compiled_ahead_of_time(dim):
    """A test session of its own, without conftest.py: Triton can't compile kernels that the shape checks wrap."""
    cases = Path(__file__).with_name("compiled_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, cases, "-k", f"{dim}-"], capture_output=True, text=True, timeout=900, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout
