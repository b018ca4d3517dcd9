"""`value_and_grad`: a loss and its gradient, the same however the batch is split.

A loss function returns parts, which add up over microbatches and devices or are put
together; what makes one number of them, a sum of means or a function of the user's, is
applied once, to those of the whole batch. The engine is in `_microbatches.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import jax
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_count,
    check_flag,
    check_function,
    check_type,
    check_value,
    is_integer,
)
from wloss_jax._devices import AxisName
from wloss_jax._keywords import POSITIONAL
from wloss_jax._microbatches import PyTree, accumulate
from wloss_jax._parts import checks_and_combine

_P = ParamSpec("_P")
_Value = TypeVar("_Value")  # a mean, or terms by name; with `has_aux`, and aux


@overload
def value_and_grad(
    loss_fn: Callable[_P, _Value],
    argnums: int | Sequence[int] = 0,
    *,
    combine: None = None,
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] = 1,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
    coefficients: Mapping[str, ArrayLike] | None = None,
) -> Callable[_P, tuple[_Value, Any]]: ...


@overload
def value_and_grad(
    loss_fn: Callable[_P, Any],
    argnums: int | Sequence[int] = 0,
    *,
    combine: Callable[..., ArrayLike],
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] = 1,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> Callable[_P, tuple[Any, Any]]: ...


def value_and_grad(
    loss_fn: Callable[_P, Any],
    argnums: int | Sequence[int] = 0,
    *,
    combine: Callable[..., ArrayLike] | None = None,
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] = 1,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
    coefficients: Mapping[str, ArrayLike] | None = None,
) -> Callable[_P, tuple[Any, Any]]:
    """Makes a function that returns the loss of the whole batch, and its gradient.

    ``grad(combine(parts, *differentiated))``, the parts being those of all microbatches
    and devices together; without ``combine``, ``sum_k coefficient_k * total_k / W_k``

    A drop-in for `jax.value_and_grad`; call it under `jax.jit`. The result is the same,
    to rounding, for every ``num_microbatches`` and number of devices. Microbatch i
    takes the rows ``i, i + k, i + 2k, ...``, so that a batch that is sharded over
    devices stays where it is. Gradients are added up in float32 and returned in the
    parameters' dtype. Weights are constants: no gradient flows through them.

    What is no mean needs ``combine``. In silence, these depend on the split without it:

    - a sum as ``WeightedMean(m.total, 1.0)``, which comes out as sum / k: write
      ``combine=lambda m, *_: m.total``.
    - ``ce + kl``, which pools two populations: return both by name, whose means are
      added, or ``combine=lambda m, *_: m["ce"].compute() + m["kl"].compute()``.
    - a penalty on the parameters as a part: ``m.compute() + 1e-4 * penalty(params)``.
    - learned ``coefficients``, which are constants there: ``combine`` sees the
      parameters, ``jnp.exp(-params["s"]) * m["a"].compute() + params["s"]``.
    - a floor under a count: ``m.total / jnp.maximum(m.weight, 1)``.

    With microbatches the loss function is evaluated twice, the first time without a
    gradient, for the slopes of ``combine``. Where these depend on weights alone, as
    those of means and sums do, that costs nothing, as the compiler drops all else.
    Where the weights look at the model, as with `wloss_jax.loss_power`, or the slopes
    at totals or rows, it costs a forward pass. Both evaluations use the same random
    numbers. For dropout that differs between microbatches and devices, but not between
    splits, put one key for each sample into the batch, ``jax.random.split(key, B)``.

    Under `jax.shard_map` and `jax.pmap` each device evaluates ``combine`` whole, on the
    rows of all; under plain `jax.jit` the compiler shares it out.

    Args:
      loss_fn: a function that returns a scalar `WeightedMean` or a tree of them, the
        terms of the loss, whose means are added up; with ``combine``, parts: a tree of
        `WeightedMean`s of any shape, which are added up, and of arrays ``[B, ...]``,
        rows, which are put together in the order of the batch.
      argnums: which arguments to differentiate, as in `jax.value_and_grad`.
      combine: ``(parts, *differentiated)`` to the loss, a scalar, of the parts of the
        whole batch and of the arguments that ``argnums`` names.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``. What has the batch's axis in
        ``aux``, arrays and `WeightedMean`s alike, is put together in the order of the
        batch (on each device, with ``axis_name``). Other `WeightedMean`s are added up
        over microbatches and devices; other leaves are returned as they come, stacked
        on a new axis 0 where ``num_microbatches`` is above 1.
      batch_argnums: which arguments are the batch: trees of arrays ``[B, ...]``.
      num_microbatches: into how many microbatches to cut the batch (on each device,
        with ``axis_name``), one after the other, to save memory. Where it does not
        divide the batch, the first ones have one row more, and the loss function is
        compiled for both sizes. With explicit sharding it must divide the rows of each
        device.
      axis_name: the mapped axis, or a tuple of them, over which the batch is spread, in
        `jax.shard_map` (``check_vma`` on or off) or `jax.pmap`. Parameters must be the
        same on all its devices; with ``check_vma`` on, they may also be in shards that
        ``loss_fn`` gathers. Under `jax.jit` with sharded arrays, leave it out.
      coefficients: without ``combine``, the factors of the terms, where these are a
        dict or another mapping, by name; 1 for one that is not named.

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(value, grads)``, or
      ``((value, aux), grads)``: ``value`` is the combined loss; without ``combine``,
      what ``loss_fn`` returned, over the whole batch, still `WeightedMean`s; ``grads``
      is as ``argnums``.

    Raises:
      AssertionError: when called, where ``loss_fn`` or ``combine`` return something
        else, the batch cannot be cut, or a coefficient names no term.
      NameError: ``axis_name`` is not mapped where the function is called.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> def loss_fn(params, batch):
      ...     prediction = params * batch["x"]
      ...     return wl.squared_error(prediction, batch["y"], lengths=batch["lengths"])
      >>> def rmse(mean, params):
      ...     return jnp.sqrt(mean.compute())
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
      >>> step = wl.value_and_grad(loss_fn, combine=rmse, num_microbatches=2)
      >>> value, grad = jax.jit(step)(jnp.float32(1.0), batch)
      >>> print(f"{value:.3f} {grad:.3f}")
      1.732 1.732

    Source: for rows, this is GradCache: Gao et al., "Scaling deep contrastive learning
    batch size under memory limited setup", 2021, https://arxiv.org/abs/2101.06983
    """
    check_function("loss_fn", loss_fn)
    check_flag("has_aux", has_aux)
    single = not isinstance(argnums, tuple | list)
    wanted_nums = argument_numbers("argnums", argnums)
    cut_nums = argument_numbers("batch_argnums", batch_argnums)
    check_parts, combine_parts = checks_and_combine(combine, coefficients)
    signature = inspect.signature(loss_fn)
    call: Callable[..., Any] = loss_fn  # with arguments by number

    @functools.wraps(loss_fn)
    def value_and_grad_fn(*args: _P.args, **kwargs: _P.kwargs) -> tuple[Any, Any]:
        positional, keywords = by_position(
            signature, args, kwargs, (*wanted_nums, *cut_nums)
        )
        # Negative numbers count from the end of what came, as in `jax.value_and_grad`.
        diff_nums, batch_nums = (
            tuple(i + len(args) if i < 0 else i for i in numbers)
            for numbers in (wanted_nums, cut_nums)
        )
        params, batch = choose_arguments(
            positional, diff_nums, batch_nums, num_microbatches, keywords
        )
        check_no_modules(params)
        names = argument_names(signature, batch)

        def evaluate(
            params: dict[int, PyTree], _: None, batch: dict[str, PyTree]
        ) -> tuple[Any, Any, None]:
            # The engine knows parameters and batch; all else stays as it came.
            replaced = params | {i: batch[name] for i, name in names.items()}
            full = [replaced.get(i, arg) for i, arg in enumerate(positional)]
            try:
                returned = call(*full, **keywords)
            except Exception as error:
                check_no_changes(error)
                raise
            parts, aux = split_aux(returned, has_aux)
            check_parts(parts)
            return parts, aux, None

        outcome = accumulate(
            evaluate,
            lambda parts, params: combine_parts(parts, *(params[i] for i in diff_nums)),
            params,
            None,
            {name: batch[i] for i, name in names.items()},
            num_microbatches=num_microbatches,
            axis_name=axis_name,
        )
        value = outcome.parts if combine is None else outcome.value
        grads = tuple(outcome.grads[i] for i in diff_nums)
        return (
            (value, outcome.aux) if has_aux else value,
            grads[0] if single else grads,
        )

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
        lambda: (
            f"must return a pair with `has_aux`, the loss and the aux; got {result!r}."
        ),
    )
    value, aux = result
    return value, aux


def by_position(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    numbers: Iterable[int],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by position up to the last of these ``numbers``.

    What came by position stays, and what came by keyword where no number asks for it:
    defaults are left to the function. The signature may be that of another, which a
    decorator has wrapped, with defaults of its own.
    """
    positional, keywords = list(args), dict(kwargs)
    parameters = [p for p in signature.parameters.values() if p.kind in POSITIONAL]
    asked = range(len(args), min(max(numbers, default=-1) + 1, len(parameters)))
    by_keyword = [i for i in asked if parameters[i].name in keywords]
    for parameter in parameters[len(args) : max(by_keyword, default=-1) + 1]:
        value = keywords.pop(parameter.name, parameter.default)
        if value is parameter.empty:
            break  # it is missing, as the function will say
        positional.append(value)
    return tuple(positional), keywords


