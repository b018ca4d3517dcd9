"""How tokens and vocabulary are spread over the devices of a plain `jax.jit`.

The type of an array on automatic axes of a mesh does not say how it is sharded: that is
the compiler's to find out, later. But the kernel is a parameter of the program, in the
end, and the program's arguments say it. So the one that has the kernel's shape is taken
for it, however deep in scans and functions the loss stands. That is a guess: speed and
memory depend on it, never a result.

Axes that carry the vocabulary are left to it: tokens are whole there, and two small
reductions a chunk pass between the devices. Over all others the tokens are spread, each
device with sums of its own, which are added up behind the last round.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from wloss_jax.linear._primitives import Device

Axes = tuple[str, ...]
UNKNOWN = PartitionSpec.UNCONSTRAINED


class Spread(NamedTuple):
    """What is spread over which axes of a mesh.

    Attributes:
      num_blocks: the parts that the tokens are cut into, one for each device that they
        are spread over.
      mesh: None if there is none, or if it is unknown what the kernel does on it.
      tokens: the axes that these blocks are spread over.
      features: the axes that the kernel's first axis is sharded over; None if unknown.
      vocab: those of its second axis.
      platform: what the program runs on.
    """

    num_blocks: int = 1
    mesh: Any = None
    tokens: Axes = ()
    features: Axes | None = None
    vocab: Axes = ()
    platform: str = "cpu"

    def own_tokens(self, blocks: jax.Array) -> jax.Array:
        """Brings each block of ``[(blocks,) tokens, ...]`` whole to its devices."""
        first = (self.tokens, None) if self.num_blocks > 1 else (None,)
        return self._placed(blocks, *first, *[UNKNOWN] * (blocks.ndim - len(first)))

    def whole_columns(self, kernel: jax.Array) -> jax.Array:
        """Gathers a kernel whose feature axis is sharded, once, before the rounds."""
        return self._placed(kernel, None, self.vocab or None)

    def own_sums(self, sums: jax.Array) -> jax.Array:
        """Keeps the kernel's gradient by each block on its devices."""
        # A bias's gradient is too small to be worth a word to the compiler.
        if self.num_blocks == 1 or sums.ndim < 3:
            return sums
        return self._placed(sums, self.tokens, None, self.vocab or None)

    def added_up(self, sums: jax.Array) -> jax.Array:
        """Adds up the sums of all blocks.

        Of the kernel's gradient, each device gets the rows that it has of the kernel:
        what the compiler makes of a plain sum gives it the whole. On TPU that is done
        for some rows at a time: the result of an all-reduce is a copy of what goes in,
        and of one a reduce-scatter is made, too, unless V is a multiple of 1024.
        """
        if self.num_blocks == 1:
            return sums
        if self.mesh is None or sums.ndim < 3 or self.features not in ((), self.tokens):
            return sums.sum(axis=0)
        is_scattered = self.features == self.tokens
        # A slab is some rows of each device's share, in at most 16 slabs.
        num_slabs = math.gcd(sums.shape[1] // self.num_blocks, 16)
        num_slabs = num_slabs if self.platform == "tpu" else 1

        def scattered(own: jax.Array) -> jax.Array:
            slabs = own.reshape(self.num_blocks, num_slabs, -1, own.shape[-1])
            rows: jax.Array = jax.lax.map(
                lambda i: jax.lax.psum_scatter(slabs[:, i], self.tokens),
                jnp.arange(num_slabs),
            )
            return rows.reshape(-1, own.shape[-1])

        def added(own: jax.Array) -> jax.Array:
            rows = own.shape[1] // num_slabs

            def add_slab(i: jax.Array, own: jax.Array) -> jax.Array:
                slab = jax.lax.dynamic_slice_in_dim(own, i * rows, rows)
                slab = jax.lax.psum(slab, self.tokens)
                return jax.lax.dynamic_update_slice_in_dim(own, slab, i * rows, axis=0)

            total: jax.Array = jax.lax.fori_loop(0, num_slabs, add_slab, own[0])
            return total

        vocab = self.vocab or None
        add = jax.shard_map(
            scattered if is_scattered else added,
            mesh=self.mesh,
            in_specs=PartitionSpec(self.tokens, None, vocab),
            out_specs=PartitionSpec(self.tokens if is_scattered else None, vocab),
            check_vma=False,
        )
        return add(sums)

    def _placed(self, array: jax.Array, *spec: Any) -> jax.Array:
        if self.mesh is None:
            return array
        sharding = NamedSharding(self.mesh, PartitionSpec(*spec))
        return cast(jax.Array, jax.lax.with_sharding_constraint(array, sharding))


def spread_of(kernel: jax.Array, mask: jax.Array, device: Device) -> Spread:
    """How a kernel and the tokens are spread, as far as the program says."""
    num_devices = device.num_devices
    unknown = Spread(math.gcd(mask.size, num_devices), platform=device.platform)
    if device.mesh is None:
        return unknown
    # Where arguments disagree, nothing is said to the compiler but the blocks.
    features, vocab = _of_kernel(kernel, device)
    if vocab is None:
        return unknown
    sizes = dict(device.mesh.shape)
    # Every axis that has no share of the vocabulary is one to spread tokens over.
    tokens = tuple(name for name in sizes if name not in vocab)
    num_blocks = math.prod(sizes[name] for name in tokens)
    if mask.size % num_blocks:
        return unknown
    return Spread(num_blocks, device.mesh, tokens, features, vocab, device.platform)


def _of_kernel(kernel: jax.Array, device: Device) -> tuple[Axes | None, Axes | None]:
    """The axes of the kernel, or of the table of embeddings that it is tied to."""
    features, vocab = kernel.shape
    # By shape alone: what is a parameter and what a moment of Adam, no type says.
    specs = [a.spec for a in device.arguments if a.shape == (features, vocab)]
    specs = specs or [
        a.spec[::-1] for a in device.arguments if a.shape == (vocab, features)
    ]
    of_features, of_vocab = {spec[0] for spec in specs}, {spec[1] for spec in specs}
    return _only(of_features), _only(of_vocab)


def _only(axes: set[Axes]) -> Axes | None:
    """What all agree on: an optimizer's state may be sharded in another way."""
    return next(iter(axes)) if len(axes) == 1 else None
