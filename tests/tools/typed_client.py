"""A small program that uses the public names as a user would, for the type checker.

`assert_type` fails to check where a public function gives another type than it says, or
`Any`. Run as a program, it does what it says: ``python -m tests.tools.typed_client``.
"""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import wloss_jax as wl
from wloss_jax._multi_steps import MultiSteps, MultiStepsState
from wloss_jax.nnx import WeightedMeanMetric

Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array, jax.Array]


def make_batch() -> Batch:
    """Two samples, of three elements and of one."""
    samples = [np.array([1, 2, 3], np.float32), np.array([4], np.float32)]
    assert_type(wl.bucket_sizes([3, 1], 1, multiple_of=4), tuple[int, ...])
    padded, lengths = wl.pad_ragged(samples, buckets=(4,))
    assert_type(lengths, np.ndarray[tuple[Any, ...], np.dtype[np.int32]])
    x = jnp.asarray(padded)
    where = assert_type(wl.length_mask(lengths, x.shape[1]), jax.Array)
    targets = jnp.where(where, 2 * x, -1)
    assert_type(wl.observed_mask(targets, missing=-1), jax.Array)
    return x, targets, jnp.asarray(lengths)


def loss_fn(params: Params, batch: Batch) -> wl.WeightedMean:
    x, targets, lengths = batch
    both = (params["w"] * x, -params["w"] * x)
    prediction = assert_type(wl.select_head(both, 0), jax.Array)
    return assert_type(
        wl.huber_loss(prediction, targets, delta=2.0, lengths=lengths), wl.WeightedMean
    )


def terms_fn(params: Params, batch: Batch) -> tuple[dict[str, wl.WeightedMean], int]:
    return {"data": loss_fn(params, batch)}, 3


def losses(batch: Batch) -> None:
    x, targets, lengths = batch
    m = assert_type(wl.absolute_error(x, targets, lengths=lengths), wl.WeightedMean)
    assert_type(m + m, wl.WeightedMean)
    assert_type(m.compute(empty=1.0), jax.Array)
    assert_type(wl.weighted_mean(x, weights=x), wl.WeightedMean)
    assert_type(wl.WeightedMean.zeros((2,)).merge(axis=0), wl.WeightedMean)
    labels, logits = jnp.zeros(x.shape, int), jnp.zeros((*x.shape, 3))
    cross_entropy = wl.softmax_cross_entropy_with_integer_labels
    assert_type(
        cross_entropy(logits, labels, ignore_index=-1, class_weights=jnp.ones(3)),
        wl.WeightedMean,
    )

    relative_error = wl.masked(lambda x, y: jnp.abs(x - y) / y)
    assert_type(relative_error(x, targets, lengths=lengths), wl.WeightedMean)
    per_sample = wl.per_sample(wl.squared_error)(x, targets, lengths=lengths)
    assert_type(per_sample, wl.WeightedMean)
    for scheme in (wl.size_power(0.5), wl.loss_power(1.0)):
        assert_type(per_sample.reweight(scheme).merge(), wl.WeightedMean)
    assert_type(wl.mean_of_means_bias(per_sample), jax.Array)


def train(params: Params, batch: Batch) -> None:
    mean, grads = wl.value_and_grad(loss_fn, num_microbatches=2)(params, batch)
    assert_type(mean, wl.WeightedMean)
    (terms, aux), _ = wl.value_and_grad(terms_fn, has_aux=True)(params, batch)
    assert_type(terms, dict[str, wl.WeightedMean])
    assert_type(aux, int)

    optimizer = assert_type(wl.multi_steps(optax.sgd(0.1), every_k=2), MultiSteps)
    state = assert_type(optimizer.init(params), MultiStepsState)
    _, state = optimizer.update(grads, state, params, weight=mean.weight)
    assert_type(state, MultiStepsState)
    _, state = optimizer.flush(state, params)
    assert_type(state, MultiStepsState)

    running = assert_type(wl.RunningMean.zeros(), wl.RunningMean)
    running = assert_type(running.update(mean), wl.RunningMean)
    assert_type(running.merge(running).compute(), jax.Array)


class Model(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.ones(()))


def model_loss(model: Model, batch: Batch) -> wl.WeightedMean:
    return loss_fn({"w": model.w[...]}, batch)


def train_module(batch: Batch) -> None:
    mean, _ = wl.nnx.value_and_grad(model_loss)(Model(), batch)
    assert_type(mean, wl.WeightedMean)
    metric = assert_type(wl.nnx.WeightedMeanMetric("loss"), WeightedMeanMetric)
    metric.update(loss=mean)
    assert_type(metric.compute(), jax.Array)


def check_laws(params: Params, batch: Batch) -> None:
    wl.testing.assert_split_invariant(loss_fn, params, batch)
    wl.testing.assert_valid_batch(lengths=batch[2], size=4)


def main() -> None:
    params, batch = {"w": jnp.ones(())}, make_batch()
    losses(batch)
    train(params, batch)
    train_module(batch)
    check_laws(params, batch)


if __name__ == "__main__":
    main()
