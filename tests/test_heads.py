"""select_head against indexing, and what the other heads may hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wloss_jax as wl

pytestmark = pytest.mark.core

HEADS, B, L = 3, 4, 4


def heads(poison=0.0):
    """Three heads of ``[B, L]``, the third with poison at every other position."""
    stacked = np.random.default_rng(0).normal(size=(HEADS, B, L)).astype(np.float32)
    stacked[2, ::2] = poison
    return stacked


@settings(deadline=None, max_examples=20)
@given(
    ndim=st.integers(0, 2),
    content=st.lists(st.integers(0, HEADS - 1), min_size=B * L, max_size=B * L),
    as_array=st.booleans(),
)
def test_selects_what_indexing_does(ndim, content, as_array):
    stacked = heads()
    head = np.array(content, np.int32)[: B**ndim].reshape((B,) * ndim)
    selected = wl.select_head(stacked if as_array else list(stacked), head)
    for b, i in np.ndindex(B, L):
        assert selected[b, i] == stacked[(head[(b, i)[:ndim]], b, i)]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_the_other_heads_hold_anything_and_get_exactly_0(poison):
    stacked = heads(poison)
    head = np.array([0, 2, 1, 2])
    stacked[2, 3] = 1.0  # selected
    stacked[0, 2] = stacked[1, 0] = poison  # not selected
    targets = np.zeros((B, L), np.float32)

    def mean(stacked):
        return wl.squared_error(wl.select_head(stacked, head), targets).compute()

    value, gradient = jax.value_and_grad(mean)(stacked)

    chosen = stacked[head, np.arange(B)]
    assert np.isfinite(chosen).all()
    np.testing.assert_allclose(value, (chosen.astype(float) ** 2).mean(), rtol=1e-6)
    for h, b in np.ndindex(HEADS, B):
        desired = 2 * stacked[h, b] / (B * L) if h == head[b] else np.zeros(L)
        np.testing.assert_allclose(gradient[h, b], desired, rtol=1e-6)
        if h != head[b]:
            np.testing.assert_array_equal(gradient[h, b], 0)


def test_nan_in_the_selected_head_stays_visible():
    selected = wl.select_head(heads(np.nan), np.array([2, 0, 1, 0]))
    np.testing.assert_array_equal(jnp.isnan(selected), np.eye(B)[:, :1] * np.ones(L))


@pytest.mark.parametrize("head", [-1, 3, -100, 2**31 - 1, -(2**31)])
def test_a_head_out_of_range_is_nan_and_never_another(head):
    gradient = jax.grad(lambda x: wl.select_head(x, head).sum())(heads())
    assert jnp.isnan(wl.select_head(heads(), head)).all()
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_keeps_shape_and_dtype(dtype):
    one = jnp.zeros((B, L), dtype)
    assert wl.select_head((one, one), jnp.zeros(B, int)).dtype == dtype
    assert wl.select_head((one,), 0).shape == (B, L)


def test_jit_and_vmap_agree():
    stacked, head = heads(), np.array([0, 2, 1, 0])
    desired = wl.select_head(stacked, head)
    mapped = jax.vmap(wl.select_head, in_axes=(1, 0))(stacked, head)
    np.testing.assert_array_equal(mapped, desired)
    np.testing.assert_array_equal(jax.jit(wl.select_head)(list(stacked), head), desired)


def test_selecting_first_and_scoring_every_head_agree():
    stacked, head = heads(), np.array([0, 2, 1, 0])
    targets = np.ones((B, L), np.float32)
    selected = wl.absolute_error(wl.select_head(stacked, head), targets)
    scored = sum(
        wl.absolute_error(one, targets, where=head == h)
        for h, one in enumerate(stacked)
    )
    np.testing.assert_allclose(selected.compute(), scored.compute(), rtol=1e-6)
    assert selected.weight == scored.weight


def test_no_alarm_for_debug_nans_but_of_a_head_out_of_range():
    heads = (jnp.ones(2), jnp.zeros(2))
    with jax.debug_nans(True):
        assert wl.select_head(heads, jnp.array([1, 0])).tolist() == [0, 1]
        with pytest.raises(FloatingPointError):
            wl.select_head(heads, jnp.array([1, 2]))
