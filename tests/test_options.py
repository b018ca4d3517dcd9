"""Options: odd and fractional ones, and traced ones, which compile once for all."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wloss_jax as wl

from .oracle import grid, reference
from .oracle.tables import every_third

L, D = 5, 3
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(2, L)).astype(np.float32)
SIGNS = np.sign(Y)
VECTORS = rng.normal(size=(3, L, D)).astype(np.float32)
CLASSES = rng.integers(0, D, L)
LOG_PROBS = np.log(rng.dirichlet(np.ones(D), L)).astype(np.float32)

# Each numeric option: its loss, its arrays, a value in the middle of its range.
OPTIONS = {
    "delta": (wl.huber_loss, (X, Y), 0.7),
    "quantile": (wl.quantile_loss, (X, Y), 0.3),
    "epsilon of a distance": (wl.cosine_distance, tuple(VECTORS[:2]), 0.1),
    "eps of rates": (
        lambda x, y, eps, **kw: wl.poisson_nll(x, y, log_input=False, eps=eps, **kw),
        (np.abs(X), CLASSES),
        0.1,
    ),
    "eps of variances": (wl.gaussian_nll, (X, Y, np.abs(Y)), 0.1),
    "alpha": (wl.sigmoid_focal_loss, (X, SIGNS > 0), 0.25),
    "beta": (wl.smooth_l1_loss, (X, Y), 0.7),
    "pos_weight": (wl.sigmoid_binary_cross_entropy, (X, SIGNS > 0), 3.0),
    "margin of distances": (wl.hinge_embedding_loss, (np.abs(X), SIGNS), 0.5),
    "margin of scores": (wl.margin_ranking_loss, (X, Y, SIGNS), 0.5),
    "margin of angles": (wl.cosine_embedding_loss, (*VECTORS[:2], SIGNS), -0.2),
    "margin of classes": (wl.multi_margin_loss, (VECTORS[0], CLASSES), 0.5),
    "label_smoothing of probabilities": (
        wl.softmax_cross_entropy,
        (VECTORS[0], np.eye(D)[CLASSES]),
        0.1,
    ),
    "gamma": (wl.sigmoid_focal_loss, (X, SIGNS > 0), 1.5),
    "label_smoothing": (
        wl.softmax_cross_entropy_with_integer_labels,
        (VECTORS[0], CLASSES),
        0.1,
    ),
    "z_loss": (
        wl.softmax_cross_entropy_with_integer_labels,
        (VECTORS[0], CLASSES),
        0.01,
    ),
    "epsilon": (wl.poly_loss_cross_entropy, (VECTORS[0], np.eye(D)[CLASSES]), -1.0),
    "norm_degree": (wl.triplet_margin_loss, tuple(VECTORS), 3.0),
    "margin": (wl.triplet_margin_loss, tuple(VECTORS), 0.5),
    "eps": (wl.triplet_margin_loss, tuple(VECTORS), 0.1),
}


def mean(name, value, **keywords):
    loss, arrays, _ = OPTIONS[name]
    option = {name.split(" ")[0]: value}
    return loss(*map(jnp.asarray, arrays), **option, **keywords).compute()


@pytest.mark.parametrize("name", every_third(OPTIONS, 1))
def test_a_traced_option_is_as_good_as_a_number(name):
    values = OPTIONS[name][2] * np.array([1, 0.5, 0.9], np.float32)
    numbers = [mean(name, float(value)) for value in values]
    traced = [mean(name, jnp.asarray(value)) for value in values]
    mapped = jax.vmap(lambda value: mean(name, value))(values)
    # One power or logarithm in place of another: a few roundings of float32.
    np.testing.assert_allclose(traced, numbers, rtol=2e-6)
    np.testing.assert_allclose(mapped, numbers, rtol=2e-6)


@pytest.mark.parametrize("name", every_third(OPTIONS))
def test_what_is_masked_has_no_part_in_the_gradient_of_an_option(name):
    loss, arrays, middle = OPTIONS[name]
    option = name.split(" ")[0]

    def padded(array):
        fill = np.nan if np.issubdtype(array.dtype, np.floating) else array[0]
        return np.concatenate([array, np.full_like(array[:2], fill)])

    def slope(arrays, **keywords):
        return jax.grad(
            lambda v: loss(
                *map(jnp.asarray, arrays), **{option: v}, **keywords
            ).compute()
        )(middle)

    masked = slope(list(map(padded, arrays)), where=np.arange(L + 2) < L)
    np.testing.assert_allclose(masked, slope(arrays), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", every_third(OPTIONS, 2))
def test_a_traced_option_is_differentiated_and_never_compiled_again(name):
    middle = OPTIONS[name][2]
    step = 1e-2 * abs(middle)
    gradient = jax.jit(jax.grad(lambda value: mean(name, value)))
    slope = gradient(jnp.float32(middle))
    with jax.no_tracing():
        gradient(jnp.float32(middle + step))
    difference = mean(name, middle + step) - mean(name, middle - step)
    # A central difference of float32 means of size 1, over a step of 1e-3 or more.
    np.testing.assert_allclose(slope, difference / (2 * step), rtol=0.02, atol=2e-3)


def test_a_scheduled_option_under_per_sample_and_value_and_grad():
    def loss(params, batch):
        per_sample = wl.per_sample(wl.huber_loss)
        return per_sample(batch["x"] * params, batch["y"], delta=batch["delta"]).merge()

    x, y = VECTORS[0], VECTORS[1]
    step = jax.jit(
        lambda d: wl.value_and_grad(
            lambda p, b: loss(p, {**b, "delta": d}), num_microbatches=5
        )(jnp.float32(2), {"x": x, "y": y})
    )
    for delta in (0.1, 0.7):
        pairs = zip(2 * x.ravel(), y.ravel(), strict=True)
        expected = np.mean([reference.huber_loss(*p, delta=delta) for p in pairs])
        np.testing.assert_allclose(step(delta)[0].compute(), expected, rtol=1e-6)


@pytest.mark.parametrize("degree", [1, 1.5, 2, 3, 4])
def test_the_norm_of_any_degree_is_that_of_absolute_values(degree):
    anchors, positives, negatives = VECTORS
    m = wl.triplet_margin_loss(anchors, positives, negatives, norm_degree=degree)
    expected = [
        reference.triplet_margin_loss(*row, norm_degree=degree)
        for row in zip(*VECTORS.astype(np.float64), strict=True)
    ]
    np.testing.assert_allclose(m.compute(), np.mean(expected), rtol=1e-6)
    same = jax.grad(
        lambda x: wl.triplet_margin_loss(
            x, anchors, anchors + 3, norm_degree=degree, margin=20.0
        ).compute()
    )(jnp.asarray(anchors))
    assert np.isfinite(same).all()


def test_every_numeric_option_is_here():
    options = {
        name
        for case in grid.CASES
        for name, parameter in inspect.signature(
            getattr(case.loss, "func", case.loss)
        ).parameters.items()
        if isinstance(parameter.default, float)
    }
    assert options - {"log_epsilon"} <= {name.split(" ")[0] for name in OPTIONS}


@pytest.mark.parametrize(
    ("loss", "first", "options"),
    [
        (wl.binary_cross_entropy, np.float32([0.2, 0.7]), {}),
        (wl.sigmoid_binary_cross_entropy, np.float32([0.2, 0.7]), {"pos_weight": 3.0}),
        (wl.sigmoid_focal_loss, np.float32([0.2, 0.7]), {"alpha": 0.3}),
    ],
)
def test_yes_or_no_labels_may_be_bools(loss, first, options):
    labels = np.array([True, False])
    bools = loss(first, labels, **options)
    assert bools.compute() == loss(first, labels.astype(int), **options).compute()
