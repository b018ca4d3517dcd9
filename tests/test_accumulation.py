"""accumulation.py against float64 sums of the calls, and against one big batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

import wloss_jax as wl

pytestmark = pytest.mark.core

CALLS = 4
WEIGHTS = st.one_of(st.just(0.0), st.floats(2.0**-20, 2.0**20, width=32))
NUMBERS = st.floats(-1e3, 1e3, width=32)
TINY = 2.0**-100  # XLA flushes what is below 2**-126, as a weight of 2**-20 makes it


def run_calls(optimizer, params, calls):
    """Feeds (gradient, weight) pairs; returns all updates and the last state."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    seen = []
    for grads, weight in calls:
        updates, state = update(grads, state, params, weight=weight)
        seen.append(updates)
    return seen, state


def recording(update=lambda grads: grads):
    """An optimizer whose state holds the last gradient and arguments that it saw."""

    def init(params):
        return {"weight": jnp.float32(-1), "value": jnp.float32(-1)}

    def update_fn(grads, state, params=None, *, weight, value=-1.0, **extra):
        state = {"weight": jnp.float32(weight), "value": jnp.float32(value)}
        return update(grads), state

    return optax.GradientTransformationExtraArgs(init, update_fn)


# ---------------------------------------------------------------- multi_steps


def test_calls_count_by_their_weight_and_not_alike():
    # Mean gradients of 8 tokens and of 1: (8 * 9 + 1 * 18) / 9 = 10.
    calls = [(jnp.float32(9.0), 8.0), (jnp.float32(18.0), 1.0)]
    params = jnp.float32(0.0)
    optimizer = wl.multi_steps(optax.sgd(1.0), 2)
    updates, _ = run_calls(optimizer, params, calls)
    assert [float(u) for u in updates] == [0.0, -10.0]
    with jax.disable_jit():
        updates, _ = run_calls(optimizer, params, calls)
    assert [float(u) for u in updates] == [0.0, -10.0]

    peer = optax.MultiSteps(optax.sgd(1.0), 2)
    state = peer.init(params)
    for grads, _ in calls:
        updates, state = peer.update(grads, state, params)
    assert float(updates) == -13.5


@functools.partial(jax.jit, static_argnums=0)
def scan_calls(k, grads, weights):
    optimizer = wl.multi_steps(recording(), k)

    def body(state, call):
        updates, state = optimizer.update(call[0], state, weight=call[1])
        return state, (updates, state.inner_opt_state["weight"])

    state, (updates, seen) = jax.lax.scan(
        body, optimizer.init(grads[0]), (grads, weights)
    )
    tail, state = optimizer.flush(state)
    return updates, seen, tail, state


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@settings(deadline=None, max_examples=30)
@given(
    grads=st.lists(NUMBERS, min_size=CALLS, max_size=CALLS),
    weights=st.lists(WEIGHTS, min_size=CALLS, max_size=CALLS),
)
def test_every_step_and_the_tail_see_the_weighted_mean(k, grads, weights):
    updates, seen, tail, state = scan_calls(k, jnp.float32(grads), jnp.float32(weights))
    steps = 0
    for start in range(0, CALLS, k):
        grad, weight = np.float64([grads, weights])[:, start : start + k]
        total = weight.sum()
        mean = (grad * weight).sum() / total if total else 0.0
        # Four roundings of 6e-8 of the largest term.
        tolerance = 5e-7 * np.abs(grad).max() + TINY
        if len(grad) == k:
            np.testing.assert_array_equal(updates[start : start + k - 1], 0)
            got, got_weight = updates[start + k - 1], seen[start + k - 1]
            np.testing.assert_allclose(got_weight, total, rtol=5e-7)
        else:
            got = tail
        np.testing.assert_allclose(got, mean, rtol=0, atol=tolerance)
        steps += len(grad) == k or total > 0
    if CALLS % k == 0:
        assert tail == 0
    assert state.gradient_step == steps
    assert state.mini_step == state.acc_weight == state.acc_grads == 0


