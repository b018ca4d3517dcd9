"""Every public function by every way of calling it wrong.

What must come is an `AssertionError` whose message names the argument, at trace time;
or a `TypeError` or `ValueError` where Python or JAX themselves say it; or what is
documented, as in `DOCUMENTED`. The last test is that no public name was forgotten.
"""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wloss_jax as wl
from tests.oracle import grid

B, L, V = 4, 3, 3

FLOATS, INTEGERS = np.ones((B, L), np.float32), np.ones((B, L), np.int32)
BOOLS, M = np.ones((B, L), bool), wl.WeightedMean(np.ones(B, "f"), np.ones(B, "f"))
ctc_arrays = {
    "logits": np.zeros((B, L, V), np.float32),
    "logit_paddings": np.zeros((B, L), np.float32),
    "labels": np.ones((B, 2), np.int32),
    "label_paddings": np.zeros((B, 2), np.float32),
}


def arrays_of(case):
    """Good arrays for a loss, by name."""
    arrays, _ = grid.pad(grid.ragged(case, 0, [L] * B), L)
    names = [
        name
        for name, parameter in inspect.signature(case.loss).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return dict(zip(names, arrays, strict=True))


NOT_ARRAYS = {
    "a list": [1.0, 2.0],
    "None": None,
    "a string": "x",
    "an object": object(),
}
LOSSES = [case for case in grid.CASES if not case.name.startswith("masked")]
every_loss = pytest.mark.parametrize("case", LOSSES, ids=repr)


def assert_names(argument, call, errors=AssertionError):
    with pytest.raises(errors) as caught:
        call()
    assert argument in str(caught.value), caught.value


# ----------------------------------------------------------------- what the losses take


@every_loss
@pytest.mark.parametrize("what", NOT_ARRAYS)
def test_what_is_no_array_is_named(case, what):
    arrays = arrays_of(case)
    for name in arrays:
        wrong = arrays | {name: NOT_ARRAYS[what]}
        # Where it is no argument of `jax.jit`, that says so, and where.
        assert_names(
            name, lambda wrong=wrong: case.loss(**wrong), (AssertionError, TypeError)
        )


@every_loss
@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_predictions_that_are_not_floating_are_named(case, dtype):
    if case.loss is wl.weighted_mean and dtype is not np.complex64:
        pytest.skip("values may be counts, or whether a prediction was correct")
    arrays = arrays_of(case)
    first = next(iter(arrays))
    wrong = arrays | {first: np.ones(arrays[first].shape, dtype)}
    assert_names(f"`{first}`", lambda: case.loss(**wrong))


@every_loss
def test_complex_numbers_and_keys_are_named(case):
    arrays = arrays_of(case)
    for name, array in arrays.items():
        for value in (array.astype(np.complex64), jax.random.key(0)):
            wrong = arrays | {name: value}
            assert_names(f"`{name}`", lambda wrong=wrong: case.loss(**wrong))


@every_loss
def test_arrays_of_other_shapes_are_named(case):
    arrays = arrays_of(case)
    for name in list(arrays)[1:]:
        array = arrays[name]
        for wrong in (array[:, :1], array[:1], array[:, 0], array[..., None], array[0]):
            # One of the two is named, with its shape; the others match it.
            assert_names(
                f"`{name}`",
                lambda wrong=wrong, name=name: case.loss(**arrays | {name: wrong}),
            )


ELEMENTWISE = [
    case
    for case in LOSSES
    if len(arrays_of(case)) > 1 and all(x.ndim == 2 for x in arrays_of(case).values())
]


@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
def test_a_column_against_a_row_is_named_and_not_broadcast(case):
    first, *others = arrays_of(case).values()
    rows, columns = [x[:, 0] for x in others], [x[:, :1] for x in others]
    assert_names("(4, 1)", lambda: case.loss(first[:, :1], *rows))
    assert_names("(4, 1)", lambda: case.loss(first[:, 0], *columns))


@pytest.mark.parametrize("case", [c for c in LOSSES if c.labels], ids=repr)
def test_labels_that_are_not_integers_are_named(case):
    arrays = arrays_of(case)
    for dtype in (np.float32, bool):
        wrong = arrays | {"labels": arrays["labels"].astype(dtype)}
        assert_names("`labels`", lambda wrong=wrong: case.loss(**wrong))


@every_loss
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("where", FLOATS),
        ("where", INTEGERS),
        ("where", [True, False]),
        ("where", np.float32(0.5)),
        ("where", 1),
        ("lengths", np.ones(B, np.float32)),
        ("lengths", np.ones(B, bool)),
        ("lengths", [1, 2, 3, 0]),
        ("lengths", 2.0),
        ("weights", BOOLS),
        ("weights", [1.0] * B),
        ("segment_ids", FLOATS),
        ("segment_ids", BOOLS),
        ("segment_ids", [0] * B),
    ],
)
def test_keywords_of_other_types_are_named(case, name, value):
    keywords = {name: value} | ({"num_segments": 2} if name == "segment_ids" else {})
    assert_names(f"`{name}`", lambda: case.loss(**arrays_of(case), **keywords))


@every_loss
def test_a_keyword_that_no_one_has_is_named(case):
    assert_names("wheer", lambda: case.loss(**arrays_of(case), wheer=BOOLS), TypeError)


@every_loss
def test_segments_and_their_number_come_together(case):
    arrays = arrays_of(case)
    assert_names("num_segments", lambda: case.loss(**arrays, num_segments=2))
    assert_names("num_segments", lambda: case.loss(**arrays, segment_ids=INTEGERS))


