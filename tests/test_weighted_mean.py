"""The laws of the value itself: it adds up, divides once, and is a plain pytree."""

import copy
import dataclasses
import inspect
import pickle
import pydoc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wloss_jax as wl
from tests.oracle import strategies

pytestmark = pytest.mark.core

# Whole numbers, so that sums are exact in float32 in whatever order they are taken.
whole = st.integers(-1000, 1000).map(float)


def mean_of(total, weight):
    return wl.WeightedMean(jnp.float32(total), jnp.float32(weight))


def assert_same(m, other):
    np.testing.assert_array_equal(m.total, other.total)
    np.testing.assert_array_equal(m.weight, other.weight)


# ---------------------------------------------------------------------------- it adds


@settings(deadline=None, max_examples=30)
@given(
    entries=st.lists(st.tuples(whole, st.integers(0, 9)), min_size=6, max_size=6),
    groups=strategies.groupings(6),
)
def test_a_sum_does_not_depend_on_its_grouping(entries, groups):
    means = [mean_of(*entry) for entry in entries]
    grouped = sum(sum(means[group], wl.WeightedMean.zeros()) for group in groups)
    assert_same(grouped, sum(means))
    assert_same(grouped, sum(reversed(means)))
    total, weight = map(sum, zip(*entries, strict=True))
    assert (grouped.total, grouped.weight) == (total, weight)
    mean = total / weight if weight else np.copysign(np.inf, total) if total else 0
    np.testing.assert_allclose(grouped.compute(), mean, rtol=1e-6)


def test_addition_is_of_entries_and_never_of_means():
    m = mean_of([10, 0], [8, 0]) + mean_of([5, 3], [2, 1])
    assert m.compute().tolist() == [1.5, 3]
    # The mean of the means, 1.25 and 2.5, would be 1.875.
    assert m.weight.tolist() == [10, 1]


def test_zeros_is_the_identity():
    m = mean_of([3, -1], [2, 5])
    zeros = wl.WeightedMean.zeros((2,))
    assert_same(zeros + m, m)
    assert_same(m + zeros, m)
    assert wl.WeightedMean.zeros().total.shape == ()
    assert wl.WeightedMean.zeros().compute() == 0


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (0, 2)])
def test_merge_adds_up_axes(axis):
    total, weight = np.arange(24.0).reshape(2, 2, 3, 2)
    m = wl.WeightedMean(jnp.float32(total), jnp.float32(weight)).merge(axis)
    np.testing.assert_array_equal(m.total, total.sum(axis))
    np.testing.assert_array_equal(m.weight, weight.sum(axis))


@pytest.mark.parametrize("axis_name", ["inner", "outer", ("outer", "inner")])
def test_psum_is_merge_over_a_mapped_axis(axis_name):
    m = mean_of(np.arange(6).reshape(2, 3), [[1, 0, 2], [3, 4, 5]])
    mapped = jax.vmap(
        jax.vmap(lambda m: m.psum(axis_name), axis_name="inner"), axis_name="outer"
    )(m)
    axis = {"inner": 1, "outer": 0}.get(axis_name, (0, 1))
    for summed, entries in ((mapped.total, m.total), (mapped.weight, m.weight)):
        desired = np.broadcast_to(np.sum(entries, axis, keepdims=True), (2, 3))
        np.testing.assert_array_equal(summed, desired)


def test_scan_accumulates_what_sum_does():
    m = mean_of([1, 2, 3], [4, 0, 6])
    zeros = wl.WeightedMean.zeros()
    summed, _ = jax.lax.scan(lambda carry, one: (carry + one, None), zeros, m)
    assert_same(summed, m.merge())


# ------------------------------------------------------------------------- it divides


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-3, 1, 1e9, 1e30])
def test_no_epsilon_and_no_floor_under_the_weight(scale):
    m = mean_of(3 * scale, 2 * scale)
    np.testing.assert_allclose(m.compute(), 1.5, rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda t: wl.WeightedMean(t, m.weight).compute())(m.total),
        0.5 / scale,
        rtol=1e-6,
    )


@pytest.mark.parametrize("empty", [0.0, -1, np.nan, np.inf, np.float32([7, 8])])
def test_empty_is_the_value_where_nothing_counted(empty):
    m = mean_of([4, 0], [2, 0])
    np.testing.assert_array_equal(m.compute(empty), [2, np.broadcast_to(empty, 2)[1]])
    assert m.compute(empty).dtype == jnp.float32


