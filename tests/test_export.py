"""Programs shipped by `jax.export`, of a batch and a length that are left open.

Each is lowered once and called at several sizes, where it must say what the same
function says when it is compiled for that size.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import wloss_jax as wl
from tests.oracle import grid
from tests.oracle.tables import one_of_each

EXPORTED_AT = 4, 5
SIZES = [(4, 5), (7, 16), (1, 1)]


def exported(function, arguments, sizes=EXPORTED_AT):
    """Exports with the first axes of each array open, and loads what was saved."""
    symbols = export.symbolic_shape("b, l")

    def left_open(array):
        shape = list(array.shape)
        for axis in range(min(2, array.ndim)):
            if shape[axis] == sizes[axis]:
                shape[axis] = symbols[axis]
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype)

    program = export.export(jax.jit(function))(*map(left_open, arguments))
    if importlib.util.find_spec("flatbuffers"):
        program = export.deserialize(program.serialize())
    return program


def data_of(case, rows, size, seed=0):
    """Arrays of ``[rows, size]`` elements, and all that says what counts."""
    rng = np.random.default_rng(seed)
    lengths = [size, *rng.integers(0, size + 1, rows - 1)]
    arrays, keywords = grid.pad(grid.ragged(case, seed, lengths), size)
    segment_ids = rng.integers(-1, 3, (rows, size)).astype(np.int32)
    return [*arrays, *keywords.values(), segment_ids]


@pytest.mark.parametrize(
    ("case", "size"), one_of_each(grid.CASES, SIZES, every=5), ids=repr
)
def test_a_loss_says_at_any_size_what_it_says_when_compiled_for_it(case, size):
    num_arrays = len(data_of(case, *EXPORTED_AT)) - 4

    def everything(*given):
        arrays = given[:num_arrays]
        lengths, where, weights, segment_ids = given[num_arrays:]

        def mean(first):
            m = case.loss(
                first, *arrays[1:], lengths=lengths, where=where, weights=weights
            )
            return m.compute(), m.weight

        (value, weight), grads = jax.value_and_grad(mean, has_aux=True)(arrays[0])
        by_length = case.loss(*arrays, lengths=lengths)
        by_sample = wl.per_sample(case.loss)(*arrays, where=where, lengths=lengths)
        segments = case.loss(*arrays, segment_ids=segment_ids, num_segments=3)
        return [
            value,
            weight,
            grads,
            *jax.tree.leaves((by_length, by_sample, segments)),
        ]

    program = exported(everything, data_of(case, *EXPORTED_AT))
    given = data_of(case, *size, seed=1)
    expected = jax.jit(everything)(*given)
    for a, b in zip(program.call(*given), expected, strict=True):
        # The sums are in another order: some roundings of 112 terms.
        np.testing.assert_allclose(a, b, rtol=5e-6, atol=2e-6)


def test_what_is_made_of_losses_is_exported_too():
    def step(w, x, lengths):
        def loss_fn(w, batch):
            return wl.squared_error(w * batch["x"], 1 + batch["x"], lengths=batch["n"])

        batch = {"x": x, "n": lengths}
        mean, grads = wl.value_and_grad(loss_fn)(w, batch)
        by_rmse = wl.value_and_grad(loss_fn, combine=lambda m, w: m.compute() ** 0.5)
        return mean.compute(), grads, *by_rmse(w, batch)

    def figures(w, x, lengths):
        by_sample = wl.per_sample(wl.weighted_mean)(w * x, lengths=lengths)
        running = wl.RunningMean.zeros().update(by_sample.merge())
        weighed = by_sample.reweight(wl.size_power(0.5)).merge()
        bias = wl.mean_of_means_bias(by_sample)
        mask = wl.length_mask(lengths, x.shape[1]) & wl.observed_mask(x)
        return running.compute(), weighed.compute(), bias, mask

    rng = np.random.default_rng(0)

    def data_at(rows, size):
        x = rng.standard_normal((rows, size)).astype(np.float32)
        lengths = rng.integers(1, size + 1, rows).astype(np.int32)
        return jnp.float32(0.5), x, lengths

    for function in (step, figures):
        program = exported(function, data_at(*EXPORTED_AT))
        for rows, size in SIZES:
            given = data_at(rows, size)
            for a, b in zip(program.call(*given), function(*given), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def test_one_program_for_every_platform():
    def loss(x, labels):
        m = wl.softmax_cross_entropy_with_integer_labels(x, labels, ignore_index=-1)
        return jax.grad(lambda x: wl.absolute_error(x, 0 * x).compute())(x), m.compute()

    (b,) = export.symbolic_shape("b")
    specs = (
        jax.ShapeDtypeStruct((b, 3), "float32"),
        jax.ShapeDtypeStruct((b,), "int32"),
    )
    program = export.export(jax.jit(loss), platforms=("cpu", "cuda", "tpu"))(*specs)
    x, labels = jnp.zeros((4, 3)), jnp.array([0, 1, -1, 2])
    np.testing.assert_allclose(program.call(x, labels)[1], np.log(3), rtol=1e-6)


FEATURES, KERNEL = np.ones((4, 5, 2), np.float32), np.ones((2, 3), np.float32)
LABELS = np.zeros((4, 5), np.int32)
LINEAR = {
    "labels": (wl.linear_softmax_cross_entropy, LABELS),
    "log-probabilities": (wl.linear_log_probs, LABELS),
    "distributions": (
        wl.linear_softmax_cross_entropy_with_probabilities,
        np.ones((4, 5, 3), np.float32),
    ),
    "of a user": (wl.linear_masked(lambda x, y: x.sum(-1) - y[..., 0]), FEATURES),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_loss_that_counts_its_chunks_says_that_sizes_must_be_known(name):
    loss, labels = LINEAR[name]
    with pytest.raises(
        ValueError, match=r"^`features` has size b x l x 2, which is op"
    ):
        exported(loss, (FEATURES, KERNEL, labels))


def test_microbatches_of_an_open_batch_are_refused_by_name():
    def scaled(w, x):
        return wl.value_and_grad(
            lambda w, x: wl.weighted_mean(w * x), num_microbatches=2
        )(w, x)[1]

    with pytest.raises(
        ValueError, match=r"^`num_microbatches` has size b, which is open"
    ):
        exported(scaled, (jnp.float32(1), FEATURES[..., 0]))


def test_shapes_that_do_not_line_up_are_named_by_their_symbols():
    def misaligned(x, where):
        return wl.weighted_mean(x, where=where).compute()

    with pytest.raises(ValueError, match=r"^`where` has shape \(b, 1\) and the loss"):
        exported(misaligned, (LABELS.astype("f"), np.ones((4, 1), bool)))
