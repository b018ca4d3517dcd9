"""The table of losses for the grid of laws: how to call each, and how to make its data.

A batch is ragged: a `Sample` for each, of as many elements as it has, with holes where
nothing was measured. `pad` makes of it what a loss takes, poison in every place that
does not count; `expected` is what the oracle says of it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import wloss_jax as wl
from tests.oracle import reference

CLASSES = 3
CLASS_WEIGHTS = np.array([0.5, 2.0, 1.25], np.float32)
IGNORED = -7


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss with its options, its formula, and how to make ``n`` elements for it."""

    name: str
    loss: Callable[..., wl.WeightedMean]
    reference: Callable[..., float]
    data: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    differentiable: tuple[int, ...] = (0,)
    own_weight: Callable[..., float] = lambda *element: 1.0
    labels: int | None = None  # which of the arrays holds class labels
    terms: float = 0.0  # how large the terms are that may cancel in it or its gradient

    def __repr__(self):
        return self.name


# Multiples of 0.13 apart from each other by 0.03: no draw comes near a kink of a loss
# (an error of 0 or of `delta`, a margin of 1, a tie), where derivatives disagree.
def _real(rng, *shape, offset=0.0):
    return rng.integers(-20, 20, shape) * 0.13 + offset


def _regression(rng, n):
    return _real(rng, n), _real(rng, n, offset=0.03)


def _rates_and_counts(rng, n):
    return abs(_real(rng, n, offset=0.03)), rng.integers(0, 5, n)


def _gaussian(rng, n):
    return *_regression(rng, n), abs(_real(rng, n, offset=0.3))


def _binary(rng, n):
    return _real(rng, n, offset=0.03), rng.integers(0, 2, n)


def _soft_binary(rng, n):
    return _real(rng, n, offset=0.03), rng.integers(1, 8, n) / 8


def _signs(rng, n):
    return _real(rng, n, offset=0.03), rng.choice([-1.0, 1.0], n)


def _vectors(rng, n):
    return _real(rng, n, 3, offset=0.03), _real(rng, n, 3, offset=0.07)


def _scores(rng, n):
    ranks = np.stack([rng.permutation(20)[:CLASSES] for _ in range(n)] or [[0] * 3])
    return (ranks[:n] - 10) * 0.13


def _labels(rng, n):
    return _scores(rng, n), rng.integers(0, CLASSES, n)


def _labels_some_ignored(rng, n):
    scores, labels = _labels(rng, n)
    return scores, np.where(rng.random(n) < 0.25, IGNORED, labels)


# In eighths, so that they sum to 1 in bfloat16 too.
def _distributions(rng, n):
    return _scores(rng, n), (1 + rng.multinomial(5, [1 / 3] * 3, n)) / 8


def _one_hot(rng, n):
    return _scores(rng, n), np.eye(CLASSES)[rng.integers(0, CLASSES, n)]


# Negatives that are near, where the loss is above 0, or far, where it is 0.
def _triplets(rng, n):
    anchors = _real(rng, n, 3)
    near = anchors + rng.uniform(0.05, 0.2, (n, 3))
    negatives = np.where(rng.random((n, 1)) < 0.7, near, anchors + 3)
    return anchors, anchors - rng.uniform(0.05, 0.3, (n, 3)), negatives


def _pairs(rng, n):
    return _real(rng, n, offset=0.03), _real(rng, n, offset=0.07), _signs(rng, n)[1]


def _pairs_of_vectors(rng, n):
    return *_vectors(rng, n), _signs(rng, n)[1]


# Labels first, then -1 once; what comes after it does not count.
def _label_sets(rng, n):
    sets = np.stack([rng.permutation(CLASSES) for _ in range(n)] or [[0] * 3])[:n]
    count = rng.integers(1, CLASSES, n)
    return _scores(rng, n), np.where(np.arange(CLASSES) == count[:, None], -1, sets)


def _probabilities(rng, n):
    return rng.integers(1, 8, n) / 8, rng.integers(0, 9, n) / 8


def _log_probabilities(rng, n):
    return np.log((1 + rng.multinomial(5, [1 / 3] * 3, n)) / 8), _labels(rng, n)[1]


# Within a sequence too there is padding, and in it NaN and -1.
def _sequences(rng, n, frames=3, size=2):
    count = rng.integers(frames - 1, frames + 1, n)
    label_count = rng.integers(1, count)
    padded = np.arange(frames) >= count[:, None]
    label_padded = np.arange(size) >= label_count[:, None]
    logits = np.where(padded[..., None], np.nan, _real(rng, n, frames, CLASSES))
    labels = np.where(label_padded, -1, rng.integers(1, CLASSES, (n, size)))
    return logits, padded.astype(float), labels, label_padded.astype(float)


def _singular(x, y):
    """Has no value or no derivative at 0, at 1 and at -1, nor where x is y."""
    return jnp.sqrt(x) * jnp.log(y) + 1 / (x - y) + jnp.arcsin(x) + jnp.log1p(-y)


