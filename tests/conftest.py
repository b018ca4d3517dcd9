"""How the tests compile, on how many devices, and which of them run unasked."""

import gc
import importlib.metadata
import os
from pathlib import Path

from hypothesis import settings

# Most of the tests' time is compiling, of programs that run once or twice. So XLA does
# without its optimizations for speed, which takes half of the time; results differ by
# what they differ by from one version of JAX to the next, one or two roundings. And it
# compiles a program in one piece: handing out parts of small ones takes a fifth longer.
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones lack it
    QUICK.append("--xla_cpu_use_fusion_emitters=false")

# JAX keeps what it traced and compiled, objects by the million, none of which goes in a
# run. Looking through them for garbage took a quarter of the time.
gc.set_threshold(100_000, 50, 1000)

# What runs only if it is asked for by its mark, or by the name of its file.
UNASKED = ("program", "exhaustive")

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
    """Leaves out what runs only if it is asked for."""
    if config.option.markexpr or not all(Path(name).is_dir() for name in config.args):
        return
    left_out = [item for item in items if any(map(item.get_closest_marker, UNASKED))]
    config.hook.pytest_deselected(items=left_out)
    kept = set(items) - set(left_out)
    items[:] = [item for item in items if item in kept]
