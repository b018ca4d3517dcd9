"""Cross-entropies of one class among several, from logits."""

from __future__ import annotations

import functools
import math
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_array,
    check_number,
    is_zero,
)
from wloss_jax.losses._classes import (
    classes_last,
    constant_where_out,
    finite_score,
    finite_unless_due,
    infinite_where_out,
    log_normalizer,
    log_probabilities,
    mean_of_classes,
    share_of_classes,
)
from wloss_jax.losses._labels import (
    check_class_weights,
    check_labels,
    counted_labels,
    nan_unless_class,
    of_classes,
    own_class_weights,
    score_of_label,
)
from wloss_jax.losses._masked import (
    Axis,
    Reduction,
    guarded,
    public_loss,
)
from wloss_jax.masks import make_safe
from wloss_jax.means import WeightedMean

_INTEGER_LABELS = (
    " One class for each element is for `softmax_cross_entropy_with_integer_labels`."
)


@public_loss
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: Axis = -1,
    label_smoothing: Option = 0.0,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the cross-entropy of labels that are distributions over the classes.

    ``-sum_v c_v * ((1 - s) y_v + s / V) * log_softmax(x)_v`` with ``0 * log(0) = 0``,
    ``s = label_smoothing`` and c the ``class_weights``

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      labels: numeric, of the shape of ``logits``: one-hot, or probabilities.
      axis: the axis or axes of the classes; None for all.
      label_smoothing: the share of the labels that is spread evenly over all classes
        that are not out.
      class_weights: numbers ``[V]``, which scale the terms and are in no denominator,
        as in PyTorch for probabilities.
      class_mask: bool ``[V]``, or of the shape of ``logits``: False for a class that is
        out, as one whose logit is -infinity is. It gets no share of anything and no
        gradient; a label that is out costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> labels = jnp.array([[0.5, 0.5], [jnp.nan, jnp.nan]])
      >>> loss = wl.softmax_cross_entropy(jnp.zeros((2, 2)), labels, lengths=1)
      >>> print(f"{loss.compute():.4f}")
      0.6931

    Source:
      `optax.losses.softmax_cross_entropy`.
    """
    logits, labels = classes_last(
        axis, class_mask, _INTEGER_LABELS, logits=logits, labels=labels
    )
    check_number("label_smoothing", label_smoothing, 0, 1)
    if class_weights is not None:
        class_weights = check_class_weights(class_weights, logits)
    # No option: a constant, with no gradient that what is masked could spoil.
    loss = functools.partial(_softmax_cross_entropy, class_weights=class_weights)
    return guarded(loss, event_ndim=1, marks_nan=True)(
        logits, labels, label_smoothing=label_smoothing, **reduction
    )


def _softmax_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: Option = 0.0,
    class_weights: jax.Array | None = None,
) -> jax.Array:
    labels = constant_where_out(labels, logits)
    if not is_zero(label_smoothing):
        share = label_smoothing * share_of_classes(logits)
        smoothed = (1 - label_smoothing) * labels + share
        # A label that is out costs infinity, also where nothing is left of it.
        labels = jnp.where(logits != -math.inf, smoothed, labels)
    if class_weights is not None:
        scales = of_classes(class_weights, logits)
        # A class of weight 0 has no term, be its label NaN.
        labels = make_safe(labels * scales, scales != 0)
    return _expected_cost(log_probabilities(logits), labels)


def _expected_cost(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    """The expectation of ``-log_probs`` under the labels."""
    expected = (labels * finite_unless_due(log_probs, labels)).sum(axis=-1)
    return infinite_where_out(-expected, expected)


@public_loss
def safe_softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes `softmax_cross_entropy`, by the name that it has in optax where safe.

    ``-sum_v y_v * log_softmax(x)_v`` with ``0 * log(0) = 0``

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      labels: numeric, of the shape of ``logits``: one-hot, or probabilities.
      class_mask: as in `softmax_cross_entropy`.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> logits = jnp.array([[0.0, 0.0, -jnp.inf]])
      >>> labels = jnp.array([[0.5, 0.5, 0.0]])
      >>> print(f"{wl.safe_softmax_cross_entropy(logits, labels).compute():.4f}")
      0.6931

    Source:
      `optax.losses.safe_softmax_cross_entropy`.
    """
    logits, labels = classes_last(
        -1, class_mask, _INTEGER_LABELS, logits=logits, labels=labels
    )
    return guarded(_softmax_cross_entropy, event_ndim=1, marks_nan=True)(
        logits, labels, **reduction
    )


