"""Losses of vectors, by the angles and distances between them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_array,
    check_flag,
    check_function,
    check_number,
    check_shape,
    is_traced,
)
from wloss_jax._keywords import keywords_checked
from wloss_jax.losses._margins import hinge
from wloss_jax.losses._masked import (
    Axis,
    Reduction,
    event_last,
    guarded,
    not_below_zero,
    public_loss,
    spell_out,
)
from wloss_jax.masks import make_safe
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
      epsilon: floor under the squared norms; without one a vector of zeros gives NaN.
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
    # A floor of 0, the default, is no floor: a vector of zeros is NaN, and is seen.
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
    swap: bool = False,
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
      swap: whether the negative's distance is that from the anchor or the positive,
        whichever is nearer.
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
    check_flag("swap", swap)
    arrays = event_last(axis, anchors=anchors, positives=positives, negatives=negatives)
    return guarded(_triplet_margin_loss, event_ndim=1, marks_nan=True)(
        *arrays,
        norm_degree=norm_degree,
        margin=margin,
        eps=eps,
        swap=swap,
        **reduction,
    )


def _triplet_margin_loss(
    anchors: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    *,
    norm_degree: Option,
    margin: Option,
    eps: Option,
    swap: bool,
) -> jax.Array:
    near = _distance(anchors - positives, norm_degree, eps)
    far = _distance(anchors - negatives, norm_degree, eps)
    if swap:
        far = jnp.minimum(far, _distance(positives - negatives, norm_degree, eps))
    return jnp.maximum(near - far + margin, 0)


def _distance(errors: jax.Array, norm_degree: Option, eps: Option) -> jax.Array:
    """The length of vectors: ``(sum_i |e_i|**n + eps)**(1/n)``."""
    if is_traced(norm_degree) or norm_degree % 2:
        # Of components that are 0 the derivative is 0, where that of `jnp.abs` is 1.
        errors = errors * jax.lax.stop_gradient(jnp.sign(errors))
    return ((errors**norm_degree).sum(axis=-1) + eps) ** (1 / norm_degree)


Distance = Callable[[jax.Array, jax.Array], jax.Array]


@keywords_checked
@spell_out
def triplet_margin_with_distance_loss(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    distance_function: Distance | None = None,
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
      distance_function: two arrays ``[..., D]`` to distances ``[...]``. By default it
        is the Euclidean one, of PyTorch: ``|a - b + 1e-6|``.
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
      ...     distance_function=lambda a, b: jnp.abs(a - b).sum(-1),
      ... )
      >>> print(f"{loss.compute():.2f}")
      0.60

    Source:
      Options as in ``torch.nn.TripletMarginWithDistanceLoss``.
    """
    check_number("margin", margin, 0)
    check_flag("swap", swap)
    if distance_function is None:
        return _with_euclidean_distance(
            anchors, positives, negatives, margin=margin, swap=swap, **reduction
        )
    check_function("distance_function", distance_function)
    triplets = event_last(-1, anchors=anchors, positives=positives, negatives=negatives)
    loss = functools.partial(_with_distance, distance_function)
    # The distance may close over arrays: so masked triplets must be in its domain, and
    # it is not compiled, as one made anew for each call would be compiled anew.
    return guarded(loss, event_ndim=1, fills_masked=True, marks_nan=True)(
        *triplets, margin=margin, swap=swap, **reduction
    )


@public_loss
def _with_euclidean_distance(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    margin: Option,
    swap: bool,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    triplets = event_last(-1, anchors=anchors, positives=positives, negatives=negatives)
    loss = functools.partial(_with_distance, _euclidean)
    return guarded(loss, event_ndim=1, marks_nan=True)(
        *triplets, margin=margin, swap=swap, **reduction
    )


def _with_distance(
    distance_function: Distance,
    anchors: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    *,
    margin: Option,
    swap: bool,
) -> jax.Array:
    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        name, shape = "distance_function(...)", a.shape[:-1]
        distances = check_array(name, distance_function(a, b), float)
        check_shape(
            name,
            distances,
            shape,
            f"has shape {distances.shape}: one distance for each pair of vectors is "
            f"expected, {shape}.",
        )
        return distances

    far = distance(anchors, negatives)
    if swap:
        far = jnp.minimum(far, distance(positives, negatives))
    return hinge(distance(anchors, positives) - far + margin)


def _euclidean(a: jax.Array, b: jax.Array) -> jax.Array:
    square = ((a - b + 1e-6) ** 2).sum(axis=-1)
    is_apart = square != 0  # of a distance of 0 the gradient is 0, as in PyTorch
    return make_safe(jnp.sqrt(make_safe(square, is_apart, 1)), is_apart)
