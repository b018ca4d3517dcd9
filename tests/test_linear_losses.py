"""Each loss of the linear engine against float64, under every transformation.

`test_linear` holds what is particular to the cross-entropy and to the sweep; here is
the table of the other losses, and what each of them must do.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests import needs
from tests.oracle import reference
from tests.oracle.tables import every_third, one_of_each, unasked

B, L, D, V, T = 8, 3, 5, 12, 4  # T: features of a teacher
CLASS_WEIGHTS = np.linspace(0.5, 2.0, V).astype(np.float32)
CLASS_MASK = np.arange(V) % 5 != 2

# --------------------------------------------------------------- the table of losses


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss ``(features, kernel, *rows, bias=, where=, ...)`` and its formula.

    ``value`` is that of one token, of NumPy's float64 logits and rows; ``plain`` is the
    same of all logits at once for JAX, to be differentiated again.
    """

    name: str
    loss: Callable
    value: Callable
    plain: Callable
    rows: tuple[str, ...]
    weight: Callable = lambda *row: 1.0

    def __repr__(self):
        return self.name


TEACHER = np.random.default_rng(5).normal(size=(T, V)).astype(np.float32)


def divergence(forward, backward):
    """Of a student from a teacher whose kernel is closed over."""

    def loss(logits, teacher):
        log_p = jax.nn.log_softmax(logits)
        log_q = jax.nn.log_softmax(teacher.astype(logits.dtype) @ TEACHER)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        return (forward * q * (log_q - log_p) + backward * p * (log_p - log_q)).sum(-1)

    return loss


def jensen_shannon(logits, teacher):
    log_p = jax.nn.log_softmax(logits)
    log_q = jax.nn.log_softmax(teacher.astype(logits.dtype) @ TEACHER)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_m = jnp.log((p + q) / 2)
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2


def focal(logits, labels):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** 2) * log_p


def margin(logits, labels):
    own = jnp.take_along_axis(logits, labels[:, None], -1)
    other = jnp.arange(logits.shape[-1]) != labels[:, None]
    return jnp.where(other, jax.nn.softplus(1 + logits - own), 0).sum(-1)


