"""Long segments, for `tests.tools.fuzz`: of any number, order and dtype of ids.

What is too long for the oracle's loops is checked against `np.bincount` in float64, or
in whole numbers where those are exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl

SIZES = (2**12, 2**18 + 3, 2**20)
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")


@functools.cache
def _step(num_segments, is_weighted):
    def loss(values, weights, ids):
        keywords = {"weights": weights} if is_weighted else {}
        m = wl.weighted_mean(
            values, segment_ids=ids, num_segments=num_segments, **keywords
        )
        return m.merge().compute(), m

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def mistakes(rng):
    """Draws a long row, and says in words what is off."""
    size, dtype = rng.choice(SIZES), np.dtype(rng.choice(DTYPES))
    is_weighted = bool(rng.random() < 0.5)
    high = min(np.iinfo(dtype).max, size)
    num_segments = int(rng.choice([1, 2, min(high, 100), high]) + (high < 2**16))
    ids = _ids(rng, num_segments, size, dtype)
    kind = rng.choice(["constant", "uniform", "whole"])
    values, weights = (_numbers(rng, kind, size) for _ in range(2))
    if not is_weighted:
        weights = np.ones_like(weights)
    (value, m), gradient = _step(num_segments, is_weighted)(
        jnp.asarray(values), jnp.asarray(weights), jnp.asarray(ids)
    )

    belongs = ids.astype(np.int64) < num_segments
    if dtype.kind == "i":
        belongs &= ids >= 0
    add_up = functools.partial(
        np.bincount, np.where(belongs, ids, 0).astype(int), minlength=num_segments
    )
    own = np.where(belongs, weights.astype(np.float64), 0)
    total, weight = add_up(own * values), add_up(own)
    whole = weight.sum() or 1.0
    # Of whole numbers up to 3, products and sums up to 2**24 are exact. The gradient is
    # of a few roundings.
    rtol = 0.0 if kind == "whole" else 1e-6
    expected = {
        "total": (m.total, total, rtol),
        "weight": (m.weight, weight, rtol if is_weighted else 0.0),
        "value": (value, total.sum() / whole, 2e-6),
        "gradient": (gradient, own / whole, 2e-6),
    }
    drawn = f"{size} {kind} numbers, {num_segments} segments, ids {dtype}"
    return [
        f"{name} is off by {np.abs(np.asarray(got, np.float64) - want).max()}: {drawn}"
        for name, (got, want, rtol) in expected.items()
        if not np.allclose(got, want, rtol=rtol, atol=0)
    ]


def _ids(rng, num_segments, size, dtype):
    info = np.iinfo(dtype)
    order = rng.choice(["sorted", "random", "one", "ends"])
    ids = rng.integers(0, num_segments, size)
    if order == "sorted":
        ids = np.sort(ids)
    elif order == "one":
        ids[:] = num_segments - 1
    elif order == "ends":
        ids = rng.choice([0, num_segments - 1, info.min, info.max], size)
    return ids.astype(dtype)


def _numbers(rng, kind, size):
    if kind == "whole":
        return rng.integers(0, 4, size).astype(np.float32)
    constant = np.full(size, rng.random(), np.float32)
    return constant if kind == "constant" else rng.random(size, np.float32)
