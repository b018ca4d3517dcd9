"""`linear_masked`, which makes a loss from features and a kernel of any loss of logits.

What the user's function closes over must become operands of the primitives, which are
traced when the function's own surroundings are gone. So it is traced once, for one
token, and what it closes over is what `jax.make_jaxpr` finds; the engine then maps that
over the tokens of a chunk, of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_dtype,
    check_function,
    check_shape,
    check_value,
    describe,
)
from wloss_jax._counting import what_counts
from wloss_jax._devices import jit_compiled, vary
from wloss_jax._jaxprs import evaluated
from wloss_jax._keywords import keywords_checked
from wloss_jax.linear._arguments import (
    Named,
    Problem,
    check_data,
    check_static,
    in_auto,
    mean_of,
)
from wloss_jax.linear._logits import Arrays, Place
from wloss_jax.linear._primitives import varying, varying_type
from wloss_jax.losses._labels import nan_unless
from wloss_jax.means import WeightedMean


@dataclasses.dataclass(frozen=True)
class UserLoss:
    """The loss of one token, as a jaxpr; ``shared`` is what the function closes over.

    Its slope is JAX's.

    Attributes:
      jaxpr: the loss of ``[1, V]`` logits and rows of one token.
      varying: the mapped axes that these were traced as differing over.
      specs: how each of ``shared`` is sharded, if some are by explicit axes of a mesh,
        so that the function was traced with such; None elsewhere.
    """

    jaxpr: Any
    varying: frozenset[str] = frozenset()
    specs: tuple[PartitionSpec, ...] | None = None

    num_outputs = 1
    num_residuals = 0
    has_slope = False

    def values(
        self, logits: jax.Array, arrays: Arrays, shared: Arrays, place: Place
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The loss of each token."""

        def of_token(*token: jax.Array) -> jax.Array:
            (value,) = self._evaluated(shared, [x[None] for x in token])
            loss: jax.Array = value[0]
            return loss

        axes = tuple(self.varying)
        loss = jax.vmap(of_token)(*(vary(x, axes) for x in (logits, *arrays)))
        # A function may have a derivative where it is NaN, as `jnp.maximum` has, 0.
        return [loss * nan_unless(loss == loss, loss.dtype)], []

    def _evaluated(self, shared: Arrays, token: Arrays) -> list[Any]:
        if self.specs is None:
            return evaluated(self.jaxpr, shared, *token)
        names = jax.sharding.get_abstract_mesh().auto_axes
        explicit = jax.sharding.explicit_axes(
            lambda shared, token: evaluated(self.jaxpr, shared, *token),
            axes=names,
            in_sharding=(self.specs, PartitionSpec()),
        )
        values: list[Any] = explicit(tuple(shared), tuple(token))
        return values

    def slope(self, *_: Any) -> jax.Array:
        """There is none: JAX derives it."""
        raise NotImplementedError


def linear_masked(
    loss_fn: Callable[..., jax.Array],
) -> Callable[..., WeightedMean]:
    """Makes a loss from features and a kernel of any loss of logits, without those.

    ``linear_masked(f)(features, kernel, *arrays) = masked(f)(features @ kernel, ...)``

    The engine of `linear_softmax_cross_entropy`, with its memory, skipping and matrix
    products, for a divergence from a teacher, a focal or margin loss, a cross-entropy
    of top-k targets. The slope of ``loss_fn`` is JAX's, inside of each chunk.

    Each token is by itself: ``loss_fn`` is traced for one token and mapped over the
    others, so that no result can depend on the size of a chunk. What ``loss_fn`` closes
    over, a teacher's kernel say, is a constant for gradients, and as under `jax.jit` it
    is not looked up again when the same function is called again; pass by position what
    has a row for each token, and that may be differentiated.

    Args:
      loss_fn: ``loss_fn(logits [n, V], *arrays [n, ...]) -> [n]``, the loss of each
        token; ``logits`` are float32, or float64.

    Returns:
      A function ``(features [..., D], kernel [D, V], *arrays [..., ...], *, bias=None,
      where, lengths, weights, segment_ids, num_segments, chunk_size=None)`` that
      returns a `WeightedMean`; the keywords are those of
      `linear_softmax_cross_entropy`. A class whose ``bias`` is -infinity has a logit of
      -infinity, and no gradient.

    Raises:
      AssertionError: when called with shapes or dtypes that do not fit, or a
        ``loss_fn`` that does not return one floating value for each token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> teacher_kernel = jnp.eye(2)
      >>> def divergence(logits, teacher_features):
      ...     log_p = jax.nn.log_softmax(logits)
      ...     log_q = jax.nn.log_softmax(teacher_features @ teacher_kernel)
      ...     return (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)
      >>> features, kernel = jnp.array([[1.0, 0.0], [0.0, 9.0]]), jnp.zeros((2, 2))
      >>> distill = wl.linear_masked(divergence)
      >>> print(f"{distill(features, kernel, features, lengths=1):.4f}")
      0.1109
    """
    check_function("loss_fn", loss_fn)

    @keywords_checked
    def linear_loss(
        features: ArrayLike,
        kernel: ArrayLike,
        *arrays: ArrayLike,
        bias: ArrayLike | None = None,
        where: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        num_segments: int | None = None,
        chunk_size: int | None = None,
    ) -> WeightedMean:
        check_static(chunk_size)
        x, kernel, bias = check_data(features, kernel, bias)
        rows = [_check_rows(i, array, x) for i, array in enumerate(arrays)]
        given: Named = {
            "features": x,
            "kernel": kernel,
            "bias": bias,
            "arrays": rows,
            "where": where,
            "lengths": lengths,
            "weights": weights,
            "segment_ids": segment_ids,
        }
        loss, given["shared"] = _traced(loss_fn, x, kernel, rows, given)
        return _compiled(given, num_segments, loss, chunk_size)

    linear_loss.__name__ = getattr(loss_fn, "__name__", "linear_loss")
    linear_loss.__doc__ = loss_fn.__doc__
    return linear_loss


