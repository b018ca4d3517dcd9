"""Masks against plain loops, and the alignment rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wloss_jax as wl

pytestmark = pytest.mark.core


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(-2, 7), min_size=3, max_size=3), size=st.integers(0, 5)
)
def test_length_mask_marks_the_first_positions(lengths, size):
    mask = wl.length_mask(np.array(lengths, np.int32), size)
    assert mask.tolist() == [[i < n for i in range(size)] for n in lengths]
    assert mask.dtype == bool


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_length_mask_adds_the_axis_that_it_bounds(shape, dtype):
    mask = wl.length_mask(np.full(shape, 100, dtype), 300)
    assert mask.shape == (*shape, 300)
    np.testing.assert_array_equal(mask.sum(-1), np.full(shape, 100))


def test_length_mask_of_a_long_axis():
    size = 2**17
    mask = np.asarray(wl.length_mask(jnp.array([size, size - 1, 2**16, 1]), size))
    assert mask.sum(1).tolist() == [size, size - 1, 2**16, 1]
    assert mask[2, : 2**16].all()


def test_length_mask_takes_python_numbers_and_tracers():
    assert wl.length_mask(2, 3).tolist() == [True, True, False]
    jitted = jax.jit(wl.length_mask, static_argnums=1)
    assert jitted(2, np.int64(3)).tolist() == [True, True, False]
    assert jax.vmap(lambda n: wl.length_mask(n, 2))(jnp.arange(3)).tolist() == [
        [False, False],
        [True, False],
        [True, True],
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("missing", "marked"),
    [
        (np.nan, [True, False, True, True, True]),
        (-1, [True, True, False, True, True]),
        (-1.0, [True, True, False, True, True]),
        (0.3, [True, True, True, False, True]),  # as the dtype rounds it
        (np.inf, [True, True, True, True, False]),
    ],
)
def test_observed_mask_of_floating_targets(dtype, missing, marked):
    targets = jnp.array([0.5, np.nan, -1, 0.3, np.inf], dtype)
    assert wl.observed_mask(targets, missing).tolist() == marked


def test_observed_mask_marks_nan_by_default():
    assert wl.observed_mask(jnp.array([[1.0], [np.nan]])).tolist() == [[True], [False]]


@pytest.mark.parametrize(
    ("dtype", "targets", "missing", "marked"),
    [
        (np.int32, [0, -1, 5], -1, [True, False, True]),
        (np.int32, [0, -1, 5], -1.0, [True, False, True]),
        (np.uint8, [0, 255, 5], -1, [True, True, True]),
        (np.uint8, [0, 255, 5], 255, [True, False, True]),
        (np.int8, [44, 0, 1], 300, [True, True, True]),
        (np.uint32, [0, 2**32 - 1, 5], -1, [True, True, True]),
        (np.int32, [0, 5], 2**40, [True, True]),
        # float32 cannot tell these apart: targets are compared as integers.
        (np.int32, [2**24, 2**24 + 1, 0], 2**24, [False, True, True]),
        (np.bool_, [True, False, True], 0, [True, False, True]),
    ],
)
def test_observed_mask_of_integer_targets(dtype, targets, missing, marked):
    assert wl.observed_mask(np.array(targets, dtype), missing).tolist() == marked


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_narrow_integers_are_compared_as_wide_ones(dtype):
    """300 is 44 in int8, 256 is 0 in uint8, and -212 is 44 in both."""
    ids, logits = jnp.array([44, 100, 44], dtype), jnp.zeros((3, 300))
    with jax.disable_jit():  # which spares compiling
        m = wl.weighted_mean(jnp.ones(3), segment_ids=ids, num_segments=300)
        assert (m.weight[44], m.weight[100]) == (2, 1)
        assert wl.weighted_mean(jnp.ones((3, 300)), lengths=ids).weight == 188
        assert wl.select_head(jnp.arange(301.0), ids[0]) == 44
        for loss in (
            wl.softmax_cross_entropy_with_integer_labels,
            wl.multiclass_hinge_loss,
            wl.multiclass_perceptron_loss,
        ):
            assert jnp.isfinite(loss(logits, ids).compute())
        for ignore_index in (300, -212):
            m = wl.softmax_cross_entropy_with_integer_labels(
                logits, ids, ignore_index=ignore_index
            )
            assert m.weight == 3


def test_uint8_labels_of_256_classes():
    logits, labels = jnp.zeros((2, 256)), np.array([0, 255], np.uint8)
    m = wl.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(m.compute(), np.log(256), rtol=1e-6)


# ------------------------------------------------------------------- alignment rule


@settings(deadline=None, max_examples=25)
@given(content=st.lists(st.booleans(), min_size=8, max_size=8), ndim=st.integers(0, 3))
def test_where_and_weights_line_up_with_leading_axes(content, ndim):
    """Of a cube, where lining up trailing axes would fit as well."""
    values = np.random.default_rng(0).normal(size=(2, 2, 2)).astype(np.float32)
    where = np.array(content[: 2**ndim]).reshape((2,) * ndim)
    weights = np.where(where, 3.0, 0.5).astype(np.float32)

    masked = wl.weighted_mean(values, where=where)
    weighted = wl.weighted_mean(values, weights=weights)

    total, count, weighted_total, weight = 0.0, 0, 0.0, 0.0
    for index in np.ndindex(2, 2, 2):
        value = float(values[index])
        total += value * where[index[:ndim]]
        count += int(where[index[:ndim]])
        weighted_total += value * float(weights[index[:ndim]])
        weight += float(weights[index[:ndim]])
    np.testing.assert_allclose(masked.total, total, rtol=1e-5, atol=1e-5)
    assert masked.weight == count
    np.testing.assert_allclose(weighted.total, weighted_total, rtol=1e-5, atol=1e-5)
    assert weighted.weight == weight


@pytest.mark.parametrize(
    ("lengths", "counted"),
    [(1, [0, 1, 2, 3]), ([2, 0], [0, 1, 2, 3]), ([[1, 0], [2, 1]], [0, 4, 5, 6])],
)
def test_lengths_bound_the_axis_after_their_own(lengths, counted):
    values = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    m = wl.weighted_mean(values, lengths=np.array(lengths, np.int32))
    assert m.total == sum(counted)
    assert m.weight == len(counted)


def test_all_masks_together_are_the_and_of_them():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    where = np.array([True, True, False])
    ids = np.array([[0, 1, 0, 1], [5, 1, -1, 0], [0, 0, 0, 0]])
    lengths = np.array([3, 4, 4])
    m = wl.weighted_mean(
        values, where=where, lengths=lengths, segment_ids=ids, num_segments=2
    )
    assert m.total.tolist() == [0 + 2 + 7, 1 + 5]
    assert m.weight.tolist() == [3, 2]


@pytest.mark.parametrize("keyword", ["lengths", "where", "weights", "segment_ids"])
def test_zero_size_axes_are_empty(keyword):
    given = {
        "lengths": {"lengths": np.zeros(2, np.int32)},
        "where": {"where": np.zeros((2, 0), bool)},
        "weights": {"weights": np.zeros((2, 0), np.float32)},
        "segment_ids": {"segment_ids": np.zeros((2, 0), np.int32), "num_segments": 1},
    }[keyword]
    m = wl.absolute_error(np.zeros((2, 0), np.float32), np.zeros((2, 0)), **given)
    assert m.merge().compute() == 0
    assert m.merge().weight == 0


def test_a_sentinel_past_the_end_of_a_dtype_is_an_error():
    """It would have stood for infinity."""
    with pytest.raises(AssertionError, match=r"`missing` is 1000000\.0, which float16"):
        wl.observed_mask(np.ones(1, np.float16), missing=1e6)


@pytest.mark.parametrize("length", [2**32 - 1, 2**31])
def test_lengths_that_no_int32_holds_mark_all(length):
    assert wl.length_mask(np.uint32(length), 3).tolist() == [True] * 3
    with jax.enable_x64(True):
        assert wl.length_mask(np.int64(2**32 + 1), 3).tolist() == [True] * 3
        assert wl.length_mask(np.int64(-(2**32) + 1), 3).tolist() == [False] * 3
