"""Two heads or any number: the sample's type picks whose prediction is scored."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import check_array, check_rank, check_value
from wloss_jax._devices import jit_compiled, on_auto_axes
from wloss_jax.masks import expand_leading


def select_head(
    predictions: Sequence[ArrayLike] | ArrayLike, head: ArrayLike
) -> jax.Array:
    """Picks the prediction of one head, element by element.

    ``selected = predictions[head]``

    Whatever the other heads hold, NaN too, changes nothing and gets a gradient of
    exactly 0. Select first and take one loss of the result: that compiles to one pass,
    where scoring every head and choosing after takes one for each. A head out of range
    selects NaN, never another head.

    Args:
      predictions: a sequence of floating arrays of one shape and dtype, a head each, or
        one array ``[H, ...]`` whose axis 0 is the head.
      head: integer, lined up with the leading axes of one prediction: a scalar for a
        sample ``[L]``, ``[B]`` for a batch ``[B, L]``.

    Returns:
      floating, the shape and dtype of one prediction.

    Raises:
      AssertionError: no heads, heads of different shapes or dtypes, a ``head`` that is
        not integer or does not line up.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> first, second = jnp.array([1.0, 2.0]), jnp.array([jnp.nan, 4.0])
      >>> print(wl.select_head((first, second), 0))
      [1. 2.]
      >>> import jax
      >>> print(jax.grad(lambda s: wl.select_head((first, s), 0).sum())(second))
      [0. 0.]
    """
    if isinstance(predictions, list | tuple):
        heads = [
            check_array(f"predictions[{i}]", prediction, float)
            for i, prediction in enumerate(predictions)
        ]
        check_value("predictions", bool(heads), "holds no heads to select from.")
        first = heads[0]
        for i, prediction in enumerate(heads):
            check_value(
                f"predictions[{i}]",
                (prediction.shape, prediction.dtype) == (first.shape, first.dtype),
                "differs from `predictions[0]` in shape or dtype: all heads must have "
                "the same.",
            )
        return _select(heads, check_array("head", head, int))
    stacked = check_array("predictions", predictions, float)
    check_rank(
        "predictions",
        stacked,
        set(range(1, 33)),
        "must be a sequence of arrays, or one array whose axis 0 is the head.",
    )
    check_value("predictions", len(stacked) > 0, "holds no heads to select from.")
    return _select(stacked, check_array("head", head, int))


@jit_compiled()  # or `jax_debug_nans` would take what it starts with for a mistake
def _select(predictions: list[jax.Array] | jax.Array, head: jax.Array) -> jax.Array:
    if isinstance(predictions, list):
        spec = jax.typeof(predictions[0]).sharding.spec
    else:
        spec = jax.sharding.PartitionSpec(*jax.typeof(predictions).sharding.spec[1:])

    def select(predictions: list[jax.Array] | jax.Array, head: jax.Array) -> jax.Array:
        heads = [predictions[i] for i in range(len(predictions))]
        head = expand_leading("head", head, heads[0].shape)
        selected = jnp.full_like(heads[0], jnp.nan)
        for i, prediction in enumerate(heads):
            selected = jnp.where(head == i, prediction, selected)
        return selected

    selected: jax.Array = on_auto_axes(select, spec)(predictions, head)
    return selected
