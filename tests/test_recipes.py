"""The recipes of in_your_loop.md against the functions of the codebases they are from.

Those are restated here, as they were read on the day that the guide says, and run in
float64; the lines of the guide call them by their names.
"""

from types import FunctionType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wloss_jax as wl
from tests.test_readme import README
from tests.tools import record_torch

GUIDE = README.parent / "examples" / "in_your_loop.md"
ARRAYS, ROWS = record_torch.pairs(GUIDE, "From other codebases")
# float32 against float64: a few roundings of 6e-8, relative to the largest entry.
TOLERANCE = 2e-6


def compute_weighted_cross_entropy(logits, targets, weights, label_smoothing):
    """Of flax's lm1b, wmt and gemma: a sum, and the sum of the weights."""
    loss, _, weight_sum = compute_weighted_cross_entropy_with_z_loss(
        logits, targets, weights, label_smoothing, 0.0, 1.0
    )
    return loss, weight_sum


def compute_weighted_accuracy(logits, targets, weights):
    hits = jnp.equal(jnp.argmax(logits, axis=-1), targets)
    return (hits * weights).sum(), weights.sum()


def compute_weighted_cross_entropy_with_z_loss(
    logits, targets, weights, label_smoothing, z_loss, loss_normalizing_factor
):
    """Of t5x: `compute_weighted_cross_entropy`."""
    size = logits.shape[-1]
    confidence = 1 - label_smoothing
    low_confidence = label_smoothing / (size - 1)
    constant = -(
        confidence * jnp.log(confidence)
        + (size - 1) * low_confidence * jnp.log(low_confidence + 1e-20)
    )
    is_own = jax.nn.one_hot(targets, size) == 1
    soft_targets = jnp.where(is_own, confidence, low_confidence)
    loss, total_z_loss = cross_entropy_with_logits(logits, soft_targets, z_loss)
    loss = ((loss - constant) * weights).sum() / loss_normalizing_factor
    return loss, (total_z_loss * weights).sum() / loss_normalizing_factor, weights.sum()


def cross_entropy_with_logits(logits, targets, z_loss):
    """Of t5x and MaxText: the loss with its z-loss in it, and that alone."""
    log_z = jax.scipy.special.logsumexp(logits, axis=-1)
    loss = -(targets * (logits - log_z[..., None])).sum(-1)
    return loss + z_loss * log_z**2, z_loss * log_z**2


def average_per_sequence(logits, targets, segment_ids):
    """Of t5x: AVERAGE_PER_SEQUENCE, whose weights are 1 / the segment's length."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    weights = (segment_ids != 0) / same.sum(-1)
    each, _ = cross_entropy_with_logits(logits, jax.nn.one_hot(targets, 5), 0.0)
    return (each * weights).sum() / weights.sum()


def next_token_loss(features, kernel, tokens, weights, logsumexp_weight):
    """Of levanter: by rolling, with the last position masked; the mean is haliax's."""
    weights = weights * (np.arange(tokens.shape[1]) < tokens.shape[1] - 1)
    targets = jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), kernel.shape[1])
    loss, _ = cross_entropy_with_logits(features @ kernel, targets, logsumexp_weight)
    return (loss * weights).sum() / weights.sum()


def aggregate_loss(loss, mask, mode, norm=None):
    """Of tunix: its five means of the losses of tokens."""
    sums, sizes = (loss * mask).sum(-1), mask.sum(-1)
    rows = (sizes > 0).sum()
    match mode:
        case "token-mean":
            return sums.sum() / sizes.sum()
        case "sequence-mean-token-mean":
            return (sums / jnp.maximum(sizes, 1)).sum() / rows
        case "sequence-mean-token-scale":
            return sums.sum() / norm / rows
        case "seq-mean-token-sum":
            return sums.sum() / rows
    return sums.sum() / norm


KNOWN = [compute_weighted_cross_entropy, compute_weighted_accuracy]
KNOWN += [compute_weighted_cross_entropy_with_z_loss, cross_entropy_with_logits]
KNOWN += [average_per_sequence, next_token_loss, aggregate_loss]
MOVING = ("features", "kernel", "old")


def results(sources, arrays):
    """For each row the values that are compared, and their sum's gradient."""

    def values(inputs):
        names = {function.__name__: function for function in KNOWN}
        names |= {"jax": jax, "jnp": jnp, "np": np, "wl": wl} | arrays | inputs
        names["logits"] = names["features"] @ names["kernel"]
        rows = []
        for row, source in zip(ROWS, sources, strict=True):
            exec(source, names)
            rows.append({name: names[name] for name in row.names()})
        return [sum(jnp.sum(x) for x in row.values()) for row in rows], rows

    inputs = {name: jnp.asarray(arrays[name]) for name in MOVING}
    slopes, rows = jax.jit(jax.jacrev(values, has_aux=True))(inputs)
    return [
        row | {f"gradient of {name}": of_row[name] for name in MOVING}
        for row, of_row in zip(rows, slopes, strict=True)
    ]


@pytest.fixture(scope="module")
def compared():
    """What the originals and the lines of the guide compute, row by row."""
    names = {}
    exec(ARRAYS, names)
    kinds = np.ndarray | float | int | FunctionType
    arrays = {name: x for name, x in names.items() if isinstance(x, kinds)}
    with jax.enable_x64(True):
        exact = {
            name: np.float64(x) if np.asarray(x).dtype == np.float32 else x
            for name, x in arrays.items()
        }
        expected = jax.device_get(results([row.torch for row in ROWS], exact))
    return expected, results([row.jax for row in ROWS], arrays)


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_a_recipe_is_what_the_original_computes(compared, i):
    expected, got = (rows[i] for rows in compared)
    assert got.keys() == expected.keys()
    assert len(expected) > len(MOVING)
    for name, value in expected.items():
        assert name.startswith("gradient") or np.asarray(value).any(), name
        scale = np.abs(value).max(initial=0.0)
        np.testing.assert_allclose(
            got[name], value, atol=TOLERANCE * scale, rtol=0, err_msg=name
        )
