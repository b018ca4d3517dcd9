"""What habits from other libraries run into: errors that say what it is called here.

`test_bad_input` holds that a mistake is an error that names the argument; this, what
the last line of its traceback reads, and that it says the mend.
"""

import copy
import inspect
import json
import math
import operator
import pickle
import traceback

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import wloss_jax as wl
from tests.oracle import grid

B, L = 4, 3
X = np.ones((B, L), np.float32)

LOSSES = {case.name: case for case in grid.CASES}
HABITS = {
    "reduction": ("mean", "`.compute()`"),
    "size_average": (True, "`.compute()`"),
    "mask": (np.ones((B, L), bool), "`where`"),
    "sample_weight": (np.ones(B, np.float32), "`weights`"),
    "axis": (-1, "`wloss_jax.per_sample(loss)`"),
}


def last_line(call):
    """The last line that a traceback of the error would show."""
    with pytest.raises((TypeError, ValueError, NameError)) as caught:
        call()
    lines = "".join(traceback.format_exception(caught.value)).splitlines()
    return lines[-1].partition(": ")[2]


WAYS = {
    "as it is": lambda loss, arrays, keywords: loss(*arrays, **keywords),
    "by sample": lambda loss, arrays, keywords: wl.per_sample(loss)(
        *arrays, **keywords
    ),
    "under jit": lambda loss, arrays, keywords: jax.jit(
        lambda *arrays: loss(*arrays, **keywords)
    )(*arrays),
    "under grad": lambda loss, arrays, keywords: jax.grad(
        lambda first: loss(first, *arrays[1:], **keywords).compute()
    )(arrays[0]),
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("name", LOSSES)
def test_keywords_of_other_libraries_say_what_it_is_here(name, habit):
    case = LOSSES[name]
    arrays, _ = grid.pad(grid.ragged(case, 0, [L] * B), L)
    if habit in inspect.signature(case.loss).parameters:
        pytest.skip("it has an axis of its own, for the classes")
    value, mend = HABITS[habit]
    for way in WAYS.values():
        line = last_line(lambda way=way: way(case.loss, arrays, {habit: value}))
        assert line.startswith(f"`{habit}` is no argument here: ")
        assert mend in line


LINEAR = {
    "labels": (wl.linear_softmax_cross_entropy, np.zeros(B, int)),
    "log-probabilities": (wl.linear_log_probs, np.zeros(B, int)),
    "distributions": (wl.linear_softmax_cross_entropy_with_probabilities, X),
    "of a user": (wl.linear_masked(lambda logits, y: logits.sum(-1) - y), X[:, 0]),
}


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("name", LINEAR)
def test_losses_of_features_and_a_kernel_say_it_too(name, habit):
    loss, labels = LINEAR[name]
    value, mend = HABITS[habit]
    arrays = np.ones((B, 2), np.float32), np.ones((2, L), np.float32), labels
    line = last_line(lambda: loss(*arrays, **{habit: value}))
    assert line.startswith(f"`{habit}` is no argument here: ")
    assert mend in line


def test_the_weight_of_pytorch_is_of_classes_where_there_are_some():
    x, labels, ones = np.ones((3, 3), np.float32), np.zeros(3, int), np.ones(3)
    line = last_line(
        lambda: wl.softmax_cross_entropy_with_integer_labels(x, labels, weight=ones)
    )
    assert "the weights of classes are `class_weights`" in line
    line = last_line(lambda: wl.sigmoid_binary_cross_entropy(x, x, weight=ones))
    assert "leading axes" in line
    assert "`m.total / size`" in line


def test_an_axis_of_classes_is_not_sent_away():
    x, labels = np.ones((2, 5, 3), np.float32), np.zeros((2, 3), int)
    ce = wl.softmax_cross_entropy_with_integer_labels
    assert "it is `axis`" in last_line(lambda: ce(x, labels, dim=1))
    assert "pass `axis=1`" in last_line(lambda: ce(x, labels))
    assert "pass `axis=1`" in last_line(lambda: wl.nll_loss(x, labels))
    assert "One-hot labels" in last_line(lambda: ce(x[0], x[0]))


def test_a_mask_by_position_is_told_the_keywords():
    for loss in (wl.absolute_error, wl.masked(lambda predictions, targets: targets)):
        line = last_line(lambda loss=loss: loss(X, X, X > 0))
        assert line.startswith("`predictions, targets` are the positional arguments, 2")
        assert "where, lengths, weights" in line
    assert "delta, where" in last_line(lambda: wl.huber_loss(X, X, 1.0))


# ---------------------------------------------------------------------- arithmetic

M = wl.WeightedMean(10.0, 4.0)
RUNNING = wl.RunningMean.zeros().update(M)
BINARY = [
    *(operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
    *(operator.pow, divmod, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.add, operator.eq, operator.ne),
]
NUMBERS = [0.5, 1, True, np.float32(2), np.ones(3), jnp.float32(2), jnp.ones(3)]
FUNCTIONS = [
    bool,
    *(jnp.mean, np.mean, jnp.sqrt, np.sqrt, np.isfinite, jnp.array, np.asarray),
    *(abs, operator.neg, round, int, lambda m: jnp.where(True, m, 0.0)),
    *(lambda m: jnp.stack([m, m]), lambda m: np.mean([m, m])),
    lambda m: optax.apply_updates(0.5, m),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: f"{type(x).__name__}{x}")
@pytest.mark.parametrize("operation", BINARY, ids=lambda f: f.__name__)
def test_arithmetic_says_what_to_do_instead(operation, number):
    for mean in (M, RUNNING):
        for call in (
            lambda mean=mean: operation(mean, number),
            lambda mean=mean: operation(number, mean),
            lambda mean=mean: jax.jit(lambda m: operation(number, m))(mean),
        ):
            with pytest.raises(TypeError, match=r"\.compute\(\)") as caught:
                call()
            assert str(caught.value).startswith(f"`{type(mean).__name__}` is ")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mean", [M, RUNNING], ids=lambda m: type(m).__name__)
def test_functions_of_numbers_say_what_to_do_instead(function, mean):
    with pytest.raises(TypeError, match=r"\.compute\(\)"):
        function(mean)


def test_what_a_mean_takes():
    assert float(M) == 2.5 == float(RUNNING)
    assert f"{M:.4f}" == "2.5000" == f"{RUNNING:.4f}"
    assert math.isfinite(M)
    assert float(sum([M, M])) == 2.5
    assert f"{M}" == str(M) == repr(M)
    assert f"{RUNNING}" == repr(RUNNING)
    assert last_line(lambda: M - M).startswith("`WeightedMean` ")
    assert "merge" in last_line(lambda: float(wl.WeightedMean(X, X)))


def loss_fn(w):
    return wl.absolute_error(w * X, 2 * X)


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax.grad(loss_fn)(1.0),
        lambda: jax.value_and_grad(loss_fn)(1.0),
        lambda: jax.jit(jax.grad(loss_fn))(1.0),
        lambda: jax.value_and_grad(lambda w: (loss_fn(w), 0), has_aux=True)(1.0),
        lambda: DynamicScale().value_and_grad(loss_fn)(1.0),
    ],
)
def test_a_gradient_of_a_mean_names_what_takes_it(call):
    line = last_line(call)
    assert line.startswith("`WeightedMean` is ")
    assert "`wloss_jax.value_and_grad`" in line


