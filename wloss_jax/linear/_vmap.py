"""The rules of the primitives under `jax.vmap`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wloss_jax.linear._logits import Arrays, Task
from wloss_jax.linear._primitives import on_vmap
from wloss_jax.linear._programs import (
    gradients_p,
    inner_p,
    inner_product,
    losses_p,
    scaled_p,
    tangents_p,
    times,
    total_p,
    weighted,
)


def _total_merged(*operands: jax.Array, task: Task) -> list[jax.Array]:
    # The axis of the batch has become the first of the tokens, and is not added up.
    *first, weights = operands
    loss, *residuals = losses_p.bind(*first, task=task)
    sums = weighted(loss, first[3], weights)
    return [sums.sum(axis=tuple(range(1, sums.ndim))), *residuals]


def _are_of_tokens(primitive: Any, count: int, task: Task, wrt: Any) -> list[bool]:
    """Which of ``count`` operands have a row for each token."""
    are_of_tokens = [task.is_token(i) for i in range(count)]
    if primitive is tangents_p:  # the tangents come last, in the order of operands
        of_tangents = [task.is_token(i) for i, wanted in enumerate(wrt) if wanted]
        are_of_tokens[count - len(of_tangents) :] = of_tangents
    return are_of_tokens


def _batch(
    primitive: Any, axis: Any, arrays: Arrays, dims: Sequence[Any], **params: Any
) -> tuple[Any, list[Any]]:
    """The rule for `jax.vmap`.

    Where kernel, bias and all that tokens share is shared by the batch too, and no
    gradient of theirs is wanted for each element of the batch, the axis becomes one
    more of the tokens. Else the elements are gone through one after the other.
    """
    task, wrt = params["task"], params.get("wrt", ())
    if axis.name is not None and axis.name == task.vocab_axis_name:
        raise NotImplementedError(
            f"`vocab_axis_name`={axis.name!r} is an axis of `jax.vmap`: it must be one "
            "of devices, under `jax.shard_map` or `jax.pmap`."
        )
    is_shared = [dim is None for dim in dims]
    if all(is_shared):
        outs = primitive.bind(*arrays, **params)
        return outs, [None] * len(outs)
    # The axis of the batch first, where the axes of the tokens are.
    arrays = [
        x if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(arrays, dims, strict=True)
    ]
    of_tokens = _are_of_tokens(primitive, len(arrays), task, wrt)
    # A gradient of the kernel adds up over all tokens: one for each element of a batch
    # that has become tokens could not be told apart again.
    is_one_sum = primitive is gradients_p and any(
        wanted and not task.is_token(i) for i, wanted in enumerate(wrt)
    )
    if not is_one_sum and all(
        of_token or shared
        for of_token, shared in zip(of_tokens, is_shared, strict=True)
    ):
        arrays = [
            jnp.broadcast_to(x, (axis.size, *x.shape)) if of_token and shared else x
            for x, of_token, shared in zip(arrays, of_tokens, is_shared, strict=True)
        ]
        function = _total_merged if primitive is total_p else primitive.bind
        outs = function(*arrays, **params)
    else:  # in the memory of one
        outs = jax.lax.map(
            lambda own: primitive.bind(
                *(own.get(i, x) for i, x in enumerate(arrays)), **params
            ),
            {i: x for i, x in enumerate(arrays) if not is_shared[i]},
        )
    return outs, [0] * len(outs)


def _inner_batch(_: Any, arrays: Arrays, dims: Sequence[Any], **__: Any) -> Any:
    return jax.vmap(inner_product, tuple(dims))(*arrays), [0]


def _scaled_batch(_: Any, arrays: Arrays, dims: Sequence[Any], **__: Any) -> Any:
    return jax.vmap(times, tuple(dims))(*arrays), [0]


for _p in (losses_p, total_p, gradients_p, tangents_p):
    on_vmap(_p, functools.partial(_batch, _p))
on_vmap(inner_p, _inner_batch)
on_vmap(scaled_p, _scaled_batch)
