"""gradients.py on one device: every split of a batch against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

import wloss_jax as wl
from tests.oracle import strategies, two_terms

B, L = 16, 6
DIVISORS = (1, 2, 4, 8, 16)
OTHERS = (3, 32)
PARAMS = two_terms.draw_params()

# Rounding in float32, of sums that are grouped differently.
assert_close = functools.partial(
    jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
)


@functools.cache
def two_terms_step(num_microbatches):
    return jax.jit(two_terms.make_step(num_microbatches=num_microbatches))


def ragged_batch(lengths, seed=0):
    samples = two_terms.draw_samples(lengths, seed)
    return samples, two_terms.pad(samples, L)


def number_loss_fn(params, batch):
    return two_terms.loss_fn(params, batch)["number"]


def weighted_sum(params, batch):
    """One parameter, one number a token; its gradient is the mean of ``x``."""
    return wl.weighted_mean(params * batch["x"], lengths=batch["lengths"])


# ------------------------------------------------------------------- every split


@settings(deadline=None, max_examples=100)
@given(lengths=strategies.lengths(B, L), seed=strategies.seeds)
@example(lengths=[0] * B, seed=0)  # nothing at all
@example(lengths=[0, 3] * (B // 2), seed=0)  # every other microbatch is empty
@example(lengths=[0] * (B - 1) + [L], seed=0)  # all but one are
@example(lengths=[1, *[L] * (B - 1)], seed=0)
def test_two_terms_are_the_oracle_in_any_number_of_microbatches(lengths, seed):
    samples, batch = ragged_batch(lengths, seed)
    expected = two_terms.oracle(PARAMS, samples)
    for k in DIVISORS + OTHERS:
        two_terms.assert_exact(two_terms_step(k)(PARAMS, batch), expected)


def test_a_lone_term_is_the_oracle():
    samples, batch = ragged_batch([3, 0, 6, 1] * 4)
    expected = two_terms.oracle(PARAMS, samples, {"class": 0.0})
    step = wl.value_and_grad(number_loss_fn, num_microbatches=4)
    value, grads = jax.jit(step)(PARAMS, batch)
    two_terms.assert_exact(({"number": value}, grads), expected)


def test_the_mean_of_the_means_of_two_halves_is_elsewhere():
    _, batch = ragged_batch([6, 1] * 8)
    even = np.arange(B) % 2 == 0

    def mean(rows):
        half = batch | {"lengths": np.where(rows, batch["lengths"], 0)}
        return two_terms_step(1)(PARAMS, half)[0]["number"].compute()

    assert abs((mean(even) + mean(~even)) / 2 / mean(even | ~even) - 1) > 0.1


@pytest.mark.parametrize("scheme", [wl.size_power, wl.loss_power])
def test_schemes_are_exact_at_every_split(scheme):
    lengths = np.array([3, 0, 6, 1, 2, 2, 5, 4])
    x = np.random.default_rng(0).uniform(0.5, 2, (8, L)).astype(np.float32)
    param = 1.5

    def loss_fn(param, batch, power):
        squares = (param * batch["x"]) ** 2
        per_sample = wl.per_sample(wl.weighted_mean)(squares, lengths=batch["lengths"])
        return per_sample.reweight(scheme(power)).merge()

    steps = [
        jax.jit(wl.value_and_grad(loss_fn, num_microbatches=k)) for k in (1, 4, 8, 3)
    ]
    for power in 0.0, 0.5, 2.0:
        total = weight = gradient = 0.0
        for sample, length in zip(x.astype(float), lengths, strict=True):
            if length:
                square = np.mean(sample[:length] ** 2)
                loss = param**2 * square
                by_size = scheme is wl.size_power
                factor = length**power if by_size else length * loss**power
                total += factor * loss
                weight += factor
                gradient += factor * 2 * param * square  # the factor is a constant
        for step in steps:
            value, grad = step(param, {"x": x, "lengths": lengths}, power)
            assert_close(value.compute(), total / weight)
            assert_close(grad, gradient / weight)


# -------------------------------------------------- where k does not divide the batch


def test_every_row_is_seen_and_none_is_made_up():
    seen = []

    def loss_fn(param, batch):
        jax.debug.callback(lambda x: seen.append(x.ravel().tolist()), batch["x"])
        return weighted_sum(param, batch)

    batch = {
        "x": np.arange(1.0, 6.0, dtype=np.float32)[:, None],
        "lengths": np.ones(5, int),
    }
    for k, rows in (
        (2, [[1, 3, 5], [2, 4]]),
        (3, [[1, 4], [2, 5], [3]]),
        (4, [[1, 5], [2], [3], [4]]),
        (9, [[1], [2], [3], [4], [5]]),
    ):
        seen.clear()
        step = wl.value_and_grad(loss_fn, num_microbatches=k)
        value, grad = jax.jit(step)(1.0, batch)
        assert_close((value.compute(), value.weight, grad), (3.0, 5.0, 3.0))
        jax.effects_barrier()
        assert sorted(seen) == sorted(2 * rows)  # once for the weights


def test_a_model_that_divides_by_lengths_and_a_loss_without_a_mask():
    """Neither has anything to say of rows that are not there."""

    def loss_fn(param, batch):
        of_rows = param * batch["x"].sum(1) / batch["lengths"]
        return {"mean": wl.weighted_mean(of_rows), "l2": wl.WeightedMean(param**2, 1.0)}

    batch = {"x": np.ones((5, 2), np.float32), "lengths": np.array([1, 2, 1, 2, 1])}
    for k in 1, 2, 3, 5:
        step = jax.jit(wl.value_and_grad(loss_fn, num_microbatches=k))
        value, grad = step(3.0, batch)
        assert_close((value["mean"].compute(), value["mean"].weight), (4.8, 5))
        assert_close((value["l2"].compute(), grad), (9.0, 7.6))


def test_a_weight_that_does_not_see_the_size_of_microbatches_is_told():
    def of_weight(weight):
        return lambda p, b: wl.WeightedMean((p * b["x"]).sum(), weight(p, b))

    batch = {"x": np.ones((5, 2), np.float32)}

    def run(loss_fn, k=2, **options):
        return jax.jit(wl.value_and_grad(loss_fn, num_microbatches=k, **options))(
            2.0, batch
        )

    one = jnp.ones(())
    for weight in (lambda p, b: 1.0, lambda p, b: one, lambda p, b: jnp.ones(())):
        with pytest.raises(
            ValueError, match=r"`loss_fn` returns .* of weight 1\.0 for"
        ):
            run(of_weight(weight))
    with pytest.raises(ValueError, match=r"`loss_fn` returns .* of weight 1\.0 for"):
        run(
            lambda p, b: wl.WeightedMean(p * b["x"].sum(0), jnp.ones(2)),
            combine=lambda m, p: m.compute().max(),
        )
    # No false alarms: microbatches of one size, a count, a weight of the model, a sum.
    run(of_weight(lambda p, b: 1.0), k=5)
    run(of_weight(lambda p, b: b["x"].size))
    run(of_weight(lambda p, b: jax.lax.stop_gradient(p)))
    run(of_weight(lambda p, b: b["x"].sum()))
    value, grad = run(of_weight(lambda p, b: 1.0), combine=lambda m, p: m.total)
    assert_close((value, grad), (20.0, 10.0))
    # Nor of rows, each with a weight of its own, that are put together.
    value, grad = run(
        lambda p, b: jax.vmap(wl.weighted_mean)(p * b["x"]),
        combine=lambda m, p: jnp.max(m.compute()),
    )
    assert_close((value, grad), (2.0, 1.0))


# ---------------------------------------------------------------- what it is given


def test_argnums_may_be_a_tuple_of_trees_on_both_sides_of_the_batch():
    def loss_fn(first, batch, second):
        params = {"hidden": first, "number": second[0], "class": second[1]}
        return number_loss_fn(params, batch)

    samples, batch = ragged_batch([3, 0, 6, 1] * 4)
    expected = two_terms.oracle(PARAMS, samples, {"class": 0.0})
    args = (PARAMS["hidden"], batch, (PARAMS["number"], PARAMS["class"]))
    for k in 1, 4:
        step = jax.jit(wl.value_and_grad(loss_fn, (2, 0), num_microbatches=k))
        value, (second, first) = step(*args)
        grads = {"hidden": first, "number": second[0], "class": second[1]}
        two_terms.assert_exact(({"number": value}, grads), expected)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_argnums_count_from_the_end_below_0_as_in_jax(num_microbatches):
    def loss_fn(batch, scale, params, unused=None):
        return weighted_sum(scale * params, batch)

    def step(argnums, batch_argnums):
        make = functools.partial(wl.value_and_grad, num_microbatches=num_microbatches)
        step = make(loss_fn, argnums=argnums, batch_argnums=batch_argnums)
        return step(BATCH, 2.0, 3.0)

    desired = step((2, 1), 0)
    jax.tree.map(np.testing.assert_array_equal, step((-1, -2), -3), desired)


def test_argnums_of_one_in_a_tuple_gives_a_tuple():
    batch = {"x": np.ones((2, 1), np.float32), "lengths": np.ones(2, int)}
    _, grads = wl.value_and_grad(weighted_sum, (0,))(1.0, batch)
    assert_close(grads, (1.0,))


def test_without_microbatches_there_need_be_no_batch_and_it_may_have_a_gradient():
    x = np.array([1.0, 3.0], np.float32)
    value, grad = wl.value_and_grad(lambda p: wl.weighted_mean(p * x))(2.0)
    assert_close((value.compute(), grad), (4.0, 2.0))

    value, grad = wl.value_and_grad(lambda p, x: wl.weighted_mean(p * x), 1)(2.0, x)
    assert_close((value.compute(), grad), (4.0, [1.0, 1.0]))

    value, grad = wl.value_and_grad(lambda p, x: wl.weighted_mean(p * x))(2.0, x=x)
    assert_close((value.compute(), grad), (4.0, 2.0))


def test_keywords_and_partial_reach_the_loss_function():
    def loss_fn(scale, param, batch, *, power):
        return weighted_sum(scale * param**power, batch)

    batch = {"x": np.ones((4, 2), np.float32), "lengths": np.array([2, 0, 1, 1])}
    scaled = functools.partial(loss_fn, 3.0)
    for k in 1, 2:
        step = wl.value_and_grad(scaled, num_microbatches=k)
        value, grad = jax.jit(step, static_argnames="power")(2.0, batch, power=2)
        assert_close((value.compute(), grad), (12.0, 12.0))


def frozen(loss_fn):
    """A wrapper, whose default is another than that of the function it wraps."""

    @functools.wraps(loss_fn)
    def wrapped(param, batch, train=False):
        return loss_fn(param, batch, train)

    return wrapped


def with_key(loss_fn):
    """A wrapper that takes fewer arguments than the signature that it shows."""

    @functools.wraps(lambda param, batch, key: None)
    def wrapped(param, batch):
        return loss_fn(param, batch)

    return wrapped


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("wrap", "mean"), [(frozen, 0.0), (with_key, 3.0), (jax.jit, 3.0)]
)
def test_defaults_are_left_to_the_function(wrap, mean, k):
    def loss_fn(param, batch, train=True):
        return wl.weighted_mean(param * batch if train else 0 * batch)

    step = wl.value_and_grad(wrap(loss_fn), num_microbatches=k)
    for value, _ in step(2.0, np.float32([1, 2])), step(2.0, batch=np.float32([1, 2])):
        assert_close(value.compute(), mean)


def test_keys_numpy_arrays_and_leaves_without_elements_are_cut_alike():
    def loss_fn(param, batch):
        assert batch["nothing"].shape == (2, 0)
        draws = jax.vmap(lambda key: jax.random.normal(key, (3,)))(batch["key"])
        assert isinstance(batch["old"], jax.Array)
        assert batch["old"].shape == (2, 2)
        return weighted_sum(param, {"x": draws, "lengths": batch["lengths"]})

    keys = jax.random.split(jax.random.key(0), 4)
    batch = {
        "key": keys,
        "old": jax.random.key_data(keys),
        "nothing": np.zeros((4, 0)),
        "lengths": np.array([1, 3, 0, 2], np.int8),
    }
    draws = np.array([jax.random.normal(key, (3,)) for key in keys])
    expected = np.concatenate([draws[0, :1], draws[1], draws[3, :2]]).mean()
    value, grad = jax.jit(wl.value_and_grad(loss_fn, num_microbatches=2))(1.0, batch)
    assert_close((value.compute(), grad), (expected, expected))


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_dropout_with_a_key_a_sample_is_the_same_at_every_split(make_key):
    def loss_fn(param, batch):
        def drop(key, x):
            return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)

        return weighted_sum(
            param, batch | {"x": jax.vmap(drop)(batch["key"], batch["x"])}
        )

    x = np.random.default_rng(0).uniform(1, 2, (8, L)).astype(np.float32)
    batch = {"x": x, "lengths": np.array([3, 0, 6, 1, 5, 4, 2, 6])}

    def gradient(num_microbatches, key):
        step = wl.value_and_grad(loss_fn, num_microbatches=num_microbatches)
        return jax.jit(step)(1.0, batch | {"key": jax.random.split(key, 8)})[1]

    expected = gradient(1, make_key(0))
    for k in 4, 3:
        assert_close(gradient(k, make_key(0)), expected)
    assert abs(gradient(1, make_key(1)) / expected - 1) > 0.01


# ------------------------------------------------------------------------- aux


def loss_with_aux(param, batch):
    mean = weighted_sum(param, batch)
    per_sample = wl.per_sample(wl.weighted_mean)
    aux = {
        # Two groups, and a batch or microbatches of two rows among those below.
        "heads": wl.weighted_mean(
            batch["x"], segment_ids=batch["head"], num_segments=2
        ),
        "groups": jnp.zeros(2) + param,
        "samples": per_sample(param * batch["x"], lengths=batch["lengths"]),
        "predictions": param * batch["x"],
        "turned": param * batch["x"].T,
        "rows": len(batch["x"]),
        "none": None,
    }
    return mean, aux


def aux_batch(rows):
    return {
        "x": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2),
        "head": np.arange(2 * rows).reshape(rows, 2) % 2
        - (np.arange(rows) < 2)[:, None],
        "lengths": np.full(rows, 2),
    }


def test_aux_without_microbatches_is_that_of_jax():
    batch = aux_batch(4)
    (value, aux), grad = wl.value_and_grad(loss_with_aux, has_aux=True)(2.0, batch)

    def divided(param, batch):
        mean, aux = loss_with_aux(param, batch)
        return mean.compute(), aux

    jax_result = jax.value_and_grad(divided, has_aux=True)(2.0, batch)
    assert_close(((value.compute(), aux), grad), jax_result)
    assert aux["rows"] == 4


@pytest.mark.parametrize(
    ("rows", "k"), [(8, 4), (8, 8), (7, 3), (7, 4), (4, 2), (1, 3), (0, 2)]
)
def test_aux_of_the_batch_is_in_its_order_and_the_rest_is_merged_or_stacked(rows, k):
    batch = aux_batch(rows)
    _, expected = loss_with_aux(2.0, batch)
    step = wl.value_and_grad(loss_with_aux, has_aux=True, num_microbatches=k)
    (_, aux), _ = jax.jit(step)(2.0, batch)
    for name in ("heads", "samples", "predictions", "turned"):
        assert_close(aux[name], expected[name])
    assert aux["samples"].total.shape == (rows,)
    k = max(1, min(k, rows))  # at most one a row, but one
    assert aux["groups"].tolist() == [[2.0, 2.0]] * k
    assert aux["rows"].tolist() == [len(range(i, rows, k)) for i in range(k)]
    assert aux["none"] is None


def test_aux_that_has_the_batch_in_no_axis_of_its_own():
    def loss_fn(param, batch):
        x = param * batch["x"]
        return weighted_sum(param, batch), {"flat": x.ravel(), "pairs": x @ x.T}

    def of_means(param, batch):
        flat = (param * batch["x"]).ravel()
        return weighted_sum(param, batch), wl.WeightedMean(flat, jnp.ones_like(flat))

    def run(loss_fn, k):
        step = wl.value_and_grad(loss_fn, has_aux=True, num_microbatches=k)
        return jax.jit(step)(2.0, aux_batch(6))[0][1]

    aux = run(loss_fn, 3)
    assert (aux["flat"].shape, aux["pairs"].shape) == ((3, 4), (3, 2, 2))
    with pytest.raises(ValueError, match="`loss_fn` returns an array in its aux whose"):
        run(loss_fn, 4)
    with pytest.raises(ValueError, match=r"`loss_fn` returns `aux`, a `WeightedMean`"):
        run(of_means, 3)


# -------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gradients_are_added_up_in_float32(dtype):
    # A sum in bfloat16 would stop at 0.5, after 256 of the 512 microbatches.
    k = {jnp.bfloat16: 512, jnp.float16: 4096}[dtype]
    batch = {"x": jnp.ones((k, 1), dtype), "lengths": jnp.ones(k, int)}
    step = jax.jit(wl.value_and_grad(weighted_sum, num_microbatches=k))
    value, grad = step(jnp.ones((), dtype), batch)
    assert grad.dtype == dtype
    assert value.total.dtype == jnp.float32
    assert grad == 1


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_float16_does_not_overflow_where_a_million_elements_count(num_microbatches):
    def loss_fn(params, batch):
        return wl.weighted_mean(batch["x"] @ params, lengths=batch["lengths"])

    rows, size = 8, 125_000
    x = np.random.default_rng(0).uniform(1, 3, (rows, size, 1)).astype(np.float16)
    batch = {"x": x, "lengths": np.full(rows, size)}
    step = jax.jit(wl.value_and_grad(loss_fn, num_microbatches=num_microbatches))
    value, grad = step(jnp.ones(1, jnp.float16), batch)
    assert value.weight == 1e6
    assert grad.dtype == jnp.float16
    # 1e-6, what each element hands back, has four bits in float16: 6%.
    np.testing.assert_allclose(grad.astype(float), x.mean(dtype=float), rtol=0.06)


def test_float64_stays_float64():
    samples, batch = ragged_batch([3, 0, 6, 1] * 4)
    expected = two_terms.oracle(PARAMS, samples)
    with jax.enable_x64(True):
        step = jax.jit(two_terms.make_step(num_microbatches=4))
        wide, wide_batch = (
            jax.tree.map(lambda x: x.astype(float) if x.dtype.kind == "f" else x, tree)
            for tree in (PARAMS, batch)
        )
        value, grads = step(wide, wide_batch)
        means = value["number"].compute(), value["class"].compute()
        mixed = step(PARAMS, wide_batch)
    for mean, name in zip(means, ("number", "class"), strict=True):
        np.testing.assert_allclose(mean, expected[0][name][0], 1e-14)
    two_terms.assert_close_gradients(grads, expected[1], 1e-14)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(mixed[1])} == {"float32"}
    two_terms.assert_close_gradients(mixed[1], expected[1])


# ------------------------------------------------------- inside other transforms


@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
def test_without_jit(num_microbatches):
    step = wl.value_and_grad(weighted_sum, num_microbatches=num_microbatches)
    value, grad = step(2.0, BATCH)
    assert_close((value.compute(), value.weight, grad), (2.0, 4.0, 1.0))


def test_in_the_body_of_a_scan():
    _, batch = ragged_batch([3, 0, 6, 1] * 4)
    step = two_terms_step(4)

    def descend(params, _):
        value, grads = step(params, batch)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        return params, value["number"].compute()

    params = PARAMS
    losses = []
    for _ in range(3):
        params, loss = descend(params, None)
        losses.append(loss)
    scanned = jax.jit(lambda p: jax.lax.scan(descend, p, None, length=3))(PARAMS)
    assert_close(scanned, (params, np.array(losses)))
    assert losses[0] > losses[1] > losses[2]


def test_a_rematerialized_model():
    samples, batch = ragged_batch([3, 0, 6, 1] * 4)
    loss_fn = jax.checkpoint(two_terms.loss_fn)
    step = two_terms.make_step(loss_fn, num_microbatches=4)
    two_terms.assert_exact(
        jax.jit(step)(PARAMS, batch), two_terms.oracle(PARAMS, samples)
    )


def test_an_ensemble_by_vmap():
    samples, batch = ragged_batch([3, 0, 6, 1] * 4)
    members = [two_terms.draw_params(seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    results = jax.vmap(two_terms_step(4), in_axes=(0, None))(stacked, batch)
    for i, params in enumerate(members):
        result = jax.tree.map(lambda x, i=i: x[i], results)
        two_terms.assert_exact(result, two_terms.oracle(params, samples))


@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
def test_second_derivatives_go_through(num_microbatches):
    def loss_fn(param, batch):
        return weighted_sum(param**3, batch)

    step = wl.value_and_grad(loss_fn, num_microbatches=num_microbatches)
    curvature = jax.jit(jax.grad(lambda param: step(param, BATCH)[1]))
    assert_close(curvature(2.0), 12.0)


# ------------------------------------------------------------------------ errors


BATCH = {"x": np.ones((4, 2), np.float32), "lengths": np.array([2, 0, 1, 1])}


def unmerged(param, batch):
    return wl.per_sample(wl.weighted_mean)(param * batch["x"], lengths=batch["lengths"])


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize(
    ("loss_fn", "options", "error", "message"),
    [
        (lambda p, b: weighted_sum(p, b).compute(), {}, AssertionError, "not divided"),
        (lambda p, b: {"a": p * b["x"].sum()}, {}, AssertionError, "`WeightedMean`"),
        (lambda p, b: {}, {}, AssertionError, "must return a `WeightedMean`"),
        (lambda p, b: (weighted_sum(p, b), 1), {}, AssertionError, "`has_aux=True`"),
        (unmerged, {}, AssertionError, r"`\.merge\(\)` the batch axes"),
        (lambda p, b: {"a": unmerged(p, b)}, {}, AssertionError, r"`\.merge\(\)`"),
        (
            lambda p, b: {"a": weighted_sum(p, b)},
            {"coefficients": {"b": 1.0}},
            AssertionError,
            r"names \['b'\], but the terms .* are \['a'\]",
        ),
        (weighted_sum, {"coefficients": {"a": 1.0}}, AssertionError, "has no name"),
        (weighted_sum, {"axis_name": "data"}, NameError, "'data' is not mapped here"),
        (weighted_sum, {"axis_name": ("a", "b")}, NameError, "'a' is not mapped here"),
        (
            weighted_sum,
            {"argnums": 2},
            AssertionError,
            r"`argnums` names arguments \(2,\)",
        ),
        (
            weighted_sum,
            {"argnums": -3},
            AssertionError,
            r"`argnums` names arguments \(-1,\)",
        ),
    ],
)
def test_errors_say_what_is_wrong(loss_fn, options, error, message, num_microbatches):
    step = wl.value_and_grad(loss_fn, num_microbatches=num_microbatches, **options)
    with pytest.raises(error, match=message):
        step(1.0, BATCH)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (BATCH | {"scale": 1.0}, {}, r"axis 0 of every leaf .*'scale.*: \(\)"),
        (BATCH | {"y": np.ones(3)}, {}, r"axis 0 of every leaf .*'y.*: \(3,\)"),
        (BATCH, {"argnums": (0, 1)}, "must not overlap"),
        (BATCH, {"batch_argnums": 2}, r"`batch_argnums` names arguments \(2,\)"),
        (BATCH, {"batch_argnums": ()}, "axis 0 of every leaf"),
        (BATCH, {"num_microbatches": 0}, "`num_microbatches` must be .* got 0"),
        (BATCH, {"num_microbatches": -2}, "`num_microbatches` must be .* got -2"),
        (BATCH, {"num_microbatches": 2.0}, r"`num_microbatches` must be .* got 2\.0"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_an_error(batch, options, message):
    step = wl.value_and_grad(weighted_sum, **{"num_microbatches": 2} | options)
    with pytest.raises(AssertionError, match=message):
        step(1.0, batch)
