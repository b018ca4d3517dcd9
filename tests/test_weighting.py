"""Schemes for reweight against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wloss_jax as wl
from tests.oracle import strategies

pytestmark = pytest.mark.core

B = 5
sizes = st.lists(st.integers(0, 9), min_size=B, max_size=B)
losses = st.lists(st.integers(1, 50).map(lambda n: n / 8), min_size=B, max_size=B)


def entries(sizes, losses):
    """A WeightedMean of [B] with these sizes and mean losses."""
    weight = np.float32(sizes)
    return wl.WeightedMean(jnp.asarray(weight * np.float32(losses)), weight)


def oracle(sizes, losses, scheme):
    pairs = [(n, x) for n, x in zip(sizes, losses, strict=True) if n]
    weight = sum(scheme(n, x) for n, x in pairs)
    return sum(scheme(n, x) * x for n, x in pairs) / weight if pairs else 0.0


@settings(deadline=None, max_examples=20)
@given(sizes=sizes, losses=losses, p=st.sampled_from([-1.0, 0, 0.5, 1, 1.0, 2]))
def test_powers_are_the_loop(sizes, losses, p):
    m = entries(sizes, losses)
    for scheme, formula in (
        (wl.size_power(p), lambda n, x: n**p),
        (wl.loss_power(p), lambda n, x: n * x**p),
    ):
        mean = m.reweight(scheme).merge().compute()
        # A few roundings, and pow's.
        np.testing.assert_allclose(mean, oracle(sizes, losses, formula), rtol=5e-6)


@settings(deadline=None, max_examples=10)
@given(sizes=sizes, losses=losses)
def test_1_counts_every_element_and_0_every_sample(sizes, losses):
    m = entries(sizes, losses)
    every_element = m.reweight(wl.size_power(1.0))
    np.testing.assert_allclose(every_element.total, m.total, rtol=1e-6)
    np.testing.assert_array_equal(every_element.weight, m.weight)
    np.testing.assert_array_equal(
        m.reweight(wl.size_power(0.0)).weight, np.float32(sizes) > 0
    )
    np.testing.assert_array_equal(m.reweight(wl.loss_power(0.0)).weight, m.weight)


@pytest.mark.parametrize(
    "scheme", [wl.size_power(0.5), wl.loss_power(2.0), lambda size, loss: size + loss]
)
@settings(deadline=None, max_examples=10)
@given(sizes=sizes, losses=losses, groups=strategies.groupings(B))
def test_schemes_are_exact_at_every_split(scheme, sizes, losses, groups):
    m = entries(sizes, losses)
    whole = m.reweight(scheme).merge()
    parts = [
        jax.tree.map(lambda x, group=group: x[group], m).reweight(scheme).merge()
        for group in groups
    ]
    np.testing.assert_allclose(sum(parts).total, whole.total, rtol=2e-6)
    np.testing.assert_allclose(sum(parts).weight, whole.weight, rtol=2e-6)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0])
def test_scaled_weights_change_no_mean(p):
    sizes, losses = [4, 0, 1, 9, 2], [1.0, 5.0, 0.5, 2.0, 3.0]
    for scheme in (wl.size_power(p), wl.loss_power(p)):
        mean = entries(sizes, losses).reweight(scheme).merge().compute()
        for scale in (1e-6, 1e6):
            scaled = entries(np.multiply(sizes, scale), losses)
            np.testing.assert_allclose(
                scaled.reweight(scheme).merge().compute(), mean, rtol=2e-6
            )


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_no_gradient_flows_through_the_factor(p):
    sizes, losses = np.float32([4, 0, 1]), np.float32([1.5, 0, 0.5])

    def mean(losses, scheme):
        return wl.WeightedMean(sizes * losses, sizes).reweight(scheme).merge().compute()

    for scheme, weights in (
        (wl.size_power(p), np.where(sizes > 0, sizes**p, 0)),
        (wl.loss_power(p), sizes * losses**p),
    ):
        gradient = jax.grad(mean)(losses, scheme)
        np.testing.assert_allclose(gradient, weights / weights.sum(), rtol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_entry_that_a_scheme_weighs_with_0_is_not_there(bad):
    m = entries([4, 2, 1], [1.0, bad, 3.0])
    new = m.reweight(lambda size, loss: jnp.where(jnp.isfinite(loss), size, 0)).merge()
    assert float(new.total) == 7.0
    assert float(new.weight) == 5.0


@settings(deadline=None, max_examples=20)
@given(sizes=sizes, losses=losses)
def test_bias_is_the_mean_of_means_less_the_mean(sizes, losses):
    counted = [(n, x) for n, x in zip(sizes, losses, strict=True) if n]
    bias = wl.mean_of_means_bias(entries(sizes, losses))
    desired = 0.0
    if counted:
        mean_of_means = sum(x for _, x in counted) / len(counted)
        mean = sum(n * x for n, x in counted) / sum(n for n, _ in counted)
        desired = mean_of_means - mean
    np.testing.assert_allclose(bias, desired, atol=5e-6)  # of losses up to 6
