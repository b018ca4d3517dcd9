"""Across steps and epochs: `RunningMean`, a pytree in a jitted step.

It carries what `WeightedMean` carries, a sum and its weight still apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import (
    Any,
    Self,
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wloss_jax._arithmetic import NotForJson, without_arithmetic
from wloss_jax._checks import check_type, check_value
from wloss_jax._devices import (
    jit_compiled,
)
from wloss_jax._division import divide
from wloss_jax.means import WeightedMean


@without_arithmetic(
    "`.update(m)` adds a `WeightedMean`, `.merge(other)` another `RunningMean`."
)
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RunningMean(NotForJson):
    """Adds up `WeightedMean`s over any number of steps without losing count.

    ``mean = sum_i total_i / sum_i weight_i``

    Both sums are pairs of numbers, the rounded sum and what rounding left over, so that
    they have twice the digits: in float32, counts are exact up to 2**47, in updates of
    up to 2**24 elements each, which is where one float32 stops counting. A pytree, that
    lives in a jitted step or a `jax.lax.scan`; one entry for each head or group with
    ``zeros(shape)``, or by `jax.vmap`. NaN or infinity in a sum stays there.

    Over devices, update with ``m.psum(axis_name)``. Over processes that hold one each,
    gather them, and add them up, in float64 or as they are::

        stacked = jax.experimental.multihost_utils.process_allgather(running)
        total, weight = stacked.to_host()    # NumPy arrays of [process_count]
        mean = total.sum() / weight.sum()

        parts = [jax.tree.map(lambda x: x[i], stacked) for i in range(process_count)]
        running = functools.reduce(wl.RunningMean.merge, parts)

    Attributes:
      total: floating ``[...]``, the sum of the totals, rounded.
      total_low: of the same shape, what ``total`` lacks of the sum.
      weight: of the same shape, the sum of the weights, rounded.
      weight_low: of the same shape, what ``weight`` lacks of the sum.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> running = wl.RunningMean.zeros()
      >>> for tokens in (2.0**24, 1.0, 1.0, 1.0):  # the sum of a float32 stays 2**24
      ...     running = running.update(wl.WeightedMean(0.5 * tokens, tokens))
      >>> running
      RunningMean(mean=0.5, weight=16777219.0)
      >>> running.to_host()
      (8388609.5, 16777219.0)

    Source: the pairs are added as in Joldes, Muller and Popescu, "Tight and rigorous
    error bounds for basic building blocks of double-word arithmetic", 2017 (algorithm
    5), https://doi.org/10.1145/3121432
    """

    total: jax.Array
    total_low: jax.Array
    weight: jax.Array
    weight_low: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> Self:
        """Makes one that has seen nothing.

        Args:
          shape: the batch shape, ``(num_heads,)`` say.
        """
        # Four arrays, not one four times: a buffer can be donated only once.
        return cls(*(jnp.zeros(shape) for _ in range(4)))

    def update(self, m: WeightedMean) -> RunningMean:
        """Adds a `WeightedMean` of the same shape.

        Args:
          m: floating ``[...]``; merge the batch axes that this mean does not have.

        Raises:
          AssertionError: ``m`` is no `WeightedMean`, or of another shape.
        """
        check_type(
            "m",
            isinstance(m, WeightedMean),
            f"is {type(m).__name__}: `update` takes the "
            "`WeightedMean` that a loss returns; `merge` takes another `RunningMean`.",
        )
        _check_shape(self, m)
        return _update(self, m)

    def merge(self, other: RunningMean) -> RunningMean:
        """Adds what another one has seen; the order does not matter, to rounding.

        Args:
          other: one of the same shape.

        Raises:
          AssertionError: ``other`` is no `RunningMean`, or of another shape.
        """
        check_type(
            "other",
            isinstance(other, RunningMean),
            f"is {type(other).__name__}: `merge` takes another "
            "`RunningMean`; `update` takes the `WeightedMean` that a loss returns.",
        )
        _check_shape(self, other)
        return _merge(self, other)

    def compute(self, empty: ArrayLike = 0.0) -> jax.Array:
        """Divides: ``total / weight``, and ``empty`` where both are 0.

        Args:
          empty: the value where nothing counted.

        Returns:
          floating ``[...]``, of the shape of ``total``.
        """
        return divide(self.total, self.weight, empty)

    def to_host(self) -> tuple[Any, Any]:
        """Brings the sums to the host in float64, whole.

        Returns:
          ``(total, weight)``: Python floats, or NumPy float64 ``[...]`` if this mean
          has a batch shape.
        """
        total, total_low, weight, weight_low = (
            np.asarray(x, np.float64) for x in jax.tree.leaves(self)
        )
        total, weight = total + total_low, weight + weight_low
        return (total, weight) if total.ndim else (float(total), float(weight))

    def __float__(self) -> float:
        return float(WeightedMean(self.total, self.weight))

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __repr__(self) -> str:
        try:
            mean, (_, weight) = self.compute(), self.to_host()
            return f"RunningMean(mean={mean!s}, weight={weight!s})"
        except Exception:  # traced, or a pytree of something else than arrays
            names = (field.name for field in dataclasses.fields(self))
            fields = (f"{name}={getattr(self, name)!r}" for name in names)
            return f"RunningMean({', '.join(fields)})"


def _check_shape(running: RunningMean, other: RunningMean | WeightedMean) -> None:
    here, there = jnp.shape(running.total), jnp.shape(other.total)
    check_value(
        "total",
        here == there,
        f"has shape {here} here and {there} in what is added: `merge` the batch axes "
        "of a `WeightedMean` first, or start from `RunningMean.zeros(shape)`.",
    )


@jit_compiled()
def _update(running: RunningMean, m: WeightedMean) -> RunningMean:
    zeros = jnp.zeros_like(m.total)
    return _merge(running, RunningMean(m.total, zeros, m.weight, zeros))


@jit_compiled()
def _merge(a: RunningMean, b: RunningMean) -> RunningMean:
    total = _add(a.total, a.total_low, b.total, b.total_low)
    weight = _add(a.weight, a.weight_low, b.weight, b.weight_low)
    return RunningMean(*total, *weight)


def _add(
    a: jax.Array, a_low: jax.Array, b: jax.Array, b_low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds two pairs, with the digits of both."""
    high, error = _two_sum(a, b)
    return _two_sum(high, error + (a_low + b_low))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds two numbers: their rounded sum, and the exact error of rounding it."""
    # Behind the barrier, no compiler may conclude that the error is 0, as real numbers
    # would have it: with `--xla_cpu_enable_fast_math`, 10**6 counts of 1,000 come to
    # 1,007,789,952 without it.
    high = jax.lax.optimization_barrier(jnp.add(a, b))
    b_part = high - a
    error = (a - (high - b_part)) + (b - b_part)
    # The error of an infinite sum would be NaN.
    return high, jnp.where(jnp.isfinite(high), error, 0)


def compute(tree: Any, empty: ArrayLike = 0.0) -> Any:
    """Divides every mean of a tree: a tree of scalars, for a logger.

    ``total / weight`` for each `WeightedMean` and each `RunningMean`

    Arrays and numbers stay as they are, so that a loss and its figures go in together.
    A mapping of any kind comes out as a plain dict.

    To evaluate over an epoch what is no mean, carry its parts in a tree of
    `RunningMean`s, and end in what combines them::

        running = {"p": wl.RunningMean.zeros(), "pp": wl.RunningMean.zeros()}
        for batch in epoch:
            parts = eval_step(params, batch)  # {"p": WeightedMean, "pp": WeightedMean}
            running = jax.tree.map(
                wl.RunningMean.update, running, parts, is_leaf=is_running
            )
        value = combine(running, params)

    Args:
      tree: of `WeightedMean`s, `RunningMean`s, arrays and numbers.
      empty: the value of a mean in which nothing counted.

    Returns:
      A tree like it, with a floating array in place of each mean.

    Raises:
      AssertionError: ``empty`` does not fit a mean.

    Example:
      >>> import wloss_jax as wl
      >>> means = {"loss": wl.WeightedMean(10.0, 4.0), "mae": wl.WeightedMean(3.0, 2.0)}
      >>> {name: float(x) for name, x in wl.compute(means).items()}
      {'loss': 2.5, 'mae': 1.5}
    """
    if isinstance(tree, Mapping):
        return {name: compute(value, empty) for name, value in tree.items()}

    def is_node(x: Any) -> bool:
        return isinstance(x, WeightedMean | RunningMean | Mapping)

    def divided(x: Any) -> Any:
        if isinstance(x, Mapping):
            return compute(x, empty)
        return x.compute(empty) if is_node(x) else x

    return jax.tree.map(divided, tree, is_leaf=is_node)
