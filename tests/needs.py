"""What some tests need of a machine, and are skipped without."""

import importlib.util

import jax
import pytest

# `conftest` makes eight devices of a CPU. Where JAX finds an accelerator there are as
# many as it has, too few for the meshes of these tests.
devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

# A compiler for TPUs, of 200 MB, which is no dependency: `.ci/run` installs it beside
# the newest JAX.
libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
