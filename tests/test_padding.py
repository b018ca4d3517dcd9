"""padding.py against plain loops, and the sizes against every other choice of them."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wloss_jax as wl

pytestmark = pytest.mark.core

ragged = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def padded_total(lengths, sizes):
    return sum(min(size for size in sizes if size >= length) for length in lengths)


def log_normal_lengths(count):
    lengths = np.random.default_rng(0).lognormal(5.4, 0.8, count)
    return np.minimum(lengths.astype(np.int64), 2048)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.bool_, "c8"])
@pytest.mark.parametrize("trailing", [(), (3,), (2, 0), (1, 2)])
@settings(deadline=None, max_examples=20)
@given(lengths=ragged, spare=st.integers(0, 3), value=st.sampled_from([0, 1]))
def test_padded_rows_hold_the_samples_then_the_value(
    dtype, trailing, lengths, spare, value
):
    rng = np.random.default_rng(0)
    samples = [(9 * rng.normal(size=(n, *trailing))).astype(dtype) for n in lengths]
    size = max(lengths) + spare

    padded, got_lengths = wl.pad_ragged(samples, size=size, value=value)

    assert padded.dtype == dtype
    assert padded.shape == (len(samples), size, *trailing)
    assert got_lengths.dtype == np.int32
    assert got_lengths.tolist() == lengths
    for row, sample in zip(padded, samples, strict=True):
        np.testing.assert_array_equal(row[: len(sample)], sample)
        assert (row[len(sample) :] == value).all()


def test_default_size_is_that_of_the_longest_sample():
    padded, _ = wl.pad_ragged([np.ones(2), np.ones(5), np.ones(0)])
    assert padded.shape == (3, 5)


def test_smallest_bucket_that_holds_the_longest_sample_in_any_order():
    for longest, size in [(0, 4), (4, 4), (5, 8), (8, 8), (9, 16)]:
        samples = [np.ones(longest), np.ones(0)]
        assert wl.pad_ragged(samples, buckets=[8, 4, 16])[0].shape == (2, size)


def test_a_value_past_the_end_of_a_dtype_is_an_error():
    """It would have been infinity."""
    with pytest.raises(ValueError, match="a number that float16 holds; got 1000000"):
        wl.pad_ragged([np.ones(1, np.float16)], size=2, value=1e6)
    padded, _ = wl.pad_ragged([np.ones(1, np.float16)], size=2, value=np.inf)
    assert padded[0, 1] == np.inf


def test_nan_as_value_where_the_dtype_holds_it():
    padded, _ = wl.pad_ragged([np.ones(1), np.ones(2)], value=np.nan)
    np.testing.assert_array_equal(padded, [[1, np.nan], [1, 1]])


def test_bfloat16_is_kept():
    dtype = np.dtype("bfloat16")  # registered by jax, through ml_dtypes
    padded, _ = wl.pad_ragged([np.ones(1, dtype), np.ones(2, dtype)], value=-1)
    assert padded.dtype == dtype
    np.testing.assert_array_equal(padded.astype(np.float32), [[1, -1], [1, 1]])


def test_an_empty_list_takes_the_dtype_and_shape_of_the_others():
    padded, lengths = wl.pad_ragged([[], [[1, 2]], []])
    np.testing.assert_array_equal(padded, [[[0, 0]], [[1, 2]], [[0, 0]]])
    assert padded.dtype == np.dtype(int)
    assert lengths.tolist() == [0, 1, 0]


def test_samples_are_copied():
    sample = np.ones(2)
    wl.pad_ragged([sample])[0][...] = 7
    np.testing.assert_array_equal(sample, 1)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "`samples` is empty"),
        (3, {}, "`samples` must be a sequence"),
        ("abc", {}, "`samples` must each be an array"),
        ([1.0, 2.0], {}, "`samples` must each be an array"),
        ([[1, 2], [[1], [2, 3]]], {}, "`samples` must each be an array"),
        ([["a", "b"]], {}, "`samples` must hold numbers; got <U1"),
        ([[None]], {}, "`samples` must hold numbers; got object"),
        (
            [np.ones(2), np.ones(2, int)],
            {},
            r"float64, \(\), and in `samples\[1\]` int64",
        ),
        (
            [np.ones((2, 3)), np.ones((2, 4))],
            {},
            r"\(3,\), and in `samples\[1\]` .*\(4,",
        ),
        (
            [np.ones((2, 3)), np.ones((2, 1))],
            {},
            r"\(3,\), and in `samples\[1\]` .*\(1,",
        ),
        (
            [np.ones(2), np.ones(3)],
            {"size": 2},
            r"`size` must hold .* `samples\[1\]`.* 3",
        ),
        ([np.ones(3)], {"buckets": [1, 2]}, r"`buckets` must hold .*3; got \[1, 2\]"),
        ([np.ones(3)], {"buckets": []}, r"`buckets` must hold .*; got \[\]"),
        ([np.ones(3)], {"size": 3, "buckets": [4]}, "`size` and `buckets` exclude"),
        ([np.ones(3)], {"size": 3.0}, "`size` must be an integer; got 3.0"),
        ([np.ones(0)], {"size": -1}, "`size` must be at least 0; got -1"),
        ([np.ones(3)], {"buckets": "48"}, "`buckets` must be an integer; got '4'"),
        (
            [np.ones(3)],
            {"buckets": 4},
            "`buckets` must be a sequence of sizes; got 4",
        ),
        (
            [np.ones(3, int)],
            {"value": 0.5},
            "`value` must be .* int64 holds; got 0.5",
        ),
        (
            [np.ones(3, int)],
            {"value": np.nan},
            "`value` must be .* int64 holds; got nan",
        ),
        (
            [np.ones(3, np.uint8)],
            {"value": -1},
            "`value` must be .* uint8 holds; got -1",
        ),
        ([np.ones(3, bool)], {"value": 2}, "`value` must be .* bool holds; got 2"),
        ([np.ones(3)], {"value": 1j}, "`value` must be .* float64 holds; got 1j"),
        ([np.ones(3)], {"value": None}, "`value` must be one number; got None"),
        ([np.ones(3)], {"value": [0, 1]}, "`value` must be one number; got"),
    ],
)
def test_bad_samples_name_the_argument(samples, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wl.pad_ragged(samples, **options)


@settings(deadline=None, max_examples=300)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    num_buckets=st.integers(1, 5),
    multiple_of=st.sampled_from([1, 3, 8]),
)
def test_no_other_choice_of_sizes_pads_less(lengths, num_buckets, multiple_of):
    sizes = wl.bucket_sizes(lengths, num_buckets, multiple_of=multiple_of)

    rounded = {max(-(-n // multiple_of), 1) * multiple_of for n in lengths}
    choices = itertools.combinations(rounded, min(num_buckets, len(rounded)))
    least = min(
        padded_total(lengths, choice) for choice in choices if max(rounded) in choice
    )
    assert padded_total(lengths, sizes) == least
    assert sizes == tuple(sorted(set(sizes)))
    assert len(sizes) == min(num_buckets, len(rounded))
    assert all(size > 0 and size % multiple_of == 0 for size in sizes)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_hundreds_of_sizes_agree_with_trying_every_split(spread):
    lengths = np.random.default_rng(1).lognormal(4, spread, 400).astype(int)
    sizes, counts = np.unique(np.maximum(lengths, 1), return_counts=True)
    below = np.append(0, np.cumsum(counts))
    cost = np.append(0, sizes * below[1:])
    for _ in range(6):
        cost = np.array(
            [0]
            + [
                min(cost[:j] + sizes[j - 1] * (below[j] - below[:j]))
                for j in range(1, len(below))
            ]
        )

    assert padded_total(lengths, wl.bucket_sizes(lengths, 7)) == cost[-1]


def test_log_normal_lengths_waste_less_than_in_powers_of_two():
    lengths = log_normal_lengths(100_000)
    assert 290 < lengths.mean() < 310

    def share_valid(sizes):
        return lengths.sum() / np.take(sizes, np.searchsorted(sizes, lengths)).sum()

    assert share_valid((64, 128, 256, 512, 1024, 2048)) == pytest.approx(0.70, abs=0.01)
    assert share_valid(wl.bucket_sizes(lengths, 6)) == pytest.approx(0.755, abs=0.005)
    assert share_valid(wl.bucket_sizes(lengths, 16)) > 0.89


def test_a_million_lengths_take_less_than_a_second():
    lengths = log_normal_lengths(1_000_000)
    start = time.process_time()  # seen: 0.16 s
    wl.bucket_sizes(lengths, 6)
    assert time.process_time() - start < 1


def test_totals_past_int64_are_exact():
    lengths = [2**62, 2**62 - 1, 1, 1]
    assert wl.bucket_sizes(lengths, 2) == (1, 2**62)


def test_any_shape_of_lengths_and_unsigned_ones():
    lengths = np.array([[3, 0], [5, 5]], np.uint8)
    assert wl.bucket_sizes(lengths, 2) == (3, 5)
    assert wl.bucket_sizes(lengths, np.int64(9), multiple_of=200) == (200,)


@pytest.mark.parametrize(
    ("lengths", "num_buckets", "options", "message"),
    [
        ([], 2, {}, "`lengths` is empty"),
        ([3, -1], 2, {}, "`lengths` must not be negative; got -1"),
        ([3.0], 2, {}, "`lengths` must be integers; got float64"),
        ([True], 2, {}, "`lengths` must be integers; got bool"),
        (["3"], 2, {}, "`lengths` must be integers; got <U1"),
        (None, 2, {}, "`lengths` must be integers; got object"),
        ([3], 0, {}, "`num_buckets` must be at least 1; got 0"),
        ([3], 1.0, {}, "`num_buckets` must be an integer; got 1.0"),
        ([3], None, {}, "`num_buckets` must be an integer; got None"),
        ([3], 1, {"multiple_of": 0}, "`multiple_of` must be at least 1; got 0"),
        ([3], 1, {"multiple_of": "8"}, "`multiple_of` must be an integer; got '8'"),
    ],
)
def test_bad_lengths_name_the_argument(lengths, num_buckets, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wl.bucket_sizes(lengths, num_buckets, **options)