def top_k(logits, indices, log_probs):
    """From the teacher's few most likely classes, stored with the data."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), indices, -1)
    return (jnp.exp(log_probs) * (log_probs - log_p)).sum(-1)


def log_prob(logits, labels, temperature=1.0, softcap=None):
    logits = (softcap * jnp.tanh(logits / softcap) if softcap else logits) / temperature
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    return own, -(jnp.exp(log_p) * log_p).sum(-1)


OF_THE_MEAN = ("weights", "segment_ids", "num_segments")


def of_log_probs(features, kernel, labels, *, where=None, **keywords):
    """A mean of both outputs, each with a cotangent of its own."""
    of_mean = {name: keywords.pop(name, None) for name in OF_THE_MEAN}
    if of_mean["weights"] is not None:
        where = where & (of_mean["weights"] != 0)
    log_probs, entropies = wl.linear_log_probs(
        features, kernel, labels, where=where, with_entropy=True, **keywords
    )
    values = jnp.exp(log_probs) - log_probs + entropies**2
    return wl.weighted_mean(values, where=where, **of_mean)


def plain_of_log_probs(logits, labels, **options):
    log_probs, entropies = log_prob(logits, labels, **options)
    return jnp.exp(log_probs) - log_probs + entropies**2


def of_classes_that_are_in(logits, labels, smoothing=0.1):
    """With smoothing over the classes that are in; weights are apart."""
    logits = logits[..., np.flatnonzero(CLASS_MASK)]
    labels = jnp.cumsum(CLASS_MASK)[labels] - 1
    return plain_cross_entropy(logits, labels, smoothing)


def plain_cross_entropy(logits, labels, smoothing=0.0):
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    return -(1 - smoothing) * own - smoothing * log_p.mean(-1)


def plain_soft(logits, labels, smoothing=0.0, z_loss=0.0, softcap=None):
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    labels = (1 - smoothing) * labels + smoothing / logits.shape[-1]
    lse = jax.nn.logsumexp(logits, axis=-1)
    return -(labels * jax.nn.log_softmax(logits)).sum(-1) + z_loss * lse**2


def one_by_one(plain):
    """The value of one token, in float64: `plain` itself, of one row."""
    compiled = jax.jit(plain)

    def value(logits, *row):
        with jax.enable_x64(True):
            return float(compiled(logits[None], *(x[None] for x in row))[0])

    return value


def user_case(name, loss_fn, *rows):
    return Case(name, wl.linear_masked(loss_fn), one_by_one(loss_fn), loss_fn, rows)


def softmax_case(name, loss, plain, *rows, **more):
    return Case(name, loss, one_by_one(plain), plain, rows, **more)


SOFT = {"z_loss": 0.02, "softcap": 2.0}
CASES = [
    user_case("kl_to_a_teacher", divergence(1.0, 0.0), "teacher"),
    user_case("reverse_kl", divergence(0.0, 1.0), "teacher"),
    user_case("jensen_shannon", jensen_shannon, "teacher"),
    user_case("focal", focal, "labels"),
    user_case("margin", margin, "labels"),
    user_case("top_k", top_k, "indices", "log_probs"),
    user_case("optax", optax.softmax_cross_entropy_with_integer_labels, "labels"),
    softmax_case("log_probs", of_log_probs, plain_of_log_probs, "labels"),
    softmax_case(
        "log_probs_and_options",
        functools.partial(of_log_probs, temperature=0.7, softcap=2.0),
        functools.partial(plain_of_log_probs, temperature=0.7, softcap=2.0),
        "labels",
    ),
    softmax_case(
        "probabilities",
        wl.linear_softmax_cross_entropy_with_probabilities,
        plain_soft,
        "probabilities",
    ),
    softmax_case(
        "probabilities_and_options",
        functools.partial(
            wl.linear_softmax_cross_entropy_with_probabilities,
            label_smoothing=0.1,
            **SOFT,
        ),
        functools.partial(plain_soft, smoothing=0.1, **SOFT),
        "probabilities",
    ),
    softmax_case(
        "class_weights_and_mask",
        functools.partial(
            wl.linear_softmax_cross_entropy,
            class_weights=CLASS_WEIGHTS,
            class_mask=CLASS_MASK,
            label_smoothing=0.1,
        ),
        of_classes_that_are_in,
        "labels_in",
        weight=lambda label: CLASS_WEIGHTS[label],
    ),
]
of_every_loss = pytest.mark.parametrize("case", CASES, ids=repr)
# Of what the engine does for all losses alike.
of_some_losses = pytest.mark.parametrize("case", every_third(CASES), ids=repr)
SHARDED = [case for case in CASES if "prob" in case.name and case.name != "top_k"]
SHARDED += [case for case in CASES if case.name == "class_weights_and_mask"]


@functools.cache
def data(seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(B, L, V)).astype(np.float32)
    labels = rng.integers(0, V, (B, L)).astype(np.int32)
    log_probs = np.asarray(jax.nn.log_softmax(scores))
    indices = np.argsort(-scores, axis=-1)[..., :3].astype(np.int32)
    return {
        "features": rng.normal(size=(B, L, D)).astype(np.float32),
        "kernel": rng.normal(size=(D, V)).astype(np.float32),
        "bias": rng.normal(size=V).astype(np.float32),
        "weights": rng.choice([0.0, 0.25, 1.0, 2.0], (B, L)).astype(np.float32),
        "where": rng.random((B, L)) < 0.6,
        "labels": labels,
        "labels_in": np.where(CLASS_MASK[labels], labels, 0),
        "teacher": rng.normal(size=(B, L, T)).astype(np.float32),
        "probabilities": np.exp(log_probs),
        "indices": indices,
        "log_probs": np.take_along_axis(log_probs, indices, -1),
    }


def rows_of(case, arrays):
    return [arrays[name] for name in case.rows]


def parts_of(arrays):
    return arrays["features"], arrays["kernel"], arrays["bias"]


def mean_of(case, arrays, **keywords):
    def mean(features, kernel, bias):
        return case.loss(
            features, kernel, *rows_of(case, arrays), bias=bias, **keywords
        ).compute()

    return mean


def plain_mean_of(case, arrays):
    """The same of logits that are all there, of the elements that count."""
    where = arrays["where"]
    rows = [row[where] for row in rows_of(case, arrays)]
    w = arrays["weights"][where]
    w = w * np.array([case.weight(*row) for row in zip(*rows, strict=True)])

    def mean(features, kernel, bias):
        logits = features[where] @ kernel + bias[None, :]
        return (w * case.plain(logits, *rows)).sum() / w.sum()

    return mean


@functools.cache
def expected(case):
    """The mean and its gradients, token by token in float64."""
    arrays = data()
    features, kernel, bias = (np.asarray(x, np.float64) for x in parts_of(arrays))
    total = weight = 0.0
    slopes = np.zeros((B, L, V))
    for i in np.argwhere(arrays["where"] & (arrays["weights"] != 0)):
        i = tuple(i)
        row = [np.asarray(x[i], np.float64 if x.dtype.kind == "f" else x.dtype)
               for x in rows_of(case, arrays)]  # fmt: skip
        w = float(arrays["weights"][i]) * float(case.weight(*row))
        logits = features[i] @ kernel + bias
        total, weight = total + w * case.value(logits, *row), weight + w
        slopes[i] = w * reference.gradient(
            lambda x, row=row: case.value(x, *row), logits
        )
    slopes /= weight
    flat, of_tokens = features.reshape(-1, D), slopes.reshape(-1, V)
    return total / weight, (slopes @ kernel.T, flat.T @ of_tokens, of_tokens.sum(0))


def gradients(mean):
    return jax.jit(jax.value_and_grad(mean, (0, 1, 2)))


def assert_close(actual, desired, rtol=2e-6):
    """Each array in units of its largest entry."""
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True)
    for one, other in leaves:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        atol = rtol * np.abs(other).max(initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def poisoned(case, arrays):
    """NaN, and labels of -100, wherever nothing counts, by mask or by weight."""
    counts = arrays["where"] & (arrays["weights"] != 0)
    changed = dict(arrays)
    for name in {"features", *case.rows}:
        array = arrays[name]
        mask = counts.reshape(counts.shape + (1,) * (array.ndim - 2))
        changed[name] = np.where(
            mask, array, np.nan if array.dtype.kind == "f" else -100
        )
        changed[name] = changed[name].astype(array.dtype)
    return changed


# ------------------------------------------------------ against the float64 oracle


# A loss of terms that cancel is rounded in units of those: 5e-6.
@pytest.mark.parametrize(
    ("case", "chunk_size"), one_of_each(CASES, [None, 4, 7]), ids=str
)
def test_value_and_gradients_are_the_oracles(case, chunk_size):
    arrays = poisoned(case, data())
    keywords = {"where": arrays["where"], "weights": arrays["weights"]}
    mean = mean_of(case, arrays, **keywords, chunk_size=chunk_size)
    assert_close(gradients(mean)(*parts_of(arrays)), expected(case), rtol=5e-6)


# Units: bfloat16 rounds features, kernel, slope and gradients to 8 bits, float16 to 11.
ROUNDING = {"bfloat16": 0.05, "float16": 5e-3}


@pytest.mark.parametrize(
    ("case", "dtype"), one_of_each(CASES, ROUNDING, every=2), ids=str
)
def test_narrow_dtypes_are_the_oracles_to_their_rounding(case, dtype):
    arrays = data()
    parts = [jnp.asarray(x, dtype) for x in parts_of(arrays)]
    mean = mean_of(case, arrays, where=arrays["where"], weights=arrays["weights"])
    value, grads = gradients(mean)(*parts)
    assert value.dtype == jnp.float32
    assert {g.dtype for g in grads} == {jnp.dtype(dtype)}
    assert_close((value, grads), expected(case), ROUNDING[dtype])


@of_some_losses
def test_float64_stays_float64(case):
    arrays = data()
    with jax.enable_x64(True):
        parts = [jnp.asarray(x, jnp.float64) for x in parts_of(arrays)]
        mean = mean_of(case, arrays, where=arrays["where"], weights=arrays["weights"])
        value, grads = gradients(mean)(*parts)
        assert {x.dtype for x in (value, *grads)} == {jnp.dtype("float64")}
        # Weights, rows and what is closed over are float32: 6e-8 of them.
        assert_close((value, grads), expected(case), rtol=2e-7)


@of_some_losses
def test_weights_of_float64_of_features_in_float32(case):
    arrays = data()
    with jax.enable_x64(True):
        weights = jnp.asarray(arrays["weights"], jnp.float64)
        mean = mean_of(case, arrays, where=arrays["where"], weights=weights)
        value, grads = gradients(mean)(*parts_of(arrays))
        change = jax.jvp(mean, parts_of(arrays), parts_of(arrays))[1]
        assert {x.dtype for x in grads} == {jnp.dtype("float32")}
        assert {value.dtype, change.dtype} == {jnp.dtype("float64")}
        assert_close((value, grads), expected(case), rtol=5e-6)


@of_some_losses
def test_nothing_that_counts_is_a_mean_of_nothing(case):
    arrays = poisoned(case, data() | {"where": np.zeros((B, L), bool)})
    mean = mean_of(case, arrays, where=arrays["where"])
    value, grads = gradients(mean)(*parts_of(arrays))
    assert value == 0
    for gradient in grads:
        np.testing.assert_array_equal(gradient, 0)


@of_some_losses
def test_nan_that_counts_stays_visible(case):
    arrays = dict(data())
    arrays["features"] = arrays["features"].copy()
    arrays["features"][1, 1, 0] = np.nan
    value, grads = gradients(mean_of(case, arrays))(*parts_of(arrays))
    assert np.isnan(value)
    assert np.isnan(grads[0][1, 1]).all()
    assert np.isfinite(np.delete(grads[0].reshape(-1, D), L + 1, axis=0)).all()


# ------------------------------------------------------------------ transformations


def keywords_of(arrays):
    return {"where": arrays["where"], "weights": arrays["weights"]}


@of_some_losses
def test_jvp_and_second_derivatives_are_those_of_plain_logits(case):
    arrays = data()
    parts, tangents = parts_of(arrays), parts_of(data(seed=1))

    def derivatives(mean):
        gradient = jax.grad(mean, (0, 1, 2))

        def slope(*parts):
            return jax.jvp(mean, parts, tangents)[1]

        return jax.jit(lambda *parts: (
            jax.jvp(mean, parts, tangents),
            jax.jvp(gradient, parts, tangents)[1],
            jax.grad(slope, (0, 1, 2))(*parts),
        ))(*parts)  # fmt: skip

    fused = derivatives(mean_of(case, arrays, **keywords_of(arrays), chunk_size=5))
    assert_close(fused, derivatives(plain_mean_of(case, arrays)), rtol=2e-5)


WAYS = ["checkpoint", "no jit", "scan", "vmap over kernels"]


@pytest.mark.parametrize(("case", "how"), one_of_each(CASES, WAYS, every=2), ids=str)
def test_transformations_change_nothing(case, how):
    arrays = data()
    mean = mean_of(case, arrays, **keywords_of(arrays), chunk_size=5)
    parts = parts_of(arrays)
    if how == "checkpoint":
        outcome = gradients(jax.checkpoint(mean))(*parts)
    elif how == "no jit":
        with jax.disable_jit():
            outcome = jax.value_and_grad(mean, (0, 1, 2))(*parts)
    elif how == "scan":

        def twice(*parts):
            return jax.lax.scan(lambda s, f: (s + f * mean(*parts), None), 0.0,
                                jnp.array([0.25, 0.75]))[0]  # fmt: skip

        outcome = gradients(twice)(*parts)
    else:
        stacked = [jnp.stack([x, 2 * x]) for x in parts[1:]]
        mapped = jax.vmap(jax.value_and_grad(mean, (0, 1, 2)), (None, 0, 0))
        outcome = jax.tree.map(lambda x: x[0], mapped(parts[0], *stacked))
    assert_close(outcome, expected(case), rtol=5e-6)


@of_some_losses
def test_segments_and_samples_are_the_oracles(case):
    """A total for each sample, by ids and by `jax.vmap`: the whole is the oracle's."""
    arrays = data()
    ids = np.broadcast_to(np.arange(B)[:, None], (B, L))

    def by_segment(*parts):
        m = case.loss(
            *parts[:2], *rows_of(case, arrays), bias=parts[2], **keywords_of(arrays),
            segment_ids=ids, num_segments=B, chunk_size=4,
        )  # fmt: skip
        return m.merge().compute()

    def by_sample(*parts):
        def loss(x, where, weights, *rows):
            return case.loss(x, parts[1], *rows, bias=parts[2], where=where,
                             weights=weights, chunk_size=4)  # fmt: skip

        m = jax.vmap(loss)(
            parts[0], arrays["where"], arrays["weights"], *rows_of(case, arrays)
        )
        return m.merge().compute()

    for mean in (by_segment, by_sample):
        assert_close(gradients(mean)(*parts_of(arrays)), expected(case), rtol=5e-6)


