"""Integer class labels: their checks, their scores, and NaN for one out of range."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_dtype,
    check_label,
    check_shape,
    describe,
)
from wloss_jax._counting import check_weights
from wloss_jax._devices import (
    jit_compiled,
)
from wloss_jax._sums import sum_over
from wloss_jax.masks import (
    expand_leading,
    is_label,
    make_safe,
    select,
)


def check_labels(
    labels: ArrayLike, shape: tuple[int, ...], of_logits: tuple[int, ...] = ()
) -> jax.Array:
    """Checks integer class labels against the shape of the elements.

    Args:
      labels: what came.
      shape: of the elements.
      of_logits: the shape of logits whose classes could be on another axis, if any.
    """
    array = check_array("labels", labels)
    rest = "One-hot labels are for `softmax_cross_entropy`."
    for i in range(len(of_logits) - 1):
        if array.shape == of_logits[:i] + of_logits[i + 1 :]:
            rest = f"If axis {i} of the logits is the classes, pass `axis={i}`."
    came = (
        f"must be integer classes of shape {shape}, one for each element; got "
        f"{describe(array)}. {rest}"
    )
    check_dtype("labels", array, int, came)
    check_shape("labels", array, shape, came)
    return check_array("labels", labels, int)


def nan_unless_class(labels: jax.Array, num_classes: int) -> jax.Array:
    """Gives 1 for a label in range and NaN for one that is not, as a factor."""
    return nan_unless(is_class_of(labels, num_classes))


def is_class_of(labels: jax.Array, num_classes: int) -> jax.Array:
    """Whether each label is in range."""
    return (labels >= 0) & (labels < num_classes)


def nan_unless(condition: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Gives 1 or NaN: a factor, so that the gradient is NaN too."""
    if isinstance(condition, jax.core.Tracer):
        return _nan_unless(condition, dtype)
    # Compiled, or `jax_debug_nans` would take the constant for a mistake.
    return _nan_unless_compiled(condition, dtype)


def _nan_unless(condition: jax.Array, dtype: Any) -> jax.Array:
    one, nan = (jax.lax.full_like(condition, x, dtype) for x in (1, math.nan))
    return select(condition, one, nan)


_nan_unless_compiled = jit_compiled("dtype")(_nan_unless)


def counted_labels(
    labels: jax.Array, ignore_index: int, where: ArrayLike | None
) -> jax.Array:
    """Folds ``ignore_index`` into ``where``."""
    ignore_index = check_label("ignore_index", ignore_index)
    counts = ~is_label(labels, ignore_index)
    if where is None:
        return counts
    where = check_array("where", where, bool)
    return counts & expand_leading("where", where, labels.shape)


def check_class_weights(class_weights: ArrayLike, logits: jax.Array) -> jax.Array:
    """Checks that there is one weight for each class, the last axis of ``logits``."""
    class_weights = check_weights(class_weights, "class_weights", "class_mask")
    check_shape(
        "class_weights",
        class_weights,
        logits.shape[-1:],
        f"has shape {class_weights.shape}: one weight for each of the "
        f"{logits.shape[-1]} classes is expected.",
    )
    return class_weights


def of_classes(class_weights: jax.Array, logits: jax.Array) -> jax.Array:
    """The weight of each class for each of the ``logits``."""
    return jnp.broadcast_to(class_weights.astype(logits.dtype), logits.shape)


def own_class_weights(
    logits: jax.Array,
    labels: jax.Array,
    class_weights: ArrayLike,
    weights: ArrayLike | None,
) -> jax.Array:
    """Folds the weight of each element's own class into ``weights``."""
    class_weights = check_class_weights(class_weights, logits)
    # A product of two weights is as precise as the sum that it goes into.
    dtype = jnp.result_type(class_weights, logits, jnp.float32)
    own = class_weights.astype(dtype).at[labels].get(mode="clip")
    # A label out of range is there, whatever the weight of the class next to it.
    own = make_safe(own, is_class_of(labels, class_weights.size), 1)
    if weights is None:
        return own
    weights = check_weights(weights)
    return own * expand_leading("weights", weights, labels.shape)


@jax.custom_jvp
def score_of_label(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Picks ``scores[..., label]``.

    The gradient of a gather is a scatter into an array of its own: two copies of
    bfloat16 logits in temporaries on H100 and TPU (compiled for 8192 x 32768), where
    comparing with an iota fuses and needs none. For the score itself, a gather is the
    faster on a CPU.
    """
    score: jax.Array = jax.lax.platform_dependent(
        scores, labels, cpu=_gather_label, default=_compare_label
    )
    return score


@score_of_label.defjvp
def _tangent_of_label(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    scores, labels = primals
    return score_of_label(scores, labels), _compare_label(tangents[0], labels)


def _gather_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # Of a label out of range any score will do: it is masked, or the loss is made NaN.
    # The bounds are kept here, which takes XLA less than `mode="clip"` does.
    last = jnp.asarray(logits.shape[-1] - 1, labels.dtype)
    labels = jax.lax.clamp(jnp.zeros_like(last), labels, last)
    batch = tuple(range(labels.ndim))
    score: jax.Array = jax.lax.gather(
        logits,
        jax.lax.expand_dims(labels, [labels.ndim]),
        jax.lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(labels.ndim,),
            start_index_map=(labels.ndim,),
            operand_batching_dims=batch,
            start_indices_batching_dims=batch,
        ),
        slice_sizes=(1,) * logits.ndim,
        mode="promise_in_bounds",
    )
    return score


def _compare_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # Of a label out of range no class is its own: the score is 0, and so is its slope.
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    is_own = classes == jax.lax.broadcast_in_dim(
        labels, logits.shape, range(labels.ndim)
    )
    chosen = select(is_own, logits, jax.lax.full_like(logits, 0))
    return sum_over(chosen, [logits.ndim - 1])
