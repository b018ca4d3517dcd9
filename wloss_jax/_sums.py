"""Sums by segment that keep their digits, however long a segment is.

Of one array XLA adds up a few numbers at a time, then a few of those sums, and so on:
what rounding loses stays near one unit in the last place. A scatter, by which elements
are added to the sum of their segment, takes one after the other: a million times 0.1 is
off by 1% in float32, and 1 added to 2**24 is nothing.

So sums are carried in float64 on CPUs, and elsewhere in whole numbers, the sum of which
is the same in whatever order a device adds them. That needs no luck with how long each
segment is, and little memory beside the values: some megabytes, and on CPUs 8 bytes for
each segment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from wloss_jax._devices import on_auto_axes

# -------------------------------------------------------------------------- of all


def sum_over(array: jax.Array, axes: Iterable[int]) -> jax.Array:
    """Adds up ``axes``, in the dtype of ``array``.

    It is what `jnp.sum` does, without a jit of its own, and the time to trace one.
    """
    total: jax.Array = jax.lax.reduce_sum(array, tuple(axes))
    return total


# --------------------------------------------------------------------- by segment


def sum_by_segment(
    values: jax.Array, segment_ids: jax.Array, num_segments: int
) -> jax.Array:
    """Adds up what belongs to each segment.

    ``sums[s] = sum_i values[i] where segment_ids[i] == s``

    Args:
      values: float32 or float64 ``[...]``.
      segment_ids: integer, lined up with the leading axes of ``values``. Ids outside of
        ``[0, num_segments)`` belong to no segment.
      num_segments: the static number of them.

    Returns:
      ``[num_segments]``, of the dtype of ``values``.

    Example:
      >>> import jax.numpy as jnp
      >>> values, ids = jnp.array([1.0, 2.0, 4.0]), jnp.array([0, -1, 0])
      >>> print(sum_by_segment(values, ids, 2))
      [5. 0.]
    """
    values = values.sum(axis=tuple(range(segment_ids.ndim, values.ndim)))
    add_up = functools.partial(_sum_by_segment, num_segments)
    sums: jax.Array = on_auto_axes(add_up)(values, segment_ids)
    return sums


def count_by_segment(
    mask: jax.Array, segment_ids: jax.Array, num_segments: int, dtype: Any
) -> jax.Array:
    """Counts the True of each segment: ``[num_segments]``, of a floating ``dtype``.

    ``mask`` is bool, of the shape of the elementwise loss.
    """
    rest = tuple(range(segment_ids.ndim, mask.ndim))
    # A count that may not fit into an int32 is added up as other values are.
    if not is_below(mask.size, 2**31):
        counts = mask.sum(rest, dtype=dtype)
        return sum_by_segment(counts, segment_ids, num_segments)
    add_up = functools.partial(
        _add_up, num_segments, dtype=jnp.int32, lanes=_few(segment_ids, num_segments)
    )

    def by_platform(counts: jax.Array, ids: jax.Array) -> jax.Array:
        counted: jax.Array = jax.lax.platform_dependent(
            counts, ids, cpu=functools.partial(add_up, piece=_PIECE), default=add_up
        )
        return counted.astype(dtype)

    counts = mask.sum(rest, dtype=jnp.int32) if rest else mask
    counted: jax.Array = on_auto_axes(by_platform)(counts, segment_ids)
    return counted


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_by_segment(num_segments: int, values: jax.Array, ids: jax.Array) -> jax.Array:
    sums: jax.Array = jax.lax.platform_dependent(
        values,
        ids,
        cpu=functools.partial(sum_in_float64, num_segments),
        default=functools.partial(sum_in_whole_numbers, num_segments),
    )
    return sums


@_sum_by_segment.defjvp
def _sum_tangents(
    num_segments: int, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    """The tangent is added up in its own dtype, so that it can be transposed.

    Its transpose, the gradient, is a gather and adds up nothing.
    """
    values, ids = primals
    tangent = _add_up(
        num_segments,
        tangents[0],
        ids,
        dtype=values.dtype,
        lanes=_many(ids, num_segments),
    )
    return _sum_by_segment(num_segments, values, ids), tangent


def sum_in_float64(num_segments: int, values: jax.Array, ids: jax.Array) -> jax.Array:
    """Adds up in float64 and rounds once; float64 itself in many sums a segment."""
    is_wide = values.dtype == jnp.float64
    lanes = (_many if is_wide else _few)(ids, num_segments)
    # By an operation they are JAX's: what `jax.vmap` holds without a jit may be NumPy's
    # int64, which stands for int32 outside of this, and for itself inside.
    ids = ids | 0
    with jax.enable_x64(True):
        sums = _add_up(
            num_segments, values, ids, dtype=jnp.float64, lanes=lanes, piece=_PIECE
        )
        return sums.astype(values.dtype)


def sum_in_whole_numbers(
    num_segments: int, values: jax.Array, ids: jax.Array
) -> jax.Array:
    """Adds up in the digits of whole numbers, whose sums are exact in any order.

    A value is a multiple of a unit, a power of 2 near the largest value of its segment.
    Its first digit is the whole number next to it, in units of ``2**-step``; its second
    is what that lacks, in units of ``2**-(2 * step)``; and so on. A digit is so small
    that the sum of a cell's fits into an int32, and there are as many of them as it
    takes to lose nothing that the largest value would not.
    """
    info = jnp.finfo(values.dtype)
    # So many that few share a cell; their memory is a part of that of the values.
    lanes = min(_power_of_2_below(ids, n) for n in (2**12, 16 * num_segments))
    lanes = max(lanes, _power_of_2_below(ids, 2**25))
    most = math.ceil(math.log2(max(2, -(-ids.size // lanes)))) if _is_known(ids) else 26
    step = 29 - most  # bits of a digit: of units, a value has 2 at most
    digits = math.ceil((info.nmant + 1 + most) / step)

    # Integers are added up exactly in any order, floating numbers only compared: so no
    # result depends on the order in which a device gets to its elements.
    cells = _cells(ids, num_segments, lanes)
    add = functools.partial(_scatter, cells, (num_segments + 1, lanes), "add")
    largest = functools.partial(_scatter, cells, (num_segments + 1, lanes), "max")
    finite = jnp.where(jnp.isfinite(values), values, 0)
    # Without its mantissa a floating number is a power of 2, and dividing by it exact.
    unit = jax.lax.reduce_precision(
        jnp.minimum(largest(jnp.abs(finite)).max(1), info.max / 2),  # never infinity
        exponent_bits=info.nexp,
        mantissa_bits=0,
    )
    unit = jnp.where(unit == 0, 1, unit)
    multiples = finite / unit.at[cells // lanes].get(mode="clip")
    total = jnp.zeros((num_segments + 1, lanes), values.dtype)
    # The smallest digit first, so that what is added to is never much larger.
    for i in range(digits, 0, -1):
        coarser = jnp.rint(multiples * 2.0 ** (step * (i - 1))) if i > 1 else 0
        digit = jnp.rint(multiples * 2.0 ** (step * i)) - coarser * 2.0**step
        total = (total + add(digit.astype(jnp.int32))) * 2.0**-step
    # Infinity and NaN have no digits; in any order, their sum is the same too.
    return (total.sum(1) * unit + add(values - finite).sum(1))[1:]


# ------------------------------------------------------------------------ scatters


_PIECE = 2**18  # elements: what XLA copies for a scatter, it copies for so many


def _add_up(
    num_segments: int,
    values: jax.Array,
    ids: jax.Array,
    *,
    dtype: Any,
    lanes: int,
    piece: int | None = None,
) -> jax.Array:
    """Adds up by segment in a ``dtype``: ``[num_segments]``.

    With a ``piece``, so many elements at a time, unless they may be on several devices.
    """
    add = functools.partial(_add, num_segments, dtype, lanes)
    sums = jnp.zeros((num_segments + 1) * lanes, dtype)
    # Pieces of an array that is sharded would be gathered on each device.
    if piece is None or not _is_known(ids) or ids.size <= piece or _may_be_sharded(ids):
        sums = add(sums, values, ids)
    else:
        values, ids = values.ravel(), ids.ravel()
        pieces = ids.size // piece

        def step(i: jax.Array, sums: jax.Array) -> jax.Array:
            start = i * piece
            some = [
                jax.lax.dynamic_slice_in_dim(x, start, piece) for x in (values, ids)
            ]
            return add(sums, *some)

        sums = jax.lax.fori_loop(0, pieces, step, sums)
        if ids.size % piece:
            sums = add(sums, values[pieces * piece :], ids[pieces * piece :])
    return sums.reshape(num_segments + 1, lanes)[1:].sum(1, dtype=dtype)


def _add(
    num_segments: int,
    dtype: Any,
    lanes: int,
    sums: jax.Array,
    values: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    cells = _cells(ids, num_segments, lanes)
    return sums.at[cells].add(values.astype(dtype), mode="drop")


def _scatter(
    cells: jax.Array, shape: tuple[int, int], method: str, values: jax.Array
) -> jax.Array:
    zeros = jnp.zeros(math.prod(shape), values.dtype)
    result: jax.Array = getattr(zeros.at[cells], method)(values, mode="drop")
    return result.reshape(shape)


def _cells(ids: jax.Array, num_segments: int, lanes: int) -> jax.Array:
    """The cell that each element is added to: uint32, of the shape of ``ids``.

    A segment has a cell for each of some ``lanes``, which elements take turns in. The
    cells of segment s start at ``(s + 1) * lanes``: those before are of what XLA (jax
    0.10, 0.12) pads the rows with that it shares out among more devices. What belongs
    to no segment has a cell past the end, and is dropped.
    """
    belongs = (ids >= 0) & (ids < num_segments)
    segments = jnp.where(belongs, ids.astype(jnp.uint32) + 1, num_segments + 1)
    if lanes == 1:
        return segments
    # The position in the flat array, without making it flat: that would move what is
    # sharded between devices. It may wrap around, which changes only whose turn it is.
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(ids.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, ids.shape, axis)
        place = place * jnp.uint32(size) + position
    return segments * lanes + place % lanes


def _may_be_sharded(array: jax.Array) -> bool:
    return not jax.typeof(array).sharding.mesh.empty


def _few(ids: jax.Array, num_segments: int) -> int:
    """Lanes that keep a processor from waiting for the last addition to a cell."""
    return min(8, _power_of_2_below(ids, 16 * (num_segments + 1)))


def _many(ids: jax.Array, num_segments: int) -> int:
    """Lanes that keep digits, if segments are about as long as each other.

    Their number is odd, so that ids of a period of 2, 4, 8 use all of them.
    """
    return _power_of_2_below(ids, 8 * (num_segments + 1)) | 1


def _power_of_2_below(ids: jax.Array, divisor: int) -> int:
    """The largest power of 2 that is at most ``size / divisor``, and 1 at least."""
    if not _is_known(ids):
        return 1
    return 1 << max(0, (ids.size // max(1, divisor)).bit_length() - 1)


def _is_known(array: jax.Array) -> bool:
    """Whether the size is a number: in `jax.export` it may be a symbol."""
    return isinstance(array.size, int)


def is_below(size: Any, limit: int) -> bool:
    return isinstance(size, int) and size < limit
