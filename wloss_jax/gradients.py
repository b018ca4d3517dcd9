"""`value_and_grad` of a function that returns `WeightedMean`s, exact at every split.

What is differentiated is ``sum_k coefficient_k * total_k / W_k``, where ``W_k`` is the
weight of the *whole* batch, over every microbatch and every device. ``W_k`` must be
known before the backward pass, and can be: weights hang on masks, not on the model. So
with microbatches the loss is first evaluated for its weights alone, and the compiler
drops the model from that evaluation; then each microbatch adds its share to the
gradient, in its final scale.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import (
    Any,
    ParamSpec,
    TypeVar,
)

from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_count,
    check_flag,
    check_function,
    check_type,
    check_value,
    is_integer,
)
from wloss_jax._devices import (
    AxisName,
)
from wloss_jax._microbatches import PyTree, accumulate

_P = ParamSpec("_P")
_Value = TypeVar("_Value")  # a mean, or terms by name; with `has_aux`, and aux


def value_and_grad(
    loss_fn: Callable[_P, _Value],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] = 1,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
    coefficients: Mapping[str, ArrayLike] | None = None,
) -> Callable[_P, tuple[_Value, Any]]:
    """Makes a function that returns the mean of the whole batch, and its gradient.

    ``grad(sum_k coefficient_k * total_k / W_k)``, ``W_k`` being the weight of term k
    over all microbatches and devices

    A drop-in for `jax.value_and_grad`; call it under `jax.jit`. The result is the same,
    to rounding, for every ``num_microbatches`` and number of devices. Terms keep their
    own denominators. Microbatch i takes the rows ``i, i + k, i + 2k, ...``, so that a
    batch that is sharded over devices stays where it is; a batch that k does not divide
    is padded with rows whose leaves named ``lengths`` are 0 and ``where`` False; a term
    that looks at neither, and so gives these rows weight, comes out as NaN. Gradients
    are added up in float32 and returned in the parameters' dtype.

    With microbatches the loss function is evaluated twice, the first time for its
    weights. That costs nothing, as the compiler drops all else, unless the weights look
    at the model: `wloss_jax.loss_power` makes it cost a forward pass.

    For dropout that differs between microbatches and devices, and yet not between
    splits, put one key a sample into the batch: ``jax.random.split(key, B)``.

    Args:
      loss_fn: a function that returns a scalar `WeightedMean`, or a dict of them, the
        terms of the loss, by name.
      argnums: which arguments to differentiate, as in `jax.value_and_grad`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``. The `WeightedMean`s in
        ``aux`` are added up over microbatches and devices; other leaves are returned as
        they come, stacked on a new axis 0 where ``num_microbatches`` is above 1.
      batch_argnums: which arguments are the batch: trees of arrays ``[B, ...]``.
      num_microbatches: into how many microbatches to cut the batch (on each device,
        with ``axis_name``), one after the other, to save memory. With explicit
        sharding it must divide the rows of each device.
      axis_name: the mapped axis, or a tuple of them, over which the batch is spread, in
        `jax.shard_map` (``check_vma`` on or off) or `jax.pmap`. Parameters must be the
        same on all its devices; with ``check_vma`` on, they may also be in shards that
        ``loss_fn`` gathers. Under `jax.jit` with sharded arrays, leave it out.
      coefficients: the factors of the terms, by name; 1 for one that is not named.

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(mean, grads)``, or
      ``((mean, aux), grads)``: ``mean`` is what ``loss_fn`` returned, over the whole
      batch, still a `WeightedMean` or a dict of them; ``grads`` is as ``argnums``.

    Raises:
      AssertionError: when called, where ``loss_fn`` returns something else, the batch
        cannot be cut, or a coefficient names no term.
      NameError: ``axis_name`` is not mapped where the function is called.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> def loss_fn(params, batch):
      ...     prediction = params * batch["x"]
      ...     return wl.squared_error(prediction, batch["y"], lengths=batch["lengths"])
      >>> batch = {
      ...     "x": jnp.array([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]]),
      ...     "y": jnp.zeros((2, 3)),
      ...     "lengths": jnp.array([3, 1]),
      ... }
      >>> for k in 1, 2:
      ...     step = jax.jit(wl.value_and_grad(loss_fn, num_microbatches=k))
      ...     print(step(jnp.float32(1.0), batch))
      (WeightedMean(mean=3.0, weight=4.0), Array(6., dtype=float32))
      (WeightedMean(mean=3.0, weight=4.0), Array(6., dtype=float32))
    """
    check_function("loss_fn", loss_fn)
    check_flag("has_aux", has_aux)
    single = not isinstance(argnums, tuple | list)
    diff_nums = argument_numbers("argnums", argnums)
    batch_nums = argument_numbers("batch_argnums", batch_argnums)
    names = parameter_names(loss_fn)
    call: Callable[..., Any] = loss_fn  # with arguments by number

    @functools.wraps(loss_fn)
    def value_and_grad_fn(*args: _P.args, **kwargs: _P.kwargs) -> tuple[Any, Any]:
        params, batch = choose_arguments(args, diff_nums, batch_nums, num_microbatches)

        def evaluate(
            params: dict[int, PyTree], _: None, batch: dict[str, PyTree]
        ) -> tuple[Any, Any, None]:
            replaced = params | {names.index(key): tree for key, tree in batch.items()}
            full = [replaced.get(i, arg) for i, arg in enumerate(args)]
            return *split_aux(call(*full, **kwargs), has_aux), None

        value, aux, by_number, _ = accumulate(
            evaluate,
            params,
            None,
            {names[i]: tree for i, tree in batch.items()},
            num_microbatches=num_microbatches,
            axis_name=axis_name,
            coefficients=coefficients,
        )
        grads = tuple(by_number[i] for i in diff_nums)
        return ((value, aux) if has_aux else value), (grads[0] if single else grads)

    return value_and_grad_fn


def argument_numbers(option: str, numbers: int | Sequence[int]) -> tuple[int, ...]:
    """The numbers in an ``option``, which may be one or a sequence of them."""
    found = numbers if isinstance(numbers, tuple | list) else (numbers,)
    check_type(
        option,
        all(map(is_integer, found)),
        f"must be the number of an argument or a tuple of them; got {numbers!r}.",
    )
    return tuple(map(int, found))


def split_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    """What a loss function returned, as its value and its aux."""
    if not has_aux:
        return result, None
    check_type(
        "loss_fn",
        isinstance(result, tuple | list) and len(result) == 2,
        f"must return a pair with `has_aux`, the loss and the aux; got {result!r}.",
    )
    value, aux = result
    return value, aux


def choose_arguments(
    args: tuple[Any, ...],
    argnums: Sequence[int],
    batch_argnums: Sequence[int],
    num_microbatches: int,
) -> tuple[dict[int, Any], dict[int, Any]]:
    """The arguments to differentiate and those to cut into microbatches, by number."""
    check_count("num_microbatches", num_microbatches, at_least=1)
    if num_microbatches == 1:
        batch_argnums = ()  # left as it is, and so free to be differentiated too
    for option, numbers in (("argnums", argnums), ("batch_argnums", batch_argnums)):
        check_value(
            option,
            all(0 <= number < len(args) for number in numbers),
            f"names arguments {tuple(numbers)}, but `loss_fn` was called with "
            f"{len(args)} positional arguments.",
        )
    params = {i: args[i] for i in argnums}
    batch = {i: args[i] for i in batch_argnums}
    check_value(
        "argnums",
        not params.keys() & batch.keys(),
        "and `batch_argnums` must not overlap: a batch that is cut into microbatches "
        "has no gradient of its own.",
    )
    return params, batch


def parameter_names(loss_fn: Callable[..., Any]) -> list[str]:
    """Names for the positional arguments, those of a ``*args`` too."""
    names = list(inspect.signature(loss_fn).parameters)
    return names + [f"argument {i}" for i in range(len(names), 256)]
