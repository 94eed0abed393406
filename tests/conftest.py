"""Every test runs with the shapes and dtypes of public signatures enforced (jaxtyping + beartype)."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jaxtyping
import pytest
from hypothesis import settings

jaxtyping.install_import_hook("heddle", "beartype.beartype")


@pytest.fixture
def unhooked():
    """Without the enforcement, as a user runs: for the errors that our own checks at the door raise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_given_back():
    """What XLA compiled stays mapped in memory, and a process may have so many mappings only."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


settings.register_profile("heddle", deadline=None, max_examples=50)  # shared machines are slow at times
settings.load_profile("heddle")
