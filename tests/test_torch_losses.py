"""The losses of `torch.nn.functional` on PyTorch's own samples, by every reduction.

The samples and what PyTorch makes of them are recorded by record_torch_samples.py: its
own test inputs, and a few at kinks and ends, where gradients are a matter of choice.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wloss_jax as wl
from tests.oracle.tables import every_third
from tests.tools import record_torch_samples

GOLDEN = json.loads(record_torch_samples.SAMPLES.read_text())["losses"]
# float32 against float64: a few roundings of 6e-8, relative to the largest entry.
TOLERANCE = 2e-6


class Call(NamedTuple):
    """How a sample of PyTorch's is written here."""

    loss: object
    arrays: list
    keywords: dict
    # Where PyTorch divides by the number of elements, whatever their weights.
    by_count: bool = False


def same(loss):
    return lambda arrays, options: Call(loss, arrays, options)


def weighted(loss):
    """Those that weigh each element, and divide by the count."""

    def call(arrays, options):
        weight = options.pop("weight", None)
        if weight is not None:
            options["weights"] = np.broadcast_to(weight, np.shape(arrays[0]))
        return Call(loss, arrays, options, by_count=True)

    return call


def of_classes(loss, by_count=False):
    """Those of classes, which are the second axis, or the only one."""

    def call(arrays, options):
        scores, labels = arrays
        if "weight" in options:
            options["class_weights"] = options.pop("weight")
        if loss is not wl.multi_margin_loss:
            options["axis"] = 1 if np.ndim(scores) > 1 else 0
        return Call(loss, [scores, labels], options, by_count)

    return call


def cross_entropy(arrays, options):
    _, labels = arrays
    if np.issubdtype(labels.dtype, np.floating):
        return of_classes(wl.softmax_cross_entropy)(arrays, options)
    options = {"ignore_index": -100} | options
    if not {"label_smoothing", "weight"} <= options.keys():
        loss = wl.softmax_cross_entropy_with_integer_labels
        return of_classes(loss)(arrays, options)

    # PyTorch weighs each class that the label is smoothed over.
    def smoothed(logits, labels, *, label_smoothing, weight, ignore_index, **keywords):
        of_sum = wl.softmax_cross_entropy(
            logits,
            jax.nn.one_hot(labels, logits.shape[-1]),
            label_smoothing=label_smoothing,
            class_weights=weight,
            where=labels != ignore_index,
            **keywords,
        )
        of_weight = wl.softmax_cross_entropy_with_integer_labels(
            logits, labels, ignore_index=ignore_index, class_weights=weight, **keywords
        )
        return wl.WeightedMean(of_sum.total, of_weight.weight)

    return Call(smoothed, arrays, options)


def nll_loss(arrays, options):
    return of_classes(wl.nll_loss)(arrays, {"ignore_index": -100} | options)


def multi_margin_loss(arrays, options):
    scores = np.atleast_1d(arrays[0])  # a number is the score of one class
    labels = np.reshape(arrays[1], scores.shape[:-1])
    call = of_classes(wl.multi_margin_loss, by_count=True)
    return call([scores, labels], options)


def multilabel_margin_loss(arrays, options):
    return Call(wl.multilabel_margin_loss, list(map(np.atleast_1d, arrays)), options)


def multilabel_soft_margin_loss(arrays, options):
    weight = options.pop("weight", None)
    if np.ndim(weight) < 2:
        options["class_weights"] = weight
        return Call(wl.multilabel_soft_margin_loss, arrays, options)

    # One for each class of each sample: the mean of all yes-or-no labels.
    def by_label(logits, labels, **keywords):
        costs = wl.sigmoid_binary_cross_entropy(logits, labels, weights=weight)
        return wl.WeightedMean(costs.total / logits.shape[-1], len(logits))

    return Call(by_label, arrays, options)