NO_OPTIONS = {
    "a string": "x",
    "an object": object(),
    "NaN": np.nan,
    "infinity": np.inf,
    "a complex number": 1j,
    "a function": len,
}


# Those of every loss, which `wl.weighted_mean` has and no options.
KEYWORDS = [
    name
    for name, parameter in inspect.signature(wl.weighted_mean).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
]


def options_of(case):
    """The options of a loss, whatever is bound of them, and their defaults."""
    parameters = inspect.signature(getattr(case.loss, "func", case.loss)).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
        and name not in (*KEYWORDS, "class_weights")
    }


@every_loss
def test_options_that_are_no_numbers_are_named(case):
    for name in options_of(case):
        for what in NO_OPTIONS.values():
            if name == "distance_function" and what is len:
                continue  # it may be any function
            call = functools.partial(case.loss, **arrays_of(case) | {name: what})
            assert_names(f"`{name}`", call)


OUT_OF_RANGE = {
    "huber_loss": {"delta": (-1, 0, True, None, np.inf, np.nan)},
    "quantile_loss": {"quantile": (-0.1, 1.5, True, None)},
    "cosine_distance": {"epsilon": (-1.0, None), "axis": (0.5, True, (0.5,))},
    "poisson_nll": {"log_input": (2.5, None, 1), "full": ("yes", 0), "eps": (-1, None)},
    "gaussian_nll": {"full": (None, 1), "eps": (-1e-6, None)},
    "sigmoid_focal_loss": {"alpha": (-1, 2, True), "gamma": (-1, None)},
    "softmax_cross_entropy_with_integer_labels": {
        "label_smoothing": (-0.1, 1.5, True, None),
        "z_loss": (-1e-3, True, None),
        "ignore_index": (0.5, True),
    },
    "poly_loss_cross_entropy": {"epsilon": (None, True)},
    "smooth_l1_loss": {"beta": (-1e-3, None, np.inf)},
    "hinge_embedding_loss": {"margin": (np.nan, None)},
    "margin_ranking_loss": {"margin": (np.inf, None)},
    "cosine_embedding_loss": {"margin": (-1.5, 1.5, None)},
    "multi_margin_loss": {
        "p": (0, 3, 1.5, True, np.ones(2, np.float32), jnp.float32(1)),
        "margin": (np.inf, None),
    },
    "softmax_cross_entropy": {"label_smoothing": (-0.1, 1.5, True)},
    "nll_loss": {"ignore_index": (0.5, True)},
    "sigmoid_binary_cross_entropy": {"pos_weight": (np.ones(2), -1e-3, True)},
    "triplet_margin_with_distance_loss": {
        "distance_function": (2,),
        "margin": (-1, None),
        "swap": (None, 1),
    },
    "triplet_margin_loss": {
        "norm_degree": (0, -2, 0.5, None, np.nan),
        "margin": (-1, None, np.inf),
        "eps": (-1,),
        "swap": (None, 1),
    },
    "ctc_loss": {"blank_id": (-1, V, 0.5, None), "log_epsilon": (1.0, None)},
}


@pytest.mark.parametrize(
    "case", [case for case in LOSSES if case.name in OUT_OF_RANGE], ids=repr
)
def test_options_out_of_range_are_named(case):
    for name, values in OUT_OF_RANGE[case.name].items():
        for value in values:
            call = functools.partial(case.loss, **arrays_of(case) | {name: value})
            assert_names(f"`{name}`", call)


@every_loss
def test_axes_of_size_0_are_a_mean_of_nothing(case):
    arrays = arrays_of(case)
    for cut in (slice(0, 0), (slice(None), slice(0, 0))):
        m = case.loss(**{name: array[cut] for name, array in arrays.items()})
        assert (m.total, m.weight, m.compute()) == (0, 0, 0)


WITH_CLASSES = [
    case for case in LOSSES if next(iter(arrays_of(case).values())).ndim == 3
]


@pytest.mark.parametrize("case", WITH_CLASSES, ids=repr)
def test_no_classes_are_no_loss(case):
    arrays = {
        name: array[..., :0] if array.ndim == 3 else array
        for name, array in arrays_of(case).items()
    }
    first = next(iter(arrays))
    assert_names(f"`{first}`", lambda: case.loss(**arrays))


def test_an_empty_batch_with_its_classes_in_front():
    log_p = np.zeros((V, 0), np.float32)
    assert wl.kl_divergence(log_p, log_p, axis=0).weight == 0


def test_a_fractional_mask_is_told_of_weights():
    assert_names("`weights`", lambda: wl.absolute_error(FLOATS, FLOATS, where=FLOATS))


# ------------------------------------------------------------------ one call, one error

loss = wl.absolute_error
cross_entropy = wl.softmax_cross_entropy_with_integer_labels
LOGITS, LABELS = np.zeros((B, L, V), np.float32), INTEGERS
segmented = functools.partial(wl.weighted_mean, FLOATS, segment_ids=INTEGERS)
heads = (FLOATS, FLOATS)


batch = {"x": FLOATS, "y": FLOATS, "lengths": np.full(B, L)}
uncut = {"x": FLOATS[:3], "y": FLOATS[:3]}


def model(param, batch):
    return loss(param * batch["x"], batch["y"], lengths=batch.get("lengths"))


def step(function=model, batch=batch, param=1.0, **options):
    return wl.value_and_grad(function, **options)(param, batch)


def nnx_step(function=model, batch=batch, param=1.0, **options):
    return wl.nnx.value_and_grad(function, **options)(param, batch)


