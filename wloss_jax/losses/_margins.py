"""Losses with a margin, and signs for targets: of distances, of pairs, of angles."""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import Option, check_array, check_number, check_shape
from wloss_jax.losses._labels import nan_unless
from wloss_jax.losses._masked import (
    Reduction,
    event_last,
    guarded,
    not_below_zero,
    public_loss,
)
from wloss_jax.losses._regression import smooth_abs
from wloss_jax.masks import make_safe
from wloss_jax.means import WeightedMean


def hinge(short: jax.Array, slope_at_0: int = 1) -> jax.Array:
    """The part of ``short`` that is above 0, and NaN where it is NaN.

    At 0 its slope is 1 where PyTorch clamps, and 0 where PyTorch looks at each class.
    (That of `jnp.maximum` is a half.)
    """
    return make_safe(short, ~(short < 0 if slope_at_0 else short <= 0))


@public_loss
def hinge_embedding_loss(
    distances: ArrayLike,
    targets: ArrayLike,
    *,
    margin: Option = 1.0,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the hinge embedding loss: like pairs near, others a margin apart.

    ``d`` for target 1, ``max(0, margin - d)`` for target -1

    Args:
      distances: floating ``[...]``, of one pair each.
      targets: numeric, of the same shape: 1 and -1. Another at a position that counts
        gives NaN.
      margin: how far apart.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.hinge_embedding_loss(jnp.array([0.5, 0.25]), jnp.array([1, -1]))
      WeightedMean(mean=0.625, weight=2.0)

    Source:
      Options as in ``torch.nn.HingeEmbeddingLoss``.
    """
    check_number("margin", margin)
    return guarded(_hinge_embedding_loss, marks_nan=True)(
        distances, targets, margin=margin, **reduction
    )


def _hinge_embedding_loss(
    distances: jax.Array, targets: jax.Array, *, margin: Option
) -> jax.Array:
    return _by_sign(targets, distances, hinge(margin - distances))


def _by_sign(targets: jax.Array, like: jax.Array, unlike: jax.Array) -> jax.Array:
    """The one for target 1, the other for target -1, NaN for any other target."""
    is_sign = nan_unless(jnp.abs(targets) == 1, like.dtype)
    return jnp.where(targets == 1, like, unlike) * is_sign


@public_loss
def margin_ranking_loss(
    first: ArrayLike,
    second: ArrayLike,
    targets: ArrayLike,
    *,
    margin: Option = 0.0,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the ranking loss of pairs: which of two scores should be higher.

    ``max(0, -y * (first - second) + margin)``

    Args:
      first: floating ``[...]``, the score of the first of a pair.
      second: floating, of the same shape.
      targets: numeric, of the same shape: 1 where the first should be higher, else -1.
      margin: by how much; below 0, how much lower it may be.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> first, second = jnp.array([2.0, 1.0]), jnp.array([1.0, 3.0])
      >>> wl.margin_ranking_loss(first, second, jnp.array([1, 1]))
      WeightedMean(mean=1.0, weight=2.0)

    Source:
      Options as in ``torch.nn.MarginRankingLoss``.
    """
    check_number("margin", margin)
    return guarded(_margin_ranking_loss, marks_nan=True)(
        first, second, targets, margin=margin, **reduction
    )


def _margin_ranking_loss(
    first: jax.Array, second: jax.Array, targets: jax.Array, *, margin: Option
) -> jax.Array:
    return hinge(margin - targets * (first - second))


@public_loss
def soft_margin_loss(
    logits: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the logistic loss of binary classification.

    ``log(1 + exp(-y * x))``

    Args:
      logits: floating ``[...]``.
      targets: numeric, of the same shape: 1 and -1.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.soft_margin_loss(jnp.zeros(2), jnp.array([1, -1]))
      >>> print(f"{loss.compute():.4f}")
      0.6931

    Source:
      As ``torch.nn.SoftMarginLoss``.
    """
    return guarded(_soft_margin_loss)(logits, targets, **reduction)


def _soft_margin_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    short = -(targets * logits)  # unsigned targets have no negatives of their own
    log_normalizer = jnp.log1p(jnp.exp(-smooth_abs(short)))
    return make_safe(short, short >= 0) + log_normalizer


@public_loss
def cosine_embedding_loss(
    first: ArrayLike,
    second: ArrayLike,
    targets: ArrayLike,
    *,
    margin: Option = 0.0,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the cosine embedding loss: like pairs at one angle, others apart.

    ``1 - cos(first, second)`` for target 1, ``max(0, cos - margin)`` for target -1

    Args:
      first: floating ``[..., D]``; one pair of vectors is one element.
      second: floating, of the same shape.
      targets: numeric ``[...]``: 1 and -1. Another at a position that counts gives NaN.
      margin: the cosine that others may have, from -1 to 1.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> first, second = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]])
      >>> wl.cosine_embedding_loss(first, second, jnp.array([1]))
      WeightedMean(mean=1.0, weight=1.0)

    Source:
      Options as in ``torch.nn.CosineEmbeddingLoss``.
    """
    check_number("margin", margin, -1, 1)
    first, second = event_last(-1, first=first, second=second)
    targets = check_array("targets", targets)
    check_shape(
        "targets",
        targets,
        first.shape[:-1],
        f"has shape {targets.shape} and `first` {first.shape}: one number for each "
        f"pair of vectors is expected, {first.shape[:-1]}.",
    )
    return guarded(_cosine_embedding_loss, event_ndim=1, marks_nan=True)(
        first, second, targets, margin=margin, **reduction
    )


def _cosine_embedding_loss(
    first: jax.Array, second: jax.Array, targets: jax.Array, *, margin: Option
) -> jax.Array:
    def norm(x: jax.Array) -> jax.Array:
        # PyTorch's, which keeps the gradient of a vector of zeros finite.
        return jnp.sqrt((x**2).sum(axis=-1) + 1e-12)

    cosine = (first * second).sum(axis=-1) / (norm(first) * norm(second))
    return _by_sign(targets, not_below_zero(1 - cosine), hinge(cosine - margin))
