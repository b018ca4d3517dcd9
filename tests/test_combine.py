"""`combine`: any loss at every split, against the float64 oracle of the whole batch."""

import collections
import dataclasses
import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests import needs
from tests.oracle import combined
from tests.oracle.tables import one_of_each, unasked

B, L = 16, 5
LENGTHS = [3, 0, 5, 1, 2, 4, 1, 5, 5, 2, 4, 3, 1, 1, 5, 2]
PARAMS = combined.draw_params()
SAMPLES = combined.draw_samples(LENGTHS)
BATCH = combined.pad(SAMPLES)


@functools.cache
def expected():
    return combined.oracle(PARAMS, SAMPLES)


def all_losses(**options):
    """A step for all losses, one compiled program: ``which`` is 1 for one of them.

    What that one's gradient is made of is not what the others' are, so that to share a
    program hides nothing.
    """

    def parts(params, batch):
        return {name: of(params, batch) for name, of in combined.PARTS.items()}

    def step(params, batch, which):
        def combine(parts, params):
            losses = [combined.COMBINE[n](parts[n], params) for n in combined.NAMES]
            return which @ jnp.stack(losses)

        return wl.value_and_grad(parts, combine=combine, **options)(params, batch)

    return step


def check(step, params=PARAMS, batch=BATCH, expected=expected, of_result=lambda x: x):
    for i, name in enumerate(combined.NAMES):
        which = np.eye(len(combined.NAMES), dtype=np.float32)[i]
        result = of_result(step(params, batch, which))
        combined.assert_exact(name, result, expected())


def quickly_compiled(step):
    """`jax.jit` that compiles in two thirds of the time, to slower code."""
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


def line(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def mapped(count, check_vma=True, **options):
    return quickly_compiled(
        jax.shard_map(
            all_losses(axis_name="data", **options),
            mesh=line(count),
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


# ------------------------------------------------------------------- every split


@pytest.mark.core
@pytest.mark.parametrize("num_microbatches", [1, unasked(2), unasked(8), B, 3])
def test_every_loss_is_the_oracle_in_any_number_of_microbatches(num_microbatches):
    check(quickly_compiled(all_losses(num_microbatches=num_microbatches)))


@needs.devices
@pytest.mark.parametrize(
    ("devices", "num_microbatches", "check_vma"),
    [
        unasked(2, 1, True),
        (2, 8, False),
        unasked(2, 3, True),
        (8, 1, True),
        unasked(8, 1, False),
        (8, 2, True),
    ],
)
def test_every_loss_is_the_oracle_under_shard_map(devices, num_microbatches, check_vma):
    check(mapped(devices, check_vma, num_microbatches=num_microbatches))


@needs.devices
@pytest.mark.parametrize("num_microbatches", [unasked(1), 2])
def test_every_loss_is_the_oracle_under_pmap(num_microbatches):
    step = jax.pmap(
        all_losses(num_microbatches=num_microbatches, axis_name="data"),
        axis_name="data",
        in_axes=(None, 0, None),
    )
    shards = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), BATCH)
    check(step, batch=shards, of_result=lambda x: jax.tree.map(lambda x: x[-1], x))


@needs.devices
@pytest.mark.parametrize(
    ("axis_type", "num_microbatches"),
    one_of_each([AxisType.Auto, AxisType.Explicit], [1, 2]),
)
def test_every_loss_is_the_oracle_under_plain_jit(axis_type, num_microbatches):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    check(
        quickly_compiled(all_losses(num_microbatches=num_microbatches)), params, batch
    )


# ---------------------------------------------------------- every way to spread a batch

# Rounding in float32, of sums that are grouped differently.
assert_close = functools.partial(
    jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
)


def embed(params, batch):
    return jnp.tanh(batch["x"] @ params["w"])


def alike(rows, params):
    """Looks at every pair of rows, and at the parameters directly."""
    return jax.nn.logsumexp(params["scale"] * rows @ rows.T, 1).mean()


SMALL = {
    "w": np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32),
    "scale": np.float32(0.7),
}
ROWS = {"x": np.random.default_rng(1).normal(size=(B, 3)).astype(np.float32)}