params = jnp.zeros(2)
transform = wl.multi_steps(optax.sgd(1.0), 2)
update = functools.partial(transform.update, params, transform.init(params), params)
running = wl.RunningMean.zeros()


def update_of(grads=params, every_k=2):
    transform = wl.multi_steps(optax.sgd(1.0), every_k)
    return transform.update(grads, transform.init(params), params, weight=1.0)


def permuted(loss_fn, params=1.0, **options):
    wl.testing.assert_permutation_invariant(loss_fn, params, uncut, **options)


valid = wl.testing.assert_valid_batch


def linear(features=None, kernel=None, labels=None, **keywords):
    good = (np.ones((B, L, 2), "f"), np.ones((2, V), "f"), INTEGERS)
    given = (features, kernel, labels)
    arrays = [g if x is None else x for x, g in zip(given, good, strict=True)]
    loss = keywords.pop("loss", wl.linear_softmax_cross_entropy)
    return loss(*arrays, **keywords)


def ctc(**changes):
    return wl.ctc_loss(**ctc_arrays | changes)


TABLE = {
    # keywords, beyond the table above
    "lengths of the loss's rank": ("`lengths`", lambda: loss(1.0, 1.0, lengths=1)),
    "num_segments below 0": ("`num_segments`", lambda: segmented(num_segments=-1)),
    "num_segments of 2.0": ("`num_segments`", lambda: segmented(num_segments=2.0)),
    "num_segments of True": ("`num_segments`", lambda: segmented(num_segments=True)),
    "num_segments of a string": ("`num_segments`", lambda: segmented(num_segments="2")),
    # masks
    "lengths of a list": ("`lengths`", lambda: wl.length_mask([1, 2], 3)),
    "lengths of floats": ("`lengths`", lambda: wl.length_mask(np.ones(2), 3)),
    "lengths of None": ("`lengths`", lambda: wl.length_mask(None, 3)),
    "size of 3.0": ("`size`", lambda: wl.length_mask(1, 3.0)),
    "size of None": ("`size`", lambda: wl.length_mask(1, None)),
    "size of True": ("`size`", lambda: wl.length_mask(1, True)),
    "size below 0": ("`size`", lambda: wl.length_mask(1, -1)),
    "size of a string": ("`size`", lambda: wl.length_mask(1, "3")),
    "a traced size": ("`size`", lambda: jax.jit(wl.length_mask)(1, 3)),
    "targets of a list": ("`targets`", lambda: wl.observed_mask([1.0])),
    "targets of strings": ("`targets`", lambda: wl.observed_mask(np.array(["a"]))),
    "complex targets": ("`targets`", lambda: wl.observed_mask(np.ones(2, complex))),
    "missing NaN of integers": ("`missing`", lambda: wl.observed_mask(INTEGERS)),
    "missing 0.5 of integers": ("`missing`", lambda: wl.observed_mask(INTEGERS, 0.5)),
    "missing inf of integers": ("`missing`", lambda: wl.observed_mask(LABELS, np.inf)),
    # WeightedMean
    "total of a list": ("`total`", lambda: wl.WeightedMean([1.0], [1.0])),
    "total of complex numbers": ("`total`", lambda: wl.WeightedMean(1j, 1.0)),
    "weight of a mean": ("`weight`", lambda: wl.WeightedMean(1.0, M)),
    "weight of None": ("`weight`", lambda: wl.WeightedMean(1.0, None)),
    "weight of another shape": ("`weight`", lambda: wl.WeightedMean(FLOATS, 1.0)),
    "a sum of two shapes": ("WeightedMean", lambda: M + M.merge()),
    "empty of another shape": ("`empty`", lambda: M.compute(np.zeros(3))),
    "empty of more axes": ("`empty`", lambda: M.merge().compute(np.zeros(1))),
    "empty of None": ("`empty`", lambda: M.compute(None)),
    "empty of a string": ("`empty`", lambda: M.compute("0")),
    "a scheme to integers": ("`fn", lambda: M.reweight(lambda n, x: n.astype(int))),
    "a scheme to one number": ("`fn", lambda: M.reweight(lambda n, x: n.sum())),
    "a scheme to None": ("`fn", lambda: M.reweight(lambda n, x: None)),
    "a power of a string": ("`p`", lambda: wl.size_power("1")),
    "a power of NaN": ("`p`", lambda: wl.size_power(np.nan)),
    "a power of infinity": ("`p`", lambda: wl.loss_power(np.inf)),
    "a power that is a switch": ("`p`", lambda: wl.loss_power(True)),
    "a power of None": ("`p`", lambda: wl.loss_power(None)),
    "the bias of an array": ("`m`", lambda: wl.mean_of_means_bias(FLOATS)),
    # heads
    "no heads": ("`predictions`", lambda: wl.select_head((), 0)),
    "an array without heads": (
        "`predictions`",
        lambda: wl.select_head(np.zeros((0, 2), np.float32), 0),
    ),
    "an array without an axis": ("`predictions`", lambda: wl.select_head(1.0, 0)),
    "heads of two shapes": (
        "`predictions[1]`",
        lambda: wl.select_head((FLOATS, FLOATS[:, :1]), 0),
    ),
    "heads of two dtypes": (
        "`predictions[1]`",
        lambda: wl.select_head((FLOATS, FLOATS.astype(np.float16)), 0),
    ),
    "heads of integers": ("`predictions[0]`", lambda: wl.select_head((LABELS,), 0)),
    "a head of a list": ("`predictions[1]`", lambda: wl.select_head((1.0, [1.0]), 0)),
    "heads of None": ("`predictions`", lambda: wl.select_head(None, 0)),
    "head of floats": ("`head`", lambda: wl.select_head(heads, 0.0)),
    "head of bools": ("`head`", lambda: wl.select_head(heads, True)),
    "head of None": ("`head`", lambda: wl.select_head(heads, None)),
    "head of positions": (
        "`head`",
        lambda: wl.select_head(heads, np.zeros(L, np.int32)),
    ),
    "head of a column": (
        "`head`",
        lambda: wl.select_head(heads, np.zeros((B, 1), np.int32)),
    ),
    # masked, and its user's function
    "event_ndim below 0": ("`event_ndim`", lambda: wl.masked(jnp.add, event_ndim=-1)),
    "event_ndim of 1.0": ("`event_ndim`", lambda: wl.masked(jnp.add, event_ndim=1.0)),
    "fewer axes than events": (
        "`x1`",
        lambda: wl.masked(lambda x1: x1, event_ndim=3)(FLOATS),
    ),
    "no arrays": ("position", lambda: wl.masked(lambda x: x)()),
    "integers first": ("`x`", lambda: wl.masked(lambda x: x)(LABELS)),
    "arrays to broadcast": (
        "`y`",
        lambda: wl.masked(lambda x, y: x - y)(FLOATS, FLOATS[:, :1]),
    ),
    "an unnamed array": (
        "`array 1`",
        lambda: wl.masked(lambda *a: a[0])(FLOATS, FLOATS[0]),
    ),
    "a loss of no elements": ("`loss_fn", lambda: wl.masked(jnp.mean)(FLOATS)),
    "a loss that is a tuple": ("`loss_fn", lambda: wl.masked(lambda x: (x,))(FLOATS)),
    "a loss that is None": ("`loss_fn", lambda: wl.masked(lambda x: None)(FLOATS)),
    "a loss of integers": (
        "`loss_fn",
        lambda: wl.masked(lambda x: x.astype(int))(FLOATS),
    ),
    # options
    "options, one a sample": (
        "`quantile` has shape (4,): one number",
        lambda: wl.quantile_loss(FLOATS, FLOATS, quantile=jnp.full(B, 0.5)),
    ),
    "a complex option": (
        "`delta` is complex",
        lambda: wl.huber_loss(FLOATS, FLOATS, delta=jnp.array(1j)),
    ),
    "an option of a list": (
        "`delta` must be a number",
        lambda: wl.huber_loss(FLOATS, FLOATS, delta=[1]),
    ),
    "an array for num_segments": (
        "`num_segments` must be a Python integer",
        lambda: segmented(num_segments=jnp.int32(2)),
    ),
    # per_sample
    "samples without an axis": (
        "`predictions` has no axis",
        lambda: wl.per_sample(loss)(1.0, FLOATS),
    ),
    "samples of two batches": (
        "`targets` has shape (3, 3)",
        lambda: wl.per_sample(loss)(FLOATS, FLOATS[1:]),
    ),
    "lengths of another batch": (
        "`lengths` has shape (3,)",
        lambda: wl.per_sample(loss)(FLOATS, FLOATS, lengths=np.ones(3, np.int32)),
    ),
    "samples of a list": (
        "`targets`",
        lambda: wl.per_sample(loss)(FLOATS, [[1.0]] * B),
    ),
    "a mask of a list": (
        "`where`",
        lambda: wl.per_sample(loss)(FLOATS, FLOATS, where=[True] * B),
    ),
    # options
    "a quantile above 1": (
        "`quantile`",
        lambda: wl.quantile_loss(FLOATS, FLOATS, quantile=1.5),
    ),
    "a smoothing above 1": (
        "`label_smoothing`",
        lambda: cross_entropy(LOGITS, LABELS, label_smoothing=1.5),
    ),
    "a smoothing below 0": (
        "`label_smoothing`",
        lambda: cross_entropy(LOGITS, LABELS, label_smoothing=-0.1),
    ),
    "a fractional ignore_index": (
        "`ignore_index`",
        lambda: cross_entropy(LOGITS, LABELS, ignore_index=0.5),
    ),
    "one-hot labels": ("`labels`", lambda: cross_entropy(LOGITS, LOGITS)),
    "labels with an axis of 1": (
        "`labels`",
        lambda: cross_entropy(LOGITS, LABELS[..., None]),
    ),
    "logits without classes": ("`logits`", lambda: cross_entropy(1.0, 1)),
    "class_weights of other classes": (
        "`class_weights`",
        lambda: cross_entropy(LOGITS, LABELS, class_weights=np.ones(V + 1, "f")),
    ),
    "class_weights of bools": (
        "`class_mask`",
        lambda: cross_entropy(LOGITS, LABELS, class_weights=np.ones(V, bool)),
    ),
    "class_weights of a list": (
        "`class_weights`",
        lambda: cross_entropy(LOGITS, LABELS, class_weights=[1.0] * V),
    ),
    "floating sparsemax labels": (
        "`labels`",
        lambda: wl.sparsemax_loss(FLOATS, FLOATS),
    ),
    "logits without frames": ("`logits`", lambda: ctc(logits=FLOATS[0])),
    "paddings of other frames": (
        "`logit_paddings`",
        lambda: ctc(logit_paddings=FLOATS[:, :1]),
    ),
    "paddings of other labels": (
        "`label_paddings`",
        lambda: ctc(label_paddings=FLOATS),
    ),
    "labels of another batch": ("`labels`", lambda: ctc(labels=LABELS[:1])),
    "a blank_id below 0": ("`blank_id`", lambda: ctc(blank_id=-1)),
    "a blank_id of no class": ("`blank_id`", lambda: ctc(blank_id=V)),
    "missing of a string": ("`missing`", lambda: wl.observed_mask(FLOATS, "x")),
    "missing of None": ("`missing`", lambda: wl.observed_mask(FLOATS, None)),
    "missing of an array": ("`missing`", lambda: wl.observed_mask(FLOATS, FLOATS)),
    "missing of a bool": ("`missing`", lambda: wl.observed_mask(INTEGERS, True)),
    # features times kernel
    "features of a list": ("`features`", lambda: linear([1.0])),
    "features of integers": ("`features`", lambda: linear(np.ones((B, L, 2), int))),
    "features without an axis": ("`features`", lambda: linear(np.float32(1))),
    "a kernel of a list": ("`kernel`", lambda: linear(kernel=[[1.0]])),
    "a kernel of one axis": ("`kernel`", lambda: linear(kernel=np.ones(2, "f"))),
    "a transposed kernel": ("`kernel`", lambda: linear(kernel=np.ones((V, 2), "f"))),
    "linear labels of floats": ("`labels`", lambda: linear(labels=FLOATS)),
    "linear labels of a batch": ("`labels`", lambda: linear(labels=INTEGERS[0])),
    "a bias of a number": ("`bias`", lambda: linear(bias=1.0)),
    "a bias of another vocabulary": ("`bias`", lambda: linear(bias=np.ones(2, "f"))),
    "a bias of integers": ("`bias`", lambda: linear(bias=np.ones(V, int))),
    "linear smoothing above 1": (
        "`label_smoothing`",
        lambda: linear(label_smoothing=1.5),
    ),
    "a softcap of 0": ("`softcap`", lambda: linear(softcap=0)),
    "a temperature of 0": (
        "`temperature`",
        lambda: linear(loss=wl.linear_log_probs, temperature=0),
    ),
    "linear labels that are no probabilities": (
        "`labels`",
        lambda: linear(loss=wl.linear_softmax_cross_entropy_with_probabilities),
    ),
    "rows of another batch": (
        "`array 0`",
        lambda: linear(loss=wl.linear_masked(np.add), labels=INTEGERS[0]),
    ),
    "a chunk_size of 0": ("`chunk_size`", lambda: linear(chunk_size=0)),
    "a chunk_size of 2.0": ("`chunk_size`", lambda: linear(chunk_size=2.0)),
    "a chunk_size of a string": ("`chunk_size`", lambda: linear(chunk_size="2")),
    "linear ignore_index of 0.5": ("`ignore_index`", lambda: linear(ignore_index=0.5)),
    "a linear column of weights": (
        "`weights`",
        lambda: linear(weights=np.ones((B, 1), "f")),
    ),
    "a linear mask of floats": ("`where`", lambda: linear(where=FLOATS)),
    "linear lengths of a list": ("`lengths`", lambda: linear(lengths=[1] * B)),
    "linear segments without a number": (
        "`num_segments`",
        lambda: linear(segment_ids=INTEGERS),
    ),
    # the gradient step; its terms, parts and devices
    "a loss_fn that divides": (
        "`loss_fn`",
        lambda: step(lambda p, b: model(p, b).compute()),
    ),
    "a loss_fn of samples": ("`loss_fn`", lambda: step(lambda p, b: M)),
    "a loss_fn of no terms": ("`loss_fn`", lambda: step(lambda p, b: {})),
    "has_aux without aux": ("`has_aux`", lambda: step(has_aux=True)),
    "aux without has_aux": ("`loss_fn`", lambda: step(lambda p, b: (model(p, b), 1))),
    "argnums of a string": ("`argnums`", lambda: step(argnums="param")),
    "argnums of None": ("`argnums`", lambda: step(argnums=None)),
    "argnums of floats": ("`argnums`", lambda: step(argnums=(0.0,))),
    "argnums of True": ("`argnums`", lambda: step(argnums=True)),
    "argnums past the end": ("`argnums`", lambda: step(argnums=2)),
    "argnums below 0": ("`argnums`", lambda: step(argnums=-3)),
    "batch_argnums of None": ("`batch_argnums`", lambda: step(batch_argnums=None)),
    "batch_argnums past the end": (
        "`batch_argnums`",
        lambda: step(batch_argnums=7, num_microbatches=2),
    ),
    "a batch that is differentiated": (
        "`batch_argnums`",
        lambda: step(argnums=1, num_microbatches=2),
    ),
    "no microbatches": ("`num_microbatches`", lambda: step(num_microbatches=0)),
    "2.0 microbatches": ("`num_microbatches`", lambda: step(num_microbatches=2.0)),
    "a string of microbatches": (
        "`num_microbatches`",
        lambda: step(num_microbatches="2"),
    ),
    "a batch of several sizes": (
        "batch_argnums",
        lambda: step(batch=batch | {"y": FLOATS[:2]}, num_microbatches=2),
    ),
    "a batch of numbers": (
        "batch_argnums",
        lambda: step(batch=1.0, num_microbatches=2),
    ),
    "a coefficient of no term": (
        "`coefficients`",
        lambda: step(lambda p, b: {"a": model(p, b)}, coefficients={"b": 1.0}),
    ),
    "a coefficient of a lone term": (
        "`coefficients`",
        lambda: step(coefficients={"a": 1.0}),
    ),
    "coefficients of a number": ("`coefficients`", lambda: step(coefficients=0.5)),
    "coefficients of a list": ("`coefficients`", lambda: step(coefficients=[1.0])),
    "an axis_name of a number": ("`axis_name`", lambda: step(axis_name=0)),
    "an axis_name of an object": ("`axis_name`", lambda: step(axis_name=object())),
    "nnx: has_aux without aux": ("`has_aux`", lambda: nnx_step(has_aux=True)),
    "nnx: a loss_fn that divides": (
        "`loss_fn`",
        lambda: nnx_step(lambda p, b: model(p, b).compute()),
    ),
    "nnx: argnums of None": ("`argnums`", lambda: nnx_step(argnums=None)),
    "nnx: argnums past the end": ("`argnums`", lambda: nnx_step(argnums=2)),
    "nnx: batch_argnums of a string": (
        "`batch_argnums`",
        lambda: nnx_step(batch_argnums="batch"),
    ),
    "nnx: no microbatches": (
        "`num_microbatches`",
        lambda: nnx_step(num_microbatches=0),
    ),
    "nnx: a coefficient of no term": (
        "`coefficients`",
        lambda: nnx_step(coefficients={"a": 1.0}),
    ),
    "a metric of no name": ("`argname`", lambda: wl.nnx.WeightedMeanMetric(None)),
    "a metric of a number": (
        "`values`",
        lambda: wl.nnx.WeightedMeanMetric().update(values=1.0),
    ),
    "a metric of samples": (
        "`merge`",
        lambda: wl.nnx.WeightedMeanMetric().update(values=M),
    ),
    # axes
    "an axis of a string": (
        "`axis`",
        lambda: wl.kl_divergence(FLOATS, FLOATS, axis="a"),
    ),
    "an axis of no event": ("`axis`", lambda: wl.kl_divergence(FLOATS, FLOATS, axis=5)),
    "an axis twice": (
        "`axis`",
        lambda: wl.kl_divergence(FLOATS, FLOATS, axis=(0, -2)),
    ),
    "a merge of no axis": ("`axis`", lambda: M.merge(3)),
    "a merge of half an axis": ("`axis`", lambda: M.merge(0.5)),
    "a merge of a string": ("`axis`", lambda: M.merge("batch")),
    "a merge of a list": ("`axis`", lambda: M.merge([0])),
    "a psum over None": ("`axis_name`", lambda: M.psum(None)),
    "a psum over a number": ("`axis_name`", lambda: M.psum(0)),
    # what is no function, or returns something else
    "a loss that is no function": ("`loss_fn`", lambda: wl.masked(3)),
    "a sample's loss that is no function": ("`loss`", lambda: wl.per_sample(None)),
    "a scheme that is no function": ("`fn`", lambda: M.reweight(3)),
    "a step that is no function": ("`loss_fn`", lambda: wl.value_and_grad(None)),
    "an nnx step of a string": ("`loss_fn`", lambda: wl.nnx.value_and_grad("f")),
    "has_aux of None": ("`has_aux`", lambda: step(has_aux=None)),
    "nnx: has_aux of 1": ("`has_aux`", lambda: nnx_step(has_aux=1)),
    "a law of no function": ("`loss_fn`", lambda: permuted(None)),
    "a law of a loss of None": ("`loss_fn`", lambda: permuted(lambda p, b: None)),
    "a law of a loss of a pair": (
        "`loss_fn`",
        lambda: permuted(lambda p, b: (model(p, b), 1.0)),
    ),
    "a law of a loss of trees": ("`loss_fn`", lambda: permuted(lambda p, b: {"a": {}})),
    "a law of whole numbers": ("`params`", lambda: permuted(model, 1)),
    "rtol below 0": ("`rtol`", lambda: permuted(model, rtol=-1.0)),
    "parameters of whole numbers": ("`argnums[0]`", lambda: step(param=1)),
    "a parameter of a string": (
        "`argnums[0]['w']`",
        lambda: step(param={"w": "x"}),
    ),
    **{
        f"a coefficient of {value!r}": (
            "`coefficients['a']`",
            lambda value=value: step(
                lambda p, b: {"a": model(p, b)}, coefficients={"a": value}
            ),
        )
        for value in ("2", None, [1.0], 1j, np.ones(2))
    },
    "num_microbatches of True": (
        "`num_microbatches`",
        lambda: step(num_microbatches=True),
    ),
    # across steps
    "every_k of True": ("`every_k`", lambda: wl.multi_steps(optax.sgd(1.0), True)),
    **{
        f"an every_k that returns {value!r}": (
            "`every_k",
            lambda value=value: update_of(every_k=lambda step: value),
        )
        for value in (None, 1.5, np.ones(2, int))
    },
    **{
        f"gradients of {grads!r}": ("`grads`", lambda grads=grads: update_of(grads))
        for grads in (np.ones(1), np.ones((2, 2)), {"a": params}, None, 1.0)
    },
    "a state of None": ("`state`", lambda: transform.update(params, None, weight=1.0)),
    "a flush of another's state": (
        "`state`",
        lambda: transform.flush(optax.sgd(1.0).init(params), params),
    ),
    "an optimizer of None": ("`optimizer`", lambda: wl.multi_steps(None, 2)),
    "an optimizer that is its maker": (
        "`optimizer`",
        lambda: wl.multi_steps(optax.sgd, 2),
    ),
    "every_k of 0": ("`every_k`", lambda: wl.multi_steps(optax.sgd(1.0), 0)),
    "every_k of 2.0": ("`every_k`", lambda: wl.multi_steps(optax.sgd(1.0), 2.0)),
    "every_k of None": ("`every_k`", lambda: wl.multi_steps(optax.sgd(1.0), None)),
    "no weight of a call": ("`weight`", lambda: update()),
    "a weight of a list": ("`weight`", lambda: update(weight=[1.0])),
    "a weight of samples": ("`weight`", lambda: update(weight=M.weight)),
    "a weight that is the mean": ("`weight`", lambda: update(weight=M)),
    "an update by a number": ("`m`", lambda: running.update(1.0)),
    "an update by None": ("`m`", lambda: running.update(None)),
    "an update by samples": ("`merge`", lambda: running.update(M)),
    "a merge with a mean": ("`other`", lambda: running.merge(M.merge())),
    "running empty of a string": ("`empty`", lambda: running.compute("0")),
    # values, which only this looks at
    "lengths past the end": ("`lengths`", lambda: valid(lengths=INTEGERS[0], size=0)),
    "lengths below 0": ("`lengths`", lambda: valid(lengths=-INTEGERS[0])),
    "NaN among the weights": ("`weights`", lambda: valid(weights=FLOATS * np.nan)),
    "weights below 0": ("`weights`", lambda: valid(weights=-FLOATS)),
    "infinite weights": ("`weights`", lambda: valid(weights=FLOATS * np.inf)),
    "labels out of range": ("`labels`", lambda: valid(labels=LABELS, num_classes=1)),
    "labels below 0": ("`labels`", lambda: valid(labels=-LABELS)),
    "valid size of 2.5": (
        "`size`",
        lambda: valid(lengths=INTEGERS[0], size=2.5),
    ),
    "valid size of a string": ("`size`", lambda: valid(lengths=LABELS[0], size="3")),
    "num_classes of None-like": (
        "`num_classes`",
        lambda: valid(labels=LABELS, num_classes=FLOATS),
    ),
    "num_classes of 2.5": (
        "`num_classes`",
        lambda: valid(labels=LABELS, num_classes=2.5),
    ),
    "ignored label of a string": (
        "`ignore_index`",
        lambda: valid(labels=LABELS, ignore_index="x"),
    ),
    # the laws, which want a batch that can show something
    "no padding to change": (
        "`where`",
        lambda: wl.testing.assert_padding_invariant(
            model, 1.0, uncut, where={"x": None, "y": None}
        ),
    ),
    "a tree that is not the batch's": (
        "`where`",
        lambda: wl.testing.assert_padding_invariant(model, 1.0, uncut, where=BOOLS),
    ),
    "nothing to permute": (
        "`batch`",
        lambda: wl.testing.assert_permutation_invariant(
            model, 1.0, {"x": FLOATS[:1], "y": FLOATS[:1]}
        ),
    ),
    "nothing to split": (
        "`batch`",
        lambda: wl.testing.assert_split_invariant(
            model, 1.0, {"x": FLOATS[:1], "y": FLOATS[:1]}
        ),
    ),
}