def test_rows_of_a_users_loss_are_differentiated():
    arrays = data()
    case = CASES[0]
    counts = arrays["where"]

    def mean(teacher):
        loss = wl.linear_masked(divergence(1.0, 0.0))
        return loss(arrays["features"], arrays["kernel"], teacher, where=counts,
                    chunk_size=5).compute()  # fmt: skip

    def plain(teacher):
        logits = arrays["features"][counts] @ arrays["kernel"]
        return case.plain(logits, teacher[counts]).mean()

    for derive in (jax.value_and_grad, jax.hessian):
        outcomes = [jax.jit(derive(f))(arrays["teacher"]) for f in (mean, plain)]
        assert_close(*outcomes, rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(mean)(arrays["teacher"])[~counts], 0)


# -------------------------------------------------------------------------- devices


def put_on(mesh, x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


KINDS = [AxisType.Auto, AxisType.Explicit]


@needs.devices
@pytest.mark.parametrize(
    ("case", "kind", "spec", "with_mesh"),
    one_of_each(CASES, KINDS, [P("data"), P()], [True, False], every=2),
    ids=str,
)
def test_sharded_arrays_change_nothing(case, kind, spec, with_mesh):
    mesh = jax.make_mesh((4, 2), ("data", "vocab"), axis_types=(kind,) * 2)
    arrays = dict(data())
    x, k, b = parts_of(arrays)
    parts = (
        put_on(mesh, x, spec),
        put_on(mesh, k, P(None, "vocab")),
        put_on(mesh, b, P("vocab")),
    )
    arrays |= {name: put_on(mesh, arrays[name], spec) for name in {"where", *case.rows}}
    mean = mean_of(case, arrays, **keywords_of(arrays), chunk_size=2)
    with jax.set_mesh(mesh) if with_mesh else contextlib.nullcontext():
        outcome = gradients(mean)(*parts)
    assert_close(outcome, expected(case), rtol=5e-6)


@needs.devices
@pytest.mark.parametrize(
    ("kind", "with_mesh", "spec"),
    one_of_each(KINDS, [True, False], [P(), P(None, "vocab")]),
    ids=str,
)
def test_what_a_loss_closes_over_may_be_sharded(kind, spec, with_mesh):
    mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=(kind,) * 2)
    arrays, case = dict(data()), CASES[0]
    teacher_kernel = put_on(mesh, TEACHER, spec)

    def loss_fn(logits, teacher):
        log_p = jax.nn.log_softmax(logits)
        log_q = jax.nn.log_softmax(teacher @ teacher_kernel)
        return (jnp.exp(log_q) * (log_q - log_p)).sum(-1)

    changed = dataclasses.replace(case, loss=wl.linear_masked(loss_fn))
    mean = mean_of(changed, arrays, **keywords_of(arrays), chunk_size=2)
    parts = [put_on(mesh, x, P()) for x in parts_of(arrays)]
    with jax.set_mesh(mesh) if with_mesh else contextlib.nullcontext():
        outcome = gradients(mean)(*parts)
    assert_close(outcome, expected(case), rtol=5e-6)


