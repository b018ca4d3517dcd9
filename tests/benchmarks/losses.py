"""Every public loss against the best jitted `jnp` expression of it by hand.

The expression knows nothing of NaN: the loss, times the mask or `where` it (whichever
is the faster), over the sum of the lengths. The gradient is that of the first array.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import logsumexp, xlogy

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case, copy_of

TITLE = "Every public loss, value and gradient"


class Loss(NamedTuple):
    """The elementwise loss by hand, and its arrays for ``[B, L]`` elements."""

    by_hand: Callable[..., jax.Array]
    arrays: Callable[[np.random.Generator, tuple[int, ...]], tuple[np.ndarray, ...]]
    shape: tuple[int, ...] = (1024, 4096)


def _normal(rng, shape):
    return rng.standard_normal(shape, np.float32)


def _two(rng, shape):
    return _normal(rng, shape), _normal(rng, shape)


def _counts(rng, shape):
    return _normal(rng, shape), rng.poisson(3, shape).astype(np.float32)


def _variances(rng, shape):
    return *_two(rng, shape), 0.5 + rng.random(shape, np.float32)


def _binary(rng, shape):
    return _normal(rng, shape), rng.integers(0, 2, shape).astype(np.float32)


def _binary_integers(rng, shape):
    return _normal(rng, shape), rng.integers(0, 2, shape, np.int32)


def _signs(rng, shape):
    return _normal(rng, shape), rng.choice(np.float32([-1, 1]), shape)


def _classes(rng, shape):
    return _normal(rng, shape), rng.integers(0, shape[-1], shape[:-1], np.int32)


def _distributions(rng, shape):
    labels = rng.random(shape, np.float32)
    return _normal(rng, shape), labels / labels.sum(-1, keepdims=True)


def _three(rng, shape):
    return *_two(rng, shape), _normal(rng, shape)


def _sequences(rng, shape):
    batch, frames, classes, labels = *shape, shape[1] // 4
    return (
        _normal(rng, shape)[None],
        np.zeros((1, batch, frames), np.float32),
        rng.integers(1, classes, (1, batch, labels), np.int32),
        np.zeros((1, batch, labels), np.float32),
    )


def _huber(x, y):
    e = jnp.abs(x - y)
    return jnp.where(e <= 1, 0.5 * e * e, e - 0.5)


def _log_cosh(x, y):
    e = jnp.abs(x - y)
    return e + jnp.log1p(jnp.exp(-2 * e)) - np.log(2)


def _bce(x, y):
    return jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _focal(x, y):
    p = jax.nn.sigmoid(x)
    return (y + p - 2 * y * p) ** 2 * _bce(x, y)


def _pinball(x, y):
    return jnp.maximum(0.5 * (y - x), -0.5 * (y - x))


def _cosine(x, y):
    norms = jnp.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return 1 - (x * y).sum(-1) / norms


def _softmax(x, y):
    return -(y * jax.nn.log_softmax(x)).sum(-1)


def _at(x, y):
    return jnp.take_along_axis(x, y[..., None], -1)[..., 0]


def _poly(x, y):
    log_p = jax.nn.log_softmax(x)
    return -(y * log_p).sum(-1) + 2 * (1 - (y * jnp.exp(log_p)).sum(-1))


def _hinge(x, y):
    others = jnp.arange(x.shape[-1]) != y[..., None]
    return (x + others).max(-1) - _at(x, y)


def _triplet(a, p, n):
    def distance(x):
        return jnp.sqrt(((a - x) ** 2).sum(-1) + 1e-6)

    return jnp.maximum(distance(p) - distance(n) + 1, 0)


def _kl(x, y):
    return (xlogy(y, y) - y * x).sum(-1)


def _safe_softmax(x, y):
    return -jnp.where(y == 0, 0, y * jax.nn.log_softmax(x)).sum(-1)


def _first_of_one(loss_fn):
    return lambda *arrays: loss_fn(*(array[0] for array in arrays))[None]


_TABLE = (64, 64, 1024)
_EMBEDDINGS = (128, 128, 256)

LOSSES = {
    "absolute_error": Loss(lambda x, y: jnp.abs(x - y), _two),
    "squared_error": Loss(lambda x, y: (x - y) ** 2, _two),
    "l2_loss": Loss(lambda x, y: 0.5 * (x - y) ** 2, _two),
    "huber_loss": Loss(_huber, _two),
    "log_cosh": Loss(_log_cosh, _two),
    "quantile_loss": Loss(_pinball, _two),
    "poisson_nll": Loss(lambda x, y: jnp.exp(x) - y * x, _counts),
    "gaussian_nll": Loss(
        lambda x, y, v: 0.5 * (jnp.log(v) + (x - y) ** 2 / v), _variances
    ),
    "sigmoid_binary_cross_entropy": Loss(_bce, _binary),
    "sigmoid_focal_loss": Loss(_focal, _binary),
    "hinge_loss": Loss(lambda x, y: jnp.maximum(0, 1 - x * y), _signs),
    "perceptron_loss": Loss(lambda x, y: jnp.maximum(0, -x * y), _signs),
    "sparsemax_loss": Loss(
        lambda x, y: jax.nn.sparse_plus(jnp.where(y, -x, x)), _binary_integers
    ),
    "cosine_distance": Loss(_cosine, _two, _EMBEDDINGS),
    "softmax_cross_entropy": Loss(_softmax, _distributions, _TABLE),
    "safe_softmax_cross_entropy": Loss(_safe_softmax, _distributions, _TABLE),
    "softmax_cross_entropy_with_integer_labels": Loss(
        lambda x, y: logsumexp(x, -1) - _at(x, y), _classes, _TABLE
    ),
    "softmax_z_loss": Loss(
        lambda x: logsumexp(x, -1) ** 2,
        lambda rng, shape: (_normal(rng, shape),),
        _TABLE,
    ),
    "poly_loss_cross_entropy": Loss(_poly, _distributions, _TABLE),
    "multiclass_hinge_loss": Loss(_hinge, _classes, _TABLE),
    "multiclass_perceptron_loss": Loss(
        lambda x, y: x.max(-1) - _at(x, y), _classes, _TABLE
    ),
    "multiclass_sparsemax_loss": Loss(
        jax.vmap(optax.losses.multiclass_sparsemax_loss), _classes, (32, 32, 256)
    ),
    "kl_divergence": Loss(_kl, _distributions, _TABLE),
    "kl_divergence_with_log_targets": Loss(
        lambda x, y: (jnp.exp(y) * (y - x)).sum(-1), _two, _TABLE
    ),
    "generalized_kl_divergence": Loss(
        lambda x, y: (xlogy(y, y) - y * x + jnp.exp(x) - y).sum(-1),
        _distributions,
        _TABLE,
    ),
    "triplet_margin_loss": Loss(_triplet, _three, _EMBEDDINGS),
    "ctc_loss": Loss(_first_of_one(optax.losses.ctc_loss), _sequences, (32, 64, 64)),
}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    return {name: functools.partial(_case, name, quick) for name in LOSSES}


def _case(name: str, quick: bool) -> Case:
    loss = LOSSES[name]
    rng = np.random.default_rng(0)
    shape = (4, 16, *([8] * (len(loss.shape) - 2))) if quick else loss.shape
    arrays = [jnp.asarray(array) for array in loss.arrays(rng, shape)]
    rows, size = arrays[0].shape[:2]
    lengths = jnp.asarray(rng.integers(size // 4, size + 1, rows, np.int32))

    def ours(first, others, lengths):
        return getattr(wl, name)(first, *others, lengths=lengths).compute()

    def where(first, others, lengths):
        mask = jnp.arange(size)[None] < lengths[:, None]
        return jnp.sum(loss.by_hand(first, *others), where=mask) / lengths.sum()

    def product(first, others, lengths):
        mask = jnp.arange(size)[None] < lengths[:, None]
        return jnp.sum(loss.by_hand(first, *others) * mask) / lengths.sum()

    def of(mean):
        step = jax.jit(jax.value_and_grad(mean))
        return lambda: step(arrays[0], arrays[1:], lengths)

    return Case(
        {OURS: of(ours), "by hand, `where`": of(where), "by hand, times": of(product)},
        "each array read, the gradient written, over copy bandwidth",
        copy_of(arrays[0]),
        (sum(array.nbytes for array in arrays) / arrays[0].nbytes + 1) / 2,
    )