@pytest.mark.parametrize("mistake", TABLE)
def test_a_mistake_is_an_error_that_names_the_argument(mistake):
    assert_names(*TABLE[mistake])


PYTHONS = {
    # What Python and JAX say themselves, with the name in it.
    "a sum with a number": ("WeightedMean", lambda: M + 1),
    "a sum from a number": ("WeightedMean", lambda: 1 + M),
    "an unknown option": ("delta", lambda: loss(FLOATS, FLOATS, delta=1.0)),
    "an unknown option of masked": (
        "odd",
        lambda: wl.masked(lambda x: x)(FLOATS, odd=1),
    ),
    "too many arrays": ("positional", lambda: loss(FLOATS, FLOATS, FLOATS)),
    "a missing array": ("targets", lambda: loss(FLOATS)),
    "a batch shape of floats": ("Shapes", lambda: wl.WeightedMean.zeros((1.5,))),
    "a running shape of None": ("Shapes", lambda: wl.RunningMean.zeros(None)),
    "an unknown option of the step": ("reduction", lambda: step(reduction="mean")),
    "a metric without its mean": (
        "values",
        lambda: wl.nnx.WeightedMeanMetric().update(loss=M),
    ),
    # on the host, where nothing is traced
    "samples of None": ("samples", lambda: wl.pad_ragged(None)),
    "samples of numbers": ("samples", lambda: wl.pad_ragged([1, 2])),
    "no samples": ("samples", lambda: wl.pad_ragged([])),
    "samples of strings": ("samples", lambda: wl.pad_ragged(["ab", "c"])),
    "samples of two shapes": ("samples", lambda: wl.pad_ragged([FLOATS, FLOATS[0]])),
    "a size below the longest": ("size", lambda: wl.pad_ragged([FLOATS], size=3)),
    "a size of 4.0": ("size", lambda: wl.pad_ragged([FLOATS], size=4.0)),
    "buckets of None of them": ("buckets", lambda: wl.pad_ragged([FLOATS], buckets=())),
    "buckets of a number": ("buckets", lambda: wl.pad_ragged([FLOATS], buckets=4)),
    "a value of a string": ("value", lambda: wl.pad_ragged([FLOATS], value="0")),
    "a value of NaN in integers": (
        "value",
        lambda: wl.pad_ragged([LABELS], size=9, value=np.nan),
    ),
    "no lengths": ("lengths", lambda: wl.bucket_sizes([], 2)),
    "lengths that are fractions": ("lengths", lambda: wl.bucket_sizes([1.5], 2)),
    "lengths that are negative": ("lengths", lambda: wl.bucket_sizes([-1], 2)),
    "no buckets": ("num_buckets", lambda: wl.bucket_sizes([1], 0)),
    "buckets of 2.5": ("num_buckets", lambda: wl.bucket_sizes([1], 2.5)),
    "multiples of 0": ("multiple_of", lambda: wl.bucket_sizes([1], 2, multiple_of=0)),
}


