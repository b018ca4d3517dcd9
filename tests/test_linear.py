"""The linear cross-entropy against the float64 oracle, and what is compiled of it.

Every law that each loss obeys is in `tests.oracle.grid` too; here is what only this one
has: the gradients of kernel and bias, chunks, both forms of the gradient, and devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests import needs
from tests.oracle import reference, strategies
from tests.oracle.tables import one_of_each, unasked
from tests.test_compiled import loops
from wloss_jax.linear import _chunks, _programs
from wloss_jax.linear._primitives import Device

B, L, D, V = 4, 6, 5, 37  # no chunk below divides B * L, nor V anything
OPTIONS = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 3.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 2.0},
}


@functools.cache
def data(batch=B, size=L, features=D, vocab=V, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "features": rng.normal(size=(batch, size, features)).astype(np.float32),
        "kernel": rng.normal(size=(features, vocab)).astype(np.float32),
        "bias": rng.normal(size=vocab).astype(np.float32),
        "labels": rng.integers(0, vocab, (batch, size)).astype(np.int32),
        "weights": rng.choice([0.25, 1.0, 2.0], (batch, size)).astype(np.float32),
        "where": rng.random((batch, size)) < 0.4,
    }


def oracle(arrays, counts, **options):
    """The mean over the tokens that count, and its gradients, from lists of them."""
    softcap = options.pop("softcap", None)
    lists = {
        name: arrays[name][counts].astype(np.float64)
        for name in ("features", "weights")
    }
    labels = arrays["labels"][counts]
    parts = [lists["features"], arrays["kernel"], arrays["bias"]]
    parts = [np.asarray(part, np.float64) for part in parts]

    def mean(features, kernel, bias):
        logits = features @ kernel + bias
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        losses = [
            reference.softmax_cross_entropy_with_integer_labels(*token, **options)
            for token in zip(logits, labels, strict=True)
        ]
        return reference.weighted_mean(losses, lists["weights"])[2]

    def gradient(i):
        return reference.gradient(
            lambda x: mean(*parts[:i], x, *parts[i + 1 :]), parts[i]
        )

    of_features = np.zeros(arrays["features"].shape)
    of_features[counts] = gradient(0)
    return mean(*parts), (of_features, gradient(1), gradient(2))


def mean_of(arrays, **keywords):
    """The mean as a function of features, kernel and bias."""

    def mean(features, kernel, bias):
        return wl.linear_softmax_cross_entropy(
            features, kernel, arrays["labels"], bias=bias, **keywords
        ).compute()

    return mean


def plain_mean_of(arrays, segments=None, **keywords):
    """The same of logits that are all there."""
    softcap = keywords.pop("softcap", None)
    keywords.pop("chunk_size", None)

    def mean(features, kernel, bias):
        logits = features @ kernel
        logits += jnp.broadcast_to(bias, logits.shape)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        return wl.softmax_cross_entropy_with_integer_labels(
            logits, arrays["labels"], **keywords
        ).compute()

    return mean


def parts_of(arrays):
    return arrays["features"], arrays["kernel"], arrays["bias"]


def gradients(mean):
    return jax.jit(jax.value_and_grad(mean, (0, 1, 2)))


@functools.cache
def compiled(mean_of=mean_of, **options):
    """One program of the value and its gradients, for any labels and any mask."""

    @jax.jit
    def step(parts, labels, where):
        mean = mean_of({"labels": labels}, where=where, **options)
        return jax.value_and_grad(mean, (0, 1, 2))(*parts)

    return step


def assert_close(actual, desired, rtol=2e-6):
    """Each array in units of its largest entry."""
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True)
    for one, other in leaves:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        atol = rtol * np.abs(other).max(initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


# ---------------------------------------------------------- against the float64 oracle


@pytest.mark.core
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_and_gradients_are_the_oracles(options):
    arrays = data()
    keywords = {"where": arrays["where"], "weights": arrays["weights"], "chunk_size": 4}
    outcome = gradients(mean_of(arrays, **keywords, **options))(*parts_of(arrays))
    assert_close(outcome, oracle(arrays, arrays["where"], **options))


# bfloat16 has 8 bits: a rounding is 0.4%, of each logit, of its gradient and of the
# products of that. The loss is made of rounded features, not of the oracle's.
ROUNDING = [
    ("bfloat16", "bfloat16", 0.02),
    ("bfloat16", "float32", 0.02),
    ("float32", "bfloat16", 2e-6),
    ("float16", "float16", 2e-3),
]


@pytest.mark.parametrize(
    ("dtypes", "options"), one_of_each(ROUNDING, ["plain", "all"]), ids=str
)
def test_narrow_dtypes_are_the_oracles_to_their_rounding(dtypes, options):
    features, kernel, rtol = dtypes
    options = OPTIONS[options]
    arrays = dict(data())
    narrow = jnp.dtype(features), jnp.dtype(kernel), jnp.dtype("float32")
    parts = [jnp.asarray(x, d) for x, d in zip(parts_of(arrays), narrow, strict=True)]
    rounded = zip(("features", "kernel", "bias"), parts, strict=True)
    arrays |= {name: np.asarray(x, np.float32) for name, x in rounded}
    keywords = {"where": arrays["where"], "weights": arrays["weights"], "chunk_size": 4}
    value, grads = gradients(mean_of(arrays, **keywords, **options))(*parts)
    assert value.dtype == jnp.float32
    assert tuple(g.dtype for g in grads) == narrow
    expected, expected_grads = oracle(arrays, arrays["where"], **options)
    assert_close(value, expected, rtol=5e-6 if kernel == features else rtol)
    assert_close(grads, expected_grads, max(rtol, jnp.finfo(kernel).eps))


@pytest.mark.parametrize(("scale", "segments"), one_of_each([1e-9, 1e9], [False, True]))
def test_float16_has_room_for_weights_of_any_scale(scale, segments):
    arrays = data()
    keywords = {"weights": arrays["weights"] * np.float32(scale)}
    if segments:
        keywords |= {"segment_ids": np.zeros((B, L), np.int32), "num_segments": 1}
    parts = [jnp.asarray(part, jnp.float16) for part in parts_of(arrays)]

    def mean(*parts):
        return mean_of(arrays, **keywords)(*parts).sum()

    rounded = zip(("features", "kernel", "bias"), parts, strict=True)
    arrays = arrays | {name: np.asarray(x, np.float32) for name, x in rounded}
    outcome = gradients(mean)(*parts)
    # float16 has 11 bits: roundings of the slope and of the gradients, 5e-4 each.
    assert_close(outcome, oracle(arrays, np.ones((B, L), bool)), rtol=2e-3)


def test_float64_stays_float64():
    arrays = data()
    with jax.enable_x64(True):
        parts = [jnp.asarray(part, jnp.float64) for part in parts_of(arrays)]
        mean = mean_of(arrays, where=arrays["where"], weights=arrays["weights"])
        value, grads = gradients(mean)(*parts)
        assert {x.dtype for x in (value, *grads)} == {jnp.dtype("float64")}
    assert_close((value, grads), oracle(arrays, arrays["where"]), rtol=1e-8)


@settings(deadline=None, max_examples=20)
@given(lengths=strategies.lengths(B, L), seed=st.integers(0, 3))
@example(lengths=[0] * B, seed=0)
@example(lengths=[0, 1, 0, 0], seed=0)
@example(lengths=[L] * B, seed=0)
def test_raggedness_is_the_oracles(lengths, seed):
    """All masked, one token, all: one compiled program, poison in every other place."""
    arrays = data(seed=seed)
    counts = np.arange(L) < np.array(lengths)[:, None]
    features = np.where(counts[..., None], arrays["features"], np.nan)
    labels = np.where(counts, arrays["labels"], -100)
    outcome = ragged_step()(
        features, arrays["kernel"], arrays["bias"], labels, np.array(lengths)
    )
    assert_close(outcome, oracle(arrays | {"weights": np.ones((B, L))}, counts))


@functools.cache
def ragged_step():
    def mean(features, kernel, bias, labels, lengths):
        return wl.linear_softmax_cross_entropy(
            features, kernel, labels, bias=bias, lengths=lengths, chunk_size=7
        ).compute()

    return jax.jit(jax.value_and_grad(mean, (0, 1, 2)))


def test_no_tokens_at_all_are_a_mean_of_nothing():
    arrays = data()
    none = {"labels": np.zeros((0,), np.int32)}
    value, grads = gradients(mean_of(none))(
        np.zeros((0, D), np.float32), arrays["kernel"], arrays["bias"]
    )
    assert value == 0
    for gradient in grads:
        np.testing.assert_array_equal(gradient, 0)


def test_labels_that_are_ignored_are_masked():
    arrays = data()
    labels = np.where(arrays["where"], arrays["labels"], -100)
    ignoring = mean_of({"labels": labels}, ignore_index=-100)
    masking = mean_of(arrays, where=arrays["where"])
    outcomes = [gradients(mean)(*parts_of(arrays)) for mean in (ignoring, masking)]
    jax.tree.map(np.testing.assert_array_equal, *outcomes)


@pytest.mark.parametrize("label", [-1, V, 2**31 - 1, -100])
def test_label_out_of_range_is_nan_in_value_and_gradients(label):
    arrays = data()
    labels = arrays["labels"].copy()
    labels[1, 2] = label
    value, grads = compiled()(parts_of(arrays), labels, np.ones((B, L), bool))
    assert np.isnan(value)
    assert np.isnan(grads[0][1, 2]).all()
    assert np.isfinite(np.delete(grads[0].reshape(-1, D), L + 2, axis=0)).all()
    assert np.isnan(grads[1]).all()


def test_narrow_labels_count_through_a_wider_vocabulary():
    arrays = data(vocab=300)
    labels = arrays["labels"] % 128
    means = [
        gradients(mean_of({"labels": labels.astype(dtype)}))(*parts_of(arrays))
        for dtype in (np.int8, np.int32)
    ]
    jax.tree.map(np.testing.assert_array_equal, *means)


def test_bias_of_minus_infinity_takes_a_class_out():
    """Class 0 too, which is what the last chunk is filled up with."""
    arrays = dict(data())
    arrays["labels"] = arrays["labels"] % (V - 2) + 1
    bias = arrays["bias"].copy()
    bias[[0, V - 1]] = -np.inf
    mean = mean_of(arrays, where=arrays["where"], chunk_size=7)
    value, grads = gradients(mean)(*parts_of(arrays)[:2], bias)
    fewer = arrays["labels"] - 1
    cut = {"labels": fewer}
    expected, (gx, gk, gb) = gradients(plain_mean_of(cut, where=arrays["where"]))(
        arrays["features"], arrays["kernel"][:, 1:-1], bias[1:-1]
    )
    padded = (gx, np.pad(gk, ((0, 0), (1, 1))), np.pad(gb, 1))
    assert_close((value, grads), (expected, padded))


@pytest.mark.parametrize(
    ("chunk_size", "share"), one_of_each([1, 2, 5, 7, 20, 24, 1000, None], [0.4, 1.0])
)
def test_chunks_change_nothing_but_roundings(chunk_size, share):
    arrays = data()
    where = np.ones((B, L), bool) if share == 1 else arrays["where"]
    given = parts_of(arrays), arrays["labels"], where
    assert_close(
        compiled(chunk_size=chunk_size)(*given), compiled(plain_mean_of)(*given)
    )


def test_one_sample_and_one_token():
    arrays = data()
    for index in [1, (1, 2)]:
        labels = {"labels": arrays["labels"][index]}
        parts = (arrays["features"][index], *parts_of(arrays)[1:])
        outcomes = [gradients(f(labels))(*parts) for f in (mean_of, plain_mean_of)]
        assert_close(*outcomes)


# ------------------------------------------------------------- only what counts costs


def rounds_of(monkeypatch, call):
    """The sizes of the chunks that the loops go round with."""
    rounds = []
    logits = _programs.logits_of

    def counting(x, *arguments):
        if not isinstance(x, jax.core.Tracer):
            rounds.append(x.shape[0])
        return logits(x, *arguments)

    monkeypatch.setattr(_programs, "logits_of", counting)
    with jax.disable_jit():
        call()
    return rounds


@pytest.mark.parametrize("valid", [0, unasked(1), 8, 9, unasked(23), 40])
def test_rounds_follow_the_tokens_that_count(monkeypatch, valid):
    rng = np.random.default_rng(valid)
    where = rng.permutation(np.arange(40) < valid).reshape(B, 10)
    arrays = data(size=10)
    mean = mean_of(arrays, where=where, chunk_size=8)
    step = jax.value_and_grad(mean, (0, 1, 2))
    call = functools.partial(step, *parts_of(arrays))
    sizes = rounds_of(monkeypatch, call)
    assert sizes == {0: [], 1: [4], 8: [8], 9: [8, 4], 23: [8] * 3, 40: [8] * 5}[valid]


def products(function, *arguments):
    """The matrix products in a round: one loop is of full chunks, one of a half."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = re.findall(r"= \S+ dot\(|custom_call_target=\"__onednn\$matmul", text)
    return len(found) / 2