@pytest.mark.parametrize("mean", [M, RUNNING], ids=["mean", "running mean"])
def test_json_is_told_how_to_write_a_mean(mean):
    for call in (
        lambda: json.dumps(mean),
        lambda: json.dumps({"step": 3, "loss": [mean]}, indent=1),
        lambda: json.JSONEncoder().encode(mean),
    ):
        line = last_line(call)
        assert line.startswith(f"`{type(mean).__name__}` is no number that JSON can")
        assert "`float(m)`" in line
    assert json.dumps(float(mean)) == "2.5"
    assert mean.__class__ is type(mean)
    assert isinstance(mean, type(mean))
    assert not isinstance(mean, dict)


# ----------------------------------------------------------------- the last line


def test_a_mean_is_itself_and_no_other():
    for mean in (M, RUNNING):
        again = jax.tree.map(lambda x: x, mean)
        assert mean == mean
        assert mean != again
        assert mean in [again, mean]
        assert {mean: 1}[mean] == 1
        assert (mean == None) is False  # noqa: E711 (as people write it)


@pytest.mark.parametrize("name", ["item", "mean", "sum", "block_until_ready"])
def test_methods_of_arrays_name_what_gives_one(name):
    for mean in (M, RUNNING):
        with pytest.raises(AttributeError, match=rf"'{name}'.*`\.compute\(\)`"):
            getattr(mean, name)()
        assert not hasattr(mean, name)
        with pytest.raises(AttributeError, match="no attribute 'shape'"):
            mean.shape  # noqa: B018 (the access is the test)
        assert float(copy.deepcopy(mean)) == float(pickle.loads(pickle.dumps(mean)))


