"""A small model with two losses, its data, and its gradients by hand in float64.

Two heads on one hidden layer, for every position of a sample: a number, of which some
are not measured (NaN), and a class, of which others are not labelled (-1). So the terms
have different masks, and different weights. The oracle sees samples, never padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl

FEATURES, HIDDEN, CLASSES = 4, 8, 4
COEFFICIENTS = {"class": 0.3}

# Over 3,000 drawn batches float32 was off by at most 4e-7 and 1e-6.
LOSS_TOLERANCE = 2e-6  # relative
GRADIENT_TOLERANCE = 1e-5  # of the largest entry of the leaf


class Sample(NamedTuple):
    features: np.ndarray  # [L, FEATURES]
    number: np.ndarray  # [L], NaN where not measured
    label: np.ndarray  # [L], -1 where not labelled


def draw_samples(lengths, seed):
    """Longer samples have larger targets, so that no two kinds of mean agree.

    No target is within reach of the model: the error of one that is almost hit has
    few digits, whoever computes it.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        features = rng.normal(size=(length, FEATURES)).astype(np.float32)
        number = (2 * length + rng.uniform(6, 8, length)).astype(np.float32)
        number[rng.random(length) < 0.2] = np.nan
        label = rng.integers(0, CLASSES, length, dtype=np.int32)
        label[rng.random(length) < 0.4] = -1
        samples.append(Sample(features, number, label))
    return samples


def draw_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "hidden": {"kernel": (FEATURES, HIDDEN), "bias": (HIDDEN,)},
        "number": (HIDDEN,),
        "class": (HIDDEN, CLASSES),
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def pad(samples, size):
    """Pads to ``[B, size]``; padding holds what must not matter."""
    features, lengths = wl.pad_ragged([s.features for s in samples], size=size)
    number, _ = wl.pad_ragged([s.number for s in samples], size=size, value=1e30)
    label, _ = wl.pad_ragged([s.label for s in samples], size=size, value=99)
    return {"features": features, "number": number, "label": label, "lengths": lengths}


def loss_fn(params, batch):
    hidden = batch["features"] @ params["hidden"]["kernel"]
    bias = jnp.broadcast_to(params["hidden"]["bias"], hidden.shape)
    hidden = jnp.tanh(hidden + bias)
    return losses(hidden @ params["number"], hidden @ params["class"], batch)


def losses(number, logits, batch):
    return {
        "number": wl.squared_error(
            number,
            batch["number"],
            lengths=batch["lengths"],
            where=wl.observed_mask(batch["number"]),
        ),
        "class": wl.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"], lengths=batch["lengths"], ignore_index=-1
        ),
    }


def make_step(loss_fn=loss_fn, **options):
    return wl.value_and_grad(loss_fn, coefficients=COEFFICIENTS, **options)


def oracle(params, samples, coefficients=COEFFICIENTS):
    """Mean and weight by term, and the gradient of the weighted sum of the means."""
    coefficients = {"number": 1.0, "class": 1.0} | coefficients
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    positions = [
        (x.astype(np.float64), number, label)
        for sample in samples
        for x, number, label in zip(*sample, strict=True)
    ]
    weights = {
        "number": sum(not np.isnan(number) for _, number, _ in positions),
        "class": sum(label >= 0 for _, _, label in positions),
    }
    means = {"number": 0.0, "class": 0.0}
    grads = jax.tree.map(np.zeros_like, w)
    for x, number, label in positions:
        h = np.tanh(x @ w["hidden"]["kernel"] + w["hidden"]["bias"])
        d_h = np.zeros(HIDDEN)
        if not np.isnan(number):
            error = h @ w["number"] - float(number)
            means["number"] += error**2 / weights["number"]
            d_error = coefficients["number"] * 2 * error / weights["number"]
            grads["number"] += d_error * h
            d_h += d_error * w["number"]
        if label >= 0:
            logits = h @ w["class"]
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            means["class"] -= np.log(shares[label]) / weights["class"]
            d_logits = shares - np.eye(CLASSES)[label]
            d_logits *= coefficients["class"] / weights["class"]
            grads["class"] += np.outer(h, d_logits)
            d_h += w["class"] @ d_logits
        d_sum = d_h * (1 - h**2)
        grads["hidden"]["kernel"] += np.outer(x, d_sum)
        grads["hidden"]["bias"] += d_sum
    return {name: (means[name], weights[name]) for name in means}, grads


def assert_exact(result, expected):
    """Compares what `wl.value_and_grad` of `loss_fn` returned to the `oracle`."""
    (value, grads), (expected_value, expected_grads) = result, expected
    for name, mean in value.items():
        expected_mean, expected_weight = expected_value[name]
        assert float(mean.weight) == expected_weight
        np.testing.assert_allclose(mean.compute(), expected_mean, LOSS_TOLERANCE)
    assert_close_gradients(grads, expected_grads)


def assert_close_gradients(grads, expected, tolerance=GRADIENT_TOLERANCE):
    """Each leaf within ``tolerance`` of its largest entry; exactly 0 if that is."""

    def assert_close(path, grad, leaf):
        atol = tolerance * np.abs(leaf).max()
        np.testing.assert_allclose(grad, leaf, 0, atol, err_msg=str(path))

    jax.tree_util.tree_map_with_path(assert_close, grads, expected)