def test_optimizer_is_left_alone_between_steps_and_its_schedule_counts_steps():
    optimizer = wl.multi_steps(optax.sgd(lambda count: 10.0**-count, momentum=0.5), 2)
    calls = [(jnp.float32(1.0), 3.0)] * 6
    updates, state = run_calls(optimizer, jnp.float32(0.0), calls)
    # The momentum is 1, 1.5 and 1.75; the rate 1, 0.1 and 0.01.
    np.testing.assert_allclose(updates, [0, -1, 0, -0.15, 0, -0.0175], rtol=1e-6)
    assert state.gradient_step == 3


def test_every_k_may_be_a_schedule_of_optimizer_steps():
    optimizer = wl.multi_steps(optax.sgd(1.0), lambda step: step + 1)
    calls = [(jnp.float32(g), 1.0) for g in (1, 2, 4, 3, 3, 9)]
    updates, _ = run_calls(optimizer, jnp.float32(0.0), calls)
    assert [float(u) for u in updates] == [-1, 0, -3, 0, 0, -5]


def test_call_of_weight_0_adds_nothing_but_nan_that_counts_stays_visible():
    optimizer = wl.multi_steps(optax.sgd(1.0), 3)
    nan, one = jnp.float32(jnp.nan), jnp.float32(1.0)
    updates, _ = run_calls(optimizer, one, [(one, 2.0), (nan, 0.0), (4 * one, 1.0)])
    assert float(updates[-1]) == -2.0
    updates, _ = run_calls(optimizer, one, [(one, 2.0), (nan, 1.0), (one, 1.0)])
    assert [float(u) for u in updates[:-1]] == [0.0, 0.0]
    assert np.isnan(updates[-1])


def test_a_round_of_empty_calls_is_an_empty_big_batch():
    adamw = optax.adamw(0.1)
    params, zero = jnp.float32(2.0), jnp.float32(0.0)
    [*_, updates], state = run_calls(
        wl.multi_steps(adamw, 2), params, [(zero, 0.0), (zero, 0.0)]
    )
    expected, expected_state = adamw.update(zero, adamw.init(params), params)
    np.testing.assert_array_equal(updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner_opt_state, expected_state)


@pytest.mark.parametrize("jit", [False, True])
def test_a_total_without_a_weight_shows_and_is_not_left_for_the_next_step(jit):
    optimizer = wl.multi_steps(optax.sgd(1.0), 2)
    params, grads = jnp.zeros(2), jnp.array([1.0, 0.0])
    wrap = jax.jit if jit else lambda function: function
    update = wrap(
        lambda grads, state, weight: optimizer.update(
            grads, state, params, weight=weight
        )
    )
    state = optimizer.init(params)
    _, state = update(grads, state, 1.0)
    updates, state = update(3 * grads, state, -1.0)
    # The whole batch is -2 and 0 over a weight of 0; the optimizer takes the negative.
    np.testing.assert_array_equal(updates, [np.inf, 0])

    early = wl.multi_steps(optax.sgd(1.0), 4)
    state = early.init(params)
    for factor, weight in ((1, 1.0), (3, -1.0)):
        _, state = early.update(factor * grads, state, params, weight=weight)
    updates, state = wrap(early.flush)(state, params)
    np.testing.assert_array_equal(updates, [np.inf, 0])
    assert not state.acc_grads.any()


def test_flush_without_anything_accumulated_changes_nothing():
    optimizer = wl.multi_steps(optax.adamw(0.1), 2)
    params, one = jnp.float32(2.0), jnp.float32(1.0)
    _, state = run_calls(optimizer, params, [(one, 1.0), (one, 1.0)])
    updates, flushed = optimizer.flush(state, params)
    assert float(updates) == 0.0
    jax.tree.map(np.testing.assert_array_equal, flushed, state)
    # A tail of empty calls weighs nothing, and the next round has k calls again.
    _, tail = optimizer.update(one, state, params, weight=0.0)
    updates, flushed = optimizer.flush(tail, params)
    assert float(updates) == 0.0
    jax.tree.map(np.testing.assert_array_equal, flushed, state)


