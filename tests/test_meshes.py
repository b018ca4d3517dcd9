"""Meshes with explicit axes: every loss and function, however its arrays are sharded.

Data is sharded over the batch, the positions or the classes; the other arguments alike,
or replicated; with a mesh in the context or without one.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl

from .oracle import grid
from .oracle.tables import one_of_each

B, L = 8, 4
LENGTHS = [4, 3, 0, 2, 4, 1, 3, 4]
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(2, B, L)).astype(np.float32)
POSITIVE = np.where(np.arange(L) < np.c_[LENGTHS], 1.1 + X**2, np.nan)
WEIGHTS = rng.random(B).astype(np.float32)
SEGMENTS = rng.integers(-1, 3, (B, L))
HEAD = np.arange(B) % 2
BATCH_AXES = ("data",)
POSITIONS = (None, "seq")
BOTH = ("data", "seq", "cls")


def make_mesh():
    names = ("data", "seq", "cls")
    return jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Explicit,) * 3)


def put(mesh, array, axes):
    array = np.asarray(array)
    spec = [
        axis if size % 2 == 0 else None
        for axis, size in zip(axes, array.shape, strict=False)
    ]
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def on_mesh(function, arrays, axes, *, alike, context):
    """``function`` of the arrays on a mesh: the first sharded over ``axes``."""
    mesh = make_mesh()
    first, *others = jax.tree.leaves(arrays)
    placed = [put(mesh, first, axes)]
    placed += [put(mesh, array, axes if alike else ()) for array in others]
    tree = jax.tree.structure(arrays)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        return jax.jit(function)(*tree.unflatten(placed))


def assert_close(result, desired):
    for ours, theirs in zip(
        jax.tree.leaves(result), jax.tree.leaves(desired), strict=True
    ):
        # Sums of 32 terms in another order, some of which cancel.
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


KEYWORDS = {
    "lengths and weights": lambda kw: kw,
    "segments": lambda kw: {
        "where": kw["where"] & (np.arange(L) < kw["lengths"][:, None]),
        "segment_ids": SEGMENTS,
    },
    "samples": lambda kw: {"where": HEAD == 1, "lengths": kw["lengths"]},
}


WAYS = [
    (BATCH_AXES, "segments", False, False),
    (POSITIONS, "samples", False, True),
    (BOTH, "lengths and weights", False, True),
    (BOTH, "segments", True, False),
]


@pytest.mark.parametrize(
    ("case", "way"), one_of_each(grid.CASES, WAYS, every=3), ids=repr
)
def test_every_loss_on_explicit_axes(case, way):
    axes, keywords, alike, context = way
    arrays, padded = grid.pad(grid.ragged(case, 0, LENGTHS), L)
    given = KEYWORDS[keywords](padded)
    static = {"num_segments": 3} if "segment_ids" in given else {}

    def value_and_grad(arrays, given):
        def mean(x):
            return case.loss(x, *arrays[1:], **given, **static).compute().sum()

        return jax.value_and_grad(mean)(arrays[0])

    desired = jax.jit(value_and_grad)(list(map(jnp.asarray, arrays)), given)
    result = on_mesh(
        value_and_grad, (list(arrays), given), axes, alike=alike, context=context
    )
    assert_close(result, desired)


def per_sample(x, y, n):
    return wl.per_sample(wl.huber_loss)(x, y, lengths=n)


def two_steps(x, w):
    optimizer = wl.multi_steps(optax.sgd(1.0, momentum=0.5), 2)
    state = optimizer.update(x, optimizer.init(x), x, weight=w.sum())[1]
    return optimizer.update(3 * x, state, x, weight=w.sum() / 2)[0]


def gradient(x, y, n, **options):
    def loss_fn(p, batch):
        return wl.absolute_error(p * batch["x"], batch["y"], lengths=batch["n"])

    batch = {"x": x, "y": y, "n": n}
    return wl.value_and_grad(loss_fn, **options)(jnp.float32(2), batch)[1]


def combined(x, y, k):
    def loss_fn(p, batch):
        return {"rows": p * batch["x"], "mean": wl.weighted_mean(p * batch["y"])}

    def combine(parts, p):
        return (parts["rows"].sum(0) ** 2).sum() + parts["mean"].compute() ** 2

    step = wl.value_and_grad(loss_fn, combine=combine, num_microbatches=k)
    return step(jnp.float32(2), {"x": x, "y": y})[1]


def arccosh(x):
    return jnp.arccosh(x)


def closed_over(x, n):
    def mean(s):
        return wl.masked(lambda x: s * arccosh(x))(x, lengths=n).compute()

    return jax.grad(mean)(jnp.float32(1))


N = np.array(LENGTHS)
FUNCTIONS = {
    "a user's loss": (
        lambda x, n: wl.masked(arccosh)(x, lengths=n).compute(),
        (POSITIVE, N),
    ),
    "what a user's loss closes over": (closed_over, (POSITIVE, N)),
    "a user's loss by segments": (
        lambda x, y, ids: wl.masked(lambda x, y: (x - y) ** 2)(
            x, y, segment_ids=ids, num_segments=3
        ).compute(),
        (X, Y, SEGMENTS),
    ),
    "a user's loss of vectors": (
        jax.grad(
            lambda x, y, w: wl.masked(
                lambda x, y: ((x - y) ** 2).sum(-1), event_ndim=1
            )(x, y, weights=w).compute()
        ),
        (X, Y, WEIGHTS),
    ),
    "a user's loss of samples": (
        lambda x, n: wl.per_sample(wl.masked(arccosh))(x, lengths=n).compute(),
        (POSITIVE, N),
    ),
    "per_sample": (lambda *args: per_sample(*args).compute(), (X, Y, N)),
    "per_sample by segments": (
        lambda x, y, ids: (
            wl.per_sample(wl.absolute_error)(x, y, segment_ids=ids, num_segments=3)
            .merge(0)
            .compute()
        ),
        (X, Y, SEGMENTS),
    ),
    "reweight": (
        jax.grad(
            lambda *args: (
                per_sample(*args).reweight(wl.loss_power(0.5)).merge().compute()
            )
        ),
        (X, Y, N),
    ),
    "bias": (lambda *args: wl.mean_of_means_bias(per_sample(*args)), (X, Y, N)),
    "select_head": (lambda x, y, h: wl.select_head((x, y), h), (X, Y, HEAD)),
    "select_head of one array": (
        jax.grad(lambda x, h: (wl.select_head(jnp.stack([x, 2 * x]), h) ** 2).sum()),
        (X, HEAD),
    ),
    "observed_mask": (wl.observed_mask, (POSITIVE,)),
    "observed_mask of a sentinel": (
        lambda x: wl.observed_mask(x, missing=-1),
        (SEGMENTS,),
    ),
    "length_mask": (lambda n: wl.length_mask(n, L), (N,)),
    "total and weight": (
        lambda x, y: wl.WeightedMean(x, y**2).merge(0).compute(empty=x.sum(0)),
        (X, Y),
    ),
    "an array of empties": (
        lambda x, y: wl.WeightedMean(x, 0 * x).compute(y),
        (0 * X, Y),
    ),
    "addition": (
        lambda x, y: (wl.WeightedMean(x, x**2) + wl.WeightedMean(y, y**2)).compute(),
        (X, Y),
    ),
    "RunningMean": (
        lambda *args: wl.RunningMean.zeros((B,)).update(per_sample(*args)).compute(),
        (X, Y, N),
    ),
    "multi_steps": (two_steps, (X, WEIGHTS)),
    "value_and_grad": (gradient, (X, Y, N)),
    "microbatches": (lambda *args: gradient(*args, num_microbatches=2), (X, Y, N)),
    "uneven ones": (lambda *args: gradient(*args, num_microbatches=3), (X, Y, N)),
    "combine": (lambda x, y: combined(x, y, 1), (X, Y)),
    "combine of microbatches": (lambda x, y: combined(x, y, 2), (X, Y)),
    "combine of uneven ones": (lambda x, y: combined(x, y, 3), (X, Y)),
}


PLACES = [(BATCH_AXES, False, False), (POSITIONS, False, True), (BOTH, True, True)]


@pytest.mark.parametrize(
    ("name", "place"), one_of_each(FUNCTIONS, PLACES, every=2), ids=repr
)
def test_every_function_on_explicit_axes(name, place):
    axes, alike, context = place
    function, arrays = FUNCTIONS[name]
    desired = jax.jit(function)(*arrays)
    result = on_mesh(function, arrays, axes, alike=alike, context=context)
    assert_close(result, desired)


def test_no_data_is_gathered():
    mesh = make_mesh()
    x, y = (put(mesh, array, ("data", "seq")) for array in (X, Y))
    step = jax.jit(jax.grad(lambda x, y: wl.absolute_error(x, y, lengths=N).compute()))
    text = step.lower(x, y).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert jax.typeof(step(x, y)).sharding.spec == P("data", "seq")
