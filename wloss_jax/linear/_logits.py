"""What a loss of logits is to the engine: a value with these few parts.

The engine makes the logits of a chunk of tokens and asks a `LogitLoss` for their
losses. A loss may have a slope of its own, where that is faster than the one that JAX
derives; everything else, from the gradient of the kernel to second derivatives, is the
engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from wloss_jax._devices import vary

Arrays = Sequence[Any]


class Place(NamedTuple):
    """Where a chunk is: what a loss of logits may want to know of it."""

    platform: str
    vocab_axis_name: str | None = None

    def add(self, x: jax.Array) -> jax.Array:
        """Adds up over the shards of the vocabulary."""
        if self.vocab_axis_name is None:
            return x
        # What all shards hold alike, labels say, JAX would refuse to add up.
        varying = vary(x, self.vocab_axis_name)
        return cast(jax.Array, jax.lax.psum(varying, self.vocab_axis_name))

    def largest(self, x: jax.Array) -> jax.Array:
        """Takes the maximum over the shards of the vocabulary, as a constant."""
        x = jax.lax.stop_gradient(x)
        if self.vocab_axis_name is None:
            return x
        return cast(jax.Array, jax.lax.pmax(x, self.vocab_axis_name))

    def num_classes(self, logits: jax.Array) -> int:
        """How many classes there are in all shards."""
        if self.vocab_axis_name is None:
            return logits.shape[1]
        return logits.shape[1] * jax.lax.axis_size(self.vocab_axis_name)

    def first_class(self, logits: jax.Array) -> jax.Array | int:
        """The class that the first column of this shard is."""
        if self.vocab_axis_name is None:
            return 0
        return jax.lax.axis_index(self.vocab_axis_name) * logits.shape[1]


class LogitLoss(Protocol):
    """A loss of logits ``[n, V]``. It must be hashable: it is static.

    ``arrays`` have a row for each of the ``n`` tokens, ``shared`` are the same for all.
    """

    @property
    def num_outputs(self) -> int:
        """How many values a token has that are differentiated: one loss, mostly."""

    @property
    def num_residuals(self) -> int:
        """How many more it has that are constants for gradients."""

    @property
    def has_slope(self) -> bool:
        """Whether `slope` is there. If not, JAX derives it from `values`."""

    def values(
        self, logits: jax.Array, arrays: Arrays, shared: Arrays, place: Place
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The outputs and the residuals of each token, arrays of ``[n]``."""

    def slope(
        self,
        logits: jax.Array,
        arrays: Arrays,
        shared: Arrays,
        residuals: Arrays,
        weights: Arrays,
        place: Place,
    ) -> jax.Array:
        """The derivative of the weighted sum of the outputs by the logits."""


class Task(NamedTuple):
    """What is static: the parameter of the primitives.

    Their first operands are the same for all: ``features, kernel, bias, mask``, then
    ``num_arrays`` arrays with rows for tokens, then ``num_shared`` that have none.
    """

    loss: LogitLoss
    num_arrays: int
    num_shared: int
    chunk_size: int | None
    vocab_axis_name: str | None
    # The caller's: the primitives are traced when the caller's context may be gone.
    matmul_precision: str | None

    @property
    def num_operands(self) -> int:
        """How many operands all primitives have in common."""
        return 4 + self.num_arrays + self.num_shared

    def is_token(self, i: int) -> bool:
        """Whether the operand at ``i`` has a row for each token; later ones all do."""
        return i not in (1, 2) and not (4 + self.num_arrays <= i < self.num_operands)


class Operands(NamedTuple):
    """The first operands of a primitive, by name."""

    features: jax.Array
    kernel: jax.Array
    bias: jax.Array
    mask: jax.Array
    arrays: tuple[jax.Array, ...]
    shared: tuple[jax.Array, ...]


def named(task: Task, operands: Arrays) -> tuple[Operands, list[Any]]:
    """Splits the operands of a primitive into those by name and the rest."""
    arrays = operands[4 : 4 + task.num_arrays]
    shared = operands[4 + task.num_arrays : task.num_operands]
    features, kernel, bias, mask = operands[:4]
    first = Operands(features, kernel, bias, mask, tuple(arrays), tuple(shared))
    return first, list(operands[task.num_operands :])


def logits_of(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The logits of a chunk of tokens, in float32 at least."""
    logits = product(x, kernel)
    return logits + bias.astype(logits.dtype)[None, :]


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in the dtype of ``a`` that is summed in float32 at least."""
    # Matrix units multiply bfloat16 and add up in float32 at no cost. A kernel in
    # float32 is rounded to the features' dtype, as Flax's layers do.
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.dot(a, b.astype(a.dtype), preferred_element_type=dtype)
