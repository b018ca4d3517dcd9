"""Classes that are out, by -infinity or by a mask: as if they had never been there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wloss_jax as wl
from tests.oracle.tables import every_third, one_of_each

N, V = 4, 5
IN = np.array([True, True, False, True, False])
rng = np.random.default_rng(0)
SCORES = rng.normal(size=(N, V)).astype(np.float32)
LABELS = np.array([0, 1, 3, 1])
DENSE = np.zeros((N, V), np.float32)
DENSE[:, IN] = rng.dirichlet(np.ones(3), N)
DENSE[0, IN] = [0, 1, 0]  # 0 * log(0) of a class that is in, too

INTEGERS = {
    "integer": (wl.softmax_cross_entropy_with_integer_labels, {}),
    "smoothed": (
        wl.softmax_cross_entropy_with_integer_labels,
        {"label_smoothing": 0.1, "z_loss": 0.01},
    ),
    "hinge": (wl.multiclass_hinge_loss, {}),
    "perceptron": (wl.multiclass_perceptron_loss, {}),
    "sparsemax": (wl.multiclass_sparsemax_loss, {}),
    "multi margin": (wl.multi_margin_loss, {"p": 2}),
    "nll": (wl.nll_loss, {}),
}
DISTRIBUTIONS = {
    "dense": (wl.softmax_cross_entropy, {}),
    "safe": (wl.safe_softmax_cross_entropy, {}),
    "poly": (wl.poly_loss_cross_entropy, {"epsilon": 1.5}),
    "dense smoothed": (wl.softmax_cross_entropy, {"label_smoothing": 0.1}),
    "multilabel": (wl.multilabel_soft_margin_loss, {}),
}


def log_softmaxed(loss, log_targets=False):
    def of_logits(logits, targets, **options):
        targets = jnp.log(targets) if log_targets else targets
        return loss(jax.nn.log_softmax(logits), targets, **options)

    return of_logits


DIVERGENCES = {
    "kl": (log_softmaxed(wl.kl_divergence), {}),
    "kl of logarithms": (
        log_softmaxed(wl.kl_divergence_with_log_targets, log_targets=True),
        {},
    ),
    "generalized kl": (log_softmaxed(wl.generalized_kl_divergence), {}),
}
LOSSES = INTEGERS | DISTRIBUTIONS | DIVERGENCES
every = pytest.mark.parametrize("name", LOSSES)
with_mask = pytest.mark.parametrize("name", INTEGERS | DISTRIBUTIONS)


def labels_of(name, out=False):
    """The labels among all classes, and among those that are in."""
    labels = np.where(out & (np.arange(N) == 0), 2, LABELS)
    if name in INTEGERS:
        return labels, np.cumsum(IN)[labels] - 1
    dense = np.eye(V, dtype=np.float32)[labels] if out else DENSE
    return dense, dense[:, IN]


def expected(name):
    loss, options = LOSSES[name]
    _, labels = labels_of(name)
    return jax.value_and_grad(lambda x: loss(x, labels, **options).compute())(
        jnp.asarray(SCORES[:, IN])
    )


def assert_same(result, desired, rtol=2e-6):
    (value, gradient), (loss, slope) = result, desired
    # Sums over 5 classes in place of 3, in another order.
    np.testing.assert_allclose(value, loss, rtol=rtol)
    np.testing.assert_allclose(gradient[:, IN], slope, rtol=rtol, atol=1e-7)
    assert not np.any(gradient[:, ~IN])


@pytest.mark.parametrize("name", every_third(LOSSES))
def test_a_logit_of_minus_infinity_is_not_there(name):
    loss, options = LOSSES[name]
    labels, _ = labels_of(name)
    logits = jnp.where(IN, SCORES, -jnp.inf)

    def mean(x):
        return loss(x, labels, **options).compute()

    desired = expected(name)
    assert_same(jax.value_and_grad(mean)(logits), desired)
    tangent = rng.normal(size=(N, V)).astype(np.float32)
    value, slope = jax.jvp(mean, (logits,), (tangent,))
    np.testing.assert_allclose(value, desired[0], rtol=2e-6)
    along = (np.asarray(desired[1]) * tangent[:, IN]).sum()
    np.testing.assert_allclose(slope, along, rtol=1e-5, atol=1e-6)
    assert np.isfinite(jax.hessian(mean)(logits)).all()


@pytest.mark.parametrize(
    ("name", "shape"), one_of_each(INTEGERS | DISTRIBUTIONS, ["V", "logits"])
)
def test_a_class_mask_says_the_same(name, shape):
    loss, options = LOSSES[name]
    labels, _ = labels_of(name)
    mask = IN if shape == "V" else np.broadcast_to(IN, (N, V))
    logits = np.where(IN, SCORES, np.nan)

    def mean(x):
        return loss(x, labels, class_mask=mask, **options).compute()

    assert_same(jax.value_and_grad(mean)(logits), expected(name))
    per_sample = wl.per_sample(loss)(logits, labels, class_mask=mask, **options)
    np.testing.assert_allclose(
        per_sample.merge().compute(), expected(name)[0], rtol=2e-6
    )


@pytest.mark.parametrize("name", every_third(LOSSES, 1))
def test_a_label_that_is_out_costs_infinity(name):
    loss, options = LOSSES[name]
    labels, _ = labels_of(name, out=True)
    logits = jnp.where(IN, SCORES, -jnp.inf)

    def costs(x):
        return wl.per_sample(loss)(x, labels, **options).compute()

    assert np.isposinf(costs(logits)).tolist() == [True, False, False, False]
    gradient = jax.grad(lambda x: costs(x).sum())(logits)
    assert np.isfinite(gradient).all()
    assert not gradient[:, ~IN].any()


@every
def test_options_and_labels_have_no_slope_where_a_label_is_out(name):
    """Neither NaN, of 0 times infinity, nor any slope by the share of such a class."""
    loss, options = LOSSES[name]
    labels, _ = labels_of(name, out=True)
    if name == "kl of logarithms":  # by the logarithms: `jnp.log` has no slope at 0
        loss, labels = log_softmaxed(wl.kl_divergence_with_log_targets), jnp.log(labels)
    moving = {k: jnp.float32(v) for k, v in options.items() if isinstance(v, float)}
    if name not in INTEGERS:
        moving["labels"] = jnp.asarray(labels)

    def total(moving):
        logits = jnp.where(IN, SCORES, -jnp.inf)
        given = {"labels": labels, **options, **moving}
        return loss(logits, given.pop("labels"), **given).total

    value, slopes = jax.value_and_grad(total)(moving)
    assert np.isposinf(value)
    assert all(np.isfinite(x).all() for x in slopes.values())
    if "labels" in slopes and name != "multilabel":
        assert not slopes["labels"][:, ~IN].any()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ["smoothed", "dense smoothed"])
def test_smoothing_of_1_takes_no_cost_from_a_label_that_is_out(name, traced):
    loss, _ = LOSSES[name]
    labels, _ = labels_of(name, out=True)
    logits = jnp.where(IN, SCORES, -jnp.inf)
    smoothing = jnp.float32(1) if traced else 1.0
    costs = wl.per_sample(loss)(logits, labels, label_smoothing=smoothing)
    mean = -jax.nn.log_softmax(SCORES[1:, IN]).mean(-1)
    desired = [np.inf, *mean]
    # Of logits of 1, a few roundings.
    np.testing.assert_allclose(costs.compute(), desired, rtol=2e-6)


@with_mask
def test_where_all_classes_are_out_the_cost_is_infinity(name):
    loss, options = LOSSES[name]
    labels, _ = labels_of(name)
    logits = jnp.full((N, V), -jnp.inf)
    value, gradient = jax.value_and_grad(
        lambda x: loss(x, labels, **options).compute()
    )(logits)
    assert value == np.inf
    assert not gradient.any()


# The negative log-likelihood of a label looks at that class alone.
@pytest.mark.parametrize("name", sorted({*INTEGERS, *DISTRIBUTIONS} - {"nll"}))
def test_nan_that_counts_is_no_infinity_where_a_label_is_out(name):
    loss, options = LOSSES[name]
    labels, _ = labels_of(name, out=True)
    logits = jnp.where(IN, SCORES, -jnp.inf)
    wrong = logits.at[0, 1].set(jnp.nan)
    costs = wl.per_sample(loss)(wrong, labels, **options).compute()
    assert np.isnan(costs).tolist() == [True, False, False, False]
    if name in DISTRIBUTIONS:  # a share that is NaN, of a class that is out
        dense = labels_of(name)[0].copy()
        dense[0, 2] = np.nan
        costs = wl.per_sample(loss)(logits, dense, **options).compute()
        assert np.isnan(costs).tolist() == [True, False, False, False]


@pytest.mark.parametrize("label", [-1, V, 2**31 - 1])
@pytest.mark.parametrize(
    "loss",
    [
        wl.softmax_cross_entropy_with_integer_labels,
        wl.nll_loss,
        wl.multi_margin_loss,
        lambda x, labels, **options: wl.linear_softmax_cross_entropy(
            x, jnp.eye(V), labels, **options
        ),
    ],
)
def test_a_label_out_of_range_is_there_whatever_the_weights_of_classes(loss, label):
    labels = LABELS.copy()
    labels[2] = label
    class_weights = np.float32([0, 1, 1, 1, 0])  # what is next to it weighs nothing
    assert np.isnan(loss(SCORES, labels, class_weights=class_weights).compute())


def test_a_class_mask_of_other_axes():
    logits, dense = jnp.moveaxis(SCORES, 0, 1), jnp.moveaxis(DENSE, 0, 1)
    m = wl.softmax_cross_entropy(
        logits, dense, axis=0, class_mask=jnp.broadcast_to(IN[:, None], (V, N))
    )
    np.testing.assert_allclose(m.compute(), expected("dense")[0], rtol=2e-6)


@pytest.mark.parametrize("mask", [np.ones(V - 1, bool), np.ones((V, N), bool)])
def test_a_class_mask_of_another_shape_is_named(mask):
    with pytest.raises(ValueError, match="`class_mask` has shape"):
        wl.softmax_cross_entropy(SCORES, DENSE, class_mask=mask)
    with pytest.raises(TypeError, match="`class_mask` is float32"):
        wl.softmax_cross_entropy(SCORES, DENSE, class_mask=np.ones(V, np.float32))


@pytest.mark.parametrize("loss", ["cosine", "kl", "log cosh", "generalized", "ctc"])
def test_rounding_takes_no_loss_below_0(loss):
    x = rng.normal(size=(4096, 8)).astype(np.float32)
    probabilities = jax.nn.softmax(x)
    costs = {
        "cosine": lambda: wl.per_sample(wl.cosine_distance)(x, x * 3),
        "kl": lambda: wl.per_sample(wl.kl_divergence)(
            jnp.log(probabilities), probabilities
        ),
        "log cosh": lambda: wl.per_sample(wl.log_cosh)(x * 1e-4, 0 * x),
        "generalized": lambda: wl.per_sample(wl.generalized_kl_divergence)(
            x, jnp.exp(x)
        ),
        "ctc": lambda: wl.per_sample(wl.ctc_loss)(
            jnp.zeros((64, 4, 3)).at[..., 1].add(jnp.linspace(80, 90, 64)[:, None]),
            np.zeros((64, 4)),
            np.ones((64, 1), int),
            np.zeros((64, 1)),
        ),
    }[loss]()
    assert costs.compute().min() >= 0
    assert np.isfinite(costs.reweight(wl.loss_power(0.5)).merge().compute())


def test_the_z_loss_knows_classes_that_are_out():
    """As a term of its own, and in the cross-entropy, the same."""

    def mean(x, **options):
        return wl.softmax_z_loss(x, **options).compute()

    desired = jax.value_and_grad(mean)(jnp.asarray(SCORES[:, IN]))
    logits = jnp.where(IN, SCORES, -jnp.inf)
    assert_same(jax.value_and_grad(mean)(logits), desired)
    masked = jax.value_and_grad(lambda x: mean(x, class_mask=IN))(jnp.asarray(SCORES))
    assert_same(masked, desired)
    tangents = jax.jvp(jax.grad(mean), (logits,), (jnp.ones_like(logits),))
    assert np.isfinite(tangents).all()

    labels, cross_entropy = LABELS, wl.softmax_cross_entropy_with_integer_labels
    total = cross_entropy(logits, labels, z_loss=0.5).total
    apart = cross_entropy(logits, labels).total + 0.5 * wl.softmax_z_loss(logits).total
    np.testing.assert_allclose(total, apart, rtol=1e-6)


def test_the_z_loss_of_no_class_at_all_is_0():
    logits = jnp.full((2, V), -jnp.inf)
    value, gradient = jax.value_and_grad(lambda x: wl.softmax_z_loss(x).compute())(
        logits
    )
    assert value == 0
    assert not np.any(gradient)
