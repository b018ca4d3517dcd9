"""nnx.py: the same numbers as the pure front, with state that is carried along."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests.oracle import two_terms
from tests.oracle.two_terms import COEFFICIENTS

B, L = 8, 6
LENGTHS = [3, 0, 6, 1, 2, 5, 0, 6]
PARAMS = two_terms.draw_params()
SAMPLES = two_terms.draw_samples(LENGTHS, seed=0)
BATCH = two_terms.pad(SAMPLES, L)
EXPECTED = two_terms.oracle(PARAMS, SAMPLES)

# Sums of float32, in another order; the numbers here are of order 1 to 100.
assert_close = functools.partial(
    jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-5)
)


class TwoTerms(nnx.Module):
    """The model of `two_terms`."""

    def __init__(self):
        self.hidden = nnx.Dict(jax.tree.map(nnx.Param, PARAMS["hidden"]))
        self.number = nnx.Param(PARAMS["number"])
        self.label = nnx.Param(PARAMS["class"])

    def params(self):
        return {
            "hidden": {name: self.hidden[name][...] for name in ("kernel", "bias")},
            "number": self.number[...],
            "class": self.label[...],
        }


def two_terms_loss(model, batch):
    return two_terms.loss_fn(model.params(), batch)


def as_two_terms(grads):
    grads = nnx.to_pure_dict(grads)
    return grads | {"class": grads.pop("label")}


class Net(nnx.Module):
    """One with a state: batch statistics, a random stream, a counter."""

    def __init__(self, seed=0, *, axis_name=None, dropout=0.0):
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Linear(two_terms.FEATURES, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.outer = nnx.Linear(4, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        x = self.dropout(jax.nn.tanh(self.norm(self.inner(x))))
        return self.outer(x)[..., 0]


def net_loss(net, batch):
    # Padding in the features would go through the batch statistics.
    mask = wl.length_mask(batch["lengths"], L)
    features = jnp.where(mask[..., None], batch["features"], 0.0)
    return wl.squared_error(
        net(features), batch["number"], where=mask & wl.observed_mask(batch["number"])
    )


def state_of(net):
    return nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))))


@functools.cache
def mesh():
    return jax.sharding.Mesh(jax.devices()[:4], ("data",))


# ------------------------------------------------------------------- every split


@pytest.mark.core
@pytest.mark.parametrize("num_microbatches", [1, 2, 8, 3])
def test_is_the_oracle_at_every_k(num_microbatches):
    step = wl.nnx.value_and_grad(
        two_terms_loss, num_microbatches=num_microbatches, coefficients=COEFFICIENTS
    )
    value, grads = nnx.jit(step)(TwoTerms(), BATCH)
    two_terms.assert_exact((value, as_two_terms(grads)), EXPECTED)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_is_the_pure_front(num_microbatches):
    def with_aux(loss_fn):
        return lambda params, batch: (loss_fn(params, batch), batch["lengths"])

    options = {"has_aux": True, "num_microbatches": num_microbatches}
    pure = wl.value_and_grad(with_aux(two_terms.loss_fn), **options)
    ours = wl.nnx.value_and_grad(with_aux(two_terms_loss), **options)
    value, grads = jax.jit(pure)(PARAMS, BATCH)
    ours_value, ours_grads = nnx.jit(ours)(TwoTerms(), BATCH)
    assert_close(ours_value, value)
    assert_close(as_two_terms(ours_grads), grads)


# ------------------------------------------------------------------------ combine


def pooled(model, batch):
    return model(batch["features"]).mean(1)


def of_rows(rows, model):
    """Looks at all rows, and at the module."""
    return jax.nn.logsumexp(rows[:, None] * rows, 1).mean() + penalty(model)


def penalty(model):
    return (model.outer.kernel[...] ** 2).sum()


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_combine_is_that_of_the_whole_batch_where_streams_draw_alike(num_microbatches):
    """Dropout of each microbatch, which both evaluations of it must draw."""
    net, by_hand = Net(dropout=0.5), Net(dropout=0.5)
    net.eval()  # batch statistics are those of a microbatch: leave them out
    by_hand.eval()
    for each in (net, by_hand):
        each.dropout.deterministic = False
    step = wl.nnx.value_and_grad(
        pooled, combine=of_rows, num_microbatches=num_microbatches
    )
    value, grads = nnx.jit(step)(net, BATCH)

    @nnx.jit
    @nnx.value_and_grad
    def whole(net, batch):
        rows = []
        for i in range(num_microbatches):
            part = jax.tree.map(lambda x, i=i: x[i::num_microbatches], batch)
            rows.append(pooled(net, part))
        return of_rows(jnp.stack(rows, 1).ravel(), net)

    expected, expected_grads = whole(by_hand, BATCH)
    assert_close(value, expected)
    assert_close(grads, expected_grads)
    assert_close(state_of(net), state_of(by_hand))
    assert net.calls[...] == net.dropout.rngs.count[...] == num_microbatches


def test_combine_sees_what_is_differentiated_and_leaves_it_alone():
    net, scale = TwoTerms(), {"scale": jnp.float32(2.0)}

    def combine(means, scale, model):
        model.number[...] = jnp.zeros_like(model.number[...])
        return scale["scale"] * jnp.sqrt(means["number"].compute())

    step = wl.nnx.value_and_grad(
        lambda model, batch, scale: two_terms_loss(model, batch),
        (2, 0),
        combine=combine,
        num_microbatches=2,
    )
    value, (grad, _) = nnx.jit(step)(net, BATCH, scale)
    assert_close(value, 2 * np.sqrt(EXPECTED[0]["number"][0]))
    assert_close(grad["scale"], value / 2)
    assert_close(net.number[...], PARAMS["number"])


def test_a_second_module_that_is_no_batch_is_left_alone_and_keeps_its_state():
    def loss_fn(model, other, batch):
        return wl.weighted_mean(model(batch["features"]) + other(batch["features"]))

    model, other = Net(0), Net(1)
    nnx.jit(wl.nnx.value_and_grad(loss_fn))(model, other, BATCH)
    assert model.calls[...] == other.calls[...] == 1


def test_the_pure_front_says_that_a_module_is_for_this_one():
    for k in 1, 2:
        step = wl.value_and_grad(net_loss, num_microbatches=k)
        with pytest.raises(
            TypeError, match=r"`loss_fn` is .*`wloss_jax\.nnx\.value_and"
        ):
            step(Net(), BATCH)
    # A state is a tree of arrays, as any other.
    graphdef, params, rest = nnx.split(Net(), nnx.Param, ...)

    def of_state(params, batch):
        return net_loss(nnx.merge(graphdef, params, rest, copy=True), batch)

    jax.jit(wl.value_and_grad(of_state, num_microbatches=2))(params, BATCH)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_the_pure_front_says_that_what_it_does_not_differentiate_changes(
    num_microbatches,
):
    net = Net()

    def given(scale, batch, net):
        return net_loss(net, batch)

    def closed_over(scale, batch):
        return net_loss(net, batch)

    for loss_fn, others in (given, [net]), (closed_over, []):
        step = wl.value_and_grad(loss_fn, num_microbatches=num_microbatches)
        with pytest.raises(
            TypeError, match=r"`loss_fn` changes .*`wloss_jax\.nnx\.val"
        ):
            step(1.0, BATCH, *others)


# ---------------------------------------------------------------- state, carried


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_state_goes_through_the_microbatches_and_into_the_module(num_microbatches):
    net, by_hand = (Net(dropout=0.5) for _ in range(2))
    step = wl.nnx.value_and_grad(net_loss, num_microbatches=num_microbatches)
    value, grads = nnx.jit(step)(net, BATCH)

    @nnx.jit
    @nnx.value_and_grad
    def part_of(net, batch):
        return net_loss(net, batch).total / whole

    whole = np.sum(~np.isnan(BATCH["number"]) & (np.arange(L) < np.c_[LENGTHS]))
    total, total_grads = 0.0, None
    for i in range(num_microbatches):
        rows = jax.tree.map(lambda x, i=i: x[i::num_microbatches], BATCH)
        part, part_grads = part_of(by_hand, rows)
        total += part
        total_grads = (
            jax.tree.map(jnp.add, total_grads, part_grads) if i else part_grads
        )
    assert_close(value.compute(), total)
    assert_close(grads, total_grads)
    assert_close(state_of(net), state_of(by_hand))
    assert net.calls[...] == net.dropout.rngs.count[...] == num_microbatches


def test_the_first_evaluation_costs_nothing_for_a_module_with_a_state():
    def products(num_microbatches):
        def step(params, rest, batch):
            net = nnx.merge(graphdef, params, rest)
            result = wl.nnx.value_and_grad(net_loss, num_microbatches=num_microbatches)(
                net, batch
            )
            return result, nnx.state(net, nnx.Not(nnx.Param))

        graphdef, params, rest = nnx.split(Net(dropout=0.5), nnx.Param, ...)
        compiled = jax.jit(step).lower(params, rest, BATCH).compile()
        return compiled.as_text().count(" dot(")

    assert products(1) == products(4) > 0


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_new_variables_need_a_single_microbatch(num_microbatches):
    def loss_fn(model, batch):
        model.seen = nnx.Intermediate(batch["lengths"].sum())
        return two_terms_loss(model, batch)

    model = TwoTerms()
    step = wl.nnx.value_and_grad(loss_fn, num_microbatches=num_microbatches)
    if num_microbatches == 1:
        nnx.jit(step)(model, BATCH)
        assert model.seen[...] == sum(LENGTHS)
    else:
        with pytest.raises(AssertionError, match="`loss_fn` creates or removes"):
            step(model, BATCH)


# -------------------------------------------------- what is differentiated, and how


def test_filters_choose_what_is_differentiated():
    def gradient(argnums, loss_fn=two_terms_loss):
        step = wl.nnx.value_and_grad(loss_fn, argnums, num_microbatches=2)
        return nnx.jit(step)(TwoTerms(), BATCH)[1]

    everything = nnx.to_pure_dict(gradient(0))
    (grads,) = gradient((nnx.DiffState(0, lambda path, _: path[0] == "hidden"),))
    assert_close(nnx.to_pure_dict(grads), {"hidden": everything["hidden"]})
    grads = gradient(nnx.DiffState(0, nnx.PathContains("label")))
    assert_close(nnx.to_pure_dict(grads), {"label": everything["label"]})
    assert gradient(nnx.DiffState(0, nnx.BatchStat)) == nnx.State({})


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_several_arguments_that_share_a_layer(num_microbatches):
    """Two models, one of them not differentiated, an array, and a keyword."""

    def loss_fn(fixed, scale, batch, net, *, gain):
        prediction = scale["scale"] * gain[...] * net.inner(batch["features"]).sum(-1)
        prediction += fixed.outer(net.inner(batch["features"]))[..., 0]
        where = wl.observed_mask(batch["number"])
        return wl.squared_error(
            prediction, batch["number"], lengths=batch["lengths"], where=where
        )

    net, fixed, gain = Net(0), Net(1), nnx.Variable(jnp.array(3.0))
    net.inner.bias = fixed.outer.bias = nnx.Param(jnp.zeros(()))
    scale = {"scale": 2.0}
    step = wl.nnx.value_and_grad(
        loss_fn, (3, 1), batch_argnums=2, num_microbatches=num_microbatches
    )
    value, grads = nnx.jit(step)(fixed, scale, BATCH, net, gain=gain)

    def pure(bias, kernel, scale):
        ours, theirs = nnx.clone((net, fixed))  # which share the bias still
        ours.inner.bias[...], ours.inner.kernel[...] = bias, kernel
        return loss_fn(theirs, {"scale": scale}, BATCH, ours, gain=gain).compute()

    pure_step = jax.jit(jax.value_and_grad(pure, (0, 1, 2)))
    expected, (bias, kernel, scale) = pure_step(
        jnp.zeros(()), net.inner.kernel[...], 2.0
    )
    assert_close(value.compute(), expected)
    assert_close(grads[1], {"scale": scale})
    assert nnx.to_pure_dict(grads[0]).keys() == {"inner", "norm", "outer"}
    assert_close(nnx.to_pure_dict(grads[0])["inner"], {"bias": bias, "kernel": kernel})


def test_a_variable_by_itself():
    def loss_fn(variable, batch):
        return wl.weighted_mean(variable[...] * batch["x"], lengths=batch["lengths"])

    batch = {"x": jnp.arange(1.0, 5.0)[:, None], "lengths": jnp.array([1, 1, 1, 0])}
    step = wl.nnx.value_and_grad(loss_fn, num_microbatches=2)
    value, grad = step(nnx.Param(jnp.array(2.0)), batch)
    assert (float(value.compute()), float(grad[...])) == (4.0, 2.0)


def test_the_batch_is_not_differentiated():
    with pytest.raises(AssertionError, match="must not overlap"):
        wl.nnx.value_and_grad(net_loss, (0, 1), num_microbatches=2)(Net(), BATCH)
    with pytest.raises(AssertionError, match="`argnums` names arguments"):
        wl.nnx.value_and_grad(net_loss, nnx.DiffState(7, nnx.Param))(Net(), BATCH)


def test_the_optimizer_takes_the_gradients():
    """Two ways of writing a step are the step without flax."""

    def train(step):
        net = TwoTerms()
        optimizer = nnx.Optimizer(net, optax.adamw(1e-2), wrt=nnx.Param)
        for _ in range(3):
            step(net, optimizer)
        return net.params()

    gradient = wl.nnx.value_and_grad(two_terms_loss, num_microbatches=4)

    def update(net, optimizer):
        optimizer.update(net, gradient(net, BATCH)[1])

    @jax.jit
    def pure_update(graphdef, state):
        net, optimizer = nnx.merge(graphdef, state)
        update(net, optimizer)
        return nnx.state((net, optimizer))

    def split_and_update(net, optimizer):
        nnx.update((net, optimizer), pure_update(*nnx.split((net, optimizer))))

    def by_hand():
        params, optimizer = PARAMS, optax.adamw(1e-2)
        state = optimizer.init(params)
        gradient = jax.jit(wl.value_and_grad(two_terms.loss_fn))
        for _ in range(3):
            updates, state = optimizer.update(gradient(params, BATCH)[1], state, params)
            params = optax.apply_updates(params, updates)
        return params

    expected = by_hand()
    assert_close(train(nnx.jit(update)), expected)
    assert_close(train(split_and_update), expected)


# ------------------------------------------------------------------------ devices


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("check_vma", [True, False])
def test_split_state_under_shard_map(check_vma, num_microbatches):
    step = wl.nnx.value_and_grad(
        two_terms_loss,
        num_microbatches=num_microbatches,
        axis_name="data",
        coefficients=COEFFICIENTS,
    )
    graphdef, state = nnx.split(TwoTerms())
    on_devices = jax.shard_map(
        lambda state, batch: step(nnx.merge(graphdef, state), batch),
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    value, grads = jax.jit(on_devices)(state, BATCH)
    two_terms.assert_exact((value, as_two_terms(grads)), EXPECTED)


def test_batch_statistics_of_all_devices_under_nnx_shard_map():
    one, four = Net(), Net(axis_name="data")
    expected = nnx.jit(wl.nnx.value_and_grad(net_loss))(one, BATCH)
    on_devices = nnx.shard_map(
        wl.nnx.value_and_grad(net_loss, axis_name="data"),
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    assert_close(nnx.jit(on_devices)(four, BATCH), expected)
    assert_close(state_of(four), state_of(one))


# ------------------------------------------------------------------------- metric


def test_the_metric_in_a_multi_metric():
    metrics = nnx.MultiMetric(
        loss=wl.nnx.WeightedMeanMetric("loss"),
        other=wl.nnx.WeightedMeanMetric(),
        accuracy=nnx.metrics.Accuracy(),
    )

    @nnx.jit
    def eval_step(metrics, loss, other):
        logits, labels = jnp.eye(2), jnp.array([0, 0])
        mask = jnp.array([True, True])
        metrics.update(loss=loss, values=other, logits=logits, labels=labels, mask=mask)

    for total, weight in ((10.0, 8.0), (5.0, 2.0), (0.0, 0.0)):
        eval_step(metrics, wl.WeightedMean(total, weight), wl.WeightedMean(1.0, 1.0))
    assert metrics.compute() == {"loss": 1.5, "other": 1.0, "accuracy": 0.5}
    metrics.reset()
    assert metrics.loss.compute() == 0
    eval_step(metrics, wl.WeightedMean(3.0, 2.0), wl.WeightedMean(1.0, 1.0))
    assert metrics.loss.compute() == 1.5


def test_the_metric_counts_past_what_float32_counts():
    metric = wl.nnx.WeightedMeanMetric()
    for weight in (2.0**24, 1.0, 1.0, 1.0):
        metric.update(values=wl.WeightedMean(0.0, weight))
    assert metric.running.get_value().to_host() == (0.0, 2.0**24 + 3)


def test_the_metric_refuses_what_has_no_weight():
    metric = wl.nnx.WeightedMeanMetric("loss")
    with pytest.raises(TypeError, match="lacks the keyword argument `loss`"):
        metric.update(values=wl.WeightedMean(1.0, 1.0))
    with pytest.raises(
        AssertionError, match=r"`loss` is float.*not its `.compute\(\)`"
    ):
        metric.update(loss=1.0)
    with pytest.raises(AssertionError, match="`merge` the batch axes"):
        metric.update(loss=wl.WeightedMean(jnp.ones(2), jnp.ones(2)))


# ------------------------------------------------------------------------- import


def test_flax_is_imported_when_first_named():
    code = """
import sys
import wloss_jax as wl
assert "flax" not in sys.modules
assert {"nnx", "testing"} <= set(dir(wl))
wl.nnx.value_and_grad
assert "flax" in sys.modules
try:
    wl.absent
except AttributeError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "module 'wloss_jax' has no attribute 'absent'"
