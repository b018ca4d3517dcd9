"""Which axis of an array is the batch: told by its shapes at two sizes of the batch.

At one size, a ``[C]`` of groups looks like a ``[B]`` of rows where C is B. So a
function is evaluated abstractly for another number of rows: the axis that changes is
the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wloss_jax._checks import check_value
from wloss_jax._jaxprs import used_inputs, written_out
from wloss_jax._parts import is_mean, weight_indices

PyTree = Any
Place = int | None  # the axis that is the batch, if any
PARTS, AUX = 0, 1


class Sizes:
    """How the shapes of parts and aux change with the number of rows.

    Args:
      rows: how many rows the shapes that are asked about are of.
      others: another number of rows.
      evaluate: ``() -> (parts, aux)`` of so many; called at most once, abstractly. None
        where nothing is divided, and so nothing has to be told apart.
    """

    def __init__(self, rows: int, others: int, evaluate: Callable[[], Any] | None):
        self.rows = rows
        self.others = others
        self._evaluate = evaluate

    @functools.cached_property
    def _other_shapes(self) -> list[list[tuple[int, ...]]]:
        assert self._evaluate is not None
        try:
            results = jax.eval_shape(self._evaluate)
        except Exception as error:
            error.add_note(
                "This came from `loss_fn`, evaluated without numbers for "
                f"{self.others} rows beside {self.rows}, to see which axes are rows."
            )
            raise
        return [
            [shape_of(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_mean)]
            for tree in results
        ]

    def place(self, leaf: Any, kind: int, index: int) -> Place:
        """Which axis of a leaf, that of this ``index`` in parts or aux, is the batch.

        Raises:
          ValueError: its shape changes, and not by the batch along one axis.
        """
        shape = shape_of(leaf)
        if not shape or self._evaluate is None:
            return None
        other = self._other_shapes[kind][index]
        if other == shape:
            return None
        # Exactly one axis has the size of the batch in both, and no other changes.
        for axis, size in enumerate(shape):
            changed = (*shape[:axis], self.others, *shape[axis + 1 :])
            if size == self.rows and other == changed:
                return axis
        raise ValueError(
            f"{list(shape)} for {self.rows} rows and {list(other)} for {self.others}"
        )

    def is_rows(self, leaf: Any, index: int) -> bool:
        """Whether axis 0 of this leaf of the parts is the batch."""
        # Where nothing is divided, the size alone must do.
        if leaf.shape[0] != self.rows or self._evaluate is None:
            return bool(leaf.shape[0] == self.rows)
        try:
            return self.place(leaf, PARTS, index) == 0
        except ValueError:
            return False


def places_of_parts(parts: PyTree, sizes: Sizes | None) -> list[Place]:
    """The axis along which each array is put together; None where it is added up."""
    places: list[Place] = []
    leaves = jax.tree_util.tree_leaves_with_path(parts, is_leaf=is_mean)
    for i, (path, leaf) in enumerate(leaves):
        name = f"parts{jax.tree_util.keystr(path)}"
        if is_mean(leaf):
            place = place_of_mean(name, leaf, sizes, PARTS, i)
            places += [place, place]  # of the total and of the weight
            continue
        if sizes is not None:
            check_value(
                "loss_fn",
                sizes.is_rows(leaf, i),
                f"returns `{name}` of {list(leaf.shape)} for {sizes.rows} rows. Axis 0 "
                "of an array among the parts must be the batch, whose rows are put "
                "together: return a sum over the batch as a `WeightedMean`, and see "
                "that `batch_argnums` names the batch.",
            )
        places.append(0)
    return places


def place_of_mean(
    name: str, mean: Any, sizes: Sizes | None, kind: int, index: int
) -> Place:
    """The axis along which a `WeightedMean` is put together; None if it is added up."""
    if sizes is None:
        return None
    try:
        return sizes.place(mean, kind, index)
    except ValueError as error:
        problem = str(error)
    check_value(
        "loss_fn",
        False,
        f"returns `{name}`, a `WeightedMean`, of {problem}: it can neither be added "
        "up nor put together. Give the batch an axis of its own, or `.merge()`.",
    )
    raise AssertionError  # never: what is false has raised


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array, or of a `WeightedMean`."""
    return tuple(jnp.shape(leaf.total if is_mean(leaf) else leaf))


def check_weights(
    parts_of: Callable[[Any], PyTree], batches: list[Any], asked: list[bool]
) -> None:
    """Checks that no weight stays while the number of rows changes.

    Of a sum, or of a mean of rows, such a weight is no plain sum. That the parts of
    microbatches of one size, taken for means, average to the whole is as may be; those
    of unequal ones do not.

    Args:
      parts_of: makes parts of the rows of a microbatch.
      batches: microbatches of unequal sizes.
      asked: which arrays of the parts are added up and have a say in the loss.
    """
    first, *others = [_fixed_weights(parts_of, batch) for batch in batches]
    for index, weight in first.items():
        check_value(
            "loss_fn",
            not asked[index] or any(other.get(index) != weight for other in others),
            f"returns a `WeightedMean` of weight {weight} for microbatches of unequal "
            "sizes, whatever is in them: its total over its weight is neither a sum "
            "nor a mean over the batch. A sum is `combine=lambda m, *_: m.total`; the "
            "weight of a mean is how much counted; or choose a `num_microbatches` that "
            "divides the batch.",
        )


def _fixed_weights(parts_of: Callable[[Any], PyTree], batch: Any) -> dict[int, float]:
    """The weights that are written out, of totals that see the batch, by index."""
    # A total that does not see the batch, a penalty say, has a weight of 1 by right.
    closed, parts = jax.make_jaxpr(parts_of, return_shape=True)(batch)
    weights = {
        i: written_out(closed, closed.jaxpr.outvars[i]) for i in weight_indices(parts)
    }
    return {
        i: weight
        for i, weight in weights.items()
        if weight is not None and any(used_inputs(closed.jaxpr, i - 1))
    }