def test_sums_are_wide_while_the_optimizer_sees_the_dtype_of_the_parameters():
    seen = []
    optimizer = wl.multi_steps(recording(lambda g: seen.append(g.dtype) or g), 1000)
    params = jnp.bfloat16(1.0)

    @jax.jit
    def run(grads):
        def body(state, grad):
            updates, state = optimizer.update(grad, state, params, weight=1.0)
            return state, updates

        return jax.lax.scan(body, optimizer.init(params), grads)

    # A bfloat16 sum of ones stays at 256.
    state, updates = run(jnp.ones(1000, jnp.bfloat16))
    assert updates[-1] == 1.0
    assert updates.dtype == jnp.bfloat16
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert state.acc_grads.dtype == jnp.float32
    updates, _ = optimizer.flush(state._replace(acc_weight=jnp.float32(1.0)), params)
    assert updates.dtype == jnp.bfloat16
    updates, _ = optimizer.flush(state)
    assert updates.dtype == jnp.float32


def test_an_optimizer_that_widens_its_state_does_not():
    # Without parameters Adam sees float32, and would make its bfloat16 moments that.
    optimizer = wl.multi_steps(optax.adam(0.1), 2)
    state = optimizer.init(jnp.bfloat16(1.0))
    for _ in range(2):
        _, new = optimizer.update(jnp.bfloat16(1.0), state, weight=1.0)
        chex.assert_trees_all_equal_dtypes(new, state)
        state = new


def test_outside_of_a_jit_the_step_is_a_plain_call():
    seen = []
    optimizer = wl.multi_steps(recording(lambda g: seen.append(g) or g), 2)
    state = optimizer.init(jnp.float32(0.0))
    for _ in range(2):
        _, state = optimizer.update(jnp.float32(1.0), state, weight=1.0)
    # The first was a trace, for the shapes of the zeros.
    assert [isinstance(g, jax.core.Tracer) for g in seen] == [True, False]


def test_extra_arguments_reach_the_optimizer_and_rounds_nest():
    optimizer = wl.multi_steps(wl.multi_steps(recording(), 2), 2)
    state = optimizer.init(jnp.float32(0.0))
    for grad, weight in ((1.0, 1.0), (3.0, 3.0), (5.0, 0.0), (6.0, 4.0)):
        updates, state = optimizer.update(
            jnp.float32(grad), state, weight=weight, value=10 * grad
        )
    assert updates == (1 * 1 + 3 * 3 + 6 * 4) / 8
    assert state.inner_opt_state.inner_opt_state == {"weight": 8.0, "value": 60.0}


def freeze(label):
    return {"a": label == "a", "b": label == "b"}


@pytest.mark.parametrize(
    "build",
    [
        lambda inner: optax.chain(optax.identity(), wl.multi_steps(inner, 2)),
        lambda inner: wl.multi_steps(optax.chain(optax.identity(), inner), 2),
        lambda inner: optax.chain(
            optax.masked(wl.multi_steps(inner, 2), freeze("a")),
            optax.masked(wl.multi_steps(inner, 2), freeze("b")),
        ),
        lambda inner: wl.multi_steps(
            optax.chain(
                optax.masked(inner, freeze("a")), optax.masked(inner, freeze("b"))
            ),
            2,
        ),
        lambda inner: optax.partition(
            {"x": wl.multi_steps(inner, 2)}, {"a": "x", "b": "x"}
        ),
        lambda inner: wl.multi_steps(
            optax.inject_hyperparams(lambda scale: optax.chain(inner))(scale=1.0), 2
        ),
        lambda inner: optax.inject_hyperparams(
            lambda scale: wl.multi_steps(inner, 2), static_args=()
        )(scale=1.0),
        lambda inner: wl.multi_steps(
            optax.chain(optax.add_noise(0.0, 0.0, jax.random.key(0)), inner), 2
        ),
        lambda inner: optax.apply_if_finite(wl.multi_steps(inner, 2), 5),
    ],
)
def test_composes_with_other_transforms(build):
    params = {"a": jnp.float32([1.0, 2.0]), "b": jnp.float32(3.0)}
    grads = [jax.tree.map(lambda p, i=i: (i + 1) * p, params) for i in range(2)]
    optimizer = build(optax.sgd(0.1, momentum=0.9))
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    updates, state = update(grads[0], state, params, weight=3.0)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)
    updates, state = update(grads[1], state, params, weight=1.0)
    jax.tree.map(
        lambda u, p: np.testing.assert_allclose(u, -0.1 * (3 + 2) / 4 * p, rtol=1e-6),
        updates,
        params,
    )


