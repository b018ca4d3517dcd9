"""`masked`, which makes any elementwise loss safe to mask, and `per_sample`.

A loss is an elementwise loss between two guards: what stands at a masked position is
made harmless *before* the loss sees it, and the loss there is dropped *after*. The
second alone lets NaN into the gradient, for 0 times NaN is NaN. bfloat16 and float16
are computed in float32.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import (
    Any,
    TypedDict,
    TypeVar,
)

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_axis,
    check_count,
    check_function,
)
from wloss_jax._devices import (
    jit_compiled,
)
from wloss_jax.losses._labels import nan_unless
from wloss_jax.masks import (
    freeze,
    make_safe,
    valid_mask,
)
from wloss_jax.means import WeightedMean, weighted_mean

_Loss = TypeVar("_Loss", bound=Callable[..., WeightedMean])
Axis = int | tuple[int, ...] | None


class Reduction(TypedDict, total=False):
    """The keywords that every loss shares; `weighted_mean` says what they mean."""

    where: ArrayLike | None
    lengths: ArrayLike | None
    weights: ArrayLike | None
    segment_ids: ArrayLike | None
    num_segments: int | None


_SHARED = tuple(Reduction.__annotations__)


def masked(
    loss_fn: Callable[..., jax.Array], *, event_ndim: int = 0
) -> Callable[..., WeightedMean]:
    """Gives an elementwise loss the keywords of `weighted_mean`.

    ``masked(f)(x, y, **keywords) = weighted_mean(f(x, y), **keywords)``, NaN-safe

    What a masked position holds changes neither the value nor any gradient, and the
    gradient there is exactly 0, even where ``f`` has none.

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
    check_count("event_ndim", event_ndim)
    return guarded(loss_fn, event_ndim, of_user=True, hides_nan=True)


def guarded(
    loss_fn: Callable[..., jax.Array],
    event_ndim: int = 0,
    *,
    of_user: bool = False,
    hides_nan: bool = False,
) -> Callable[..., WeightedMean]:
    """`masked`, and what is cheaper for the losses of this package.

    Args:
      loss_fn: as in `masked`.
      event_ndim: as in `masked`.
      of_user: whether ``loss_fn`` may close over arrays. Their gradient adds up over
        all positions, so no NaN may arise at any: inputs are made safe. Else masked
        positions are frozen, and what arises there is dropped: on CPU `make_safe` costs
        a third to a half more in the losses of classes (XLA fuses no select into sums).
      hides_nan: whether ``loss_fn`` may have a derivative where it is NaN, as
        `jnp.maximum` has, 0. Where not, looking for NaN costs up to a half for nothing.
    """
    names = _array_names(loss_fn)

    @functools.wraps(loss_fn)
    def masked_loss(*arrays: ArrayLike, **keywords: Any) -> WeightedMean:
        reduction = {k: v for k, v in keywords.items() if k in _SHARED}
        options = {k: v for k, v in keywords.items() if k not in _SHARED}
        data = _check_data(_name_all(names, arrays), arrays, event_ndim)
        shape = data[0].shape[: data[0].ndim - event_ndim]
        mask = valid_mask(shape, **without_weights(reduction))
        if mask is not None:
            data = [
                make_safe(array, mask, i) if of_user else freeze(array, mask)
                for i, array in enumerate(data)
            ]
        values = loss_fn(*map(at_least_float32, data), **options)
        values = check_array("loss_fn(...)", values, float)
        chex.assert_shape(
            values,
            shape,
            custom_message=f"`loss_fn` must return one value for each element. With "
            f"event_ndim={event_ndim} the elements are {shape}.",
        )
        if hides_nan:
            values *= nan_unless(~jnp.isnan(values)).astype(values.dtype)
        return weighted_mean(values, **reduction)

    return masked_loss