def test_number_of_matrix_products():
    arrays = data(size=40, features=64, vocab=256)
    parts = parts_of(arrays)
    mean = mean_of(arrays, where=arrays["where"], chunk_size=32)

    def of_samples(features, kernel, bias):
        loss = functools.partial(wl.linear_softmax_cross_entropy, chunk_size=32)
        per_sample = wl.per_sample(loss)(
            features, kernel, arrays["labels"], bias=bias, where=arrays["where"]
        )
        return per_sample.reweight(wl.size_power(0.0)).merge().compute()

    assert products(mean, *parts) == 1
    assert products(jax.value_and_grad(mean), *parts) == 2
    assert products(jax.value_and_grad(mean, 1), *parts) == 2
    assert products(jax.value_and_grad(mean, 2), *parts) == 1
    assert products(jax.value_and_grad(mean, (0, 1, 2)), *parts) == 3
    assert products(of_samples, *parts) == 1
    assert products(jax.value_and_grad(of_samples, (0, 1, 2)), *parts) == 4
    remat = jax.value_and_grad(jax.checkpoint(mean), (0, 1, 2))
    assert products(remat, *parts) <= 4


def test_memory_is_that_of_a_chunk():
    """As for 2048 tokens of 128 features and 8192 classes: 64 MiB of logits."""
    arrays = {
        "features": jax.ShapeDtypeStruct((2048, 128), jnp.float32),
        "kernel": jax.ShapeDtypeStruct((128, 8192), jnp.float32),
        "labels": jax.ShapeDtypeStruct((2048,), jnp.int32),
    }

    def temporary(loss):
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return (
            step.lower(*arrays.values()).compile().memory_analysis().temp_size_in_bytes
        )

    fused = temporary(
        lambda x, k, y: wl.linear_softmax_cross_entropy(
            x, k, y, chunk_size=128
        ).compute()
    )
    naive = temporary(
        lambda x, k, y: optax.softmax_cross_entropy_with_integer_labels(x @ k, y).mean()
    )
    # Two chunks of logits, 4 MiB each, and a product of the kernel's size, as much.
    assert fused < 0.15 * naive


