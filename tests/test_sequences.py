"""CTC: sequences that cannot be aligned, the mean by label, and lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wloss_jax as wl

from .oracle import reference

T, V, N = 5, 4, 3
rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(4, T, V)).astype(np.float32)
LABELS = np.array([[1, 2, 3], [1, 1, 1], [2, 2, 0], [3, 1, 2]])
FRAMES, SYMBOLS = np.array([5, 4, 5, 2]), np.array([3, 3, 2, 3])
# 1, 1, 1 takes 5 frames and 3, 1, 2 takes 3.
ALIGNED = np.array([True, False, True, False])


def paddings(lengths, size):
    return 1 - np.asarray(wl.length_mask(lengths, size)).astype(np.float32)


DATA = (paddings(FRAMES, T), LABELS, paddings(SYMBOLS, N))


def cost(row, **options):
    arrays = (LOGITS.astype(np.float64), *DATA)
    return reference.ctc_loss(*(array[row] for array in arrays), **options)


def test_a_sequence_that_cannot_be_aligned_costs_infinity():
    costs = wl.per_sample(wl.ctc_loss)(LOGITS, *DATA).compute()
    assert np.isposinf(costs).tolist() == (~ALIGNED).tolist()
    # Five products of probabilities of float32 frames.
    np.testing.assert_allclose(costs[0], cost(0), rtol=1e-5)
    gradient = jax.grad(lambda x: wl.ctc_loss(x, *DATA).compute())(LOGITS)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).sum(axis=(1, 2)) > 0).tolist() == ALIGNED.tolist()


def test_it_is_left_out_by_where_or_costs_0():
    desired = [cost(0), cost(2)]
    out = wl.ctc_loss(LOGITS, *DATA, where=ALIGNED)
    np.testing.assert_allclose(out.compute(), np.mean(desired), rtol=1e-5)
    zero = wl.ctc_loss(LOGITS, *DATA, zero_infinity=True)
    np.testing.assert_allclose(zero.compute(), np.sum(desired) / 4, rtol=1e-5)


def test_the_mean_by_label():
    by_label = wl.ctc_loss(LOGITS, *DATA, where=ALIGNED, per_label=True)
    desired = np.mean([cost(0) / 3, cost(2) / 2])
    np.testing.assert_allclose(by_label.compute(), desired, rtol=1e-5)
    of_all = wl.ctc_loss(LOGITS, *DATA, where=ALIGNED, per_label=True, weights=SYMBOLS)
    desired = (cost(0) + cost(2)) / 5
    np.testing.assert_allclose(of_all.compute(), desired, rtol=1e-5)
    nothing = wl.ctc_loss(
        LOGITS[:1], DATA[0][:1], LABELS[:1], np.ones((1, N)), per_label=True
    )
    assert np.isfinite(nothing.compute())


@pytest.mark.parametrize("how", ["-inf", "class_mask"])
def test_classes_that_are_out(how):
    without = np.delete(LOGITS, 3, axis=-1)
    logits = np.array(LOGITS)
    logits[..., 3] = -np.inf if how == "-inf" else np.nan
    options = {} if how == "-inf" else {"class_mask": np.arange(V) < 3}
    costs, gradient = jax.vmap(
        jax.value_and_grad(lambda *row: wl.ctc_loss(*row, **options).compute())
    )(logits, *DATA)
    # The labels of the first and the last sequence are out.
    assert np.isposinf(costs).tolist() == [True, True, False, True]
    desired, slope = jax.value_and_grad(
        lambda x: wl.ctc_loss(x, *(array[2] for array in DATA)).compute()
    )(without[2])
    np.testing.assert_allclose(costs[2], desired, rtol=1e-5)
    np.testing.assert_allclose(gradient[2, :, :3], slope, rtol=1e-4, atol=1e-6)
    assert not gradient[..., 3].any()


def test_lengths_are_told_to_be_paddings():
    with pytest.raises(ValueError, match=r"`logit_paddings`.*length_mask\(lengths, 5"):
        wl.ctc_loss(LOGITS, FRAMES, LABELS, DATA[2])
    with pytest.raises(ValueError, match=r"`label_paddings`.*length_mask\(lengths, 3"):
        wl.ctc_loss(LOGITS, DATA[0], LABELS, SYMBOLS)
    for call in (wl.ctc_loss, wl.per_sample(wl.ctc_loss)):
        with pytest.raises(ValueError, match=r"`lengths` has .* how many sequences"):
            call(LOGITS, *DATA, lengths=FRAMES)


def test_all_of_it_under_vmap_jit_and_a_traced_log_epsilon():
    costs = jax.jit(
        lambda e: jax.vmap(
            lambda *row: wl.ctc_loss(*row, log_epsilon=e, zero_infinity=True).compute()
        )(LOGITS, *DATA)
    )(jnp.float32(-1e5))
    np.testing.assert_allclose(costs, [cost(0), 0, cost(2), 0], rtol=1e-5)
