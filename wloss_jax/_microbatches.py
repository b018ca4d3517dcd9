"""The engine of `value_and_grad`: parts, slopes, microbatches, devices.

The parts of the whole batch are made first, without a gradient. The loss that
``combine`` makes of them is differentiated there, which gives each part its slope. Then
each microbatch is differentiated with the slopes of its own parts. By the chain rule
the sum of those is the gradient, and one microbatch's activations are all that is held.

What the slopes do not depend on is left out of the first evaluation: of a mean it keeps
the weight, and the compiler drops the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp

from wloss_jax._aux import add_aux_up, check_aux, places_of_aux, put_aux_together
from wloss_jax._checks import check_parameters
from wloss_jax._devices import (
    AxisName,
    axis_names,
    check_mapped,
    count_devices,
    from_first,
    gather,
    own_rows,
    psum,
    vary,
)
from wloss_jax._parts import (
    Combine,
    constant_weights,
    differentiate,
    have_slopes,
    needed,
    sloped,
)
from wloss_jax._places import Place, Sizes, check_weights, places_of_parts
from wloss_jax._rows import Cut, batch_size, cut_batch

PyTree = Any
Evaluate = Callable[[Any, Any, Any], tuple[Any, Any, Any]]
_T = TypeVar("_T")


class Outcome(NamedTuple):
    """What comes of a batch.

    Attributes:
      value: the combined loss.
      parts: those of the whole batch.
      aux: as `value_and_grad` says.
      grads: of the parameters.
      state: as the last microbatch left it.
    """

    value: jax.Array
    parts: PyTree
    aux: PyTree
    grads: PyTree
    state: PyTree


def accumulate(
    evaluate: Evaluate,
    combine: Combine,
    params: PyTree,
    state: PyTree,
    batch: PyTree,
    *,
    num_microbatches: int,
    axis_name: AxisName | None,
) -> Outcome:
    """The engine: value, parts, aux, gradient and state of the whole batch.

    Args:
      evaluate: ``(params, state, batch) -> (parts, aux, state)``, where ``parts`` is a
        tree of `WeightedMean`s and rows, and ``state`` goes on to the next microbatch.
      combine: ``(parts, params)`` to a scalar.
      params: what is differentiated, a tree of floating arrays.
      state: what evaluations change, such as batch statistics; None for nothing.
      batch: a tree of arrays ``[B, ...]``.
      num_microbatches: as in `value_and_grad`, and so is the other.
      axis_name: the axis or axes that the batch is spread over, or None.
    """
    axes = () if axis_name is None else axis_names(axis_name)
    check_mapped("axis_name", axes)
    loss = _Loss(evaluate, combine, check_parameters("argnums", params), axes)
    cut = None if num_microbatches == 1 else cut_batch(batch, int(num_microbatches))
    if cut is None or cut.count == 1:
        return loss.of_whole(state, batch, cut)
    return loss.of_microbatches(state, batch, cut)


class _Loss:
    """A loss with its parameters, on the devices of some mapped axes, if any."""

    def __init__(
        self,
        evaluate: Evaluate,
        combine: Combine,
        params: PyTree,
        axes: tuple[str, ...],
    ):
        self.evaluate = evaluate
        self.combine = combine
        self.params = params
        self.axes = axes
        # Parameters and parts that vary, so that the gradient of each device comes out,
        # to be added up once, last; what does not would have it added up by itself.
        self.varying = self._vary(params)

    def of_whole(self, state: PyTree, batch: PyTree, cut: Cut | None) -> Outcome:
        """One forward pass, which is gone back through with the slopes of its parts.

        With a ``cut``, whose only microbatch it is, the aux has a microbatch's shapes.
        """
        # On one device the parts are those of the whole batch as they are: then nothing
        # has to be told apart, and the loss is not traced for that.
        sizes = self._doubled(state, batch, asked=bool(self.axes) or cut is not None)
        back, (parts, aux, state) = self._forward_and_back(state, batch)
        places = places_of_parts(parts, sizes)
        arrays = jax.tree.leaves(parts)
        treedef: Any = jax.tree.structure(parts)
        whole = self._over_devices(arrays, places)
        value, slopes, direct = self._differentiate(treedef, whole)
        slope_places = _choose(places, have_slopes(parts))
        grads = back(self._own_slopes(slopes, slope_places))
        aux_places = places_of_aux(aux, sizes, arrays=cut is not None)
        if cut is not None:  # a stack of one microbatch
            stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], aux)
            aux = put_aux_together(cut, [stacked], aux_places)
        return Outcome(
            from_first(value, self.axes),
            treedef.unflatten(whole),
            add_aux_up(aux, aux_places, self.axes),
            self._add_gradients(grads, direct),
            state,
        )

    def of_microbatches(self, state: PyTree, batch: PyTree, cut: Cut) -> Outcome:
        """The microbatches twice: for the slopes, then for the gradient."""
        evaluate = self.evaluate

        @functools.partial(jax.jit, inline=True)  # traced once for both
        def checked(params: PyTree, state: PyTree, batch: PyTree) -> Any:
            parts, aux, state = evaluate(params, state, batch)
            check_aux(aux)
            return parts, aux, state

        self.evaluate = checked
        parts, aux, sizes = self._shapes(state, batch, cut)
        treedef: Any = jax.tree.structure(parts)
        places = places_of_parts(parts, sizes)
        aux_places = places_of_aux(aux, sizes, arrays=True)

        def put_together(groups: list[Any], wanted: list[bool]) -> list[jax.Array]:
            """The wanted arrays of the parts, of the whole batch and all devices."""
            chosen = _choose(places, wanted)
            own = map(cut.put_together, zip(*groups, strict=True), chosen)
            return self._over_devices(list(own), chosen)

        def look(wanted: list[bool]) -> list[jax.Array]:
            """The wanted arrays, without a gradient."""

            def step(state: PyTree, step: jax.Array, rows: int) -> tuple[PyTree, Any]:
                parts, _, state = self._forward(state, cut.take(batch, step, rows))
                return state, _choose(jax.tree.leaves(parts), wanted)

            groups = cut.scan(step, state)[1] if any(wanted) else []
            return put_together(groups, wanted)

        # Early is what the slopes depend on, which must be known before microbatches
        # are differentiated: of a mean its weight, of a contrastive loss all rows. Late
        # is the rest, which comes with the gradient and costs no evaluation of its own.
        shapes = jax.eval_shape(lambda: look([True] * len(places)))
        early = needed(lambda whole: self._differentiate(treedef, whole)[1], shapes)
        late = [not flag for flag in early]
        if not cut.is_even:
            check_weights(
                lambda rows: self.evaluate(self.varying, state, rows)[0],
                [cut.take(batch, 0, rows) for _, _, rows in cut.groups],
                [
                    flag and place is None
                    for flag, place in zip(early, places, strict=True)
                ],
            )
        # Zeros stand for what is late: no slope depends on them. The value does, and is
        # made again below.
        whole = _fill(early, look(early), map(_zeros, _choose(shapes, late)))
        value, slopes, direct = self._differentiate(treedef, whole)
        slope_places = _choose(places, have_slopes(parts))
        slopes = self._own_slopes(slopes, slope_places)

        def add(
            carry: tuple[PyTree, PyTree], step: jax.Array, rows: int
        ) -> tuple[tuple[PyTree, PyTree], Any]:
            so_far, state = carry
            rows_of_step = cut.take(batch, step, rows)
            back, (parts, aux, state) = self._forward_and_back(state, rows_of_step)
            grads = back(
                [
                    slope if place is None else cut.take_along(slope, place, step, rows)
                    for slope, place in zip(slopes, slope_places, strict=True)
                ]
            )
            # In float32 at least: of many small gradients, bfloat16 loses most.
            so_far = jax.tree.map(
                lambda x, grad: x + grad.astype(x.dtype), so_far, grads
            )
            return (so_far, state), (_choose(jax.tree.leaves(parts), late), aux)

        zeros = jax.tree.map(_accumulator, self.varying)
        (grads, state), groups = cut.scan(add, (zeros, state))
        if any(late):
            found = put_together([arrays for arrays, _ in groups], late)
            whole = _fill(late, found, _choose(whole, early))
            value, _, direct = self._differentiate(treedef, whole)
        aux = put_aux_together(cut, [aux for _, aux in groups], aux_places)
        return Outcome(
            from_first(value, self.axes),
            treedef.unflatten(whole),
            add_aux_up(aux, aux_places, self.axes),
            self._add_gradients(grads, direct),
            state,
        )

    # ------------------------------------------------------------------ evaluations

    def _forward(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """Parts, aux and state of some rows."""
        return self._sloped_and_all(self.varying, state, batch)[1]

    def _forward_and_back(
        self, state: PyTree, batch: PyTree
    ) -> tuple[Callable[[list[jax.Array]], PyTree], tuple[PyTree, PyTree, PyTree]]:
        """The same, and what makes a gradient of the slopes of the parts."""
        _, pull, results = jax.vjp(
            lambda params: self._sloped_and_all(params, state, batch),
            self.varying,
            has_aux=True,
        )
        return lambda slopes: pull(slopes)[0], results

    def _sloped_and_all(
        self, params: PyTree, state: PyTree, batch: PyTree
    ) -> tuple[list[jax.Array], tuple[PyTree, PyTree, PyTree]]:
        parts, aux, state = self.evaluate(params, state, batch)
        parts = self._vary(jax.tree.map(jnp.asarray, constant_weights(parts)))
        return sloped(parts), (parts, aux, state)

    def _differentiate(
        self, treedef: Any, whole: list[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array], PyTree]:
        """The combined loss, its slopes, and its own gradient of the parameters.

        Each device does this for itself, and has it all.
        """
        parts = treedef.unflatten(self._vary(whole))
        return differentiate(self.combine, parts, self.varying)

    # ------------------------------------------------- which axes are the batch

    def _doubled(self, state: PyTree, batch: PyTree, *, asked: bool) -> Sizes | None:
        """How shapes change where the rows of this device were twice as many."""
        rows = batch_size(batch)
        if not rows:
            return None

        # The rows twice over are rows that the loss can take, whatever they hold.
        def double(leaf: Any) -> jax.Array:
            return jnp.concatenate([jnp.asarray(leaf)] * 2)

        def evaluate() -> tuple[PyTree, PyTree]:
            return self._forward(state, jax.tree.map(double, batch))[:2]

        return Sizes(rows, 2 * rows, evaluate if asked else None)

    def _shapes(
        self, state: PyTree, batch: PyTree, cut: Cut
    ) -> tuple[PyTree, PyTree, Sizes]:
        """Parts and aux of a microbatch, and how they change for the whole batch."""
        (_, _, rows), *_ = cut.groups
        parts, aux = jax.eval_shape(
            lambda: self._forward(state, cut.take(batch, 0, rows))[:2]
        )
        sizes = Sizes(rows, cut.size, lambda: self._forward(state, batch)[:2])
        return parts, aux, sizes

    # ---------------------------------------------------------------------- devices

    def _vary(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: vary(x, self.axes), tree)

    def _over_devices(
        self, arrays: list[jax.Array], places: list[Place]
    ) -> list[jax.Array]:
        """Adds up over the devices, or puts the rows of all of them together."""
        return [
            psum(x, self.axes) if place is None else gather(x, self.axes, place)
            for x, place in zip(arrays, places, strict=True)
        ]

    def _own_slopes(
        self, slopes: list[jax.Array], places: list[Place]
    ) -> list[jax.Array]:
        """The slopes of the parts of this device."""
        own = [
            slope if place is None else own_rows(slope, self.axes, place)
            for slope, place in zip(slopes, places, strict=True)
        ]
        return cast(list[jax.Array], self._vary(own))

    def _add_gradients(self, grads: PyTree, direct: PyTree) -> PyTree:
        """Adds up what came through the parts, and a share of what did not."""
        # What comes from `combine` itself each device has whole: of the sum over the
        # devices it must be a share.
        share = 1 / count_devices(self.axes)

        def add(param: jax.Array, grad: jax.Array, direct: jax.Array) -> jax.Array:
            # Not over an axis on which the parameter itself differs: there each device
            # has its own, and the gradient of the collective that gathered them has
            # added up already.
            own = jax.typeof(param).manual_axis_type.varying
            axes = tuple(name for name in self.axes if name not in own)
            dtype = jnp.promote_types(param.dtype, jnp.float32)
            summed = grad.astype(dtype) + share * direct.astype(dtype)
            return psum(summed, axes).astype(param.dtype)

        return jax.tree.map(add, self.params, grads, direct)


def _choose(items: Iterable[_T], flags: list[bool]) -> list[_T]:
    return list(itertools.compress(items, flags))


def _fill(flags: list[bool], chosen: Iterable[_T], others: Iterable[_T]) -> list[_T]:
    """One list of two: an item of ``chosen`` for each True, of ``others`` for False."""
    chosen, others = iter(chosen), iter(others)
    return [next(chosen if flag else others) for flag in flags]


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _accumulator(param: jax.Array) -> jax.Array:
    """Zeros for gradients to add up in, sharded as ``param`` is.

    `jnp.zeros_like` loses an explicit sharding (jax 0.12, outside `jax.set_mesh`), and
    the scan then refuses its carry.
    """
    dtype = jnp.promote_types(param.dtype, jnp.float32)
    return jnp.where(False, param, 0).astype(dtype)
