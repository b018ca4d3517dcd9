"""The laws of padding, permutation and splits, as assertions on a loss function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import (
    Any,
    TypeVar,
    cast,
)

import jax
import jax.numpy as jnp
import numpy as np

from wloss_jax.testing._causes import (
    COUNTED,
    DIVIDED,
    FLOOR,
    MASKED_AFTER,
    MISALIGNED,
    MULTIPLIED,
    PART_NO_SUM,
    PLACED,
    READ,
    TOTAL_NO_SUM,
    WEIGHT_NO_SUM,
)
from wloss_jax.testing._changes import (
    CONTENTS,
    ORDINARY,
    check_finite,
    check_masks,
    check_rows,
    contents,
    find_floor,
    lengthened,
    take,
    trailing,
)
from wloss_jax.testing._trials import (
    LossFn,
    PyTree,
    Trial,
    by_path,
    during,
    fail,
    is_none,
    splits,
)

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
    combine: Callable[..., Any] | None = None,
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
      loss_fn: ``(params, batch)`` to a scalar, a `WeightedMean`, or a tree of either;
        with ``combine``, to parts, as `wloss_jax.value_and_grad` takes them.
      params: a tree of floating arrays.
      batch: a tree of arrays ``[B, ...]``.
      where: a tree like ``batch``: for each leaf whose padding may hold anything, bool,
        lined up with the leading axes, True where it counts; None for the others, and
        for leaves that say themselves what counts: masks, lengths, sentinels.
      lengthen: False for a model that is bound to one length.
      combine: ``(parts, params)`` to the loss, of the whole batch.
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
    loss = Trial(loss_fn, params, batch, rtol, combine)
    leaves, treedef = jax.tree.flatten(batch, is_leaf=is_none)
    names = list(by_path(batch, is_none))
    masks = check_masks(batch, where)

    def fill(content: int, only: int | None = None) -> PyTree:
        filled = [
            leaf
            if mask is None or only not in (None, i)
            else jnp.where(trailing(mask, leaf), leaf, contents(leaf)[content])
            for i, (leaf, mask) in enumerate(zip(leaves, masks, strict=True))
        ]
        return jax.tree.unflatten(treedef, filled)

    # The batch as it came is the measure, unless its own padding has spoilt it already.
    expected = loss.run(batch)
    if not expected.is_finite():
        expected = loss.run(fill(0))
    check_finite(expected, "numbers in its padding")

    changes = {}
    for i in CONTENTS:
        if change := loss.change(expected, loss.run(fill(i))):
            changes[i] = change
    if changes:
        # A change of the value says more than one of the gradient alone. The leaves are
        # changed one at a time then, for the name of the one to blame.
        of_value = [i for i in changes if changes[i].weight or changes[i].mean]
        content = (of_value or list(changes))[0]
        masked = [i for i, mask in enumerate(masks) if mask is not None]
        alone = [i for i in masked if loss.change(expected, loss.run(fill(content, i)))]
        culprits = " and ".join(
            f"{contents(leaves[i])[content]} at the padding of {names[i]}"
            for i in alone or masked
        )
        if content in ORDINARY:
            cause = READ
        else:
            cause = MULTIPLIED if of_value else MASKED_AFTER
        fail("Padding", f"with {culprits}, {changes[content]}", cause)

    for shape, longer in lengthened(leaves, masks) if lengthen else ():
        what = f"all leaves of {list(shape)} padded to {2 * shape[1]} on axis 1"
        with during(f"{what}, which lengthen=False leaves out"):
            got = loss.run(jax.tree.unflatten(treedef, longer))
        if change := loss.change(expected, got):
            # Twice as long, and half as much: padding was counted in a denominator.
            twice = got.times(2)._replace(weights=expected.weights)
            is_half = not loss.change(expected, twice)
            fail("Padding", f"with {what}, {change}", COUNTED if is_half else READ)


@_settled
def assert_permutation_invariant(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    combine: Callable[..., Any] | None = None,
    rtol: float | None = None,
) -> None:
    """Asserts that the order of the samples does not move a loss.

    ``loss_fn(params, batch[order])`` and its gradient are those of ``batch``

    The rows are reversed, moved on by one, and shuffled.

    Args:
      loss_fn: ``(params, batch)`` to a scalar, a `WeightedMean`, or a tree of either;
        with ``combine``, to parts, as `wloss_jax.value_and_grad` takes them.
      params: a tree of floating arrays.
      batch: a tree of arrays ``[B, ...]``, B at least 2.
      combine: ``(parts, params)`` to the loss, of the whole batch.
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
    loss = Trial(loss_fn, params, batch, rtol, combine)
    size = check_rows(batch)
    expected = loss.run(batch)
    check_finite(expected, "rows in their order")
    rows = np.arange(size)
    for name, order in (
        ("reversed", rows[::-1]),
        ("moved on by one", np.roll(rows, 1)),
        ("shuffled", np.random.default_rng(0).permutation(rows)),
    ):
        got = loss.run(jax.tree.map(functools.partial(take, order), batch))
        if change := loss.change(expected, got):
            is_square = any(size in np.shape(x)[1:] for x in jax.tree.leaves(batch))
            cause = MISALIGNED if is_square else PLACED
            fail("Permutation", f"with rows {name}, {change}", cause)