LINES = {
    "shapes": ("`targets` has shape (4, 1)", lambda: wl.absolute_error(X, X[:, :1])),
    "shapes of classes": (
        "`labels` has shape (4, 2) and `logits` (4, 3)",
        lambda: wl.softmax_cross_entropy(X, X[:, :2]),
    ),
    "no array": ("`values` is missing", lambda: wl.per_sample(wl.weighted_mean)()),
    "a mask of numbers": (
        "`where` is float32",
        lambda: wl.absolute_error(X, X, where=X),
    ),
    "a mask as weights": (
        "`weights` is bool",
        lambda: wl.absolute_error(X, X, weights=X > 0),
    ),
    "a mask as weights of classes": (
        "`class_weights` is bool",
        lambda: wl.softmax_cross_entropy_with_integer_labels(
            X, np.zeros(B, int), class_weights=X[0] > 0
        ),
    ),
    "weights of samples, with an axis": (
        "`weights` has shape (4, 1)",
        lambda: wl.absolute_error(X, X, weights=X[:, :1]),
    ),
    "complex": (
        "`predictions` is complex (complex64)",
        lambda: wl.absolute_error(X * 1j, X),
    ),
    "one-hot labels": (
        "`labels` must be integer classes",
        lambda: wl.softmax_cross_entropy_with_integer_labels(X, X),
    ),
    "an option": ("`delta` must be", lambda: wl.huber_loss(X, X, delta=-1.0)),
    "a missing array": ("`targets` is missing", lambda: wl.absolute_error(X)),
    "all arrays missing": ("`logits` is missing", wl.softmax_z_loss),
    "an option without a default": (
        "`power` is missing",
        lambda: wl.masked(lambda x, *, power: x**power)(X),
    ),
    "missing labels of a linear loss": (
        "`labels` is missing",
        lambda: wl.linear_softmax_cross_entropy(X, X.T),
    ),
    "a missing kernel": ("`kernel` is missing", lambda: wl.linear_masked(jnp.sum)(X)),
    "another library's name": (
        "`target` is no argument here: by position come predictions, targets",
        lambda: wl.absolute_error(X, target=X),
    ),
    "rows by keyword": (
        "`labels` is no argument here: by position come features, kernel, *arrays",
        lambda: wl.linear_masked(jnp.sum)(X, X.T, labels=X),
    ),
    "no array, of several lines": (
        "`predictions` must be an array of numbers; got a `dict`.",
        lambda: wl.absolute_error({"x": X}, X),
    ),
    "strings": (
        "`predictions` must be an array of numbers; got one of dtype <U1",
        lambda: wl.absolute_error(np.array(["a"]), X),
    ),
    "objects as targets": (
        "`targets` must be an array of numbers; got one of dtype object",
        lambda: wl.absolute_error(X, np.array([None])),
    ),
    "strings as an option": (
        "`delta` must be an array of numbers; got one of dtype <U1",
        lambda: wl.huber_loss(X, X, delta=np.array("a")),
    ),
    "an axis that is not there": (
        "`axis` is 2, and there are 2 axes",
        lambda: wl.softmax_cross_entropy(X, X, axis=2),
    ),
    "an axis that comes twice": (
        "`axis` is (1, -1), and there are 2 axes",
        lambda: wl.kl_divergence(X, X, axis=(1, -1)),
    ),
    "an axis of a merge": ("`axis` is 0, and there are 0 axes", lambda: M.merge(0)),
    "an axis that is not mapped": (
        "`vocab_axis_name` 'v' is not mapped here",
        lambda: wl.linear_log_probs(X, X.T, np.zeros(B, int), vocab_axis_name="v"),
    ),
    "a sum of means": ("`axis_name` 'i' is not mapped here", lambda: M.psum("i")),
    "a list as an option": (
        "`pos_weight` must be a number, a switch or an array; got [1.0, 2.0]. Pass",
        lambda: wl.sigmoid_binary_cross_entropy(X, X, pos_weight=[1.0, 2.0]),
    ),
    "a mean as weights": (
        "`weights` is a `WeightedMean`, where an array of numbers is due: its mean is "
        "`.compute()`, its sum `.total`, and what that is divided by `.weight`.",
        lambda: wl.absolute_error(X, X, weights=M),
    ),
    "a batch by keyword only": (
        "`batch_argnums` names arguments (1,), from 0, but `loss_fn` was called with 1 "
        "positional arguments. `x` it takes by keyword only",
        lambda: wl.value_and_grad(lambda w, *, x: loss_fn(w), num_microbatches=2)(
            1.0, x=X
        ),
    ),
    "a combine of the parts alone": (
        "`combine` is called with the parts and what is differentiated",
        lambda: wl.value_and_grad(
            lambda w, x: loss_fn(w), combine=lambda m: m.compute()
        )(1.0, X),
    ),
    "a string in aux": (
        "`loss_fn` returns 'train' at `aux['name']`, which microbatches cannot stack",
        lambda: wl.value_and_grad(
            lambda w, x: (loss_fn(w), {"name": "train"}),
            has_aux=True,
            num_microbatches=2,
        )(1.0, X),
    ),
    "strings in a batch": (
        "`batch_argnums` names the batch: every leaf of it must be an array that JAX "
        "takes; got one of dtype <U1 at `['batch'][1]`",
        lambda: wl.value_and_grad(
            lambda w, batch: loss_fn(w),
            num_microbatches=2,
        )(1.0, (X, np.array(["a"] * B))),
    ),
    "a counter among parameters": (
        "`argnums[0]['step']` is int32[], and only floating arrays have a gradient",
        lambda: wl.value_and_grad(lambda w, x: loss_fn(w["w"]))(
            {"w": 1.0, "step": jnp.int32(3)}, X
        ),
    ),
    "complex parameters": (
        "`argnums[0]` is complex, and parameters here are real",
        lambda: wl.value_and_grad(lambda w, x: loss_fn(w))(1.0 + 2.0j, X),
    ),
    "factors within a term": (
        "`coefficients['a']` is a dict: there is one factor for a term",
        lambda: wl.value_and_grad(
            lambda w, x: {"a": {"b": loss_fn(w)}}, coefficients={"a": {"b": 2.0}}
        ),
    ),
    "a loss of two values": (
        f"`loss_fn` must return one floating value for each token, [n] for logits "
        f"[n, V]; for n = 3 and V = {B} it returned tuple",
        lambda: wl.linear_masked(lambda x: (x, x))(X, X.T),
    ),
}