def kl_div(arrays, options):
    log_target = options.pop("log_target", False)
    name = "kl_divergence" + ("_with_log_targets" if log_target else "")

    # PyTorch's element is one outcome; here a distribution is one.
    def by_outcome(log_predictions, targets, **keywords):
        m = getattr(wl, name)(log_predictions, targets, **keywords)
        return wl.WeightedMean(m.total, log_predictions.size)

    return Call(by_outcome, arrays, options)


PORTS = {
    "l1_loss": same(wl.absolute_error),
    "mse_loss": same(wl.squared_error),
    "huber_loss": same(wl.huber_loss),
    "smooth_l1_loss": same(wl.smooth_l1_loss),
    "poisson_nll_loss": same(wl.poisson_nll),
    "gaussian_nll_loss": same(wl.gaussian_nll),
    "soft_margin_loss": same(wl.soft_margin_loss),
    "hinge_embedding_loss": same(wl.hinge_embedding_loss),
    "margin_ranking_loss": same(wl.margin_ranking_loss),
    "cosine_embedding_loss": same(wl.cosine_embedding_loss),
    "binary_cross_entropy": weighted(wl.binary_cross_entropy),
    "binary_cross_entropy_with_logits": weighted(wl.sigmoid_binary_cross_entropy),
    "cross_entropy": cross_entropy,
    "nll_loss": nll_loss,
    "kl_div": kl_div,
    "multi_margin_loss": multi_margin_loss,
    "multilabel_margin_loss": multilabel_margin_loss,
    "multilabel_soft_margin_loss": multilabel_soft_margin_loss,
    # With PyTorch's distance: that of `wl.triplet_margin_loss` is optax's.
    "triplet_margin_loss": same(wl.triplet_margin_with_distance_loss),
    "triplet_margin_with_distance_loss": same(wl.triplet_margin_with_distance_loss),
}


def call_of(name, sample):
    def array(values):
        array = np.asarray(values)
        return array if array.dtype.kind == "i" else array.astype(np.float32)

    arrays = list(map(array, sample["arrays"]))
    if name == "gaussian_nll_loss":  # which broadcasts its variances
        of_rows = arrays[2].ndim < arrays[0].ndim
        variances = arrays[2][..., None] if of_rows else arrays[2]
        arrays[2] = np.broadcast_to(variances, arrays[0].shape)
    options = {
        k: array(v) if isinstance(v, list) else v for k, v in sample["options"].items()
    }
    return PORTS[name](arrays, options)


def means_of(call, arrays):
    m = call.loss(*arrays, **call.keywords)
    if not call.by_count:
        return m, m
    keywords = {k: v for k, v in call.keywords.items() if "weights" not in k}
    return m, wl.WeightedMean(m.total, call.loss(*arrays, **keywords).weight)


def one_by_one(call, arrays, expected):
    """The loss of each element: a segment for each."""
    shape = np.shape(expected)
    if np.ndim(arrays[-1]) == 0:
        shape = ()  # PyTorch may make an axis for the loss of one row of classes
    ids = np.arange(np.size(expected)).reshape(shape)
    m = call.loss(*arrays, **call.keywords, segment_ids=ids, num_segments=ids.size)
    return m.total.reshape(np.shape(expected))


def assert_close(got, expected, what):
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=TOLERANCE * scale, err_msg=what
    )


def test_every_loss_of_pytorch_has_its_samples():
    assert PORTS.keys() == GOLDEN.keys()


def evaluation(name, sample):
    """All of a sample, as a function of what is differentiated."""
    call = call_of(name, sample)
    # Those made of two losses, each with weights or elements of its own, have no more.
    has_elements = call.loss.__module__ != __name__

    def everything(moving):
        arrays = [moving.get(str(k), x) for k, x in enumerate(call.arrays)]
        m, mean = means_of(call, arrays)
        values = {"mean": mean.compute(), "sum": m.total}
        if has_elements:
            values["none"] = one_by_one(call, arrays, sample["values"]["none"])
        return mean.compute(), values

    moving = {k: jnp.asarray(call.arrays[int(k)]) for k in sample["gradients"]}
    return jax.value_and_grad(everything, has_aux=True), moving