@pytest.mark.parametrize(
    ("platform", "tokens", "features", "expected"),
    [
        ("cpu", 4096, 512, 512),
        ("cpu", 10, 512, 10),
        ("tpu", 8192, 4096, 512),
        ("tpu", 8192, 8192, 1024),
        ("tpu", 8192, 512, 512),
        ("cuda", 32768, 2560, 1024),
        ("cuda", 32768, 4096, 2048),
        ("cuda", 32768, 64, 1024),
        ("rocm", 32768, 65536, 8192),
        ("cuda", 0, 64, 0),
    ],
)
def test_chunk_size_by_device_and_tokens(platform, tokens, features, expected):
    assert _chunks.chunk_size_of(Device(platform), tokens, features) == expected


def lowered(platform, num_devices=1):
    arrays = data(batch=8, size=512)
    step = jax.value_and_grad(mean_of(arrays), (0, 1, 2))
    return jax.jit(step).trace(*parts_of(arrays)).lower(lowering_platforms=(platform,))


def test_platform_decides_and_not_the_host():
    """The real transpose, and the chunk, are of the platform that is lowered for."""
    cpu, cuda, tpu = map(str, (lowered(p).as_text() for p in ("cpu", "cuda", "tpu")))
    assert "optimization_barrier" in cpu
    assert "optimization_barrier" not in cuda + tpu
    assert "tensor<512x37xf32>" in cpu
    assert "tensor<1024x37xf32>" in cuda
    assert "tensor<1024x37xf32>" not in tpu


