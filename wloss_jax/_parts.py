"""Parts of a loss, and what makes one number of them: their slopes.

Parts are a tree of `WeightedMean`s and of arrays of rows. A *slope* is the derivative
of the combined loss with respect to a total or a row; weights are constants, and have
none.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_dtype,
    check_function,
    check_scalar,
    check_shape,
    check_type,
    check_value,
)
from wloss_jax._devices import unsharded_rows
from wloss_jax._jaxprs import used_inputs
from wloss_jax.means import WeightedMean

PyTree = Any
Combine = Callable[..., Any]  # parts and what is differentiated, to a scalar


def is_mean(x: Any) -> bool:
    """Whether ``x`` is a `WeightedMean`, for ``is_leaf``."""
    return isinstance(x, WeightedMean)


def constant_weights(tree: PyTree) -> PyTree:
    """The tree, with weights that no gradient flows through."""

    def constant(x: Any) -> Any:
        if not is_mean(x):
            return x
        return WeightedMean(x.total, jax.lax.stop_gradient(x.weight))

    return jax.tree.map(constant, tree, is_leaf=is_mean)


# ----------------------------------------------------------- what is differentiated


def have_slopes(parts: PyTree) -> list[bool]:
    """Which arrays of the parts have a slope: totals, and rows of floating numbers."""

    def marks(x: Any) -> Any:
        if is_mean(x):
            return WeightedMean.tree_unflatten(None, (True, False))
        return jnp.issubdtype(x.dtype, jnp.inexact)

    return jax.tree.leaves(jax.tree.map(marks, parts, is_leaf=is_mean))


def weight_indices(parts: PyTree) -> list[int]:
    """Which arrays of the parts are weights; each stands behind its total."""

    def marks(x: Any) -> Any:
        return WeightedMean.tree_unflatten(None, (False, True)) if is_mean(x) else False

    flags = jax.tree.leaves(jax.tree.map(marks, parts, is_leaf=is_mean))
    return [i for i, is_weight in enumerate(flags) if is_weight]


def sloped(parts: PyTree) -> list[Any]:
    """The arrays that have a slope."""
    return list(itertools.compress(jax.tree.leaves(parts), have_slopes(parts)))


def with_sloped(parts: PyTree, arrays: list[Any]) -> PyTree:
    """The parts with ``arrays`` in place of those that have a slope."""
    rest, flags = iter(arrays), iter(have_slopes(parts))
    return jax.tree.map(lambda x: next(rest) if next(flags) else x, parts)


def differentiate(
    combine: Combine, parts: PyTree, params: PyTree
) -> tuple[jax.Array, list[jax.Array], PyTree]:
    """The combined loss, the slopes of its parts, and its own of the parameters."""

    def loss(arrays: list[jax.Array], params: PyTree) -> jax.Array:
        # Rows meet each other in a loss of pairs: each device needs all of them.
        whole = jax.tree.map(
            lambda x: x if is_mean(x) else unsharded_rows(x),
            with_sloped(parts, arrays),
            is_leaf=is_mean,
        )
        return _check_loss(combine(whole, params))

    value, (slopes, direct) = jax.value_and_grad(loss, (0, 1))(sloped(parts), params)
    return value, slopes, direct


def needed(
    function: Callable[[list[jax.Array]], list[jax.Array]],
    shapes: list[jax.ShapeDtypeStruct],
) -> list[bool]:
    """Which of its arguments the results of a function depend on.

    The slope of a mean, say, depends on its weight alone.
    """
    jaxpr = jax.make_jaxpr(function)(shapes).jaxpr
    return used_inputs(jaxpr, *range(len(jaxpr.outvars)))


def _check_loss(value: Any) -> jax.Array:

    def rest() -> str:
        return (
            "must return the loss, one floating scalar: a `WeightedMean` is divided by "
            f"its `.compute()`, rows are reduced; got {value!r}."
        )

    check_type("combine", isinstance(value, float) or hasattr(value, "dtype"), rest)
    scalar = jnp.asarray(value)
    check_shape("combine", scalar, (), rest)
    check_dtype("combine", scalar, float, rest)
    return scalar


# ------------------------------------------------------------------ what parts may be


def check_parts(parts: PyTree) -> None:
    """Checks that all leaves are `WeightedMean`s or rows, and that there are some."""
    leaves = jax.tree_util.tree_leaves_with_path(parts, is_leaf=is_mean)
    check_type(
        "loss_fn",
        bool(leaves),
        lambda: (
            "must return parts with `combine`, a tree of `WeightedMean`s and of "
            f"arrays [B, ...]; got {parts!r}."
        ),
    )
    for path, leaf in leaves:
        _check_part(f"`parts{jax.tree_util.keystr(path)}`", leaf)


def _check_part(place: str, leaf: Any) -> None:
    check_type(
        "loss_fn",
        is_mean(leaf) or _is_array(leaf),
        lambda: (
            "must return parts with `combine`: `WeightedMean`s, which are added up, "
            f"and arrays [B, ...], which are put together; got {leaf!r} at {place}."
        ),
    )
    check_value(
        "loss_fn",
        is_mean(leaf) or jnp.ndim(leaf) > 0,
        lambda: (
            "must return parts with `combine`, and a scalar is neither a sum with its "
            "weight nor an array of rows: return the `WeightedMean`, whose `.total` is "
            "a sum over the whole batch, or compute in `combine` what does not depend "
            f"on the batch; got {leaf!r} at {place}."
        ),
    )


def _is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that JAX knows, of random keys too."""
    is_foreign = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm"
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and not is_foreign