@pytest.mark.parametrize("name", every_third(GOLDEN))
def test_every_reduction_and_the_gradient_are_those_of_pytorch(name):
    functions, moving = zip(*(evaluation(name, x) for x in GOLDEN[name]), strict=True)

    @jax.jit  # all in one program, for most of the time goes into compiling
    def evaluate(moving):
        return [f(x) for f, x in zip(functions, moving, strict=True)]

    for i, ((_, got), slopes) in enumerate(evaluate(moving)):
        values, gradients = (GOLDEN[name][i][part] for part in ("values", "gradients"))
        if np.isnan(values["mean"]):  # here, a mean of nothing is 0
            values = values | {"mean": 0.0}
            gradients = {k: np.zeros(np.shape(x)) for k, x in gradients.items()}
        for reduction, value in got.items():
            assert_close(value, values[reduction], f"{reduction} of sample {i}")
        for k, slope in slopes.items():
            expected = np.reshape(gradients[k], slope.shape)
            assert_close(slope, expected, f"gradient {k} of sample {i}")


# --------------------------------------------------------------- what single losses do


def test_a_target_that_is_no_sign_is_nan():
    """PyTorch adds up both sides of the hinge, or neither of the angle."""
    m = wl.hinge_embedding_loss(jnp.ones(2), np.array([1, 0]))
    assert np.isnan(m.compute())
    vectors = jnp.ones((2, 3))
    m = wl.cosine_embedding_loss(vectors, vectors, np.array([1, 0]))
    assert np.isnan(m.compute())


@pytest.mark.parametrize("score", [-1e30, -800.0, 800.0, 1e30])
def test_a_soft_margin_of_extreme_scores_stays_finite(score):
    """PyTorch's is infinite, with a gradient of NaN."""
    value, slope = jax.value_and_grad(lambda x: wl.soft_margin_loss(x, 1).compute())(
        score
    )
    np.testing.assert_allclose([value, slope], [max(0, -score), -(score < 0)])


@pytest.mark.parametrize("p", [-0.1, 1.5, np.nan])
def test_a_probability_that_is_none_is_nan_unless_masked(p):
    where = np.array([True, False])
    for label in (0.0, 1.0, 0.5):
        probabilities, labels = jnp.array([0.5, p]), jnp.full(2, label)
        value, slope = jax.value_and_grad(
            lambda x, y=labels: wl.binary_cross_entropy(x, y).compute()
        )(probabilities)
        assert np.isnan([value, slope[1]]).all()
        value, slope = jax.value_and_grad(
            lambda x, y=labels: wl.binary_cross_entropy(x, y, where=where).compute()
        )(probabilities)
        np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
        assert slope[1] == 0


