"""How long it takes to trace and lower each public loss and its gradient.

Beside it, the expression by hand of `losses`, masked by `jnp.where`. All of JAX's
caches are cleared before, as in a process that starts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl
from tests.benchmarks.losses import LOSSES
from tests.benchmarks.timing import OURS, Case

TITLE = "Tracing and lowering each public loss, with its gradient"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    return {
        f"{name}, {keyword}": functools.partial(_case, name, keyword)
        for name in LOSSES
        for keyword in ("where", "lengths")
    }


def _case(name: str, keyword: str) -> Case:
    loss = LOSSES[name]
    rng = np.random.default_rng(0)
    shape = (4, 16, *([8] * (len(loss.shape) - 2)))
    arrays = [jnp.asarray(array) for array in loss.arrays(rng, shape)]
    rows, size = arrays[0].shape[:2]
    lengths = rng.integers(size // 4, size + 1, rows, np.int32)
    counts = {"lengths": lengths, "where": np.arange(size) < lengths[:, None]}
    arguments = arrays[0], arrays[1:], jnp.asarray(counts[keyword])

    def ours(first, others, counted):
        return getattr(wl, name)(first, *others, **{keyword: counted}).compute()

    def by_hand(first, others, counted):
        is_mask = keyword == "where"
        mask = counted if is_mask else jnp.arange(size) < counted[:, None]
        values = loss.by_hand(first, *others)
        return jnp.where(mask, values, 0).sum() / mask.sum()

    def of(mean: Callable[..., jax.Array]) -> Callable[[], Any]:
        def lower():
            jax.clear_caches()

            # A function of its own each time: JAX knows none of it.
            def traced(*args):
                return mean(*args)

            jax.jit(jax.value_and_grad(traced)).lower(*arguments)

        return lower

    return Case({OURS: of(ours), "by hand": of(by_hand)})
