"""Eight devices on a CPU, for the tests of sharding; said before JAX starts."""

import os
from pathlib import Path

from hypothesis import settings

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Everyone's run draws its own examples, but CI the same ones each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(config, items):
    """Leaves whole programs out, unless they are asked for.

    They are by ``-m program``, and by the name of their file or of a test in it.
    """
    if config.option.markexpr or not all(Path(name).is_dir() for name in config.args):
        return
    programs = [item for item in items if item.get_closest_marker("program")]
    config.hook.pytest_deselected(items=programs)
    items[:] = [item for item in items if item not in programs]
