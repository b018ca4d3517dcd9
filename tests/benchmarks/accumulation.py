"""Gradient accumulation over microbatches of unequal weight."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case

TITLE = "Value and gradient of an MLP of 8 layers, 8 microbatches"
LAYERS = MICROBATCHES = 8


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    sizes = [(16, 4, 8)] if quick else [(64, 32, 512), (512, 16, 256)]
    return {
        f"{rows} rows of {size}, {width} wide": functools.partial(
            _case, rows, size, width
        )
        for rows, size, width in sizes
    }


def _case(rows: int, size: int, width: int) -> Case:
    rng = np.random.default_rng(0)
    params = [
        jnp.asarray(rng.standard_normal((width, width), np.float32) / width**0.5)
        for _ in range(LAYERS)
    ]
    batch = {
        "x": jnp.asarray(rng.standard_normal((rows, size, width), np.float32)),
        "y": jnp.asarray(rng.standard_normal((rows, size, width), np.float32)),
        "lengths": jnp.asarray(rng.integers(1, size + 1, rows, np.int32)),
    }

    def of(step):
        jitted = jax.jit(step)
        return lambda: jitted(params, batch)

    return Case(
        {
            OURS: of(_ours),
            "scan by hand": of(_scan),
            "full batch": of(_full_batch),
            "optax.MultiSteps, which averages averages": of(_multi_steps),
            "optax.microbatch, which averages averages": _microbatch(params, batch),
        },
        "the full batch",
        of(_full_batch),
    )


def _model(params, x):
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return x


def _ours(params, batch):
    step = wl.value_and_grad(_loss, num_microbatches=MICROBATCHES)
    mean, grads = step(params, batch)
    return mean.compute(), grads


def _loss(params, batch):
    prediction = _model(params, batch["x"])
    return wl.squared_error(prediction, batch["y"], lengths=batch["lengths"])


def _total_and_count(params, batch):
    errors = (_model(params, batch["x"]) - batch["y"]) ** 2
    mask = jnp.arange(errors.shape[1])[None] < batch["lengths"][:, None]
    total = jnp.sum(errors, where=mask[..., None])
    return total, batch["lengths"].sum() * errors.shape[2]


def _mean(params, batch):
    total, count = _total_and_count(params, batch)
    return total / count


_full_batch = jax.value_and_grad(_mean)


def _microbatches(batch):
    return jax.tree.map(lambda x: x.reshape(MICROBATCHES, -1, *x.shape[1:]), batch)


def _scan(params, batch):
    """Totals and counts added up, one division last: as exact as ours."""

    def add(carry, rows):
        (total, count), grads = jax.value_and_grad(_total_and_count, has_aux=True)(
            params, rows
        )
        return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    zeros = jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, params)
    (total, count, grads), _ = jax.lax.scan(add, zeros, _microbatches(batch))
    return total / count, jax.tree.map(lambda grad: grad / count, grads)


def _multi_steps(params, batch):
    optimizer = optax.MultiSteps(optax.sgd(1.0), MICROBATCHES)

    def add(state, rows):
        value, grads = jax.value_and_grad(_mean)(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return state, (value, updates)

    _, (values, updates) = jax.lax.scan(
        add, optimizer.init(params), _microbatches(batch)
    )
    return values.mean(), jax.tree.map(lambda update: -update[-1], updates)


def _microbatch(params, batch):
    step = jax.jit(
        optax.microbatching.microbatch(
            jax.value_and_grad(_mean),
            argnums=1,
            microbatch_size=len(batch["lengths"]) // MICROBATCHES,
            accumulator=optax.microbatching.AccumulationType.MEAN,
        )
    )
    return lambda: step(params, batch)
