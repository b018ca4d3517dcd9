"""Which elements count: masks, the alignment rule, and inputs made safe.

Nouns make masks (`length_mask`, `observed_mask`); every loss takes one as ``where``.
What the losses and `weighted_mean` share stands here too: the one mask that ``where``,
``lengths`` and ``segment_ids`` add up to, and `freeze`, `make_safe` and
`fill_masked`, which take the content of masked positions out of reach.

**The alignment rule.** ``where``, ``weights`` and ``segment_ids`` line up with the
*leading* axes of the elementwise loss: ``[B]`` weights on a ``[B, L]`` loss weigh
samples, even where B equals L. ``lengths`` has the shape of the axes before the one
that it bounds. NumPy's own rule, which lines up the trailing axes, is never used.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_count,
    check_rank,
    check_shape,
    check_size,
    check_type,
    check_value,
    describe,
    is_number,
    is_symbolic,
    widen,
)


def length_mask(lengths: ArrayLike, size: int) -> jax.Array:
    """Marks the first ``lengths`` of ``size`` positions.

    ``mask[..., i] = i < lengths[...]``

    A length past ``size`` marks all positions and a negative one none; whether lengths
    are in range is `wloss_jax.testing.assert_valid_batch`'s to say.

    Args:
      lengths: how many positions count, integer ``[...]``; ``[B]`` for a batch, a
        scalar for one sample.
      size: the size of the padded axis.

    Returns:
      bool ``[..., size]``, True where a position counts.

    Raises:
      AssertionError: ``lengths`` is not an integer array, or ``size`` not a Python
        integer of at least 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> print(wl.length_mask(jnp.array([2, 0, 3]), 3))
      [[ True  True False]
       [False False False]
       [ True  True  True]]
    """
    lengths = check_array("lengths", lengths, int)
    size = check_size("size", size)
    # Counted from 1, in a table: of one from 0 XLA makes an iota, the 64-bit index of
    # which halves the speed of a loop that it stands in on CPU.
    is_small = not is_symbolic(size) and size <= _LARGEST_TABLE
    arange = np.arange if is_small else jnp.arange
    positions = arange(1, size + 1, dtype=np.int32)
    if lengths.dtype != jnp.int32:  # cut, or a length of 2**32 - 1 would be -1
        lengths = jnp.clip(lengths, 0, size).astype(jnp.int32)
    shape, leading = (*lengths.shape, size), range(lengths.ndim)
    mask: jax.Array = jax.lax.le(
        jax.lax.broadcast_in_dim(positions, shape, [lengths.ndim]),
        jax.lax.broadcast_in_dim(lengths, shape, leading),
    )
    return mask


_LARGEST_TABLE = 2**16  # entries; it is part of the compiled program


def observed_mask(targets: ArrayLike, missing: float = math.nan) -> jax.Array:
    """Marks the targets that were measured.

    ``mask = targets != missing``, and ``mask = ~isnan(targets)`` for a NaN ``missing``

    With a sentinel, a NaN among the targets is *not* missing: it counts, and stays
    visible in the loss. Integer targets have no NaN: give them a sentinel.

    Args:
      targets: floating or integer ``[...]``.
      missing: the value that stands for "not measured"; NaN, or a sentinel such as -1.

    Returns:
      bool ``[...]``, of the shape of ``targets``.

    Raises:
      AssertionError: ``targets`` is not a numeric array, or it is an integer array and
        ``missing`` is not a whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> print(wl.observed_mask(jnp.array([0.5, jnp.nan, -1.0])))
      [ True False  True]
      >>> print(wl.observed_mask(jnp.array([7, 2, -1]), missing=-1))
      [ True  True False]
    """
    targets = check_array("targets", targets)
    check_type("missing", is_number(missing), f"must be a number; got {missing!r}.")
    if jnp.issubdtype(targets.dtype, jnp.floating):
        if math.isnan(missing):
            return ~jnp.isnan(targets)
        check_value(
            "missing",
            math.isinf(missing) or abs(missing) <= float(jnp.finfo(targets.dtype).max),
            f"is {missing}, which {describe(targets)} "
            "`targets` cannot hold: it would stand for infinity.",
        )
        return targets != jnp.asarray(missing, targets.dtype)
    check_value(
        "missing",
        float(missing).is_integer(),
        f"is {missing}, which {describe(targets)} `targets` "
        "cannot hold: pass the integer sentinel, such as `missing=-1`.",
    )
    return ~is_label(widen(targets), int(missing))  # bool widens to an integer


def valid_mask(
    shape: tuple[int, ...],
    *,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> jax.Array | None:
    """The one mask that the shared keywords add up to, or None where all count.

    A segment id outside ``[0, num_segments)`` marks padding between packed samples.

    Args:
      shape: the shape of the elementwise loss, and of the mask.
      where: as in `wloss_jax.weighted_mean`, and so are the others.
      lengths: bounds the axis that comes after its own.
      segment_ids: the sample that an element belongs to.
      num_segments: the number of samples.
    """
    masks = []
    if where is not None:
        where = check_array("where", where, bool)
        masks.append(expand_leading("where", where, shape))
    if lengths is not None:
        lengths = check_array("lengths", lengths, int)
        mend = (
            f"has shape {lengths.shape} and the loss {shape}: lengths must have the "
            "shape of the axes before the one that it bounds, (B,) for a loss of shape "
            "(B, L), () for one sample of shape (L,)."
        )
        check_rank("lengths", lengths, range(len(shape)), mend)
        check_shape("lengths", lengths, shape[: lengths.ndim], mend)
        mask = length_mask(lengths, shape[lengths.ndim])
        masks.append(expand_leading("lengths", mask, shape))
    check_value(
        "segment_ids",
        (segment_ids is None, num_segments is None)
        == (num_segments is None, segment_ids is None),
        "and a static `num_segments` come together: the "
        "number of segments is the size of the result. Got num_segments="
        f"{num_segments} and {'no' if segment_ids is None else 'some'} segment_ids.",
    )
    if segment_ids is not None and num_segments is not None:
        num_segments = check_count("num_segments", num_segments)
        segment_ids = check_array("segment_ids", segment_ids, int)
        ids = expand_leading("segment_ids", segment_ids, shape)
        masks.append((ids >= 0) & (ids < num_segments))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def freeze(array: jax.Array, mask: jax.Array) -> jax.Array:
    """Makes constants of the masked positions of ``array``, whatever they hold.

    Their gradient is exactly 0, even where NaN comes back to them. ``array`` may have
    event axes after those of ``mask``. Costs nothing before the backward pass: XLA
    knows that either choice is the array itself. Integers, labels of -100 say, become
    0: a loss may make NaN of one, which `jax_debug_nans` finds if there is no jit.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return make_safe(array, mask)
    return select(mask, array, jax.lax.stop_gradient(array))