@needs.devices
@of_some_losses
def test_shard_map_of_tokens_that_differ_alone(case):
    """Nothing but the features and their rows differs between the devices."""
    arrays = data()
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))

    def mean(parts, x, *rows):
        m = case.loss(x, parts[0], *rows, bias=parts[1], chunk_size=2)
        return m.psum("data").compute()

    def gradient(parts, *batch):
        return jax.value_and_grad(mean)(parts, *batch)

    step = jax.shard_map(
        gradient,
        mesh=mesh,
        out_specs=P(),
        in_specs=(P(), *[P("data")] * (1 + len(case.rows))),
    )
    x, *parts = parts_of(arrays)
    value, grads = jax.jit(step)(tuple(parts), x, *rows_of(case, arrays))
    alone = jax.value_and_grad(mean_of(case, arrays), (1, 2))(x, *parts)
    assert_close((value, grads), alone, rtol=5e-6)


@needs.devices
@pytest.mark.parametrize(
    ("case", "check_vma"), one_of_each(CASES, [True, False], every=3), ids=str
)
def test_shard_map_over_tokens(case, check_vma):
    arrays = data()
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    rows = rows_of(case, arrays)

    def local(x, k, b, where, weights, *rows):
        def loss_fn(params, batch):
            x, where, weights, *rows = batch
            return case.loss(x, params[0], *rows, bias=params[1], where=where,
                             weights=weights, chunk_size=2)  # fmt: skip

        value_and_grad = wl.value_and_grad(loss_fn, axis_name="data")
        m, grads = value_and_grad((k, b), (x, where, weights, *rows))
        return m.compute(), grads

    step = jax.shard_map(
        local, mesh=mesh, check_vma=check_vma, out_specs=P(),
        in_specs=(P("data"), P(), P(), *[P("data")] * (2 + len(rows))),
    )  # fmt: skip
    value, grads = jax.jit(step)(
        *parts_of(arrays), arrays["where"], arrays["weights"], *rows
    )
    expect = expected(case)
    assert_close((value, grads), (expect[0], expect[1][1:]), rtol=5e-6)


@needs.devices
@pytest.mark.parametrize(
    ("case", "check_vma"), one_of_each(SHARDED, [True, False]), ids=str
)
def test_sharded_vocabulary(case, check_vma):
    arrays = data()
    mesh = Mesh(np.array(jax.devices()[:4]), ("vocab",))
    in_shards = {"probabilities": P(None, None, "vocab")}
    loss = case.loss
    of_classes = ()
    if case.name == "class_weights_and_mask":
        loss = functools.partial(wl.linear_softmax_cross_entropy, label_smoothing=0.1)
        of_classes = (CLASS_WEIGHTS, CLASS_MASK)

    def local(x, k, b, of_classes, *rows):
        names = ("class_weights", "class_mask")[: len(of_classes)]
        keywords = keywords_of(arrays) | dict(zip(names, of_classes, strict=True))

        def mean(x, k, b):
            return loss(x, k, *rows, bias=b, chunk_size=5, vocab_axis_name="vocab",
                        **keywords).compute()  # fmt: skip

        return jax.value_and_grad(mean, (0, 1, 2))(x, k, b)

    specs = (P(), P(None, "vocab"), P("vocab"))
    step = jax.shard_map(
        local, mesh=mesh, check_vma=check_vma, out_specs=(P(), specs),
        in_specs=(*specs, P("vocab"), *(in_shards.get(n, P()) for n in case.rows)),
    )  # fmt: skip
    outcome = jax.jit(step)(*parts_of(arrays), of_classes, *rows_of(case, arrays))
    assert_close(outcome, expected(case), rtol=5e-6)


