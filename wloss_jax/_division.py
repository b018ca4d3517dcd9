"""The one guarded division: of a total by its weight, which may be 0.

No epsilon, and no floor under the weight. Eager calls are compiled; in a trace each is
its operations, as a jit of its own takes time to trace.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import check_array, check_value
from wloss_jax._devices import align_axes, jit_compiled


def divide(total: jax.Array, weight: jax.Array, empty: ArrayLike) -> jax.Array:
    """Computes `wloss_jax.WeightedMean.compute`, which says what it is.

    Args:
      total: floating ``[...]``.
      weight: of the same shape and dtype.
      empty: the value where both are 0, a number or of that shape.
    """
    if not isinstance(empty, float | int):
        empty = check_array("empty", empty)
        check_value(
            "empty",
            empty.shape in ((), total.shape),
            f"has shape {empty.shape}, and the mean {total.shape}: pass a number, or "
            "one for each mean.",
        )
    if isinstance(total, jax.core.Tracer):
        return _divide(total, weight, empty)
    if type(empty) is float and empty == 0:  # a number would be sent to the device
        return _divide_or_zero(total, weight)
    return _divide_compiled(total, weight, empty)


def _divide(total: jax.Array, weight: jax.Array, empty: ArrayLike) -> jax.Array:
    weight, constant = jax.lax.stop_gradient((weight, total))
    zero, one = (jax.lax.full_like(weight, x) for x in (0, 1))
    no_weight = jax.lax.eq(weight, zero)
    mean = jax.lax.div(total, jax.lax.select(no_weight, one, weight))
    # Chosen by the weight alone, so that the slope of a mean is known from it, and the
    # compiler drops the model where only slopes are wanted.
    if isinstance(empty, float | int):
        empty = jax.lax.full_like(mean, empty)
    else:
        empty = jnp.broadcast_to(jnp.asarray(empty, mean.dtype), mean.shape)
        empty = align_axes(total, empty)
    # By comparisons, as 0 times infinity would be an alarm where NaN is looked for.
    above, below = (jax.lax.full_like(constant, x) for x in (math.inf, -math.inf))
    infinite = jax.lax.select(jax.lax.lt(constant, zero), below, constant)
    infinite = jax.lax.select(jax.lax.gt(constant, zero), above, infinite)
    shown = jax.lax.select(jax.lax.eq(constant, zero), empty, infinite)
    return jax.lax.select(no_weight, shown, mean)


_divide_compiled = jit_compiled()(_divide)


@jit_compiled()
def _divide_or_zero(total: jax.Array, weight: jax.Array) -> jax.Array:
    return _divide(total, weight, 0.0)


@jit_compiled()
def size_and_loss(total: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a scheme sees: the weight of each entry and its mean, constants.

    The weight of an entry without one is 1, so that no scheme has to mind powers of 0.
    """
    total, size = jax.lax.stop_gradient((total, weight))
    safe_size = jax.lax.select(size == 0, jnp.ones_like(size), size)
    return safe_size, _divide(total, size, 0.0)


@jit_compiled()
def weigh(
    total: jax.Array, weight: jax.Array, new_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The total and the weight of entries that keep their means, weighed anew."""
    size = jax.lax.stop_gradient(weight)
    no_weight = size == 0
    safe_size = jax.lax.select(no_weight, jnp.ones_like(size), size)
    new_weight = jnp.where(no_weight, 0, jax.lax.stop_gradient(new_weight))
    # In this order: of one weight over another there may be no float32.
    new_total = total / safe_size * new_weight
    # An entry that a scheme weighs with 0 is not there, be it NaN.
    new_total = jnp.where(new_weight == 0, 0, new_total)
    # A total without a weight is not empty: it shows, beside those of others too.
    return jnp.where(no_weight, _divide(total, size, 0.0), new_total), new_weight
