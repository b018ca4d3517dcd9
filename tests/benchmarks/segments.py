"""Means by segment beside `jax.ops.segment_sum`, which loses digits as segments grow.

Time of the value, and of value and gradient; and the temporary memory of either, in
bytes an element.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case, Counted, copy_of

TITLE = "Absolute error by segment, one long row"
BY_HAND = "jax.ops.segment_sum"


def cases(quick: bool) -> dict[str, Callable[[], Case | Counted]]:
    size = 2**10 if quick else 2**20
    made: dict[str, Callable[[], Case | Counted]] = {}
    for count in (2, 64) if quick else (2, 64, 4096):
        for order in ("sorted", "shuffled"):
            for what in ("value", "gradient"):
                arguments = size, count, order, what
                name = f"{count} segments, {order}, {what}"
                made[name] = functools.partial(_time, *arguments)
                made[f"{name}, memory"] = functools.partial(_memory, *arguments)
    return made


def _programs(size, count, order, what):
    rng = np.random.default_rng(0)
    x, y = rng.random((2, size), np.float32)
    ids = rng.permutation(np.arange(size, dtype=np.int32) % count)
    ids = np.sort(ids) if order == "sorted" else ids

    def ours(x, y, ids):
        m = wl.absolute_error(x, y, segment_ids=ids, num_segments=count)
        return m.compute().mean()

    def by_hand(x, y, ids):
        total = jax.ops.segment_sum(jnp.abs(x - y), ids, count)
        weight = jax.ops.segment_sum(jnp.ones_like(ids), ids, count)
        return (total / weight).mean()

    arrays = jnp.asarray(x), jnp.asarray(y), jnp.asarray(ids)
    return arrays, {
        name: jax.jit(jax.value_and_grad(mean) if what == "gradient" else mean)
        for name, mean in {OURS: ours, BY_HAND: by_hand}.items()
    }


def _time(size, count, order, what) -> Case:
    arrays, programs = _programs(size, count, order, what)
    return Case(
        {name: functools.partial(step, *arrays) for name, step in programs.items()},
        "copy of the values",
        copy_of(arrays[0]),
    )


def _memory(size, count, order, what) -> Counted:
    arrays, programs = _programs(size, count, order, what)

    def temporary(step) -> float:
        compiled = step.lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes / size

    return Counted(
        {name: temporary(step) for name, step in programs.items()}, "the values", 4.0
    )