@public_loss
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    ignore_index: int | None = None,
    label_smoothing: Option = 0.0,
    z_loss: Option = 0.0,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the cross-entropy of integer class labels.

    ``lse - (1 - s) * x_y - s * mean_v(x_v) + z_loss * lse**2`` with
    ``lse = logsumexp_v(x)`` and ``s = label_smoothing``

    All options share one denominator: the sum of the weights of the elements that
    count. A label out of range at a position that counts gives NaN; it never wraps.

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      labels: integer ``[...]``.
      axis: the axis or axes of the classes in ``logits``.
      ignore_index: a label that marks an element as masked, -100 say; None for none.
      label_smoothing: the share of the label that is spread evenly over all classes
        that are not out.
      z_loss: the factor of ``lse**2``, which keeps logits from drifting.
      class_weights: numbers ``[V]``: an element's weight is that of its own class,
        times ``weights``. The whole element is weighted, its smoothing and z-loss too
        (PyTorch weighs smoothing by each class that it is spread over).
      class_mask: bool ``[V]``, or of the shape of ``logits``: False for a class that is
        out, as one whose logit is -infinity is. It gets no share of the smoothing and
        no gradient; a label that is out costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Raises:
      AssertionError: labels that are not integers of the shape of the elements (one-hot
        labels are for `softmax_cross_entropy`), ``class_weights`` that are not ``[V]``,
        a ``label_smoothing`` that is not between 0 and 1, or an ``ignore_index`` that
        is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> logits, labels = jnp.zeros((3, 4)), jnp.array([0, 3, -100])
      >>> loss = wl.softmax_cross_entropy_with_integer_labels(
      ...     logits, labels, ignore_index=-100
      ... )
      >>> print(f"{loss.compute():.4f} over {loss.weight} labels")
      1.3863 over 2.0 labels

    Source:
      `optax.losses.softmax_cross_entropy_with_integer_labels`; smoothing: Szegedy et
      al., Rethinking the Inception Architecture, 2016; z-loss: Chowdhery et al., PaLM,
      2022.
    """
    (logits,) = classes_last(axis, class_mask, logits=logits)
    might_be_elsewhere = logits.shape if axis == -1 else ()
    labels = check_labels(labels, logits.shape[:-1], might_be_elsewhere)
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_number("z_loss", z_loss, 0)
    if ignore_index is not None:
        reduction["where"] = counted_labels(
            labels, ignore_index, reduction.get("where")
        )
    if class_weights is not None:
        reduction["weights"] = own_class_weights(
            logits, labels, class_weights, reduction.get("weights")
        )
    return guarded(_integer_cross_entropy, event_ndim=1)(
        logits,
        labels,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        **reduction,
    )


def _integer_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: Option, z_loss: Option
) -> jax.Array:
    shift, log_total = log_normalizer(logits)
    lse = shift + log_total
    score = score_of_label(logits, labels)
    target = finite_score(score)
    if not is_zero(label_smoothing):
        target += label_smoothing * (mean_of_classes(logits) - target)
    loss = infinite_where_out(lse - target, score)
    # All of the loss, for the score of a label out of range may have no gradient.
    loss *= nan_unless_class(labels, logits.shape[-1])
    return loss if is_zero(z_loss) else loss + z_loss * _squared(lse)


@public_loss
def softmax_z_loss(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the z-loss, which keeps logits from drifting, as a term of its own.

    ``logsumexp_v(x)**2``

    The ``z_loss`` of `softmax_cross_entropy_with_integer_labels` adds it to the loss
    itself; this is for a figure of its own, or a weight of its own by ``coefficients``
    of `wloss_jax.value_and_grad`. Where all classes are out it is 0.

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      axis: the axis or axes of the classes; None for all.
      class_mask: as in `softmax_cross_entropy`.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.softmax_z_loss(jnp.zeros((2, 4)), where=jnp.array([True, False]))
      >>> print(f"{loss:.4f}")  # log(4)**2
      1.9218

    Source:
      Chowdhery et al., PaLM, 2022.
    """
    (logits,) = classes_last(axis, class_mask, logits=logits)
    return guarded(_softmax_z_loss, event_ndim=1, marks_nan=True)(logits, **reduction)


def _softmax_z_loss(logits: jax.Array) -> jax.Array:
    shift, log_total = log_normalizer(logits)
    return _squared(shift + log_total)


def _squared(log_normalizer: jax.Array) -> jax.Array:
    """The square, and 0 where all classes are out."""
    return make_safe(log_normalizer, log_normalizer != -math.inf) ** 2


@public_loss
def poly_loss_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: Option = 2.0,
    axis: Axis = -1,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the Poly-1 loss: cross-entropy and a share of the missed probability.

    ``cross_entropy + epsilon * (1 - sum_v y_v * softmax(x)_v)``

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      labels: floating, of the shape of ``logits``: one-hot, or probabilities.
      epsilon: the coefficient of the first polynomial term.
      axis: the axis or axes of the classes; None for all.
      class_mask: as in `softmax_cross_entropy`.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.poly_loss_cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))
      >>> print(f"{loss.compute():.4f}")
      1.6931

    Source:
      `optax.losses.poly_loss_cross_entropy`; Leng et al., PolyLoss, 2022.
    """
    check_number("epsilon", epsilon)
    logits, labels = classes_last(
        axis, class_mask, _INTEGER_LABELS, logits=logits, labels=labels
    )
    return guarded(_poly_loss_cross_entropy, event_ndim=1)(
        logits, check_array("labels", labels, float), epsilon=epsilon, **reduction
    )


def _poly_loss_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, epsilon: Option
) -> jax.Array:
    labels = constant_where_out(labels, logits)
    log_probs = log_probabilities(logits)
    # Of a class that is out the exponential is 0: it is missed whole, at no gradient.
    missed = (labels * (1 - jnp.exp(log_probs))).sum(axis=-1)
    return _expected_cost(log_probs, labels) + epsilon * missed