# ---------------------------------------------- one cotangent for each token, or more


def transformed_means(f):
    """Scalars of the three parts, made with `jax.vmap` in various ways."""
    arrays = data()
    y, m, w = arrays["labels"], arrays["where"], arrays["weights"]
    factors = np.arange(1.0, B + 1)

    def loss(x, k, b, y, m, w):
        return f({"labels": y}, where=m, weights=w)(x, k, b)

    by_sample = jax.vmap(loss, (0, None, None, 0, 0, 0))
    by_token = jax.vmap(by_sample, (1, None, None, 1, 1, 1))
    by_kernel = jax.vmap(loss, (None, 0, 0, None, None, 0))
    return {
        "vmap": lambda x, k, b: by_sample(x, k, b, y, m, w) @ factors,
        "vmap of vmap": lambda x, k, b: (by_token(x, k, b, y, m, w) @ factors).sum(),
        "vmap over kernels": lambda x, k, b: (
            by_kernel(
                x[0],
                *(jnp.stack([a, a + 1, a * 2, -a]) for a in (k, b)),
                y[0],
                m[0],
                w[:, 0],
            )
            @ factors
        ),
        "scan": lambda x, k, b: jax.lax.scan(
            lambda so_far, a: (so_far + loss(a[0], k, b, *a[1:]), None),
            0.0,
            (x, y, m, w),
        )[0],
        "checkpoint": jax.checkpoint(lambda x, k, b: loss(x, k, b, y, m, w)),
    }


