"""The derivatives of the primitives, forward and reverse, first and second.

::

    total ----jvp--->  gradients, times the tangents         three products
      |
     vmap
      v
    losses ---jvp--->  losses, tangents -transpose-> gradients        four
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

from wloss_jax._devices import vary
from wloss_jax.linear._chunks import Arrays
from wloss_jax.linear._logits import Options, add_shards, cross_entropy, logits_of
from wloss_jax.linear._primitives import (
    Device,
    filled,
    is_zero,
    on_jvp,
    on_transpose,
    varying,
    zero_like,
)
from wloss_jax.linear._programs import (
    gradients_p,
    inner_p,
    losses_p,
    place,
    scaled_p,
    tangents_p,
    times,
    total_p,
    weighted,
)

# ---------------------------------------------------------------- the first derivatives


def _total_jvp(primals: Arrays, tangents: Arrays, *, options: Options) -> Any:
    wrt, tangents = _differentiated(primals, tangents, options)
    losses, *gradients = gradients_p.bind(*primals, wrt=wrt, options=options)
    total = weighted(losses, *primals[4:]).sum()
    if wrt[0]:
        # Tangents too may be NaN where nothing counts.
        valid = jnp.broadcast_to(primals[4][..., None], tangents[0].shape)
        tangents[0] = jnp.where(valid, tangents[0], 0)
    change = sum(
        inner_p.bind(*pair, options=options)[0]
        for pair in zip(gradients, tangents, strict=True)
    )
    return [total], [_add_changes(change, options)]


def _losses_jvp(primals: Arrays, tangents: Arrays, *, options: Options) -> Any:
    wrt, tangents = _differentiated(primals, tangents, options)
    losses, lse = losses_p.bind(*primals, options=options)
    (change,) = tangents_p.bind(*primals, lse, *tangents, wrt=wrt, options=options)
    return [losses, lse], [_add_changes(change, options), zero_like(lse)]


def _tangents_transpose(
    cotangents: Arrays, *arrays: Any, wrt: tuple[bool, ...], options: Options
) -> list[Any]:
    *primals, lse = arrays[:6]
    gradients = gradients_p.bind(*primals, *cotangents, lse, wrt=wrt, options=options)
    return [None] * 6 + [
        gradient.astype(tangent.aval.dtype)
        for gradient, tangent in zip(gradients, arrays[6:], strict=True)
    ]


def _inner_transpose(
    cotangents: Arrays, gradient: jax.Array, tangent: Any, *, options: Options
) -> list[Any]:
    (cotangent,) = cotangents
    dtype = tangent.aval.dtype
    if gradient.dtype != dtype:
        return [None, (gradient * cotangent).astype(dtype)]
    gradient = vary(gradient, tuple(varying(cotangent)))
    return [None, *scaled_p.bind(gradient, cotangent, options=options)]


def _inner_jvp(primals: Arrays, tangents: Arrays, *, options: Options) -> Any:
    changes = [
        inner_p.bind(primal, tangent, options=options)[0]
        for primal, tangent in zip(primals, reversed(tangents), strict=True)
        if not is_zero(tangent)
    ]
    return inner_p.bind(*primals, options=options), [sum(changes)]


def _differentiated(
    primals: Arrays, tangents: Arrays, options: Options
) -> tuple[tuple[bool, ...], list[Any]]:
    """Which of features, kernel and bias have a tangent, and those tangents.

    They vary over all mapped axes over which anything does: what is transposed later
    has no other way to say that the gradients do.
    """
    wrt = tuple(not is_zero(t) for t in tangents[:3])
    axis_name = options.vocab_axis_name
    if wrt[0] and _is_untracked(axis_name):
        add = functools.partial(add_shards, axis_name)
        shared = linear_call(lambda _, t: t, lambda _, ct: add(ct), (), tangents[0])
        tangents = [shared, *tangents[1:]]
    tangents = [t for t, wanted in zip(tangents[:3], wrt, strict=True) if wanted]
    axes = frozenset().union(*map(varying, (*primals, *tangents)))
    return wrt, [vary(t, tuple(axes)) for t in tangents]


def _add_changes(change: Any, options: Options) -> Any:
    """Adds the changes of a loss that the shards of the vocabulary make."""
    add = functools.partial(add_shards, options.vocab_axis_name)
    if _is_untracked(options.vocab_axis_name):
        return linear_call(lambda _, t: add(t), lambda _, ct: ct, (), change)
    return add(change)


def _is_untracked(axis_name: str | None) -> bool:
    """Whether JAX leaves it to us what differs along a mapped axis.

    With ``check_vma`` on it knows, and adds up the gradient of features that all shards
    of the vocabulary share. With it off, and under `jax.pmap`, it takes the loss of
    each device for one of its own, and transposes a sum over devices to another: then
    the sums are laid by hand, as in Megatron-LM.
    """
    if axis_name is None:
        return False
    return axis_name not in varying(jax.lax.axis_index(axis_name))


# ------------------------------------------ the second derivatives, by a plain program


def _plain_losses(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    options: Options,
) -> jax.Array:
    if options.vocab_axis_name is not None:
        raise NotImplementedError(
            "`linear_softmax_cross_entropy` has no second derivative where the "
            "vocabulary is sharded: leave out `vocab_axis_name`."
        )
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    kernel, bias = kernel.astype(dtype), bias.astype(dtype)

    @jax.checkpoint
    def token_loss(token: Any) -> jax.Array:
        x, label, valid = token
        x = jnp.where(valid, x, 0).astype(dtype)
        label = jnp.where(valid, label, 0)
        logits = logits_of(x[None], kernel, bias, options)
        (loss,), _ = cross_entropy(logits, label[None], options, Device("any"))
        return jnp.where(valid, loss, 0)

    tokens = (features.reshape(-1, features.shape[-1]), labels.ravel(), mask.ravel())
    losses: jax.Array = jax.lax.map(token_loss, tokens, batch_size=512)
    return losses.reshape(mask.shape)


def _gradients_jvp(
    primals: Arrays, tangents: Arrays, *, wrt: tuple[bool, ...], options: Options
) -> Any:
    outs = gradients_p.bind(*primals, wrt=wrt, options=options)
    labels, mask = primals[3:5]

    def plain(*arrays: jax.Array) -> list[jax.Array]:
        *inputs, weights = arrays
        plain_losses = functools.partial(
            _plain_losses, labels=labels, mask=mask, options=options
        )
        losses, pull = jax.vjp(plain_losses, *inputs)
        gradients = pull(jnp.where(mask, weights, 0).astype(losses.dtype))
        gradients = [g for g, wanted in zip(gradients, wrt, strict=True) if wanted]
        return [losses, *gradients][-len(outs) :]

    changes = _jvp(plain, (*primals[:3], primals[5]), (*tangents[:3], tangents[5]))
    return outs, [c.astype(out.dtype) for c, out in zip(changes, outs, strict=True)]


def _tangents_jvp(
    primals: Arrays, tangents: Arrays, *, wrt: tuple[bool, ...], options: Options
) -> Any:
    outs = tangents_p.bind(*primals, wrt=wrt, options=options)
    labels, mask = primals[3:5]

    def plain(*arrays: jax.Array) -> list[jax.Array]:
        inputs = arrays[:3]
        directions = [
            jnp.zeros_like(x) if direction is None else direction
            for x, direction in zip(inputs, place(arrays[3:], wrt), strict=True)
        ]
        plain_losses = functools.partial(
            _plain_losses, labels=labels, mask=mask, options=options
        )
        return [jax.jvp(plain_losses, inputs, tuple(directions))[1]]

    inputs = (*primals[:3], *primals[6:])
    return outs, _jvp(plain, inputs, (*tangents[:3], *tangents[6:]))


def _scaled_jvp(primals: Arrays, tangents: Arrays, *, options: Options) -> Any:
    outs = scaled_p.bind(*primals, options=options)
    return outs, _jvp(times, primals, tangents)


def _jvp(function: Callable[..., Any], primals: Arrays, tangents: Arrays) -> Any:
    tangents = tuple(map(filled, tangents))
    return jax.jvp(function, tuple(primals), tangents)[1]


on_jvp(total_p, _total_jvp)
on_jvp(losses_p, _losses_jvp)
on_jvp(gradients_p, _gradients_jvp)
on_jvp(tangents_p, _tangents_jvp)
on_jvp(scaled_p, _scaled_jvp)
on_jvp(inner_p, _inner_jvp)
on_transpose(tangents_p, _tangents_transpose)
on_transpose(inner_p, _inner_transpose)
