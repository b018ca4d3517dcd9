"""The check of a batch's values, which shapes and dtypes cannot tell."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_count,
    check_label,
    check_value,
)
from wloss_jax._counting import check_weights
from wloss_jax.masks import (
    is_label,
    valid_mask,
)


def assert_valid_batch(
    *,
    lengths: ArrayLike | None = None,
    size: int | None = None,
    labels: ArrayLike | None = None,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    weights: ArrayLike | None = None,
) -> None:
    """Asserts that the values of a batch are in range.

    ``0 <= lengths <= size``, ``0 <= labels < num_classes``, ``0 <= weights < infinity``
    and their sum at most ``2**126``

    The losses check shapes and dtypes, which are known when they are traced; values are
    not. This looks at them: eagerly, or in a jitted function under `chex.chexify`. With
    ``lengths``, the padding of ``labels`` and ``weights`` may hold anything.

    Args:
      lengths: integer ``[B]``, or of any shape.
      size: of the padded axis, the most that a length may be.
      labels: integer, ``[B, L]`` say.
      num_classes: the number of classes.
      ignore_index: a label out of range that is allowed.
      weights: numbers, ``[B, L]`` or ``[B]`` say.

    Raises:
      AssertionError: a value is out of range; the message names the argument, the first
        such value and its index, and the mend.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import chex
      >>> import wloss_jax as wl
      >>> wl.testing.assert_valid_batch(lengths=jnp.array([3, 0]), size=3)
      >>> @chex.chexify
      ... @jax.jit
      ... def step(labels):
      ...     wl.testing.assert_valid_batch(labels=labels, num_classes=4)
      >>> try:
      ...     step(jnp.array([[1, 3], [-1, 2]]))
      ...     step.wait_checks()
      ... except AssertionError as error:
      ...     print(str(error).partition("Custom message: ")[2].partition(":")[0])
      `labels` out of range at [1, 0]
    """
    if lengths is not None:
        lengths = check_array("lengths", lengths, int)
        _check_values(
            "lengths",
            lengths,
            lengths < 0,
            "negative",
            "A length counts the elements of a sample, 0 for an empty one.",
        )
        if size is not None:
            size = check_count("size", size)
            _check_values(
                "lengths",
                lengths,
                lengths > size,
                f"past the end of the padded axis, {size},",
                "Pad to the longest sample, or cut samples and lengths alike.",
            )
    if labels is not None:
        labels = check_array("labels", labels, int)
        bad = labels < 0
        if num_classes is not None:
            num_classes = check_count("num_classes", num_classes)
            bad |= labels >= num_classes
        if ignore_index is not None:
            ignore_index = check_label("ignore_index", ignore_index)
            bad &= ~is_label(labels, ignore_index)
        number = "no negative" if num_classes is None else num_classes
        _check_values(
            "labels",
            labels,
            _counted(bad, lengths),
            "out of range",
            f"There are {number} classes, from 0; a label that "
            "marks padding is said by `ignore_index`, or covered by `lengths`.",
        )
    if weights is not None:
        weights = check_weights(weights)
        _check_values(
            "weights",
            weights,
            _counted(~((weights >= 0) & jnp.isfinite(weights)), lengths),
            "negative, infinite or NaN",
            "Elements that do not count are said by `where`.",
        )
        sums = jnp.cumsum(_counted(weights, lengths).astype(jnp.float32))
        _check_values(
            "weights",
            weights,
            sums.reshape(weights.shape) > 2.0**126,
            "past 2**126 in sum",
            "Devices take 1 / sum for 0 then, and gradients with it: scale the weights "
            "by any constant, which leaves the mean as it is.",
        )


def _counted(array: jax.Array, lengths: ArrayLike | None) -> jax.Array:
    """Puts 0 or False past the lengths, where these bound an axis."""
    if lengths is None or array.ndim <= jnp.ndim(lengths):
        return array
    mask = valid_mask(array.shape, lengths=lengths)
    return array if mask is None else jnp.where(mask, array, jnp.zeros_like(array))


def _check_values(
    name: str, array: jax.Array, bad: jax.Array, what: str, mend: str
) -> None:
    if not array.size:
        return
    first = jnp.argmax(bad)
    index = jnp.unravel_index(first, array.shape)
    place = f"[{', '.join(['{}'] * array.ndim)}]"
    count = bad.sum()
    message = f"{what} at {place}: {{}}. {mend}"
    if not isinstance(count, jax.core.Tracer):
        check_value(name, not count, message.format(*index, array.ravel()[first]))
        return
    chex.assert_trees_all_equal(
        count,
        jnp.zeros_like(count),
        custom_message=f"`{name}` {message}",
        custom_message_format_vars=(*index, array.ravel()[first]),
    )
