"""The PyTorch method that this package ports, its arithmetic rebuilt in NumPy.

A forum answer on losses of batches of different sizes, in three pieces: weighted means
of losses of different shapes, a training function over padded samples with two heads,
and remarks on which losses and weights may be used.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wloss_jax as wl

# Sums of a few dozen float32 numbers: some roundings of 6e-8.
RTOL = 1e-6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_losses_of_different_shapes_are_weighted_by_their_size(rng):
    batches = [rng.normal(size=(n, 1)).astype(np.float32) for n in (8, 4, 2)]
    losses = [(batch**2).astype(np.float64) for batch in batches]
    samples = sum(len(loss) for loss in losses)
    sum_over_all = sum(loss.sum() / samples for loss in losses)
    mean_times_size = sum(loss.mean() * len(loss) / samples for loss in losses)
    np.testing.assert_allclose(sum_over_all, mean_times_size, rtol=1e-12)

    means = [wl.squared_error(batch, np.zeros_like(batch)) for batch in batches]
    assert [float(m.weight) for m in means] == [8, 4, 2]
    np.testing.assert_allclose(sum(means).compute(), sum_over_all, rtol=RTOL)
    of_means = np.mean([loss.mean() for loss in losses])
    assert abs(of_means - sum_over_all) > 1e-2 * sum_over_all


def original_epoch(batches, error):
    """The training function's loop over samples; per batch its loss and its sizes."""
    for y_first, y_second, y, y_type, x_lengths in batches:
        losses, valid = [], []
        for i in range(len(y)):
            pred = (y_first if y_type[i] == 0 else y_second)[i][: x_lengths[i]]
            target = y[i][: x_lengths[i]]
            keep = target != -1
            losses.append(np.mean(error(pred[keep] - target[keep])))
            valid.append(keep.sum())
        weights = np.array(valid) / np.sum(valid)
        yield np.sum(weights * losses), np.array(valid), np.array(losses)


def padded_batch(rng, rows, size=9):
    lengths = rng.integers(2, size + 1, rows)
    y = rng.uniform(0, 1, (rows, size))
    y[:, 1:][rng.random((rows, size - 1)) < 0.3] = -1
    y[np.arange(size) >= lengths[:, None]] = -1
    heads = [rng.normal(size=(rows, size)) for _ in range(2)]
    return *heads, y, rng.integers(0, 2, rows), lengths


def ported_loss(y_first, y_second, y, y_type, x_length):
    return wl.absolute_error(
        wl.select_head((y_first, y_second), y_type),
        y,
        lengths=x_length,
        where=wl.observed_mask(y, missing=-1),
    )


def cast(batch):
    return [x.astype(np.float32 if x.dtype == np.float64 else np.int32) for x in batch]


def test_the_training_functions_loss_is_the_merged_loss_of_its_samples(rng):
    batches = [padded_batch(rng, rows) for rows in (5, 3, 7)]
    merged = []
    for batch, (loss, valid, losses) in zip(
        batches, original_epoch(batches, np.abs), strict=True
    ):
        per_sample = jax.vmap(ported_loss)(*cast(batch))
        np.testing.assert_array_equal(per_sample.weight, valid)
        np.testing.assert_allclose(per_sample.compute(), losses, rtol=RTOL)
        np.testing.assert_allclose(per_sample.merge().compute(), loss, rtol=RTOL)
        merged.append(per_sample.merge())

    # The original returns the plain mean of the batches' losses for the epoch: the
    # very bias that it set out to remove. Here batches add up.
    elements = np.concatenate(
        [np.repeat(own, n) for _, n, own in original_epoch(batches, np.abs)]
    )
    np.testing.assert_allclose(sum(merged).compute(), elements.mean(), rtol=RTOL)
    plain = np.mean([loss for loss, *_ in original_epoch(batches, np.abs)])
    assert abs(plain - elements.mean()) > 1e-3


def test_the_gradient_is_that_of_the_original_and_0_where_nothing_counts(rng):
    first, second, y, y_type, lengths = padded_batch(rng, 6)

    def loss(heads):
        per_sample = jax.vmap(ported_loss)(*heads, *cast((y, y_type, lengths)))
        return per_sample.merge().compute()

    gradients = jax.grad(loss)(tuple(cast((first, second))))
    counts = (np.arange(y.shape[1]) < lengths[:, None]) & (y != -1)
    for head, (prediction, gradient) in enumerate(
        zip((first, second), gradients, strict=True)
    ):
        scored = counts & (y_type == head)[:, None]
        expected = np.where(scored, np.sign(prediction - y), 0) / counts.sum()
        np.testing.assert_allclose(gradient, expected, rtol=RTOL)


def test_each_type_has_a_figure_of_its_own(rng):
    batch = padded_batch(rng, 6)
    first, second, y, y_type, lengths = cast(batch)
    by_type = wl.absolute_error(
        wl.select_head((first, second), y_type),
        y,
        lengths=lengths,
        where=wl.observed_mask(y, missing=-1),
        segment_ids=y_type,
        num_segments=2,
    )
    ((_, valid, losses),) = original_epoch([batch], np.abs)
    for head in range(2):
        mine = y_type == head
        expected = np.average(losses[mine], weights=valid[mine])
        np.testing.assert_allclose(by_type.compute()[head], expected, rtol=RTOL)


def test_storing_sums_and_weighting_them_again_counts_sizes_twice(rng):
    losses = [np.abs(rng.normal(size=n)) for n in (8, 4, 2)]
    sizes = np.array([len(loss) for loss in losses])
    twice = np.sum([loss.sum() for loss in losses] * sizes / sizes.sum())
    right = np.concatenate(losses).mean()
    means = [wl.absolute_error(loss.astype(np.float32), 0 * loss) for loss in losses]
    np.testing.assert_allclose(sum(means).compute(), right, rtol=RTOL)
    assert twice > 4 * right


@pytest.mark.parametrize("name", ["mae", "mse", "cross_entropy"])
def test_any_loss_may_be_used(rng, name):
    batch = padded_batch(rng, 4)
    prediction, y = batch[0].astype(np.float32), batch[2].astype(np.float32)
    where = wl.observed_mask(y, missing=-1)
    if name == "cross_entropy":
        labels = (y > 0.5).astype(np.float32)
        got = wl.sigmoid_binary_cross_entropy(prediction, labels, where=where)
        elements = optax.sigmoid_binary_cross_entropy(prediction, labels)
    else:
        loss, error = {
            "mae": (wl.absolute_error, np.abs),
            "mse": (wl.squared_error, np.square),
        }[name]
        got, elements = loss(prediction, y, where=where), error(prediction - y)
    expected = np.asarray(elements, np.float64)[np.asarray(where)].mean()
    np.testing.assert_allclose(got.compute(), expected, rtol=RTOL)


def test_weights_may_be_adjusted_by_the_size_of_the_loss(rng):
    batch = padded_batch(rng, 6)
    ((_, valid, losses),) = original_epoch([batch], np.abs)
    per_sample = jax.vmap(ported_loss)(*cast(batch))
    adjusted = per_sample.reweight(wl.loss_power(1.0)).merge().compute()
    np.testing.assert_allclose(
        adjusted, np.average(losses, weights=valid * losses), rtol=RTOL
    )
    assert jnp.isfinite(adjusted)
