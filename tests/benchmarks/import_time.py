"""The time that `import wloss_jax` takes, in a new process."""

import functools
import subprocess
import sys
from collections.abc import Callable

from tests.benchmarks.timing import OURS, Case

TITLE = "Import time, a new process each"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    def run(names: str):
        return functools.partial(
            subprocess.run, [sys.executable, "-c", f"import {names}"], check=True
        )

    needed = "jax, optax, chex"
    case = Case({OURS: run("wloss_jax"), needed: run(needed)}, needed, run(needed))
    return {"import": lambda: case}
