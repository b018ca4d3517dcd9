"""The sweep: all the tokens that count, a chunk of them at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wloss_jax._devices import vary
from wloss_jax.linear._logits import Arrays, Task
from wloss_jax.linear._primitives import Device, varying
from wloss_jax.linear._spread import Spread


def chunk_size_of(device: Device, tokens: int, features: int) -> int:
    """The tokens of a chunk, where the caller leaves them to us."""
    # The kernel's gradient is read and written once a chunk, which costs the less the
    # larger a chunk is; its logits are what takes memory. On accelerators the balance
    # goes with the number of features; these sizes gave the memory in `RESULTS.md`.
    if device.platform == "cpu":
        chunk = 512
    elif device.platform == "tpu":
        chunk = max(features // 8 // 256 * 256, 512)
    else:
        chunk = max(features * 2 // 3 // 1024 * 1024, 1024)
    return min(chunk, 8192, tokens)


def sweep(
    step: Callable[..., tuple[list[jax.Array], list[jax.Array]]],
    tokens: Arrays,
    mask: jax.Array,
    kernel_size: int,
    task: Task,
    device: Device,
    spread: Spread,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Calls ``step`` for the tokens that count, a chunk of them at a time.

    ``step(valid, *tokens)`` returns arrays of a value for each token, which come back
    in the places of their tokens, 0 where none counts, and arrays to be added up. The
    last chunk is half a one where that is enough (for 35% of 8192 tokens whole chunks
    alone took 1.2 times as long on an H100). What is missing in it repeats a token that
    counts, for zeros may be outside of the domain of a loss: ``valid`` is False there,
    the values are dropped, and the step must add nothing to the sums.
    """
    # Tokens in as many blocks as there are devices that they are spread over, each gone
    # through by itself: then no device needs a token, or a sum, of another's.
    num_blocks = spread.num_blocks
    outer = (num_blocks,) if num_blocks > 1 else ()
    block = mask.size // num_blocks
    each_block = jax.vmap if outer else lambda function, in_axes=0: function
    chunk = task.chunk_size or chunk_size_of(device, block, kernel_size)
    chunk = max(1, min(chunk, block))

    def valid_first(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where to read each token, and where to write its values."""
        # False sorts before True: first the tokens that count, in their order.
        order = jnp.argsort(~mask, stable=True)
        valid = jnp.arange(block) < mask.sum()
        # Where none counts, a filler is read behind the last token, as zeros.
        filler = jnp.where(mask.any(), jnp.append(order, block)[0], block)
        padding = (0, chunk)
        return (
            jnp.concatenate([jnp.where(valid, order, filler), filler.repeat(chunk)]),
            jnp.pad(jnp.where(valid, order, block), padding, constant_values=block),
        )

    mask_blocks = mask.reshape(*outer, block)
    token_blocks = [
        spread.own_tokens(t.reshape(*outer, block, *t.shape[mask.ndim :]))
        for t in tokens
    ]
    orders = each_block(valid_first)(mask_blocks)
    # All blocks go as many rounds as the fullest, so that devices stay together.
    num_valid = mask_blocks.sum(axis=-1, dtype=jnp.int32).max()
    if task.vocab_axis_name is not None:
        num_valid = jax.lax.pmax(num_valid, task.vocab_axis_name)

    def advance(
        size: int, start: jax.Array, orders: Arrays, tokens: Arrays, so_far: Any
    ) -> Any:
        read, write = (
            jax.lax.dynamic_slice_in_dim(order, start, size) for order in orders
        )
        valid = write < block
        taken = [t.at[read].get(mode="fill", fill_value=0) for t in tokens]
        values, sums = step(valid, *taken)
        if outer:  # a block without a token may go round for the sake of others
            sums = [jnp.where(valid.any(), new, 0) for new in sums]
        return (
            [
                old.at[write].set(new, mode="drop", unique_indices=True)
                for old, new in zip(so_far[0], values, strict=True)
            ],
            [old + new for old, new in zip(so_far[1], sums, strict=True)],
        )

    def body(size: int, carry: Any) -> Any:
        start, so_far = carry
        values, sums = each_block(
            functools.partial(advance, size), in_axes=(None, 0, 0, 0)
        )(start, orders, token_blocks, so_far)
        return start + size, (values, [spread.own_sums(s) for s in sums])

    def has_more_than(size: int, carry: Any) -> Any:
        return carry[0] + size < num_valid

    # A chunk of which only the type is looked at; there may be no token to take.
    first = [t.reshape(-1, *t.shape[mask.ndim :])[:1] for t in tokens]
    first = [
        jnp.broadcast_to(t.sum(axis=0).astype(t.dtype), (chunk, *t.shape[1:]))
        for t in first
    ]
    all_valid = jnp.ones(chunk, bool)
    # By its jaxpr: shapes alone do not say over which mapped axes a result varies.
    jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(all_valid, *first)
    values, sums = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)
    zeros = (
        [_zeros(v, *outer, block, *v.shape[1:]) for v in values],
        [spread.own_sums(_zeros(s, *outer, *s.shape)) for s in sums],
    )
    carry = jnp.int32(0), zeros
    if block:
        # Whole chunks while more than half of one is left, then a half for the rest.
        half = max(1, chunk // 2)
        for size, left in ((chunk, half), (half, 0)):
            carry = jax.lax.while_loop(
                functools.partial(has_more_than, left),
                functools.partial(body, size),
                carry,
            )
    values, sums = carry[1]
    return (
        [v.reshape(*mask.shape, *v.shape[len(outer) + 1 :]) for v in values],
        [spread.added_up(s) for s in sums],
    )


def _zeros(like: Any, *shape: int) -> jax.Array:
    return vary(jnp.zeros(shape, like.dtype), tuple(varying(like)))
