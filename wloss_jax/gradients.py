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
from typing import Any, ParamSpec, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax.masks import (
    check_count,
    check_flag,
    check_function,
    check_parameters,
    check_scalar,
    is_integer,
)
from wloss_jax.weighted_mean import (
    AxisName,
    WeightedMean,
    axis_names,
    check_mapped,
    jit_compiled,
    psum,
    vary,
)

PyTree = Any
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


def accumulate(
    evaluate: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
    params: PyTree,
    state: PyTree,
    batch: PyTree,
    *,
    num_microbatches: int,
    axis_name: AxisName | None,
    coefficients: Mapping[str, ArrayLike] | None,
) -> tuple[Any, PyTree, PyTree, PyTree]:
    """The engine: value, aux, gradient and state of the whole batch.

    Args:
      evaluate: ``(params, state, batch) -> (value, aux, state)``, where ``value`` is a
        `WeightedMean` or a dict of them and ``state`` goes on to the next microbatch.
      params: what is differentiated, a tree of floating arrays.
      state: what evaluations change, such as batch statistics; None for nothing.
      batch: a tree of arrays ``[B, ...]``.
      num_microbatches: as in `value_and_grad`, and so are the others.
      axis_name: the axis or axes that the batch is spread over, or None.
      coefficients: the factors of the terms.
    """
    axes = () if axis_name is None else axis_name
    check_mapped("axis_name", axes)
    params = check_parameters("argnums", params)
    # Parameters that vary, so that the gradient of each device comes out, to be added
    # up once, last; parameters that do not would have it added up in each microbatch.
    varying = jax.tree.map(lambda x: vary(x, axes), params)

    def objective(
        params: PyTree, state: PyTree, batch: PyTree, weights: Any
    ) -> tuple[jax.Array, Any]:
        value, aux, state = evaluate(params, state, batch)
        _check_value(value)
        if weights is None:
            weights = psum(_weights(value), axes)
        parts = jax.tree.map(
            lambda mean, weight, c: c * WeightedMean(mean.total, weight).compute(),
            value,
            weights,
            _coefficients(value, coefficients),
            is_leaf=_is_mean,
        )
        return sum(jax.tree.leaves(parts), jnp.float32(0)), (value, weights, aux, state)

    gradient = jax.grad(objective, has_aux=True)
    if num_microbatches == 1:
        grads, (value, weights, aux, state) = gradient(varying, state, batch, None)
    else:
        batch, padding = _pad_rows(batch, num_microbatches)
        take = functools.partial(_take_rows, batch, num_microbatches)
        steps = jnp.arange(num_microbatches)

        def weigh(state: PyTree, step: jax.Array) -> tuple[PyTree, Any]:
            value, _, state = evaluate(varying, state, take(step))
            _check_value(value)
            return state, _weights(value)

        def add(
            carry: tuple[PyTree, PyTree], step: jax.Array
        ) -> tuple[tuple[PyTree, PyTree], Any]:
            so_far, state = carry
            grads, (value, _, aux, state) = gradient(
                varying, state, take(step), weights
            )
            so_far = jax.tree.map(
                lambda x, grad: x + grad.astype(x.dtype), so_far, grads
            )
            return (so_far, state), (value, aux)

        _, weights = jax.lax.scan(weigh, state, steps)
        weights = jax.tree.map(lambda x: x.sum(0), weights)
        padded_aux = None
        if padding is not None:
            padded, padded_aux, _ = evaluate(varying, state, padding)
            weights = jax.tree.map(_nan_if_padding_weighs, weights, _weights(padded))
        weights = psum(weights, axes)
        zeros = jax.tree.map(_accumulator, varying)
        (grads, state), (value, aux) = jax.lax.scan(add, (zeros, state), steps)
        value, aux = _merge(value), _merge(aux, padded_aux)

    grads = jax.tree.map(functools.partial(_add_devices, axes), params, grads)
    value = jax.tree.map(
        lambda mean, weight: WeightedMean(psum(mean.total, axes), weight),
        value,
        weights,
        is_leaf=_is_mean,
    )
    aux = jax.tree.map(
        lambda x: x.psum(axes) if _is_mean(x) else x, aux, is_leaf=_is_mean
    )
    return value, aux, grads, state