@pytest.mark.parametrize("mistake", LINES)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("asserts", [True, False])
def test_the_last_line_begins_with_the_argument(mistake, jit, asserts):
    start, call = LINES[mistake]
    if not asserts:
        chex.disable_asserts()
    try:
        line = last_line(jax.jit(call) if jit else call)
    finally:
        chex.enable_asserts()
    assert line.startswith(start)


def test_notes_other_than_jax_s_are_kept():
    with pytest.raises(TypeError) as caught:
        wl.absolute_error(X, X, mask=X)
    caught.value.add_note("step 3")
    assert caught.value.__notes__ == ["step 3"]


# ------------------------------------------------------------- numbers of any kind


def test_whole_numbers_are_weights_wherever_weights_are():
    counts = np.array([[1, 0, 2], [3, 1, 1], [0, 0, 0], [1, 1, 1]])
    values = np.arange(12.0, dtype=np.float32).reshape(B, L)
    for dtype in (np.int8, np.uint8, np.int32, np.int64):
        m = wl.weighted_mean(values, weights=counts.astype(dtype))
        assert (m.total, m.weight) == ((values * counts).sum(), counts.sum())
    logits, labels = np.zeros((B, L), np.float32), np.array([0, 1, 2, 2])
    classes = np.array([1, 2, 3])
    m = wl.softmax_cross_entropy_with_integer_labels(
        logits, labels, class_weights=classes
    )
    assert m.weight == 1 + 2 + 3 + 3
    features, kernel = np.zeros((B, 2), np.float32), np.zeros((2, L), np.float32)
    m = wl.linear_softmax_cross_entropy(
        features, kernel, labels, weights=counts[:, 1], class_weights=classes
    )
    assert m.weight == 1 * 0 + 2 * 1 + 3 * 0 + 3 * 1
    wl.testing.assert_valid_batch(weights=counts)
    transform = wl.multi_steps(optax.sgd(1.0), np.int64(1))
    updates, _ = transform.update(1.0, transform.init(1.0), 1.0, weight=np.int32(4))
    assert updates == -1.0


