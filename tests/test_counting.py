"""Counts past the integers of 32 bits, and integers at the ends of their dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wloss_jax as wl
from tests.oracle.tables import one_of_each

# ------------------------------------------------------- targets without a minus sign


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize(
    "loss",
    [
        *(wl.absolute_error, wl.squared_error, wl.l2_loss, wl.huber_loss, wl.log_cosh),
        *(wl.smooth_l1_loss, wl.quantile_loss, wl.poisson_nll, wl.hinge_loss),
        *(wl.perceptron_loss, wl.soft_margin_loss, wl.sigmoid_binary_cross_entropy),
        *(wl.sigmoid_focal_loss, wl.binary_cross_entropy),
        lambda x, y: wl.margin_ranking_loss(x, 1 - x, y),
        lambda x, y: wl.hinge_embedding_loss(x, y),
        lambda x, y: wl.cosine_embedding_loss(x[:, None], 1 - x[:, None], y),
        lambda x, y: wl.gaussian_nll(x, y, 1 + x),
    ],
)
def test_unsigned_targets_are_as_good_as_floats(loss, dtype):
    x = jnp.float32([0.5, 0.25, 0.75])

    def value_and_slope(targets):
        return jax.value_and_grad(lambda x: loss(x, targets).compute())(x)

    jax.tree.map(
        np.testing.assert_array_equal,
        value_and_slope(np.ones(3, dtype)),
        value_and_slope(np.ones(3, np.float32)),
    )


def test_unsigned_labels_have_no_end_of_minus_1():
    scores = np.float32([[0, 1, 2], [1, 0, 0]])
    for dtype in (np.uint8, np.uint16, np.uint32):
        labels = np.array([[np.iinfo(dtype).max, 1, 0], [0, 1, 2]], dtype)
        assert np.isnan(wl.multilabel_margin_loss(scores, labels).compute())


# ------------------------------------------------------------ more than 2**31 elements

HUGE = (5, 2**15, 2**14)  # 2.7e9; nothing of that size is made, only its count


@pytest.fixture(params=["cpu", "default"])
def platform(request, monkeypatch):
    """Counts in the form of CPUs, and in that of all other platforms."""

    def choose(*args, **forms):
        return forms[request.param](*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)


def weight(values_of, **keywords):
    """The weight alone, so that the compiler drops the values."""
    return jax.jit(lambda keywords: wl.weighted_mean(values_of(), **keywords).weight)(
        keywords
    )


def huge():
    return jnp.ones(HUGE)


def test_all_of_more_elements_than_an_int32_counts():
    assert weight(huge) == 5 * 2.0**29
    assert weight(lambda: jnp.ones((2**20, 2**20))) == 2.0**40


@pytest.mark.parametrize("axes", [1, 2])
def test_lengths_of_more_elements_than_an_int32_counts(axes):
    lengths = np.full(HUGE[:axes], HUGE[axes], np.int32)
    assert weight(huge, lengths=lengths) == 5 * 2.0**29
    lengths.flat[0] = 0
    fewer = 5 * 2**29 - HUGE[axes] * int(np.prod(HUGE[axes + 1 :]))
    np.testing.assert_allclose(weight(huge, lengths=lengths), fewer, rtol=2e-7)


def test_lengths_up_to_2_40():
    lengths = np.full((2**9, 2**16), 2**15, np.int32)
    shape = (*lengths.shape, 2**15)
    assert weight(lambda: jnp.ones(shape), lengths=lengths) == 2.0**40
    assert weight(lambda: jnp.ones(shape), lengths=lengths % 2**15) == 0
    lengths[:] = 1
    assert weight(lambda: jnp.ones(shape), lengths=lengths) == 2.0**25
    # Exact where it is small, however large the array is.
    lengths[:] = 0
    lengths[:4, 0] = 2**15, 1, 2, 2**15
    assert weight(lambda: jnp.ones(shape), lengths=lengths) == 2**16 + 3


@pytest.mark.usefixtures("platform")
def test_where_of_more_elements_than_an_int32_counts():
    where = np.ones(HUGE[0], bool)
    assert weight(huge, where=where) == 5 * 2.0**29
    where[3] = False
    assert weight(huge, where=where) == 2.0**31


@pytest.mark.usefixtures("platform")
def test_segments_of_more_elements_than_an_int32_counts():
    ids = np.array([1, 1, 2, 1, 1], np.uint8)
    counts = jax.jit(
        lambda ids: wl.weighted_mean(huge(), segment_ids=ids, num_segments=3).weight
    )(ids)
    assert counts.tolist() == [0, 2.0**31, 2.0**29]


def test_the_mean_and_the_gradient_are_of_all_that_count():
    """On one axis, which is a scalar broadcast: fused, nothing of its size is made."""

    def loss(scale):
        values = jnp.broadcast_to(scale, (4, 2**15, 2**14))
        return wl.weighted_mean(values).compute()

    assert jax.jit(jax.value_and_grad(loss))(jnp.float32(1)) == (1, 1)


# ------------------------------------------------------ integers at the ends of dtypes

DTYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32]
NARROW = DTYPES[:4]


def ends(dtype):
    info = np.iinfo(dtype)
    return info.min, info.max


@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_ids(dtype):
    low, high = ends(dtype)
    many = min(high + 1, 2**16)
    values = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])
    ids = np.array([0, high, high, low, many - 1], dtype)
    for number in (many, many - 1, 3, 1):
        m = wl.weighted_mean(values, segment_ids=ids, num_segments=number)
        expected = np.zeros(number)
        for value, i in zip(values.tolist(), ids.tolist(), strict=True):
            if 0 <= i < number:
                expected[i] += value
        np.testing.assert_array_equal(m.total, expected)
        np.testing.assert_array_equal(m.weight > 0, expected > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(dtype):
    low, high = ends(dtype)
    for size in (300, min(high, 2**16) + 1, 5):
        lengths = np.array([high, low, 3, 0], dtype)
        clipped = np.clip(lengths.astype(np.int64), 0, size)
        mask = wl.length_mask(lengths, size)
        np.testing.assert_array_equal(mask.sum(1), clipped)
        m = jax.vmap(wl.weighted_mean)(jnp.ones((4, size)), lengths=lengths)
        np.testing.assert_array_equal(m.weight, clipped)
        m = wl.weighted_mean(jnp.ones((4, size)), lengths=lengths)
        assert m.total == m.weight == clipped.sum()
        bad = (lengths.astype(np.int64) < 0) | (lengths.astype(np.int64) > size)
        if bad.any():
            with pytest.raises(ValueError, match=r"^`lengths`"):
                wl.testing.assert_valid_batch(lengths=lengths, size=size)


CLASSES = 300


def linear(logits, labels, **keywords):
    kernel = jnp.eye(logits.shape[-1])
    return wl.linear_softmax_cross_entropy(logits, kernel, labels, **keywords)


LOSSES_OF_LABELS = {
    "softmax": wl.softmax_cross_entropy_with_integer_labels,
    "linear": linear,
}


OTHER_LOSSES = [
    wl.multiclass_hinge_loss,
    wl.multiclass_perceptron_loss,
    wl.multiclass_sparsemax_loss,
]


@pytest.mark.parametrize(
    ("dtype", "loss"),
    one_of_each(DTYPES, [*LOSSES_OF_LABELS.values(), *OTHER_LOSSES]),
)
def test_labels(loss, dtype):
    """Those out of range give NaN; those in range are theirs, also past 127."""
    low, high = ends(dtype)
    labels = [low, high, 0, min(high, CLASSES - 1), min(high, CLASSES)]
    logits = np.random.default_rng(0).standard_normal((5, CLASSES)).astype(np.float32)
    in_range = np.array([0 <= label < CLASSES for label in labels])
    per_sample = wl.per_sample(loss)
    values = per_sample(logits, np.array(labels, dtype)).total
    expected = per_sample(logits, np.where(in_range, labels, 0).astype(np.int32)).total
    np.testing.assert_array_equal(values, np.where(in_range, expected, np.nan))
    for label in labels:
        valid = {"labels": np.array([label], dtype), "num_classes": CLASSES}
        if 0 <= label < CLASSES:
            wl.testing.assert_valid_batch(**valid)
        else:
            with pytest.raises(ValueError, match=r"^`labels`"):
                wl.testing.assert_valid_batch(**valid)


@pytest.mark.parametrize(("dtype", "loss"), one_of_each(DTYPES, LOSSES_OF_LABELS))
def test_ignore_index(loss, dtype):
    """It is a number: one that the labels' dtype does not hold marks none of them."""
    low, high = ends(dtype)
    logits = jnp.zeros((3, CLASSES))
    labels = np.array([1, 2, 3], dtype)
    for index in (-1, np.int8(2), 255, 2**32 - 1, np.int64(-(2**31))):
        m = LOSSES_OF_LABELS[loss](logits, labels, ignore_index=index)
        assert m.weight == 3 - (index == 2)
    for index in (low, high):
        labels[1] = index
        m = LOSSES_OF_LABELS[loss](logits, labels, ignore_index=index)
        assert (m.weight, jnp.isnan(m.total)) == (2, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads(dtype):
    low, high = ends(dtype)
    for number in (2, 128, 256):
        heads = jnp.arange(1.0, number + 1)
        for head in (low, high, 1, min(high, number - 1)):
            selected = wl.select_head(heads, np.array(head, dtype))
            expected = head + 1.0 if 0 <= head < number else np.nan
            np.testing.assert_array_equal(selected, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_labels_of_sequences(dtype):
    """Connectionist temporal classification, with as many classes as labels have."""
    classes = min(ends(dtype)[1], 300) + 1
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, 4, classes)).astype(np.float32)
    labels = np.array([[classes - 1, classes - 2]])
    arrays = (np.zeros((1, 4)), labels, np.zeros((1, 2)))
    narrow = (np.zeros((1, 4)), labels.astype(dtype), np.zeros((1, 2)))
    expected = wl.ctc_loss(logits, *arrays, blank_id=5).total
    assert wl.ctc_loss(logits, *narrow, blank_id=dtype(5)).total == expected