def test_the_factor_of_yes_may_be_one_for_each_class():
    logits, labels = jnp.array([[0.0, 1.0], [2.0, -1.0]]), np.array([[1, 1], [0, 1]])
    where = np.array([True, False])
    for factors in np.array([3.0, 0.0]), np.array([3, 0]):

        def mean(logits, factors):
            return wl.sigmoid_binary_cross_entropy(
                logits, labels, pos_weight=factors, where=where
            ).compute()

        np.testing.assert_allclose(mean(logits, factors), 1.5 * np.log(2), rtol=1e-6)
    broken = logits.at[1].set(jnp.nan)  # has no part in the gradient of the factors
    slopes = jax.grad(mean, (0, 1))(broken, jnp.array([3.0, 0.0]))
    expected = np.log1p(np.exp([-0.0, -1.0])) / 2
    np.testing.assert_allclose(slopes[1], expected, rtol=1e-6)
    np.testing.assert_allclose(slopes[0], [[-0.75, 0], [0, 0]])


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 2)])
def test_the_factor_of_yes_may_be_one_for_each_of_the_last_axes(shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 2))
    labels = rng.integers(0, 2, (2, 3, 2))
    where = np.array([[True, True, False], [True, False, False]])
    factors = rng.uniform(0.5, 2, shape)
    given = factors.astype(np.float32)
    if shape == logits.shape:  # what is masked may hold anything
        given[~where] = np.nan
    each = np.broadcast_to(factors, logits.shape)
    counted = (array[where].flat for array in (logits, labels, each))
    terms = [
        c * y * np.log1p(np.exp(-x)) + (1 - y) * np.log1p(np.exp(x))
        for x, y, c in zip(*counted, strict=True)
    ]
    value, slope = jax.value_and_grad(
        lambda x: wl.sigmoid_binary_cross_entropy(
            x, labels, pos_weight=given, where=where
        ).compute()
    )(np.float32(logits))
    np.testing.assert_allclose(value, np.mean(terms), rtol=1e-6)
    yes, no = (1 / (1 + np.exp(sign * logits)) for sign in (1, -1))
    expected = (-each * labels * yes + (1 - labels) * no) / len(terms)
    # Sigmoids near 0 are differences of numbers near 1.
    np.testing.assert_allclose(slope, expected * where[..., None], rtol=1e-5, atol=1e-7)


def test_the_factor_of_yes_is_broadcast_over_no_axis_of_1():
    logits = np.zeros((3, 2), np.float32)
    for shape in ((3, 1), (1, 2), (3,), (1, 3, 2)):
        with pytest.raises(ValueError, match="`pos_weight` has shape"):
            wl.sigmoid_binary_cross_entropy(
                logits, logits, pos_weight=np.ones(shape, np.float32)
            )


def test_a_class_of_weight_0_has_no_term():
    weights = np.float32([2, 0])
    logits, labels = jnp.array([[0.0, np.nan]]), jnp.array([[1.0, np.nan]])
    value, slope = jax.value_and_grad(
        lambda x: wl.multilabel_soft_margin_loss(
            x, labels, class_weights=weights
        ).compute()
    )(logits)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(slope, [[-0.5, 0]])
    m = wl.softmax_cross_entropy(jnp.zeros((1, 2)), labels, class_weights=weights)
    np.testing.assert_allclose(m.compute(), 2 * np.log(2), rtol=1e-6)


def multilabel_margin(labels, scores=(1.0, 0.0, 0.5), **keywords):
    return wl.multilabel_margin_loss(jnp.array(scores), np.array(labels), **keywords)


@pytest.mark.parametrize("bad", [3, -2, -100, 2**31 - 1])
def test_a_label_out_of_range_is_nan_before_the_first_minus_1_only(bad):
    assert np.isnan(multilabel_margin([0, bad, -1]).compute())
    assert np.isnan(multilabel_margin([bad, -1, -1]).compute())
    good = multilabel_margin([0, -1, -1])
    assert multilabel_margin([0, -1, bad]).compute() == good.compute()
    assert multilabel_margin([-1, bad, bad]).compute() == 0


def test_a_score_of_nan_is_seen_where_there_are_no_labels():
    assert np.isnan(multilabel_margin([-1, 0, 0], (np.nan, 0.0, 0.0)).compute())


def test_several_labels_among_the_classes_that_are_in():
    def mean(scores, labels, **keywords):
        return wl.multilabel_margin_loss(scores, labels, **keywords).compute()

    scores, is_in = jnp.array([1.0, np.nan, 0.0, 0.5]), np.array([1, 0, 1, 1]) == 1
    labels, among = np.array([0, 3, -1, -1]), np.array([0, 2, -1])
    masked = jax.value_and_grad(mean)(scores, labels, class_mask=is_in)
    minus_inf = jnp.where(is_in, scores, -jnp.inf)
    for value, slope in (masked, jax.value_and_grad(mean)(minus_inf, labels)):
        expected, slopes = jax.value_and_grad(mean)(scores[is_in], among)
        assert value == expected > 0
        np.testing.assert_array_equal(slope[is_in], slopes)
        assert slope[1] == 0
    out = np.array([0, 1, -1, -1])
    value, slope = jax.value_and_grad(mean)(minus_inf, out)
    assert value == np.inf
    np.testing.assert_array_equal(slope, 0)