# ------------------------------------------------------------ any loss of logits


@pytest.mark.parametrize(
    ("chunk_size", "case"), one_of_each([1, 3, 24, 100], CASES), ids=str
)
def test_no_size_of_a_chunk_changes_the_result(chunk_size, case):
    arrays = data()
    outcomes = [
        gradients(mean_of(case, arrays, **keywords_of(arrays), chunk_size=size))(
            *parts_of(arrays)
        )
        for size in (chunk_size, 5)
    ]
    assert_close(*outcomes, rtol=2e-6)


def test_a_filler_is_in_the_domain_of_the_loss():
    """Logits above 1 only: neither zeros nor what is masked."""
    arrays = data()
    features = np.where(arrays["where"][..., None], abs(arrays["features"]) + 1, np.nan)
    kernel = abs(arrays["kernel"]) + 1

    def loss_fn(logits, scale):
        return (scale[:, None] * jnp.sqrt(jnp.arccosh(logits))).sum(-1)

    def mean(features, kernel, scale):
        rows = jnp.where(arrays["where"], scale, 0)
        return wl.linear_masked(loss_fn)(
            features, kernel, rows, where=arrays["where"], chunk_size=100
        ).compute()

    def plain(features, kernel, scale):
        logits = features[arrays["where"]] @ kernel
        return (scale * jnp.sqrt(jnp.arccosh(logits)).sum(-1)).mean()

    outcomes = [
        jax.jit(jax.value_and_grad(f, (0, 1, 2)))(features, kernel, np.float32(2))
        for f in (mean, plain)
    ]
    assert_close(*outcomes, rtol=5e-6)


@pytest.mark.parametrize("how", ["eager", "jit", "grad", "vmap", "jvp"])
def test_what_a_loss_closes_over_is_hoisted_whole(how):
    """Traced arrays too; for gradients they are constants."""
    arrays = data()

    def mean(teacher_kernel, features):
        def loss_fn(logits, teacher):
            return ((logits - teacher @ teacher_kernel) ** 2).sum(-1)

        return wl.linear_masked(loss_fn)(
            features, arrays["kernel"], arrays["teacher"], where=arrays["where"]
        ).compute()

    def plain(teacher_kernel, features):
        teacher_kernel = jax.lax.stop_gradient(teacher_kernel)
        logits = features @ arrays["kernel"]
        values = ((logits - arrays["teacher"] @ teacher_kernel) ** 2).sum(-1)
        return jnp.where(arrays["where"], values, 0).sum() / arrays["where"].sum()

    transform = {
        "eager": lambda f: f,
        "jit": jax.jit,
        "grad": lambda f: jax.jit(jax.value_and_grad(f, (0, 1))),
        "vmap": lambda f: (
            lambda k, x: jax.vmap(jax.grad(f, 1), (0, None))(jnp.stack([k, 2 * k]), x)
        ),
        "jvp": lambda f: lambda k, x: jax.jvp(f, (k, x), (k, x)),
    }[how]
    outcomes = [transform(f)(TEACHER, arrays["features"]) for f in (mean, plain)]
    assert_close(*outcomes, rtol=5e-6)


def test_an_eager_loop_compiles_a_users_loss_once():
    loss = wl.linear_masked(focal)

    def call(seed):
        arrays = data(seed)
        return loss(arrays["features"], arrays["kernel"], arrays["labels"])

    call(0)
    with jax.no_tracing():  # neither of the loss nor of the engine
        call(1), call(2)


