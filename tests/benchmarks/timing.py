"""Timing side by side: all contestants in one process, turn by turn, on random data.

Only ratios mean something on a machine that does other work too, and only between calls
that were made one after the other: each round calls every contestant once, in an order
that turns by one from round to round, and a ratio is the median of the rounds' ratios.
"""

import ctypes
import dataclasses
import gc
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Function = Callable[[], Any]

OURS = "wloss_jax"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed side by side; `OURS` is one of the contestants.

    The ``limit`` is timed along with them: its time, times ``scale``, is what the
    hardware allows. A contestant that is a string is absent, and says why.
    """

    contestants: dict[str, Function | str]
    limit_name: str = ""
    limit: Function | None = None
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is counted, not timed: a number for each contestant."""

    counts: dict[str, float]
    limit_name: str = ""
    limit: float | None = None


def torch_and_device() -> tuple[Any, str] | str:
    """PyTorch and where it runs, which is where JAX does, or why it is absent."""
    try:
        import torch
    except ImportError:
        return "not installed"
    if jax.default_backend() != "gpu":
        return torch, "cpu"
    return (torch, "cuda") if torch.cuda.is_available() else "without CUDA"


def keep_memory(keep: bool = True) -> bool:
    """Makes glibc keep freed memory, or again not; says whether it could.

    By default it takes large arrays from the system and gives them back each time, so
    that a benchmark of large CPU arrays measures page faults, and swings by 2. Kept
    memory is in one arena for all threads (M_ARENA_MAX, -8), never from mmap
    (M_MMAP_MAX, -4), and never given back (M_TRIM_THRESHOLD, -1). From outside the same
    is MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    if keep:
        return all([mallopt(-8, 1), mallopt(-4, 0), mallopt(-1, 2**31 - 1)])
    return all([mallopt(-4, 65536), mallopt(-1, 128 * 1024)])


def race(
    contestants: dict[str, Function],
    *,
    rounds: int,
    clock: str = "wall",
    shortest: float = 0.0,
    seconds: float = 60.0,
    on_round: Callable[[], Any] = lambda: None,
) -> dict[str, np.ndarray]:
    """Times each contestant once a round: seconds ``[rounds]``, NaN where it rested.

    A contestant that has used up its share of ``seconds`` rests, after three rounds.
    Calls that take less than ``shortest`` seconds are queued, 20 at most: on an
    accelerator one alone takes longer to launch than to run. A contestant that has no
    place in memory is left out.
    """
    now = CLOCKS[clock]
    calls = {}
    for name, contestant in contestants.items():  # compiles, and warms the caches
        try:
            jax.block_until_ready(contestant())
        except RuntimeError as error:  # both JAX's and PyTorch's is one
            if "memory" not in str(error).lower():
                raise
            continue
        start = now()
        jax.block_until_ready(contestant())
        once = now() - start
        calls[name] = max(1, min(20, math.ceil(shortest / once)))
    names = list(calls)
    times = {name: np.full(rounds, np.nan) for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            used = calls[name] * np.nansum(times[name])
            if i >= 3 and used > seconds / len(names):
                continue
            start = now()
            for _ in range(calls[name]):
                result = contestants[name]()
            jax.block_until_ready(result)
            times[name][i] = (now() - start) / calls[name]
        on_round()
    return times


def ratio(times: np.ndarray, base: np.ndarray) -> float:
    """The median over the rounds of how many times ``base`` it took."""
    return float(np.nanmedian(times / base))


def release() -> None:
    """Gives back what the contestants of a case held, PyTorch's on a GPU above all."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_of(array: jax.Array) -> Function:
    """One read and one write of ``array``: what bandwidth is measured with."""
    step = jax.jit(lambda x: x + 1)
    return lambda: step(array)