@pytest.mark.parametrize("name", transformed_means(mean_of))
def test_transformations_are_those_of_plain_logits(name):
    mean, plain = (
        transformed_means(f)[name]
        for f in (functools.partial(mean_of, chunk_size=5, **OPTIONS["all"]),
                  functools.partial(plain_mean_of, **OPTIONS["all"]))
    )  # fmt: skip
    parts = parts_of(data())
    assert_close(gradients(mean)(*parts), gradients(plain)(*parts), rtol=5e-6)


def test_gradients_of_samples_are_each_samples_own():
    """`vmap` of `grad`: a kernel's gradient for each, or only the features'."""
    arrays = data()
    outcomes = []
    for f in (functools.partial(mean_of, chunk_size=5), plain_mean_of):

        def mean(x, k, b, y, m, f=f):
            return f({"labels": y}, where=m)(x, k, b)

        dims = (0, None, None, 0, 0)
        given = (*parts_of(arrays), arrays["labels"], arrays["where"])
        outcomes.append([
            jax.jit(jax.vmap(jax.value_and_grad(mean, argnums), dims))(*given)
            for argnums in (0, (0, 1, 2))
        ])  # fmt: skip
    assert outcomes[0][1][1][1].shape == (B, D, V)
    assert_close(*outcomes, rtol=5e-6)


def test_segments_are_the_oracles_samples():
    arrays = data()
    ids = np.repeat(np.arange(8) - 1, 3).reshape(B, L)  # -1 and 6 are padding
    factors = np.arange(1.0, 7.0)

    def mean(features, kernel, bias):
        return factors @ wl.linear_softmax_cross_entropy(
            features, kernel, arrays["labels"], bias=bias, where=arrays["where"],
            weights=arrays["weights"], segment_ids=ids, num_segments=6, chunk_size=7,
        ).compute()  # fmt: skip

    outcome = gradients(mean)(*parts_of(arrays))
    each = [oracle(arrays, arrays["where"] & (ids == i)) for i in range(6)]
    expected = jax.tree.map(lambda *x: np.tensordot(factors, np.stack(x), 1), *each)
    assert_close(outcome, expected)


@pytest.mark.parametrize("samples", [unasked(False), True])
def test_jvp_and_second_derivatives_are_those_of_plain_logits(samples):
    rng = np.random.default_rng(1)
    arrays = data()
    parts = parts_of(arrays)
    tangents = tuple(rng.normal(size=x.shape).astype(np.float32) for x in parts)
    keywords = {"where": arrays["where"], **OPTIONS["all"]}

    def derivatives(f):
        mean = transformed_means(f)["vmap"] if samples else f(arrays, **keywords)
        gradient = jax.grad(mean, (0, 1, 2))

        def slope(*parts):
            return jax.jvp(mean, parts, tangents)[1]

        def product(*parts):
            return sum(map(jnp.vdot, gradient(*parts), tangents))

        return jax.jit(lambda *parts: (
            jax.jvp(mean, parts, tangents),
            jax.jvp(gradient, parts, tangents)[1],  # forward over reverse
            jax.grad(product, (0, 1, 2))(*parts),
            jax.grad(slope, (0, 1, 2))(*parts),
            jax.jvp(slope, parts, tangents),
        ))(*parts)  # fmt: skip

    fused = functools.partial(mean_of, chunk_size=5)
    assert_close(derivatives(fused), derivatives(plain_mean_of), rtol=1e-5)