def per_sample(loss: Callable[..., WeightedMean]) -> Callable[..., WeightedMean]:
    """Vmaps a loss: axis 0 of the data is the batch, and stays.

    ``per_sample(f)(x, y, lengths=n)[b] = f(x[b], y[b], lengths=n[b])``

    Mapped are the arrays and ``where``, ``lengths``, ``weights``, ``segment_ids``;
    shared by all samples are the options, ``class_weights``, ``kernel`` and ``bias``.

    Args:
      loss: a loss of this package, or any function with such arguments.

    Returns:
      A function of the same arguments that returns a `WeightedMean` of ``[B]``.

    Raises:
      AssertionError: the mapped arguments have no axis 0, or not all the same.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> x = jnp.array([[1.0, 2.0, 3.0], [5.0, 0.0, 0.0]])
      >>> lengths = jnp.array([3, 1])
      >>> wl.per_sample(wl.absolute_error)(x, jnp.zeros((2, 3)), lengths=lengths)
      WeightedMean(mean=[2. 5.], weight=[3. 1.])
    """
    check_function("loss", loss)
    names = _array_names(loss)

    @functools.wraps(loss)
    def per_sample_loss(*arrays: ArrayLike, **keywords: Any) -> WeightedMean:
        positional = dict(zip(_name_all(names, arrays), arrays, strict=True))
        mapped = {
            name: check_array(name, value)
            for name, value in (positional | keywords).items()
            if name in positional or name in names or name in _MAPPED
            if name not in _UNMAPPED and value is not None
        }
        sizes = {name: array.shape[:1] for name, array in mapped.items()}
        chex.assert_equal(
            len(set(sizes.values())) == 1 and () not in sizes.values(),
            True,
            custom_message="axis 0 of each array is the batch, and must be there and "
            f"the same; got { ({k: v.shape for k, v in mapped.items()}) }.",
        )
        shared = {k: v for k, v in keywords.items() if k not in mapped}

        def sample_loss(sample: dict[str, jax.Array]) -> WeightedMean:
            data = [sample.get(name, array) for name, array in positional.items()]
            keyed = {k: v for k, v in sample.items() if k not in positional}
            return loss(*data, **keyed, **shared)

        return jax.vmap(sample_loss)(mapped)

    return per_sample_loss


_MAPPED = ("where", "lengths", "weights", "segment_ids")
_UNMAPPED = ("kernel", "bias", "class_weights")


def _array_names(loss: Callable[..., Any]) -> list[str]:
    """The names of the positional parameters: the arrays.

    One with a default is an option of the user's, unless the default is None, as that
    of the targets is in optax.
    """
    return [
        name
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind
        in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if parameter.default is parameter.empty or parameter.default is None
    ]


def _name_all(names: list[str], arrays: tuple[ArrayLike, ...]) -> list[str]:
    """Names each of ``arrays``, those that a ``*args`` took by their number."""
    unnamed = [f"array {i}" for i in range(len(names), len(arrays))]
    return (names + unnamed)[: len(arrays)]


def _check_data(
    names: list[str], arrays: tuple[ArrayLike, ...], event_ndim: int
) -> list[jax.Array]:
    chex.assert_equal(
        bool(arrays), True, custom_message="a loss takes its arrays by position."
    )
    data = [
        check_array(name, array, None if i else float)
        for i, (name, array) in enumerate(zip(names, arrays, strict=True))
    ]
    first = data[0]
    chex.assert_rank(
        first,
        set(range(event_ndim, 33)),
        custom_message=f"`{names[0]}` has shape {first.shape}, but the loss consumes "
        f"{event_ndim} trailing axes of it.",
    )
    for name, array in zip(names[1:], data[1:], strict=True):
        fits = array.shape == first.shape[: array.ndim]
        chex.assert_equal(
            fits and first.ndim - event_ndim <= array.ndim,
            True,
            custom_message=f"`{name}` has shape {array.shape} and `{names[0]}` "
            f"{first.shape}: they must be the same"
            + (f", or lack the last {event_ndim}" if event_ndim else "")
            + ". Nothing is broadcast: index or reshape the one that is off.",
        )
    return data


def without_weights(reduction: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that say which elements count; `weights` says how much."""
    return {name: value for name, value in reduction.items() if name != "weights"}


def at_least_float32(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return array


def public_loss(loss: _Loss) -> _Loss:
    """Compiles a loss, its options static, and spells out the shared keywords."""
    signature = inspect.signature(loss)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _SHARED
    ]
    loss.__signature__ = signature.replace(parameters=own + shared)  # type: ignore[attr-defined]
    options = [p.name for p in own if p.kind is p.KEYWORD_ONLY]
    static = [name for name in options if name != "class_weights"]
    return jit_compiled("num_segments", *static)(loss)


def event_last(axis: Axis, **arrays: ArrayLike) -> list[jax.Array]:
    """Moves the axes of one event to the end of each array, as one axis."""
    check_axis("axis", axis)
    checked = {name: check_array(name, array) for name, array in arrays.items()}
    (first_name, first), *others = checked.items()
    for name, array in others:
        chex.assert_equal(
            array.shape,
            first.shape,
            custom_message=f"`{name}` and `{first_name}` must have the same shape.",
        )
    chex.assert_rank(
        first,
        set(range(1, 33)),
        custom_message=f"`{first_name}` needs an axis for the classes or components.",
    )
    event = tuple(range(first.ndim)) if axis is None else axis
    event = np.lib.array_utils.normalize_axis_tuple(event, first.ndim, argname="axis")
    size = math.prod(first.shape[i] for i in event)
    chex.assert_equal(
        size > 0,
        True,
        custom_message=f"`{first_name}` has shape {first.shape}: it needs at least one "
        "class or component.",
    )
    if axis == -1:
        return list(checked.values())
    batch = tuple(i for i in range(first.ndim) if i not in event)
    shape = (*(first.shape[i] for i in batch), size)
    return [array.transpose(batch + event).reshape(shape) for array in checked.values()]
