"""What other packages make of a ragged batch: the (R) rows of a guide's table.

    python -m tests.tools.peers

Squared errors of 1, 1, 1, 1 in one sample and 25 in the other, their mean 5.8, by each
package that is installed: with numbers in the padding, with NaN there, and in two
halves, merged as the package merges.
"""

import functools
import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np

PREDICTIONS = jnp.array([[1.0, 1.0, 1.0, 1.0], [5.0, 9.0, 9.0, 9.0]], jnp.float32)
TARGETS = jnp.zeros_like(PREDICTIONS)
WHERE = jnp.arange(4)[None] < jnp.array([[4], [1]])
HALVES = [tuple(x[i : i + 1] for x in (PREDICTIONS, TARGETS, WHERE)) for i in (0, 1)]


def wloss_jax(wl):
    def loss(predictions, targets, where):
        return wl.squared_error(predictions, targets, where=where)

    halves = sum(loss(*half) for half in HALVES).compute()
    return lambda *batch: loss(*batch).compute(), halves


def average_of(loss):
    """The mean of the halves' means, as a training loop or `MultiSteps` takes it."""
    return loss, np.mean([loss(*half) for half in HALVES])


def optax(optax):
    def loss(predictions, targets, where):
        return optax.losses.squared_error(predictions, targets).mean(where=where)

    return average_of(loss)


def rax(rax):
    return average_of(lambda p, t, where: rax.pointwise_mse_loss(p, t, where=where))


def clu(metrics):
    def metric(predictions, targets, where):
        values = (predictions - targets) ** 2
        return metrics.Average.from_model_output(values=values, mask=where)

    halves = functools.reduce(lambda a, b: a.merge(b), [metric(*h) for h in HALVES])
    return lambda *batch: metric(*batch).compute(), halves.compute()


def flax(nnx):
    def mean(*batches):
        metric = nnx.metrics.Average()
        for predictions, targets, where in batches:
            metric.update(values=(predictions - targets) ** 2, mask=where)
        return metric.compute()

    return lambda *batch: mean(batch), mean(*HALVES)


def metrax(metrax):
    def metric(predictions, targets, where):
        values = ((predictions - targets) ** 2).ravel()
        weights = where.astype(jnp.float32).ravel()
        return metrax.Average.from_model_output(values, sample_weights=weights)

    halves = functools.reduce(lambda a, b: a.merge(b), [metric(*h) for h in HALVES])
    return lambda *batch: metric(*batch).compute(), halves.compute()


def keras(keras, **options):
    def loss(predictions, targets, where):
        squared = keras.losses.MeanSquaredError(**options)
        weights = where.astype(jnp.float32)
        return squared(targets[..., None], predictions[..., None], weights)

    return average_of(loss)


PEERS = {
    "wloss_jax": ("wloss_jax", wloss_jax),
    "optax": ("optax", optax),
    "rax": ("rax", rax),
    "clu": ("clu.metrics", clu),
    "flax": ("flax.nnx", flax),
    "metrax": ("metrax", metrax),
    "keras": ("keras", keras),
    "keras, mean_with_sample_weight": (
        "keras",
        functools.partial(keras, reduction="mean_with_sample_weight"),
    ),
}


def main():
    """Prints a line a package."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    print(f"{'':32}{'mean':>8}{'halves':>8}   with NaN in the padding")
    for name, (module, make) in PEERS.items():
        try:
            loss, halves = make(importlib.import_module(module))
        except ImportError as error:
            print(f"{name:32}not installed: {error.name}")
            continue
        mean = loss(PREDICTIONS, TARGETS, WHERE)
        holes = jnp.where(WHERE, 0, jnp.nan)

        def with_holes(predictions, loss=loss, holes=holes):
            return loss(predictions, TARGETS + holes, WHERE)

        value, gradient = jax.value_and_grad(with_holes)(PREDICTIONS)
        is_finite = "finite" if jnp.isfinite(gradient).all() else "NaN"
        print(f"{name:32}{mean:8.3f}{halves:8.3f}   {value:.3f}, gradient {is_finite}")


if __name__ == "__main__":
    main()