@jit_compiled("num_segments", "loss", "chunk_size")
def _compiled(
    arrays: Named, num_segments: int | None, loss: UserLoss, chunk_size: int | None
) -> WeightedMean:
    def computed(given: Named) -> WeightedMean:
        features = given["features"]
        counts = what_counts(
            features.shape[:-1],
            where=given["where"],
            lengths=given["lengths"],
            weights=given["weights"],
            segment_ids=given["segment_ids"],
            num_segments=num_segments,
        )
        problem = Problem(
            loss,
            features,
            given["kernel"],
            given["bias"],
            given["arrays"],
            given["shared"],
            chunk_size,
            shared_varies=False,  # the jaxpr holds what brings it to the other axes
        )
        mean, _ = mean_of(problem, counts)
        return mean

    return in_auto(computed, arrays)


def _check_rows(i: int, array: ArrayLike, features: jax.Array) -> jax.Array:
    name = f"array {i}"
    rows = check_array(name, array)
    shape = features.shape[:-1]
    check_value(
        name,
        rows.shape[: len(shape)] == shape,
        f"has shape {rows.shape} and `features` {features.shape}: it must have a row "
        f"for each token, and begin with {shape}. What all tokens share is for "
        "`loss_fn` to close over.",
    )
    return rows


def _traced(
    loss_fn: Callable[..., jax.Array],
    features: jax.Array,
    kernel: jax.Array,
    rows: list[jax.Array],
    given: Named,
) -> tuple[UserLoss, list[jax.Array]]:
    """The loss of one token as a jaxpr, and what it closes over.

    It is traced for tokens that differ over all mapped axes that anything in ``given``
    differs over, as those of the engine will.
    """
    num_classes, token_ndim = kernel.shape[1], features.ndim - 1
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    tracers = [x for x in jax.tree.leaves(given) if isinstance(x, jax.Array)]
    axes = frozenset[str]().union(*map(varying, tracers))

    def types(n: int) -> list[jax.ShapeDtypeStruct]:
        shapes: list[tuple[tuple[int, ...], Any]] = [((n, num_classes), dtype)]
        shapes += [((n, *r.shape[token_ndim:]), r.dtype) for r in rows]
        return [varying_type(*one, axes) for one in shapes]

    # First for some tokens, not as many as there are classes: with one only, axes that
    # do not fit together would be broadcast.
    some = 3 if num_classes != 3 else 5
    values = jax.eval_shape(loss_fn, *types(some))
    came = describe(values) if hasattr(values, "shape") else type(values).__name__
    due = (
        f"must return one floating value for each token, [n] for logits [n, V]; for "
        f"n = {some} and V = {num_classes} it returned {came}."
    )
    check_value("loss_fn", hasattr(values, "shape"), due)
    check_shape("loss_fn", values, (some,), due)
    check_dtype("loss_fn", values, float, due)
    # Then for one token, which the engine maps over the others: what couples tokens, a
    # mean over them say, couples one with itself, in a chunk of any size.
    closed = jax.make_jaxpr(loss_fn)(*types(1))
    of_consts = frozenset[str]().union(*map(varying, closed.consts))
    if not of_consts <= axes:  # it closes over what differs over more axes
        axes |= of_consts
        closed = jax.make_jaxpr(loss_fn)(*types(1))
    specs = None
    shardings = [jax.typeof(const).sharding for const in closed.consts]
    mesh = jax.sharding.get_abstract_mesh()
    if any(sharding.mesh.explicit_axes for sharding in shardings):
        specs = tuple(sharding.spec for sharding in shardings)
    elif mesh.explicit_axes:
        # The engine gives explicit axes to the compiler, and so must what it evaluates.
        auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
        with jax.sharding.use_abstract_mesh(auto):
            closed = jax.make_jaxpr(loss_fn)(*types(1))
    shared = [jax.lax.stop_gradient(jnp.asarray(const)) for const in closed.consts]
    return UserLoss(closed.jaxpr, axes, specs), shared
