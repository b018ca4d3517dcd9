"""How the tests compile, on how many devices, and which of them run unasked."""

import importlib.metadata
import os
from pathlib import Path

from hypothesis import settings

# Most of the tests' time is compiling, of programs that run once or twice. So XLA does
# without its optimizations for speed, which takes half of the time; results differ by
# what they differ by from one version of JAX to the next, one or two roundings.
QUICK = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones lack it
    QUICK.append("--xla_cpu_use_fusion_emitters=false")

# Everyone's run draws its own examples, but CI the same ones each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--optimized",
        action="store_true",
        help="compile as users do; takes twice the time",
    )


def pytest_configure(config):
    """Says to XLA, before JAX starts: eight devices on a CPU, and how to compile.

    What stands in the environment comes later, and so prevails.
    """
    flags = [] if config.option.optimized else list(QUICK)
    flags += [os.environ.get("XLA_FLAGS", "")]
    flags += ["--xla_force_host_platform_device_count=8"]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def pytest_collection_modifyitems(config, items):
    """Leaves whole programs out, unless they are asked for.

    They are by ``-m program``, and by the name of their file or of a test in it.
    """
    if config.option.markexpr or not all(Path(name).is_dir() for name in config.args):
        return
    programs = [item for item in items if item.get_closest_marker("program")]
    config.hook.pytest_deselected(items=programs)
    items[:] = [item for item in items if item not in programs]
