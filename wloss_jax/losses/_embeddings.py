"""Losses of vectors, by the angles and distances between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_flag,
    check_function,
    check_number,
    is_traced,
)
from wloss_jax.losses._masked import (
    Axis,
    Reduction,
    event_last,
    guarded,
    not_below_zero,
    public_loss,
    spell_out,
)
from wloss_jax.means import WeightedMean


@public_loss
def cosine_distance(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    epsilon: Option = 0.0,
    axis: Axis = -1,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes one minus the cosine of the angle between two vectors.

    ``1 - sum_i p_i t_i / (|p| |t|)``

    Args:
      predictions: floating ``[..., D]``; one vector is one element.
      targets: floating, of the shape of ``predictions``.
      epsilon: floor under the squared norms, for vectors of zeros, which are NaN at 0.
      axis: the axis or axes of a vector; None for all.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> predictions = jnp.array([[1.0, 0.0], [jnp.nan, 0.0]])
      >>> targets = jnp.array([[0.0, 2.0], [1.0, 1.0]])
      >>> wl.cosine_distance(predictions, targets, where=jnp.array([True, False]))
      WeightedMean(mean=1.0, weight=1.0)

    Source:
      `optax.losses.cosine_distance`.
    """
    check_number("epsilon", epsilon, 0)
    return guarded(_cosine_distance, event_ndim=1)(
        *event_last(axis, predictions=predictions, targets=targets),
        epsilon=epsilon,
        **reduction,
    )


def _cosine_distance(
    predictions: jax.Array, targets: jax.Array, *, epsilon: Option
) -> jax.Array:
    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.maximum((x**2).sum(axis=-1), epsilon))

    # Two numbers are divided, not two vectors: a third of the time of optax's form.
    product = (predictions * targets).sum(axis=-1)
    return not_below_zero(1 - product / (norm(predictions) * norm(targets)))


@public_loss
def triplet_margin_loss(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    axis: int = -1,
    norm_degree: Option = 2,
    margin: Option = 1.0,
    eps: Option = 1e-6,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the triplet loss: positives nearer to the anchor than negatives.

    ``max(d(anchor, positive) - d(anchor, negative) + margin, 0)`` with
    ``d(a, b) = (sum_i |a_i - b_i|**n + eps)**(1/n)``

    Args:
      anchors: floating ``[..., D]``; one triplet is one element.
      positives: floating, of the same shape.
      negatives: floating, of the same shape.
      axis: the axis of an embedding.
      norm_degree: n, at least 1.
      margin: by how much nearer, at least 0.
      eps: keeps the gradient of a distance of 0 finite.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> anchor, positive = jnp.zeros((1, 2)), jnp.zeros((1, 2))
      >>> loss = wl.triplet_margin_loss(anchor, positive, jnp.array([[0.0, 0.4]]))
      >>> print(f"{loss.compute():.2f}")
      0.60

    Source:
      `optax.losses.triplet_margin_loss`; Balntas et al., Learning shallow
      convolutional feature descriptors with triplet losses, 2016.
    """
    check_number("norm_degree", norm_degree, 1)
    check_number("margin", margin, 0)
    check_number("eps", eps, 0)
    arrays = event_last(axis, anchors=anchors, positives=positives, negatives=negatives)
    return guarded(_triplet_margin_loss, event_ndim=1, marks_nan=True)(
        *arrays, norm_degree=norm_degree, margin=margin, eps=eps, **reduction
    )


def _triplet_margin_loss(
    anchors: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    *,
    norm_degree: Option,
    margin: Option,
    eps: Option,
) -> jax.Array:
    near = _distance(anchors - positives, norm_degree, eps)
    far = _distance(anchors - negatives, norm_degree, eps)
    return jnp.maximum(near - far + margin, 0)


def _distance(errors: jax.Array, norm_degree: Option, eps: Option) -> jax.Array:
    """The length of vectors: ``(sum_i |e_i|**n + eps)**(1/n)``."""
    if is_traced(norm_degree) or norm_degree % 2:
        # Of components that are 0 the derivative is 0, where that of `jnp.abs` is 1.
        errors = errors * jax.lax.stop_gradient(jnp.sign(errors))
    return ((errors**norm_degree).sum(axis=-1) + eps) ** (1 / norm_degree)


@spell_out
def triplet_margin_with_distance_loss(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    distance_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    margin: Option = 1.0,
    swap: bool = False,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the triplet loss with a distance of your own.

    ``max(d(anchor, positive) - d(anchor, negative) + margin, 0)``

    Args:
      anchors: floating ``[..., D]``; one triplet is one element.
      positives: floating, of the same shape.
      negatives: floating, of the same shape.
      distance_fn: two arrays ``[..., D]`` to distances ``[...]``. By default it is the
        Euclidean one, of PyTorch: ``|a - b + 1e-6|``.
      margin: by how much nearer, at least 0.
      swap: whether the negative's distance is that from the anchor or the positive,
        whichever is nearer.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> anchor, positive = jnp.zeros((1, 2)), jnp.zeros((1, 2))
      >>> loss = wl.triplet_margin_with_distance_loss(
      ...     anchor, positive, jnp.array([[0.0, 0.4]]),
      ...     distance_fn=lambda a, b: jnp.abs(a - b).sum(-1),
      ... )
      >>> print(f"{loss.compute():.2f}")
      0.60

    Source:
      Options as in ``torch.nn.TripletMarginWithDistanceLoss``.
    """
    check_number("margin", margin, 0)
    check_flag("swap", swap)
    distance = _euclidean if distance_fn is None else distance_fn
    check_function("distance_fn", distance)

    def elementwise(
        anchors: jax.Array, positives: jax.Array, negatives: jax.Array
    ) -> jax.Array:
        far = distance(anchors, negatives)
        if swap:
            far = jnp.minimum(far, distance(positives, negatives))
        return jnp.maximum(distance(anchors, positives) - far + margin, 0)

    # The distance may close over arrays: so masked triplets must be in its domain.
    return guarded(elementwise, event_ndim=1, fills_masked=True, marks_nan=True)(
        *event_last(-1, anchors=anchors, positives=positives, negatives=negatives),
        **reduction,
    )


def _euclidean(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sqrt(((a - b + 1e-6) ** 2).sum(axis=-1))