def whole(parts=embed, combine=alike, params=SMALL, batch=ROWS):
    """What JAX makes of the whole batch."""
    return jax.value_and_grad(lambda params: combine(parts(params, batch), params))(
        params
    )


@needs.devices
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_rows_are_in_the_order_of_several_axes(order):
    def in_order(rows, params):
        return (rows.sum(1) * jnp.arange(B)).sum() * params["scale"]

    step = jax.shard_map(
        wl.value_and_grad(embed, combine=in_order, num_microbatches=2, axis_name=order),
        mesh=Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b")),
        in_specs=(P(), P(order)),
        out_specs=P(),
    )
    assert_close(jax.jit(step)(SMALL, ROWS), whole(combine=in_order))


def test_an_axis_of_vmap():
    step = jax.vmap(
        wl.value_and_grad(embed, combine=alike, num_microbatches=2, axis_name="data"),
        axis_name="data",
        in_axes=(None, 0),
    )
    shards = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), ROWS)
    result = jax.jit(step)(SMALL, shards)
    for i in range(4):
        assert_close(jax.tree.map(lambda x, i=i: x[i], result), whole())


@needs.devices
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_parameters_in_shards_have_their_own_gradient_of_combine_once(num_microbatches):
    def gathered(params):
        w = jax.lax.all_gather(params["w"], "data", axis=1, tiled=True)
        return params | {"w": w}

    def penalized(rows, params):
        return alike(rows, params) + (params["w"] ** 2).sum()

    step = jax.shard_map(
        wl.value_and_grad(
            lambda params, batch: embed(gathered(params), batch),
            combine=lambda rows, params: penalized(rows, gathered(params)),
            num_microbatches=num_microbatches,
            axis_name="data",
        ),
        mesh=line(8),
        in_specs=({"w": P(None, "data"), "scale": P()}, P("data")),
        out_specs=(P(), {"w": P(None, "data"), "scale": P()}),
    )
    assert_close(jax.jit(step)(SMALL, ROWS), whole(combine=penalized))


# ----------------------------------------------------------------- what parts may be


