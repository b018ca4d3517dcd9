"""Primitives: functions of arrays that are traced when they are lowered.

Only then are the platform and the number of devices known. With `wloss_jax._jaxprs`,
all that stands on JAX's less public modules is in this file:

- `jax.extend.core.Primitive`: with ``multiple_results``, its rules for evaluation and
  for types (``def_impl``, ``def_abstract_eval``);
- `jax.interpreters.mlir`: ``lower_fun``, ``register_lowering``, and what the context of
  a lowering says of devices (``axis_context``);
- `jaxlib.mlir.dialects.sdy`, and the module that is being lowered: how the arguments
  of a whole program are sharded;
- `jax.interpreters.ad`: the registries of jvp and transposition, and symbolic zeros;
- `jax.interpreters.batching`: the registry of rules for `jax.vmap` that are told the
  axis (``fancy_primitive_batchers``);
- ``manual_axis_type`` of the type of an array: over which mapped axes it varies.

When JAX moves one of these, the first tests to fail are those of
``tests/test_linear_primitives.py``, each of which uses one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxlib.mlir.dialects import sdy


class Argument(NamedTuple):
    """An argument of the whole program, and how it is sharded."""

    shape: tuple[int, ...]
    spec: tuple[tuple[str, ...], ...]


class Device(NamedTuple):
    """What is known once a program is lowered."""

    platform: str
    num_devices: int = 1  # that the compiler may spread the program over
    mesh: Any = None  # of those
    arguments: tuple[Argument, ...] = ()  # of the whole program


def make_primitive(name: str, function: Callable[..., list[jax.Array]]) -> Primitive:
    """Makes a primitive of a function that wants to know its device.

    The function is called as ``function(*arrays, device=device, **params)`` once it is
    known where the program will run, and returns a list of arrays.
    """
    primitive = Primitive(f"linear_{name}")
    primitive.multiple_results = True

    def run(*arrays: ArrayLike, **params: Any) -> list[jax.Array]:
        # Outside of a jit, constants may come as NumPy's arrays.
        device = Device(jax.default_backend())
        return function(*map(jnp.asarray, arrays), device=device, **params)

    # Shapes are the same on every platform, so that any device will do.
    def infer(*avals: Any, **params: Any) -> Any:
        on_device = functools.partial(function, device=Device("cpu"), **params)
        return jax.make_jaxpr(on_device)(*avals).out_avals

    def lower(platform: str, ctx: Any, *arrays: Any, **params: Any) -> Any:
        device = _lowered_for(platform, ctx)
        on_device = functools.partial(function, device=device, **params)
        with jax.default_matmul_precision(params["task"].matmul_precision):
            return mlir.lower_fun(on_device, multiple_results=True)(ctx, *arrays)

    primitive.def_impl(run)
    primitive.def_abstract_eval(infer)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        rule = functools.partial(lower, platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _lowered_for(platform: str, ctx: Any) -> Device:
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        # Under `jax.shard_map` the program is one device's, but for the axes left out.
        sizes = dict(context.mesh.shape)
        left_out = [sizes[name] for name in sizes if name not in context.manual_axes]
        return Device(platform, math.prod(left_out))
    if not isinstance(context, mlir.ShardingContext) or context.num_devices == 1:
        return Device(platform)
    # Several meshes may have these devices; which one is meant is known if it is one.
    meshes = {aval.sharding.mesh for aval in ctx.avals_in if aval.ndim}
    meshes = {mesh for mesh in meshes if mesh.size == context.num_devices}
    if len(meshes) != 1:
        return Device(platform, context.num_devices)
    arguments = tuple(_arguments(ctx.module_context.module))
    return Device(platform, context.num_devices, meshes.pop(), arguments)


def _arguments(module: Any) -> Iterator[Argument]:
    """The arrays that the program of a module takes, where they are sharded by axes."""
    for operation in module.body.operations:
        attributes = operation.attributes
        if "arg_attrs" not in attributes or attributes["sym_name"].value != "main":
            continue
        types = operation.type.inputs
        for array, attribute in zip(types, attributes["arg_attrs"], strict=True):
            if "sdy.sharding" in attribute:
                sharding = sdy.TensorShardingAttr(attribute["sdy.sharding"])
                spec = tuple(map(_axes, sharding.dimension_shardings))
                yield Argument(tuple(array.shape), spec)


def _axes(of_dimension: Any) -> tuple[str, ...]:
    axes = sdy.DimensionShardingAttr(of_dimension).axes
    return tuple(sdy.AxisRefAttr(axis).name for axis in axes)


# ---------------------------------------------------------------- rules of a primitive


def on_jvp(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Registers ``rule(primals, tangents, **params) -> (outs, changes)``."""
    ad.primitive_jvps[primitive] = rule


def on_transpose(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Registers ``rule(cotangents, *arrays, **params) -> cotangents of arrays``."""
    ad.primitive_transposes[primitive] = rule


def on_vmap(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Registers ``rule(axis, arrays, dims, **params) -> (outs, dims)``."""
    batching.fancy_primitive_batchers[primitive] = rule


def is_zero(tangent: Any) -> bool:
    """Whether a tangent or cotangent is one that JAX knows to be 0."""
    return type(tangent) is ad.Zero


def zero_like(x: Any) -> Any:
    """Gives such a tangent of 0 for an array."""
    return ad.Zero(jax.typeof(x))


def filled(tangent: Any) -> Any:
    """Makes an array of such a tangent of 0."""
    return ad.instantiate_zeros(tangent)


def is_linear_input(array: Any) -> bool:
    """Whether this input of a rule for transposition is one to be solved for."""
    return bool(ad.is_undefined_primal(array))


def varying(x: Any) -> frozenset[str]:
    """The mapped axes over which an array differs."""
    aval = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    return cast(frozenset[str], aval.manual_axis_type.varying)


def varying_type(
    shape: tuple[int, ...], dtype: Any, axes: frozenset[str]
) -> jax.ShapeDtypeStruct:
    """The type of an array that differs over mapped axes."""
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.ShapeDtypeStruct(
        shape,
        dtype,
        sharding=NamedSharding(cast(Any, mesh), PartitionSpec()),
        manual_axis_type=jax.sharding.ManualAxisType(varying=axes),
    )
