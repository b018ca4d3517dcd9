"""Losses of yes-or-no labels."""

from __future__ import annotations

from typing import (
    Unpack,
)

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_array,
    check_number,
    check_type,
    check_value,
    describe,
    is_traced,
)
from wloss_jax.losses._labels import (
    nan_unless_class,
)
from wloss_jax.losses._masked import (
    Reduction,
    guarded,
    public_loss,
)
from wloss_jax.losses._regression import smooth_abs
from wloss_jax.means import WeightedMean


@public_loss
def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    pos_weight: Option | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the cross-entropy of yes-or-no labels.

    ``-c * y * log(sigmoid(x)) - (1 - y) * log(1 - sigmoid(x))``, where c
    is ``pos_weight``, or 1

    Args:
      logits: floating ``[...]``; several independent labels make several elements.
      labels: numeric, of the shape of ``logits``: 0 and 1, or probabilities.
      pos_weight: the factor of label 1: a number, one for each entry of the last axis
        or axes, or one for each logit. It scales the loss and is in no denominator, as
        in PyTorch.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> logits, labels = jnp.array([0.0, 3.0]), jnp.array([1, -1])
      >>> loss = wl.sigmoid_binary_cross_entropy(logits, labels, where=labels >= 0)
      >>> print(f"{loss.compute():.4f}")
      0.6931

    Source:
      `optax.losses.sigmoid_binary_cross_entropy`.
    """
    if pos_weight is None:
        return guarded(elementwise_cross_entropy)(logits, labels, **reduction)
    loss = guarded(_weighted_cross_entropy, marks_nan=True)
    if not is_traced(pos_weight):
        check_number("pos_weight", pos_weight, 0)
        return loss(logits, labels, pos_weight=pos_weight, **reduction)
    factors = check_array("pos_weight", pos_weight)
    shape = check_array("logits", logits).shape
    check_value(
        "pos_weight",
        factors.ndim <= len(shape)
        and factors.shape == shape[len(shape) - factors.ndim :],
        f"has shape {factors.shape}, and `logits` {shape}: pass a number, one for each "
        "entry of the last axis or axes, or one for each logit.",
    )
    if factors.shape == shape:  # as the others, it may hold anything where it is masked
        return loss(logits, labels, factors, **reduction)
    return loss(logits, labels, pos_weight=factors, **reduction)


def _weighted_cross_entropy(
    logits: jax.Array, labels: jax.Array, pos_weight: Option | None = None
) -> jax.Array:
    factor = jnp.asarray(pos_weight, logits.dtype)
    labels = labels.astype(logits.dtype)
    of_yes = elementwise_cross_entropy(logits, jnp.ones_like(logits))
    of_no = elementwise_cross_entropy(logits, jnp.zeros_like(logits))
    # Two terms, each by itself: a mix of both labels is a mix of their costs.
    factors = jnp.broadcast_to(factor, logits.shape)
    return factors * labels * of_yes + (1 - labels) * of_no


def elementwise_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of each yes-or-no label."""
    # max(x, 0) - x y + log(1 + exp(-|x|)), in which no exponential overflows. Made of
    # choices, as the slopes of `jnp.maximum` and `jnp.abs` at 0 do not add up to it.
    positive_part = jax.lax.select(logits >= 0, logits, jax.lax.full_like(logits, 0))
    log_normalizer = jnp.log1p(jnp.exp(-smooth_abs(logits)))
    return positive_part - logits * labels + log_normalizer