BAD_LOSSES = {
    "a mean over tokens": lambda logits: logits.mean(),
    "a value for each class": lambda logits: logits,
    "a column": lambda logits: logits.sum(-1, keepdims=True),
    "integers": lambda logits: logits.argmax(-1),
    "two results": lambda logits: (logits.sum(-1), logits.sum(-1)),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_losses_that_are_none_are_named(name):
    arrays = data()
    with pytest.raises(AssertionError, match=r"^`loss_fn`"):
        wl.linear_masked(BAD_LOSSES[name])(arrays["features"], arrays["kernel"])


def test_rows_that_do_not_fit_are_named():
    arrays = data()
    loss = wl.linear_masked(focal)
    with pytest.raises(AssertionError, match=r"^`array 0` has shape"):
        loss(arrays["features"], arrays["kernel"], arrays["labels"][0])
    with pytest.raises(AssertionError, match=r"^`loss_fn`"):
        wl.linear_masked("focal")
    with pytest.raises(AssertionError, match=r"^`chunk_size`"):
        loss(arrays["features"], arrays["kernel"], arrays["labels"], chunk_size=0)


def test_axes_that_do_not_fit_together_are_no_loss_of_one_token():
    """[n, V] - [n] would be broadcast for a single token."""
    arrays = data()
    loss = wl.linear_masked(lambda logits, weight: (logits - weight).sum(-1))
    with pytest.raises((TypeError, ValueError), match=r"broadcast|shape"):
        loss(arrays["features"], arrays["kernel"], arrays["weights"])


# ---------------------------------------------------- log-probabilities, probabilities


def test_log_probs_are_0_where_nothing_counts():
    arrays = data()
    labels = np.where(arrays["where"], arrays["labels"], -1)
    log_probs, entropies = wl.linear_log_probs(
        arrays["features"].astype(jnp.bfloat16), arrays["kernel"], labels,
        ignore_index=-1, with_entropy=True,
    )  # fmt: skip
    assert (log_probs.dtype, log_probs.shape) == (jnp.float32, (B, L))
    for values in (log_probs, entropies):
        np.testing.assert_array_equal(np.asarray(values) == 0, ~arrays["where"])


def test_labels_out_of_range_have_no_log_prob():
    arrays = data()
    labels = arrays["labels"].copy()
    labels[0, 1] = V
    log_probs = wl.linear_log_probs(arrays["features"], arrays["kernel"], labels)
    np.testing.assert_array_equal(np.argwhere(np.isnan(log_probs)), [[0, 1]])


def test_entropy_of_one_class_and_of_many():
    """0 where one is certain, log(V) where all are alike: no digits cancel."""
    kernel = np.zeros((1, V), np.float32)
    kernel[0, 3] = 1e4
    features = np.array([[1.0], [0.0]], np.float32)
    _, entropies = wl.linear_log_probs(
        features, kernel, np.zeros(2, int), bias=np.full(V, 1e4, np.float32),
        with_entropy=True,
    )  # fmt: skip
    assert entropies[0] == 0
    np.testing.assert_allclose(entropies[1], np.log(V), rtol=2e-7)


@pytest.mark.parametrize("name", ["cross-entropy", "probabilities", "log_probs"])
def test_digits_are_kept_beside_large_logits(name):
    """Logits near 1e4, which are rounded to 1e-3: their differences are exact here."""
    rng = np.random.default_rng(3)
    kernel = rng.integers(-8, 9, (2, V)) / 4.0
    features = rng.integers(-4, 5, (L, 2)) / 4.0
    bias = np.full(V, 1e4)
    labels = rng.integers(0, V, L)
    log_p = np.stack([reference.log_softmax(x) for x in features @ kernel])
    one_hot = np.eye(V)[labels]
    q = 0.9 * one_hot + 0.1 / V

    def outcome(x):
        given = x, kernel.astype(np.float32)
        more = {"bias": bias.astype(np.float32)}
        if name == "cross-entropy":
            loss = wl.linear_softmax_cross_entropy
            return loss(*given, labels, label_smoothing=0.1, **more).compute()
        if name == "probabilities":
            loss = wl.linear_softmax_cross_entropy_with_probabilities
            return loss(*given, q.astype(np.float32), **more).compute()
        return -wl.linear_log_probs(*given, labels, **more).mean()

    target = one_hot if name == "log_probs" else q
    value, gradient = jax.value_and_grad(outcome)(features.astype(np.float32))
    np.testing.assert_allclose(value, -(target * log_p).sum(-1).mean(), rtol=5e-7)
    assert_close(gradient, (np.exp(log_p) - target) @ kernel.T / L, rtol=2e-6)


def test_gradient_of_probabilities():
    arrays = data()
    counts = arrays["where"]

    def mean(labels):
        return wl.linear_softmax_cross_entropy_with_probabilities(
            arrays["features"], arrays["kernel"], labels, where=counts,
            label_smoothing=0.1, chunk_size=5,
        ).compute()  # fmt: skip

    def plain(labels):
        logits = arrays["features"][counts] @ arrays["kernel"]
        return plain_soft(logits, labels[counts], smoothing=0.1).mean()

    outcomes = [jax.value_and_grad(f)(arrays["probabilities"]) for f in (mean, plain)]
    assert_close(*outcomes, rtol=5e-6)


# ----------------------------------------------------------------- classes that are out


OUT = np.flatnonzero(~CLASS_MASK)
WAYS_OUT = {
    "bias": {"bias": np.where(CLASS_MASK, 0, -np.inf).astype(np.float32)},
    "mask": {"class_mask": CLASS_MASK},
    "mask of tokens": {"class_mask": np.broadcast_to(CLASS_MASK, (B, L, V))},
}
OF_LABELS = {
    "cross-entropy": (
        wl.linear_softmax_cross_entropy,
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0},
        "labels_in",
    ),
    "probabilities": (
        wl.linear_softmax_cross_entropy_with_probabilities,
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0},
        "probabilities",
    ),
}


@pytest.mark.parametrize(
    ("name", "way", "traced"), one_of_each(OF_LABELS, WAYS_OUT, [False, True])
)
def test_a_class_that_is_out_has_no_share_of_anything(name, way, traced):
    loss, options, label_name = OF_LABELS[name]
    arrays = data()
    labels = arrays[label_name]
    left = np.flatnonzero(CLASS_MASK)
    if label_name == "probabilities":
        labels = np.where(CLASS_MASK, labels, 0)
        fewer_labels = labels[..., left]
    else:
        fewer_labels = np.cumsum(CLASS_MASK)[labels] - 1
    if traced:  # the general slope, that JAX derives
        options = options | {"z_loss": jnp.float32(options["z_loss"])}

    def mean(x, k, labels, options):
        return loss(
            x, k, labels, where=arrays["where"], chunk_size=5, **options
        ).compute()

    x, k, _ = parts_of(arrays)
    tangents = parts_of(data(seed=1))[:2]

    def all_of(x, k, tangents, labels, options):
        f = functools.partial(mean, labels=labels, options=options)
        value, (gx, gk) = jax.value_and_grad(f, (0, 1))(x, k)
        return value, gx, gk, jax.jvp(f, (x, k), tangents)[1]

    value, gx, gk, change = all_of(x, k, tangents, labels, options | WAYS_OUT[way])
    cut = (tangents[0], tangents[1][:, left])
    expect = all_of(x, k[:, left], cut, fewer_labels, options)
    np.testing.assert_array_equal(gk[:, OUT], 0)
    assert_close((value, gx, gk[:, left], change), expect, rtol=5e-6)


@pytest.mark.parametrize(("way", "smoothing"), one_of_each(WAYS_OUT, [0.0, 0.5, 1.0]))
def test_a_label_that_is_out_costs_infinity(way, smoothing):
    arrays = data()
    labels = np.full((B, L), OUT[0])

    def total(x, k):
        return wl.linear_softmax_cross_entropy(
            x, k, labels, label_smoothing=smoothing, **WAYS_OUT[way]
        ).total

    value, grads = jax.value_and_grad(total, (0, 1))(*parts_of(arrays)[:2])
    assert value == np.inf
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[1][:, OUT], 0)
    if way == "bias":
        log_probs, entropies = wl.linear_log_probs(
            *parts_of(arrays)[:2], labels, with_entropy=True, **WAYS_OUT[way]
        )
        assert (np.asarray(log_probs) == -np.inf).all()
        assert np.isfinite(entropies).all()


