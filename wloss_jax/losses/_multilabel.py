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
    is_number,
)
from wloss_jax.losses._binary import elementwise_cross_entropy
from wloss_jax.losses._classes import (
    classes_last,
    finite_score,
    infinite_where_out,
)
from wloss_jax.losses._labels import (
    check_class_weights,
    check_labels,
    is_class_of,
    nan_unless,
    nan_unless_class,
    of_classes,
    own_class_weights,
    score_of_label,
)
from wloss_jax.losses._margins import hinge
from wloss_jax.losses._masked import Reduction, guarded, public_loss
from wloss_jax.masks import is_label, make_safe
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
      margin: by how much the label's score should be higher; below 0, how much lower
        it may be.
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
    check_value("p", is_number(p) and p in (1, 2), f"must be 1 or 2; got {p!r}.")
    check_number("margin", margin)
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
    short = margin - finite_score(score)[..., None] + make_safe(scores, is_in)
    counts = (classes != labels[..., None]) & is_in
    short = make_safe(hinge(short, slope_at_0=0), counts)
    loss = (short**p).sum(axis=-1) / _count(is_in, scores)
    loss = infinite_where_out(loss, score)
    return loss * nan_unless_class(labels, scores.shape[-1])


@public_loss
def multilabel_margin_loss(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the margin loss of several classes against each of the others.

    ``sum_{y in labels, v not in labels} max(0, 1 - x_y + x_v) / V``

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[..., V]``: the classes, and -1 after the last of them; what
        comes after that is not looked at. Another out of range, at a position that
        counts, gives NaN. A class that stands twice counts twice.
      class_mask: as in `softmax_cross_entropy`; V is the number of those that are in.
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
    (scores,) = classes_last(-1, class_mask, scores=scores)
    labels = check_labels(labels, scores.shape)
    return guarded(_multilabel_margin_loss, event_ndim=1, marks_nan=True)(
        scores, labels, **reduction
    )


def _multilabel_margin_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    shape = (*labels.shape, scores.shape[-1])  # a row for each label
    is_in = scores != -math.inf
    # What comes before the first -1, which unsigned labels have not.
    is_there = jnp.cumsum(is_label(labels, -1), axis=-1) == 0
    classes = jax.lax.broadcasted_iota(labels.dtype, shape, labels.ndim)
    is_own = (classes == labels[..., None]) & is_there[..., None]
    others = is_in & ~is_own.any(axis=-2)
    # All pairs of a label and a class, [V, V] for each element.
    each = jnp.broadcast_to(make_safe(scores, is_in)[..., None, :], shape)
    own = make_safe(each, is_own).sum(axis=-1)
    short = hinge(1 - own[..., None] + each, slope_at_0=0)
    counts = is_there[..., None] & others[..., None, :]
    loss = make_safe(short, counts).sum(axis=(-2, -1)) / _count(is_in, scores)
    is_out = (is_own & ~is_in[..., None, :]).any(axis=(-2, -1))
    is_class = is_class_of(labels, scores.shape[-1])
    # Of no labels the loss is 0, whatever the scores; but NaN stays visible.
    is_good = ((is_class | ~is_there) & (scores == scores)).all(axis=-1)
    return make_safe(loss, ~is_out, math.inf) * nan_unless(is_good, loss.dtype)


def _count(is_in: jax.Array, scores: jax.Array) -> jax.Array:
    """The number of classes that are in, to divide by."""
    return jnp.maximum(is_in.sum(axis=-1), 1).astype(scores.dtype)


@public_loss
def multilabel_soft_margin_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the mean over the classes of their yes-or-no cross-entropies.

    ``-sum_v w_v (y_v log sigmoid(x_v) + (1 - y_v) log sigmoid(-x_v)) / V``

    Args:
      logits: floating ``[..., V]``; one set of classes is one element.
      labels: numeric, of the shape of ``logits``: 0 and 1, or probabilities.
      class_weights: numbers ``[V]``, which scale the terms and are in no denominator.
      class_mask: as in `softmax_cross_entropy`; V is the number of those that are in.
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
    logits, labels = classes_last(-1, class_mask, logits=logits, labels=labels)
    scales = (
        None if class_weights is None else check_class_weights(class_weights, logits)
    )

    def elementwise(logits: jax.Array, labels: jax.Array) -> jax.Array:
        is_in = counts = logits != -math.inf
        is_good = (logits == logits) & (labels == labels)
        if scales is not None:  # a class whose weight is 0 has no term
            no_term = of_classes(scales, logits) == 0
            counts, is_good = is_in & ~no_term, is_good | no_term
        costs = elementwise_cross_entropy(make_safe(logits, counts), labels)
        if scales is not None:
            costs *= of_classes(scales, costs)
        loss = make_safe(costs, counts).sum(axis=-1) / _count(is_in, logits)
        is_out = ((labels != 0) & ~is_in).any(axis=-1)
        # A class that is out costs infinity, or nothing; but NaN stays visible.
        mark = nan_unless(is_good.all(axis=-1), loss.dtype)
        return make_safe(loss, ~is_out, math.inf) * mark

    return guarded(elementwise, event_ndim=1, marks_nan=True)(
        logits, labels, **reduction
    )