@pytest.mark.parametrize("mistake", PYTHONS)
def test_a_mistake_that_python_or_jax_names(mistake):
    assert_names(*PYTHONS[mistake], (TypeError, ValueError))


@pytest.mark.parametrize(
    "call",
    [
        lambda: M.psum("nowhere"),
        lambda: step(axis_name="nowhere"),
        lambda: step(axis_name=("nowhere",), num_microbatches=2),
        lambda: nnx_step(axis_name="nowhere"),
        lambda: linear(vocab_axis_name="nowhere"),
    ],
)
def test_an_unknown_axis_name_is_named(call):
    assert_names("nowhere", call, NameError)


DOCUMENTED = {
    # What is no error has the result that its docstring promises.
    "a length past the end marks all": (
        lambda: wl.weighted_mean(FLOATS, lengths=np.full(B, 99)),
        (B * L, B * L),
    ),
    "a length below 0 marks none": (
        lambda: wl.weighted_mean(FLOATS, lengths=np.full(B, -1)),
        (0, 0),
    ),
    "segments out of range are padding": (
        lambda: segmented(num_segments=1).merge(),
        (0, 0),
    ),
    "a length that no int32 holds marks all": (
        lambda: wl.weighted_mean(FLOATS, lengths=np.full(B, 2**32 - 1, np.uint32)),
        (B * L, B * L),
    ),
    "a sentinel that the labels cannot hold is none of them": (
        lambda: cross_entropy(
            LOGITS, np.full((B, L), 2**32 - 1, np.uint32), ignore_index=-1
        ),
        (np.nan, B * L),
    ),
    "no labels are all blanks": (
        lambda: ctc(
            labels=np.zeros((B, 0), np.int32), label_paddings=np.zeros((B, 0), "f")
        ),
        (np.float32(B * L * np.log(V)), B),
    ),
    "no segments": (lambda: segmented(num_segments=0).merge(), (0, 0)),
    "a NaN weight that counts stays visible": (
        lambda: wl.weighted_mean(FLOATS, weights=FLOATS * np.nan),
        (np.nan, np.nan),
    ),
    "a label out of range is NaN": (
        lambda: cross_entropy(LOGITS, LABELS * V),
        (np.nan, B * L),
    ),
    "a label below 0 is NaN": (lambda: cross_entropy(LOGITS, -LABELS), (np.nan, B * L)),
    "a label of no class is NaN, of a kernel too": (
        lambda: linear(labels=LABELS * V),
        (np.nan, B * L),
    ),
    "a head that is not there is NaN": (
        lambda: wl.weighted_mean(wl.select_head(heads, len(heads))),
        (np.nan, B * L),
    ),
    "a head below 0 is NaN": (
        lambda: wl.weighted_mean(wl.select_head(heads, -1)),
        (np.nan, B * L),
    ),
    "an array of heads has its own number": (
        lambda: wl.weighted_mean(wl.select_head(FLOATS, 1)),
        (L, L),
    ),
    "no features of a kernel's tokens": (
        lambda: linear(np.ones((0, L, 2), "f"), labels=INTEGERS[:0]),
        (0, 0),
    ),
    "weights of 0": (lambda: wl.weighted_mean(FLOATS, weights=0 * FLOATS), (0, 0)),
    "the mean of no samples": (
        lambda: wl.WeightedMean.zeros((0,)).reweight(wl.loss_power(1.0)).merge(),
        (0, 0),
    ),
}


