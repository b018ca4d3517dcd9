"""The engine of `value_and_grad`: weights first, then each microbatch's gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import (
    Any,
)

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_parameters,
    check_scalar,
    check_shape,
    check_type,
    check_value,
)
from wloss_jax._devices import (
    AxisName,
    axis_names,
    check_mapped,
    jit_compiled,
    psum,
    vary,
)
from wloss_jax.means import WeightedMean

PyTree = Any


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
    check_value(
        "batch_argnums",
        len(sizes) == 1 and () not in sizes,
        "names the batch: axis 0 of every leaf of it must be the batch, to be cut "
        f"into {multiple} microbatches; got {shapes}.",
    )
    ((size,),) = sizes
    missing = -size % multiple
    if not missing:
        return batch, None
    names = [last_name(path) for path, _ in flat]
    check_value(
        "num_microbatches",
        "lengths" in names or "where" in names,
        f"is {multiple}, which does not divide a batch of {size} rows, and nothing "
        "named `lengths` or `where` in it could say that padded rows weigh nothing: "
        "add one to the batch, or choose a divisor.",
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
    check_type(
        "loss_fn",
        bool(means) and all(map(_is_mean, means)),
        "must return a `WeightedMean`, or a dict of them by name, not divided yet; got "
        f"{value!r}.",
    )
    for mean in means:
        check_shape(
            "loss_fn",
            mean.total,
            (),
            "must return scalar `WeightedMean`s: `.merge()` the batch axes, after "
            "reweighting.",
        )


def _coefficients(value: Any, coefficients: Mapping[str, ArrayLike] | None) -> Any:
    """Factors of the same structure as ``value``."""
    check_type(
        "coefficients",
        coefficients is None or isinstance(coefficients, Mapping),
        f"must be a dict of factors by the name of the term; got {coefficients!r}.",
    )
    named = dict(coefficients or {})
    terms = list(value) if isinstance(value, dict) else []
    check_value(
        "coefficients",
        named.keys() <= set(terms),
        f"names {sorted(named)}, but the terms that `loss_fn` returns are {terms}; a "
        "lone `WeightedMean` has no name.",
    )
    if not isinstance(value, dict):
        return 1.0
    factors = {
        name: check_scalar(f"coefficients[{name!r}]", named.get(name, 1.0))
        for name in terms
    }
    return jax.tree.map(jax.lax.stop_gradient, factors)


def last_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: the last key or attribute on its path, if that is a name."""
    key = path[-1]
    return str(getattr(key, "key", getattr(key, "name", None)))
