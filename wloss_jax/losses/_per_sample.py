"""`per_sample`: the vmapped form of a loss, which keeps the batch axis."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from wloss_jax._checks import check_array, check_function, check_value
from wloss_jax._devices import align_rows, compiled_by_option, is_compiled
from wloss_jax.losses._masked import array_names, name_all
from wloss_jax.means import WeightedMean


def per_sample(loss: Callable[..., WeightedMean]) -> Callable[..., WeightedMean]:
    """Vmaps a loss: axis 0 of the data is the batch, and stays.

    ``per_sample(f)(x, y, lengths=n)[b] = f(x[b], y[b], lengths=n[b])``

    Mapped are the arrays and ``where``, ``lengths``, ``weights``, ``segment_ids``;
    shared by all samples are the options, ``class_weights``, ``kernel``, ``bias``, and
    a ``class_mask`` of ``[V]``.

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
    return _of_public(loss) if is_compiled(loss) else _vmapped(loss)


@functools.cache
def _of_public(loss: Callable[..., WeightedMean]) -> Callable[..., WeightedMean]:
    """`per_sample` of a loss that is compiled, compiled as well."""
    return compiled_by_option(_vmapped(loss))


def _vmapped(loss: Callable[..., WeightedMean]) -> Callable[..., WeightedMean]:
    names = array_names(loss)

    @functools.wraps(loss)
    def per_sample_loss(*arrays: ArrayLike, **keywords: Any) -> WeightedMean:
        positional = dict(zip(name_all(names, arrays), arrays, strict=True))
        mapped = {
            name: check_array(name, value)
            for name, value in (positional | keywords).items()
            if name in positional or name in names or name in _MAPPED
            if value is not None and not _is_shared(name, value)
        }
        check_value((names or ["predictions"])[0], bool(mapped), "is missing.")
        _check_batch({name: array.shape for name, array in mapped.items()})
        shared = {k: v for k, v in keywords.items() if k not in mapped}

        def sample_loss(sample: dict[str, jax.Array]) -> WeightedMean:
            data = [sample.get(name, array) for name, array in positional.items()]
            keyed = {k: v for k, v in sample.items() if k not in positional}
            return loss(*data, **keyed, **shared)

        return jax.vmap(sample_loss)(align_rows(mapped))

    return per_sample_loss


_MAPPED = ("where", "lengths", "weights", "segment_ids", "class_mask")
_UNMAPPED = ("kernel", "bias", "class_weights")


def _is_shared(name: str, value: object) -> bool:
    """Whether all samples share an argument: a mask ``[V]`` of the classes too."""
    return name in _UNMAPPED or (name == "class_mask" and getattr(value, "ndim", 0) < 2)


def _check_batch(shapes: dict[str, tuple[int, ...]]) -> None:
    first_name, first = next(iter(shapes.items()))
    check_value(first_name, first != (), "has no axis: axis 0 is the batch.")
    for name, shape in shapes.items():
        check_value(
            name,
            shape[:1] == first[:1],
            f"has shape {shape} and `{first_name}` {first}: axis 0 of each is the "
            "batch, and must be the same.",
        )
