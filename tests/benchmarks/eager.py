"""What stands outside of a jit, in a training loop: means added up, and divided.

Beside each a jitted function of the same arrays that does as much: what one dispatch
costs. The arrays are small, so that little else is measured.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case

TITLE = "A thousand eager calls: so many microseconds each"
ROWS, SIZE = 64, 512


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    calls = 10 if quick else 1000
    return {name: functools.partial(_case, name, calls) for name in _pairs()}


def _case(name: str, calls: int) -> Case:
    ours, by_hand, arrays = _pairs()[name]
    jitted = jax.jit(by_hand)

    def repeat(function: Callable[..., Any]) -> Callable[[], Any]:
        def repeated():
            for _ in range(calls):
                result = function()
            return result

        return repeated

    return Case({OURS: repeat(ours), "one jit": repeat(lambda: jitted(*arrays))})


def _pairs() -> dict[str, tuple[Callable[[], Any], Callable[..., Any], tuple]]:
    """What is called, the same by hand, and the arrays of that."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((ROWS, SIZE), np.float32)) for _ in "xy")
    lengths = jnp.asarray(rng.integers(1, SIZE, ROWS, np.int32))
    per_sample = wl.per_sample(wl.absolute_error)
    samples = per_sample(x, y, lengths=lengths)
    m, n = samples.merge(), wl.WeightedMean(3.0, 2.0)
    running = wl.RunningMean.zeros().update(n)
    scheme = wl.size_power(0.5)

    def mean(total, weight):
        return jnp.where(weight == 0, 0, total / jnp.where(weight == 0, 1, weight))

    def sums(x, y, lengths):
        mask = jnp.arange(SIZE) < lengths[:, None]
        return jnp.where(mask, jnp.abs(x - y), 0).sum(1), mask.sum(1)

    def mean_of_all(x, y, lengths):
        total, weight = sums(x, y, lengths)
        return mean(total.sum(), weight.sum())

    def reweighted(total, weight):
        return mean((total / weight * weight**0.5).sum(), (weight**0.5).sum())

    def added(*pairs):
        half = len(pairs) // 2
        return [a + b for a, b in zip(pairs[:half], pairs[half:], strict=True)]

    def arrays_of(*trees):
        return tuple(jax.tree.leaves(trees))

    data = (x, y, lengths)
    return {
        "m + n": (lambda: m + n, added, arrays_of(m, n)),
        "m.merge()": (
            lambda: samples.merge(),
            lambda total, weight: (total.sum(), weight.sum()),
            arrays_of(samples),
        ),
        "m.compute()": (lambda: m.compute(), mean, arrays_of(m)),
        "m.reweight(scheme)": (
            lambda: samples.reweight(scheme),
            lambda total, weight: (total / weight * weight**0.5, weight**0.5),
            arrays_of(samples),
        ),
        "m.reweight(scheme).merge().compute()": (
            lambda: samples.reweight(scheme).merge().compute(),
            reweighted,
            arrays_of(samples),
        ),
        "absolute_error(...).compute()": (
            lambda: wl.absolute_error(x, y, lengths=lengths).compute(),
            mean_of_all,
            data,
        ),
        "per_sample(...)": (lambda: per_sample(x, y, lengths=lengths), sums, data),
        "per_sample(...).merge().compute()": (
            lambda: per_sample(x, y, lengths=lengths).merge().compute(),
            mean_of_all,
            data,
        ),
        "RunningMean.update": (
            lambda: running.update(m),
            lambda a, b, c, d, total, weight: (a + total, b, c + weight, d),
            arrays_of(running, m),
        ),
        "RunningMean.merge": (
            lambda: running.merge(running),
            added,
            arrays_of(running, running),
        ),
        "RunningMean.compute": (
            lambda: running.compute(),
            lambda a, b, c, d: mean(a + b, c + d),
            arrays_of(running),
        ),
    }
