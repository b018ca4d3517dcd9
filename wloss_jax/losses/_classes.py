"""Classes that are out: by a logit of -infinity, or by a ``class_mask``.

A class that is out has no share of anything: not of the normaliser, not of smoothing,
and no gradient. A label that is out costs infinity, and ``0 * log(0)`` is 0. All of it
holds by selecting constants, whose derivative is 0 in every mode, where a product of 0
and infinity would make NaN.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import check_array, check_value
from wloss_jax.losses._masked import Axis, event_last
from wloss_jax.masks import differs, make_safe, select


def classes_last(
    axis: Axis, class_mask: ArrayLike | None, mend: str = "", **arrays: ArrayLike
) -> list[jax.Array]:
    """Moves the axes of the classes to the end of each array, as one axis.

    Args:
      axis: the axis or axes of the classes; None for all.
      class_mask: bool ``[V]`` or of the shape of the arrays, False for classes that are
        out: of the first array, they become -infinity.
      mend: as in `event_last`.
      **arrays: by name, the logits first.
    """
    moved = event_last(axis, mend, **arrays)
    if class_mask is None:
        return moved
    name, logits = next(iter(arrays)), moved[0]
    mask = check_array("class_mask", class_mask, bool)
    shape = jnp.shape(next(iter(arrays.values())))
    check_value(
        "class_mask",
        mask.shape in (shape, logits.shape[-1:]),
        f"has shape {mask.shape}, and `{name}` {shape}: pass one bool for each of the "
        f"{logits.shape[-1]} classes, or an array of the shape of `{name}`.",
    )
    if mask.shape == shape:
        (mask,) = event_last(axis, class_mask=mask)
    return [jnp.where(mask, logits, -math.inf), *moved[1:]]


def log_normalizer(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the sum of exponentials, as a sum of two ``[...]``.

    Apart, ``logits`` less the one and then the other keep more digits than less both.
    Where all classes are out it is -infinity, with a gradient of 0.
    """
    # The gradient of the maximum would cancel: what is taken out is added again.
    highest = jax.lax.stop_gradient(logits).max(axis=-1)
    shift = make_safe(highest, jax.lax.is_finite(highest))
    total = jax.lax.exp(logits - shift[..., None]).sum(axis=-1)
    some_are_in = total != 0
    log_total = jax.lax.log(make_safe(total, some_are_in, 1))
    return shift, make_safe(log_total, some_are_in, -math.inf)


def log_probabilities(logits: jax.Array) -> jax.Array:
    """`jax.nn.log_softmax` that is -infinity, and no NaN, where all classes are out."""
    shift, log_total = log_normalizer(logits)
    # Of a row without classes any finite number will do: they stay -infinity.
    log_total = make_safe(log_total, log_total != -math.inf)
    return (logits - shift[..., None]) - log_total[..., None]


def finite_unless_due(log_probs: jax.Array, shares: jax.Array) -> jax.Array:
    """Makes the logarithm 0 where a class is out and its share is 0.

    So ``share * log_prob`` is 0 there; where the share is another it is infinite.
    """
    is_due = differs(shares, 0)
    return make_safe(
        log_probs, jax.lax.bitwise_or(is_due, differs(log_probs, -math.inf))
    )


def constant_where_out(shares: jax.Array, logits: jax.Array) -> jax.Array:
    """Makes constants of the shares of classes that are out.

    Where such a share is not 0 the loss is infinity, and so is its slope by the share:
    0 times that, in the gradient of a label or of traced smoothing, would be NaN.
    """
    return select(logits != -math.inf, shares, jax.lax.stop_gradient(shares))


def infinite_where_out(loss: jax.Array, score: jax.Array) -> jax.Array:
    """The ``loss``, and infinity, a constant, where the label's score is -infinity.

    A loss that is NaN stays so.
    """
    stays = jax.lax.bitwise_or(differs(score, -math.inf), jax.lax.ne(loss, loss))
    return make_safe(loss, stays, math.inf)


def finite_score(score: jax.Array) -> jax.Array:
    """The label's score, 0 where its class is out: infinity less itself is NaN."""
    return make_safe(score, differs(score, -math.inf))


def share_of_classes(logits: jax.Array) -> jax.Array:
    """One over the number of classes that are not out, and 0 for those that are."""
    is_in = (logits != -math.inf).astype(logits.dtype)
    return is_in / jnp.maximum(is_in.sum(axis=-1, keepdims=True), 1)


def mean_of_classes(logits: jax.Array) -> jax.Array:
    """The mean of the logits of the classes that are not out.

    XLA has a plain sum on CPU that takes an eighth of the time of one that looks at
    its terms (2,048 rows of 1,024): so it looks only where a sum says that it must.
    """

    def of_those_in(logits: jax.Array) -> jax.Array:
        is_in = logits != -math.inf
        count = jnp.maximum(is_in.sum(axis=-1), 1).astype(logits.dtype)
        return make_safe(logits, is_in).sum(axis=-1) / count

    def of_all_first(logits: jax.Array) -> jax.Array:
        mean = logits.mean(axis=-1)
        some_out = (mean == -math.inf).any()
        chosen: jax.Array = jax.lax.cond(
            some_out, of_those_in, lambda logits: mean, logits
        )
        return chosen

    mean: jax.Array = jax.lax.platform_dependent(
        logits, cpu=of_all_first, default=of_those_in
    )
    return mean