@_settled
def assert_split_invariant(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    combine: Callable[..., Any] | None = None,
    rtol: float | None = None,
) -> None:
    """Asserts that microbatches and devices do not move a loss.

    ``sum_i total_i / sum_i weight_i`` over the parts is the mean of the whole batch,
    and its gradient that of the whole

    The batch is cut into every number of microbatches that divides it, and spread over
    every such number of the devices that there are. The parts of a `WeightedMean` are
    added up, totals and weights. A scalar has no weight: its parts must average to the
    whole, as a training loop or `jax.lax.pmean` averages them, or add up to it, as
    those of a sum do. Those of a mean over ragged data do neither. With ``combine``,
    parts are added up or put together, and the loss is made of them then.

    A leaf of the batch that is named ``weights`` is scaled down and up as well, and the
    loss must stay, or scale with it: the weights of a small part are small.

    Args:
      loss_fn: ``(params, batch)`` to a scalar, a `WeightedMean`, or a tree of either;
        with ``combine``, to parts, as `wloss_jax.value_and_grad` takes them.
      params: a tree of floating arrays.
      batch: a tree of arrays ``[B, ...]``, B at least 2.
      combine: ``(parts, params)`` to the loss, of the whole batch.
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
      >>> def root(mean, params):
      ...     return jnp.sqrt(mean.compute())
      >>> wl.testing.assert_split_invariant(sound, 1.0, batch, combine=root)
    """
    loss = Trial(loss_fn, params, batch, rtol, combine)
    size = check_rows(batch)
    whole = loss.run(batch)
    check_finite(whole, "all rows together")
    floor = None if combine else find_floor(loss, batch, whole)

    if combine:
        ways = ["combined over"]
    else:
        ways = ["averaged over"] * loss.is_scalar + ["added up over"]
    for count, parts, step in splits(loss, size):
        with during(f"the batch cut into {parts}"):
            got = loss.run(batch, step)
        # What microbatches average, times their number, is what they add up to. A way
        # that fails once is out; the law is broken when none is left.
        sums = got.times(count) if loss.is_scalar else got
        changes = {}
        for way in ways:
            result = sums if way == "added up over" else got
            if change := loss.change(whole, result):
                changes[way] = change
        if len(changes) == len(ways):
            change = changes[ways[0]]
            if combine:
                cause = PART_NO_SUM
            elif floor:
                cause = FLOOR
            elif loss.is_scalar:
                cause = DIVIDED
            else:
                cause = WEIGHT_NO_SUM if change.weight else TOTAL_NO_SUM
            fail("Split", f"{ways[0]} {parts}, {change}", cause)
        ways = [way for way in ways if way not in changes]
    if floor:
        fail("Scaling", f"with `weights` scaled by a constant, {floor}", FLOOR)
