"""Every public function by every way of calling it wrong.

What must come is an `AssertionError` whose message names the argument, at trace time;
or a `TypeError` or `ValueError` where Python or JAX themselves say it.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wloss_jax as wl
from tests import grid

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
        ("weights", INTEGERS),
        ("weights", BOOLS),
        ("weights", [1.0] * B),
        ("weights", 2),
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


def test_a_fractional_mask_is_told_of_weights():
    assert_names("`weights`", lambda: wl.absolute_error(FLOATS, FLOATS, where=FLOATS))


# ------------------------------------------------------------------ one call, one error

loss = wl.absolute_error
cross_entropy = wl.softmax_cross_entropy_with_integer_labels
LOGITS, LABELS = np.zeros((B, L, V), np.float32), INTEGERS
segmented = functools.partial(wl.weighted_mean, FLOATS, segment_ids=INTEGERS)
heads = (FLOATS, FLOATS)


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
    "total of integers": ("`total`", lambda: wl.WeightedMean(LABELS, FLOATS)),
    "total of a bool": ("`total`", lambda: wl.WeightedMean(True, 1.0)),
    "weight of integers": ("`weight`", lambda: wl.WeightedMean(FLOATS, LABELS)),
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
    "a loss of no elements": ("`loss_fn`", lambda: wl.masked(jnp.mean)(FLOATS)),
    "a loss that is a tuple": ("`loss_fn", lambda: wl.masked(lambda x: (x,))(FLOATS)),
    "a loss that is None": ("`loss_fn", lambda: wl.masked(lambda x: None)(FLOATS)),
    "a loss of integers": (
        "`loss_fn",
        lambda: wl.masked(lambda x: x.astype(int))(FLOATS),
    ),
    # per_sample
    "samples without an axis": (
        "'predictions': ()",
        lambda: wl.per_sample(loss)(1.0, FLOATS),
    ),
    "samples of two batches": (
        "'targets': (3, 3)",
        lambda: wl.per_sample(loss)(FLOATS, FLOATS[1:]),
    ),
    "lengths of another batch": (
        "'lengths': (3,)",
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
    "class_weights of integers": (
        "`class_weights`",
        lambda: cross_entropy(LOGITS, LABELS, class_weights=np.ones(V, int)),
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
}


@pytest.mark.parametrize("mistake", TABLE)
def test_a_mistake_is_an_error_that_names_the_argument(mistake):
    assert_names(*TABLE[mistake])


PYTHONS = {
    # What Python and JAX say themselves, with the name in it.
    "a sum with a number": ("WeightedMean", lambda: M + 1),
    "a sum from a number": ("WeightedMean", lambda: 1 + M),
    "a merge of no axis": ("axis", lambda: M.merge(3)),
    "an axis of no event": ("axis", lambda: wl.kl_divergence(FLOATS, FLOATS, axis=5)),
    "an axis twice": ("axis", lambda: wl.kl_divergence(FLOATS, FLOATS, axis=(0, 0))),
    "a loss that is no function": ("callable", lambda: wl.masked(3)),
    "a sample's loss that is no function": ("callable", lambda: wl.per_sample(None)),
    "a scheme that is no function": ("callable", lambda: M.reweight(3)),
    "an unknown option": ("delta", lambda: loss(FLOATS, FLOATS, delta=1.0)),
    "an unknown option of masked": (
        "odd",
        lambda: wl.masked(lambda x: x)(FLOATS, odd=1),
    ),
    "too many arrays": ("positional", lambda: loss(FLOATS, FLOATS, FLOATS)),
    "a missing array": ("targets", lambda: loss(FLOATS)),
    "a traced option": (
        "static",
        lambda: wl.quantile_loss(FLOATS, FLOATS, quantile=jnp.float32(0.5)),
    ),
    "an array for num_segments": (
        "static",
        lambda: segmented(num_segments=jnp.int32(2)),
    ),
    "an axis of a string": (
        "integer",
        lambda: wl.kl_divergence(FLOATS, FLOATS, axis="a"),
    ),
}


@pytest.mark.parametrize("mistake", PYTHONS)
def test_a_mistake_that_python_or_jax_names(mistake):
    assert_names(*PYTHONS[mistake], (TypeError, ValueError))


def test_an_unknown_axis_name_is_named():
    assert_names("nowhere", lambda: M.psum("nowhere"), NameError)


def test_errors_say_what_came_what_was_expected_and_the_mend():
    with pytest.raises(AssertionError) as caught:
        loss(FLOATS, FLOATS, weights=np.ones((B, 1), np.float32))
    for part in (
        "`weights`",
        "(4, 1)",
        "(4, 3)",
        "leading axes",
        "Drop axes of size 1",
    ):
        assert part in str(caught.value)


def test_errors_come_under_jit_too():
    with pytest.raises(AssertionError, match="`where` is float32"):
        jax.jit(lambda x: loss(x, x, where=x).compute())(FLOATS)
