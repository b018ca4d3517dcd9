"""Checkpoints: means in a train state, by `flax.serialization` and as pytrees."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, struct
from flax.training.train_state import TrainState

import wloss_jax as wl
import wloss_jax.nnx  # `flax.serialization` knows the means from here on

M = wl.WeightedMean(jnp.array([10.0, 5.0, 0.0]), jnp.array([4.0, 2.0, 0.0]))


def running_mean():
    """One whose low parts are not 0: 2**24 + 1, three times."""
    running = wl.RunningMean.zeros()
    for weight in (2.0**24, 1.0, 1.0, 1.0):
        running = running.update(wl.WeightedMean(0.3 * weight, weight))
    assert running.weight_low != 0
    return running


MEANS = {"WeightedMean": M, "scalar": M.merge(), "RunningMean": running_mean()}


def assert_same(got, expected):
    assert type(got) is type(expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def blank(tree):
    return jax.tree.map(jnp.zeros_like, tree)


@pytest.mark.parametrize("name", MEANS)
def test_bytes_bring_a_mean_back(name):
    mean = MEANS[name]
    restored = serialization.from_bytes(blank(mean), serialization.to_bytes(mean))
    assert_same(restored, mean)
    assert_same(restored.compute(), mean.compute())
    assert_same(pickle.loads(pickle.dumps(mean)), mean)


def test_a_state_dict_has_the_fields_by_name():
    assert set(serialization.to_state_dict(M)) == {"total", "weight"}
    fields = set(serialization.to_state_dict(running_mean()))
    assert fields == {"total", "total_low", "weight", "weight_low"}
    state = serialization.to_state_dict({"loss": M})
    assert_same(serialization.from_state_dict({"loss": blank(M)}, state)["loss"], M)


@pytest.mark.parametrize("state", [{"total": 1.0}, {"total": 1.0, "mass": 2.0}])
def test_fields_that_do_not_fit_are_named(state):
    with pytest.raises(
        ValueError, match=r"`state` has the fields .*'total'.* at \./loss"
    ):
        serialization.from_state_dict({"loss": M}, {"loss": state})


class State(TrainState):
    running: wl.RunningMean
    last: wl.WeightedMean


@struct.dataclass
class Metrics:
    means: Any


def test_a_train_state_that_holds_means_goes_on_where_it_stopped():
    def loss_fn(params, batch):
        return wl.squared_error(params["w"] * batch["x"], batch["y"])

    @jax.jit
    def step(state, batch):
        mean, grads = wl.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(
            grads=grads, running=state.running.update(mean), last=mean
        )

    def create():
        return State.create(
            apply_fn=None,
            params={"w": jnp.float32(0)},
            tx=optax.adam(0.1),
            running=wl.RunningMean.zeros(),
            last=wl.WeightedMean.zeros(),
        )

    rng = np.random.default_rng(0)
    batches = [
        {name: rng.standard_normal((4, 3)).astype(np.float32) for name in "xy"}
        for _ in range(4)
    ]
    straight = create()
    for batch in batches:
        straight = step(straight, batch)

    stopped = create()
    for batch in batches[:2]:
        stopped = step(stopped, batch)
    restored = serialization.from_bytes(create(), serialization.to_bytes(stopped))
    for batch in batches[2:]:
        restored = step(restored, batch)
    assert_same(restored.running, straight.running)
    assert_same(restored.last, straight.last)
    assert_same(restored.params, straight.params)


def test_a_tree_of_means_in_a_dataclass_of_flax():
    metrics = Metrics({"loss": M, "running": running_mean()})
    data = serialization.to_bytes(metrics)
    restored = serialization.from_bytes(blank(metrics), data)
    assert_same(restored.means["loss"], M)
    assert_same(restored.means["running"], running_mean())
