"""The linear losses as people shard them: what passes between devices, and memory.

Under plain jit, with automatic and explicit axes, deep in a program or not: a guess
from the arguments of the program decides where tokens are cut into blocks. Any guess
must be right in its numbers; a good one is read off the compiled program.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests import needs
from tests.oracle.tables import every_third, one_of_each
from tests.test_compiled import loops
from wloss_jax.linear import _primitives as primitives
from wloss_jax.linear import _spread

N, D, V = 64, 16, 32
pytestmark = needs.devices

# Of the tokens, and of the kernel [D, V].
LAYOUTS = {
    "vocab": (P(), P(None, "model")),
    "data": (P("data"), P()),
    "fsdp": (P("data"), P("data")),
    "all of fsdp": (P(("data", "model")), P(("data", "model"))),
    "data and vocab": (P("data"), P(None, "model")),
    "fsdp and vocab": (P("data"), P("data", "model")),
    "tokens over the vocabulary's": (P("model"), P(None, "model")),
    "tokens over nothing": (P(), P("data")),
    "vocabulary over all": (P(), P(None, ("model", "data"))),
}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(N, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
        rng.integers(0, V, N).astype(np.int32),
        rng.random(N) < 0.7,
    )


def mean(features, kernel, labels, where):
    return wl.linear_softmax_cross_entropy(
        features, kernel, labels, where=where, chunk_size=3
    ).compute()


def in_a_scan(features, kernel, labels, where):
    """Two microbatches of another shape, of a kernel that is cast and transposed."""
    table = kernel.T

    def add(sums, batch):
        x, y, counts = batch
        m = wl.linear_softmax_cross_entropy(
            jnp.tanh(x), table.T, y, where=counts, chunk_size=3
        )
        return sums + m, None

    rows = [x.reshape(2, N // 2, *x.shape[1:]) for x in (features, labels, where)]
    return jax.lax.scan(add, wl.WeightedMean.zeros(), tuple(rows))[0].compute()


def log_probs(features, kernel, labels, where):
    values = wl.linear_log_probs(features, kernel, labels, where=where, chunk_size=3)
    return (values**2).sum()


def of_a_users_loss(features, kernel, labels, where):
    def loss_fn(logits, labels):
        own = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - own) ** 2

    loss = wl.linear_masked(loss_fn)
    return loss(features, kernel, labels, where=where, chunk_size=3).compute()


PROGRAMS = (mean, in_a_scan, log_probs, of_a_users_loss)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def put_on(mesh, layout):
    tokens, kernel = LAYOUTS[layout]
    specs = (tokens, kernel, tokens, tokens)
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(data(), specs, strict=True)
    ]


@functools.cache
def expected(program):
    return jax.jit(jax.value_and_grad(program, (0, 1)))(*data())


def assert_close(outcome, expected):
    leaves = map(jax.tree.leaves, (outcome, expected))
    for one, other in zip(*leaves, strict=True):
        # Sums in another order: a few roundings of the largest.
        atol = 2e-6 * np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("layout", "program", "with_mesh", "kind"),
    one_of_each(
        LAYOUTS,
        PROGRAMS,
        [True, False],
        [AxisType.Auto, AxisType.Explicit],
        every=2,
    ),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_no_layout_changes_the_numbers(layout, program, with_mesh, kind):
    if program is in_a_scan and kind is AxisType.Explicit:
        pytest.skip("a reshape of sharded rows is the caller's to spell out there")
    mesh = mesh_of(kind)
    arrays = put_on(mesh, layout)
    step = jax.jit(jax.value_and_grad(program, (0, 1)))
    with jax.set_mesh(mesh) if with_mesh else contextlib.nullcontext():
        outcome = step(*arrays)
    assert_close(outcome, expected(program))


@pytest.mark.parametrize("layout", every_third(LAYOUTS))
def test_tokens_that_no_number_of_devices_divides(layout):
    mesh = mesh_of()
    x, kernel, y, where = (np.asarray(x) for x in data())
    kernel = jax.device_put(kernel, NamedSharding(mesh, LAYOUTS[layout][1]))
    few = (x[:7], kernel, y[:7], where[:7])
    outcome = jax.jit(jax.value_and_grad(mean, (0, 1)))(*few)
    alone = jax.jit(jax.value_and_grad(mean, (0, 1)))(
        x[:7], data()[1], y[:7], where[:7]
    )
    assert_close(outcome, alone)


# -------------------------------------------------------------- what is known, and how


def test_arguments_of_the_program_are_known_in_a_scan():
    seen = []

    def look(x, *, device, task):
        seen.append(device)
        return [x + 0]

    class Task:
        matmul_precision = None

    task = Task()
    look_p = primitives.make_primitive("look", look)
    mesh = mesh_of()
    x = jax.device_put(np.ones((4, 6), "f"), NamedSharding(mesh, P("data", "model")))
    y = jax.device_put(np.ones(8, "f"), NamedSharding(mesh, P(("data", "model"))))

    def scanned(x, y):
        def body(carry, _):
            return look_p.bind(jnp.tanh(carry), task=task)[0], None

        return jax.lax.scan(body, x, None, length=2)[0] + y.sum()

    jax.jit(scanned).lower(x, y)
    assert seen[-1].arguments == (
        ((4, 6), (("data",), ("model",))),
        ((8,), (("data", "model"),)),
    )
    assert dict(seen[-1].mesh.shape) == {"data": 4, "model": 2}


def spread(*arguments, mask=(N,), kernel=(D, V)):
    device = primitives.Device(
        "cpu", 8, mesh_of().abstract_mesh, [primitives.Argument(*a) for a in arguments]
    )
    return _spread.spread_of(np.ones(kernel, "f"), np.ones(mask, bool), device)


def test_the_kernel_says_how_tokens_are_spread():
    columns = ((), ("model",))
    assert spread(((D, V), columns))[2:5] == (("data",), (), ("model",))
    assert spread(((V, D), columns[::-1]))[2:5] == (("data",), (), ("model",))
    assert spread(((D, V), columns)).num_blocks == 4
    # Adam's moments may be sharded in another way: the vocabulary is known even so.
    mixed = spread(((D, V), columns), ((D, V), (("data",), ("model",))))
    assert (mixed.num_blocks, mixed.features, mixed.vocab) == (4, None, ("model",))
    for unknown in (
        spread(),
        spread(((D, V), columns), ((D, V), columns[::-1])),
        spread(((D, V), ((), ())), mask=(N - 4,)),
    ):
        assert unknown.mesh is None
        assert unknown.num_blocks in (4, 8)


# ------------------------------------------------------------ read off the compiler


def compiled(layout, program=mean):
    mesh = mesh_of()
    arrays = put_on(mesh, layout)
    shardings = (arrays[0].sharding, arrays[1].sharding)
    step = jax.jit(
        jax.value_and_grad(program, (0, 1)),
        out_shardings=(NamedSharding(mesh, P()), shardings),
    )
    return step.lower(*arrays).compile().as_text()


def collectives(text):
    """The kind, and the number of elements of what comes out, of each."""
    found = re.findall(
        r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
        r"(?:-start)?\(",
        text,
    )
    return [
        (kind, sum(
            int(np.prod([int(n) for n in shape.split(",") if n]))
            for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ))
        for shapes, kind in found
    ]  # fmt: skip


CHUNK = 3


@pytest.mark.parametrize("program", [mean, in_a_scan], ids=["plain", "in a scan"])
def test_a_sharded_vocabulary_passes_small_sums_and_the_features_gradient(program):
    text = compiled("vocabulary over all", program)
    assert {kind for kind, _ in collectives(text)} <= {"all-reduce"}
    # Three sums of a chunk (the largest, of exponentials, the label's), its gradient.
    assert max(size for _, size in collectives(text)) <= CHUNK * D + 3 * CHUNK
    assert f"f32[8,{D},{V // 8}]" not in text  # one sum of the kernel's gradient, not 8


@pytest.mark.parametrize("program", [mean, log_probs], ids=["mean", "log_probs"])
def test_fsdp_gathers_the_kernel_once_and_scatters_its_gradient_once(program):
    text = compiled("all of fsdp", program)
    assert not collectives(loops(text))
    large = [(kind, size) for kind, size in collectives(text) if size > CHUNK * D]
    assert sorted(large) == [("all-gather", D * V), ("reduce-scatter", D * V // 8)]


@pytest.mark.parametrize("layout", ["data", "fsdp and vocab"])
def test_nothing_of_the_logits_passes_in_the_rounds(layout):
    """Neither logits nor kernels; with a sharded vocabulary sums of a chunk."""
    sizes = [size for _, size in collectives(loops(compiled(layout)))]
    assert max(sizes, default=0) <= (layout != "data") * (CHUNK * D + 3 * CHUNK)


# In GiB of temporary memory a device; before, all of it took 2.51, 3.93 and 3.93.
ON_TPU = {
    "vocab": (P(), P(None, "chips"), 0.7),
    "fsdp": (P("chips"), P("chips"), 3.3),
    "data": (P("chips"), P(), 2.3),
}


@needs.libtpu
@pytest.mark.parametrize(
    ("layout", "kind"), one_of_each(ON_TPU, [AxisType.Auto, AxisType.Explicit])
)
def test_memory_on_four_tpus(monkeypatch, layout, kind):
    """8192 tokens, of 4096 features and 128256 classes, in bfloat16."""
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = Mesh(np.array(devices), ("chips",), axis_types=(kind,))
    tokens, of_kernel, gib = ON_TPU[layout]

    def array(shape, dtype, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def mean(features, kernel, labels):
        return wl.linear_softmax_cross_entropy(features, kernel, labels).compute()

    arrays = (
        array((8192, 4096), jnp.bfloat16, tokens),
        array((4096, 128256), jnp.bfloat16, of_kernel),
        array((8192,), jnp.int32, tokens),
    )
    step = jax.jit(
        jax.value_and_grad(mean, (0, 1)),
        out_shardings=(None, (arrays[0].sharding, arrays[1].sharding)),
    )
    lowered = step.trace(*arrays).lower(lowering_platforms=("tpu",))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < gib * 2**30


# ------------------------------------- operands that differ over unlike mapped axes

ROWS = np.random.default_rng(5)
TOKENS = ROWS.normal(size=(8, 4)).astype(np.float32)
TOKEN_LABELS = ROWS.integers(0, 11, 8)
OWN_KERNEL = ROWS.normal(size=(4, 11)).astype(np.float32)
SCALES = np.abs(ROWS.normal(size=(2, 11))).astype(np.float32)


def scaled_loss(logits, scales):
    return (jax.nn.log_softmax(logits) * scales).sum(-1)


# Of `(rows, labels, scales, kernel, option)`, of which each has its own devices.
OF_UNLIKE_AXES = {
    "a loss that closes over it": lambda x, labels, scales, kernel, _: (
        wl.linear_masked(lambda logits: scaled_loss(logits, scales))(x, kernel).total
    ),
    "an array of rows": lambda x, labels, scales, kernel, _: (
        wl.linear_masked(scaled_loss)(
            x, kernel, jnp.broadcast_to(scales, (len(x), 11))
        ).total
    ),
    "weights": lambda x, labels, scales, kernel, _: (
        wl.linear_softmax_cross_entropy(
            x, kernel, labels, weights=scales[: len(x)], chunk_size=3
        ).total
    ),
    "weights of a loss of one's own": lambda x, labels, scales, kernel, _: (
        wl.linear_masked(lambda logits: scaled_loss(logits, np.arange(11.0)))(
            x, kernel, weights=scales[: len(x)], where=scales[: len(x)] > 0.1
        ).total
    ),
    "distributions": lambda x, labels, scales, kernel, _: (
        wl.linear_softmax_cross_entropy_with_probabilities(
            x, kernel, jnp.broadcast_to(scales, (len(x), 11))
        ).total
    ),
    "options": lambda x, labels, scales, kernel, option: (
        wl.linear_softmax_cross_entropy(
            x, kernel, labels, z_loss=option, label_smoothing=option, softcap=1 + option
        ).total
    ),
    "options of log-probabilities": lambda x, labels, scales, kernel, option: sum(
        values.sum()
        for values in wl.linear_log_probs(
            x, kernel, labels, temperature=option, softcap=2.0, with_entropy=True
        )
    ),
}


@pytest.mark.parametrize("tokens_differ", [True, False])
@pytest.mark.parametrize("name", OF_UNLIKE_AXES)
def test_what_differs_over_more_axes_than_the_rest_is_added_up_once(
    name, tokens_differ
):
    loss = OF_UNLIKE_AXES[name]
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    of_tokens = P("d") if tokens_differ else P()
    rows = 4 if tokens_differ else 8

    def over_devices(kernel, option):
        def of_device(x, labels, scales, kernel, option):
            return jax.lax.psum(loss(x, labels, scales[0], kernel, option), "d")

        return jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(of_tokens, of_tokens, P("d"), P(), P()),
            out_specs=P(),
        )(TOKENS, TOKEN_LABELS, SCALES, kernel, option)

    def one_after_another(kernel, option):
        starts = (0, 4) if tokens_differ else (0, 0)
        return sum(
            loss(
                TOKENS[i : i + rows], TOKEN_LABELS[i : i + rows], scales, kernel, option
            )
            for i, scales in zip(starts, SCALES, strict=True)
        )

    def derivatives(function):
        """The first, and the second along one direction."""
        gradient = jax.grad(function, (0, 1))
        at = jnp.asarray(OWN_KERNEL), jnp.float32(0.5)
        along = jnp.asarray(OWN_KERNEL[::-1]), jnp.float32(0.25)
        return jax.jit(lambda: jax.jvp(gradient, at, along))()

    # Sums of 88 terms of 1 in another order, and their second derivatives.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        derivatives(over_devices),
        derivatives(one_after_another),
    )


@pytest.mark.parametrize("name", OF_UNLIKE_AXES)
def test_where_nothing_is_tracked_each_device_has_the_gradient_of_its_own(name):
    loss = OF_UNLIKE_AXES[name]
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    at = jnp.asarray(OWN_KERNEL), jnp.float32(0.5)

    def gradient(x, labels, scales):
        return jax.grad(lambda *at: loss(x, labels, scales[0], *at), (0, 1))(*at)

    def added_up(*rows):
        return jax.lax.psum(gradient(*rows), "d")

    rows = TOKENS, TOKEN_LABELS, SCALES
    found = jax.jit(
        jax.shard_map(
            added_up, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=False
        )
    )(*rows)
    halves = zip(*(np.split(x, 2) for x in rows), strict=True)
    desired = jax.tree.map(lambda a, b: a + b, *(gradient(*half) for half in halves))
    # Sums of 88 terms of 1 in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        found,
        desired,
    )