def test_flush_within_a_chain_takes_its_own_part_of_the_state():
    steps = wl.multi_steps(optax.sgd(1.0), 3)
    optimizer = optax.chain(optax.clip(1.0), steps)
    params = jnp.float32(0.0)
    _, (clip, state) = run_calls(optimizer, params, [(jnp.float32(5.0), 2.0)])
    updates, state = jax.jit(steps.flush)(state, params)
    assert updates == -1.0
    assert optimizer.update(params, (clip, state), params, weight=1.0)


def test_in_an_nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    optimizer = nnx.Optimizer(model, wl.multi_steps(optax.sgd(1.0), 2), wrt=nnx.Param)
    for scale, weight in ((9.0, 8.0), (18.0, 1.0)):
        np.testing.assert_array_equal(model.kernel[...], before)
        state = nnx.state(model, nnx.Param)
        grads = jax.tree.map(lambda x, s=scale: jnp.full_like(x, s), state)
        optimizer.update(model, grads, weight=jnp.float32(weight))
    np.testing.assert_allclose(model.kernel[...], before - 10.0, rtol=1e-6)

    optimizer.update(model, grads, weight=jnp.float32(1.0))
    params, state = nnx.as_pure((nnx.state(model, nnx.Param), optimizer.opt_state))
    updates, state = optimizer.tx.flush(state, params)
    nnx.update(model, optax.apply_updates(params, updates))
    nnx.update(optimizer.opt_state, nnx.state(state))
    np.testing.assert_allclose(model.kernel[...], before - 28.0, rtol=1e-6)
    assert optimizer.opt_state.gradient_step[...] == 2


def test_state_can_be_donated_and_keeps_its_type():
    optimizer = wl.multi_steps(optax.adamw(0.1), 2)
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    types = jax.tree.map(jax.typeof, state)
    step = jax.jit(optimizer.update, donate_argnums=1)
    for _ in range(3):
        _, state = step(params, state, params, weight=jnp.float32(1.0))
        assert jax.tree.map(jax.typeof, state) == types
    assert step._cache_size() == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_with_sharded_parameters(check_vma):
    mesh = jax.make_mesh((1,), ("data",))
    optimizer = wl.multi_steps(optax.adam(0.1), 2)

    def run(params):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params, weight=1.0)
        return updates, optimizer.flush(state, params)[0]

    specs = PartitionSpec("data")
    params = jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, specs))
    run = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma
    )
    updates, tail = jax.jit(run)(params)
    np.testing.assert_allclose(updates, -0.1, rtol=1e-5)
    np.testing.assert_array_equal(tail, 0)


def test_the_keyword_of_optax_is_told_its_name_here():
    with pytest.raises(TypeError, match=r"^`every_k_schedule` .*: it is `every_k`,"):
        wl.multi_steps(optax.sgd(1.0), every_k_schedule=2)
    with pytest.raises(TypeError, match=r"^`every_k_schedule` .*: by position come"):
        wl.absolute_error(jnp.ones(2), jnp.ones(2), every_k_schedule=2)