def check_means(value: Any) -> None:
    """Checks that all leaves are scalar `WeightedMean`s, and that there are some."""
    means = jax.tree.leaves(value, is_leaf=is_mean)
    check_type(
        "loss_fn",
        bool(means) and all(map(is_mean, means)),
        lambda: (
            "must return a `WeightedMean`, or a tree of them, not divided yet; beside "
            "it, aux needs `has_aux=True`, and a loss that is no mean needs `combine`; "
            f"got {value!r}."
        ),
    )
    for mean in means:
        check_shape(
            "loss_fn",
            mean.total,
            (),
            "must return scalar `WeightedMean`s: `.merge()` the batch axes, after "
            "reweighting.",
        )


def checks_and_combine(
    combine: Combine | None, coefficients: Mapping[str, ArrayLike] | None
) -> tuple[Callable[[Any], None], Combine]:
    """What checks the parts, and what makes a loss of them."""
    if combine is None:
        return check_means, sum_of_means(coefficients)
    check_function("combine", combine)
    check_value(
        "coefficients",
        coefficients is None,
        "and `combine` do not go together: multiply inside of `combine`, which sees "
        "the parts by name.",
    )

    def combine_parts(parts: PyTree, *params: PyTree) -> Any:
        # Asked afterwards, as a signature is not to be had of every function, and one
        # of too few arguments is the mistake that people make.
        try:
            return combine(parts, *params)
        except TypeError:
            check_type(
                "combine",
                _takes(combine, 1 + len(params)),
                "is called with the parts and what is differentiated, by position: "
                f"{1 + len(params)} arguments. Write `lambda parts, *params: ...`.",
            )
            raise

    return check_parts, combine_parts


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether so many arguments by position fit, as far as that is known."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # it says nothing of its arguments
        return True
    return True


def sum_of_means(coefficients: Mapping[str, ArrayLike] | None) -> Combine:
    """The loss that is made of means by themselves: their sum, each by its factor."""
    check_type(
        "coefficients",
        coefficients is None or isinstance(coefficients, Mapping),
        f"must be a dict of factors by the name of the term; got {coefficients!r}.",
    )
    for name, factor in dict(coefficients or {}).items():
        check_type(
            f"coefficients[{name!r}]",
            not isinstance(factor, Mapping),
            "is a dict: there is one factor for a term by its name, for all means that "
            "the term holds. Return terms side by side, or use `combine`.",
        )
    factors = {
        name: check_scalar(f"coefficients[{name!r}]", factor)
        for name, factor in dict(coefficients or {}).items()
    }

    def combine(value: Any, *_: PyTree) -> jax.Array:
        terms = dict(value) if isinstance(value, Mapping) else {}
        check_value(
            "coefficients",
            factors.keys() <= terms.keys(),
            f"names {list(factors)}, but the terms that `loss_fn` returns are "
            f"{list(terms)}; a lone `WeightedMean` has no name.",
        )
        # Each mean is divided by its own weight, of the whole batch, before the sum.
        loss: jax.Array = jnp.float32(0)
        for name, term in terms.items() if terms else [("", value)]:
            for mean in jax.tree.leaves(term, is_leaf=is_mean):
                loss = loss + factors.get(name, 1.0) * mean.compute()
        return loss

    return combine