@pytest.mark.parametrize("empty", [0.0, np.nan])
def test_the_gradient_of_an_empty_mean_is_exactly_0(empty):
    m = mean_of([0, 6], [0, 3])
    gradient, weight_gradient = jax.grad(
        lambda t, w: wl.WeightedMean(t, w).compute(empty)[0], (0, 1)
    )(m.total, m.weight)
    assert gradient.tolist() == [0, 0]
    assert weight_gradient.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("total", "mean"), [(2, np.inf), (-2, -np.inf), (np.nan, np.nan)]
)
def test_a_total_without_a_weight_is_not_empty(total, mean):
    m = mean_of([total, 6], [0, 3])
    for shown in (m, m.reweight(wl.size_power(0.0)), m + mean_of([0, 0], [0, 0])):
        np.testing.assert_array_equal(shown.compute()[0], mean)
        np.testing.assert_array_equal(shown.compute(empty=7.0)[0], mean)
    # Weighed anew it shows beside others, where its total would be lost among theirs.
    merged = m.reweight(wl.size_power(0.0)).merge()
    np.testing.assert_array_equal(merged.compute(), mean)
    shown = wl.weighted_mean(jnp.array([total, 0.0]), weights=jnp.array([1.0, -1.0]))
    np.testing.assert_array_equal(shown.compute(), mean)


def test_no_gradient_through_the_weight():
    def mean(total, weight):
        m = wl.WeightedMean(total, weight)
        return m.compute() + m.reweight(lambda size, loss: size * loss).compute()

    gradients = jax.grad(mean, (0, 1))(jnp.float32(3), jnp.float32(2))
    assert gradients == (1.0, 0.0)


# ------------------------------------------------------------------------- reweighting


