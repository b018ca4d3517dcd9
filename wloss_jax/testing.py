"""The laws that this package promises, as assertions on a loss function of your own.

``loss_fn(params, batch)`` may return a scalar, a `wloss_jax.WeightedMean`, or a dict of
either, the terms by name. Hand in a small batch that is as ragged as yours ever are,
with an empty sample: a broken law shows only where the data lets it. Each assertion
says which law broke, by how much, and the likeliest cause, found by experiment.

Modules of `flax.nnx` are handed in split::

    graphdef, params, state = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, batch):
        return my_loss(nnx.merge(graphdef, params, state, copy=True), batch)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from wloss_jax.gradients import last_name, value_and_grad
from wloss_jax.masks import (
    check_array,
    check_count,
    check_function,
    check_label,
    check_number,
    check_parameters,
    expand_leading,
    is_label,
    valid_mask,
)
from wloss_jax.weighted_mean import WeightedMean

PyTree = Any
LossFn = Callable[[Any, Any], Any]
_Assertion = TypeVar("_Assertion", bound=Callable[..., None])


def _settled(assertion: _Assertion) -> _Assertion:
    """Runs an assertion under the settings of JAX that it needs."""

    @functools.wraps(assertion)
    def settled(*args: Any, **kwargs: Any) -> None:
        # Accelerators round the inputs of matrix products, and differently by shape.
        precise = jax.default_matmul_precision("highest")
        with precise, jax.debug_nans(False), jax.debug_infs(False):
            assertion(*args, **kwargs)

    return cast(_Assertion, settled)


@_settled
def assert_padding_invariant(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    where: PyTree,
    lengthen: bool = True,
    rtol: float | None = None,
) -> None:
    """Asserts that neither the content nor the amount of padding moves a loss.

    ``loss_fn(params, batch)`` and its gradient stay, whatever stands at ``where=False``

    Padding is filled with ordinary numbers, then with huge ones, NaN and infinities;
    that of integers with 0, 1, -1, -100 and the extremes. Then axis 1 is doubled, where
    a mask says that samples end early on it: True up to a length, False from there on.
    Every leaf that shares the first two axes of such a mask, masked or not, is padded
    with what it holds at the end of the shortest sample.

    NaN in the inputs of a *model* reaches the gradient through any matrix product,
    however well the loss is masked: 0 times NaN is NaN. A mask for them asks for a
    model that makes its inputs safe too; None is for inputs that hold numbers only.

    Args:
      loss_fn: ``(params, batch)`` to a scalar, a `WeightedMean`, or a dict of either.
      params: a tree of floating arrays.
      batch: a tree of arrays ``[B, ...]``.
      where: a tree like ``batch``: for each leaf whose padding may hold anything, bool,
        lined up with the leading axes, True where it counts; None for the others, and
        for leaves that say themselves what counts: masks, lengths, sentinels.
      lengthen: False for a model that is bound to one length.
      rtol: how far a mean, and a gradient of its largest entry, may move; by default
        1e-4 in float32, 1e-9 in float64, and 0.03 in fewer bits.

    Raises:
      AssertionError: the law is broken; or ``where`` does not fit, or masks nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.ones((2, 3)), "n": jnp.array([3, 1])}
      >>> where = {"x": None, "y": wl.length_mask(batch["n"], 3), "n": None}
      >>> def sound(params, batch):
      ...     prediction = params * batch["x"]
      ...     return wl.squared_error(prediction, batch["y"], lengths=batch["n"])
      >>> wl.testing.assert_padding_invariant(sound, 2.0, batch, where=where)
      >>> def masked_after(params, batch):
      ...     mask = wl.length_mask(batch["n"], batch["x"].shape[1])
      ...     return ((params * batch["x"] - batch["y"]) ** 2).mean(where=mask)
      >>> try:
      ...     wl.testing.assert_padding_invariant(masked_after, 2.0, batch, where=where)
      ... except AssertionError as error:
      ...     print(str(error).splitlines()[0])
      Padding law broken: with nan at the padding of ['y'], the gradient is nan.
    """
    loss = _Loss(loss_fn, params, batch, rtol)
    leaves, treedef = jax.tree.flatten(batch, is_leaf=_is_none)
    names = list(_by_path(batch, _is_none))
    masks = _check_masks(batch, where)

    def fill(content: int, only: int | None = None) -> PyTree:
        filled = [
            leaf
            if mask is None or only not in (None, i)
            else jnp.where(_trailing(mask, leaf), leaf, _contents(leaf)[content])
            for i, (leaf, mask) in enumerate(zip(leaves, masks, strict=True))
        ]
        return jax.tree.unflatten(treedef, filled)

    expected = loss.run(batch)
    if not expected.is_finite():
        expected = loss.run(fill(0))
    _check_finite(expected, "numbers in its padding")

    changes = {}
    for i in _CONTENTS:
        if change := loss.change(expected, loss.run(fill(i))):
            changes[i] = change
    if changes:
        of_value = [i for i in changes if changes[i].weight or changes[i].mean]
        content = (of_value or list(changes))[0]
        masked = [i for i, mask in enumerate(masks) if mask is not None]
        alone = [i for i in masked if loss.change(expected, loss.run(fill(content, i)))]
        culprits = " and ".join(
            f"{_contents(leaves[i])[content]} at the padding of {names[i]}"
            for i in alone or masked
        )
        if content in _ORDINARY:
            cause = _READ
        else:
            cause = _MULTIPLIED if of_value else _MASKED_AFTER
        _fail("Padding", f"with {culprits}, {changes[content]}", cause)

    for shape, longer in _lengthened(leaves, masks) if lengthen else ():
        what = f"all leaves of {list(shape)} padded to {2 * shape[1]} on axis 1"
        with _during(f"{what}, which lengthen=False leaves out"):
            got = loss.run(jax.tree.unflatten(treedef, longer))
        if change := loss.change(expected, got):
            twice = got.times(2)._replace(weights=expected.weights)
            is_half = not loss.change(expected, twice)
            _fail("Padding", f"with {what}, {change}", _COUNTED if is_half else _READ)


@_settled
def assert_permutation_invariant(
    loss_fn: LossFn, params: PyTree, batch: PyTree, *, rtol: float | None = None
) -> None:
    """Asserts that the order of the samples does not move a loss.

    ``loss_fn(params, batch[order])`` and its gradient are those of ``batch``

    The rows are reversed, moved on by one, and shuffled.

    Args:
      loss_fn: ``(params, batch)`` to a scalar, a `WeightedMean`, or a dict of either.
      params: a tree of floating arrays.
      batch: a tree of arrays ``[B, ...]``, B at least 2.
      rtol: as in `assert_padding_invariant`.

    Raises:
      AssertionError: the law is broken; or the batch has no common axis 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> batch = {"x": jnp.arange(4.0).reshape(2, 2), "weights": jnp.array([1.0, 3.0])}
      >>> def sound(params, batch):
      ...     return wl.weighted_mean(params * batch["x"], weights=batch["weights"])
      >>> wl.testing.assert_permutation_invariant(sound, 1.0, batch)
      >>> def misaligned(params, batch):
      ...     return jnp.average(params * batch["x"] * batch["weights"])
      >>> try:
      ...     wl.testing.assert_permutation_invariant(misaligned, 1.0, batch)
      ... except AssertionError as error:
      ...     print(str(error).splitlines()[0])
      Permutation law broken: with rows reversed, the mean of `loss` is 2.5, not 3.5.
    """
    loss = _Loss(loss_fn, params, batch, rtol)
    size = _check_rows(batch)
    expected = loss.run(batch)
    _check_finite(expected, "rows in their order")
    rows = np.arange(size)
    for name, order in (
        ("reversed", rows[::-1]),
        ("moved on by one", np.roll(rows, 1)),
        ("shuffled", np.random.default_rng(0).permutation(rows)),
    ):
        got = loss.run(jax.tree.map(functools.partial(_take, order), batch))
        if change := loss.change(expected, got):
            is_square = any(size in np.shape(x)[1:] for x in jax.tree.leaves(batch))
            cause = _MISALIGNED if is_square else _PLACED
            _fail("Permutation", f"with rows {name}, {change}", cause)


@_settled
def assert_split_invariant(
    loss_fn: LossFn, params: PyTree, batch: PyTree, *, rtol: float | None = None
) -> None:
    """Asserts that microbatches and devices do not move a loss.

    ``sum_i total_i / sum_i weight_i`` over the parts is the mean of the whole batch,
    and its gradient that of the whole

    The batch is cut into every number of microbatches that divides it, and spread over
    every such number of the devices that there are. The parts of a `WeightedMean` are
    added up, totals and weights. A scalar has no weight: its parts must average to the
    whole, as a training loop or `jax.lax.pmean` averages them, or add up to it, as
    those of a sum do. Those of a mean over ragged data do neither.

    A leaf of the batch that is named ``weights`` is scaled down and up as well, and the
    loss must stay, or scale with it: the weights of a small part are small.

    Args:
      loss_fn: ``(params, batch)`` to a scalar, a `WeightedMean`, or a dict of either.
      params: a tree of floating arrays.
      batch: a tree of arrays ``[B, ...]``, B at least 2.
      rtol: as in `assert_padding_invariant`.

    Raises:
      AssertionError: the law is broken; or the batch has no common axis 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> batch = {"x": jnp.arange(6.0).reshape(2, 3), "n": jnp.array([3, 1])}
      >>> def sound(params, batch):
      ...     return wl.weighted_mean(params * batch["x"], lengths=batch["n"])
      >>> wl.testing.assert_split_invariant(sound, 1.0, batch)
      >>> def divided(params, batch):
      ...     return sound(params, batch).compute()
      >>> try:
      ...     wl.testing.assert_split_invariant(divided, 1.0, batch)
      ... except AssertionError as error:
      ...     print(str(error).splitlines()[0])
      Split law broken: averaged over 2 microbatches, the mean of `loss` is 2, not 1.5.
    """
    loss = _Loss(loss_fn, params, batch, rtol)
    size = _check_rows(batch)
    whole = loss.run(batch)
    _check_finite(whole, "all rows together")
    floor = _find_floor(loss, batch, whole)

    ways = ["averaged over", "added up over"] if loss.is_scalar else ["added up over"]
    for count, parts, step in _splits(loss.terms_fn, size):
        with _during(f"the batch cut into {parts}"):
            got = loss.run(batch, step)
        sums = got.times(count) if loss.is_scalar else got
        changes = {}
        for way, result in (("averaged over", got), ("added up over", sums)):
            if way in ways and (change := loss.change(whole, result)):
                changes[way] = change
        if len(changes) == len(ways):
            change = changes[ways[0]]
            if floor:
                cause = _FLOOR
            elif loss.is_scalar:
                cause = _DIVIDED
            else:
                cause = _WEIGHT_NO_SUM if change.weight else _TOTAL_NO_SUM
            _fail("Split", f"{ways[0]} {parts}, {change}", cause)
        ways = [way for way in ways if way not in changes]
    if floor:
        _fail("Scaling", f"with `weights` scaled by a constant, {floor}", _FLOOR)


def assert_valid_batch(
    *,
    lengths: ArrayLike | None = None,
    size: int | None = None,
    labels: ArrayLike | None = None,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    weights: ArrayLike | None = None,
) -> None:
    """Asserts that the values of a batch are in range.

    ``0 <= lengths <= size``, ``0 <= labels < num_classes``, ``0 <= weights < infinity``

    The losses check shapes and dtypes, which are known when they are traced; values are
    not. This looks at them: eagerly, or in a jitted function under `chex.chexify`. With
    ``lengths``, the padding of ``labels`` and ``weights`` may hold anything.

    Args:
      lengths: integer ``[B]``, or of any shape.
      size: of the padded axis, the most that a length may be.
      labels: integer, ``[B, L]`` say.
      num_classes: the number of classes.
      ignore_index: a label out of range that is allowed.
      weights: floating, ``[B, L]`` or ``[B]`` say.

    Raises:
      AssertionError: a value is out of range; the message names the argument, the first
        such value and its index, and the mend.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import chex
      >>> import wloss_jax as wl
      >>> wl.testing.assert_valid_batch(lengths=jnp.array([3, 0]), size=3)
      >>> @chex.chexify
      ... @jax.jit
      ... def step(labels):
      ...     wl.testing.assert_valid_batch(labels=labels, num_classes=4)
      >>> try:
      ...     step(jnp.array([[1, 3], [-1, 2]]))
      ...     step.wait_checks()
      ... except AssertionError as error:
      ...     print(str(error).partition("Custom message: ")[2].partition(":")[0])
      `labels` out of range at [1, 0]
    """
    if lengths is not None:
        lengths = check_array("lengths", lengths, int)
        _check_values(
            "lengths",
            lengths,
            lengths < 0,
            "negative",
            "A length counts the elements of a sample, 0 for an empty one.",
        )
        if size is not None:
            check_count("size", size)
            _check_values(
                "lengths",
                lengths,
                lengths > size,
                f"past the end of the padded axis, {size},",
                "Pad to the longest sample, or cut samples and lengths alike.",
            )
    if labels is not None:
        labels = check_array("labels", labels, int)
        bad = labels < 0
        if num_classes is not None:
            check_count("num_classes", num_classes)
            bad |= labels >= num_classes
        if ignore_index is not None:
            check_label("ignore_index", ignore_index)
            bad &= ~is_label(labels, ignore_index)
        number = "no negative" if num_classes is None else num_classes
        _check_values(
            "labels",
            labels,
            _counted(bad, lengths),
            "out of range",
            f"There are {number} classes, from 0; a label that "
            "marks padding is said by `ignore_index`, or covered by `lengths`.",
        )
    if weights is not None:
        weights = check_array("weights", weights, float)
        _check_values(
            "weights",
            weights,
            _counted(~((weights >= 0) & jnp.isfinite(weights)), lengths),
            "negative, infinite or NaN",
            "Elements that do not count are said by `where`.",
        )


# --------------------------------------------------------------- running a loss


class _Change(NamedTuple):
    """What moved, in words; None for what did not."""

    weight: str | None
    mean: str | None
    gradient: str | None

    def __str__(self) -> str:
        return next(text for text in self if text)


class _Outcome(NamedTuple):
    """Means and weights by term, a scalar having no weight; gradients by path."""

    means: dict[str, Any]
    weights: dict[str, Any]
    grads: dict[str, Any]

    def is_finite(self) -> bool:
        return all(np.isfinite(x).all() for part in self for x in part.values())

    def times(self, factor: float) -> _Outcome:
        means, grads = (
            {name: factor * x.astype(np.float64) for name, x in part.items()}
            for part in (self.means, self.grads)
        )
        return _Outcome(means, self.weights, grads)


class _Loss:
    """A loss function as `value_and_grad` takes it, and its parameters."""

    def __init__(
        self, loss_fn: LossFn, params: PyTree, batch: PyTree, rtol: float | None
    ):
        check_function("loss_fn", loss_fn)
        check_parameters("params", params)
        if rtol is not None:
            check_number("rtol", rtol, low=0)
        shape = jax.eval_shape(loss_fn, params, batch)
        terms = list(shape.values()) if isinstance(shape, dict) else [shape]
        are_means = [isinstance(term, WeightedMean) for term in terms]
        chex.assert_equal(
            all(are_means) if any(are_means) else all(map(_is_scalar, terms)),
            True,
            custom_message="`loss_fn` must return a floating scalar, a `WeightedMean`, "
            f"or a dict of one or the other; got {shape!r}.",
        )
        self.is_scalar = not any(are_means)
        self.loss_fn = loss_fn
        self.params = params
        self.rtol = rtol
        # Its simplifier turns some multiplications by a mask into choices, which are
        # safe; whether a loss is must not hang on which ones.
        as_written = {"xla_disable_hlo_passes": "algsimp"}
        self.step = jax.jit(value_and_grad(self.terms_fn), compiler_options=as_written)

    def terms_fn(self, params: PyTree, batch: PyTree) -> dict[str, WeightedMean]:
        """The terms by name; a scalar as the mean of a weight of 1."""
        value = self.loss_fn(params, batch)
        terms = value if isinstance(value, dict) else {"loss": value}
        if not self.is_scalar:
            return terms
        return {k: WeightedMean(x, jnp.ones_like(x)) for k, x in terms.items()}

    def run(self, batch: PyTree, step: Callable[..., Any] | None = None) -> _Outcome:
        value, grads = (step or self.step)(self.params, batch)
        return _Outcome(
            {name: np.asarray(mean.compute()) for name, mean in value.items()},
            {}
            if self.is_scalar
            else {name: np.asarray(mean.weight) for name, mean in value.items()},
            _by_path(jax.tree.map(np.asarray, grads)),
        )

    def change(self, expected: _Outcome, got: _Outcome) -> _Change | None:
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

        change = _Change(
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


def _is_scalar(term: Any) -> bool:
    is_array = isinstance(term, jax.ShapeDtypeStruct)
    return is_array and term.shape == () and jnp.issubdtype(term.dtype, jnp.floating)


def _splits(
    terms_fn: LossFn, size: int
) -> Iterator[tuple[int, str, Callable[..., Any]]]:
    """The splits of a batch: how many parts, in words, and a step that takes them."""
    divisors = [k for k in range(2, size + 1) if size % k == 0]
    for k in divisors:
        step = jax.jit(value_and_grad(terms_fn, num_microbatches=k))
        yield k, f"{k} microbatches", step
    devices = jax.local_devices()
    for k in divisors:
        if k <= len(devices):
            mesh = Mesh(np.array(devices[:k]), ("devices",))
            yield k, f"{k} devices", _on_devices(terms_fn, mesh)


def _on_devices(terms_fn: LossFn, mesh: Mesh) -> Callable[..., Any]:
    step = jax.shard_map(
        value_and_grad(terms_fn, axis_name="devices"),
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
def _during(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"This came from `loss_fn`, given {what}.")
        raise


# -------------------------------------------------------------- changing a batch

_CONTENTS = range(6)
_ORDINARY = (0, 1)


def _contents(leaf: ArrayLike) -> list[Any]:
    """What padding is filled with; the first two are `_ORDINARY`."""
    dtype = jnp.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jnp.bool_):
        return [False, True] * 3
    if jnp.issubdtype(dtype, jnp.integer):
        low, high = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
        return [0, 1, max(-100, low), max(-1, low), low, high]
    huge = float(jnp.finfo(dtype).max) / 2
    return [0.5, 7.25, np.nan, np.inf, -np.inf, huge]


def _trailing(mask: Any, leaf: ArrayLike) -> Any:
    return mask.reshape(mask.shape + (1,) * (np.ndim(leaf) - mask.ndim))


def _lengthened(
    leaves: list[Any], masks: list[Any]
) -> Iterator[tuple[tuple[int, ...], list[Any]]]:
    """Batches with axis 1 doubled, by the shape that a mask of lengths has."""
    ends = {}
    for mask in masks:
        if mask is not None and mask.ndim > 1:
            counts = mask.any(axis=tuple(range(2, mask.ndim)))
            if (counts[:, 1:] <= counts[:, :-1]).all() and not counts.all():
                ends[counts.shape] = int(counts.sum(1).argmin())
    for shape, shortest in ends.items():
        longer = []
        for leaf in leaves:
            if np.shape(leaf)[:2] == shape:
                padding = jnp.broadcast_to(leaf[shortest, -1], leaf.shape)
                leaf = jnp.concatenate([leaf, padding], axis=1)
            longer.append(leaf)
        yield shape, longer


def _take(order: Any, leaf: Any) -> jax.Array:
    return jnp.asarray(leaf)[order]


def _find_floor(loss: _Loss, batch: PyTree, whole: _Outcome) -> _Change | None:
    """What ``weights`` far down and far up do to a loss, beside scaling it.

    A mean stays, a sum is scaled with them; what is divided by an epsilon more, or by 1
    at least, does the one at this end and the other at that.
    """

    def change(scale: float, power: int) -> _Change | None:
        got = loss.run(_scale_weights(batch, scale)).times(scale**-power)
        return loss.change(whole, whole._replace(means=got.means))

    # Beyond an epsilon of 1e-8, and yet nothing overflows.
    down, up = 2.0**-30, 2.0**30
    if (change(down, 1) or change(up, 1)) is None:
        return None
    return change(down, 0) or change(up, 0)


def _scale_weights(batch: PyTree, scale: float) -> PyTree:
    def scaled(path: tuple[Any, ...], leaf: Any) -> Any:
        if last_name(path) != "weights":
            return leaf
        # In float32 at least, as float16 has no room.
        dtype = jnp.promote_types(
            check_array("weights", leaf, float).dtype, jnp.float32
        )
        return jnp.asarray(leaf, dtype) * scale

    return jax.tree_util.tree_map_with_path(scaled, batch)


# ---------------------------------------------------------------- checks and words


def _is_none(x: Any) -> bool:
    return x is None


def _by_path(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def _check_masks(batch: PyTree, where: PyTree) -> list[Any]:
    """The masks, a NumPy array or None for each leaf of the batch."""
    chex.assert_equal(
        jax.tree.structure(where, is_leaf=_is_none),
        jax.tree.structure(batch, is_leaf=_is_none),
        custom_message="`where` must be a tree like `batch`, with None for the leaves "
        "that have no mask.",
    )
    checked = []
    masks = jax.tree.leaves(where, is_leaf=_is_none)
    for (name, leaf), mask in zip(
        _by_path(batch, _is_none).items(), masks, strict=True
    ):
        if mask is not None:
            mask = check_array(f"where{name}", mask, bool)
            expand_leading(f"where{name}", mask, np.shape(leaf))
            mask = np.asarray(mask)
        checked.append(mask)
    chex.assert_equal(
        any(not mask.all() for mask in checked if mask is not None),
        True,
        custom_message="`where` masks nothing: hand in a batch with padding.",
    )
    return checked


def _check_rows(batch: PyTree) -> int:
    shapes = {name: np.shape(leaf) for name, leaf in _by_path(batch).items()}
    sizes = {shape[:1] for shape in shapes.values()}
    chex.assert_equal(
        len(sizes) == 1 and () not in sizes and min(sizes) > (1,),
        True,
        custom_message="axis 0 of every leaf of `batch` must be the batch, of at least "
        f"2 rows; got {shapes}.",
    )
    return int(next(iter(shapes.values()))[0])


def _check_finite(outcome: _Outcome, what: str) -> None:
    chex.assert_equal(
        outcome.is_finite(),
        True,
        custom_message=f"with {what}, the loss or its gradient is not finite, so that "
        "nothing can be compared: look for NaN at an element that counts, or for a "
        f"division by 0. The means: {outcome.means}.",
    )


def _counted(bad: jax.Array, lengths: ArrayLike | None) -> jax.Array:
    """Leaves out what stands past the lengths, where these bound an axis."""
    if lengths is None or bad.ndim <= jnp.ndim(lengths):
        return bad
    mask = valid_mask(bad.shape, lengths=lengths)
    return bad if mask is None else bad & mask


def _check_values(
    name: str, array: jax.Array, bad: jax.Array, what: str, mend: str
) -> None:
    if not array.size:
        return
    first = jnp.argmax(bad)
    index = jnp.unravel_index(first, array.shape)
    place = f"[{', '.join(['{}'] * array.ndim)}]"
    count = bad.sum()
    # The one can be traced, the other has the shorter message.
    is_traced = isinstance(count, jax.core.Tracer)
    check = chex.assert_trees_all_equal if is_traced else chex.assert_equal
    check(
        count if is_traced else int(count),
        jnp.zeros_like(count) if is_traced else 0,
        custom_message=f"`{name}` {what} at {place}: {{}}. {mend}",
        custom_message_format_vars=(*index, array.ravel()[first]),
    )


def _fail(law: str, what: str, cause: str) -> NoReturn:
    raise AssertionError(f"{law} law broken: {what}.\nLikeliest cause: {cause}")


_READ = (
    "padding is read, as nothing masks this leaf, or as the model mixes positions "
    "(convolution, attention, batch statistics) before the mask. Mask its inputs: "
    "`jnp.where(mask, x, 0)`. A leaf that says itself what counts has None in `where`."
)
_MULTIPLIED = (
    "a mask by multiplication: 0 times NaN is NaN, and so is 0 times infinity. Choose, "
    "`jnp.where(mask, loss, 0)`, and put harmless values in before the loss as well, "
    "or wrap the loss in `wl.masked`."
)
_MASKED_AFTER = (
    "a mask on the output only: NaN goes round it into the gradient, as 0 times NaN. "
    "Put harmless values in before the loss or model, `jnp.where(mask, x, 0)`; "
    "`wl.masked` does it for a loss."
)
_COUNTED = (
    "a denominator that counts padding, such as `jnp.mean` of a masked loss. Divide by "
    "the number of elements that count, or use `wl.weighted_mean(loss, where=mask)`."
)
_MISALIGNED = (
    "an array of [B] lined up with another axis of the same size, as NumPy broadcasts. "
    "Write `x[:, None]`; `weights` and `where` of the losses of this package line up "
    "with the leading axes."
)
_PLACED = (
    "a sample's loss depends on its place: random numbers drawn by row (put a key a "
    "sample in the batch), or means of microbatches or devices (`jax.lax.pmean`), "
    "averaged. Add up `WeightedMean`s instead."
)
_DIVIDED = (
    "a denominator taken per microbatch, or per device, so that each part has the same "
    "say however little of it counts. Return the `WeightedMean`, not divided. (Rows "
    "that look at each other, as in batch statistics, split no way.)"
)
_FLOOR = (
    "an epsilon in the denominator, or a floor such as `max(weight, 1)`. Divide by the "
    "plain sum of the weights, guarded where it is 0, as `WeightedMean.compute` does."
)
_WEIGHT_NO_SUM = (
    "a weight that is no plain sum: a floor such as `max(count, 1)`, an epsilon, a "
    "constant. `WeightedMean(total, weight)` takes the sums as they are."
)
_TOTAL_NO_SUM = (
    "a total that is no plain sum: a denominator taken per microbatch, in front of the "
    "`WeightedMean`. (Rows that look at each other, as in batch statistics, split no "
    "way.)"
)
