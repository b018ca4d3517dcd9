"""Batches that a loss must not tell apart: padded, longer, scaled; their checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import (
    Any,
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_value,
)
from wloss_jax.masks import (
    expand_leading,
)
from wloss_jax.testing._trials import Change, Outcome, PyTree, Trial, by_path, is_none

CONTENTS = range(6)
ORDINARY = (0, 1)


def contents(leaf: ArrayLike) -> list[Any]:
    """What padding is filled with; the first two are `ORDINARY`."""
    dtype = jnp.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jnp.bool_):
        return [False, True] * 3
    if jnp.issubdtype(dtype, jnp.integer):
        low, high = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
        return [0, 1, max(-100, low), max(-1, low), low, high]
    huge = float(jnp.finfo(dtype).max) / 2
    return [0.5, 7.25, np.nan, np.inf, -np.inf, huge]


def trailing(mask: Any, leaf: ArrayLike) -> Any:
    return mask.reshape(mask.shape + (1,) * (np.ndim(leaf) - mask.ndim))


def lengthened(
    leaves: list[Any], masks: list[Any]
) -> Iterator[tuple[tuple[int, ...], list[Any]]]:
    """Batches with axis 1 doubled, by the shape that a mask of lengths has."""
    ends = {}
    for mask in masks:
        if mask is not None and mask.ndim > 1:
            # A mask of lengths is True up to somewhere on each row, and False after it.
            counts = mask.any(axis=tuple(range(2, mask.ndim)))
            if (counts[:, 1:] <= counts[:, :-1]).all() and not counts.all():
                ends[counts.shape] = int(counts.sum(1).argmin())
    for shape, shortest in ends.items():
        longer = []
        for leaf in leaves:
            if np.shape(leaf)[:2] == shape:
                padding = jnp.broadcast_to(leaf[shortest, -1], leaf.shape)
                leaf = jnp.concatenate([leaf, padding], axis=1)
            longer.append(leaf)
        yield shape, longer


def take(order: Any, leaf: Any) -> jax.Array:
    return jnp.asarray(leaf)[order]


def find_floor(loss: Trial, batch: PyTree, whole: Outcome) -> Change | None:
    """What ``weights`` far down and far up do to a loss, beside scaling it.

    A mean stays, a sum is scaled with them; what is divided by an epsilon more, or by 1
    at least, does the one at this end and the other at that.
    """

    def change(scale: float, power: int) -> Change | None:
        got = loss.run(_scale_weights(batch, scale)).times(scale**-power)
        return loss.change(whole, whole._replace(means=got.means))

    # Beyond an epsilon of 1e-8, and yet nothing overflows.
    down, up = 2.0**-30, 2.0**30
    if (change(down, 1) or change(up, 1)) is None:
        return None
    return change(down, 0) or change(up, 0)


def _scale_weights(batch: PyTree, scale: float) -> PyTree:
    def scaled(path: tuple[Any, ...], leaf: Any) -> Any:
        if _last_name(path) != "weights":
            return leaf
        # In float32 at least, as float16 has no room.
        dtype = jnp.promote_types(
            check_array("weights", leaf, float).dtype, jnp.float32
        )
        return jnp.asarray(leaf, dtype) * scale

    return jax.tree_util.tree_map_with_path(scaled, batch)


def _last_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf: the last key or attribute on its path, if that is a name."""
    key = path[-1] if path else None  # None where the batch is one bare array
    return str(getattr(key, "key", getattr(key, "name", None)))


def check_masks(batch: PyTree, where: PyTree) -> list[Any]:
    """The masks, a NumPy array or None for each leaf of the batch."""
    structures = [jax.tree.structure(tree, is_leaf=is_none) for tree in (where, batch)]
    check_value(
        "where",
        len(set(structures)) == 1,
        "must be a tree like `batch`, with None for the leaves that have no mask.",
    )
    checked = []
    masks = jax.tree.leaves(where, is_leaf=is_none)
    for (name, leaf), mask in zip(by_path(batch, is_none).items(), masks, strict=True):
        if mask is not None:
            mask = check_array(f"where{name}", mask, bool)
            expand_leading(f"where{name}", mask, np.shape(leaf))
            mask = np.asarray(mask)
        checked.append(mask)
    check_value(
        "where",
        any(not mask.all() for mask in checked if mask is not None),
        "masks nothing: hand in a batch with padding.",
    )
    return checked


def check_rows(batch: PyTree) -> int:
    shapes = {name: np.shape(leaf) for name, leaf in by_path(batch).items()}
    sizes = {shape[:1] for shape in shapes.values()}
    check_value(
        "batch",
        len(sizes) == 1 and () not in sizes and min(sizes) > (1,),
        f"must have the batch as axis 0 of every leaf, of at least 2 rows; got "
        f"{shapes}.",
    )
    return int(next(iter(shapes.values()))[0])


def check_finite(outcome: Outcome, what: str) -> None:
    check_value(
        "loss_fn",
        outcome.is_finite(),
        f"gives, with {what}, a loss or gradient that is not finite, so that nothing "
        "can be compared: look for NaN at an element that counts, or for a division by "
        f"0. The means: {outcome.means}.",
    )
