"""Mapped axes and what passes over them; meshes; how functions are compiled."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from wloss_jax._checks import ArgumentNameError, check_numeric, check_type
from wloss_jax._keywords import check_keywords

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Tree = TypeVar("_Tree")
AxisName = str | tuple[str, ...]


def jit_compiled(*static: str) -> Callable[[_Function], _Function]:
    """`jax.jit` with ``static`` arguments, inlined into a caller's jit.

    The type of the function is kept, so that signatures reach editors and checkers.
    """

    def decorate(function: _Function) -> _Function:
        jitted = jax.jit(function, static_argnames=static, inline=True)
        return cast(_Function, jitted)

    return decorate


def compiled_by_option(function: _Function) -> _Function:
    """`jax.jit` of a loss whose options are compiled in, unless they are traced.

    An option that comes as a number, a switch, a tuple or None is static; one that
    comes as an array, a traced scalar say, is an argument like the data. What is data
    by its name is never static, be it a number.
    """
    signature = inspect.signature(function)
    names = list(signature.parameters)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    options = {
        p.name
        for p in signature.parameters.values()
        if p.kind is keyword_only and p.name not in _DATA
    }

    # One jit for each set of options that came as numbers: which arguments are static
    # is said once for a jit, and here it depends on the call.
    @functools.cache
    def jitted(static: tuple[str, ...]) -> Callable[..., Any]:
        anywhere = on_auto_axes(function)
        return jax.jit(anywhere, static_argnames=static, inline=True)

    @functools.cache
    def names_of(count: int, keywords: tuple[str, ...]) -> tuple[str, ...]:
        """The names of what comes, checked once for each way of calling."""
        check_keywords(signature, keywords, count)
        return (*names[:count], *keywords)

    @functools.wraps(function)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        given = names_of(len(args), tuple(kwargs))
        static = []
        for name, value in zip(given, (*args, *kwargs.values()), strict=True):
            # The most common case first: this loop runs on every eager call.
            if isinstance(value, jax.Array):
                continue
            if name in options and not isinstance(value, np.ndarray):
                mend = (
                    " Pass `jnp.asarray(...)` of it, if it takes an array."
                    if isinstance(value, list | tuple)
                    else ""
                )
                check_type(
                    name,
                    isinstance(value, _STATIC),
                    f"must be a number, a switch or an array; got {value!r}.{mend}",
                )
                static.append(name)
            elif value is not None:
                check_numeric(name, value)
        return jitted(tuple(static))(*args, **kwargs)

    _COMPILED.add(compiled)
    return cast(_Function, compiled)


def is_compiled(function: Callable[..., Any]) -> bool:
    """Whether `compiled_by_option` made a function."""
    return function in _COMPILED


_COMPILED: set[Callable[..., Any]] = set()
_DATA = (
    *("where", "lengths", "weights", "segment_ids"),
    *("bias", "class_weights", "class_mask"),
)
_STATIC = (bool, int, float, str, tuple, np.generic, type(None))


def explicit_mesh(tree: Any) -> jax.sharding.AbstractMesh | None:
    """The mesh of the arrays in ``tree``, if it has explicit axes."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh: jax.sharding.AbstractMesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def sharded_like(first: jax.Array, array: jax.Array) -> PartitionSpec:
    """How an array is sharded that lines up with the leading axes of ``first``."""
    spec = jax.typeof(first).sharding.spec
    return PartitionSpec(*spec[: array.ndim])


def align_axes(first: jax.Array, array: jax.Array) -> jax.Array:
    """Shards ``array`` like the leading axes of ``first``, on explicit axes."""
    if array.ndim == 0 or explicit_mesh(first) is None:
        return array
    return _reshard(array, first, sharded_like(first, array))