def test_tangents_where_nothing_counts_may_be_nan():
    arrays = data()
    ones = np.ones_like(arrays["features"])
    tangent = np.where(arrays["where"][..., None], ones, np.nan)
    mean = mean_of(arrays, where=arrays["where"])
    _, change = jax.jvp(
        lambda x: mean(x, *parts_of(arrays)[1:]), parts_of(arrays)[:1], (tangent,)
    )
    gradient = jax.grad(mean)(*parts_of(arrays))
    assert_close(change, np.sum(gradient), rtol=5e-6)


def test_without_jit():
    arrays = data()
    mean = mean_of(arrays, where=arrays["where"])
    with jax.disable_jit():
        outcome = jax.value_and_grad(mean, (0, 1, 2))(*parts_of(arrays))
    assert_close(outcome, gradients(mean)(*parts_of(arrays)))


def test_constants_may_be_numpys_outside_of_a_jit():
    """jax 0.10 hands them to a primitive as they are."""
    arrays = data()
    ids = arrays["labels"] % 2

    def mean(features):
        return mean_of(arrays, where=arrays["where"])(
            features, arrays["kernel"], arrays["bias"]
        )

    def sum_of_means(features):
        return wl.linear_softmax_cross_entropy(
            features, arrays["kernel"], arrays["labels"], segment_ids=ids,
            num_segments=2,
        ).compute().sum()  # fmt: skip

    for function in (mean, sum_of_means):
        expected = jax.jit(jax.grad(function))(arrays["features"])
        for eager in (jax.grad(function), jax.grad(jax.checkpoint(function))):
            assert_close(eager(arrays["features"]), expected)


def test_precision_of_products_is_the_callers():
    """Also where the loss is called in a context that is gone when it is lowered."""
    arrays = data()

    def step(*parts):
        with jax.default_matmul_precision("highest"):
            return mean_of(arrays)(*parts)

    text = jax.jit(step).lower(*parts_of(arrays)).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text


# ----------------------------------------------------------------------- microbatches


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["features"] @ params["inner"])
    return wl.linear_softmax_cross_entropy(
        hidden, params["kernel"], batch["labels"], lengths=batch["lengths"],
        chunk_size=5, vocab_axis_name=batch.get("axis"),
    )  # fmt: skip


@functools.cache
def model():
    arrays = data(batch=8, features=8, vocab=40)
    params = {"inner": np.eye(8, dtype=np.float32) * 0.7, "kernel": arrays["kernel"]}
    batch = {"features": arrays["features"], "labels": arrays["labels"],
             "lengths": np.array([6, 0, 3, 1, 0, 0, 2, 5])}  # fmt: skip
    return params, batch


@functools.cache
def expected_step():
    params, batch = model()
    return jax.jit(wl.value_and_grad(loss_fn))(params, batch)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_microbatches_are_the_batch(k):
    step = jax.jit(wl.value_and_grad(loss_fn, num_microbatches=k))
    assert_close(step(*model()), expected_step())


# ----------------------------------------------------------------------------- devices


def line():
    return Mesh(np.array(jax.devices()[:8]), ("data",))


def grid():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "vocab"))


def put_on(mesh, x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


SHARDINGS = {
    "tokens": (line, P("data"), P()),
    "tokens on some": (grid, P("data"), P()),
    "tokens and vocabulary": (grid, P("data"), P(None, "vocab")),
    "tokens and features (FSDP)": (line, P("data"), P("data")),
}


@needs.devices
@pytest.mark.parametrize("name", SHARDINGS)
def test_sharded_tokens_stay_where_they_are(name):
    mesh, rows, of_kernel = SHARDINGS[name]
    params, batch = model()
    put = functools.partial(put_on, mesh())
    params = {
        "inner": put(params["inner"], P()),
        "kernel": put(params["kernel"], of_kernel),
    }
    batch = {key: put(x, rows) for key, x in batch.items()}
    step = jax.jit(wl.value_and_grad(loss_fn)).lower(params, batch).compile()
    assert_close(step(params, batch), expected_step())

    text = step.as_text()
    moves = "all-gather|all-to-all|collective-permute"
    moved = re.findall(rf"= (\S+) (?:{moves})(?:-start)?\(.*", text)
    if "FSDP" in name:  # the kernel, once
        assert [one[:9] for one in moved] == ["f32[8,40]"]
    elif "some" in name:  # the axis left over does its share, and hands back gradients
        assert {one[:10] for one in moved} == {"f32[8,6,8]"}
    else:
        assert not moved
    assert not re.search(rf" ({moves})(-start)?\(", loops(text))
    in_loops = [line for line in loops(text).splitlines() if " all-reduce(" in line]
    if "vocab" not in name:
        assert not in_loops


@needs.devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_tokens(check_vma):
    step = jax.shard_map(
        wl.value_and_grad(loss_fn, axis_name="data"),
        mesh=line(), in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma,
    )  # fmt: skip
    compiled = jax.jit(step).lower(*model()).compile()
    assert_close(compiled(*model()), expected_step())
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())