def test_reweight_keeps_each_mean_and_replaces_each_weight():
    seen = []

    def scheme(size, loss):
        seen.append((size, loss))
        return jnp.sqrt(size) + loss

    m = mean_of([8, 0, 9], [2, 0, 9]).reweight(scheme)
    np.testing.assert_allclose(m.compute(), [4, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(m.weight, [2**0.5 + 4, 0, 4], rtol=1e-6)
    ((size, loss),) = seen
    assert size[::2].tolist() == [2, 9]
    assert loss.tolist() == [4, 0, 1]


@pytest.mark.parametrize(
    "scheme",
    [
        lambda size, loss: 1 / size,
        lambda size, loss: jnp.log(size) + 1,
        lambda size, loss: jnp.full_like(size, 7),
        lambda size, loss: jnp.where(loss == 0, jnp.nan, size),
        lambda size, loss: size**-2.0 / loss,
    ],
)
def test_an_empty_entry_stays_empty_whatever_the_scheme_says(scheme):
    def merged(total):
        m = wl.WeightedMean(total, jnp.float32([2, 0])).reweight(scheme)
        return m.merge().compute(), m

    gradient, m = jax.grad(merged, has_aux=True)(jnp.float32([8, 0]))
    assert (m.total[1], m.weight[1], gradient[1]) == (0, 0, 0)
    assert np.isfinite(m.weight[0])
    assert gradient[0] == 0.5


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_a_scheme_may_turn_small_weights_to_large_ones(scale):
    """Of the one over the other there is no float32."""
    m = wl.WeightedMean(jnp.array([3.0 * scale, 4.0]), jnp.array([scale, 2.0]))
    # Two quotients and a product, rounded.
    np.testing.assert_allclose(m.reweight(wl.size_power(-1.0)).compute(), [3, 2], 3e-7)


def test_no_gradient_through_a_scheme():
    def total(total):
        m = wl.WeightedMean(total, jnp.float32([2, 4]))
        return m.reweight(lambda size, loss: loss**2 * size).total.sum()

    # weight / size is the square of the means, 3 and 2, and constant.
    gradient = jax.grad(total)(jnp.float32([6, 8]))
    np.testing.assert_allclose(gradient, [9, 4], rtol=1e-6)


# -------------------------------------------------------------------------- the pytree


def test_leaves_have_names_and_come_through_transformations():
    m = mean_of([3, 4], [1, 2])
    (total, _), (weight, _) = jax.tree_util.tree_leaves_with_path(m)
    assert jax.tree_util.keystr(total) == ".total"
    assert jax.tree_util.keystr(weight) == ".weight"
    doubled = jax.tree.map(lambda x: 2 * x, m)
    assert_same(doubled, m + m)
    assert_same(jax.jit(lambda m: m)(m), m)
    assert_same(jax.vmap(lambda m: m.merge())(m), m)
    assert jax.eval_shape(lambda: m).total.shape == (2,)
    for same in (copy.copy(m), copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert_same(same, m)


def test_other_leaves_than_arrays_pass():
    m = mean_of([3, 4], [1, 2])
    axes = jax.tree.map(lambda _: 0, m)
    assert (axes.total, axes.weight) == (0, 0)
    assert_same(jax.vmap(lambda m: m, in_axes=(axes,))(m), m)
    nothing = jax.tree.map(lambda _: None, m)
    assert nothing.total is nothing.weight is None
    assert "None" in repr(nothing)
    specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec("x"), m)
    assert "total=" in repr(specs)
    assert "ShapeDtypeStruct" in repr(jax.eval_shape(lambda: m))


def test_repr_says_the_mean_and_the_weight_and_takes_tracers():
    assert repr(wl.WeightedMean(3.0, 2.0)) == "WeightedMean(mean=1.5, weight=2.0)"
    assert (
        repr(mean_of([3, 0], [2, 0])) == "WeightedMean(mean=[1.5 0. ], weight=[2. 0.])"
    )
    seen = []
    jax.jit(jax.vmap(lambda m: seen.append(f"{m} {m!r}")))(mean_of([3], [2]))
    assert "WeightedMean(" in seen[0]


def test_is_frozen_and_compares_by_identity():
    m = mean_of(1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.total = jnp.zeros(())
    assert m == m
    assert m != mean_of(1, 2)
    assert len({m, mean_of(1, 2)}) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_holds_float32_at_least(dtype):
    m = wl.WeightedMean(jnp.ones(2, dtype), jnp.ones(2, dtype))
    assert m.total.dtype == m.weight.dtype == m.compute().dtype == jnp.float32
    assert (m + m).total.dtype == jnp.float32


def test_float64_stays_float64():
    with jax.enable_x64(True):
        m = wl.WeightedMean(np.float64(1), np.float64(3)) + wl.WeightedMean.zeros()
        assert m.compute().dtype == jnp.float64
        np.testing.assert_allclose(m.compute(), 1 / 3, rtol=1e-15)


def test_takes_numbers_and_numpy():
    assert_same(wl.WeightedMean(3, 2), mean_of(3, 2))
    assert_same(wl.WeightedMean(np.float32(3), 2.0), mean_of(3, 2))


# ----------------------------------------------------------------- weighted_mean itself


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_counted_and_summed_in_float32(dtype):
    """bfloat16 counts to 256 and float16 to 2048; its largest number is 65504."""
    ones = jnp.ones(70001, dtype)
    for m in (
        wl.weighted_mean(ones),
        wl.weighted_mean(ones, weights=ones),
        wl.weighted_mean(
            ones, weights=ones, segment_ids=ones.astype(int), num_segments=2
        ).merge(),
        wl.weighted_mean(ones[None], lengths=jnp.array([70001])),
    ):
        assert (m.total, m.weight) == (70001, 70001)
    large = wl.weighted_mean(1000 * ones[:3], weights=1000 * ones[:3])
    assert large.total == 3e6


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (16,), (3, 0), (0, 3), (5, 7), (2, 48), (2, 3, 40)]
)
@settings(deadline=None, max_examples=5)
@given(seed=strategies.seeds, share=st.sampled_from([0.0, 0.5, 1.0]))
def test_what_is_marked_is_counted(shape, seed, share):
    where = np.random.default_rng(seed).random(shape) < share
    m = wl.weighted_mean(np.ones(shape, np.float32), where=where)
    assert (m.total, m.weight) == (where.sum(), where.sum())


def test_a_count_on_accelerators_is_the_same(monkeypatch):
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)
    )
    where = np.random.default_rng(0).random((3, 2, 40)) < 0.5
    with jax.disable_jit():  # or what was compiled before would run
        assert (
            wl.weighted_mean(jnp.ones(where.shape), where=where).weight == where.sum()
        )


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 0)])
def test_lengths_past_the_end_count_all_and_negative_ones_nothing(shape):
    """As `length_mask` marks them; what is in range, assert_valid_batch says."""
    values = np.random.default_rng(0).integers(1, 9, shape).astype(np.float32)
    for lengths in ([9, -3], [-1, 2**31 - 1], [-(2**31), 4]):
        m = wl.weighted_mean(values, lengths=np.array(lengths))
        counted = values[np.array(lengths) > 0]
        assert (m.total, m.weight) == (counted.sum(), counted.size)


