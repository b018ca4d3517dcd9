"""What each primitive computes: functions of arrays, by the sweep over chunks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from wloss_jax._devices import vary
from wloss_jax.linear._chunks import sweep
from wloss_jax.linear._logits import Arrays, Place, Task, logits_of, named, product
from wloss_jax.linear._primitives import Device, make_primitive, varying
from wloss_jax.linear._spread import spread_of


def losses_of_tokens(*operands: jax.Array, task: Task, device: Device) -> list[Any]:
    """The outputs and the residuals of each token."""
    given, _ = named(task, operands)
    spread = spread_of(given.kernel, given.mask, device)
    kernel = spread.whole_columns(given.kernel)
    place = Place(device.platform, task.vocab_axis_name)

    def step(_: jax.Array, x: jax.Array, *arrays: jax.Array) -> Any:
        logits = logits_of(x, kernel, given.bias)
        outputs, residuals = task.loss.values(logits, arrays, given.shared, place)
        return [*outputs, *residuals], []

    tokens = (given.features, *given.arrays)
    values, _ = sweep(step, tokens, given.mask, kernel.shape[0], task, device, spread)
    return values


def total_of_tokens(*operands: jax.Array, task: Task, device: Device) -> list[Any]:
    """The weighted sum of the one output, by the weights that come last."""
    *first, weights = operands
    loss, *residuals = losses_of_tokens(*first, task=task, device=device)
    return [weighted(loss, first[3], weights).sum(), *residuals]


def weighted(losses: jax.Array, mask: jax.Array, weights: jax.Array) -> jax.Array:
    """The terms of a total."""
    return jnp.where(mask, weights * losses, 0)


def gradients_of_tokens(
    *operands: jax.Array,
    wrt: tuple[bool, ...],
    with_values: bool,
    task: Task,
    device: Device,
) -> list[Any]:
    """The gradient of the weighted sum of the outputs by those ``wrt`` of the operands.

    After the operands come the weights of each output, and the residuals; or, if
    ``with_values``, no residuals, and the outputs and residuals come first.
    """
    given, rest = named(task, operands)
    spread = spread_of(given.kernel, given.mask, device)
    kernel = spread.whole_columns(given.kernel)
    place = Place(device.platform, task.vocab_axis_name)
    # Masks, weights and residuals have no gradient here: what is wanted after the first
    # four operands is by an array of the tokens or by what they share.
    loss, num_outputs, num_arrays = task.loss, task.loss.num_outputs, task.num_arrays
    largest = largest_weight(given.features.dtype, rest[:num_outputs], given.mask)
    of_others = wrt[4:]

    def step(valid: jax.Array, x: jax.Array, *rows: jax.Array) -> Any:
        arrays, rows = rows[:num_arrays], rows[num_arrays:]
        residuals = list(rows[num_outputs:])
        logits = logits_of(x, kernel, given.bias)
        weights = [
            (jnp.where(valid, w, 0) / largest).astype(logits.dtype)
            for w in rows[:num_outputs]
        ]
        values: list[jax.Array] = []
        others: list[jax.Array] = []
        # A slope of its own is by the logits only; an array or an option that is
        # differentiated beside them is for JAX.
        if loss.has_slope and not any(of_others):
            if with_values:
                outputs, residuals = loss.values(logits, arrays, given.shared, place)
                values = [*outputs, *residuals]
            slope = loss.slope(logits, arrays, given.shared, residuals, weights, place)
        else:

            def outputs_of(logits: jax.Array, *some: jax.Array) -> Any:
                full = replaced([*arrays, *given.shared], of_others, some)
                return loss.values(logits, full[:num_arrays], full[num_arrays:], place)

            some = selected([*arrays, *given.shared], of_others)
            outputs, pull, residuals = jax.vjp(outputs_of, logits, *some, has_aux=True)
            cotangents = [
                vary(w.astype(o.dtype), tuple(varying(o)))
                for w, o in zip(weights, outputs, strict=True)
            ]
            slope, *others = pull(cotangents)
            values = [*outputs, *residuals] if with_values else []
            # A class that is out has no gradient, and a filler none at all.
            slope = jnp.where(valid[:, None] & (logits != -jnp.inf), slope, 0)
        # From here on it is products: of the slope by the kernel for the features, and
        # by the features for the kernel.
        slope = slope.astype(x.dtype)
        sums = []
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
        of_arrays = sum(of_others[:num_arrays])
        values += [(g * largest).astype(g.dtype) for g in others[:of_arrays]]
        return values, [*sums, *others[of_arrays:]]

    tokens = (given.features, *given.arrays, *rest)
    values, sums = sweep(
        step, tokens, given.mask, kernel.shape[0], task, device, spread
    )
    # What was divided by the largest weight, in a step, is multiplied again in float32.
    sums = [s * largest for s in sums]
    # The gradients come in two lists, those of tokens and those added up over all, and
    # leave in the order of the operands.
    num_values = with_values * (num_outputs + loss.num_residuals)
    values, of_tokens, of_all = values[:num_values], values[num_values:], sums
    return values + [
        (of_tokens if task.is_token(i) else of_all).pop(0)
        for i, wanted in enumerate(wrt)
        if wanted
    ]


def largest_weight(dtype: Any, weights: Arrays, mask: jax.Array) -> jax.Array | float:
    """What to divide weights by in float16, which has no room for 1e9 or 1e-9."""
    if dtype != jnp.float16:
        return 1.0
    sizes = [
        jnp.where(mask & jnp.isfinite(w), jnp.abs(w), 0).max(initial=0) for w in weights
    ]
    largest = jax.lax.stop_gradient(jnp.stack(sizes).max())
    return jnp.where(largest > 0, largest, 1)


def tangents_of_tokens(
    *operands: jax.Array, wrt: tuple[bool, ...], task: Task, device: Device
) -> list[Any]:
    """What the outputs change by with the tangents of those ``wrt`` of the operands.

    After the operands come the residuals, for the transpose, and then the tangents.
    """
    given, rest = named(task, operands)
    spread = spread_of(given.kernel, given.mask, device)
    kernel = spread.whole_columns(given.kernel)
    place = Place(device.platform, task.vocab_axis_name)
    loss, num_arrays = task.loss, task.num_arrays
    tangents = rest[loss.num_residuals :]
    of_x, of_kernel, of_bias, _, *of_others = placed(tangents, wrt)
    is_wanted = wrt[4:]
    changing = [t for t in of_others[:num_arrays] if t is not None]
    shared_changes = [t for t in of_others[num_arrays:] if t is not None]

    def step(_: jax.Array, x: jax.Array, *rows: jax.Array) -> Any:
        arrays, rows = rows[:num_arrays], rows[num_arrays:]
        logits = logits_of(x, kernel, given.bias)
        # The logits are a product: they change by each factor's change times the other.
        change = jnp.zeros_like(logits)
        if of_x is not None:
            change += product(rows[0], kernel)
            rows = rows[1:]
        if of_kernel is not None:
            change += product(x, of_kernel)
        if of_bias is not None:
            change += of_bias.astype(logits.dtype)[None, :]
        # A class that is out stays out: infinity changes by nothing, and not by NaN.
        change = jnp.where(logits == -jnp.inf, 0, change)

        def outputs_of(logits: jax.Array, *some: jax.Array) -> Any:
            full = replaced([*arrays, *given.shared], is_wanted, some)
            outputs, _ = loss.values(
                logits, full[:num_arrays], full[num_arrays:], place
            )
            return outputs

        some = selected([*arrays, *given.shared], is_wanted)
        changes = (change, *rows, *shared_changes)
        return jax.jvp(outputs_of, (logits, *some), changes)[1], []

    tokens = [given.features, *given.arrays]
    tokens += [of_x] if of_x is not None else []
    tokens += changing
    values, _ = sweep(step, tokens, given.mask, kernel.shape[0], task, device, spread)
    return values


def selected(operands: Arrays, wrt: tuple[bool, ...]) -> list[Any]:
    """Those of the operands that are wanted."""
    return [x for x, wanted in zip(operands, wrt, strict=True) if wanted]


def placed(some: Arrays, wrt: tuple[bool, ...]) -> list[Any]:
    """Puts the few that are wanted in their places among all, None elsewhere."""
    remaining = iter(some)
    return [next(remaining) if wanted else None for wanted in wrt]


def replaced(operands: Arrays, wrt: tuple[bool, ...], some: Arrays) -> list[Any]:
    """Puts the few that are wanted in the places of the operands."""
    remaining = iter(some)
    return [
        next(remaining) if wanted else x
        for x, wanted in zip(operands, wrt, strict=True)
    ]


def scaled(
    gradient: jax.Array, factor: jax.Array, *, task: Task, device: Device
) -> list[jax.Array]:
    """The gradient times its scalar cotangent, in place.

    XLA does that by itself, but not on TPU, where the copy of a float32 kernel's
    gradient is more than all else: 3.2 GiB instead of 1.2 for D 4096 and V 128256.
    """
    if device.platform != "tpu" or device.num_devices > 1 or not gradient.ndim:
        return times(gradient, factor)

    num_slabs = math.gcd(gradient.shape[0], 16)
    rows = gradient.shape[0] // num_slabs

    def scale_slab(i: jax.Array, gradient: jax.Array) -> jax.Array:
        slab = jax.lax.dynamic_slice_in_dim(gradient, i * rows, rows)
        (slab,) = times(slab, factor)
        return jax.lax.dynamic_update_slice_in_dim(gradient, slab, i * rows, axis=0)

    return [jax.lax.fori_loop(0, num_slabs, scale_slab, gradient)]


def times(gradient: jax.Array, factor: jax.Array) -> list[jax.Array]:
    """The gradient times its scalar cotangent."""
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