def make_safe(array: jax.Array, mask: jax.Array, harmless: ArrayLike = 0) -> jax.Array:
    """Puts a ``harmless`` value at the masked positions of ``array``.

    ``array`` may have event axes after those of ``mask``, and so may what is harmless.
    """
    if isinstance(harmless, int | float):
        return select(mask, array, jax.lax.full_like(array, harmless))
    mask = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
    return jnp.where(mask, array, jnp.asarray(harmless, array.dtype))


def select(mask: jax.Array, array: jax.Array, other: jax.Array) -> jax.Array:
    """Chooses by a ``mask`` that lines up with the leading axes of two like arrays.

    It is what `jnp.where` does, but one operation: `jnp.where` is a function with a jit
    of its own, and half of the time to trace a loss would go into those.
    """
    if 0 < mask.ndim < array.ndim:
        sharding = jax.typeof(array).sharding
        mask = jax.lax.broadcast_in_dim(
            mask,
            array.shape,
            range(mask.ndim),
            out_sharding=None if sharding.mesh.empty else sharding,
        )
    chosen: jax.Array = jax.lax.select(mask, array, other)
    return chosen


def differs(array: jax.Array, number: float) -> jax.Array:
    """Where an array is not this number: `!=`, but one operation, as in `select`."""
    different: jax.Array = jax.lax.ne(array, jax.lax.full_like(array, number))
    return different