@needs.devices
def test_pmap():
    params, batch = model()
    step = jax.pmap(
        wl.value_and_grad(loss_fn, axis_name="data"),
        axis_name="data", in_axes=(None, 0), devices=jax.devices()[:8],
    )  # fmt: skip
    rows = jax.tree.map(lambda x: x[:, None], batch)
    outcome = jax.tree.map(lambda x: x[0], step(params, rows))
    assert_close(outcome, expected_step())


VOCAB_SPECS = {"inner": P(), "kernel": P(None, "vocab")}


@needs.devices
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_vocabulary(check_vma, num_microbatches):
    def loss(params, batch):
        return loss_fn(params, batch | {"axis": "vocab"})

    step = jax.shard_map(
        wl.value_and_grad(loss, axis_name="data", num_microbatches=num_microbatches),
        mesh=grid(),
        in_specs=(VOCAB_SPECS, P("data")),
        out_specs=(P(), VOCAB_SPECS),
        check_vma=check_vma,
    )
    compiled = jax.jit(step).lower(*model()).compile()
    assert_close(compiled(*model()), expected_step(), rtol=5e-6)
    # No logits, and no kernel.
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())


def vocab_mean(arrays, samples, **options):
    def mean(features, kernel, bias, axis=None):
        loss = functools.partial(
            wl.linear_softmax_cross_entropy,
            chunk_size=5,
            vocab_axis_name=axis,
            **options,
        )
        if samples:
            loss = wl.per_sample(loss)
        m = loss(features, kernel, arrays["labels"], bias=bias, where=arrays["where"])
        factors = jnp.arange(1.0, 1 + m.total.size).reshape(m.total.shape)
        return (factors * m.compute()).sum()

    return mean


@needs.devices
@pytest.mark.parametrize(
    ("where", "samples"), one_of_each(["inside", "outside"], [False, True])
)
def test_sharded_vocabulary_with_all_options(samples, where):
    arrays = data(vocab=40)
    mean = vocab_mean(arrays, samples, **OPTIONS["all"])
    expected = gradients(mean)(*parts_of(arrays))
    specs = (P(), P(None, "vocab"), P("vocab"))
    mesh = Mesh(np.array(jax.devices()[:4]), ("vocab",))
    mean = functools.partial(mean, axis="vocab")
    for check_vma in (True, False) if where == "inside" else (True,):
        over = functools.partial(
            jax.shard_map, mesh=mesh, in_specs=specs, check_vma=check_vma
        )
        if where == "inside":
            step = over(jax.value_and_grad(mean, (0, 1, 2)), out_specs=(P(), specs))
        else:
            step = jax.value_and_grad(over(mean, out_specs=P()), (0, 1, 2))
        assert_close(jax.jit(step)(*parts_of(arrays)), expected, rtol=5e-6)
        tangents = parts_of(data(vocab=40, seed=1))
        change = jax.jit(over(
            lambda *a: jax.jvp(mean, a[:3], a[3:])[1], in_specs=specs * 2, out_specs=P()
        ))(*parts_of(arrays), *tangents)  # fmt: skip
        plain = sum(map(np.vdot, expected[1], tangents))
        assert_close(change, plain, rtol=1e-5)


@needs.devices
def test_sharded_vocabulary_has_no_second_derivative():
    arrays = data(vocab=40)
    mean = functools.partial(vocab_mean(arrays, samples=False), axis="vocab")
    hessian = jax.shard_map(
        jax.hessian(mean), mesh=Mesh(np.array(jax.devices()[:4]), ("vocab",)),
        in_specs=(P(), P(None, "vocab"), P("vocab")), out_specs=P(),
    )  # fmt: skip
    # The docstring says that there is none: it is an error, and no wrong number.
    with pytest.raises(NotImplementedError, match="vocab_axis_name"):
        hessian(*parts_of(arrays))