class Unwritten:
    """Takes minutes to write out, as a hundred thousand arrays do."""

    def __repr__(self):
        raise AssertionError("what is right was written out")


class Samples(Unwritten, list):
    pass


class Halved(Unwritten):
    def __call__(self, predictions, *_, **__):
        return predictions / 2


class Distance(Unwritten):
    def __call__(self, first, second):
        return (first - second).sum(-1)


class MeanOfHalves(Unwritten):
    def __call__(self, params, batch):
        return wl.weighted_mean(params * batch)


RIGHT = {
    "samples": lambda: wl.pad_ragged(Samples([np.zeros(2)])),
    "an elementwise loss": lambda: wl.masked(Halved())(jnp.ones(2)),
    "a distance": lambda: wl.triplet_margin_with_distance_loss(
        *3 * [jnp.ones((2, 2))], distance_function=Distance()
    ),
    "a loss of logits": lambda: wl.linear_masked(Halved()),
    "a loss function": lambda: wl.value_and_grad(MeanOfHalves())(1.0, jnp.ones(2)),
    "how many calls": lambda: wl.multi_steps(optax.sgd(1.0), Halved()),
}


@pytest.mark.parametrize("call", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_not_written_out(call):
    call()


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("combine", [None, lambda m, _: m.compute()])
def test_what_a_loss_returns_is_not_written_out(monkeypatch, num_microbatches, combine):
    def loss_fn(params, batch):
        mean = wl.weighted_mean(params * batch)
        return mean, {"too": mean}

    grad = wl.value_and_grad(
        loss_fn, combine=combine, has_aux=True, num_microbatches=num_microbatches
    )
    monkeypatch.setattr(wl.WeightedMean, "__repr__", Unwritten.__repr__)
    assert grad(2.0, jnp.ones(2))[1] == 1


@pytest.mark.parametrize(
    ("loss", "is_theirs"),
    [
        (wl.softmax_cross_entropy, True),
        (wl.safe_softmax_cross_entropy, True),
        (wl.poly_loss_cross_entropy, True),
        (wl.multilabel_soft_margin_loss, False),
        (wl.sigmoid_binary_cross_entropy, False),
    ],
)
def test_integer_labels_are_told_which_loss_is_theirs(loss, is_theirs):
    with pytest.raises(ValueError, match=r"^`labels` has shape \(4,\)") as error:
        loss(jnp.ones((4, 3)), np.zeros(4, int))
    assert ("_with_integer_labels" in str(error.value)) == is_theirs
