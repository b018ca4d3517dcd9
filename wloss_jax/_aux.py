"""What a loss function returns beside its loss, over microbatches and devices.

`WeightedMean`s add up; what has the batch's axis is put together in the order of the
batch; the rest comes as it is, once a microbatch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from wloss_jax._checks import check_type, check_value
from wloss_jax._devices import AxisName
from wloss_jax._parts import is_mean
from wloss_jax._places import AUX, Place, Sizes, place_of_mean, shape_of
from wloss_jax._rows import Cut
from wloss_jax.means import WeightedMean

PyTree = Any


def places_of_aux(aux: PyTree, sizes: Sizes | None, *, arrays: bool) -> list[Place]:
    """The axis of each mean, and of other ``arrays`` if they are asked for."""
    places: list[Place] = []
    leaves = jax.tree_util.tree_leaves_with_path(aux, is_leaf=is_mean)
    for i, (path, leaf) in enumerate(leaves):
        if is_mean(leaf):
            name = f"aux{jax.tree_util.keystr(path)}"
            places.append(place_of_mean(name, leaf, sizes, AUX, i))
        elif arrays and sizes is not None and sizes.rows in shape_of(leaf):
            try:
                places.append(sizes.place(leaf, AUX, i))
            except ValueError:
                places.append(None)
        elif arrays and sizes is None and 0 in shape_of(leaf):
            places.append(shape_of(leaf).index(0))  # of a batch without rows
        else:
            places.append(None)
    return places


def check_aux(aux: PyTree) -> None:
    """Checks that microbatches can stack all that is in the aux."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        _check_leaf(f"`aux{jax.tree_util.keystr(path)}`", leaf)


def _check_leaf(place: str, leaf: Any) -> None:
    check_type(
        "loss_fn",
        hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex),
        lambda: (
            f"returns {leaf!r} at {place}, which microbatches cannot stack: they "
            "compile the loss, so aux holds arrays, numbers and `WeightedMean`s. Leave "
            "it out."
        ),
    )


def put_aux_together(cut: Cut, groups: list[PyTree], places: list[Place]) -> PyTree:
    """Means without the batch are added up, the rest without it is stacked."""
    treedef: Any = jax.tree.structure(groups[0], is_leaf=is_mean)
    leaves = zip(
        *(jax.tree.leaves(aux, is_leaf=is_mean) for aux in groups), strict=True
    )
    together: list[Any] = []
    for stacked, place in zip(leaves, places, strict=True):
        if is_mean(stacked[0]):
            total = cut.put_together([x.total for x in stacked], place)
            weight = cut.put_together([x.weight for x in stacked], place)
            together.append(WeightedMean(total, weight))
        elif place is not None:
            together.append(cut.put_together(stacked, place))
        else:
            shapes = {x.shape[1:] for x in stacked}
            check_value(
                "loss_fn",
                len(shapes) == 1,
                f"returns an array in its aux whose shape changes with the rows of a "
                f"microbatch, {sorted(shapes)}, and has no axis that is the batch: "
                f"give it one, or cut the {cut.size} rows into a number of "
                "microbatches that divides them.",
            )
            together.append(jnp.concatenate(stacked))
    return treedef.unflatten(together)


def add_aux_up(aux: PyTree, places: list[Place], axis_name: AxisName) -> PyTree:
    """Adds means up over devices; what is of the batch stays where its rows are."""
    rest = iter(places)

    def add(x: Any) -> Any:
        is_added = next(rest) is None and is_mean(x)
        return x.psum(axis_name) if is_added else x

    return jax.tree.map(add, aux, is_leaf=is_mean)
