"""Eight devices on a CPU, for the tests of sharding; said before JAX starts."""

import os

from hypothesis import settings

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Everyone's run draws its own examples, but CI the same ones each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