@pytest.mark.parametrize("every_k", [0, -1, 2.0, None, "2"])
def test_every_k_that_is_none(every_k):
    with pytest.raises(AssertionError, match=r"`every_k` is .*positive integer"):
        wl.multi_steps(optax.sgd(1.0), every_k)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({}, "`weight` is missing.*m.weight"),
        ({"weight": None}, "`weight` is missing"),
        ({"weight": jnp.ones(3)}, r"`weight` has shape \(3,\).*one weight"),
        ({"weight": jnp.int32(3)}, "`weight` is int32.*astype"),
        ({"weight": True}, "`weight` is bool"),
        ({"weight": [3.0]}, "`weight` must be an array of numbers; got a list"),
        ({"weight": wl.WeightedMean(8.0, 2.0)}, "`weight` is a .*`weight=m.weight`"),
    ],
)
def test_weight_that_is_none(weight, message):
    optimizer = optax.chain(wl.multi_steps(optax.sgd(1.0), 2))
    params = jnp.float32(0.0)
    with pytest.raises(AssertionError, match=message):
        optimizer.update(params, optimizer.init(params), params, **weight)


def ragged_batches(steps, rows, size):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, size + 1, (steps, rows))
    lengths[:, 0] = 0  # an empty call in every step
    x = rng.normal(size=(steps, rows, size, 3))
    # Long rows follow another rule than short ones, so that their say matters.
    slope = np.where(lengths > size // 2, 2.0, -1.0)[..., None, None]
    y = (slope * x).sum(-1) + rng.normal(size=x.shape[:-1])
    return jnp.float32(x), jnp.float32(y), jnp.int32(lengths)


def test_adamw_for_50_steps_of_8_unequal_calls_is_adamw_on_big_batches():
    batches = ragged_batches(steps=50, rows=8, size=16)
    start = {"w": jnp.float32([0.3, -0.2, 0.1]), "b": jnp.float32(0.0)}

    def loss_fn(params, batch):
        x, y, lengths = batch
        return wl.huber_loss(x @ params["w"] + params["b"], y, lengths=lengths)

    def train(optimizer, batches):
        def step(carry, batch):
            params, state = carry
            m, grads = wl.value_and_grad(loss_fn)(params, batch)
            updates, state = optimizer.update(grads, state, params, weight=m.weight)
            return (optax.apply_updates(params, updates), state), None

        carry = (start, optimizer.init(start))
        (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, batches))(carry)
        return np.concatenate([params["w"], params["b"][None]])

    adamw = optax.with_extra_args_support(optax.adamw(0.05))
    calls = jax.tree.map(lambda x: x.reshape(400, 1, *x.shape[2:]), batches)
    big = train(adamw, batches)
    ours = train(wl.multi_steps(adamw, 8), calls)
    averaged = train(optax.MultiSteps(adamw, 8).gradient_transformation(), calls)
    # Gradients agree to 1e-6 or so; Adam divides by their size, and 50 steps add up.
    np.testing.assert_allclose(ours, big, rtol=1e-4)
    assert np.abs(averaged - big).max() > 0.05 * np.abs(big).max()


# ---------------------------------------------------------------- RunningMean


def host_sum(values):
    return np.asarray(values, np.float64).sum()


@functools.partial(jax.jit, static_argnames="merging")
def run_million(totals, merging):
    zero = jnp.zeros(())

    def body(running, total):
        if merging:
            other = wl.RunningMean(total, zero, zero + 1000, zero)
            return running.merge(other), None
        return running.update(wl.WeightedMean(total, 1000.0)), None

    return jax.lax.scan(body, wl.RunningMean.zeros(), totals)[0]


@pytest.mark.parametrize("merging", [False, True])
def test_a_million_updates_or_merges_of_1000_elements(merging):
    rng = np.random.default_rng(0)
    totals = np.float32(1000 * rng.gamma(0.5, size=10**6))
    running = run_million(totals, merging)
    total, weight = running.to_host()
    assert weight == 10**9
    # 10**6 roundings of 2**-48 or so, at random.
    np.testing.assert_allclose(total, host_sum(totals), rtol=1e-11)
    np.testing.assert_allclose(running.compute(), total / weight, rtol=2e-7)
    # What a float32 sum makes of it:
    assert abs(np.add.accumulate(totals)[-1] / host_sum(totals) - 1) > 1e-6


@jax.jit
def run_counts(start, steps):
    return jax.lax.fori_loop(
        0,
        1000,
        lambda i, r: r.update(wl.WeightedMean(steps[i % 4], steps[i % 4])),
        wl.RunningMean.zeros().update(wl.WeightedMean(start, start)),
    )


