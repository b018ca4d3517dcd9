"""Schemes for `WeightedMean.reweight`: by size, by loss, one vote a sample.

A scheme is any callable ``(size, loss) -> weight`` of floating arrays of one shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from wloss_jax._checks import check_array, check_number, check_type, is_traced
from wloss_jax.means import WeightedMean

Scheme = Callable[[jax.Array, jax.Array], jax.Array]


def size_power(p: float) -> Scheme:
    """Makes the scheme ``weight = size**p``.

    At 1 every element counts the same, at 0 every sample that is not empty does;
    between them lie compromises.

    Args:
      p: the power.

    Returns:
      A scheme for `WeightedMean.reweight`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> per_sample = wl.WeightedMean(jnp.array([9.0, 4.0]), jnp.array([9.0, 1.0]))
      >>> for p in (1.0, 0.5, 0.0):
      ...     print(per_sample.reweight(wl.size_power(p)).merge())
      WeightedMean(mean=1.3, weight=10.0)
      WeightedMean(mean=1.75, weight=4.0)
      WeightedMean(mean=2.5, weight=2.0)
    """
    return _SizePower(_check_power(p))


def loss_power(p: float) -> Scheme:
    """Makes the scheme ``weight = size * stop_gradient(loss)**p``.

    Each entry's weight depends on its own loss alone, so the result is the same at
    every split; no gradient flows through the factor. Losses must not be negative.

    Args:
      p: the power; above 0, entries with a large loss count for more.

    Returns:
      A scheme for `WeightedMean.reweight`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> per_sample = wl.WeightedMean(jnp.array([2.0, 6.0]), jnp.array([2.0, 2.0]))
      >>> per_sample.merge()
      WeightedMean(mean=2.0, weight=4.0)
      >>> per_sample.reweight(wl.loss_power(1.0)).merge()
      WeightedMean(mean=2.5, weight=8.0)
    """
    return _LossPower(_check_power(p))


@dataclasses.dataclass(frozen=True)
class _Power:
    """A scheme that is a value: those of one power share a compiled program."""

    p: float | jax.Array

    @property
    def is_value(self) -> bool:
        """Whether the power is a number, and not traced."""
        return not is_traced(self.p)


class _SizePower(_Power):
    def __call__(self, size: jax.Array, loss: jax.Array) -> jax.Array:
        return size**self.p


class _LossPower(_Power):
    def __call__(self, size: jax.Array, loss: jax.Array) -> jax.Array:
        return size * jax.lax.stop_gradient(loss) ** self.p


def _check_power(p: float) -> float | jax.Array:
    if is_traced(p):
        return check_array("p", p)
    check_number("p", p)
    return p


def mean_of_means_bias(m: WeightedMean) -> jax.Array:
    """Measures what averaging the means of ``m`` would have got wrong.

    ``bias = mean_b(total_b / weight_b) - sum_b total_b / sum_b weight_b``

    Empty entries are in neither mean.

    Args:
      m: a `WeightedMean` of ``[B]``: one entry a sample, microbatch or device.

    Returns:
      The scalar bias, mean of means less weighted mean.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> m = wl.WeightedMean(jnp.array([3.0, 3.0]), jnp.array([3.0, 1.0]))
      >>> print(wl.mean_of_means_bias(m))  # (1 + 3) / 2 for (3 + 3) / (3 + 1)
      0.5
    """
    check_type(
        "m",
        isinstance(m, WeightedMean),
        f"must be a WeightedMean; got {type(m).__name__}.",
    )
    return m.reweight(size_power(0.0)).merge().compute() - m.merge().compute()