@pytest.mark.parametrize("what", DOCUMENTED)
def test_what_is_no_error_is_what_is_documented(what):
    call, (total, weight) = DOCUMENTED[what]
    m = call()
    np.testing.assert_array_equal((m.total, m.weight), (total, weight))


def test_errors_say_what_came_what_was_expected_and_the_mend():
    with pytest.raises(AssertionError) as caught:
        loss(FLOATS, FLOATS, weights=np.ones((B, 1), np.float32))
    for part in (
        "`weights`",
        "(4, 1)",
        "(4, 3)",
        "leading axes",
        "jnp.broadcast_to(weights, (4, 3))",
    ):
        assert part in str(caught.value)


def test_errors_come_under_jit_too():
    with pytest.raises(AssertionError, match="`where` is float32"):
        jax.jit(lambda x: loss(x, x, where=x).compute())(FLOATS)


# ------------------------------------------------------------------- nothing forgotten


def names_in(code):
    """The names that a function, and those in it, look up."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(names_in, inner))


# Called under other names in this file, and what takes nothing that could be wrong.
ALIASES = {"assert_valid_batch", "RunningMean", "multi_steps", "update"}
WITHOUT_ARGUMENTS = {"to_host", "tree_flatten_with_keys", "tree_unflatten"}


def test_every_public_name_is_called_wrong():
    calls = [call for _, call in (TABLE | PYTHONS).values()]
    calls += (step, nnx_step, linear)
    called = set().union(*(names_in(call.__code__) for call in calls)) | ALIASES
    called |= {getattr(case.loss, "func", case.loss).__name__ for case in LOSSES}
    assert set(wl.__all__) <= called
    for owner in (wl.testing, wl.nnx, wl.WeightedMean, wl.RunningMean):
        home = getattr(owner, "__module__", owner.__name__)
        public = {
            name
            for name, value in vars(owner).items()
            if not name.startswith("_")
            and callable(getattr(value, "__func__", value))
            and getattr(value, "__module__", home) == home
        }
        assert public - called == WITHOUT_ARGUMENTS & public