@pytest.mark.parametrize("power", [0, 24, 31, 40, 46])
def test_counts_are_exact_up_to_2_to_the_47(power):
    steps = [1.0, 3.0, 65537.0, 2.0**24 - 1]
    _, weight = run_counts(2.0**power, jnp.float32(steps)).to_host()
    assert weight == 2**power + 250 * sum(map(int, steps))


def test_the_compiler_may_not_take_the_error_for_0():
    running = wl.RunningMean.zeros()
    lowered = jax.jit(running.merge).lower(running)
    # Two sums a pair, two pairs; what it is good for is said in `_two_sum`.
    assert lowered.as_text().count("optimization_barrier") == 4


def test_constants_do_not_tempt_the_compiler():
    @jax.jit
    def run(x):
        start = wl.RunningMean.zeros().update(wl.WeightedMean(2.0**24, 2.0**24))
        for _ in range(3):
            start = start.update(wl.WeightedMean(x, 1.0))
        return start.update(wl.WeightedMean(-(2.0**24), 0.0))

    assert run(jnp.float32(1.0)).to_host() == (3.0, 2**24 + 3)


@settings(deadline=None, max_examples=50)
@given(
    totals=st.lists(NUMBERS, min_size=6, max_size=6),
    counts=st.lists(st.integers(0, 2**24), min_size=6, max_size=6),
    order=st.permutations(range(6)),
    cut=st.integers(0, 6),
)
def test_merges_in_any_order_and_grouping_agree(totals, counts, order, cut):
    def run(indices):
        running = wl.RunningMean.zeros()
        for i in indices:
            running = running.update(wl.WeightedMean(totals[i], float(counts[i])))
        return running

    grouped = run(order[:cut]).merge(run(order[cut:]))
    total, weight = grouped.to_host()
    assert weight == sum(counts)
    # Three roundings of 2**-48 a merge, of sums that may cancel.
    tolerance = 1e-12 * np.abs(totals).sum() + TINY
    np.testing.assert_allclose(total, host_sum(totals), rtol=0, atol=tolerance)
    if weight:
        np.testing.assert_allclose(
            grouped.compute(), total / weight, rtol=2e-7, atol=tolerance
        )
    elif total:
        assert grouped.compute() == np.copysign(np.inf, total)
    else:
        assert grouped.compute() == 0
        assert np.isnan(grouped.compute(empty=jnp.nan))


step = jax.jit(wl.RunningMean.update)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("field", ["total", "weight"])
def test_nan_and_infinity_stay_visible(field, bad):
    good = {"total": 3.0, "weight": 2.0}
    running = wl.RunningMean.zeros()
    for m in (good, good | {field: bad}, good, good):
        running = step(running, wl.WeightedMean(**m))
    total, weight = running.to_host()
    np.testing.assert_equal({"total": total, "weight": weight}[field], bad)
    if field == "total":
        np.testing.assert_equal(float(running.compute()), bad)
    running = step(running, wl.WeightedMean(-np.inf, -np.inf))
    assert np.isnan(running.compute())


def test_a_sum_past_the_largest_number_is_infinite():
    m = wl.WeightedMean(jnp.finfo(jnp.zeros(()).dtype).max, 1.0)
    assert wl.RunningMean.zeros().update(m).update(m).to_host() == (np.inf, 2.0)


def test_one_entry_a_head_by_shape_or_by_vmap():
    m = wl.WeightedMean(jnp.float32([1.0, 0.0, 6.0]), jnp.float32([2.0, 0.0, 3.0]))
    by_shape = wl.RunningMean.zeros((3,)).update(m).update(m)
    by_vmap = jax.vmap(lambda r, m: r.update(m).update(m))(
        wl.RunningMean.zeros((3,)), m
    )
    jax.tree.map(np.testing.assert_array_equal, by_shape, by_vmap)
    np.testing.assert_array_equal(by_shape.compute(empty=-1.0), [0.5, -1.0, 2.0])
    total, weight = by_shape.to_host()
    assert total.dtype == weight.dtype == np.float64
    np.testing.assert_array_equal(weight, [4.0, 0.0, 6.0])


