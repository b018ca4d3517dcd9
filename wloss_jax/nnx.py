"""Flax NNX integration: `value_and_grad` over `flax.nnx` modules, and a metric.

The only module that imports flax; ``wl.nnx`` imports it when it is first named.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, overload

import jax
from flax import nnx, serialization
from jax.typing import ArrayLike

from wloss_jax._checks import check_flag, check_function, check_type, check_value
from wloss_jax._devices import AxisName
from wloss_jax._microbatches import accumulate
from wloss_jax._parts import checks_and_combine
from wloss_jax.gradients import (
    argument_names,
    argument_numbers,
    by_position,
    choose_arguments,
    split_aux,
)
from wloss_jax.means import WeightedMean
from wloss_jax.running_mean import RunningMean

Argnum = int | nnx.DiffState
_P = ParamSpec("_P")
_Value = TypeVar("_Value")


@overload
def value_and_grad(
    loss_fn: Callable[_P, _Value],
    argnums: Argnum | Sequence[Argnum] = 0,
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
    argnums: Argnum | Sequence[Argnum] = 0,
    *,
    combine: Callable[..., ArrayLike],
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] = 1,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> Callable[_P, tuple[Any, Any]]: ...


def value_and_grad(
    loss_fn: Callable[_P, Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    *,
    combine: Callable[..., ArrayLike] | None = None,
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] = 1,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
    coefficients: Mapping[str, ArrayLike] | None = None,
) -> Callable[_P, tuple[Any, Any]]:
    """Makes `wloss_jax.value_and_grad` of a function of `nnx` modules.

    ``grad(combine(parts, *differentiated))``, the parts being those of all microbatches
    and devices together; without ``combine``, ``sum_k coefficient_k * total_k / W_k``

    A drop-in for `nnx.value_and_grad`; call it under `nnx.jit`, or under `jax.jit` with
    modules merged inside. Modules are arguments like any other, and what ``loss_fn``
    does to their variables (batch statistics, random streams, counters) happens to the
    modules that the function is called with: microbatch by microbatch, each starting
    from what the one before left. So dropout differs between microbatches, and batch
    statistics are those of k small batches: a loss that looks at them depends on k.
    Where `wloss_jax.value_and_grad` evaluates twice, both evaluations start from the
    same state, and so use the same random numbers.

    - Over devices, the random streams and batch statistics of a module are those of
      each device, as anywhere in `nnx`: give `nnx.BatchNorm` its ``axis_name``, and
      `nnx.fork_rngs` a module whose dropout is to differ.
    - What ``loss_fn`` assigns to a variable that is differentiated is not kept.
    - Variables that ``loss_fn`` creates, as ``sow`` does, need ``num_microbatches=1``.

    Args:
      loss_fn: a function that returns a scalar `WeightedMean`, or a tree of them; with
        ``combine``, parts.
      argnums: which arguments to differentiate, as in `nnx.value_and_grad`: a module's
        `nnx.Param`, or what the filter of ``nnx.DiffState(argnum, filter)`` selects.
        An argument without variables is differentiated whole, as in JAX.
      combine: ``(parts, *differentiated)`` to the loss, as in
        `wloss_jax.value_and_grad`; the modules as they came, whose changes are not
        kept.
      has_aux: as in `wloss_jax.value_and_grad`, and so are the others.
      batch_argnums: which arguments are the batch: trees of arrays ``[B, ...]``.
      num_microbatches: into how many microbatches to cut the batch.
      axis_name: the mapped axis or axes that the batch is spread over.
      coefficients: the factors of the terms, by name.

    Returns:
      A function of the arguments of ``loss_fn`` that returns ``(value, grads)``, or
      ``((value, aux), grads)``; ``grads``, an `nnx.State` for each module, is what
      ``nnx.Optimizer.update(model, grads)`` takes.

    Raises:
      AssertionError: as `wloss_jax.value_and_grad` does, and where ``loss_fn`` changes
        which variables there are, with microbatches.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> import wloss_jax as wl
      >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> def loss_fn(model, batch):
      ...     prediction = model(batch["x"])[..., 0]
      ...     return wl.squared_error(prediction, batch["y"], lengths=batch["lengths"])
      >>> @nnx.jit
      ... def train_step(model, optimizer, batch):
      ...     mean, grads = wl.nnx.value_and_grad(loss_fn, num_microbatches=2)(
      ...         model, batch
      ...     )
      ...     optimizer.update(model, grads)
      ...     return mean
      >>> batch = {
      ...     "x": jnp.ones((2, 3, 1)),
      ...     "y": jnp.full((2, 3), 2.0),
      ...     "lengths": jnp.array([3, 1]),
      ... }
      >>> means = [train_step(model, optimizer, batch) for _ in range(20)]
      >>> print(means[0].weight, means[-1].compute() < 1e-3 * means[0].compute())
      4.0 True
    """
    check_function("loss_fn", loss_fn)
    check_flag("has_aux", has_aux)
    single = not isinstance(argnums, tuple | list)
    wanted: Any = (argnums,) if single else argnums
    selects = dict(map(_number_and_predicate, wanted))
    batch_nums = argument_numbers("batch_argnums", batch_argnums)
    check_parts, combine_parts = checks_and_combine(combine, coefficients)
    signature = inspect.signature(loss_fn)
    call: Callable[..., Any] = loss_fn  # with arguments by number

    @functools.wraps(loss_fn)
    def value_and_grad_fn(*args: _P.args, **kwargs: _P.kwargs) -> tuple[Any, Any]:
        positional, keywords = by_position(
            signature, args, kwargs, (*selects, *batch_nums)
        )
        differentiated, batch = choose_arguments(
            positional, tuple(selects), batch_nums, num_microbatches, keywords
        )
        if num_microbatches == 1:  # what is not cut may be a module too
            batch = {i: arg for i, arg in batch.items() if not _has_variables(arg)}
        names = argument_names(signature, batch)
        arrays = {
            i: arg for i, arg in differentiated.items() if not _has_variables(arg)
        }
        # First the modules that are differentiated: a variable that several arguments
        # share is found, and then sought, where it stands first.
        nodes = (
            {i: arg for i, arg in differentiated.items() if i not in arrays},
            {
                i: arg
                for i, arg in enumerate(positional)
                if i not in differentiated | batch
            },
            keywords,
        )

        def is_param(path: tuple[Any, ...], leaf: Any) -> bool:
            return path[0] == 0 and selects[path[1]](path[2:], leaf)

        graphdef, *states = nnx.split(nodes, is_param, nnx.Variable, ...)
        params, state, constants = states

        def evaluate(
            params: tuple[Any, Any], state: Any, batch: dict[str, Any]
        ) -> tuple[Any, Any, Any]:
            arrays, variables = params
            # Copies, so that what the loss does to a variable stays in this trace, and
            # leaves it as the state that is returned.
            merged = nnx.merge(graphdef, variables, state, constants, copy=True)
            by_number = arrays | merged[0] | merged[1]
            by_number |= {i: batch[name] for i, name in names.items()}
            full = [by_number[i] for i in range(len(positional))]
            parts, aux = split_aux(call(*full, **merged[2]), has_aux)
            check_parts(parts)
            changed = nnx.state(merged, nnx.All(nnx.Variable, nnx.Not(is_param)))
            if num_microbatches > 1:
                _check_same_variables(state, changed)
            return parts, aux, changed

        def combine_modules(parts: Any, params: tuple[Any, Any]) -> Any:
            arrays, variables = params
            if combine is None:
                return combine_parts(parts)
            merged = nnx.merge(graphdef, variables, state, constants, copy=True)
            by_number = arrays | merged[0]
            return combine_parts(parts, *(by_number[i] for i in selects))

        outcome = accumulate(
            evaluate,
            combine_modules,
            (arrays, params),
            state,
            {name: batch[i] for i, name in names.items()},
            num_microbatches=num_microbatches,
            axis_name=axis_name,
        )
        # Only now do the modules that were passed change, once.
        nnx.update(nodes, outcome.state)
        by_number = outcome.grads[0] | dict(outcome.grads[1].get(0, {}))
        grads = tuple(by_number.get(i, nnx.State({})) for i in selects)
        value = outcome.parts if combine is None else outcome.value
        return (
            (value, outcome.aux) if has_aux else value,
            grads[0] if single else grads,
        )

    return value_and_grad_fn


class WeightedMeanMetric(nnx.Metric):
    """Averages the `WeightedMean`s of all steps, as an `nnx.Metric`.

    ``mean = sum_i total_i / sum_i weight_i``

    Where `nnx.metrics.Average` is given a loss for each step and averages averages,
    this is given the `WeightedMean` itself, not divided. Kept in a
    `wloss_jax.RunningMean`, so that the counts of a long epoch stay exact. In an
    `nnx.MultiMetric`, one for each name::

        metrics = nnx.MultiMetric(
            loss=wl.nnx.WeightedMeanMetric("loss"), mae=wl.nnx.WeightedMeanMetric("mae")
        )
        metrics.update(loss=loss, mae=mae)

    Over devices, update with ``m.psum(axis_name)``.

    Args:
      argname: the keyword argument of `update` that this metric reads.

    Attributes:
      running: an `nnx.metrics.MetricState` that holds the `wloss_jax.RunningMean`.

    Raises:
      AssertionError: ``argname`` is no string.

    Example:
      >>> import wloss_jax as wl
      >>> metric = wl.nnx.WeightedMeanMetric()
      >>> metric.update(values=wl.WeightedMean(10.0, 8.0))
      >>> metric.update(values=wl.WeightedMean(5.0, 2.0))
      >>> print(metric.compute())
      1.5
    """

    def __init__(self, argname: str = "values"):
        check_type(
            "argname", isinstance(argname, str), f"must be a string; got {argname!r}."
        )
        self.argname = argname
        self.running = nnx.metrics.MetricState(RunningMean.zeros())

    def reset(self) -> None:
        """Forgets all that was seen."""
        self.running.set_value(RunningMean.zeros())

    def update(self, **kwargs: Any) -> None:
        """Adds a `WeightedMean`.

        Args:
          **kwargs: ``argname`` names the `WeightedMean`, a scalar one; the others are
            for other metrics of an `nnx.MultiMetric`.

        Raises:
          TypeError: the keyword argument is missing.
          AssertionError: it is no scalar `WeightedMean`.
        """
        if self.argname not in kwargs:
            raise TypeError(
                f"`update` lacks the keyword argument `{self.argname}`, which this "
                f"metric reads; got {sorted(kwargs)}."
            )
        value = kwargs[self.argname]
        check_type(
            self.argname,
            isinstance(value, WeightedMean),
            f"is {type(value).__name__}: pass the `WeightedMean` that the loss "
            "returns, not its `.compute()`, which has lost its weight.",
        )
        self.running.set_value(self.running.get_value().update(value))

    def compute(self) -> jax.Array:
        """Divides: the mean of all that was seen, 0 for nothing."""
        mean: jax.Array = self.running.get_value().compute()
        return mean


def _number_and_predicate(argnum: Argnum) -> tuple[int, Callable[..., bool]]:
    if isinstance(argnum, nnx.DiffState):
        return argnum.argnum, nnx.All(argnum.filter)
    (number,) = argument_numbers("argnums", argnum)
    return number, nnx.All(nnx.Param)


def _has_variables(tree: Any) -> bool:
    return bool(jax.tree.leaves(nnx.state([tree], nnx.Variable)))


def _check_same_variables(before: Any, after: Any) -> None:
    structures = {jax.tree.structure(tree) for tree in (before, after)}
    check_value(
        "loss_fn",
        len(structures) == 1,
        "creates or removes variables of a module, which microbatches, compiled once, "
        "cannot: call the module once before, take `sow` out, or use "
        "`num_microbatches=1`.",
    )


_untyped: Any = serialization  # some of its functions have no types


def _serialized_by(cls: type, names: tuple[str, ...]) -> None:
    """Tells `flax.serialization` the fields of a class that is a pytree of them."""

    def to_state_dict(value: Any) -> dict[str, Any]:
        return {
            name: serialization.to_state_dict(getattr(value, name)) for name in names
        }

    def from_state_dict(target: Any, state: Mapping[str, Any]) -> Any:
        check_value(
            "state",
            set(state) == set(names),
            f"has the fields {sorted(state)}, at {_untyped.current_path()}: a "
            f"`{cls.__name__}` has {sorted(names)}.",
        )
        fields = [
            serialization.from_state_dict(getattr(target, name), state[name], name)
            for name in names
        ]
        return jax.tree.unflatten(jax.tree.structure(target), fields)

    # Once more where the module is loaded anew.
    _untyped.register_serialization_state(
        cls, to_state_dict, from_state_dict, override=True
    )


_serialized_by(WeightedMean, ("total", "weight"))
_serialized_by(RunningMean, ("total", "total_low", "weight", "weight_low"))
