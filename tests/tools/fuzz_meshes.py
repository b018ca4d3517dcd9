"""Meshes with explicit axes, for `tests.tools.fuzz`: how its arrays are placed on one.

The first array is sharded over the batch, the positions, the classes or several of
them; the others alike, or whole on each device.
"""

import contextlib

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

NAMES = ("data", "seq", "cls")


def draw(rng):
    """How arrays are placed: the axes, whether alike, whether a mesh is in context."""
    axes = tuple(name if rng.random() < 0.6 else None for name in NAMES)
    return axes, bool(rng.random() < 0.5), bool(rng.random() < 0.5)


def on_mesh(step, placement):
    """``step(variables, data)`` of arrays that are placed on a mesh."""
    axes, alike, has_context = placement

    def run(variables, data):
        mesh = jax.make_mesh((2, 2, 2), NAMES, axis_types=(AxisType.Explicit,) * 3)

        def put(array, axes=()):
            spec = [
                axis if size % 2 == 0 else None
                for axis, size in zip(axes, np.shape(array), strict=False)
            ]
            return jax.device_put(array, NamedSharding(mesh, P(*spec)))

        others = axes if alike else ()
        first, *parts = variables["parts"]
        placed = {
            "parts": [put(first, axes), *(put(part, others) for part in parts)],
            "shared": jax.tree.map(put, variables["shared"]),
        }
        of_rows = {k: data[k] for k in ("rest", "keywords")}
        rows = jax.tree.map(lambda x: put(x, others), of_rows)
        with jax.set_mesh(mesh) if has_context else contextlib.nullcontext():
            return step(placed, jax.tree.map(put, data) | rows)

    return run


def whole(array):
    """An array that is whole on each device: so it meets others that are."""
    mesh = jax.typeof(array).sharding.mesh
    if not mesh.explicit_axes:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, P()))