def align_rows(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Shards axis 0 of all arrays as that of the first that is, on explicit axes.

    `jax.vmap` wants what it maps over sharded alike.
    """
    specs = {name: sharded_like(x, x) for name, x in arrays.items()}
    names = [name for name, spec in specs.items() if spec and spec[0]]
    if not names or explicit_mesh(arrays[names[0]]) is None:
        return arrays
    first = arrays[names[0]]
    rows = specs[names[0]][0]
    return {
        name: _reshard(x, first, PartitionSpec(rows, *specs[name][1:]))
        for name, x in arrays.items()
    }


def _reshard(array: jax.Array, first: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Shards ``array`` on the mesh of ``first``."""
    # In a trace the type holds an abstract mesh, without the devices.
    mesh: Any = jax.typeof(first).sharding.mesh
    resharded: jax.Array
    if isinstance(first, jax.core.Tracer):
        resharded = jax.sharding.reshard(array, NamedSharding(mesh, spec))
    else:  # outside of a jit, it would need the mesh in a context
        mesh = cast(NamedSharding, first.sharding).mesh
        resharded = jax.device_put(array, NamedSharding(mesh, spec))
    return resharded


def num_shards(array: jax.Array, axis: int) -> int:
    """In how many parts an ``axis`` of an array is, on explicit axes."""
    sharding = jax.typeof(array).sharding
    entry = sharding.spec[axis] if len(sharding.spec) > axis else None
    names = () if entry is None else axis_names(entry)
    return math.prod(sharding.mesh.shape[name] for name in names)


def on_auto_axes(function: Callable[..., Any], specs: Any = None) -> Callable[..., Any]:
    """Leaves it to the compiler how arrays are sharded inside of ``function``.

    On a mesh of explicit axes, JAX wants the arrays of an operation sharded alike, and
    knows no gather from a sharded axis. Inside, those axes are as on any other mesh.

    Args:
      function: of arrays and what else there is, positional or by keyword.
      specs: how the results are sharded, a tree of specs; whole on each device by
        default.
    """

    @functools.wraps(function)
    def anywhere(*args: Any, **kwargs: Any) -> Any:
        mesh = explicit_mesh((args, kwargs))
        if mesh is None:
            return function(*args, **kwargs)
        # `auto_axes` takes arrays alone: a number or a switch is put back in its place
        # inside.
        leaves, tree = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

        def of_arrays(arrays: list[jax.Array]) -> Any:
            rest = iter(arrays)
            filled = [
                next(rest) if known else leaf
                for known, leaf in zip(is_array, leaves, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(tree, filled)
            return function(*args, **kwargs)

        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            PartitionSpec() if specs is None else specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        inside = jax.sharding.auto_axes(
            of_arrays, axes=mesh.explicit_axes, out_sharding=shardings
        )
        arrays = [x for x, known in zip(leaves, is_array, strict=True) if known]
        return inside(arrays)

    return anywhere


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """The names in ``axis_name``, which may be one or a tuple of them."""
    check_type(
        "axis_name",
        isinstance(axis_name, str | tuple | list),
        f"must be a name or a tuple of them; got {axis_name!r}.",
    )
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def check_mapped(option: str, axis_name: AxisName) -> None:
    """Checks that the axes in an ``option`` are mapped where this is called."""
    for name in axis_names(axis_name):
        try:
            jax.lax.axis_size(name)
        except NameError as error:
            raise ArgumentNameError(
                f"`{option}` {name!r} is not mapped here: call the function inside "
                f"`jax.shard_map` or `jax.pmap` over that axis, or leave `{option}` "
                "out under plain `jax.jit`, where sharded arrays need none."
            ) from error


def psum(tree: _Tree, axis_name: AxisName) -> _Tree:
    """`jax.lax.psum` of arrays, whether or not they differ between the devices."""
    if not axis_names(axis_name):
        return tree
    # With `check_vma` JAX refuses to add up what is the same on all devices.
    varying = jax.tree.map(lambda x: vary(x, axis_name), tree)
    return cast(_Tree, jax.lax.psum(varying, axis_name))


def vary(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """Types ``array`` as one that differs between the devices of a `jax.shard_map`.

    With ``check_vma`` on, `jax.lax.psum` over several axes wants its operand to vary
    over all of them or none, and the gradient with respect to an array that does *not*
    vary is summed over the devices by itself. An array that varies escapes both. Where
    nothing tracks what varies (``check_vma`` off, `jax.vmap`), nothing happens.
    """
    # The axes of a `jax.shard_map`; that of a `jax.vmap` is none of them.
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    varying = jax.typeof(array).manual_axis_type.varying
    missing = tuple(
        name for name in axis_names(axis_name) if name in mapped and name not in varying
    )
    if not missing:
        return array
    return cast(jax.Array, jax.lax.pcast(array, missing, to="varying"))


def gather(array: jax.Array, axis_name: AxisName, axis: int) -> jax.Array:
    """Puts the rows of all devices together, in the order of the mapped axes."""
    names = axis_names(axis_name)
    if not names:
        return array
    own = vary(array, names)
    gathered: jax.Array = jax.lax.all_gather(own, names, axis=axis, tiled=True)
    return gathered


def own_rows(gathered: jax.Array, axis_name: AxisName, axis: int) -> jax.Array:
    """The rows of this device, of what `gather` put together."""
    names = axis_names(axis_name)
    if not names:
        return gathered
    rows = gathered.shape[axis] // count_devices(names)
    start = jax.lax.axis_index(names) * rows
    return jax.lax.dynamic_slice_in_dim(gathered, start, rows, axis)


def count_devices(axis_name: AxisName) -> int:
    """The number of devices on the mapped axes."""
    return math.prod(jax.lax.axis_size(name) for name in axis_names(axis_name))


def from_first(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """What the first device holds, for what all devices hold alike.

    A `jax.shard_map` that checks what varies cannot know that it is alike; elsewhere,
    nothing passes between the devices.
    """
    varying = jax.typeof(array).manual_axis_type.varying
    names = tuple(name for name in axis_names(axis_name) if name in varying)
    if not names:
        return array
    # A sum in which all but one are 0: JAX knows of a sum that it is alike everywhere.
    is_first = jax.lax.axis_index(names) == 0
    return psum(jnp.where(is_first, array, jnp.zeros_like(array)), names)


def unsharded_rows(array: jax.Array) -> jax.Array:
    """An array whose axis 0 is whole on each device of a mesh of explicit axes.

    So that it meets its like as it would on one device; of other meshes the compiler
    takes care.
    """
    sharding = jax.typeof(array).sharding
    if not sharding.spec or sharding.spec[0] is None:
        return array
    spec = jax.sharding.PartitionSpec(None, *sharding.spec[1:])
    whole: jax.Array = jax.sharding.reshard(
        array, jax.sharding.NamedSharding(sharding.mesh, spec)
    )
    return whole
