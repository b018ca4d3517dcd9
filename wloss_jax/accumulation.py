"""Across steps: `multi_steps` for gradients, `RunningMean` for evaluation and epochs.

Both carry what `WeightedMean` carries, a sum and its weight still apart, through a
training loop: as the state of an optimizer, and as a pytree in a jitted step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from wloss_jax.masks import check_array, check_scalar, is_count
from wloss_jax.weighted_mean import WeightedMean, jit_compiled


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
      one big batch in which nothing counts; schedules advance alike.
    - A loss of several terms has several weights, and one will not do: accumulate such
      a loss with the microbatches of `wloss_jax.value_and_grad`.
    - The sums are float32 or wider. ``optimizer`` sees their quotient in the dtype of
      ``params``, as with optax, and as it is if called without ``params``.
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
    chex.assert_equal(
        callable(every_k) or is_count(every_k, at_least=1),
        True,
        custom_message=f"`every_k` is {every_k!r}: pass a positive integer, or a "
        "function from the number of optimizer steps taken to one.",
    )
    chex.assert_equal(
        hasattr(optimizer, "init") and hasattr(optimizer, "update"),
        True,
        custom_message=f"`optimizer` must be an optax transform; got {optimizer!r}.",
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
        return step_if(state.acc_weight != 0, state, params, extra)

    def step_if(
        is_due: jax.Array, state: MultiStepsState, params: Any, extra: dict[str, Any]
    ) -> tuple[Any, MultiStepsState]:
        def step() -> tuple[Any, MultiStepsState]:
            weight = jnp.where(state.acc_weight == 0, 1, state.acc_weight)
            mean = jax.tree.map(
                lambda total, like: (total / weight).astype(jnp.result_type(like)),
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
    chex.assert_equal(
        isinstance(state, MultiStepsState),
        True,
        custom_message="`state` must be what `init` or the last `update` of this very "
        f"transform returned; got {type(state).__name__}.",
    )


def _check_gradients(grads: Any, sums: Any) -> None:
    """Takes ``grads`` of the structure and the shapes that the parameters had."""
    expected, got = _shapes(sums), _shapes(grads)
    chex.assert_equal(
        got == expected,
        True,
        custom_message="`grads` must have the structure and the shapes of the "
        f"parameters given to `init`, {expected}; got {got}.",
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


def _check_weight(weight: ArrayLike | None) -> jax.Array:
    chex.assert_equal(
        weight is None,
        False,
        custom_message="`weight` is missing: pass the weight that the mean loss of "
        "this call was divided by, `optimizer.update(grads, state, params, "
        "weight=m.weight)`.",
    )
    # A count as a Python integer is exact; as an array it may have wrapped.
    weight = float(weight) if type(weight) is int else weight
    scalar = check_array("weight", weight, float)
    chex.assert_shape(
        scalar,
        (),
        custom_message=f"`weight` has shape {scalar.shape}: a call has one weight, "
        "that of its whole mean, `m.merge().weight`.",
    )
    return scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RunningMean:
    """Adds up `WeightedMean`s over any number of steps without losing count.

    ``mean = sum_i total_i / sum_i weight_i``

    Both sums are pairs of numbers, the rounded sum and what rounding left over, so that
    they have twice the digits: in float32, counts are exact up to 2**47, in updates of
    up to 2**24 elements each, which is where one float32 stops counting. A pytree, that
    lives in a jitted step or a `jax.lax.scan`; one entry for each head or group with
    ``zeros(shape)``, or by `jax.vmap`. NaN or infinity in a sum stays there.

    Over devices, update with ``m.psum(axis_name)``. Over processes that hold one each,
    gather them, and add them up, in float64 or as they are::

        stacked = jax.experimental.multihost_utils.process_allgather(running)
        total, weight = stacked.to_host()    # NumPy arrays of [process_count]
        mean = total.sum() / weight.sum()

        parts = [jax.tree.map(lambda x: x[i], stacked) for i in range(process_count)]
        running = functools.reduce(wl.RunningMean.merge, parts)

    Attributes:
      total: floating ``[...]``, the sum of the totals, rounded.
      total_low: of the same shape, what ``total`` lacks of the sum.
      weight: of the same shape, the sum of the weights, rounded.
      weight_low: of the same shape, what ``weight`` lacks of the sum.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> running = wl.RunningMean.zeros()
      >>> for tokens in (2.0**24, 1.0, 1.0, 1.0):  # the sum of a float32 stays 2**24
      ...     running = running.update(wl.WeightedMean(0.5 * tokens, tokens))
      >>> running
      RunningMean(mean=0.5, weight=16777219.0)
      >>> running.to_host()
      (8388609.5, 16777219.0)

    Source: the pairs are added as in Joldes, Muller and Popescu, "Tight and rigorous
    error bounds for basic building blocks of double-word arithmetic", 2017 (algorithm
    5), https://doi.org/10.1145/3121432
    """

    total: jax.Array
    total_low: jax.Array
    weight: jax.Array
    weight_low: jax.Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> Self:
        """Makes one that has seen nothing.

        Args:
          shape: the batch shape, ``(num_heads,)`` say.
        """
        # Four arrays, not one four times: a buffer can be donated only once.
        return cls(*(jnp.zeros(shape) for _ in range(4)))

    def update(self, m: WeightedMean) -> RunningMean:
        """Adds a `WeightedMean` of the same shape.

        Args:
          m: floating ``[...]``; merge the batch axes that this mean does not have.

        Raises:
          AssertionError: ``m`` is no `WeightedMean`, or of another shape.
        """
        chex.assert_equal(
            isinstance(m, WeightedMean),
            True,
            custom_message=f"`m` is {type(m).__name__}: `update` takes the "
            "`WeightedMean` that a loss returns; `merge` takes another `RunningMean`.",
        )
        zeros = jnp.zeros_like(m.total)
        return self.merge(RunningMean(m.total, zeros, m.weight, zeros))

    def merge(self, other: RunningMean) -> RunningMean:
        """Adds what another one has seen; the order does not matter, to rounding.

        Args:
          other: one of the same shape.

        Raises:
          AssertionError: ``other`` is no `RunningMean`, or of another shape.
        """
        chex.assert_equal(
            isinstance(other, RunningMean),
            True,
            custom_message=f"`other` is {type(other).__name__}: `merge` takes another "
            "`RunningMean`; `update` takes the `WeightedMean` that a loss returns.",
        )
        chex.assert_equal(
            jnp.shape(self.total),
            jnp.shape(other.total),
            custom_message="the shapes of what is added differ: `merge` the batch axes "
            "of a `WeightedMean` first, or start from `RunningMean.zeros(shape)`.",
        )
        total = _add(self.total, self.total_low, other.total, other.total_low)
        weight = _add(self.weight, self.weight_low, other.weight, other.weight_low)
        return RunningMean(*total, *weight)

    def compute(self, empty: ArrayLike = 0.0) -> jax.Array:
        """Divides: ``total / weight``, and ``empty`` where the weight is 0.

        Args:
          empty: the value where nothing counted.

        Returns:
          floating ``[...]``, of the shape of ``total``.
        """
        return WeightedMean(self.total, self.weight).compute(empty)

    def to_host(self) -> tuple[Any, Any]:
        """Brings the sums to the host in float64, whole.

        Returns:
          ``(total, weight)``: Python floats, or NumPy float64 ``[...]`` if this mean
          has a batch shape.
        """
        total, total_low, weight, weight_low = (
            np.asarray(x, np.float64) for x in jax.tree.leaves(self)
        )
        total, weight = total + total_low, weight + weight_low
        return (total, weight) if total.ndim else (float(total), float(weight))

    def __repr__(self) -> str:
        try:
            mean, (_, weight) = self.compute(), self.to_host()
            return f"RunningMean(mean={mean!s}, weight={weight!s})"
        except Exception:  # traced, or a pytree of something else than arrays
            names = (field.name for field in dataclasses.fields(self))
            fields = (f"{name}={getattr(self, name)!r}" for name in names)
            return f"RunningMean({', '.join(fields)})"


@jit_compiled()
def _add(
    a: jax.Array, a_low: jax.Array, b: jax.Array, b_low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds two pairs, with the digits of both."""
    high, error = _two_sum(a, b)
    return _two_sum(high, error + (a_low + b_low))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds two numbers: their rounded sum, and the exact error of rounding it."""
    # Behind the barrier, no compiler may conclude that the error is 0, as real numbers
    # would have it: with `--xla_cpu_enable_fast_math`, 10**6 counts of 1,000 come to
    # 1,007,789,952 without it.
    high = jax.lax.optimization_barrier(jnp.add(a, b))
    b_part = high - a
    error = (a - (high - b_part)) + (b - b_part)
    # The error of an infinite sum would be NaN.
    return high, jnp.where(jnp.isfinite(high), error, 0)
