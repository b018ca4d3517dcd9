"""A weighted mean that is not divided yet: `WeightedMean`, and how one is made.

Every loss of this package returns a `WeightedMean`. Across samples, microbatches,
devices, processes, steps and epochs there is only addition, of totals and of weights;
there is one guarded division, last, in `WeightedMean.compute`. That is all there is to
split invariance: sums do not depend on how their terms are grouped, means do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._arithmetic import NotForJson, refuse, without_arithmetic
from wloss_jax._checks import (
    check_array,
    check_axis,
    check_function,
    check_value,
    is_integer,
)
from wloss_jax._counting import what_counts
from wloss_jax._devices import (
    AxisName,
    align_axes,
    check_mapped,
    compiled_by_option,
    jit_compiled,
    psum,
)
from wloss_jax._division import divide, size_and_loss, weigh


@without_arithmetic(
    "It takes no arithmetic but `+` with another. To weigh the terms of a loss, pass "
    "`coefficients` to `wloss_jax.value_and_grad`; for another formula, `combine`."
)
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False, init=False)
class WeightedMean(NotForJson):
    """Holds a weighted sum and the sum of its weights, still apart.

    ``mean = total / weight``

    A pytree, so that it passes through `jax.jit`, `jax.vmap` (which gives one of shape
    ``[B]``), `jax.lax.scan` and collectives. Divide once, last, with `compute`: a mean
    of means is what this class is there to avoid.

    Attributes:
      total: floating ``[...]``, the sum of weight times value.
      weight: floating ``[...]``, the sum of the weights; a constant for gradients.

    Raises:
      AssertionError: ``total`` or ``weight`` is no array of numbers, or their shapes
        differ.

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
        total, weight = _as_sum("total", total), _as_sum("weight", weight)
        check_value(
            "total",
            total.shape == weight.shape,
            f"has shape {total.shape} and `weight` {weight.shape}: they must be the "
            "same, one weight for each total.",
        )
        dtype = jnp.result_type(total, weight, jnp.float32)
        object.__setattr__(self, "total", jnp.asarray(total, dtype))
        weight = align_axes(self.total, jnp.asarray(weight, dtype))
        object.__setattr__(self, "weight", weight)

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> Self:
        """Makes the identity of addition: nothing seen yet."""
        return cls.tree_unflatten(None, (jnp.zeros(shape), jnp.zeros(shape)))

    def __add__(self, other: WeightedMean) -> WeightedMean:
        if not isinstance(other, WeightedMean):
            refuse(self)
        check_value(
            "total",
            self.total.shape == other.total.shape,
            f"has shape {self.total.shape} here and {other.total.shape} there: added "
            "`WeightedMean`s must have one shape. `merge` the batch axes first.",
        )
        return _add(self, other)

    def __radd__(self, other: int) -> WeightedMean:
        # `sum` starts from the integer 0.
        if type(other) is int and other == 0:
            return self
        refuse(self)

    def merge(self, axis: int | tuple[int, ...] | None = None) -> WeightedMean:
        """Adds up batch axes, all of them by default: a [B] of means becomes one.

        Args:
          axis: the axis or axes to add up.

        Raises:
          AssertionError: ``axis`` is no axis of it, tuple of them, or None.

        Example:
          >>> import jax.numpy as jnp
          >>> import wloss_jax as wl
          >>> wl.WeightedMean(jnp.array([10.0, 5.0]), jnp.array([8.0, 2.0])).merge()
          WeightedMean(mean=1.5, weight=10.0)
        """
        if axis is None:
            return _merge_all(self)
        check_axis("axis", axis, self.total.ndim)
        return _merge(self, axis=axis)

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
        """Divides: ``total / weight``, and ``empty`` where nothing counted.

        Nothing counted where both sums are 0. A total without a weight, of weights that
        cancel, is not empty: it shows, as infinity. Where the weight is 0 the gradient
        is exactly 0, and none ever flows through the weight. No epsilon, and no floor
        under the weight: a mean of small weights is as good as one of large ones.

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
        return divide(self.total, self.weight, empty)

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
        if getattr(fn, "is_value", False):
            return _reweight(self, fn=fn)
        size, loss = size_and_loss(self.total, self.weight)
        weight = check_array("fn(size, loss)", fn(size, loss), float)
        check_value(
            "fn",
            weight.shape == self.weight.shape,
            "must return one weight for each entry: "
            f"{self.weight.shape}, not {weight.shape}.",
        )
        return WeightedMean(*weigh(self.total, self.weight, weight))

    def __float__(self) -> float:
        check_value(
            "float(m)",
            self.total.shape == (),
            f"is of one mean, and `m` holds {self.total.shape}: `m.merge()` first, or "
            "`m.compute()` for all of them.",
        )
        return float(self.compute())

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __repr__(self) -> str:
        try:
            return f"WeightedMean(mean={self.compute()!s}, weight={self.weight!s})"
        except Exception:  # a pytree of something else than arrays: specs, axes, None
            return f"WeightedMean(total={self.total!r}, weight={self.weight!r})"

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """Flattens to ``total`` and ``weight``."""
        return ((_TOTAL, self.total), (_WEIGHT, self.weight)), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> Self:
        """Rebuilds without checks: JAX also unflattens specs, axes and placeholders."""
        self = object.__new__(cls)
        object.__setattr__(self, "total", children[0])
        object.__setattr__(self, "weight", children[1])
        return self


_TOTAL, _WEIGHT = map(jax.tree_util.GetAttrKey, ("total", "weight"))


def _as_sum(name: str, value: ArrayLike) -> jax.Array:
    """Checks a sum of numbers; a count may come as an integer."""
    # A count as a Python integer is exact; as an int32 array it may have wrapped.
    exact = float(cast(int, value)) if is_integer(value) else value
    array = check_array(name, exact)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array if floating else array.astype(jnp.float32)


@jit_compiled()
def _add(a: WeightedMean, b: WeightedMean) -> WeightedMean:
    return WeightedMean(a.total + b.total, a.weight + b.weight)


@jit_compiled("axis")
def _merge(m: WeightedMean, *, axis: int | tuple[int, ...] | None) -> WeightedMean:
    return WeightedMean(m.total.sum(axis), m.weight.sum(axis))


@jit_compiled()
def _merge_all(m: WeightedMean) -> WeightedMean:
    return WeightedMean(m.total.sum(), m.weight.sum())


@jit_compiled("fn")
def _reweight(m: WeightedMean, *, fn: Callable[..., jax.Array]) -> WeightedMean:
    weight = fn(*size_and_loss(m.total, m.weight))
    return WeightedMean(*weigh(m.total, m.weight, weight))


@compiled_by_option
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

    A masked element is gone, whatever it holds, and so is one whose weight is exactly
    0; NaN at an element that counts stays visible. The inputs of a loss must be safe
    *before* the loss sees them, or NaN comes back in its gradient: for that, use
    `wloss_jax.masked` or one of the losses rather than masking values here.

    Args:
      values: ``[...]``, elementwise losses, ``[B, L]`` say. bfloat16 and float16 are
        summed in float32, and so are integers and bools (whether a prediction was
        correct: the mean is the accuracy).
      where: bool, lined up with the leading axes of ``values``; True counts.
      lengths: integer, of the shape of the axes before the one that it bounds: ``[B]``
        for ``[B, L]``, ``[]`` for ``[L]``. Positions from a length on do not count.
      weights: numbers, lined up with the leading axes of ``values``, not negative; how
        much an element counts. 1 by default. No gradient flows through it. Only their
        ratios matter; past a sum of 2**126, 8.5e37, the mean is still right, but
        devices take ``1 / weight`` for 0 in float32, and the gradient with it.
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
    values = check_array("values", values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.float32)
    counts = what_counts(
        values.shape,
        where=where,
        lengths=lengths,
        weights=weights,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    return WeightedMean(*counts.add_up(values))