def _accumulator(param: jax.Array) -> jax.Array:
    """Zeros for gradients to add up in, sharded as ``param`` is.

    `jnp.zeros_like` loses an explicit sharding (jax 0.12, outside `jax.set_mesh`), and
    the scan then refuses its carry.
    """
    dtype = jnp.promote_types(param.dtype, jnp.float32)
    return jnp.where(False, param, 0).astype(dtype)


def _add_devices(axes: AxisName, param: jax.Array, grad: jax.Array) -> jax.Array:
    """Adds the gradients of all devices, then casts to the parameter's dtype.

    Not over an axis on which the parameter itself differs: there each device has its
    own, and the gradient of the collective that gathered them has added up already.
    """
    own = jax.typeof(param).manual_axis_type.varying
    axes = tuple(name for name in axis_names(axes) if name not in own)
    dtype = jnp.promote_types(param.dtype, jnp.float32)
    return psum(grad.astype(dtype), axes).astype(param.dtype)


def _pad_rows(batch: PyTree, multiple: int) -> tuple[PyTree, PyTree | None]:
    """Pads the rows of a batch to a multiple; also returns the padding, if any.

    A padded row is a copy of the last one, so that no model sees what it never would,
    under a length of 0 and a mask of False.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(batch)
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in flat}
    sizes = {shape[:1] for shape in shapes.values()}
    chex.assert_equal(
        len(sizes) == 1 and () not in sizes,
        True,
        custom_message="axis 0 of every leaf of the batch (see `batch_argnums`) must "
        f"be the batch, to be cut into {multiple} microbatches; got {shapes}.",
    )
    ((size,),) = sizes
    missing = -size % multiple
    if not missing:
        return batch, None
    names = [last_name(path) for path, _ in flat]
    chex.assert_equal(
        "lengths" in names or "where" in names,
        True,
        custom_message=f"`num_microbatches`={multiple} does not divide a batch of "
        f"{size} rows, and nothing named `lengths` or `where` in it could say that "
        "padded rows weigh nothing: add one to the batch, or choose a divisor.",
    )
    rows = jnp.minimum(jnp.arange(size + missing), size - 1)
    leaves = []
    for name, (_, leaf) in zip(names, flat, strict=True):
        padded = jnp.asarray(leaf)[rows]
        if name in ("lengths", "where"):
            padded = padded.at[size:].set(False)  # 0 for integers
        leaves.append(padded)
    padded = jax.tree_util.tree_unflatten(treedef, leaves)
    return padded, jax.tree.map(lambda leaf: leaf[size:], padded)


def _take_rows(batch: PyTree, num_microbatches: int, step: jax.Array) -> PyTree:
    """Takes rows ``step``, ``step + k``, ...: some of each shard of a sharded batch."""

    def take(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        size, *rest = leaf.shape
        rows = leaf.reshape(size // num_microbatches, num_microbatches, *rest)
        taken: jax.Array = jax.lax.dynamic_index_in_dim(rows, step, 1, keepdims=False)
        return taken

    return jax.tree.map(take, batch)


def _merge(stacked: PyTree, padded: PyTree = None) -> PyTree:
    """Adds up `WeightedMean`s over the microbatches, and leaves the rest stacked."""

    def merge(x: Any, padding: Any = None) -> Any:
        if not _is_mean(x):
            return x
        total, weight = x.total.sum(0), x.weight.sum(0)
        if padding is not None:
            weight = _nan_if_padding_weighs(weight, padding.weight)
        return WeightedMean(total, weight)

    trees = (stacked,) if padded is None else (stacked, padded)
    return jax.tree.map(merge, *trees, is_leaf=_is_mean)


@jit_compiled()  # or `jax_debug_nans` would take the constant for a mistake
def _nan_if_padding_weighs(weight: jax.Array, padding: jax.Array) -> jax.Array:
    """Padded rows should weigh nothing; where they do, no number beats a wrong one."""
    return jnp.where(padding == 0, weight, jnp.nan)


def _is_mean(x: Any) -> bool:
    return isinstance(x, WeightedMean)


def _weights(value: Any) -> Any:
    return jax.tree.map(
        lambda mean: jax.lax.stop_gradient(mean.weight), value, is_leaf=_is_mean
    )


def _check_value(value: Any) -> None:
    # No other kind of dict: coefficients come in a plain one, and JAX tells the kinds
    # apart.
    means = list(value.values()) if type(value) is dict else [value]
    chex.assert_equal(
        bool(means) and all(map(_is_mean, means)),
        True,
        custom_message="`loss_fn` must return a `WeightedMean`, or a dict of them by "
        f"name, not divided yet; got {value!r}.",
    )
    for mean in means:
        chex.assert_shape(
            mean.total,
            (),
            custom_message="`loss_fn` must return scalar `WeightedMean`s: `.merge()` "
            "the batch axes, after reweighting.",
        )


def _coefficients(value: Any, coefficients: Mapping[str, ArrayLike] | None) -> Any:
    """Factors of the same structure as ``value``."""
    chex.assert_equal(
        coefficients is None or isinstance(coefficients, Mapping),
        True,
        custom_message="`coefficients` must be a dict of factors by the name of the "
        f"term; got {coefficients!r}.",
    )
    named = dict(coefficients or {})
    terms = list(value) if isinstance(value, dict) else []
    chex.assert_equal(
        named.keys() <= set(terms),
        True,
        custom_message=f"`coefficients` names {sorted(named)}, but the terms that "
        f"`loss_fn` returns are {terms}; a lone `WeightedMean` has no name.",
    )
    if not isinstance(value, dict):
        return 1.0
    factors = {
        name: check_scalar(f"coefficients[{name!r}]", named.get(name, 1.0))
        for name in terms
    }
    return jax.tree.map(jax.lax.stop_gradient, factors)


def argument_numbers(option: str, numbers: int | Sequence[int]) -> tuple[int, ...]:
    """The numbers in an ``option``, which may be one or a sequence of them."""
    found = numbers if isinstance(numbers, tuple | list) else (numbers,)
    chex.assert_equal(
        all(map(is_integer, found)),
        True,
        custom_message=f"`{option}` must be the number of an argument or a tuple of "
        f"them; got {numbers!r}.",
    )
    return tuple(map(int, found))


def split_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    """What a loss function returned, as its value and its aux."""
    if not has_aux:
        return result, None
    chex.assert_equal(
        isinstance(result, tuple | list) and len(result) == 2,
        True,
        custom_message="with `has_aux`, `loss_fn` must return a pair, the loss and the "
        f"aux; got {result!r}.",
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
        chex.assert_equal(
            all(0 <= number < len(args) for number in numbers),
            True,
            custom_message=f"`{option}` names arguments {tuple(numbers)}, but "
            f"`loss_fn` was called with {len(args)} positional arguments.",
        )
    params = {i: args[i] for i in argnums}
    batch = {i: args[i] for i in batch_argnums}
    chex.assert_equal(
        params.keys() & batch.keys(),
        set(),
        custom_message="`argnums` and `batch_argnums` must not overlap: a batch "
        "that is cut into microbatches has no gradient of its own.",
    )
    return params, batch


def parameter_names(loss_fn: Callable[..., Any]) -> list[str]:
    """Names for the positional arguments, those of a ``*args`` too."""
    names = list(inspect.signature(loss_fn).parameters)
    return names + [f"argument {i}" for i in range(len(names), 256)]


def last_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: the last key or attribute on its path, if that is a name."""
    key = path[-1]
    return str(getattr(key, "key", getattr(key, "name", None)))