@pytest.mark.parametrize("there", [np.nan, np.inf])
def test_a_weight_of_exactly_0_is_not_there(there):
    values = jnp.array([there, 1.0])
    m = wl.weighted_mean(values, weights=jnp.array([0.0, 2.0]))
    assert_same(m, mean_of(2, 2))
    tiny = wl.weighted_mean(values, weights=jnp.array([1e-30, 2.0]))
    np.testing.assert_array_equal(tiny.total, there)
    masked = wl.weighted_mean(
        values, weights=jnp.array([np.nan, 2.0]), where=jnp.array([False, True])
    )
    assert_same(masked, mean_of(2, 2))


def test_nan_weights_that_count_stay_visible():
    m = wl.weighted_mean(jnp.ones(2), weights=jnp.array([np.nan, 1.0]))
    assert jnp.isnan(m.compute())


@settings(deadline=None, max_examples=20)
@given(
    ids=st.lists(st.integers(-2, 4), min_size=6, max_size=6),
    values=st.lists(whole, min_size=6, max_size=6),
)
def test_segments_outside_the_range_are_padding(ids, values):
    m = wl.weighted_mean(
        jnp.float32(values), segment_ids=np.array(ids, np.int32), num_segments=3
    )
    for segment in range(3):
        mine = [v for v, i in zip(values, ids, strict=True) if i == segment]
        assert m.total[segment] == sum(mine)
        assert m.weight[segment] == len(mine)


def test_segments_of_rows_and_of_whole_samples():
    values = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    m = wl.weighted_mean(values, segment_ids=np.array([1, 1]), num_segments=2)
    assert_same(m, mean_of([0, 66], [0, 12]))
    ids = np.array([[0, 1, 1], [5, 0, 1]])
    m = wl.weighted_mean(values, segment_ids=ids, num_segments=2)
    assert_same(m, mean_of([0 + 1 + 8 + 9, 2 + 3 + 4 + 5 + 10 + 11], [4, 6]))
    assert wl.weighted_mean(values, segment_ids=ids, num_segments=0).total.shape == (0,)


def test_segment_sums_are_linear_in_the_length():
    """No [length, num_segments] array in between: 4096 times 4095 would be 16M."""
    jaxpr = jax.make_jaxpr(
        lambda v, i: wl.weighted_mean(v, segment_ids=i, num_segments=4095).total
    )(jnp.zeros(4096), jnp.zeros(4096, int))
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    assert max(sizes) <= 4096


# ------------------------------------------------------------- where this comes from


def test_batches_of_other_shapes_as_in_the_original_answer():
    """Their sums over all samples, and their means times their shares, are one loss."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(n, 1)).astype(np.float32) for n in (8, 4, 2)]
    by_sum = sum(batch.sum() / 14 for batch in batches)
    by_share = sum(batch.mean() * len(batch) / 14 for batch in batches)
    loss = sum(wl.weighted_mean(batch) for batch in batches).compute()
    np.testing.assert_allclose(loss, by_sum, rtol=1e-5)
    np.testing.assert_allclose(loss, by_share, rtol=1e-5)


# treescope's own, on NumPy 2.5.
@pytest.mark.filterwarnings("ignore:The chararray class is deprecated")
def test_treescope_shows_the_sums_by_name():
    treescope = pytest.importorskip("treescope")  # comes with flax
    shown = treescope.render_to_text({"loss": wl.WeightedMean(3.0, 2.0)})
    assert "WeightedMean(" in shown
    assert "total=<jax.Array(3." in shown
    assert "weight=<jax.Array(2." in shown


@pytest.mark.parametrize("name", ["absolute_error", "WeightedMean", "value_and_grad"])
def test_help_has_the_docstring_and_a_signature_that_can_be_read(name):
    text = pydoc.plain(pydoc.render_doc(getattr(wl, name)))
    assert inspect.getdoc(getattr(wl, name)).splitlines()[0] in text
    assert "jaxlib" not in text  # `ArrayLike`, not the union that it stands for
