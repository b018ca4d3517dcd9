"""A weighted mean that is not divided yet: `WeightedMean`, and how one is made.

Every loss of this package returns a `WeightedMean`. Across samples, microbatches,
devices, processes, steps and epochs there is only addition, of totals and of weights;
there is one guarded division, last, in `WeightedMean.compute`. That is all there is to
split invariance: sums do not depend on how their terms are grouped, means do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import (
    Any,
    Self,
)

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_axis,
    check_function,
)
from wloss_jax._devices import (
    AxisName,
    check_mapped,
    jit_compiled,
    psum,
)
from wloss_jax.masks import (
    expand_leading,
    valid_mask,
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False, init=False)
class WeightedMean:
    """Holds a weighted sum and the sum of its weights, still apart.

    ``mean = total / weight``

    A pytree, so that it passes through `jax.jit`, `jax.vmap` (which gives one of shape
    ``[B]``), `jax.lax.scan` and collectives. Divide once, last, with `compute`: a mean
    of means is what this class is there to avoid.

    Attributes:
      total: floating ``[...]``, the sum of weight times value.
      weight: floating ``[...]``, the sum of the weights; a constant for gradients.

    Raises:
      AssertionError: ``total`` or ``weight`` is not floating, or their shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> first, second = wl.WeightedMean(10.0, 8.0), wl.WeightedMean(5.0, 2.0)
      >>> first + second
      WeightedMean(mean=1.5, weight=10.0)
      >>> print(sum([first, second]).compute())
      1.5
    """

    total: jax.Array
    weight: jax.Array

    def __init__(self, total: ArrayLike, weight: ArrayLike):
        total, weight = (
            check_array(name, float(value) if type(value) is int else value, float)
            for name, value in (("total", total), ("weight", weight))
        )
        chex.assert_equal(
            total.shape,
            weight.shape,
            custom_message=f"`total` has shape {total.shape} and `weight` "
            f"{weight.shape}: they must be the same, one weight for each total.",
        )
        dtype = jnp.result_type(total, weight, jnp.float32)
        object.__setattr__(self, "total", jnp.asarray(total, dtype))
        object.__setattr__(self, "weight", jnp.asarray(weight, dtype))

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> Self:
        """Makes the identity of addition: nothing seen yet."""
        return cls(jnp.zeros(shape), jnp.zeros(shape))

    def __add__(self, other: WeightedMean) -> WeightedMean:
        if not isinstance(other, WeightedMean):
            return NotImplemented
        chex.assert_equal(
            self.total.shape,
            other.total.shape,
            custom_message="added `WeightedMean`s must have one shape: `merge` the "
            "batch axes first.",
        )
        return WeightedMean(self.total + other.total, self.weight + other.weight)

    def __radd__(self, other: int) -> WeightedMean:
        # `sum` starts from the integer 0.
        return self if type(other) is int and other == 0 else NotImplemented

    def merge(self, axis: int | tuple[int, ...] | None = None) -> WeightedMean:
        """Adds up batch axes, all of them by default: a [B] of means becomes one.

        Args:
          axis: the axis or axes to add up.

        Raises:
          AssertionError: ``axis`` is no integer, tuple of them, or None.

        Example:
          >>> import jax.numpy as jnp
          >>> import wloss_jax as wl
          >>> wl.WeightedMean(jnp.array([10.0, 5.0]), jnp.array([8.0, 2.0])).merge()
          WeightedMean(mean=1.5, weight=10.0)
        """
        check_axis("axis", axis)
        return WeightedMean(self.total.sum(axis), self.weight.sum(axis))

    def psum(self, axis_name: AxisName) -> WeightedMean:
        """Adds up over the devices of a mapped axis.

        For values. Around a gradient, use `wloss_jax.value_and_grad`: what the gradient
        of a `jax.lax.psum` means depends on the kind of map it stands in.

        Args:
          axis_name: the mapped axis, or a tuple of them.
        """
        check_mapped("axis_name", axis_name)
        return psum(self, axis_name)

    def compute(self, empty: ArrayLike = 0.0) -> jax.Array:
        """Divides: ``total / weight``, and ``empty`` where the weight is 0.

        The gradient is exactly 0 where the weight is 0, and none flows through the
        weight. No epsilon, and no floor under the weight: a mean of small weights is
        as good as one of large ones.

        Args:
          empty: the value where nothing counted, a number or of the shape of ``total``.

        Returns:
          floating ``[...]``, of the shape of ``total``.

        Raises:
          AssertionError: ``empty`` is not a number, nor an array of that shape.

        Example:
          >>> import jax.numpy as jnp
          >>> import wloss_jax as wl
          >>> nothing = wl.weighted_mean(jnp.array([jnp.nan]), where=jnp.array([False]))
          >>> print(nothing.compute(), nothing.compute(empty=jnp.nan))
          0.0 nan
        """
        empty = check_array("empty", empty)
        chex.assert_equal(
            empty.shape in ((), self.total.shape),
            True,
            custom_message=f"`empty` has shape {empty.shape}, and the mean "
            f"{self.total.shape}: pass a number, or one for each mean.",
        )
        weight = jax.lax.stop_gradient(self.weight)
        is_empty = weight == 0
        mean = self.total / jnp.where(is_empty, jnp.ones_like(weight), weight)
        return jnp.where(is_empty, jnp.asarray(empty, mean.dtype), mean)

    def reweight(self, fn: Callable[[jax.Array, jax.Array], jax.Array]) -> WeightedMean:
        """Gives each entry the weight ``fn(size, loss)`` and keeps its mean.

        ``size`` is the entry's weight and ``loss`` its mean, both constants for
        gradients. An empty entry stays empty, whatever ``fn`` says.

        Args:
          fn: a scheme, such as `wloss_jax.size_power` or `wloss_jax.loss_power` makes:
            two floating ``[...]`` to one of the same shape, finite and not negative.

        Returns:
          A `WeightedMean` of the same shape, usually to be merged next.

        Raises:
          AssertionError: ``fn`` returns another shape, or no floating array.

        Example:
          >>> import jax.numpy as jnp
          >>> import wloss_jax as wl
          >>> per_sample = wl.WeightedMean(jnp.array([8.0, 4.0]), jnp.array([8.0, 2.0]))
          >>> per_sample.merge()
          WeightedMean(mean=1.2, weight=10.0)
          >>> per_sample.reweight(wl.size_power(0.0)).merge()
          WeightedMean(mean=1.5, weight=2.0)
        """
        check_function("fn", fn)
        size = jax.lax.stop_gradient(self.weight)
        is_empty = size == 0
        # An empty entry goes through `fn` as one of size 1, so that no scheme has to
        # mind powers of 0.
        safe_size = jnp.where(is_empty, jnp.ones_like(size), size)
        loss = jax.lax.stop_gradient(self.compute())
        weight = check_array("fn(size, loss)", fn(safe_size, loss), float)
        chex.assert_equal(
            weight.shape,
            size.shape,
            custom_message=f"`fn` must return one weight for each entry: "
            f"{size.shape}, not {weight.shape}.",
        )
        weight = jnp.where(is_empty, 0, jax.lax.stop_gradient(weight))
        # In this order: of one weight over another there may be no float32.
        return WeightedMean(self.total / safe_size * weight, weight)

    def __repr__(self) -> str:
        try:
            return f"WeightedMean(mean={self.compute()!s}, weight={self.weight!s})"
        except Exception:  # a pytree of something else than arrays: specs, axes, None
            return f"WeightedMean(total={self.total!r}, weight={self.weight!r})"

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """Flattens to ``total`` and ``weight``."""
        keys = (jax.tree_util.GetAttrKey("total"), jax.tree_util.GetAttrKey("weight"))
        return tuple(zip(keys, (self.total, self.weight), strict=True)), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> Self:
        """Rebuilds without checks: JAX also unflattens specs, axes and placeholders."""
        self = object.__new__(cls)
        object.__setattr__(self, "total", children[0])
        object.__setattr__(self, "weight", children[1])
        return self


@jit_compiled("num_segments")
def weighted_mean(
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> WeightedMean:
    """Reduces all of ``values`` to one `WeightedMean`.

    ``total = sum_i w_i v_i``, ``weight = sum_i w_i``, over the elements that count

    A masked element is gone, whatever it holds; NaN at an element that counts stays
    visible, and a weight of 0 is no mask: 0 times NaN is NaN. The inputs of a loss must
    be safe *before* the loss sees them, or NaN comes back in its gradient: for that,
    use `wloss_jax.masked` or one of the losses rather than masking values here.

    Args:
      values: floating ``[...]``, elementwise losses, ``[B, L]`` say. bfloat16 and
        float16 are summed in float32.
      where: bool, lined up with the leading axes of ``values``; True counts.
      lengths: integer, of the shape of the axes before the one that it bounds: ``[B]``
        for ``[B, L]``, ``[]`` for ``[L]``. Positions from a length on do not count.
      weights: floating, lined up with the leading axes of ``values``, not negative; how
        much an element counts. 1 by default. No gradient flows through it.
      segment_ids: integer, lined up with the leading axes of ``values``: which of the
        packed samples an element belongs to. Ids outside ``[0, num_segments)`` are
        padding.
      num_segments: the static number of packed samples.

    Returns:
      A scalar `WeightedMean`, or one of ``[num_segments]`` with ``segment_ids``.

    Raises:
      AssertionError: a dtype or a shape that does not fit; the message names the
        argument, what came, what was expected, and how to mend it.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> values = jnp.array([[1.0, 2.0, jnp.nan], [6.0, jnp.nan, jnp.nan]])
      >>> wl.weighted_mean(values, lengths=jnp.array([2, 1]))
      WeightedMean(mean=3.0, weight=3.0)
      >>> ids = jnp.array([[0, 0, -1], [1, -1, -1]])
      >>> wl.weighted_mean(values, segment_ids=ids, num_segments=2)
      WeightedMean(mean=[1.5 6. ], weight=[2. 1.])
    """
    values = check_array("values", values, float)
    dtype = jnp.result_type(values, jnp.float32)
    if weights is not None:
        weights = jax.lax.stop_gradient(check_array("weights", weights, float))
        dtype = jnp.result_type(dtype, weights)
        weights = expand_leading("weights", weights.astype(dtype), values.shape)
    mask = valid_mask(
        values.shape,
        where=where,
        lengths=lengths,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    add_up = functools.partial(
        _add_up, segment_ids=segment_ids, num_segments=num_segments
    )
    values = values.astype(dtype)
    if mask is not None:
        values = jnp.where(mask, values, 0)
    if weights is None:
        if mask is None:
            count = jnp.asarray(values.size, dtype)
        elif segment_ids is not None:
            count = add_up(mask.astype(jnp.int32))
        elif where is None and lengths is not None:
            count = _count_lengths(lengths, values.shape)
        else:
            count = _count(mask)
        return WeightedMean(add_up(values), count.astype(dtype))
    if mask is not None:
        weights = jnp.where(mask, weights, 0)
    return WeightedMean(add_up(values * weights), add_up(weights))


def _add_up(
    x: jax.Array, segment_ids: ArrayLike | None, num_segments: int | None
) -> jax.Array:
    if segment_ids is None or num_segments is None:
        return x.sum()
    ids = jnp.asarray(segment_ids)
    x = x.sum(axis=tuple(range(ids.ndim, x.ndim)))
    # XLA (jax 0.10, 0.12) pads rows that it shares out among more devices with what it
    # finds, and may add that to the first sum: so one more is made, and dropped.
    sums = jax.ops.segment_sum(x.ravel(), ids.ravel() + 1, num_segments + 1)
    return sums[1:]


def _count_lengths(lengths: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Counts what `wloss_jax.length_mask` marks, without looking at a mask."""
    lengths = check_array("lengths", lengths, int)
    size, *rest = shape[lengths.ndim :]
    counts = jnp.clip(lengths, 0, size).astype(jnp.int32)
    return counts.sum() * math.prod(rest)


def _count(mask: jax.Array) -> jax.Array:
    """Counts exactly, in the form that each backend is fast at.

    A plain sum of integers, which is exact too, costs on CPU a third of the two-head
    loss with its gradient (XLA writes out an integer for each element, unless few are
    added up at a time), and on TPU it takes 51 bytes an element where a sum of
    floating numbers takes 30.
    """
    *rows, size = mask.shape or (1,)
    few = math.gcd(size, 16)

    def few_at_a_time(mask: jax.Array) -> jax.Array:
        groups = mask.reshape(*rows, few, size // few)
        return groups.sum(-2, dtype=jnp.uint8).astype(jnp.int32).sum()

    def row_by_row(mask: jax.Array) -> jax.Array:
        exact = jnp.float32 if size <= 2**24 else jnp.int32
        return mask.reshape(*rows, size).sum(-1, dtype=exact).astype(jnp.int32).sum()

    count: jax.Array = jax.lax.platform_dependent(
        mask, cpu=few_at_a_time, default=row_by_row
    )
    return count
