"""How a loss is tried: on a batch, on changed ones, and split over devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import (
    Any,
    NamedTuple,
    NoReturn,
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wloss_jax._checks import (
    check_function,
    check_number,
    check_parameters,
    check_type,
)
from wloss_jax._parts import is_mean
from wloss_jax.gradients import value_and_grad
from wloss_jax.means import WeightedMean

PyTree = Any
LossFn = Callable[[Any, Any], Any]


class Change(NamedTuple):
    """What moved, in words; None for what did not."""

    weight: str | None
    mean: str | None
    gradient: str | None

    def __str__(self) -> str:
        return next(text for text in self if text)


class Outcome(NamedTuple):
    """Means and weights by term, a scalar having no weight; gradients by path."""

    means: dict[str, Any]
    weights: dict[str, Any]
    grads: dict[str, Any]

    def is_finite(self) -> bool:
        return all(np.isfinite(x).all() for part in self for x in part.values())

    def times(self, factor: float) -> Outcome:
        means, grads = (
            {name: factor * x.astype(np.float64) for name, x in part.items()}
            for part in (self.means, self.grads)
        )
        return Outcome(means, self.weights, grads)


class Trial:
    """A loss function as `value_and_grad` takes it, and its parameters."""

    def __init__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        batch: PyTree,
        rtol: float | None,
        combine: Callable[..., Any] | None = None,
    ):
        check_function("loss_fn", loss_fn)
        check_parameters("params", params)
        if rtol is not None:
            check_number("rtol", rtol, low=0)
        self.loss_fn = loss_fn
        self.params = params
        self.rtol = rtol
        self.combine = combine
        self.is_scalar = combine is None and _are_scalars(loss_fn, params, batch)
        # Its simplifier turns some multiplications by a mask into choices, which are
        # safe; whether a loss is must not depend on which ones.
        as_written = {"xla_disable_hlo_passes": "algsimp"}
        self.step = jax.jit(self.make_step(), compiler_options=as_written)

    def make_step(self, **options: Any) -> Callable[..., Any]:
        """Value, by name where there are several terms, and gradient."""
        if self.combine is not None:
            return value_and_grad(self.loss_fn, combine=self.combine, **options)
        return value_and_grad(self._terms, **options)

    def _terms(self, params: PyTree, batch: PyTree) -> dict[str, WeightedMean]:
        """The terms by name; a scalar as the mean of a weight of 1."""
        terms = _by_name(self.loss_fn(params, batch))
        if not self.is_scalar:
            return terms
        return {k: WeightedMean(x, jnp.ones_like(x)) for k, x in terms.items()}

    def run(self, batch: PyTree, step: Callable[..., Any] | None = None) -> Outcome:
        value, grads = (step or self.step)(self.params, batch)
        gradients = by_path(jax.tree.map(np.asarray, grads))
        if self.combine is not None:
            return Outcome({"loss": np.asarray(value)}, {}, gradients)
        means = {name: np.asarray(mean.compute()) for name, mean in value.items()}
        weights = {name: np.asarray(mean.weight) for name, mean in value.items()}
        return Outcome(means, {} if self.is_scalar else weights, gradients)

    def change(self, expected: Outcome, got: Outcome) -> Change | None:
        """Says what differs by more than rounding, if anything does."""

        def number(kind: str, before: dict[str, Any], after: dict[str, Any]) -> Any:
            for name, x in before.items():
                if self._moved(x, after[name], _largest(x)):
                    return f"the {kind} of `{name}` is {after[name]:.5g}, not {x:.5g}"
            return None

        def gradient() -> str | None:
            # A gradient that cancels to 0 holds the rounding of the others.
            least = 1e-3 * max(map(_largest, expected.grads.values()), default=0.0)
            for path, x in expected.grads.items():
                name = f"the gradient of {path}" if path else "the gradient"
                after = got.grads[path]
                if not np.isfinite(after).all():
                    return f"{name} is {after[~np.isfinite(after)][0]}"
                if self._moved(x, after, max(_largest(x), least)):
                    return (
                        f"{name} is off by {_largest(after - x):.3g}, where its "
                        f"largest entry is {_largest(x):.3g}"
                    )
            return None

        change = Change(
            number("weight", expected.weights, got.weights),
            number("mean", expected.means, got.means),
            gradient(),
        )
        return change if any(change) else None

    def _moved(self, expected: Any, got: Any, scale: float) -> bool:
        # Sums of 10**5 numbers, grouped differently, differ by less; a broken law moves
        # a loss by more. In 16 bits, a gradient of some parts is rounded in each.
        rtol = {8: 1e-9, 4: 1e-4}.get(expected.dtype.itemsize, 0.03)
        rtol = rtol if self.rtol is None else self.rtol
        return not _largest(got - expected) <= rtol * scale


def _largest(array: Any) -> float:
    return float(np.max(np.abs(array.astype(np.float64)), initial=0.0))


def _are_scalars(loss_fn: LossFn, params: PyTree, batch: PyTree) -> bool:
    """Whether a loss function returns scalars, and no `WeightedMean`s."""
    shape = jax.eval_shape(loss_fn, params, batch)
    terms = list(_by_name(shape).values())
    are_means = [is_mean(term) for term in terms]
    check_type(
        "loss_fn",
        all(are_means) if any(are_means) else bool(terms) and all(map(_is_one, terms)),
        "must return a floating scalar, a `WeightedMean`, or a tree of one or the "
        f"other, or have a `combine` that makes a scalar of it; got {shape!r}.",
    )
    return not any(are_means)


def _is_one(term: Any) -> bool:
    is_array = isinstance(term, jax.ShapeDtypeStruct)
    return is_array and term.shape == () and jnp.issubdtype(term.dtype, jnp.floating)


def _by_name(terms: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their path, ``loss`` where there is one alone."""
    flat = jax.tree_util.tree_leaves_with_path(terms, is_leaf=is_mean)
    return {_name(path): leaf for path, leaf in flat}


def _name(path: tuple[Any, ...]) -> str:
    key = path[0] if len(path) == 1 else None
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    return jax.tree_util.keystr(path) or "loss"


def splits(loss: Trial, size: int) -> Iterator[tuple[int, str, Callable[..., Any]]]:
    """The splits of a batch: how many parts, in words, and a step that takes them."""
    divisors = [k for k in range(2, size + 1) if size % k == 0]
    for k in divisors:
        yield k, f"{k} microbatches", jax.jit(loss.make_step(num_microbatches=k))
    # As many devices as there are: on a machine with one, microbatches alone.
    devices = jax.local_devices()
    for k in divisors:
        if k <= len(devices):
            mesh = Mesh(np.array(devices[:k]), ("devices",))
            yield k, f"{k} devices", _on_devices(loss, mesh)


def _on_devices(loss: Trial, mesh: Mesh) -> Callable[..., Any]:
    step = jax.shard_map(
        loss.make_step(axis_name="devices"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("devices")),
        out_specs=PartitionSpec(),
        check_vma=False,  # which loops in a model may not pass, correct as they are
    )

    def place_and_step(params: PyTree, batch: PyTree) -> Any:
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.jit(step)(*jax.device_put((params, batch), everywhere))

    return place_and_step


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"This came from `loss_fn`, given {what}.")
        raise


def fail(law: str, what: str, cause: str) -> NoReturn:
    raise AssertionError(f"{law} law broken: {what}.\nLikeliest cause: {cause}")


def is_none(x: Any) -> bool:
    return x is None


def by_path(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}