# NumPy's integers, where a Python integer is asked for: no sum of theirs may wrap.


@pytest.mark.parametrize("dtype", NARROW)
def test_sizes_and_numbers(dtype):
    high = ends(dtype)[1]
    size = dtype(high)
    assert wl.length_mask(np.array([high, 1]), size).sum(1).tolist() == [high, 1]
    ids = np.array([0, high - 1, high, -1])
    m = wl.weighted_mean(jnp.ones(4), segment_ids=ids, num_segments=size)
    assert m.weight.shape == (high,)
    assert m.weight[jnp.array([0, high - 1])].tolist() == [1, 1]
    assert m.weight.sum() == 2
    wl.testing.assert_valid_batch(
        lengths=np.array([high]), size=size, labels=np.array([1]), num_classes=size
    )
    with pytest.raises(ValueError, match=r"^`lengths`"):
        wl.testing.assert_valid_batch(lengths=np.array([high + 1]), size=size)
    logits, labels = jnp.zeros((9, 3)), np.arange(9) % 3
    linear = wl.linear_softmax_cross_entropy(logits, jnp.eye(3), labels)
    chunked = wl.linear_softmax_cross_entropy(
        logits, jnp.eye(3), labels, chunk_size=size
    )
    np.testing.assert_allclose(linear.total, chunked.total, rtol=1e-6)


