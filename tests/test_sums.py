"""Sums by segment: as exact as a sum of all, for any ids, in any mode of derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests.oracle.tables import one_of_each
from wloss_jax._sums import (
    sum_by_segment,
    sum_in_float64,
    sum_in_whole_numbers,
)

N = 2**22
# What issues ask for: of a constant, and of uniform numbers, in float32.
CONSTANT, UNIFORM = 2e-6, 1e-6


def ids_of(kind, num_segments, size, rng):
    """Ids of a kind: which segments elements belong to, and in which order."""
    cyclic = np.arange(size) % num_segments
    return {
        "sorted": lambda: np.sort(cyclic),
        "cyclic": lambda: cyclic,
        "shuffled": lambda: rng.permutation(cyclic),
        "all in the last": lambda: np.full(size, num_segments - 1),
        "half in one": lambda: np.where(rng.random(size) < 0.5, 0, cyclic),
    }[kind]().astype(np.int32)


KINDS = ("sorted", "cyclic", "shuffled", "all in the last", "half in one")


def exact_sums(values, ids, num_segments):
    """In float64, whose rounding is 1e-16 of what is added, up to 2**25 times."""
    belongs = (ids >= 0) & (ids < num_segments)
    return np.bincount(
        ids[belongs], np.asarray(values, np.float64)[belongs], num_segments
    )


def assert_close(sums, values, ids, rtol, num_segments):
    scale = exact_sums(np.abs(values), ids, num_segments)
    error = np.abs(np.asarray(sums, np.float64) - exact_sums(values, ids, num_segments))
    assert (error <= rtol * scale).all(), (error / np.where(scale, scale, 1)).max()


# --------------------------------------------------------------------------- exact


@pytest.mark.parametrize(
    ("kind", "num_segments"), one_of_each(KINDS, [1, 2, 64, 4096, N])
)
def test_long_segments_are_as_exact_as_a_sum_of_all(num_segments, kind):
    rng = np.random.default_rng(num_segments)
    ids = ids_of(kind, num_segments, N, rng)
    mean = jax.jit(
        lambda values, weights: wl.weighted_mean(
            values, weights=weights, segment_ids=ids, num_segments=num_segments
        )
    )
    constant, uniform = np.full(N, 0.1, np.float32), rng.random(N, np.float32)
    m = mean(constant, constant)
    assert_close(m.weight, constant, ids, CONSTANT, num_segments)
    assert_close(m.total, constant * constant, ids, CONSTANT, num_segments)
    m = mean(uniform, uniform)
    assert_close(m.weight, uniform, ids, UNIFORM, num_segments)
    assert_close(m.total, uniform * uniform, ids, UNIFORM, num_segments)


def test_ones_past_the_integers_of_float32():
    size = 2**25
    m = wl.absolute_error(
        jnp.ones(size),
        jnp.zeros(size),
        segment_ids=jnp.zeros(size, int),
        num_segments=2,
    )
    assert m.weight.tolist() == m.total.tolist() == [size, 0]
    assert m.compute().tolist() == [1, 0]


def test_weights_past_the_integers_of_float32():
    ones = jnp.ones(2**24 + 2)
    m = wl.weighted_mean(
        ones, weights=ones, segment_ids=jnp.ones(ones.shape, int), num_segments=2
    )
    assert m.weight.tolist() == [0, 2**24 + 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_segments", "add_up"),
    one_of_each([1, 3, 100, 2**16], [sum_in_float64, sum_in_whole_numbers]),
)
def test_both_ways_of_adding_up_are_exact(add_up, num_segments, kind):
    """Rounded once, or, of whole numbers, a few times: 2**-24 each."""
    rng = np.random.default_rng(num_segments)
    size = 2**16 + 3
    ids = ids_of(kind, num_segments, size, rng)
    # Each segment of another magnitude, so that no unit is right for two.
    scale = np.exp2(rng.integers(-60, 60, num_segments)).astype(np.float32)[ids]
    values = scale * rng.standard_normal(size, np.float32)
    sums = jax.jit(functools.partial(add_up, num_segments))(values, ids)
    assert sums.dtype == jnp.float32
    assert_close(sums, values, ids, 2.0**-22, num_segments)


@pytest.mark.parametrize("add_up", [sum_in_float64, sum_in_whole_numbers])
def test_float64_keeps_its_digits(add_up):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        ids, values = rng.integers(0, 3, 2**18), np.full(2**18, 0.1)
        sums = jax.jit(functools.partial(add_up, 3))(values, ids)
        assert sums.dtype == jnp.float64
        # np.bincount adds one after the other: what it would lose is 1e-11.
        np.testing.assert_allclose(sums, np.bincount(ids) * 0.1, rtol=2e-15)


@settings(deadline=None, max_examples=30)
@given(
    entries=st.lists(
        st.tuples(st.floats(width=32), st.integers(-2, 4)), min_size=8, max_size=8
    )
)
def test_the_order_does_not_matter_to_whole_numbers(entries):
    """Nor do infinity and NaN, which come out as in any sum of floating numbers."""
    values, ids = (np.array(x) for x in zip(*entries, strict=True))
    values = values.astype(np.float32)
    sums = [
        np.asarray(whole_numbers_of_three(v, i))
        for v, i in ((values, ids), (values[::-1].copy(), ids[::-1].copy()))
    ]
    np.testing.assert_array_equal(*sums)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = [values[ids == i].astype(np.float64).sum() for i in range(3)]
        largest = [np.abs(values[ids == i]).max(initial=0) for i in range(3)]
        # Of subnormal numbers there is nothing left on any device that flushes them.
        tolerance = np.nan_to_num(np.multiply(largest, 2.0**-22, dtype=float)) + 2e-38
        overflows = np.abs(expected) > np.finfo(np.float32).max * (1 - 2.0**-22)
    for got, want, atol, over in zip(
        sums[0], expected, tolerance, overflows, strict=True
    ):
        if over and np.isfinite(want):
            assert abs(got) >= np.finfo(np.float32).max * (1 - 2.0**-21)
        else:
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@jax.jit
def whole_numbers_of_three(values, ids):
    return sum_in_whole_numbers(3, values, ids)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(-1, 3), min_size=12, max_size=12),
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.randoms(use_true_random=False),
)
def test_segments_add_up_to_what_they_are_cut_from(ids, dtype, random):
    """Whole numbers of up to 8 bits, so that either sum is exact."""
    ids = jnp.array(ids)
    values, weights = (
        jnp.array([random.randrange(256) for _ in range(12)], dtype) for _ in range(2)
    )
    for keywords in ({}, {"weights": weights}):
        segments = wl.weighted_mean(
            values, segment_ids=ids, num_segments=3, **keywords
        ).merge()
        whole = wl.weighted_mean(values, where=(ids >= 0) & (ids < 3), **keywords)
        assert (segments.total, segments.weight) == (whole.total, whole.weight)


# -------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(
    ("kind", "num_segments"), one_of_each(KINDS, [2, 1000], every=2)
)
def test_derivatives_of_every_mode(num_segments, kind):
    rng = np.random.default_rng(num_segments)
    size = 2**19 + 5  # cut into pieces, with a rest
    ids = ids_of(kind, num_segments, size, rng)
    ids[::7] = num_segments  # of no segment
    values, tangents = rng.random((2, size), np.float32)
    slopes = rng.random(num_segments).astype(np.float32)

    def total(values):
        return sum_by_segment(values, jnp.asarray(ids), num_segments)

    sums, back = jax.vjp(total, values)
    assert_close(sums, values, ids, 2.0**-24, num_segments)
    np.testing.assert_array_equal(
        back(slopes)[0], np.append(slopes, 0)[np.minimum(ids, num_segments)]
    )
    # Tangents are float32, added up in many sums a segment if there is room for those.
    # If most elements are of one of many segments, there is not.
    rtol = 2e-6 if kind not in ("all in the last", "half in one") else 1e-4
    _, change = jax.jvp(total, (values,), (tangents,))
    assert_close(change, tangents, ids, rtol, num_segments)

    def loss(values):
        return (total(values) ** 2 * slopes).sum() / size

    hvp = jax.jvp(jax.grad(loss), (values,), (tangents,))[1]
    own = np.append(exact_sums(tangents, ids, num_segments) * slopes * 2 / size, 0)
    np.testing.assert_allclose(
        hvp, own[np.minimum(ids, num_segments)], rtol=rtol, atol=1e-12
    )


def test_a_row_at_a_time_is_all_rows_at_once():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, (4, 6)).astype(np.float32)
    ids = rng.integers(-1, 3, (4, 6))
    sums = jax.vmap(lambda v, i: sum_by_segment(v, i, 3))(values, jnp.asarray(ids))
    for row, v, i in zip(sums, values, ids, strict=True):
        np.testing.assert_array_equal(row, exact_sums(v, i, 3))
    shared = jax.vmap(lambda v: sum_by_segment(v, jnp.asarray(ids[0]), 3))(values)
    for row, v in zip(shared, values, strict=True):
        np.testing.assert_array_equal(row, exact_sums(v, ids[0], 3))


# ------------------------------------------------------------------------- meshes


SPECS = [P("a"), P(None, "a"), P("a", "b"), P(("a", "b"))]


@pytest.mark.parametrize(
    ("spec", "axis_type", "shared"),
    one_of_each(
        SPECS, [AxisType.Auto, AxisType.Explicit], ["ids", "values", "nothing"]
    ),
)
def test_data_over_devices(axis_type, spec, shared):
    """The data stay where they are: a sum and no array goes over the wire."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    shape, num_segments = (8, 64), 3
    values = rng.integers(0, 100, shape).astype(np.float32)
    ids = rng.integers(-1, num_segments + 1, shape, np.int32)
    slopes = np.array([1.0, 2.0, 4.0], np.float32)
    place = NamedSharding(mesh, spec)
    placed = (
        values if shared == "values" else jax.device_put(values, place),
        ids if shared == "ids" else jax.device_put(ids, place),
    )

    @jax.jit
    def step(values, ids):
        def total(values):
            sums = sum_by_segment(values, ids, num_segments)
            return (sums * slopes).sum(), sums

        return jax.value_and_grad(total, has_aux=True)(values)

    (_, sums), gradient = step(*placed)
    belongs = (ids >= 0) & (ids < num_segments)
    np.testing.assert_array_equal(sums, exact_sums(values, ids, num_segments))
    np.testing.assert_array_equal(
        gradient, np.where(belongs, slopes[np.clip(ids, 0, 2)], 0)
    )
    if shared == "nothing":
        assert "all-gather" not in step.lower(*placed).compile().as_text()


