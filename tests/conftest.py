"""Every test runs with the shapes and dtypes of public signatures enforced (jaxtyping + beartype)."""

import importlib.util
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test in JAX is compiling, for arrays so small that optimised code is no faster.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

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


@pytest.fixture(scope="session", autouse=True)
def _compiled_programs_are_kept(tmp_path_factory):
    """In files, of this process alone: JAX's cache writes them in place, so another process could read a part."""
    if importlib.util.find_spec("jax") is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_given_back():
    """What XLA compiled stays mapped in memory, and a process may have so many mappings only."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


settings.register_profile("heddle", deadline=None, max_examples=50)  # shared machines are slow at times
settings.load_profile("heddle")
