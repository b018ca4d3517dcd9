"""What counts in a loss: which elements, how much, and how they are added up.

The shared keywords of all losses (``where``, ``lengths``, ``weights``, ``segment_ids``,
``num_segments``) are read once, by `what_counts`. A loss makes its inputs safe by the
mask of the `WhatCounts` that it gets, and adds its values up with the same.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax.lax import convert_element_type as convert
from jax.typing import ArrayLike

from wloss_jax._checks import check_array, check_type, describe
from wloss_jax._sums import count_by_segment, is_below, sum_by_segment, sum_over
from wloss_jax.masks import expand_leading, make_safe, valid_mask


class Reduction(TypedDict, total=False):
    """The keywords that every loss shares; `weighted_mean` says what they mean."""

    where: ArrayLike | None
    lengths: ArrayLike | None
    weights: ArrayLike | None
    segment_ids: ArrayLike | None
    num_segments: int | None


SHARED = tuple(Reduction.__annotations__)


@dataclasses.dataclass(frozen=True)
class WhatCounts:
    """Which elements of a loss count, how much, and how to add them up.

    Attributes:
      shape: the shape of the elementwise loss.
      mask: bool of that shape, True where an element counts; None where all do.
      weights: floating of that shape; None where each counts once.
      lengths: as they came, where nothing else says what counts; else None.
      segment_ids: as they came; None for one sum of all.
      num_segments: the number of sums by segment.
    """

    shape: tuple[int, ...]
    mask: jax.Array | None
    weights: jax.Array | None
    lengths: jax.Array | None
    segment_ids: jax.Array | None
    num_segments: int | None

    def add_up(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Adds up elementwise losses: the weighted sum, and the sum of the weights.

        Args:
          values: floating, of the `shape` of what counts.

        Returns:
          ``(total, weight)``, two scalars, or two of ``[num_segments]``.
        """
        dtype = jnp.result_type(values, jnp.float32)
        if self.weights is not None:
            dtype = jnp.result_type(dtype, self.weights)
        values = convert(values, dtype)
        # The inputs of a loss were made safe, and still it may have made NaN of them:
        # 0 times that is NaN, so it is replaced, not multiplied.
        if self.mask is not None:
            values = make_safe(values, self.mask)
        if self.weights is None:
            return self._sum(values), self._count(dtype)
        weights = convert(self.weights, dtype)
        if self.mask is not None:  # a weight too may be NaN where nothing counts
            weights = make_safe(weights, self.mask)
        return self._sum(values * weights), self._sum(weights)

    def _sum(self, x: jax.Array) -> jax.Array:
        if self.segment_ids is None or self.num_segments is None:
            return sum_over(x, range(x.ndim))
        return sum_by_segment(x, self.segment_ids, self.num_segments)

    def _count(self, dtype: Any) -> jax.Array:
        """Counts the elements that count, each once."""
        if self.mask is None:
            return _count_all(self.shape, dtype)
        if self.segment_ids is not None and self.num_segments is not None:
            return count_by_segment(
                self.mask, self.segment_ids, self.num_segments, dtype
            )
        if self.lengths is not None:
            return _count_lengths(self.lengths, self.shape, dtype)
        return _count_mask(self.mask, dtype)


