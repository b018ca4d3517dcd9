"""Rows: cut into microbatches, and put together again in the order of the batch.

Microbatch i takes the rows ``i, i + k, i + 2 k, ...``, so that a batch that is sharded
over devices stays where it is. Where k does not divide the batch, the first
microbatches have one row more: no row is made up, so none has to be taken out again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wloss_jax._checks import check_known, check_type, check_value
from wloss_jax._devices import num_shards, on_auto_axes

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Cut:
    """How ``size`` rows are cut into ``count`` microbatches.

    Attributes:
      size: the number of rows.
      count: the number of microbatches, at most one a row.
    """

    size: int
    count: int

    @property
    def groups(self) -> list[tuple[int, int, int]]:
        """First microbatch, last one exclusive, and rows in each: longer ones first."""
        # Two scans at most: within a scan all microbatches have one shape.
        rows, longer = divmod(self.size, self.count)
        groups = [(0, longer, rows + 1), (longer, self.count, rows)]
        return [group for group in groups if group[0] < group[1]]

    @property
    def is_even(self) -> bool:
        """Whether all microbatches have the same number of rows."""
        return len(self.groups) == 1

    def take(self, tree: PyTree, step: jax.Array | int, rows: int) -> PyTree:
        """The ``rows`` rows of microbatch ``step`` of arrays ``[B, ...]``."""
        return jax.tree.map(lambda x: self.take_along(x, 0, step, rows), tree)

    def take_along(
        self, array: Any, axis: int, step: jax.Array | int, rows: int
    ) -> jax.Array:
        """The same of one array whose ``axis`` is the batch."""
        x = jnp.moveaxis(jnp.asarray(array), axis, 0)
        least = self.size // self.count

        def take(x: jax.Array, step: jax.Array | int) -> Any:
            # Row i of the batch stands at [i // k, i % k]: a microbatch is a column, of
            # which each device that holds some rows has its share.
            head = x if self.is_even else x[: least * self.count]
            head = head.reshape(least, self.count, *x.shape[1:])
            taken = jax.lax.dynamic_index_in_dim(head, step, 1, keepdims=False)
            if rows > least:
                last = jax.lax.dynamic_index_in_dim(x, least * self.count + step, 0)
                taken = jnp.concatenate([taken, last])
            return taken

        if not self.is_even or least % num_shards(x, 0):
            # Rows that the devices cannot share evenly are whole on each.
            rest = jax.typeof(x).sharding.spec[1:]
            take = on_auto_axes(take, jax.sharding.PartitionSpec(None, *rest))
        taken: jax.Array = take(x, step)
        return jnp.moveaxis(taken, 0, axis)

    def put_together(self, groups: Sequence[jax.Array], axis: int | None) -> jax.Array:
        """Undoes `take_along`, or adds up, what the microbatches gave.

        Args:
          groups: for each of `groups`, the arrays of its microbatches on a new axis 0.
          axis: of each microbatch's array, the one that is its rows; None to add up.
        """
        if axis is None:
            return sum((x.sum(0) for x in groups[1:]), groups[0].sum(0))
        # Each is [microbatches, rows, ...]; its transpose has the order of the batch.
        stacked = [jnp.moveaxis(x, axis + 1, 1) for x in groups]
        least = self.size // self.count
        head = stacked[0]
        if not self.is_even:
            head = jnp.concatenate([x[:, :least] for x in stacked])
        rest = head.shape[2:]
        rows = head.swapaxes(0, 1).reshape(least * self.count, *rest)
        if not self.is_even:  # the one row more of the first microbatches comes last
            rows = jnp.concatenate([rows, stacked[0][:, least]])
        return jnp.moveaxis(rows, 0, axis)

    def scan(
        self, body: Callable[..., tuple[Any, Any]], carry: Any
    ) -> tuple[Any, list[Any]]:
        """Runs ``body(carry, step, rows)`` for each microbatch, one after the other.

        Returns:
          The last carry, and what the microbatches of each group gave, stacked.
        """
        results = []
        for first, last, rows in self.groups:
            of_group = functools.partial(body, rows=rows)
            carry, stacked = jax.lax.scan(of_group, carry, jnp.arange(first, last))
            results.append(stacked)
        return carry, results


def cut_batch(batch: PyTree, count: int) -> Cut:
    """Checks that axis 0 of every leaf is the batch, and cuts it."""
    shapes = {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    sizes = {shape[:1] for shape in shapes.values()}
    mend = "Hand in what is no array of rows by another argument, or leave it out."
    check_value(
        "batch_argnums",
        len(sizes) == 1 and () not in sizes,
        "names the batch: axis 0 of every leaf of it must be the batch, to be cut "
        f"into {count} microbatches; got {shapes}. {mend}",
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        dtype = getattr(leaf, "dtype", None)
        check_type(
            "batch_argnums",
            not (isinstance(dtype, np.dtype) and dtype.kind in "OSUMm"),
            "names the batch: every leaf of it must be an array that JAX takes; got "
            f"one of dtype {dtype} at `{jax.tree_util.keystr(path)}`. {mend}",
        )
    (size,) = sizes.pop()
    check_known(
        "num_microbatches",
        (size,),
        f"how the batch is cut into {count} depends on its size. Export one program "
        "for each size, or leave `num_microbatches` at 1.",
    )
    return Cut(size, max(1, min(count, size)))


def batch_size(batch: PyTree) -> int | None:
    """The size of axis 0 that all leaves share, or None where they share none."""
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None
