"""Mapped axes and what passes over them; how functions are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import (
    Any,
    TypeVar,
    cast,
)

import chex
import jax

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Tree = TypeVar("_Tree")
AxisName = str | tuple[str, ...]


def jit_compiled(*static: str) -> Callable[[_Function], _Function]:
    """`jax.jit` with ``static`` arguments, which melts into a caller's jit.

    The type of the function is kept, so that signatures reach editors and checkers.
    """

    def decorate(function: _Function) -> _Function:
        jitted = jax.jit(function, static_argnames=static, inline=True)
        return cast(_Function, jitted)

    return decorate


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """The names in ``axis_name``, which may be one or a tuple of them."""
    chex.assert_equal(
        isinstance(axis_name, str | tuple | list),
        True,
        custom_message=f"`axis_name` must be a name or a tuple of them; got "
        f"{axis_name!r}.",
    )
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def check_mapped(option: str, axis_name: AxisName) -> None:
    """Takes the axes in an ``option`` that are mapped where this is called."""
    for name in axis_names(axis_name):
        try:
            jax.lax.axis_size(name)
        except NameError as error:
            raise NameError(
                f"`{option}` {name!r} is not mapped here: call the function inside "
                f"`jax.shard_map` or `jax.pmap` over that axis, or leave `{option}` "
                "out under plain `jax.jit`, where sharded arrays need none."
            ) from error


def psum(tree: _Tree, axis_name: AxisName) -> _Tree:
    """`jax.lax.psum` of arrays, whether or not they differ between the devices."""
    if not axis_names(axis_name):
        return tree
    varying = jax.tree.map(lambda x: vary(x, axis_name), tree)
    return cast(_Tree, jax.lax.psum(varying, axis_name))


def vary(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """Types ``array`` as one that differs between the devices of a `jax.shard_map`.

    With ``check_vma`` on, `jax.lax.psum` over several axes wants its operand to vary
    over all of them or none, and the gradient with respect to an array that does *not*
    vary is summed over the devices by itself. An array that varies escapes both. Where
    nothing tracks what varies (``check_vma`` off, `jax.vmap`), nothing happens.
    """
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    varying = jax.typeof(array).manual_axis_type.varying
    missing = tuple(
        name for name in axis_names(axis_name) if name in mapped and name not in varying
    )
    if not missing:
        return array
    return cast(jax.Array, jax.lax.pcast(array, missing, to="varying"))