@public_loss
def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: Option | None = None,
    gamma: Option = 2.0,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the focal loss: cross-entropy that looks away from easy examples.

    ``(1 - p_t)**gamma * cross_entropy``, times ``alpha`` for label 1 and ``1 - alpha``
    for label 0 where ``alpha`` is given

    ``alpha`` scales the loss and is in no denominator; to average by class weight, use
    ``weights``.

    Args:
      logits: floating ``[...]``.
      labels: numeric, of the shape of ``logits``: 0 and 1, or probabilities.
      alpha: the factor of label 1, between 0 and 1, or None.
      gamma: how far to look away.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.sigmoid_focal_loss(jnp.zeros(2), jnp.array([1, 0]))
      >>> print(f"{loss.compute():.4f}")
      0.1733

    Source:
      `optax.losses.sigmoid_focal_loss`; Lin et al., Focal Loss for Dense Object
      Detection, 2017.
    """
    if alpha is not None:
        check_number("alpha", alpha, 0, 1)
    check_number("gamma", gamma, 0)
    return guarded(_sigmoid_focal_loss)(
        logits, labels, alpha=alpha, gamma=gamma, **reduction
    )


def _sigmoid_focal_loss(
    logits: jax.Array, labels: jax.Array, *, alpha: Option | None, gamma: Option
) -> jax.Array:
    labels = labels.astype(logits.dtype)
    # Both probabilities from one exponential, so that the small one keeps its digits.
    odds = jnp.exp(-smooth_abs(logits))
    likely = 1 / (1 + odds)
    unlikely = odds * likely
    positive = jax.lax.select(logits >= 0, likely, unlikely)
    negative = jax.lax.select(logits >= 0, unlikely, likely)
    missed = (1 - labels) * positive + labels * negative
    # A power below 1 has no derivative at 0, and one below 2 no second derivative.
    smallest = jax.lax.full_like(missed, jnp.finfo(missed.dtype).tiny)
    missed = jax.lax.select(missed > smallest, missed, smallest)
    loss = elementwise_cross_entropy(logits, labels) * missed**gamma
    if alpha is not None:
        loss *= alpha * labels + (1 - alpha) * (1 - labels)
    return loss


@public_loss
def hinge_loss(
    predictor_outputs: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the hinge loss of binary classification.

    ``max(0, 1 - x * y)``

    Args:
      predictor_outputs: floating ``[...]``, scores.
      targets: numeric, of the same shape: -1 and 1.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.hinge_loss(jnp.array([0.5, 2.0]), jnp.array([-1, 1]))
      WeightedMean(mean=0.75, weight=2.0)

    Source:
      `optax.losses.hinge_loss`.
    """
    return guarded(optax.losses.hinge_loss, marks_nan=True)(
        predictor_outputs, targets, **reduction
    )


@public_loss
def perceptron_loss(
    predictor_outputs: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the perceptron loss of binary classification.

    ``max(0, -x * y)``

    Args:
      predictor_outputs: floating ``[...]``, scores.
      targets: numeric, of the same shape: -1 and 1.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.perceptron_loss(jnp.array([0.5, 2.0]), jnp.array([-1, 1]))
      WeightedMean(mean=0.25, weight=2.0)

    Source:
      `optax.losses.perceptron_loss`.
    """
    return guarded(optax.losses.perceptron_loss, marks_nan=True)(
        predictor_outputs, targets, **reduction
    )


@public_loss
def sparsemax_loss(
    logits: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the binary sparsemax loss, which is 0 from a margin on.

    ``sparse_plus(-x)`` for label 1, ``sparse_plus(x)`` for label 0

    Args:
      logits: floating ``[...]``.
      labels: integer or bool, of the shape of ``logits``: 0 and 1. Another at a
        position that counts gives NaN.
      **reduction: the keywords of `weighted_mean`.

    Raises:
      AssertionError: floating ``labels``.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.sparsemax_loss(jnp.array([0.0, 2.0]), jnp.array([1, 1]))
      WeightedMean(mean=0.125, weight=2.0)

    Source:
      `optax.losses.sparsemax_loss`; Blondel et al., Learning with Fenchel-Young
      Losses, 2020.
    """
    labels = check_array("labels", labels)
    check_type(
        "labels",
        not jnp.issubdtype(labels.dtype, jnp.floating),
        f"must be integer or bool; got {describe(labels)}.",
    )
    return guarded(_sparsemax_loss)(logits, labels, **reduction)


def _sparsemax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    values: jax.Array = optax.losses.sparsemax_loss(logits, labels)
    return values * nan_unless_class(labels, 2)
