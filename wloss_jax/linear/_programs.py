"""What each primitive computes: functions of arrays, by the sweep over chunks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from wloss_jax.linear._chunks import Arrays, sweep, whole_columns
from wloss_jax.linear._logits import (
    Options,
    cross_entropy,
    logits_of,
    product,
    slope_of,
)
from wloss_jax.linear._primitives import Device, make_primitive


def losses_of_tokens(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    options: Options,
    device: Device,
) -> list[jax.Array]:
    """The loss and the log-sum-exp of each token."""
    kernel = whole_columns(kernel, device)

    def step(x: jax.Array, labels: jax.Array) -> Any:
        logits = logits_of(x, kernel, bias, options)
        return list(cross_entropy(logits, labels, options, device)), []

    tokens = (features, labels)
    values, _ = sweep(step, tokens, mask, kernel.shape[0], options, device)
    return values


def total_of_tokens(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    *,
    options: Options,
    device: Device,
) -> list[jax.Array]:
    """The weighted sum of the losses."""
    losses, _ = losses_of_tokens(
        features, kernel, bias, labels, mask, options=options, device=device
    )
    return [weighted(losses, mask, weights).sum()]


def weighted(losses: jax.Array, mask: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.where(mask, weights * losses, 0)


def gradients_of_tokens(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    *lse: jax.Array,
    wrt: tuple[bool, ...],
    options: Options,
    device: Device,
) -> list[jax.Array]:
    """The gradient of the weighted sum by those ``wrt`` of features, kernel and bias.

    Without a log-sum-exp from before, the losses come first.
    """
    kernel = whole_columns(kernel, device)
    largest = largest_weight(features.dtype, weights, mask)

    def step(
        x: jax.Array, labels: jax.Array, weights: jax.Array, *lse: jax.Array
    ) -> Any:
        logits = logits_of(x, kernel, bias, options)
        values, sums = [], []
        if lse:
            (own_lse,) = lse
        else:
            loss, own_lse = cross_entropy(logits, labels, options, device)
            values.append(loss)
        slope = slope_of(logits, labels, own_lse, weights / largest, options, device)
        slope = slope.astype(x.dtype)
        if wrt[0]:
            # Not `.T`: a kernel spread over devices would be gathered twice.
            of_x = jnp.einsum(
                "nv,dv->nd",
                slope,
                kernel.astype(x.dtype),
                preferred_element_type=logits.dtype,
            )
            values.append((of_x * largest).astype(x.dtype))
        if wrt[1]:
            transposed = x.T
            if device.platform == "cpu":
                # A transpose that is really done: folded into the product it made that
                # 1.1 to 2.8 times slower, by the version of XLA and the processor.
                transposed = jax.lax.optimization_barrier(transposed)
            sums.append(product(transposed, slope))
        if wrt[2]:
            sums.append(slope.sum(axis=0, dtype=logits.dtype))
        return values, sums

    tokens = (features, labels, weights, *lse)
    values, sums = sweep(step, tokens, mask, kernel.shape[0], options, device)
    return [*values, *(s * largest for s in sums)]


def largest_weight(
    dtype: Any, weights: jax.Array, mask: jax.Array
) -> jax.Array | float:
    """What to divide weights by in float16, which has no room for 1e9 or 1e-9."""
    if dtype != jnp.float16:
        return 1.0
    sizes = jnp.where(mask & jnp.isfinite(weights), jnp.abs(weights), 0)
    largest = jax.lax.stop_gradient(sizes.max(initial=0))
    return jnp.where(largest > 0, largest, 1)


def tangents_of_tokens(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    lse: jax.Array,
    *tangents: jax.Array,
    wrt: tuple[bool, ...],
    options: Options,
    device: Device,
) -> list[jax.Array]:
    """What the losses change by; with a sharded vocabulary, this shard's part of it."""
    kernel = whole_columns(kernel, device)
    dfeatures, dkernel, dbias = place(tangents, wrt)

    def step(x: jax.Array, labels: jax.Array, lse: jax.Array, *dx: jax.Array) -> Any:
        logits = logits_of(x, kernel, bias, options)
        change = jnp.zeros_like(logits)
        if wrt[0]:
            change += product(dx[0], kernel)
        if wrt[1]:
            change += product(x, dkernel)
        if wrt[2]:
            change += dbias.astype(logits.dtype)[None, :]
        ones = jnp.ones_like(lse)
        slope = slope_of(logits, labels, lse, ones, options, device)
        return [(slope * change).sum(axis=-1)], []

    tokens = (features, labels, lse, *((dfeatures,) if wrt[0] else ()))
    values, _ = sweep(step, tokens, mask, kernel.shape[0], options, device)
    return values


def place(some: Arrays, wrt: tuple[bool, ...]) -> list[Any]:
    """Puts the few that are wanted in their places among three."""
    remaining = iter(some)
    return [next(remaining) if wanted else None for wanted in wrt]


def scaled(
    gradient: jax.Array, factor: jax.Array, *, options: Options, device: Device
) -> list[jax.Array]:
    """The gradient times its scalar cotangent, in place.

    XLA does that by itself, but not on TPU, where the copy of a float32 kernel's
    gradient is more than all else: 3.2 GiB instead of 1.2 for D 4096 and V 128256.
    """
    if device.platform != "tpu" or device.num_devices > 1:
        return times(gradient, factor)

    num_slabs = math.gcd(gradient.shape[0], 16)
    rows = gradient.shape[0] // num_slabs

    def scale_slab(i: jax.Array, gradient: jax.Array) -> jax.Array:
        slab = jax.lax.dynamic_slice_in_dim(gradient, i * rows, rows)
        (slab,) = times(slab, factor)
        return jax.lax.dynamic_update_slice_in_dim(gradient, slab, i * rows, axis=0)

    return [jax.lax.fori_loop(0, num_slabs, scale_slab, gradient)]


def times(gradient: jax.Array, factor: jax.Array) -> list[jax.Array]:
    return [(gradient * factor).astype(gradient.dtype)]


def inner_product(gradient: jax.Array, tangent: jax.Array, **_: Any) -> list[jax.Array]:
    """The change of a total: what is asked for when its gradient is transposed."""
    dtype = jnp.promote_types(gradient.dtype, jnp.float32)
    return [(gradient.astype(dtype) * tangent.astype(dtype)).sum()]


losses_p = make_primitive("losses", losses_of_tokens)
total_p = make_primitive("total", total_of_tokens)
gradients_p = make_primitive("gradients", gradients_of_tokens)
tangents_p = make_primitive("tangents", tangents_of_tokens)
scaled_p = make_primitive("scaled", scaled)
inner_p = make_primitive("inner", inner_product)
