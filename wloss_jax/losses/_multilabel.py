"""Margin losses of several classes at once, and of one class against all others."""

from __future__ import annotations

import math
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_number,
    check_value,
)
from wloss_jax.losses._binary import elementwise_cross_entropy
from wloss_jax.losses._classes import classes_last, infinite_where_out
from wloss_jax.losses._labels import (
    check_class_weights,
    check_labels,
    nan_unless,
    nan_unless_class,
    of_classes,
    own_class_weights,
    score_of_label,
)
from wloss_jax.losses._masked import Reduction, event_last, guarded, public_loss
from wloss_jax.masks import make_safe
from wloss_jax.means import WeightedMean


@public_loss
def multi_margin_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    p: int = 1,
    margin: Option = 1.0,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the margin loss of one class against each of the others.

    ``sum_{v != y} max(0, margin - x_y + x_v)**p / V``

    A label out of range at a position that counts gives NaN.

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[...]``.
      p: the power, 1 or 2.
      margin: by how much the label's score should be higher, at least 0.
      class_weights: numbers ``[V]``: an element's weight is that of its own class,
        times ``weights``. (PyTorch divides the weighted sum by the count: that is
        ``m.total / count`` here.)
      class_mask: as in `softmax_cross_entropy`; V is the number of those that are in.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.multi_margin_loss(jnp.array([[0.0, 2.0]]), jnp.array([0]))
      WeightedMean(mean=1.5, weight=1.0)

    Source:
      Options as in ``torch.nn.MultiMarginLoss``.
    """
    check_value("p", p in (1, 2), f"must be 1 or 2; got {p!r}.")
    check_number("margin", margin, 0)
    (scores,) = classes_last(-1, class_mask, scores=scores)
    labels = check_labels(labels, scores.shape[:-1])
    if class_weights is not None:
        reduction["weights"] = own_class_weights(
            scores, labels, class_weights, reduction.get("weights")
        )
    return guarded(_multi_margin_loss, event_ndim=1, marks_nan=True)(
        scores, labels, p=p, margin=margin, **reduction
    )


def _multi_margin_loss(
    scores: jax.Array, labels: jax.Array, *, p: int, margin: Option
) -> jax.Array:
    classes = jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1)
    is_in = scores != -math.inf
    score = score_of_label(scores, labels)
    finite = make_safe(score, score != -math.inf)
    short = margin - finite[..., None] + make_safe(scores, is_in)
    counts = (classes != labels[..., None]) & is_in
    short = make_safe(jnp.maximum(short, 0), counts)
    size = jnp.maximum(is_in.sum(axis=-1), 1).astype(scores.dtype)
    loss = infinite_where_out((short**p).sum(axis=-1) / size, score)
    return loss * nan_unless_class(labels, scores.shape[-1])


@public_loss
def multilabel_margin_loss(
    scores: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the margin loss of several classes against each of the others.

    ``sum_{y in labels, v not in labels} max(0, 1 - x_y + x_v) / V``

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[..., V]``: the classes, then -1 for the rest. Another out of
        range before that, at a position that counts, gives NaN.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> scores, labels = jnp.array([[0.0, 0.5]]), jnp.array([[1, -1]])
      >>> wl.multilabel_margin_loss(scores, labels)
      WeightedMean(mean=0.25, weight=1.0)

    Source:
      As ``torch.nn.MultiLabelMarginLoss``.
    """
    (scores,) = event_last(-1, scores=scores)
    labels = check_labels(labels, scores.shape)
    return guarded(_multilabel_margin_loss, event_ndim=1, marks_nan=True)(
        scores, labels, **reduction
    )


def _multilabel_margin_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    size = scores.shape[-1]
    is_there = jnp.cumsum(labels == -1, axis=-1) == 0  # what comes before the first -1
    visible = nan_unless(((labels >= 0) & (labels < size)) | ~is_there)
    shape = (*labels.shape, size)
    classes = jax.lax.broadcasted_iota(labels.dtype, shape, labels.ndim)
    one_hot = (classes == labels[..., None]) & is_there[..., None]
    is_label = one_hot.any(axis=-2)
    own = jnp.take_along_axis(scores, labels, axis=-1, mode="clip")
    short = jnp.maximum(1 - own[..., :, None] + scores[..., None, :], 0)
    counts = is_there[..., :, None] & ~is_label[..., None, :]
    loss = make_safe(short, counts).sum(axis=(-2, -1)) / size
    return loss * visible.prod(axis=-1)


@public_loss
def multilabel_soft_margin_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the mean over the classes of their yes-or-no cross-entropies.

    ``-sum_v w_v (y_v log sigmoid(x_v) + (1 - y_v) log sigmoid(-x_v)) / V``

    Args:
      logits: floating ``[..., V]``; one set of classes is one element.
      labels: numeric, of the shape of ``logits``: 0 and 1, or probabilities.
      class_weights: numbers ``[V]``, which scale the terms and are in no denominator.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.multilabel_soft_margin_loss(jnp.zeros((1, 2)), jnp.ones((1, 2)))
      >>> print(f"{loss.compute():.4f}")
      0.6931

    Source:
      Options as in ``torch.nn.MultiLabelSoftMarginLoss``.
    """
    logits, labels = event_last(-1, logits=logits, labels=labels)
    scales = (
        None if class_weights is None else check_class_weights(class_weights, logits)
    )

    def elementwise(logits: jax.Array, labels: jax.Array) -> jax.Array:
        costs = elementwise_cross_entropy(logits, labels)
        if scales is not None:
            costs *= of_classes(scales, costs)
        return costs.mean(axis=-1)

    return guarded(elementwise, event_ndim=1, marks_nan=True)(
        logits, labels, **reduction
    )