def fill_masked(arrays: list[jax.Array], mask: jax.Array) -> list[jax.Array]:
    """Puts the first element that counts in the place of those that do not.

    So whatever a loss is a function of, it stays in its domain. Where nothing counts,
    floating arrays hold 1/2, 1/3, ...: inside the domain of ``log``, ``log1p(-x)``,
    ``sqrt``, ``1/x`` and ``arcsin``, and no two alike, so that no distance is 0.
    Integers hold 0.
    """
    arrays = [jnp.asarray(array) for array in arrays]
    elements = [jax.lax.stop_gradient(_flatten(x, mask.ndim)) for x in arrays]
    found = mask.any()
    # Past the end where there is no element at all: what is taken is dropped then.
    first = jnp.argmax(mask.ravel()) if mask.size else 0
    constants = [
        1 / (2 + i) if jnp.issubdtype(x.dtype, jnp.floating) else 0
        for i, x in enumerate(arrays)
    ]
    taken = [x.at[first].get(mode="clip") if mask.size else x.sum(0) for x in elements]
    found, taken = _borrow(found, taken)
    return [
        make_safe(x, mask, jnp.where(found, own, jnp.asarray(constant, x.dtype)))
        for x, own, constant in zip(arrays, taken, constants, strict=True)
    ]


def _flatten(array: jax.Array, ndim: int) -> jax.Array:
    return array.reshape(-1, *array.shape[ndim:])


@jax.custom_batching.custom_vmap
def _borrow(
    found: jax.Array, taken: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """Under `jax.vmap`, gives a sample in which nothing counts another's element."""
    return found, taken


@_borrow.def_vmap
def _borrow_over_batch(
    axis_size: int, in_batched: Any, found: jax.Array, taken: list[jax.Array]
) -> Any:
    found, taken = (
        jax.tree.map(
            lambda x, batched: (
                x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            ),
            tree,
            is_batched,
        )
        for tree, is_batched in zip((found, taken), in_batched, strict=True)
    )
    lender = jnp.argmax(found)
    lent_found, lent = _borrow(found.any(), [x[lender] for x in taken])
    taken = [make_safe(x, found, other) for x, other in zip(taken, lent, strict=True)]
    found = found | lent_found
    return (found, taken), (True, [True] * len(taken))


def expand_leading(name: str, array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts ``array``, lined up with the leading axes of ``shape``, to it."""

    def mend() -> str:
        return (
            f"has shape {array.shape} and the loss {shape}: {name} lines up with the "
            f"leading axes of the loss, so {shape[: array.ndim]} is expected. "
            f"{_mend_alignment(name, array.shape, shape)}"
        )

    check_rank(name, array, range(len(shape) + 1), mend)
    check_shape(name, array, shape[: array.ndim], mend)
    if array.ndim == len(shape):
        return array
    return jax.lax.broadcast_in_dim(array, shape, range(array.ndim))


def _mend_alignment(name: str, came: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Says how to line up what does not, so that it means the same as before."""
    if any(map(is_symbolic, came + shape)):  # of symbols no order is known
        return "Index, reshape or transpose it, so that it has them."
    leading = came[: len(shape)]
    if came[len(shape) :].count(1) == len(came) - len(shape) and leading == shape:
        return f"Reshape it: `{name}.reshape({shape})`."
    try:
        fits = np.broadcast_shapes(came, shape) == shape
    except ValueError:
        fits = False
    if fits:
        return (
            "If it was meant for the axes that NumPy lines it up with, write "
            f"`jnp.broadcast_to({name}, {shape})`."
        )
    if sorted(came) == sorted(shape[: len(came)]):
        return "Transpose it, so that the loss's first axes come first."
    return "Index, reshape or transpose it, so that it has them."


def is_label(labels: jax.Array, label: int) -> jax.Array:
    """Marks the ``labels`` that are ``label``, which their dtype may not hold.

    `jnp.equal` would wrap it: for a uint32, -1 is 4294967295.
    """
    info = jnp.iinfo(labels.dtype)
    if info.min <= label <= info.max:
        return labels == jnp.asarray(np.asarray(label, labels.dtype))
    return jnp.zeros_like(labels, bool)