@pytest.mark.parametrize("dtype", NARROW)
def test_microbatches_and_steps(dtype):
    high = min(ends(dtype)[1], 255)

    def loss(w, x):
        return wl.squared_error(w * x, jnp.ones_like(x))

    x = np.arange(2 * high, dtype=np.float32)
    whole = wl.value_and_grad(loss)(jnp.float32(2), x)
    parts = wl.value_and_grad(loss, num_microbatches=dtype(high))(jnp.float32(2), x)
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)

    optimizer = wl.multi_steps(optax.sgd(1.0), every_k=dtype(high))
    params = jnp.zeros(())
    state = optimizer.init(params)._replace(mini_step=jnp.int32(high - 1))
    updates, state = optimizer.update(jnp.ones(()), state, params, weight=1.0)
    assert (updates, state.mini_step) == (-1, 0)


@pytest.mark.parametrize("dtype", [*DTYPES, np.int64, np.uint64])
def test_bucket_sizes(dtype):
    high = min(ends(dtype)[1], 2**31 - 1)
    lengths = np.array([1, 2, high], dtype)
    assert wl.bucket_sizes(lengths, dtype(2)) == (2, high)
    for multiple in (dtype(100), 100):
        rounded = -(-high // 100) * 100
        sizes = wl.bucket_sizes(lengths, 2, multiple_of=multiple)
        assert sizes == (100, rounded)[: 1 + (rounded > 100)]


def test_bucket_sizes_of_lengths_that_no_array_has():
    with pytest.raises(ValueError, match=r"^`lengths`"):
        wl.bucket_sizes(np.array([1, 2**64 - 1], np.uint64), 1)


@pytest.mark.parametrize("dtype", NARROW)
def test_pad_ragged(dtype):
    high = ends(dtype)[1]
    samples = [np.arange(3, dtype=dtype), np.full(high, high, dtype)]
    for keywords in (
        {},
        {"size": dtype(high)},
        {"buckets": np.array([2, high], dtype)},
    ):
        padded, lengths = wl.pad_ragged(samples, **keywords, value=high)
        assert (padded.dtype, padded.shape) == (dtype, (2, high))
        assert lengths.tolist() == [3, high]
        assert padded[0, 3:].min() == high


# ---------------------------------------------------------------- the largest weights

LARGEST = 2.0**126  # past this sum, 1 / W is none of the numbers that devices keep
VALUES = jnp.array([0.5, 1.0, 2.0, 4.0])


def mean_of_parts(values, weights, way):
    """The mean of all, whole or put together of two parts or segments."""
    if way == "whole":
        m = wl.weighted_mean(values, weights=weights)
    elif way == "rows":
        rows = values.reshape(2, 2), weights.reshape(2, 2)
        m = jax.vmap(lambda v, w: wl.weighted_mean(v, weights=w))(*rows).merge()
    elif way == "reweighted":
        rows = values.reshape(2, 2), weights.reshape(2, 2)
        m = jax.vmap(lambda v, w: wl.weighted_mean(v, weights=w))(*rows)
        m = m.reweight(wl.size_power(1.0)).merge()
    else:
        ids = jnp.array([0, 1, 1, 0])
        m = wl.weighted_mean(values, weights=weights, segment_ids=ids, num_segments=2)
        m = m.merge()
    return m


@pytest.mark.parametrize("way", ["whole", "rows", "reweighted", "segments"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_largest_weights(dtype, way):
    """The gradient up to `LARGEST`; the value while the sums are finite."""
    weights = jnp.array([0.25, 0.25, 0.25, 0.25], dtype) * LARGEST

    def loss(values):
        return mean_of_parts(values, weights, way).compute()

    value, gradient = jax.value_and_grad(loss)(VALUES)
    np.testing.assert_allclose(value, 1.875, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.25, rtol=1e-6)
    m, gradient = wl.value_and_grad(
        lambda values: mean_of_parts(values, weights, way), batch_argnums=()
    )(VALUES)
    np.testing.assert_allclose(gradient, 0.25, rtol=1e-6)

    largest = weights * 3.9  # a sum of 3.3e38, where float32 ends at 3.4e38
    m = mean_of_parts(VALUES / 4, largest, way)
    np.testing.assert_allclose(m.weight, 3.9 * LARGEST, rtol=0.01)
    np.testing.assert_allclose(m.compute(), 1.875 / 4, rtol=0.01)
    running = wl.RunningMean.zeros().update(m)
    np.testing.assert_allclose(running.compute(), m.compute(), rtol=1e-6)


def test_weights_past_the_largest_are_an_error_of_the_batch():
    quarter = jnp.full(4, LARGEST / 4, jnp.float32)
    wl.testing.assert_valid_batch(weights=quarter)
    wl.testing.assert_valid_batch(
        weights=jnp.append(quarter, LARGEST)[None], lengths=jnp.array([4])
    )
    with pytest.raises(ValueError, match=r"^`weights` past 2\*\*126 in sum at \[4\]"):
        wl.testing.assert_valid_batch(weights=jnp.append(quarter, LARGEST / 4))


def test_multi_steps_of_the_largest_weights():
    optimizer = wl.multi_steps(optax.sgd(1.0), every_k=2)
    state = optimizer.init(jnp.zeros(()))
    for gradient in (1.0, 0.5):
        updates, state = optimizer.update(
            jnp.float32(gradient), state, jnp.zeros(()), weight=1.9 * LARGEST
        )
    np.testing.assert_allclose(updates, -0.75, rtol=1e-6)