def test_to_host_gives_python_floats():
    total, weight = wl.RunningMean.zeros().to_host()
    assert type(total) is type(weight) is float


def test_gathered_from_processes_as_the_docstring_says():
    running = wl.RunningMean.zeros().update(wl.WeightedMean(2.0**25, 2.0**24))
    running = running.update(wl.WeightedMean(1.0, 1.0))
    stacked = multihost_utils.process_allgather(running)
    assert stacked.total.shape == (jax.process_count(),)
    # As if there were three processes:
    stacked = jax.tree.map(lambda x: np.concatenate([x] * 3), stacked)
    total, weight = stacked.to_host()
    parts = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)]
    merged = functools.reduce(wl.RunningMean.merge, parts)
    assert merged.to_host() == (total.sum(), weight.sum()) == (100663299, 50331651)


def test_float64_stays_float64_and_float32_joins_it():
    with jax.enable_x64(True):
        running = wl.RunningMean.zeros()
        assert running.total.dtype == jnp.float64
        running = running.update(wl.WeightedMean(jnp.float64(2.0**60), 1.0))
        running = jax.jit(wl.RunningMean.update)(
            running, wl.WeightedMean(jnp.float32(1.0), jnp.float32(1.0))
        )
        assert running.total.dtype == running.weight_low.dtype == jnp.float64
        running = running.update(wl.WeightedMean(jnp.float64(-(2.0**60)), 0.0))
        assert running.to_host() == (1.0, 2.0)


def test_state_can_be_donated_and_repr_never_fails():
    step = jax.jit(lambda r: r.update(wl.WeightedMean(1.0, 2.0)), donate_argnums=0)
    running = step(step(wl.RunningMean.zeros()))
    assert repr(running) == "RunningMean(mean=0.5, weight=4.0)"
    spec = jax.tree.map(lambda _: None, running, is_leaf=lambda x: x is running)
    assert spec is None
    assert "total_low='x'" in repr(jax.tree.map(lambda _: "x", running))
    jax.jit(lambda r: repr(r) and r)(running)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.update(3.0), "`m` is float.*`update` takes the `WeightedMean`"),
        (lambda r: r.update(r), "`m` is RunningMean.*`merge` takes another"),
        (
            lambda r: r.merge(wl.WeightedMean(1.0, 1.0)),
            "`other` is WeightedMean.*`update` takes",
        ),
        (lambda r: r.update(wl.WeightedMean.zeros((3,))), "merge.*axes"),
        (lambda r: r.merge(wl.RunningMean.zeros((1,))), r"zeros\(shape\)"),
    ],
)
def test_what_running_mean_refuses(call, message):
    with pytest.raises(AssertionError, match=message):
        call(wl.RunningMean.zeros())


# ---------------------------------------------------------------- checkpoints


def test_goes_on_bit_for_bit_from_a_checkpoint_in_the_middle_of_a_round(tmp_path):
    optimizer = wl.multi_steps(optax.adamw(0.1), 3)
    grads = jax.random.normal(jax.random.key(0), (8, 5), jnp.bfloat16)
    start = {"params": jnp.ones(5, jnp.bfloat16), "loss": wl.RunningMean.zeros()}
    start["optimizer"] = optimizer.init(start["params"])

    @jax.jit
    def step(carry, grad):
        params, m = carry["params"], wl.WeightedMean(grad[0], jnp.abs(grad[1]))
        updates, state = optimizer.update(
            grad, carry["optimizer"], params, weight=m.weight
        )
        return {
            "params": optax.apply_updates(params, updates),
            "loss": carry["loss"].update(m),
            "optimizer": state,
        }

    whole = functools.reduce(step, grads, start)
    half = functools.reduce(step, grads[:5], start)
    assert half["optimizer"].mini_step == 2
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "half", start)
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    resumed = functools.reduce(step, grads[5:], restored)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
