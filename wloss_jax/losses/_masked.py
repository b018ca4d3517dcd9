"""`masked`, which makes any elementwise loss safe to mask.

A loss is an elementwise loss between two guards: what stands at a masked position is
made harmless *before* the loss sees it, and the loss there is dropped *after*. The
second alone lets NaN into the gradient, for 0 times NaN is NaN. bfloat16 and float16
are computed in float32.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_axis,
    check_count,
    check_function,
    check_rank,
    check_shape,
    check_value,
    is_traced,
)
from wloss_jax._counting import SHARED, Reduction, what_counts
from wloss_jax._devices import (
    compiled_by_option,
    explicit_mesh,
    on_auto_axes,
    sharded_like,
)
from wloss_jax._jaxprs import with_closed_over
from wloss_jax._keywords import POSITIONAL, check_keywords
from wloss_jax.losses._labels import nan_unless
from wloss_jax.masks import fill_masked, freeze, select
from wloss_jax.means import WeightedMean, weighted_mean

__all__ = ["Reduction"]  # for the chapters beside this one

_Loss = TypeVar("_Loss", bound=Callable[..., WeightedMean])
Axis = int | tuple[int, ...] | None


def masked(
    loss_fn: Callable[..., jax.Array], *, event_ndim: int = 0
) -> Callable[..., WeightedMean]:
    """Gives an elementwise loss the keywords of `weighted_mean`.

    ``masked(f)(x, y, **keywords) = weighted_mean(f(x, y), **keywords)``, NaN-safe

    What a masked position holds changes neither the value nor any gradient, and the
    gradient there is exactly 0, even where ``f`` has none. ``f`` sees the first element
    that counts in its place, so that it never leaves its domain; numbers between 0 and
    1 where nothing counts at all, in an empty microbatch say, and then what ``f``
    closes over has a gradient of 0. Arrays of ``[B, L]`` that ``f`` closes over are not
    known here, so not made safe: hand them in.

    Args:
      loss_fn: arrays, positional and of one shape, to the loss of each element. Keyword
        arguments go to it untouched, except those of `weighted_mean`.
      event_ndim: trailing axes of the first array that ``loss_fn`` consumes: 1 for
        class logits ``[B, L, V]``, whose loss is ``[B, L]``. Further arrays may lack
        all or the last of them, as integer labels ``[B, L]`` do.

    Returns:
      A function of the same arrays that returns a `WeightedMean`.

    Raises:
      AssertionError: when called with a first array that is not floating, arrays whose
        shapes differ (nothing is broadcast), or a ``loss_fn`` whose result is not one
        floating value for each element; and what `weighted_mean` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> relative_error = wl.masked(lambda x, y: jnp.abs(x - y) / y)
      >>> x, y = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([2.0, 2.0, 0.0])
      >>> relative_error(x, y, where=y > 0)
      WeightedMean(mean=0.5, weight=2.0)
    """
    check_function("loss_fn", loss_fn)
    event_ndim = check_count("event_ndim", event_ndim)
    return guarded(loss_fn, event_ndim, fills_masked=True, marks_nan=True)


def guarded(
    loss_fn: Callable[..., jax.Array],
    event_ndim: int = 0,
    *,
    fills_masked: bool = False,
    marks_nan: bool = False,
) -> Callable[..., WeightedMean]:
    """Makes `masked` of a loss, by the cheapest guards that it can do with.

    Args:
      loss_fn: as in `masked`.
      event_ndim: as in `masked`.
      fills_masked: puts an element that counts in the place of masked ones. A must for
        a ``loss_fn`` that closes over arrays: their gradient adds up over all
        positions, so that no NaN may arise at any. By default masked positions are
        frozen, and what arises there is dropped: on CPU filling costs a third to a half
        more in the losses of classes (XLA fuses no select into sums).
      marks_nan: makes NaN of the gradient too where a value is NaN. A must for a
        ``loss_fn`` that may have a derivative where it is NaN, as `jnp.maximum` has, 0;
        where not, looking for NaN costs up to a half for nothing.
    """
    names = array_names(loss_fn)
    signature = _with_shared_keywords(loss_fn)

    @functools.wraps(loss_fn)
    def masked_loss(*arrays: ArrayLike, **keywords: Any) -> WeightedMean:
        check_keywords(signature, keywords, len(arrays))
        reduction = {k: v for k, v in keywords.items() if k in SHARED}
        options = {k: v for k, v in keywords.items() if k not in SHARED}
        data = _check_data(name_all(names, arrays), arrays, event_ndim)
        shape = data[0].shape[: data[0].ndim - event_ndim]

        def elementwise(data: list[jax.Array]) -> jax.Array:
            values = loss_fn(*map(at_least_float32, data), **options)
            values = check_array("loss_fn(...)", values, float)
            check_shape(
                "loss_fn(...)",
                values,
                shape,
                f"has shape {values.shape}: one value for each element is expected, "
                f"{shape} with event_ndim={event_ndim}.",
            )
            return values

        def marked(values: jax.Array) -> jax.Array:
            if not marks_nan:
                return values
            mark = on_auto_axes(_mark_nan, jax.typeof(values).sharding.spec)
            values = mark(values)
            return values

        # The gradient of a traced option, too, adds up over all positions.
        fills = fills_masked or any(map(is_traced, options.values()))
        if fills_masked and explicit_mesh((data, reduction)) is not None:
            data, found = _fill_on_auto_axes(data, shape, reduction)
            values = _constant_unless(found, elementwise, data)
            return weighted_mean(marked(values), **reduction)
        counts = what_counts(shape, **reduction)
        if counts.mask is None:  # all count: there is nothing to be safe from
            values = elementwise(data)
        elif fills_masked:
            data = fill_masked(data, counts.mask)
            values = _constant_unless(counts.mask.any(), elementwise, data)
        elif fills:
            values = elementwise(fill_masked(data, counts.mask))
        else:
            values = elementwise([freeze(array, counts.mask) for array in data])
        return WeightedMean(*counts.add_up(marked(values)))

    vars(masked_loss)["__signature__"] = signature
    return masked_loss


def _mark_nan(values: jax.Array) -> jax.Array:
    """Multiplies by NaN where a value is NaN, so that its gradient is NaN too."""
    is_number = jax.lax.eq(values, values)
    return jax.lax.mul(values, nan_unless(is_number, values.dtype))


def _constant_unless(
    found: jax.Array,
    elementwise: Callable[[list[jax.Array]], jax.Array],
    data: list[jax.Array],
) -> jax.Array:
    """The loss; what it closes over has no gradient unless something was ``found``.

    Where nothing counts, a microbatch say, the loss sees numbers that may be outside of
    its domain. Its values are dropped there, but 0 times a slope of NaN is NaN.
    """

    def change(constant: Any) -> Any:
        if not isinstance(constant, jax.core.Tracer):
            return constant
        if not jnp.issubdtype(constant.dtype, jnp.floating):
            return constant
        return jax.lax.select(found, constant, jax.lax.stop_gradient(constant))

    if not any(isinstance(x, jax.core.Tracer) for x in (found, *data)):
        # Outside of all transformations, nothing is traced again on every call.
        values = elementwise(data)
        if not isinstance(values, jax.core.Tracer):
            return values
    return with_closed_over(change, elementwise, data)


def _fill_on_auto_axes(
    data: list[jax.Array], shape: tuple[int, ...], reduction: dict[str, Any]
) -> tuple[list[jax.Array], jax.Array]:
    """`fill_masked`, whose results are sharded like the first array, and its `any`.

    The loss of a user, which may close over arrays of the mesh, stays outside.
    """
    given = {k: v for k, v in reduction.items() if v is not None}
    num_segments = given.pop("num_segments", None)

    def fill(
        data: list[jax.Array], given: dict[str, Any]
    ) -> tuple[list[jax.Array], jax.Array]:
        mask = what_counts(shape, **given, num_segments=num_segments).mask
        if mask is None:
            return data, jnp.array(True)
        return fill_masked(data, mask), mask.any()

    specs = [sharded_like(data[0], array) for array in data]
    on_auto = on_auto_axes(fill, (specs, PartitionSpec()))
    if not any(isinstance(array, jax.core.Tracer) for array in data):
        on_auto = jax.jit(on_auto)  # outside of a jit, JAX needs the mesh in a context
    filled: tuple[list[jax.Array], jax.Array] = on_auto(data, given)
    return filled


def array_names(loss: Callable[..., Any]) -> list[str]:
    """The names of the positional parameters: the arrays.

    One with a default is an option of the user's, unless the default is None, as that
    of the targets is in optax.
    """
    return [
        name
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind in POSITIONAL
        if parameter.default is parameter.empty or parameter.default is None
    ]


def name_all(names: list[str], arrays: tuple[ArrayLike, ...]) -> list[str]:
    """Names each of ``arrays``, those that a ``*args`` took by their number."""
    unnamed = [f"array {i}" for i in range(len(names), len(arrays))]
    return (names + unnamed)[: len(arrays)]


def _check_data(
    names: list[str], arrays: tuple[ArrayLike, ...], event_ndim: int
) -> list[jax.Array]:
    check_value(
        (names or ["predictions"])[0],
        bool(arrays),
        "is missing: arrays go by position.",
    )
    data = [
        check_array(name, array, None if i else float)
        for i, (name, array) in enumerate(zip(names, arrays, strict=True))
    ]
    first = data[0]
    check_rank(
        f"{names[0]}",
        first,
        set(range(event_ndim, 33)),
        f"has shape {first.shape}, but the loss consumes "
        f"{event_ndim} trailing axes of it.",
    )
    for name, array in zip(names[1:], data[1:], strict=True):
        fits = array.shape == first.shape[: array.ndim]
        check_value(
            f"{name}",
            fits and first.ndim - event_ndim <= array.ndim,
            f"has shape {array.shape} and `{names[0]}` "
            f"{first.shape}: they must be the same"
            + (f", or lack the last {event_ndim}" if event_ndim else "")
            + ". Nothing is broadcast: index or reshape the one that is off.",
        )
    return data


def at_least_float32(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return array


def not_below_zero(values: jax.Array) -> jax.Array:
    """Makes 0 of what rounding took below 0, and keeps its gradient.

    A root of it, as in `wloss_jax.loss_power`, would be NaN. What is further below 0
    than rounding takes it is no rounding, and stays.
    """
    constant = jax.lax.stop_gradient(values)
    lowest = -64 * float(jnp.finfo(values.dtype).eps)
    zero, low = (jax.lax.full_like(constant, x) for x in (0, lowest))
    is_rounding = jax.lax.bitwise_and(
        jax.lax.lt(constant, zero), jax.lax.gt(constant, low)
    )
    return jax.lax.sub(values, select(is_rounding, constant, zero))


def public_loss(loss: _Loss) -> _Loss:
    """Compiles a loss, and spells out the shared keywords in its signature."""
    return compiled_by_option(spell_out(loss))


def spell_out(loss: _Loss) -> _Loss:
    """Spells out the shared keywords in the signature of a loss."""
    vars(loss)["__signature__"] = _with_shared_keywords(loss)
    return loss


def _with_shared_keywords(loss: Callable[..., Any]) -> inspect.Signature:
    """The signature of ``loss`` and the keywords of `weighted_mean`."""
    signature = inspect.signature(loss)
    own = list(signature.parameters.values())
    # A `**reduction` of our own stands for the shared keywords alone.
    rest = [p for p in own if p.kind is p.VAR_KEYWORD and p.name != "reduction"]
    own = [p for p in own if p.kind is not p.VAR_KEYWORD and p.name not in SHARED]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in SHARED
    ]
    return inspect.Signature(own + shared + rest)


def event_last(axis: Axis, mend: str = "", **arrays: ArrayLike) -> list[jax.Array]:
    """Moves the axes of one event to the end of each array, as one axis.

    Args:
      axis: the axis or axes of an event; None for all.
      mend: what to say, with a space before it, where shapes are not the same.
      **arrays: by name.
    """
    checked = {name: check_array(name, array) for name, array in arrays.items()}
    (first_name, first), *others = checked.items()
    for name, array in others:
        check_value(
            f"{name}",
            array.shape == first.shape,
            f"has shape {array.shape} and `{first_name}` {first.shape}: they must be "
            f"the same.{mend}",
        )
    check_rank(
        f"{first_name}",
        first,
        set(range(1, 33)),
        "needs an axis for the classes or components.",
    )
    check_axis("axis", axis, first.ndim)
    event = tuple(range(first.ndim)) if axis is None else axis
    event = np.lib.array_utils.normalize_axis_tuple(event, first.ndim, argname="axis")
    size = math.prod(first.shape[i] for i in event)
    check_value(
        f"{first_name}",
        size > 0,
        f"has shape {first.shape}: it needs at least one class or component.",
    )
    if axis == -1:
        return list(checked.values())
    batch = tuple(i for i in range(first.ndim) if i not in event)
    shape = (*(first.shape[i] for i in batch), size)
    return [array.transpose(batch + event).reshape(shape) for array in checked.values()]