@pytest.mark.parametrize("name", [*OF_LABELS, "log_probs"])
def test_options_have_a_slope_beside_a_class_that_is_out(name):
    """That of the classes that are in, finite where a label is out."""
    arrays = data()
    left = np.flatnonzero(CLASS_MASK)
    if name == "log_probs":
        options = {"softcap": 2.0, "temperature": 0.7}
        labels = arrays["labels_in"]
    else:
        loss, options, label_name = OF_LABELS[name]
        labels = np.asarray(arrays[label_name])
    if name == "probabilities":
        labels = np.where(CLASS_MASK, labels, 0)
        fewer_labels, bad_labels = labels[..., left], np.ones_like(labels)
    else:
        fewer_labels = np.cumsum(CLASS_MASK)[labels] - 1
        bad_labels = np.full_like(labels, OUT[0])
    x, k, _ = parts_of(arrays)

    @jax.jit
    def slopes(k, labels, options, bias=None):
        def total(options):
            if name == "log_probs":
                values = wl.linear_log_probs(x, k, labels, bias=bias, **options)
                return jnp.where(jnp.isfinite(values), values, 0).mean()
            return loss(x, k, labels, bias=bias, **options).compute()

        return jax.grad(total)(options)

    options = {key: jnp.float32(value) for key, value in options.items()}
    out = {"bias": jnp.asarray(WAYS_OUT["bias"]["bias"])}
    desired = slopes(k[:, left], fewer_labels, options)
    assert_close(slopes(k, labels, options, **out), desired, rtol=5e-6)
    of_bad = slopes(k, bad_labels, options, **out)
    assert all(np.isfinite(slope) for slope in of_bad.values())


@pytest.mark.parametrize("name", OF_LABELS)
def test_where_all_classes_are_out_nothing_is_nan(name):
    loss, options, label_name = OF_LABELS[name]
    arrays = data()
    x, k, _ = parts_of(arrays)
    out = jnp.full(V, -jnp.inf)
    labels = arrays[label_name]
    value, grads = jax.value_and_grad(
        lambda x, k: loss(x, k, labels, bias=out, **options).total, (0, 1)
    )(x, k)
    assert value == np.inf
    assert not any(np.any(g) for g in grads)
    if name == "cross-entropy":
        _, entropies = wl.linear_log_probs(x, k, labels, bias=out, with_entropy=True)
        assert not np.any(entropies)


# ----------------------------------------------------------------- options, aux


def mean_by_options(label_smoothing, z_loss, softcap):
    arrays = data()
    return wl.linear_softmax_cross_entropy(
        arrays["features"], arrays["kernel"], arrays["labels"], where=arrays["where"],
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, chunk_size=5,
    ).compute()  # fmt: skip


def test_options_may_be_traced():
    mean = mean_by_options
    options = (0.1, 0.02, 2.0)
    traced = tuple(map(jnp.float32, options))
    assert_close(jax.jit(mean)(*traced), mean(*options))
    slopes = jax.jit(jax.grad(mean, (0, 1, 2)))(*traced)
    # Differences of float32: 1e-3 of a step, with 1e-7 of the mean to be rounded.
    for i, slope in enumerate(slopes):
        ends = [
            mean(*options[:i], options[i] + h, *options[i + 1 :]) for h in (0.02, -0.02)
        ]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 0.04, rtol=2e-3)
    steps = jnp.array([0.0, 0.1, 0.3])
    mapped = jax.vmap(mean, (0, None, None))(steps, *options[1:])
    one_by_one = [mean(float(step), *options[1:]) for step in steps]
    assert_close(mapped, np.array(one_by_one))


def test_gradients_by_options_know_no_class_that_is_out():
    """Of an infinity over an option, the derivative by the option would be NaN."""
    arrays, out = data(), np.arange(data()["kernel"].shape[1]) == 2
    bias = jnp.where(out, -jnp.inf, 0.0)
    labels = jnp.where(arrays["labels"] == 2, 3, arrays["labels"])
    x, kernel = np.float64(arrays["features"]), np.float64(arrays["kernel"])[:, ~out]
    tokens = list(zip(*np.nonzero(arrays["where"]), strict=True))

    def expected(softcap, temperature):
        means = []
        for token in tokens:
            logits = softcap * np.tanh(x[token] @ kernel / softcap) / temperature
            log_probs = logits - np.log(np.exp(logits).sum())
            own = int(labels[token])
            means += [log_probs[own - (own > 2)] - (np.exp(log_probs) @ log_probs)]
        return np.mean(means)

    @jax.jit
    def slopes(softcap, temperature):
        def of_log_probs(softcap, temperature):
            log_probs, entropies = wl.linear_log_probs(
                *parts_of(arrays)[:2], labels, bias=bias, where=arrays["where"],
                softcap=softcap, temperature=temperature, with_entropy=True,
            )  # fmt: skip
            return (log_probs + entropies).sum() / len(tokens)

        def of_loss(softcap):
            return -wl.linear_softmax_cross_entropy(
                *parts_of(arrays)[:2], labels, bias=bias, where=arrays["where"],
                softcap=softcap,
            ).compute()  # fmt: skip

        one = (jnp.ones_like(softcap),)
        return (
            *jax.grad(of_log_probs, (0, 1))(softcap, temperature),
            *(jax.jvp(of_loss, (softcap,), one)[1], jax.grad(of_loss)(softcap)),
        )

    by_softcap, by_temperature, forward, reverse = slopes(2.0, 0.7)
    h = 1e-5
    np.testing.assert_allclose(
        (by_softcap, by_temperature),
        (
            (expected(2 + h, 0.7) - expected(2 - h, 0.7)) / (2 * h),
            (expected(2, 0.7 + h) - expected(2, 0.7 - h)) / (2 * h),
        ),
        rtol=2e-5,  # sums of float32 terms of both signs
    )
    assert np.isfinite(forward)
    np.testing.assert_allclose(forward, reverse, rtol=2e-5)


