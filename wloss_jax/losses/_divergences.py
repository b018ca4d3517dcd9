"""Divergences between distributions."""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._sums import sum_over
from wloss_jax.losses._classes import (
    classes_last,
    constant_where_out,
    finite_unless_due,
    infinite_where_out,
)
from wloss_jax.losses._masked import (
    Axis,
    Reduction,
    guarded,
    not_below_zero,
    public_loss,
)
from wloss_jax.masks import differs, make_safe
from wloss_jax.means import WeightedMean


@public_loss
def kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = -1,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the Kullback-Leibler divergence of a prediction from a target.

    ``sum_v t_v * (log(t_v) - log_p_v)`` with ``0 * log(0) = 0``

    Args:
      log_predictions: floating ``[..., D]``, logarithms of probabilities; one
        distribution is one element.
      targets: floating, of the same shape: probabilities.
      axis: the axis or axes of a distribution; None for all.
      class_mask: bool ``[D]``, or of the shape of the first array: False for a class
        that is out, as one whose logarithm is -infinity is. It gets no gradient; a
        target above 0 there costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> log_predictions = jnp.log(jnp.array([[0.5, 0.5]]))
      >>> loss = wl.kl_divergence(log_predictions, jnp.array([[1.0, 0.0]]))
      >>> print(f"{loss.compute():.4f}")
      0.6931

    Source:
      `optax.losses.kl_divergence`.
    """
    return guarded(_kl_divergence, event_ndim=1, marks_nan=True)(
        *classes_last(
            axis, class_mask, log_predictions=log_predictions, targets=targets
        ),
        **reduction,
    )


def _kl_divergence(log_predictions: jax.Array, targets: jax.Array) -> jax.Array:
    targets = constant_where_out(targets, log_predictions)
    # The logarithm of 1 instead of that of 0, which has no derivative: it adds nothing.
    log_targets = jnp.log(make_safe(targets, differs(targets, 0), 1))
    distances = log_targets - finite_unless_due(log_predictions, targets)
    return _cost(targets * distances)


def _cost(terms: jax.Array) -> jax.Array:
    """The sum of the terms of each distribution, infinity where one of them is."""
    cost = sum_over(terms, [terms.ndim - 1])
    return infinite_where_out(not_below_zero(cost), jax.lax.neg(cost))


@public_loss
def kl_divergence_with_log_targets(
    log_predictions: ArrayLike,
    log_targets: ArrayLike,
    *,
    axis: Axis = -1,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes `kl_divergence` for targets that are logarithms too.

    ``sum_v exp(log_t_v) * (log_t_v - log_p_v)``

    Args:
      log_predictions: floating ``[..., D]``, logarithms of probabilities; one
        distribution is one element.
      log_targets: floating, of the same shape: logarithms of probabilities.
      axis: the axis or axes of a distribution; None for all.
      class_mask: bool ``[D]``, or of the shape of the first array: False for a class
        that is out, as one whose logarithm is -infinity is. It gets no gradient; a
        target above 0 there costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> log_half = jnp.log(jnp.array([[0.5, 0.5]]))
      >>> wl.kl_divergence_with_log_targets(log_half, log_half)
      WeightedMean(mean=0.0, weight=1.0)

    Source:
      `optax.losses.kl_divergence_with_log_targets`.
    """
    return guarded(_kl_divergence_with_log_targets, event_ndim=1, marks_nan=True)(
        *classes_last(
            axis, class_mask, log_predictions=log_predictions, log_targets=log_targets
        ),
        **reduction,
    )


def _kl_divergence_with_log_targets(
    log_predictions: jax.Array, log_targets: jax.Array
) -> jax.Array:
    log_targets = constant_where_out(log_targets, log_predictions)
    targets = jnp.exp(log_targets)
    # Of a target of 0, no logarithm counts.
    distances = make_safe(log_targets - log_predictions, differs(targets, 0))
    return _cost(targets * distances)


@public_loss
def generalized_kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = -1,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the divergence of measures that need not sum to 1.

    ``sum_v t_v * (log(t_v) - log_p_v) + exp(log_p_v) - t_v``

    Args:
      log_predictions: floating ``[..., D]``, logarithms; one measure is one element.
      targets: floating, of the same shape.
      axis: the axis or axes of a measure; None for all.
      class_mask: bool ``[D]``, or of the shape of the first array: False for a class
        that is out, as one whose logarithm is -infinity is. It gets no gradient; a
        target above 0 there costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.generalized_kl_divergence(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))
      WeightedMean(mean=1.0, weight=1.0)

    Source:
      `optax.losses.generalized_kl_divergence`.
    """
    return guarded(_generalized_kl_divergence, event_ndim=1)(
        *classes_last(
            axis, class_mask, log_predictions=log_predictions, targets=targets
        ),
        **reduction,
    )


def _generalized_kl_divergence(
    log_predictions: jax.Array, targets: jax.Array
) -> jax.Array:
    targets = constant_where_out(targets, log_predictions)
    masses = jnp.exp(log_predictions) - targets
    divergence = _kl_divergence(log_predictions, targets)
    return not_below_zero(divergence + sum_over(masses, [masses.ndim - 1]))
