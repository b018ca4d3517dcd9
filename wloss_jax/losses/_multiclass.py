"""Margin losses of one class among several, from scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wloss_jax.losses._classes import (
    classes_last,
    finite_score,
    infinite_where_out,
)
from wloss_jax.losses._labels import (
    check_labels,
    nan_unless_class,
    score_of_label,
)
from wloss_jax.losses._masked import (
    Reduction,
    guarded,
    not_below_zero,
    public_loss,
)
from wloss_jax.masks import make_safe
from wloss_jax.means import WeightedMean


@public_loss
def multiclass_hinge_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the multiclass hinge loss.

    ``max_v(x_v + 1 - [v = y]) - x_y``

    A label out of range at a position that counts gives NaN.

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[...]``.
      class_mask: bool ``[V]``, or of the shape of ``scores``: False for a class that is
        out, as one whose score is -infinity is. It gets no gradient; a label that is
        out costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.multiclass_hinge_loss(jnp.array([[0.0, 2.0]]), jnp.array([0]))
      WeightedMean(mean=3.0, weight=1.0)

    Source:
      `optax.losses.multiclass_hinge_loss`.
    """
    return _with_labels(_multiclass_hinge_loss, scores, labels, class_mask, reduction)


def _multiclass_hinge_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    classes = jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1)
    margins = scores + (classes != labels[..., None])
    score = score_of_label(scores, labels)
    return infinite_where_out(margins.max(axis=-1) - finite_score(score), score)


@public_loss
def multiclass_perceptron_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the multiclass perceptron loss.

    ``max_v(x_v) - x_y``

    A label out of range at a position that counts gives NaN.

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[...]``.
      class_mask: bool ``[V]``, or of the shape of ``scores``: False for a class that is
        out, as one whose score is -infinity is. It gets no gradient; a label that is
        out costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.multiclass_perceptron_loss(jnp.array([[0.0, 2.0]]), jnp.array([0]))
      WeightedMean(mean=2.0, weight=1.0)

    Source:
      `optax.losses.multiclass_perceptron_loss`; Collins, Discriminative training
      methods for Hidden Markov Models, 2002.
    """
    return _with_labels(
        _multiclass_perceptron_loss, scores, labels, class_mask, reduction
    )


def _multiclass_perceptron_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    score = score_of_label(scores, labels)
    return infinite_where_out(scores.max(axis=-1) - finite_score(score), score)


@public_loss
def multiclass_sparsemax_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the multiclass sparsemax loss.

    ``max_p(<p, x> + (1 - |p|**2) / 2) - x_y`` over distributions ``p``

    A label out of range at a position that counts gives NaN.

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[...]``.
      class_mask: bool ``[V]``, or of the shape of ``scores``: False for a class that is
        out, as one whose score is -infinity is. It gets no gradient; a label that is
        out costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.multiclass_sparsemax_loss(jnp.array([[0.0, 2.0]]), jnp.array([0]))
      WeightedMean(mean=2.0, weight=1.0)

    Source:
      `optax.losses.multiclass_sparsemax_loss`; Martins and Astudillo, From Softmax to
      Sparsemax, 2016.
    """
    return _with_labels(_sparsemax, scores, labels, class_mask, reduction)


def _sparsemax(scores: jax.Array, labels: jax.Array) -> jax.Array:
    # A class that is behind the first by more than 1 has no probability: so, as if out.
    behind = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)) - 2
    behind = make_safe(behind, jnp.isfinite(behind))
    inside = jnp.where(scores == -math.inf, behind, scores)
    # In x64, optax's projection makes float64 of float32, and of its gradient an error:
    # hence all of it in the default dtype.
    rows = inside.reshape(-1, scores.shape[-1]).astype(float)
    values: jax.Array = optax.losses.multiclass_sparsemax_loss(rows, labels.ravel())
    values = values.reshape(labels.shape).astype(scores.dtype)
    values = not_below_zero(values)
    return infinite_where_out(values, score_of_label(scores, labels))


def _with_labels(
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array],
    scores: ArrayLike,
    labels: ArrayLike,
    class_mask: ArrayLike | None,
    reduction: Reduction,
) -> WeightedMean:
    (scores,) = classes_last(-1, class_mask, scores=scores)
    labels = check_labels(labels, scores.shape[:-1])

    # A factor, so that the gradient of all the element's scores is NaN too.
    def elementwise(scores: jax.Array, labels: jax.Array) -> jax.Array:
        return loss_fn(scores, labels) * nan_unless_class(labels, scores.shape[-1])

    return guarded(elementwise, event_ndim=1, marks_nan=True)(
        scores, labels, **reduction
    )