def test_a_distance_of_ones_own_may_close_over_a_parameter():
    """It has no derivative at 0; one that is masked must not spoil the others."""
    rng = np.random.default_rng(0)
    anchors, positives, negatives = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)
    positives = positives.at[1].set(anchors[1])
    where = np.array([True, False, True, True])

    def mean(scale, where, *triplets):
        return wl.triplet_margin_with_distance_loss(
            *triplets,
            distance_function=lambda a, b: jnp.linalg.norm(scale * (a - b), axis=-1),
            margin=9.0,
            where=where,
        ).compute()

    triplets = anchors, positives, negatives
    slopes = jax.grad(mean, (0, 2))(2.0, where, *triplets)
    cut = [x[where] for x in triplets]
    expected = jax.grad(mean, (0, 2))(2.0, None, *cut)
    np.testing.assert_allclose(slopes[0], expected[0], rtol=2e-6)
    np.testing.assert_allclose(slopes[1][where], expected[1], rtol=2e-6)
    np.testing.assert_array_equal(slopes[1][1], 0)


def test_a_distance_of_another_shape_is_named():
    x = jnp.ones((4, 2))
    with pytest.raises(
        ValueError, match=r"^`distance_function\(...\)` has shape \(4, 1"
    ):
        wl.triplet_margin_with_distance_loss(
            x, x, x, distance_function=lambda a, b: (a - b).sum(-1, keepdims=True)
        )


def test_swap_takes_the_nearer_of_two_distances():
    anchors, positives, negatives = jnp.array([[[0.0]], [[1.0]], [[1.5]]])
    for loss, options in (
        (wl.triplet_margin_loss, {"eps": 0.0}),
        (wl.triplet_margin_with_distance_loss, {}),
    ):
        plain = loss(anchors, positives, negatives, **options).compute()
        swapped = loss(anchors, positives, negatives, swap=True, **options).compute()
        np.testing.assert_allclose([plain, swapped], [0.5, 1.5], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (wl.smooth_l1_loss, {"beta": (0, 0.0)}),
        (wl.sigmoid_binary_cross_entropy, {"pos_weight": (0, np.float32(0))}),
        (wl.cosine_embedding_loss, {"margin": (-1, 1)}),
        (wl.softmax_cross_entropy, {"label_smoothing": (0, 1)}),
        (wl.multi_margin_loss, {"p": (1, 2, np.int64(2)), "margin": (-1, 0)}),
        (wl.hinge_embedding_loss, {"margin": (-1, 0)}),
        (wl.margin_ranking_loss, {"margin": (-1, 0)}),
        (wl.triplet_margin_with_distance_loss, {"margin": (0, np.float32(0))}),
    ],
)
def test_the_ends_of_options_are_in(loss, options):
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 4, 3)).astype(np.float32)
    sign, label = np.array([1, -1, 1, 1]), np.array([0, 1, 2, 2])
    arrays = {
        wl.cosine_embedding_loss: (x, y, sign),
        wl.multi_margin_loss: (x, label),
        wl.hinge_embedding_loss: (x[:, 0], sign),
        wl.margin_ranking_loss: (x[:, 0], y[:, 0], sign),
        wl.triplet_margin_with_distance_loss: (x, y, z),
    }.get(loss, (x, abs(y)))
    for name, ends in options.items():
        for end in ends:
            value, slope = jax.value_and_grad(
                lambda x, option={name: end}: loss(x, *arrays[1:], **option).compute()
            )(arrays[0])
            traced = loss(*arrays, **{name: jnp.float32(end)}) if name != "p" else None
            assert np.isfinite(value)
            assert np.isfinite(slope).all()
            assert traced is None or np.allclose(traced.compute(), value, rtol=1e-6)