def _singular_reference(x, y):
    return np.sqrt(x) * np.log(y) + 1 / (x - y) + np.arcsin(x) + np.log1p(-y)


def _inside(rng, n):
    return rng.integers(1, 4, n) / 4, rng.integers(1, 4, n) / 4 - 0.125


def _case(name, data, differentiable=(0, 1), options=None, suffix="", **more):
    """A public loss, and its formula under the same name and with the same options."""
    loss, formula = (
        functools.partial(getattr(module, name), **options or {})
        for module in (wl, reference)
    )
    return Case(name + suffix, loss, formula, data, differentiable, **more)


def _weight_of_own_class(logits, label):
    return 0.0 if label == IGNORED else float(CLASS_WEIGHTS[label])


CASES = [
    Case(
        "weighted_mean",
        wl.weighted_mean,
        reference.identity,
        lambda rng, n: (_real(rng, n),),
    ),
    _case("absolute_error", _regression),
    _case("squared_error", _regression),
    _case("l2_loss", _regression),
    _case("huber_loss", _regression, options={"delta": 0.7}),
    _case("log_cosh", _regression, terms=1.0),  # takes log(2) off
    _case("quantile_loss", _regression, options={"quantile": 0.3}),
    _case("cosine_distance", _vectors, terms=1.0),
    _case("poisson_nll", _rates_and_counts, (0,), terms=1.0),
    _case(
        "poisson_nll",
        _rates_and_counts,
        (0,),
        options={"log_input": False, "full": True, "eps": 1e-3},
        suffix="_full_of_rates",
    ),
    _case("gaussian_nll", _gaussian, (0, 1, 2), options={"full": True}, terms=1.0),
    _case("sigmoid_binary_cross_entropy", _binary, (0,)),
    _case(
        "sigmoid_focal_loss",
        _soft_binary,
        options={"alpha": 0.25, "gamma": 1.5},
        terms=1.0,
    ),
    _case("hinge_loss", _signs),
    _case("perceptron_loss", _signs),
    _case("sparsemax_loss", _binary, (0,)),
    _case("softmax_cross_entropy", _distributions),
    _case("safe_softmax_cross_entropy", _one_hot, (0,)),
    _case("softmax_cross_entropy_with_integer_labels", _labels, (0,), labels=1),
    Case(
        "softmax_cross_entropy_with_integer_labels_and_all_options",
        functools.partial(
            wl.softmax_cross_entropy_with_integer_labels,
            ignore_index=IGNORED,
            label_smoothing=0.1,
            z_loss=0.01,
            class_weights=CLASS_WEIGHTS,
        ),
        functools.partial(
            reference.softmax_cross_entropy_with_integer_labels,
            label_smoothing=0.1,
            z_loss=0.01,
        ),
        _labels_some_ignored,
        own_weight=_weight_of_own_class,
        labels=1,
    ),
    _case("softmax_z_loss", lambda rng, n: (_scores(rng, n),), (0,), terms=1.0),
    _case("poly_loss_cross_entropy", _distributions, (0,), {"epsilon": -1.0}),
    _case("multiclass_hinge_loss", _labels, (0,), labels=1),
    _case("multiclass_perceptron_loss", _labels, (0,), labels=1),
    _case("multiclass_sparsemax_loss", _labels, (0,), labels=1, terms=1.0),
    _case("kl_divergence", _distributions, terms=1.0),
    _case("kl_divergence_with_log_targets", _vectors, terms=1.0),
    _case("generalized_kl_divergence", _distributions),
    _case("triplet_margin_loss", _triplets, (0, 1, 2), {"norm_degree": 4}),
    _case("smooth_l1_loss", _regression, options={"beta": 0.7}),
    _case(
        "sigmoid_binary_cross_entropy",
        _soft_binary,
        options={"pos_weight": 3.0},
        suffix="_with_pos_weight",
        terms=1.0,
    ),
    _case("binary_cross_entropy", _probabilities, terms=1.0),
    _case("nll_loss", _log_probabilities, (0,), labels=1),
    _case(
        "softmax_cross_entropy",
        _distributions,
        options={"label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS},
        suffix="_smoothed_and_weighted",
    ),
    _case("hinge_embedding_loss", _signs, (0,), {"margin": 0.7}),
    _case("margin_ranking_loss", _pairs, options={"margin": 0.2}),
    _case("soft_margin_loss", _signs, terms=1.0),
    _case(
        "cosine_embedding_loss", _pairs_of_vectors, options={"margin": -0.2}, terms=1.0
    ),
    _case("multi_margin_loss", _labels, (0,), {"p": 2, "margin": 0.7}, labels=1),
    _case("multilabel_margin_loss", _label_sets, (0,)),
    _case(
        "multilabel_soft_margin_loss",
        _distributions,
        options={"class_weights": CLASS_WEIGHTS},
        terms=1.0,
    ),
    _case("triplet_margin_with_distance_loss", _triplets, (0, 1, 2), {"swap": True}),
    _case("ctc_loss", _sequences, (0,), labels=2, terms=1.0),
    Case("masked_singular", wl.masked(_singular), _singular_reference, _inside, (0, 1)),
    Case(
        "masked_norm",
        wl.masked(lambda x, y: jnp.linalg.norm(x - y, axis=-1), event_ndim=1),
        lambda x, y: np.sqrt(((x - y) ** 2).sum()),
        _vectors,
        (0, 1),
    ),
]


# ------------------------------------------------------------------------- batches


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Samples as they come: for each its arrays ``[n, ...]``, and two of ``[n]``."""

    samples: list[tuple[np.ndarray, ...]]
    where: list[np.ndarray]
    weights: list[np.ndarray]

    def select(self, indices):
        fields = (self.samples, self.where, self.weights)
        return Ragged(*([field[i] for i in indices] for field in fields))


def ragged(case, seed, lengths, scale=1.0, dtype=np.float32):
    """Makes a batch for ``case``; the same ``seed`` makes the same, scaled or not."""
    rng = np.random.default_rng(seed)
    samples, where, weights = [], [], []
    for n in lengths:
        samples.append(tuple(_cast(array, dtype) for array in case.data(rng, n)))
        where.append(rng.random(n) < 0.8)
        weights.append(np.float32(scale * rng.choice([0.0, 0.25, 1.0, 2.0], n)))
    return Ragged(samples, where, weights)


def _cast(array, dtype):
    floating = np.issubdtype(array.dtype, np.floating)
    return array.astype(dtype if floating else np.int32)


def pad(batch, size, poison=(np.nan, -100)):
    """Stacks a batch to ``[B, size, ...]``, with poison wherever nothing counts."""
    arrays = tuple(
        _stack(rows, size, batch.where, poison)
        for rows in zip(*batch.samples, strict=True)
    )
    keywords = {
        "lengths": np.array([len(row) for row in batch.where], np.int32),
        "where": _stack(batch.where, size, None, (None, True)),
        "weights": _stack(batch.weights, size, batch.where, poison),
    }
    return arrays, keywords


def _stack(rows, size, where, poison):
    floating = not np.issubdtype(rows[0].dtype, np.integer) and rows[0].dtype != bool
    with np.errstate(over="ignore"):  # 1e30 is infinite in float16
        fill = np.asarray(poison[0] if floating else poison[1]).astype(rows[0].dtype)
    stacked = np.full((len(rows), size, *rows[0].shape[1:]), fill)
    for b, row in enumerate(rows):
        counts = slice(None) if where is None else where[b]
        stacked[b, : len(row)][counts] = row[counts]
    return stacked


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the oracle says: of the whole batch, of each sample, and the gradients.

    Rounding errors scale with the loss, and where terms of a loss cancel, with those:
    the log_cosh of 0.03 is off by 8e-8, which is 2e-4 of it.
    """

    total: float
    weight: float
    mean: float
    magnitude: float  # what the rounding errors of the mean scale with
    slopes: list[float]  # what those of each gradient scale with
    per_sample: list[tuple[float, float, float]]
    gradients: list[np.ndarray]


def counted(case, batch):
    """Yields where each element is that counts, the element, and its weight."""
    for b, sample in enumerate(batch.samples):
        for i in np.flatnonzero(batch.where[b]):
            element = tuple(_unpacked(array[i]) for array in sample)
            weight = float(batch.weights[b][i]) * case.own_weight(*element)
            if weight:
                yield (b, i), element, weight


def expected(case, batch, size):
    """Asks the oracle; gradients of the mean, in the padded layout of `pad`."""
    elements = list(counted(case, batch))
    values = [case.reference(*element) for _, element, _ in elements]
    weights = [weight for _, _, weight in elements]
    total, weight, mean = reference.weighted_mean(values, weights)
    sizes = [max(case.terms, abs(value)) for value in values]
    *_, magnitude = reference.weighted_mean(sizes, weights)

    per_sample = []
    for b in range(len(batch.samples)):
        mine = [k for k, ((sample, _), *_) in enumerate(elements) if sample == b]
        per_sample.append(
            reference.weighted_mean(
                [values[k] for k in mine], [weights[k] for k in mine]
            )
        )

    gradients = zeros(case, batch, size)
    for position, element, w in elements:
        parts = reference.gradients(case.reference, element, case.differentiable)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[position] = part * (w / weight)
    least = case.terms * max((w / weight for w in weights), default=0.0)
    slopes = [np.abs(gradient).max(initial=least) for gradient in gradients]
    return Expected(total, weight, mean, magnitude, slopes, per_sample, gradients)


def zeros(case, batch, size):
    """Makes room for a number at each entry of each differentiable array."""
    shapes = [batch.samples[0][k].shape[1:] for k in case.differentiable]
    return [np.zeros((len(batch.samples), size, *shape)) for shape in shapes]


def _unpacked(x):
    return x.tolist() if x.dtype == np.int32 else x.astype(np.float64)