def test_a_scheduled_option_is_not_compiled_anew():
    traces = []

    @jax.jit
    def step(smoothing):
        traces.append(smoothing)
        return mean_by_options(smoothing, 0.0, None)

    values = [step(jnp.float32(s)) for s in (0.0, 0.1, 0.2)]
    assert len(traces) == 1
    assert len(set(map(float, values))) == 3


def test_gradients_by_parts_and_options_at_once():
    arrays = data()

    def mean(x, k, smoothing):
        return wl.linear_softmax_cross_entropy(
            x, k, arrays["labels"], label_smoothing=smoothing, where=arrays["where"],
            weights=arrays["weights"], chunk_size=5,
        ).compute()  # fmt: skip

    given = (*parts_of(arrays)[:2], jnp.float32(0.2))
    fixed = jax.value_and_grad(lambda x, k: mean(x, k, 0.2), (0, 1))(*given[:2])
    value, grads = jax.value_and_grad(mean, (0, 1, 2))(*given)
    assert_close((value, grads[:2]), fixed, rtol=5e-6)


@needs.devices
def test_gradient_by_an_option_of_a_sharded_vocabulary_is_an_error():
    arrays = data()
    mesh = Mesh(np.array(jax.devices()[:4]), ("vocab",))

    def slope(k, smoothing):
        return jax.grad(
            lambda s: wl.linear_softmax_cross_entropy(
                arrays["features"], k, arrays["labels"], label_smoothing=s,
                vocab_axis_name="vocab",
            ).compute()
        )(smoothing)  # fmt: skip

    step = jax.shard_map(
        slope, mesh=mesh, in_specs=(P(None, "vocab"), P()), out_specs=P()
    )
    with pytest.raises(NotImplementedError, match=r"^`vocab_axis_name`"):
        step(arrays["kernel"], jnp.float32(0.1))


@pytest.mark.parametrize("segments", [unasked(False), True])
def test_aux_is_of_the_same_tokens_in_the_same_pass(segments):
    arrays = data()
    packed = {}
    if segments:
        packed = {"segment_ids": arrays["labels"] % 3, "num_segments": 3}
    keywords = keywords_of(arrays) | packed

    def loss(x, **more):
        return wl.linear_softmax_cross_entropy(
            x, arrays["kernel"], arrays["labels"], z_loss=0.02, softcap=2.0,
            label_smoothing=0.1, chunk_size=5, **keywords, **more,
        )  # fmt: skip

    m, aux = loss(arrays["features"], has_aux=True)
    assert_close(m.total, loss(arrays["features"]).total)
    logits = 2 * jnp.tanh(arrays["features"] @ arrays["kernel"] / 2)
    log_p = jax.nn.log_softmax(logits)
    lse = jax.nn.logsumexp(logits, axis=-1)
    each = {
        "accuracy": (logits.argmax(-1) == arrays["labels"]).astype(float),
        "log_sum_exp": lse,
        "z_loss": 0.02 * lse**2,
        "entropy": -(jnp.exp(log_p) * log_p).sum(-1),
    }
    for name, values in each.items():
        expect = wl.weighted_mean(values, **keywords)
        assert_close(jax.tree.leaves(aux.pop(name)), jax.tree.leaves(expect), rtol=5e-6)
    assert not aux

    def with_aux(x):
        m, aux = loss(x, has_aux=True)
        return m.compute().sum(), aux["entropy"].compute()

    of_both = jax.grad(with_aux, has_aux=True)(arrays["features"])[0]
    alone = jax.grad(lambda x: loss(x).compute().sum())(arrays["features"])
    assert_close(of_both, alone)
    np.testing.assert_array_equal(
        jax.grad(lambda x: with_aux(x)[1].sum())(arrays["features"]), 0
    )


@needs.devices
def test_aux_of_a_sharded_vocabulary():
    arrays = data()
    mesh = Mesh(np.array(jax.devices()[:4]), ("vocab",))

    def loss(k, axis=None):
        m, aux = wl.linear_softmax_cross_entropy(
            arrays["features"], k, arrays["labels"], has_aux=True, vocab_axis_name=axis
        )
        return jax.tree.leaves((m, aux))

    over = jax.shard_map(
        functools.partial(loss, axis="vocab"), mesh=mesh, in_specs=P(None, "vocab"),
        out_specs=P(),
    )  # fmt: skip
    tied = arrays["kernel"].copy()
    tied[:, 7] = tied[:, 2]  # the first of the largest, also between shards
    for kernel in (arrays["kernel"], tied, 0 * tied):
        assert_close(jax.jit(over)(kernel), loss(kernel), rtol=5e-6)


BAD_OPTIONS = {
    "label_smoothing": (2.0, jnp.ones(2), "0.1", np.float32(-0.1)),
    "z_loss": (np.inf, -1e-3, jnp.ones(2), None),
    "softcap": (0.0, -1, jnp.ones((1,))),
    "class_weights": (CLASS_WEIGHTS[:-1], CLASS_WEIGHTS[:, None]),
    "class_mask": (CLASS_WEIGHTS, CLASS_MASK[:-1], np.ones((L, V), bool)),
    "has_aux": (1, None),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_named(name):
    arrays = data()
    for value in BAD_OPTIONS[name]:
        with pytest.raises(AssertionError, match=f"^`{name}`"):
            wl.linear_softmax_cross_entropy(
                arrays["features"], arrays["kernel"], arrays["labels"], **{name: value}
            )


def test_bad_options_of_log_probs_and_labels_of_probabilities_are_named():
    arrays = data()
    for name, value in (("temperature", 0.0), ("softcap", 0), ("with_entropy", 2)):
        with pytest.raises(AssertionError, match=f"^`{name}`"):
            wl.linear_log_probs(
                arrays["features"], arrays["kernel"], arrays["labels"], **{name: value}
            )
    for labels in (arrays["labels"], arrays["probabilities"][..., 1:]):
        with pytest.raises(AssertionError, match=r"^`labels`"):
            wl.linear_softmax_cross_entropy_with_probabilities(
                arrays["features"], arrays["kernel"], labels
            )