# ------------------------------------------------------------------------- memory


@pytest.mark.parametrize("num_segments", [2, 64, 4096, N // 8])
def test_memory_is_at_most_that_of_the_values(num_segments):
    array = jax.ShapeDtypeStruct((N,), jnp.float32)
    ids = jax.ShapeDtypeStruct((N,), jnp.int32)

    def sums(values, ids):
        return sum_by_segment(values, ids, num_segments)

    compiled = jax.jit(sums).lower(array, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * N


def test_without_a_jit_too():
    """NumPy's int64 comes as it is then, where a jit would make it int32."""
    values, ids = np.ones((2, 3), np.float32), np.array([[0, 0, 1], [1, 1, 1]])

    def loss(values, ids):
        return wl.weighted_mean(values, segment_ids=ids, num_segments=2)

    with jax.disable_jit():
        assert loss(values, ids).total.tolist() == [2, 4]
        assert jax.vmap(loss)(values, ids).total.tolist() == [[2, 1], [0, 3]]


def test_memory_of_one_segment_a_token():
    """A float64 for each, beside what the pieces need."""
    array = jax.ShapeDtypeStruct((N,), jnp.float32)
    ids = jax.ShapeDtypeStruct((N,), jnp.int32)
    compiled = jax.jit(lambda v, i: sum_by_segment(v, i, N)).lower(array, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * N + 2**22