@needs.devices
def test_explicit_sharding():
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)
    params, batch = model()
    put = functools.partial(put_on, mesh)
    for of_kernel in (P(), P(None, "vocab"), P("vocab")):
        spread = {
            "inner": put(params["inner"], P()),
            "kernel": put(params["kernel"], of_kernel),
        }
        rows = {key: put(x, P("data")) for key, x in batch.items()}
        loss, grads = jax.jit(wl.value_and_grad(loss_fn))(spread, rows)
        assert_close((loss, grads), expected_step())
        sharding = spread["kernel"].sharding
        assert grads["kernel"].sharding.is_equivalent_to(sharding, ndim=2)


# ------------------------------------------------------- compiled for what is not here


@needs.libtpu
@pytest.mark.parametrize(("kernel", "gib"), [("bfloat16", 2.5), ("float32", 1.5)])
def test_memory_on_tpu(monkeypatch, kernel, gib):
    """8192 tokens of 4096 features and 128256 classes, beside 3.9 GiB of logits."""
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)

    def mean(features, kernel, labels):
        return wl.linear_softmax_cross_entropy(features, kernel, labels).compute()

    step = jax.jit(jax.value_and_grad(mean, (0, 1))).trace(
        array((8192, 4096), jnp.bfloat16),
        array((4096, 128256), jnp.dtype(kernel)),
        array((8192,), jnp.int32),
    )
    memory = step.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < gib * 2**30


# ---------------------------------------------------------------------------- bad input


BAD = {
    "transposed kernel": ({"kernel": np.ones((V, D), np.float32)}, "kernel"),
    "kernel of one axis": ({"kernel": np.ones(D, np.float32)}, "kernel"),
    "integer features": ({"features": np.ones((B, L, D), np.int32)}, "features"),
    "no feature axis": ({"features": np.float32(1)}, "features"),
    "integer kernel": ({"kernel": np.ones((D, V), np.int32)}, "kernel"),
    "labels of another shape": ({"labels": np.ones((B,), np.int32)}, "labels"),
    "one-hot labels": ({"labels": np.ones((B, L, V), np.float32)}, "labels"),
    "bias of another size": ({"bias": np.ones(V + 1, np.float32)}, "bias"),
    "bias of one": ({"bias": np.ones(1, np.float32)}, "bias"),
    "mask of numbers": ({"where": np.ones((B, L), np.float32)}, "where"),
    "weights of columns": ({"weights": np.ones(L, np.float32)}, "weights"),
    "lengths of floats": ({"lengths": np.ones(B, np.float32)}, "lengths"),
    "segments without a number": (
        {"segment_ids": np.ones((B, L), np.int32)},
        "segment",
    ),
    "smoothing past 1": ({"label_smoothing": 1.5}, "label_smoothing"),
    "a soft cap of 0": ({"softcap": 0.0}, "softcap"),
    "a chunk of 0": ({"chunk_size": 0}, "chunk_size"),
    "half a chunk": ({"chunk_size": 0.5}, "chunk_size"),
    "a soft cap without end": ({"softcap": np.inf}, "softcap"),
    "a factor of nothing": ({"z_loss": np.nan}, "z_loss"),
    "smoothing by name": ({"label_smoothing": "some"}, "label_smoothing"),
    "an axis by number": ({"vocab_axis_name": 0}, "vocab_axis_name"),
    "no classes": ({"kernel": np.ones((D, 0), np.float32)}, "kernel"),
    "no features": (
        {
            "features": np.ones((B, L, 0), np.float32),
            "kernel": np.ones((0, V), np.float32),
        },
        "kernel",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changed, argument = BAD[name]
    good = {key: data()[key] for key in ("features", "kernel", "labels")}
    with pytest.raises(AssertionError, match=f"`{argument}"):
        wl.linear_softmax_cross_entropy(**good | changed)


def test_vmapped_axis_is_no_vocabulary():
    arrays = data(vocab=40)

    def mean(kernel):
        return wl.linear_softmax_cross_entropy(
            arrays["features"], kernel, arrays["labels"], vocab_axis_name="vocab"
        ).compute()

    shards = np.stack(np.split(arrays["kernel"], 4, axis=1))
    # Only devices can share a vocabulary: what else is an error, and no wrong number.
    with pytest.raises(NotImplementedError, match="vocab_axis_name"):
        jax.vmap(mean, axis_name="vocab")(shards)
