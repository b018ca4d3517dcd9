"""Across optimizer calls: `multi_steps`, an optax transform.

Its state carries what `WeightedMean` carries, a sum and its weight still apart.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import (
    Any,
    NamedTuple,
)

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_scalar,
    check_shape,
    check_type,
    check_value,
    is_count,
    is_integer,
)
from wloss_jax._keywords import keywords_checked
from wloss_jax.means import WeightedMean


class MultiStepsState(NamedTuple):
    """The state of `multi_steps`, named as that of `optax.MultiSteps` is.

    Attributes:
      mini_step: int32, the calls since the last optimizer step.
      gradient_step: int32, the optimizer steps taken.
      inner_opt_state: the state of the wrapped optimizer.
      acc_grads: the sum of weight times mean gradient, in float32 or wider.
      acc_weight: floating, the sum of the weights.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Any
    acc_grads: Any
    acc_weight: jax.Array


# For mypy this base is Any: optax ships no types.
class MultiSteps(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """What `multi_steps` makes: ``init`` and ``update``, as in optax, and ``flush``.

    Attributes:
      flush: ``(state, params=None, **extra) -> (updates, state)``, an optimizer step
        with what has been accumulated so far; see `multi_steps`.
    """

    init: Callable[[Any], MultiStepsState]
    update: Callable[..., tuple[Any, MultiStepsState]]
    flush: Callable[..., tuple[Any, MultiStepsState]]


@keywords_checked
def multi_steps(
    optimizer: optax.GradientTransformation,
    every_k: int | Callable[[jax.Array], ArrayLike],
) -> MultiSteps:
    """Takes one step of ``optimizer`` for ``every_k`` calls, each by its weight.

    ``gradient = sum_i weight_i gradient_i / sum_i weight_i``

    So k calls are one big batch, however unequal: `optax.MultiSteps` gives each call
    the same say. Each call is ``update(grads, state, params, weight=m.weight)``, with
    what `wloss_jax.value_and_grad` returns as ``m, grads``: the gradient of the call's
    mean loss, and the weight that this mean is divided by, over all devices. The
    updates are zeros, and ``optimizer`` is left alone, until the k-th call.

    ``flush(state, params)`` takes a step early, with the calls since the last one: at
    the end of an epoch, or of training. It does nothing if they weighed nothing. The
    next call is the first of k again.

    - A call of weight 0 adds nothing, whatever its gradient is, but it is one of the k.
      If all k weigh nothing, the optimizer steps with a gradient of 0, as it would for
      one big batch in which nothing counts; schedules advance alike. A total without
      a weight, of weights that cancel, shows as infinity.
    - A loss of several terms has several weights, and one will not do; one that is made
      by ``combine`` has none. Accumulate such losses with the microbatches of
      `wloss_jax.value_and_grad`.
    - The sums are float32 or wider, of weights times gradients too, which end at 3.4e38
      there. ``optimizer`` sees their quotient in the dtype of ``params``, as with
      optax, and as it is if called without ``params``.
    - It also sees ``weight``, the sum over the calls, so that one `multi_steps` wraps
      another, and the other extra arguments of the k-th call.
    - In `optax.chain` and others, keep hold of the transform for its ``flush``, which
      takes and returns the transform's own part of the state.

    Args:
      optimizer: any optax transform.
      every_k: a positive integer, or a function from the number of optimizer steps
        taken, an int32 scalar, to one.

    Returns:
      An `optax.GradientTransformationExtraArgs` that has ``flush`` too.

    Raises:
      AssertionError: ``optimizer`` or ``every_k`` is not as above; or, from
        ``update``, ``weight`` is missing or no floating scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import wloss_jax as wl
      >>> optimizer = wl.multi_steps(optax.sgd(learning_rate=1.0), every_k=2)
      >>> params = jnp.array(0.0)
      >>> state = optimizer.init(params)
      >>> for grad, tokens in ((9.0, 8.0), (18.0, 1.0), (3.0, 5.0)):
      ...     grad = jnp.array(grad)
      ...     updates, state = optimizer.update(grad, state, params, weight=tokens)
      ...     print(updates)  # the average of the first two gradients is 13.5
      0.0
      -10.0
      0.0
      >>> updates, state = optimizer.flush(state, params)
      >>> print(updates)
      -3.0
    """
    check_type(
        "every_k",
        callable(every_k) or is_count(every_k, at_least=1),
        lambda: (
            f"is {every_k!r}: pass a positive integer, or a function from the number "
            "of optimizer steps taken to one."
        ),
    )
    check_type(
        "optimizer",
        hasattr(optimizer, "init") and hasattr(optimizer, "update"),
        f"must be an optax transform; got {optimizer!r}.",
    )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> MultiStepsState:
        return MultiStepsState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=jnp.zeros((), jnp.int32),
            inner_opt_state=inner.init(params),
            acc_grads=jax.tree.map(_zeros_to_sum, params),
            acc_weight=jnp.zeros(()),
        )

    def update(
        grads: Any,
        state: MultiStepsState,
        params: Any = None,
        *,
        weight: ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[Any, MultiStepsState]:
        scalar = _check_weight(weight)
        _check_state(state)
        _check_gradients(grads, state.acc_grads)

        def add(total: jax.Array, grad: ArrayLike) -> jax.Array:
            term = scalar.astype(total.dtype) * jnp.asarray(grad, total.dtype)
            return jnp.where(scalar == 0, total, total + term)

        state = state._replace(
            mini_step=state.mini_step + 1,
            acc_grads=jax.tree.map(add, state.acc_grads, grads),
            acc_weight=state.acc_weight + scalar.astype(state.acc_weight.dtype),
        )
        k: ArrayLike = (
            check_scalar("every_k(...)", every_k(state.gradient_step), int)
            if callable(every_k)
            else every_k
        )
        return step_if(state.mini_step >= k, state, params, extra)

    def flush(
        state: MultiStepsState, params: Any = None, **extra: Any
    ) -> tuple[Any, MultiStepsState]:
        _check_state(state)
        state = state._replace(mini_step=jnp.zeros_like(state.mini_step))
        sums = jax.tree.leaves((state.acc_weight, state.acc_grads))
        found = functools.reduce(operator.or_, [(x != 0).any() for x in sums])
        return step_if(found, state, params, extra)

    def step_if(
        is_due: jax.Array, state: MultiStepsState, params: Any, extra: dict[str, Any]
    ) -> tuple[Any, MultiStepsState]:
        def step() -> tuple[Any, MultiStepsState]:
            def divide(total: jax.Array, like: ArrayLike) -> jax.Array:
                # 0 where nothing counted; a total without a weight shows, as infinity.
                mean = total / jnp.where(total == 0, 1, state.acc_weight)
                return mean.astype(jnp.result_type(like))

            mean = jax.tree.map(
                divide,
                state.acc_grads,
                state.acc_grads if params is None else params,
            )
            updates, inner_opt_state = inner.update(
                mean,
                state.inner_opt_state,
                params,
                weight=state.acc_weight,
                **extra,
            )
            return updates, MultiStepsState(
                mini_step=jnp.zeros_like(state.mini_step),
                gradient_step=state.gradient_step + 1,
                # Some optimizers widen their state, which would change a loop's carry.
                inner_opt_state=jax.tree.map(
                    lambda new, old: jnp.asarray(new, jnp.result_type(old)),
                    inner_opt_state,
                    state.inner_opt_state,
                ),
                acc_grads=jax.tree.map(jnp.zeros_like, state.acc_grads),
                acc_weight=jnp.zeros_like(state.acc_weight),
            )

        def wait() -> tuple[Any, MultiStepsState]:
            updates, _ = jax.eval_shape(step)
            return jax.tree.map(jnp.zeros_like, updates), state

        if not isinstance(is_due, jax.core.Tracer):
            # Outside of a jit, `cond` would compile both branches on every call.
            return step() if is_due else wait()
        result: tuple[Any, MultiStepsState] = jax.lax.cond(is_due, step, wait)
        return result

    transform = MultiSteps(init, update)
    transform.flush = flush
    return transform


def _zeros_to_sum(param: ArrayLike) -> jax.Array:
    return jnp.zeros_like(param, dtype=jnp.result_type(param, jnp.float32))


def _check_state(state: object) -> None:
    check_type(
        "state",
        isinstance(state, MultiStepsState),
        "must be what `init` or the last `update` of this very "
        f"transform returned; got {type(state).__name__}.",
    )


def _check_gradients(grads: Any, sums: Any) -> None:
    """Takes ``grads`` of the structure and the shapes that the parameters had."""
    expected, got = _shapes(sums), _shapes(grads)
    check_value(
        "grads",
        got == expected,
        lambda: (
            "must have the structure and the shapes of the parameters given to `init`, "
            f"{expected}; got {got}."
        ),
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


def _check_weight(weight: Any) -> jax.Array:
    check_value(
        "weight",
        weight is not None,
        "is missing: pass the weight that the mean loss of "
        "this call was divided by, `optimizer.update(grads, state, params, "
        "weight=m.weight)`. A loss made by `combine` has none, and is no average of "
        "those of calls: cut its batch by `num_microbatches` of "
        "`wloss_jax.value_and_grad` instead.",
    )
    check_type(
        "weight",
        not isinstance(weight, WeightedMean),
        "is a `WeightedMean`: pass the weight alone, `weight=m.weight`.",
    )
    # A count as a Python integer is exact; as an array it may have wrapped.
    weight = float(weight) if is_integer(weight) else weight
    scalar = check_array("weight", weight, float)
    check_shape(
        "weight",
        scalar,
        (),
        f"has shape {scalar.shape}: a call has one weight, "
        "that of its whole mean, `m.merge().weight`.",
    )
    return scalar