def test_parts_of_every_kind():
    """Rows of integers, of bools, of more axes; sums of any shape; means of rows."""

    def parts(params, batch):
        h = embed(params, batch)
        return {
            "rows": [h, h[:, :, None] * h[:, None]],
            "labels": batch["label"],
            "wide": batch["label"] > 1,
            "sums": jax.vmap(wl.weighted_mean, in_axes=1)(h),
            "samples": jax.vmap(wl.weighted_mean)(h),
        }

    def combine(parts, params):
        h, outer = parts["rows"]
        assert parts["samples"].total.shape == (B,)
        same = parts["labels"][:, None] == parts["labels"]
        loss = (same * (h @ h.T)).mean() + outer.mean() * parts["sums"].compute()[3]
        worst = jax.nn.logsumexp(parts["samples"].compute(), where=parts["wide"])
        return loss + params["scale"] * worst

    batch = ROWS | {"label": np.arange(B, dtype=np.int8) % 4}
    expected = whole(parts, combine, batch=batch)
    for k in 1, 4, 5:
        step = wl.value_and_grad(parts, combine=combine, num_microbatches=k)
        assert_close(jax.jit(step)(SMALL, batch), expected)
    step = jax.shard_map(
        wl.value_and_grad(parts, combine=combine, num_microbatches=2, axis_name="data"),
        mesh=line(min(2, jax.device_count())),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    assert_close(jax.jit(step)(SMALL, batch), expected)


def test_as_many_groups_as_a_microbatch_has_rows_are_added_up_all_the_same():
    def parts(params, batch):
        per_unit = jax.vmap(wl.weighted_mean, in_axes=1)
        return per_unit(embed(params, batch)[:, :4])

    def combine(m, params):
        return jnp.sqrt(1 + m.compute()).sum()

    for k in 1, 4, 8:
        step = wl.value_and_grad(parts, combine=combine, num_microbatches=k)
        assert_close(jax.jit(step)(SMALL, ROWS), whole(parts, combine))


@pytest.mark.parametrize("num_microbatches", [1, 4, 3])
def test_no_gradient_flows_through_a_weight(num_microbatches):
    def parts(params, batch):
        weight = params["scale"] * jnp.float32(len(batch["x"]))
        return wl.WeightedMean((params["scale"] * batch["x"]).sum(), weight)

    def combine(m, params):
        return m.total / m.weight

    step = wl.value_and_grad(parts, combine=combine, num_microbatches=num_microbatches)
    value, grads = jax.jit(step)(SMALL, ROWS)
    sums = ROWS["x"].sum()
    assert_close(value, sums / B)
    assert_close(grads["scale"], sums / (B * SMALL["scale"]))
    # Nor from outside.
    assert_close(jax.grad(lambda params: step(params, ROWS)[0])(SMALL), grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_16_bits_are_added_up_in_32(dtype):
    """A sum of 256 in bfloat16 stays where it is when ones are added to it."""
    k = {jnp.bfloat16: 1024, jnp.float16: 4096}[dtype]
    batch = {"x": jnp.ones((k, 1), dtype)}

    def parts(param, batch):
        return wl.weighted_mean(param * batch["x"])

    step = wl.value_and_grad(
        parts, combine=lambda m, p: jnp.exp(m.compute()), num_microbatches=k
    )
    value, grad = jax.jit(step)(jnp.zeros((), dtype), batch)
    assert (value, grad, grad.dtype) == (1, 1, dtype)


def test_arguments_are_those_of_argnums_in_their_order():
    def parts(scale, batch, w, power):
        return jnp.tanh(batch["x"] @ w) * scale**power

    def combine(rows, w, scale):
        return alike(rows, {"scale": scale}) + (w**2).sum()

    args = (SMALL["scale"], ROWS, SMALL["w"])
    step = wl.value_and_grad(parts, (2, 0), combine=combine, num_microbatches=4)
    value, (w, scale) = jax.jit(step)(*args, power=3.0)

    def loss(scale, w):
        return combine(parts(scale, ROWS, w, 3.0), w, scale)

    expected = jax.value_and_grad(loss, (0, 1))(SMALL["scale"], SMALL["w"])
    assert_close((value, (scale, w)), expected)


@pytest.mark.parametrize("num_microbatches", [1, 4, 3])
def test_aux_and_second_derivatives(num_microbatches):
    def parts(params, batch):
        rows = embed(params, batch)
        return rows, {"rows": rows, "mean": wl.weighted_mean(rows)}

    step = jax.jit(
        wl.value_and_grad(
            parts, combine=alike, has_aux=True, num_microbatches=num_microbatches
        )
    )
    (value, aux), grads = step(SMALL, ROWS)
    assert_close((value, grads), whole())
    rows = embed(SMALL, ROWS)
    assert_close(aux["rows"], rows)
    assert_close(aux["mean"].compute(), rows.mean())

    def norm(params):
        return sum((g**2).sum() for g in jax.tree.leaves(step(params, ROWS)[1]))

    def norm_of_whole(params):
        return sum((g**2).sum() for g in jax.tree.leaves(whole(params=params)[1]))

    assert_close(jax.grad(norm)(SMALL), jax.grad(norm_of_whole)(SMALL))


# ------------------------------------------------------------- means without combine


class Terms(NamedTuple):
    first: wl.WeightedMean
    second: wl.WeightedMean


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Fields:
    first: wl.WeightedMean
    second: wl.WeightedMean


TREES = {
    "a nested dict": lambda a, b: {"x": {"first": a}, "y": {"second": b}},
    "an OrderedDict": lambda a, b: collections.OrderedDict(y=a, x=b),
    "a tuple": lambda a, b: (a, b),
    "a list with None": lambda a, b: [a, None, b],
    "a named tuple": Terms,
    "a dataclass": Fields,
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("num_microbatches", [1, 4, 3])
def test_the_means_of_any_tree_are_added(tree, num_microbatches):
    def terms(params, batch):
        h = embed(params, batch)
        return wl.weighted_mean(h), wl.weighted_mean(h**2, where=h > 0)

    def loss(params):
        a, b = terms(params, ROWS)
        return a.compute() + b.compute()

    step = wl.value_and_grad(
        lambda params, batch: tree(*terms(params, batch)),
        num_microbatches=num_microbatches,
    )
    value, grads = jax.jit(step)(SMALL, ROWS)
    assert_close(value, tree(*terms(SMALL, ROWS)))
    assert jax.tree.structure(value) == jax.tree.structure(tree(*terms(SMALL, ROWS)))
    assert_close(grads, jax.grad(loss)(SMALL))


def test_coefficients_go_by_the_name_of_any_mapping_and_may_be_traced():
    def terms(params, batch):
        h = embed(params, batch)
        return collections.OrderedDict(
            b={"own": wl.weighted_mean(h), "more": wl.weighted_mean(h**2)},
            a=wl.weighted_mean(h**3),
        )

    @jax.jit
    def gradient(factor, params):
        step = wl.value_and_grad(terms, coefficients={"b": factor}, num_microbatches=4)
        return step(params, ROWS)[1]

    def loss(params, factor):
        m = wl.compute(terms(params, ROWS))
        return factor * (m["b"]["own"] + m["b"]["more"]) + m["a"]

    with pytest.raises(ValueError, match=r"`coefficients` names \['c', 1\], but"):
        wl.value_and_grad(terms, coefficients={"c": 1.0, 1: 2.0})(SMALL, ROWS)
    assert_close(gradient(0.3, SMALL), jax.grad(loss)(SMALL, 0.3))
    # A gradient is linear in a coefficient: its derivative is no constant's.
    assert_close(
        jax.jacobian(gradient)(0.3, SMALL), jax.jacobian(jax.grad(loss), 1)(SMALL, 0.3)
    )


def test_a_batch_may_come_by_keyword():
    def by_name(params, rng=None, batch=None):
        assert rng is None
        return embed(params, batch)

    for k in 1, 4:
        step = wl.value_and_grad(
            by_name, combine=alike, batch_argnums=2, num_microbatches=k
        )
        assert_close(jax.jit(step)(SMALL, batch=ROWS), whole())
        assert_close(jax.jit(step)(params=SMALL, batch=ROWS), whole())


# ------------------------------------------------------------------- over an epoch


def test_an_epoch_ends_in_the_same_combine():
    """Parts are carried in a tree of running means: epoch RMSE, F1, R2, perplexity."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, L + 1, 40)
    y = rng.normal(1, 2, (40, L)).astype(np.float32)
    p = (y + rng.normal(0, 1, (40, L))).astype(np.float32)

    def parts(batch):
        y, p = batch["y"], batch["p"]
        mean = functools.partial(wl.weighted_mean, lengths=batch["lengths"])
        return {
            "squared": mean((p - y) ** 2),
            "y": mean(y),
            "yy": mean(y**2),
            "f1": {
                "both": mean(1.0 * ((y > 1) & (p > 1))),
                "each": mean((y > 1) + 1.0 * (p > 1)),
            },
        }

    def figures(m):
        f1 = 2 * m["f1"]["both"].total / m["f1"]["each"].total
        m = wl.compute(m)
        variance = m["yy"] - m["y"] ** 2
        return {
            "rmse": jnp.sqrt(m["squared"]),
            "r2": 1 - m["squared"] / variance,
            "perplexity": jnp.exp(m["squared"]),
            "f1": f1,
        }

    def is_running(x):
        return isinstance(x, wl.RunningMean)

    running = {name: wl.RunningMean.zeros() for name in ("squared", "y", "yy")}
    running["f1"] = {name: wl.RunningMean.zeros() for name in ("both", "each")}

    @jax.jit
    def step(running, batch):
        return jax.tree.map(
            wl.RunningMean.update, running, parts(batch), is_leaf=is_running
        )

    for rows in (slice(0, 1), slice(1, 17), slice(17, 40)):
        batch = {"y": y[rows], "p": p[rows], "lengths": lengths[rows]}
        running = step(running, batch)

    keep = np.arange(L) < lengths[:, None]
    y, p = y[keep].astype(float), p[keep].astype(float)
    mse = np.mean((y - p) ** 2)
    both, each = ((y > 1) & (p > 1)).sum(), (y > 1).sum() + (p > 1).sum()
    expected = {
        "rmse": np.sqrt(mse),
        "r2": 1 - mse / np.var(y),
        "perplexity": np.exp(mse),
        "f1": 2 * both / each,
    }
    assert_close(figures(running), expected)


def test_compute_makes_plain_dicts_of_scalars():
    running = wl.RunningMean.zeros((2,)).update(wl.WeightedMean(*np.ones((2, 2), "f")))
    tree = collections.OrderedDict(
        z=wl.WeightedMean(3.0, 2.0),
        a=[
            running,
            types.MappingProxyType({"empty": wl.WeightedMean(0.0, 0.0)}),
            7,
            None,
        ],
    )
    computed = wl.compute(tree, empty=-1.0)
    assert type(computed) is dict
    assert list(computed) == ["z", "a"]
    assert type(computed["a"][1]) is dict
    assert_close(computed, {"z": 1.5, "a": [np.ones(2), {"empty": -1.0}, 7, None]})
    assert float(jax.jit(wl.compute)(tree["z"])) == 1.5


# ------------------------------------------------------------------------- errors


def mean_of(params, batch):
    return wl.weighted_mean(embed(params, batch))


ERRORS = {
    "a scalar part": (
        lambda p, b: {"a": embed(p, b).mean()},
        lambda m, p: m["a"],
        {},
        r"`loss_fn` must return parts with `combine`, and a scalar .*`parts\['a'\]`",
    ),
    "a number": (lambda p, b: 1.0, lambda m, p: m, {}, "`loss_fn` must return parts"),
    "a string": (lambda p, b: "x", lambda m, p: m, {}, "`loss_fn` must return parts"),
    "an array of strings": (
        lambda p, b: np.array(["x"] * len(b["x"])),
        lambda m, p: 1.0,
        {},
        "`loss_fn` must return parts",
    ),
    "no parts": (lambda p, b: {}, lambda m, p: 1.0, {}, "`loss_fn` must return parts"),
    "rows of another axis": (
        lambda p, b: {"a": embed(p, b).T},
        lambda m, p: m["a"].sum(),
        {},
        r"`loss_fn` returns `parts\['a'\]` of \[8, .*Axis 0 .*must be the batch",
    ),
    "a sum of groups as an array": (
        lambda p, b: jnp.ones(4) * p["scale"],
        lambda m, p: m.sum(),
        {},
        r"`loss_fn` returns `parts` of \[4\]",
    ),
    "a combine of rows": (
        embed,
        lambda m, p: m.sum(1),
        {},
        "`combine` must return the loss, one floating scalar",
    ),
    "a combine of a mean": (
        mean_of,
        lambda m, p: m,
        {},
        "`combine` must return .*compute",
    ),
    "a combine of None": (mean_of, lambda m, p: None, {}, "`combine` must return"),
    "a combine of an integer": (
        mean_of,
        lambda m, p: jnp.int32(1),
        {},
        "`combine` must return",
    ),
    "combine and coefficients": (
        mean_of,
        lambda m, p: m.compute(),
        {"coefficients": {"a": 1.0}},
        "`coefficients` and `combine` do not go together",
    ),
    "a combine that is no function": (
        mean_of,
        "sum",
        {},
        "`combine` must be a function",
    ),
    "a loss that closes over its batch": (
        lambda p: embed(p, ROWS),
        alike,
        {},
        "`batch_argnums` names arguments .*closes over.* pass it as an argument",
    ),
}


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize(
    ("loss_fn", "combine", "options", "message"), ERRORS.values(), ids=ERRORS
)
def test_errors_say_what_is_wrong(loss_fn, combine, options, message, num_microbatches):
    def run():
        step = wl.value_and_grad(
            loss_fn, combine=combine, num_microbatches=num_microbatches, **options
        )
        takes_no_batch = loss_fn.__code__.co_argcount == 1
        return step(SMALL) if takes_no_batch else step(SMALL, ROWS)

    if "closes over" in message and num_microbatches == 1:
        assert_close(run(), whole())
        return
    with pytest.raises(AssertionError, match=message) as error:
        run()
    assert isinstance(error.value, ValueError | TypeError)


def test_accumulated_calls_say_what_a_combined_loss_wants():
    optimizer = wl.multi_steps(optax.sgd(1.0), every_k=2)
    _, grads = wl.value_and_grad(embed, combine=alike)(SMALL, ROWS)
    with pytest.raises(
        AssertionError, match=r"`combine` has none.* `num_microbatches`"
    ):
        optimizer.update(grads, optimizer.init(SMALL), SMALL)
