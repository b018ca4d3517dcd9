"""The derivatives of the primitives, forward and reverse, first and second.

::

    total ----jvp--->  gradients, times the tangents         three products
      |
     vmap
      v
    losses ---jvp--->  losses, tangents -transpose-> gradients        four

Of the operands, features, kernel, bias, the arrays of the tokens and what they share
may be differentiated; ``wrt`` says which are. The residuals are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

from wloss_jax._devices import vary
from wloss_jax.linear._logits import Arrays, Place, Task, logits_of, named
from wloss_jax.linear._primitives import (
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
    replaced,
    scaled_p,
    selected,
    tangents_p,
    times,
    total_p,
    weighted,
)


def _total_jvp(primals: Arrays, tangents: Arrays, *, task: Task) -> Any:
    # A total is a number, so its gradients are known before anything is transposed: one
    # sweep makes them together with the values, and the tangent is a product with them.
    wrt, changes = _differentiated(primals, tangents, task)
    loss, *others = gradients_p.bind(*primals, wrt=wrt, with_values=True, task=task)
    residuals = others[: task.loss.num_residuals]
    gradients = others[task.loss.num_residuals :]
    mask, weights = primals[3], primals[-1]
    total = weighted(loss, mask, weights).sum()
    positions = [i for i, wanted in enumerate(wrt) if wanted]
    change: Any = 0
    for i, gradient, tangent in zip(positions, gradients, changes, strict=True):
        if task.is_token(i):
            # Tangents too may be NaN where nothing counts.
            axes = tuple(range(mask.ndim, tangent.ndim))
            tangent = jnp.where(jnp.expand_dims(mask, axes), tangent, 0)
        change += inner_p.bind(gradient, tangent, task=task)[0]
    # Weights of float64 make a total of it, also of features in float32.
    change = jnp.asarray(_add_changes(change, task), total.dtype)
    return [total, *residuals], [change, *(zero_like(x) for x in residuals)]


def _losses_jvp(primals: Arrays, tangents: Arrays, *, task: Task) -> Any:
    # What the cotangent of each token will be is not known yet: the tangents are an
    # operation of their own, and its transpose makes the logits a second time.
    wrt, changes = _differentiated(primals, tangents, task)
    values = losses_p.bind(*primals, task=task)
    residuals = values[task.loss.num_outputs :]
    changes = tangents_p.bind(*primals, *residuals, *changes, wrt=wrt, task=task)
    return values, [*changes, *(zero_like(x) for x in residuals)]


def _tangents_transpose(
    cotangents: Arrays, *operands: Any, wrt: tuple[bool, ...], task: Task
) -> list[Any]:
    first = task.num_operands + task.loss.num_residuals
    primals, residuals = (
        operands[: task.num_operands],
        operands[task.num_operands : first],
    )
    cotangents = [filled(ct) for ct in cotangents]
    # The cotangent of each token is its weight: the sweep is that of a weighted total.
    gradients = gradients_p.bind(
        *primals, *cotangents, *residuals, wrt=wrt, with_values=False, task=task
    )
    return [None] * first + [
        gradient.astype(tangent.aval.dtype)
        for gradient, tangent in zip(gradients, operands[first:], strict=True)
    ]


def _inner_transpose(
    cotangents: Arrays, gradient: jax.Array, tangent: Any, *, task: Task
) -> list[Any]:
    (cotangent,) = cotangents
    dtype = tangent.aval.dtype
    # Rounded once, after the cotangent, where the gradient has more digits than it.
    if gradient.dtype != dtype:
        return [None, (gradient * cotangent).astype(dtype)]
    gradient = vary(gradient, tuple(varying(cotangent)))
    return [None, *scaled_p.bind(gradient, cotangent, task=task)]


def _inner_jvp(primals: Arrays, tangents: Arrays, *, task: Task) -> Any:
    # The product rule: each of the two changes beside the other, as it stands.
    changes = [
        inner_p.bind(primal, tangent, task=task)[0]
        for primal, tangent in zip(primals, reversed(tangents), strict=True)
        if not is_zero(tangent)
    ]
    return inner_p.bind(*primals, task=task), [sum(changes)]


def _differentiated(
    primals: Arrays, tangents: Arrays, task: Task
) -> tuple[tuple[bool, ...], list[Any]]:
    """Which of the operands have a tangent, and those tangents.

    They vary over all mapped axes over which anything does: what is transposed later
    has no other way to say that the gradients do.
    """
    tangents = list(tangents[: task.num_operands])
    wrt = tuple(not is_zero(t) for t in tangents)
    # The first four are features, kernel, bias and mask.
    if task.vocab_axis_name is not None and any(wrt[4:]):
        raise NotImplementedError(
            "`vocab_axis_name`: where the vocabulary is sharded there are gradients by "
            "features, kernel and bias only. Pass options as Python numbers, and "
            "`jax.lax.stop_gradient` of other arrays."
        )
    # Features are shared by the shards of the vocabulary, each of which makes a part of
    # their gradient: the tangent passes as it is, its transpose is added up.
    if wrt[0] and _is_untracked(task.vocab_axis_name):
        add = Place("any", task.vocab_axis_name).add
        tangents[0] = linear_call(
            lambda _, t: t, lambda _, ct: add(ct), (), tangents[0]
        )
    changes = selected(tangents, wrt)
    axes = frozenset().union(*map(varying, (*primals, *changes)))
    return wrt, [vary(t, tuple(axes)) for t in changes]


def _add_changes(change: Any, task: Task) -> Any:
    """Adds the changes of a total that the shards of the vocabulary make."""
    add = Place("any", task.vocab_axis_name).add
    if _is_untracked(task.vocab_axis_name):
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


def _plain_outputs(task: Task, operands: Arrays) -> list[jax.Array]:
    """The outputs of each token, 512 at a time, by what JAX can differentiate again."""
    if task.vocab_axis_name is not None:
        raise NotImplementedError(
            "`vocab_axis_name`: there is no second derivative where the vocabulary is "
            "sharded. Leave it out, and let the compiler shard the kernel."
        )
    # All tokens are gone through, also those that do not count: a second derivative is
    # rare, and a plain program is one that JAX can differentiate in any mode.
    given, _ = named(task, operands)
    mask = given.mask.ravel()
    dtype = jnp.promote_types(given.features.dtype, jnp.float32)
    kernel, bias = given.kernel.astype(dtype), given.bias.astype(dtype)
    if not mask.size:
        return [jnp.zeros(given.mask.shape, dtype)] * task.loss.num_outputs
    filler = mask.argmax()

    def flat(x: jax.Array) -> jax.Array:
        # Outside of a jit, constants may come as NumPy's arrays.
        return jnp.asarray(x).reshape(-1, *x.shape[given.mask.ndim :])

    def safe(valid: jax.Array, x: jax.Array, all_x: jax.Array) -> jax.Array:
        """Repeats a token that counts where one does not, as a constant."""
        instead = jax.lax.stop_gradient(jnp.where(mask.any(), all_x[filler], 0))
        return jnp.where(valid, x, instead.astype(x.dtype))

    rows = [flat(x) for x in (given.features, *given.arrays)]

    # Its logits are made again on the way back, or those of all tokens would be kept.
    @jax.checkpoint
    def token_outputs(token: Any) -> list[jax.Array]:
        valid, *own = token
        x, *arrays = (safe(valid, a, b) for a, b in zip(own, rows, strict=True))
        logits = logits_of(x.astype(dtype)[None], kernel, bias)
        # As a constant, infinity has no derivative that could be NaN.
        logits = jnp.where(logits == -jnp.inf, -jnp.inf, logits)
        arrays = [array[None] for array in arrays]
        outputs, _ = task.loss.values(logits, arrays, given.shared, Place("any"))
        return [jnp.where(valid, output[0], 0) for output in outputs]

    outputs: list[jax.Array]
    outputs = jax.lax.map(token_outputs, (mask, *rows), batch_size=512)
    return [output.reshape(given.mask.shape) for output in outputs]


def _gradients_jvp(
    primals: Arrays,
    tangents: Arrays,
    *,
    wrt: tuple[bool, ...],
    with_values: bool,
    task: Task,
) -> Any:
    outs = gradients_p.bind(*primals, wrt=wrt, with_values=with_values, task=task)
    num, num_outputs = task.num_operands, task.loss.num_outputs
    last = num + num_outputs
    mask = primals[3]
    # Residuals are functions of the operands, which the plain program makes anew: what
    # their tangents say is in it already.
    is_changing = tuple(not is_zero(t) for t in tangents[:last])

    def plain(*some: jax.Array) -> list[jax.Array]:
        full = replaced(primals[:last], is_changing, some)
        operands, weights = full[:num], full[num:]

        def outputs_of(*wanted: jax.Array) -> list[jax.Array]:
            return _plain_outputs(task, replaced(operands, wrt, wanted))

        outputs, pull = jax.vjp(outputs_of, *selected(operands, wrt))
        gradients = pull(
            [
                jnp.where(mask, w, 0).astype(o.dtype)
                for w, o in zip(weights, outputs, strict=True)
            ]
        )
        return [*(outputs if with_values else []), *gradients]

    changes = _jvp(
        plain,
        selected(primals[:last], is_changing),
        selected(tangents[:last], is_changing),
    )
    if with_values:
        residuals = outs[num_outputs : num_outputs + task.loss.num_residuals]
        changes[num_outputs:num_outputs] = [jnp.zeros_like(x) for x in residuals]
    return outs, [c.astype(out.dtype) for c, out in zip(changes, outs, strict=True)]


def _tangents_jvp(
    primals: Arrays, tangents: Arrays, *, wrt: tuple[bool, ...], task: Task
) -> Any:
    outs = tangents_p.bind(*primals, wrt=wrt, task=task)
    num = task.num_operands
    first = num + task.loss.num_residuals
    inputs, changes = ([*x[:num], *x[first:]] for x in (primals, tangents))
    is_changing = tuple(not is_zero(t) for t in changes)

    def plain(*some: jax.Array) -> list[jax.Array]:
        full = replaced(inputs, is_changing, some)
        operands, directions = full[:num], full[num:]

        def outputs_of(*wanted: jax.Array) -> list[jax.Array]:
            return _plain_outputs(task, replaced(operands, wrt, wanted))

        changes: list[jax.Array] = _jvp(outputs_of, selected(operands, wrt), directions)
        return changes

    changes = _jvp(plain, selected(inputs, is_changing), selected(changes, is_changing))
    return outs, changes


def _scaled_jvp(primals: Arrays, tangents: Arrays, *, task: Task) -> Any:
    outs = scaled_p.bind(*primals, task=task)
    return outs, _jvp(times, primals, [filled(t) for t in tangents])


def _jvp(function: Callable[..., Any], primals: Arrays, tangents: Arrays) -> Any:
    return jax.jvp(function, tuple(primals), tuple(tangents))[1]


on_jvp(total_p, _total_jvp)
on_jvp(losses_p, _losses_jvp)
on_jvp(gradients_p, _gradients_jvp)
on_jvp(tangents_p, _tangents_jvp)
on_jvp(scaled_p, _scaled_jvp)
on_jvp(inner_p, _inner_jvp)
on_transpose(tangents_p, _tangents_transpose)
on_transpose(inner_p, _inner_transpose)