def choose_arguments(
    args: tuple[Any, ...],
    argnums: Sequence[int],
    batch_argnums: Sequence[int],
    num_microbatches: int,
    keywords: Iterable[str] = (),
) -> tuple[dict[int, Any], dict[int, Any]]:
    """The arguments to differentiate, and the batch, by number.

    Arguments that ``loss_fn`` takes by keyword only have none; ``keywords`` names them.
    """
    check_count("num_microbatches", num_microbatches, at_least=1)
    if num_microbatches == 1:
        # What is not cut may be anywhere, and have a gradient too.
        known = set(range(len(args))) - set(argnums)
        batch_argnums = [number for number in batch_argnums if number in known]
    mend = (
        "What it closes over cannot be differentiated, nor cut into microbatches: pass "
        "it as an argument."
    )
    if names := ", ".join(keywords):
        mend = f"`{names}` it takes by keyword only: take it by position, before a `*`."
    for option, numbers in (("argnums", argnums), ("batch_argnums", batch_argnums)):
        check_value(
            option,
            all(0 <= number < len(args) for number in numbers),
            f"names arguments {tuple(numbers)}, from 0, but `loss_fn` was called with "
            f"{len(args)} positional arguments. {mend}",
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


def argument_names(
    signature: inspect.Signature, numbers: Iterable[int]
) -> dict[int, str]:
    """Names for positional arguments, those of a ``*args`` too, for messages."""
    names = list(signature.parameters)
    return {i: names[i] if i < len(names) else f"argument {i}" for i in numbers}


def check_no_modules(params: Any) -> None:
    """Checks that no module of `flax.nnx`, with its state, is differentiated."""

    def is_module(x: Any) -> bool:
        return any(
            kind.__name__ == "Module" and kind.__module__.startswith("flax.nnx")
            for kind in type(x).__mro__
        )

    found = [x for x in jax.tree.leaves(params, is_leaf=is_module) if is_module(x)]
    check_type(
        "loss_fn",
        not found,
        f"is given a module of `flax.nnx`, {[type(x).__name__ for x in found]}: use "
        "`wloss_jax.nnx.value_and_grad`, which keeps its batch statistics and random "
        "streams; or `nnx.split` it, and pass its state.",
    )


def check_no_changes(error: Exception) -> None:
    """Checks that an ``error`` is not of a module of `flax.nnx` whose state changes."""
    check_type(
        "loss_fn",
        type(error).__name__ != "TraceContextError",
        "changes the state of a module of `flax.nnx`, such as a random stream or batch "
        "statistics: pass the module as an argument, and use "
        "`wloss_jax.nnx.value_and_grad`, which carries its state.",
    )