def what_counts(
    shape: tuple[int, ...],
    *,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> WhatCounts:
    """Reads the shared keywords, which `wloss_jax.weighted_mean` explains.

    Args:
      shape: the shape of the elementwise loss.
      where: as in `wloss_jax.weighted_mean`, and so are the others.
      lengths: bounds the axis that comes after its own.
      weights: no gradient flows through them; an element whose weight is exactly 0 does
        not count, as where ``where`` is False.
      segment_ids: the sample that an element belongs to.
      num_segments: the number of samples.
    """
    mask = valid_mask(
        shape,
        where=where,
        lengths=lengths,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    # Lengths alone are added up as they are, B numbers instead of a mask of B * L.
    alone = lengths is not None and where is None and weights is None
    expanded = None
    if weights is not None:
        expanded = expand_leading("weights", check_weights(weights), shape)
        # An element that counts zero times is not there, be it NaN.
        is_there = expanded != 0
        mask = is_there if mask is None else mask & is_there
    return WhatCounts(
        shape,
        mask,
        expanded,
        check_array("lengths", lengths, int) if alone else None,
        None if segment_ids is None else check_array("segment_ids", segment_ids, int),
        None if num_segments is None else int(num_segments),
    )


def check_weights(
    weights: ArrayLike, name: str = "weights", mask: str = "where"
) -> jax.Array:
    """Checks how much elements count: floating, or whole numbers of times."""
    array = check_array(name, weights)
    check_type(
        name,
        array.dtype != jnp.bool_,
        f"is {describe(array)}, which says whether an element counts, not how much: "
        f"pass it as `{mask}`.",
    )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.float32)
    return jax.lax.stop_gradient(array)


def _count_mask(mask: jax.Array, dtype: Any) -> jax.Array:
    """Counts the True, in the form that each backend is fast at.

    A plain sum of integers, which is exact too, costs on CPU a third of the two-head
    loss with its gradient (XLA writes out an integer for each element, unless few are
    added up at a time), and on TPU it takes 51 bytes an element where a sum of
    floating numbers takes 30.
    """
    *rows, size = mask.shape or (1,)
    # A count of 16 at most, which 8 bits have room for.
    few = math.gcd(size, 16) if is_below(size, 2**62) else 1

    def few_at_a_time(mask: jax.Array) -> jax.Array:
        groups = jax.lax.reshape(mask, (*rows, few, size // few))
        counts = sum_over(convert(groups, jnp.uint8), [len(rows)])
        return _add_counts(convert(counts, jnp.int32), few, dtype)

    def row_by_row(mask: jax.Array) -> jax.Array:
        if not is_below(size, 2**31):
            return sum_over(convert(mask, dtype), range(mask.ndim))
        # A floating sum is the fast one, and exact as long as a row is short; rows are
        # then added up as integers, which are exact for longer.
        exact = jnp.float32 if is_below(size, 2**24 + 1) else jnp.int32
        counts = sum_over(convert(mask, exact), [len(rows)] if mask.ndim else [])
        return _add_counts(convert(counts, jnp.int32), size, dtype)

    count: jax.Array = jax.lax.platform_dependent(
        mask, cpu=few_at_a_time, default=row_by_row
    )
    return count


def _count_lengths(lengths: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Counts what `wloss_jax.length_mask` marks, without looking at a mask."""
    size, *rest = shape[lengths.ndim :]
    # Cut as the mask cuts them: a length may be negative, or past the end.
    none, all_of_them = (jnp.asarray(n, lengths.dtype) for n in (0, size))
    counts = convert(jax.lax.clamp(none, lengths, all_of_them), jnp.int32)
    return _add_counts(counts, size, dtype, times=math.prod(rest))


def _count_all(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Counts the elements of an array of a ``shape``."""
    return _in_float(math.prod(shape), dtype)


def _in_float(size: Any, dtype: Any) -> jax.Array:
    # As a Python integer it would have to fit into an int32.
    return jnp.asarray(float(size) if isinstance(size, int) else size, dtype)


def _add_counts(
    counts: jax.Array, most: Any, dtype: Any, *, times: Any = 1
) -> jax.Array:
    """Adds up int32 ``counts``, each ``most`` at most, and takes that some ``times``.

    Where the sum may not fit into an int32, only rows that do are added up as integers.
    A floating number has all digits of a count up to 2**24, and is right to rounding
    beyond.
    """
    if is_below(counts.size * most * times, 2**31):
        total = sum_over(counts, range(counts.ndim))
        return convert(total if times == 1 else total * times, dtype)
    # The last axes are added up first, as integers; `fitting` are as many of them as
    # an int32 has room for. What is left are few numbers, added up as floating ones.
    fitting = [
        axis
        for axis in range(counts.ndim)
        if is_below(math.prod(counts.shape[axis:]) * most, 2**31)
    ]
    fitted = convert(sum_over(counts, fitting), dtype)
    return sum_over(fitted, range(fitted.ndim)) * _in_float(times, dtype)
