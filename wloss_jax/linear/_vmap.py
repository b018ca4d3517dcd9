"""The rules of the primitives under `jax.vmap`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wloss_jax.linear._chunks import Arrays
from wloss_jax.linear._logits import Options
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


def _total_merged(*arrays: jax.Array, options: Options) -> list[jax.Array]:
    *primals, mask, weights = arrays
    losses, _ = losses_p.bind(*primals, mask, options=options)
    sums = weighted(losses, mask, weights)
    return [sums.sum(axis=tuple(range(1, sums.ndim)))]


def _batch(
    primitive: Any, axis: Any, arrays: Arrays, dims: Sequence[Any], **params: Any
) -> tuple[Any, list[Any]]:
    """The rule for `jax.vmap`.

    Where kernel and bias are shared, and no gradient of theirs is wanted for each
    element of the batch, the axis becomes one more of the tokens. Else the elements are
    gone through one after the other.
    """
    options, wrt = params["options"], params.get("wrt", (False,) * 3)
    if axis.name is not None and axis.name == options.vocab_axis_name:
        raise NotImplementedError(
            f"`vocab_axis_name`={axis.name!r} is an axis of `jax.vmap`: it must be one "
            "of devices, under `jax.shard_map` or `jax.pmap`."
        )
    is_shared = [dim is None for dim in dims]
    if all(is_shared):
        outs = primitive.bind(*arrays, **params)
        return outs, [None] * len(outs)
    arrays = [
        x if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(arrays, dims, strict=True)
    ]
    # The places of the kernel, the bias, and the tangents of both.
    keep = [1, 2]
    if primitive is tangents_p:
        keep += range(6 + wrt[0], len(arrays))
    by_token = primitive is not gradients_p or not (wrt[1] or wrt[2])
    if by_token and all(is_shared[i] for i in keep):
        arrays = [
            jnp.broadcast_to(x, (axis.size, *x.shape))
            if is_shared[i] and i not in keep
            else x
            for i, x in enumerate(arrays)
        ]
        function = _total_merged if primitive is total_p else primitive.bind
        outs = function(*arrays, **params)
    else:
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
