"""Every test runs with the shapes and dtypes of public signatures enforced (jaxtyping + beartype)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from jaxtyping import install_import_hook

install_import_hook("heddle", "beartype.beartype")
