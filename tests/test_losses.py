"""The grid: every loss of the table in `grid` by every law that applies to it.

Compiling is what these tests spend their time on, so most laws share one compiled
function of a loss, `compiled`, and one shape.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import wloss_jax as wl
from tests.oracle import grid, reference, strategies
from tests.oracle.tables import every_third, one_of_each

B = L = 4  # equal, so that no law holds by the wrong alignment
LENGTHS = [4, 0, 2, 3]
NAN = (np.nan, -100)

# Of the module's scope, so that the laws of one loss run one after the other, where
# tests are spread over processes too, and its compiled function serves them all.
every_loss = pytest.mark.parametrize("case", grid.CASES, ids=repr, scope="module")
# Laws that hold for all losses alike, by what they share, are tried with some of them.
some_losses, other_losses, further_losses = (
    pytest.mark.parametrize(
        "case", every_third(grid.CASES, start), ids=repr, scope="module"
    )
    for start in range(3)
)
some_losses_of_labels = pytest.mark.parametrize(
    "case",
    every_third(case for case in grid.CASES if case.labels),
    ids=repr,
    scope="module",
)


def mean_of(case, arrays, keywords, loss=None):
    """The mean as a function of the differentiable arrays and the weights."""

    def mean(parts, weights):
        merged = list(arrays)
        for k, part in zip(case.differentiable, parts, strict=True):
            merged[k] = part
        m = (loss or case.loss)(*merged, **keywords | {"weights": weights})
        return m.merge().compute(), m

    return mean, [arrays[k] for k in case.differentiable], keywords["weights"]


def value_and_gradients(case, loss=None):
    """Compiles: the mean, its parts, and the gradients in the data and the weights."""

    @jax.jit
    def evaluate(arrays, keywords):
        mean, *arguments = mean_of(case, arrays, keywords, loss)
        gradients = jax.value_and_grad(mean, (0, 1), has_aux=True)
        (value, m), (gradient, weight_gradient) = gradients(*arguments)
        return value, m, gradient, weight_gradient

    return evaluate


@functools.cache
def compiled(case):
    # Broadcasting that adds an axis is a mistake in waiting, here and in optax.
    evaluate = jax.numpy_rank_promotion("raise")(value_and_gradients(case))
    return lambda *arguments: jax.tree.map(np.asarray, evaluate(*arguments))


def assert_close(actual, desired, scale=None, rtol=5e-6):
    """Compares in units of ``scale``, by default the largest entry.

    5e-6 is some 40 roundings of float32: a few in each exponential and logarithm, and
    what is left when they are subtracted.
    """
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    scale = np.abs(desired).max(initial=0) if scale is None else scale
    np.testing.assert_allclose(actual, desired, rtol=0, atol=rtol * scale)


def assert_all_close(actual, desired, **keywords):
    for one, other in zip(actual, desired, strict=True):
        assert_close(one, other, **keywords)


def assert_oracle(case, batch, size, outcome, **keywords):
    value, m, gradients, weight_gradient = outcome
    oracle = grid.expected(case, batch, size)
    assert_close(value, oracle.mean, oracle.magnitude, **keywords)
    assert_close(m.merge().weight, oracle.weight, **keywords)
    total_scale = oracle.magnitude * oracle.weight
    assert_close(m.merge().total, oracle.total, total_scale, **keywords)
    for pair in zip(gradients, oracle.gradients, oracle.slopes, strict=True):
        assert_close(*pair, **keywords)
    np.testing.assert_array_equal(weight_gradient, 0)


# ------------------------------------------------------- against the float64 oracle


@pytest.mark.core
@every_loss
@settings(deadline=None, max_examples=6)
@example(lengths=LENGTHS, seed=0, poison=NAN)
@example(lengths=[0, 0, 0, 0], seed=0, poison=NAN)
@given(
    lengths=strategies.lengths(B, L), seed=strategies.seeds, poison=strategies.poisons
)
def test_value_and_gradients_are_the_oracles(case, lengths, seed, poison):
    batch = grid.ragged(case, seed, lengths)
    outcome = compiled(case)(*grid.pad(batch, L, poison))
    assert_oracle(case, batch, L, outcome)


@some_losses
def test_packed_rows_are_the_oracles(case):
    """Four samples, one of them empty, in two rows, with padding between and after."""
    batch = grid.ragged(case, 1, LENGTHS)
    arrays, keywords = grid.pad(batch, L)
    layout = [[0, 0, 0, 0, -1, 3, 3, 3, 9], [-1, 2, 2, -5, -1, -1, 4, 4, 4]]
    source = np.full((2, 9, 2), -1)
    seen = [0] * B
    for row, column in np.ndindex(2, 9):
        sample = layout[row][column]
        if 0 <= sample < B:
            source[row, column] = sample, seen[sample]
            seen[sample] += 1
    is_padding = source[..., 0] < 0

    def pack(array, poison):
        packed = array[source[..., 0], source[..., 1]]
        packed[is_padding] = poison
        return packed

    floating = [not np.issubdtype(array.dtype, np.integer) for array in arrays]
    packed = [
        pack(x, np.nan if f else -100) for x, f in zip(arrays, floating, strict=True)
    ]
    where, weights = pack(keywords["where"], True), pack(keywords["weights"], np.inf)
    outcome = value_and_gradients(case, functools.partial(case.loss, num_segments=B))(
        packed, {"where": where, "weights": weights, "segment_ids": np.array(layout)}
    )

    oracle = grid.expected(case, batch, L)
    per_segment = np.array(oracle.per_sample)
    scale = oracle.magnitude * oracle.weight
    assert outcome[1].total.shape == (B,)
    assert_close(outcome[1].total, per_segment[:, 0], scale)
    assert_close(outcome[1].weight, per_segment[:, 1])
    desired = [
        gradient[source[..., 0], source[..., 1]] for gradient in oracle.gradients
    ]
    for gradient in desired:
        gradient[is_padding] = 0
    assert_close(outcome[0], oracle.mean, oracle.magnitude)
    assert_all_close(outcome[2], desired)
    np.testing.assert_array_equal(outcome[3], 0)


@further_losses
def test_per_sample_is_the_oracles_loop_over_samples(case):
    size = 6  # another amount of padding than elsewhere
    batch = grid.ragged(case, 2, LENGTHS)
    arrays, keywords = grid.pad(batch, size)
    m = jax.jit(wl.per_sample(case.loss))(*arrays, **keywords)
    oracle = grid.expected(case, batch, size)
    total, weight, mean = np.transpose(oracle.per_sample)
    assert_close(m.total, total, oracle.magnitude * oracle.weight)
    assert_close(m.weight, weight)
    assert_close(m.compute(), mean, oracle.magnitude)


@other_losses
def test_jvp_and_second_derivatives_are_the_oracles(case):
    """Tangents too may hold anything where nothing counts."""
    batch = grid.ragged(case, 3, LENGTHS)
    arrays, keywords = grid.pad(batch, L)
    rng = np.random.default_rng(3)
    counts = keywords["where"] & wl.length_mask(keywords["lengths"], L)
    tangents = []
    for k in case.differentiable:
        mask = counts.reshape(counts.shape + (1,) * (arrays[k].ndim - 2))
        tangent = np.where(mask, rng.normal(size=arrays[k].shape), np.nan)
        tangents.append(tangent.astype(np.float32))

    @jax.jit
    def jvp(arrays, keywords, tangents):
        mean, parts, weights = mean_of(case, arrays, keywords)
        return jax.jvp(
            jax.value_and_grad(lambda parts: mean(parts, weights)[0]),
            (parts,),
            (tangents,),
        )

    (_, gradients), (change, second) = jvp(arrays, keywords, tangents)

    oracle = grid.expected(case, batch, L)
    products = [
        np.where(g == 0, 0, g * t)
        for g, t in zip(oracle.gradients, tangents, strict=True)
    ]
    assert_close(
        change, sum(map(np.sum, products)), sum(abs(p).sum() for p in products)
    )
    assert_all_close(gradients, oracle.gradients)
    desired = grid.zeros(case, batch, L)
    for position, element, w in grid.counted(case, batch):
        parts = reference.second_derivatives(
            case.reference,
            element,
            case.differentiable,
            [tangent[position].astype(np.float64) for tangent in tangents],
        )
        for array, part in zip(desired, parts, strict=True):
            array[position] = part * (w / oracle.weight)
    for array, one in zip(second, desired, strict=True):
        # Units of 1 at least: where the second derivative is 0, the oracle's is noise.
        assert_close(array, one, max(1, np.abs(one).max()), rtol=2e-5)


@some_losses_of_labels
def test_the_forms_for_accelerators_are_the_oracles_too(case, monkeypatch):
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)
    )
    batch = dataclasses.replace(
        grid.ragged(case, 15, LENGTHS), weights=[np.ones(n) for n in LENGTHS]
    )
    arrays, keywords = grid.pad(batch, L)
    del keywords["weights"]  # for then elements are counted
    position, *_ = next(grid.counted(case, batch))
    wrong = list(map(np.array, arrays))
    wrong[case.labels][position] = grid.CLASSES

    def mean(*arrays):
        m = case.loss(*map(jnp.asarray, arrays), **keywords)
        return m.compute(), m

    with jax.disable_jit():  # or what was compiled before would run
        (value, m), gradient = jax.value_and_grad(mean, has_aux=True)(*arrays)
        nan, _ = mean(*wrong)
    oracle = grid.expected(case, batch, L)
    assert_close(value, oracle.mean, oracle.magnitude)
    assert_close(m.weight, oracle.weight)
    assert_close(gradient, oracle.gradients[0])
    assert np.isnan(nan)


# --------------------------------------------------------------- what is masked is gone


@every_loss
def test_what_padding_holds_changes_no_bit(case):
    batch = grid.ragged(case, 4, LENGTHS)
    outcomes = [
        compiled(case)(*grid.pad(batch, L, poison))
        for poison in [NAN, (np.inf, 2**31 - 1), (-1.0, -1), (1e30, 3), (0.0, 0)]
    ]
    for outcome in outcomes[1:]:
        jax.tree.map(np.testing.assert_array_equal, outcome, outcomes[0])


@every_loss
def test_gradient_where_nothing_counts_is_exactly_0(case):
    batch = grid.ragged(case, 5, LENGTHS)
    value, _, gradients, _ = compiled(case)(*grid.pad(batch, L))
    is_padding = np.ones((B, L), bool)
    for position, _, _ in grid.counted(case, batch):
        is_padding[position] = False
    assert np.isfinite(value)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[is_padding], 0)
        assert np.any(gradient[~is_padding] != 0)


@every_loss
def test_nothing_valid_is_0_with_a_gradient_of_0(case):
    batch = grid.ragged(case, 6, [0, 0, 0, 0])
    value, m, gradients, weight_gradient = compiled(case)(*grid.pad(batch, L))
    assert (value, m.total, m.weight) == (0, 0, 0)
    for gradient in (*gradients, weight_gradient):
        np.testing.assert_array_equal(gradient, 0)


@every_loss
def test_nan_in_padding_is_no_alarm_for_debug_nans(case):
    batch = grid.ragged(case, 4, LENGTHS)
    with jax.debug_nans(True):
        value, *_ = compiled(case)(*grid.pad(batch, L))
    assert np.isfinite(value)


# ---------------------------------------------------------- what counts stays visible


@every_loss
def test_nan_that_counts_is_in_the_value_and_in_its_gradient_only(case):
    batch = grid.ragged(case, 7, LENGTHS)
    arrays, keywords = grid.pad(batch, L)
    position, *_ = list(grid.counted(case, batch))[2]
    for k in case.differentiable:
        poisoned = list(map(np.array, arrays))
        poisoned[k][position] = np.nan
        assert_nan_at(position, compiled(case)(tuple(poisoned), keywords), case)


@some_losses_of_labels
@pytest.mark.parametrize("label", [-1, grid.CLASSES, -100, 2**31 - 1, -(2**31)])
def test_label_out_of_range_that_counts_is_nan(case, label):
    batch = grid.ragged(case, 7, LENGTHS)
    arrays, keywords = grid.pad(batch, L)
    position, *_ = list(grid.counted(case, batch))[2]
    arrays[case.labels][position] = label
    assert_nan_at(position, compiled(case)(arrays, keywords), case)


def assert_nan_at(position, outcome, case):
    """One element turned NaN: so do the mean and its own gradient, no other's."""
    assert np.isnan(outcome[0])
    for gradient in map(np.array, outcome[2]):
        # The derivative of the values themselves does not depend on what they hold.
        if case.loss is not wl.weighted_mean:
            assert np.isnan(gradient[position]).any()
        gradient[position] = 0
        assert np.isfinite(gradient).all()


# ----------------------------------------------- what must not change the mean, and how


@every_loss
def test_permuted_samples_have_the_same_mean(case):
    batch = grid.ragged(case, 8, LENGTHS)
    order = [2, 3, 0, 1]
    value, _, gradients, _ = compiled(case)(*grid.pad(batch, L))
    permuted = compiled(case)(*grid.pad(batch.select(order), L))
    assert_close(permuted[0], value, grid.expected(case, batch, L).magnitude)
    assert_all_close(permuted[2], [gradient[order] for gradient in gradients])


@every_loss
@pytest.mark.parametrize("scale", [1e-20, 1e-7, 3.0, 1e20])
def test_scaled_weights_have_the_same_mean(case, scale):
    value, m, gradients, _ = compiled(case)(*grid.pad(grid.ragged(case, 9, LENGTHS), L))
    batch = grid.ragged(case, 9, LENGTHS, scale=scale)
    scaled = compiled(case)(*grid.pad(batch, L))
    assert_close(scaled[0], value, grid.expected(case, batch, L).magnitude)
    assert_all_close(scaled[2], gradients)
    assert_close(scaled[1].weight, np.float64(m.weight) * scale)


@every_loss
@settings(deadline=None, max_examples=4)
@given(lengths=strategies.lengths(B, L), seed=strategies.seeds)
def test_mean_of_equal_losses_is_that_loss(case, lengths, seed):
    batch = grid.ragged(case, seed, lengths)
    one = case.data(np.random.default_rng(10), 1)
    equal = [
        tuple(
            np.repeat(x, n, axis=0).astype(y.dtype)
            for x, y in zip(one, sample, strict=True)
        )
        for n, sample in zip(lengths, batch.samples, strict=True)
    ]
    batch = grid.Ragged(equal, batch.where, batch.weights)
    elements = list(grid.counted(case, batch))
    loss = case.reference(*elements[0][1]) if elements else 0.0
    assert_close(compiled(case)(*grid.pad(batch, L))[0], loss)


@every_loss
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("where", (B, 1)),
        ("where", (1, L)),
        ("where", (B + 1,)),
        ("weights", (B, 1)),
        ("weights", (B, L, 1)),
        ("segment_ids", (1, L)),
        ("lengths", (B, 1)),
        ("lengths", (B, L)),
        ("lengths", (1,)),
    ],
)
def test_other_alignments_are_errors(case, name, shape):
    arrays, _ = grid.pad(grid.ragged(case, 0, [L] * B), L)
    dtype = {"where": bool, "weights": np.float32}.get(name, np.int32)
    keywords = {name: np.ones(shape, dtype)}
    if name == "segment_ids":
        keywords["num_segments"] = 2
    with pytest.raises(AssertionError, match=rf"`{name}` has shape \({shape[0]},"):
        case.loss(*arrays, **keywords)


# -------------------------------------------------------------- compiled, or not at all


@further_losses
def test_without_jit_all_is_the_same(case):
    batch = grid.ragged(case, 12, LENGTHS)
    arrays, keywords = grid.pad(batch, L)
    value, m, *_ = compiled(case)(arrays, keywords)
    with jax.disable_jit():
        plain = case.loss(*map(jnp.asarray, arrays), **keywords)
    magnitude = grid.expected(case, batch, L).magnitude
    assert_close(plain.compute(), value, magnitude)
    assert_close(plain.weight, m.weight)


PUBLIC = [
    getattr(wl, name)
    for name in wl.__all__
    if getattr(getattr(wl, name), "__module__", "").startswith("wloss_jax.losses.")
    and name not in ("masked", "per_sample")
]


def test_the_table_has_every_public_loss():
    in_table = {getattr(case.loss, "func", case.loss) for case in grid.CASES}
    assert set(PUBLIC) - in_table == set()
    assert len(PUBLIC) > 20


def test_every_elementwise_loss_of_optax_is_here():
    left_out = {
        *("ntxent", "ranking_softmax_loss", "make_fenchel_young_loss", "smooth_labels"),
        *("dice_loss", "binary_dice_loss", "multiclass_generalized_dice_loss"),
        *("cosine_similarity", "ctc_loss_with_forward_probs", "convex_kl_divergence"),
    }
    theirs = {
        name
        for name, loss in vars(optax.losses).items()
        if inspect.isfunction(loss) and not name.startswith("_")
    }
    assert theirs - left_out <= {loss.__name__ for loss in PUBLIC}


@pytest.mark.parametrize("loss", PUBLIC, ids=lambda loss: loss.__name__)
def test_public_losses_share_optax_options_and_the_keywords(loss):
    ours = inspect.signature(loss).parameters
    shared = ["where", "lengths", "weights", "segment_ids", "num_segments"]
    assert list(ours)[-5:] == shared
    assert all(ours[name].default is None for name in shared)
    theirs = getattr(optax.losses, loss.__name__, None)
    if theirs is not None:
        expected = {
            name: parameter.default
            for name, parameter in inspect.signature(theirs).parameters.items()
            if name != "where" and parameter.default not in (None, parameter.empty)
        }
        assert expected.items() <= {n: p.default for n, p in ours.items()}.items()


@other_losses
def test_an_eager_call_runs_one_compiled_program(case):
    arrays, keywords = grid.pad(grid.ragged(case, 0, [L] * B), L)
    case.loss(*arrays, **keywords)
    with jax.no_tracing():
        case.loss(*arrays, **keywords)


@every_loss
def test_losses_are_inlined_into_a_callers_jit(case):
    arrays, keywords = grid.pad(grid.ragged(case, 0, [L] * B), L)
    # Lowered, not only traced: jax 0.12 inlines late.
    lowered = jax.jit(lambda *arrays: case.loss(*arrays, **keywords)).lower(*arrays)
    name = getattr(case.loss, "func", case.loss).__name__
    assert f"call @{name}" not in lowered.as_text()


# ------------------------------------------------------------------------- precision


@other_losses
def test_bfloat16_with_masks_and_weights_of_samples_is_the_oracles(case):
    """Of the rounded inputs, to float32 rounding: nothing is summed in bfloat16.

    ``where`` and ``weights`` of ``[B]`` line up with samples; as B is L, lining up with
    positions would fit as well.
    """
    where, weights = np.array([True, False, True, True]), np.float32([3, 5, 0.5, 2])
    batch = dataclasses.replace(
        grid.ragged(case, 13, [L] * B, dtype=jnp.bfloat16),
        where=[np.full(L, counts) for counts in where],
        weights=[np.full(L, weight) for weight in weights],
    )
    arrays, _ = grid.pad(batch, L)
    keywords = {"where": where, "weights": weights.astype(jnp.bfloat16)}
    value, m, gradients, _ = value_and_gradients(case)(arrays, keywords)

    oracle = grid.expected(case, batch, L)
    assert value.dtype == m.total.dtype == m.weight.dtype == jnp.float32
    assert_close(value, oracle.mean, oracle.magnitude)
    assert_close(m.weight, oracle.weight)
    for gradient, desired in zip(gradients, oracle.gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, desired, rtol=2**-8)  # one rounding, at the very end


@some_losses
def test_float64_stays_float64(case):
    with jax.enable_x64(True):
        batch = grid.ragged(case, 14, LENGTHS, dtype=np.float64)
        outcome = value_and_gradients(case)(*grid.pad(batch, L))
        assert outcome[0].dtype == outcome[1].total.dtype == jnp.float64
        # The oracle's own derivatives are good to about 1e-9.
        assert_oracle(case, batch, L, outcome, rtol=1e-8)


@every_loss
def test_float32_stays_float32_under_x64(case):
    arrays, keywords = grid.pad(grid.ragged(case, 14, LENGTHS), L)
    with jax.enable_x64(True):
        m = jax.eval_shape(case.loss, *arrays, **keywords)
    assert m.total.dtype == m.weight.dtype == jnp.float32


# --------------------------------------------------------------- what single losses do


@pytest.mark.parametrize("loss", [wl.absolute_error, wl.quantile_loss])
def test_gradient_at_an_error_of_0_is_0(loss):
    x = jnp.array([1.0, 2.0])
    gradients = jax.grad(lambda x, y: loss(x, y).compute(), (0, 1))(x, x)
    np.testing.assert_array_equal(gradients, 0)


@pytest.mark.parametrize("variance", [0.0, 1e-9, -1e-3, -1e2, -1e30])
def test_the_variance_of_gaussian_nll_has_a_floor_that_passes_gradients(variance):
    x, y = np.float32([1.5]), np.float32([1.0])

    def mean(x, v):
        return wl.gaussian_nll(x, y, v, eps=1e-2).compute()

    value, gradients = jax.value_and_grad(mean, (0, 1))(x, np.float32([variance]))
    floored = [0, 1e-2]
    np.testing.assert_allclose(value, reference.gaussian_nll(0.5, *floored), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], 0.5 / 1e-2, rtol=1e-6)
    np.testing.assert_allclose(gradients[1], (1 / 1e-2 - 0.25 / 1e-4) / 2, rtol=1e-6)


def test_an_infinite_variance_is_an_infinite_loss():
    inf = jnp.array([jnp.inf])
    assert wl.gaussian_nll(jnp.zeros(1), jnp.zeros(1), inf).compute() == jnp.inf


def test_poisson_nll_of_counts_up_to_1_has_no_stirling_term():
    counts = np.array([0, 1, 2, 50])
    m = wl.per_sample(wl.poisson_nll)(jnp.zeros(4), counts, full=True)
    desired = [reference.poisson_nll(0.0, n, full=True) for n in counts.tolist()]
    np.testing.assert_allclose(m.total, desired, rtol=1e-6)


@pytest.mark.parametrize("name", ["kl_divergence", "generalized_kl_divergence"])
def test_targets_of_0_add_nothing_to_a_divergence(name):
    log_p, t = np.log(np.float32([[0.5, 0.25, 0.25]])), np.float32([[0, 1, 0]])
    value, gradient = jax.value_and_grad(lambda x: getattr(wl, name)(x, t).compute())(
        log_p
    )
    np.testing.assert_allclose(
        value, getattr(reference, name)(log_p[0].astype(float), t[0]), rtol=1e-6
    )
    assert np.isfinite(gradient).all()


def test_safe_softmax_cross_entropy_takes_classes_of_minus_infinity():
    logits = jnp.array([[1.0, -jnp.inf, 2.0], [jnp.nan, -jnp.inf, jnp.inf]])
    labels = jnp.array([[0.25, 0.0, 0.75], [0.5, 0.5, 0.0]])
    value, gradient = jax.value_and_grad(
        lambda x: wl.safe_softmax_cross_entropy(x, labels, lengths=1).compute()
    )(logits)
    p = np.exp(reference.log_softmax(np.array([1.0, 2.0])))
    np.testing.assert_allclose(value, -np.dot([0.25, 0.75], np.log(p)), rtol=1e-6)
    desired = [[p[0] - 0.25, 0, p[1] - 0.75], [0, 0, 0]]
    np.testing.assert_allclose(gradient, desired, atol=1e-6)


@pytest.mark.parametrize("logit", [-1e30, -200.0, -20.0, 0.0, 20.0, 200.0, 1e30])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    "loss", [wl.sigmoid_binary_cross_entropy, wl.sigmoid_focal_loss]
)
def test_extreme_logits_stay_finite(loss, label, logit):
    """Each is about what is wrong of the logit, and its gradient that sign."""
    value, gradient = jax.value_and_grad(lambda x: loss(x, label).compute())(logit)
    wrong = max(0.0, -logit if label else logit)
    np.testing.assert_allclose(value, wrong, rtol=1e-6, atol=np.log(2) + 1e-6)
    assert abs(gradient) <= 1 + 1e-6
    if abs(logit) >= 20:
        sign = np.sign(logit) if wrong else 0
        np.testing.assert_allclose(gradient, sign, atol=1e-6)


SMOOTH = {
    "log_cosh": [{}],
    "sigmoid_binary_cross_entropy": [{}],
    "sigmoid_focal_loss": [{"gamma": 0.5}, {"gamma": 1.0}, {"gamma": 2.0}],
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_losses_have_two_derivatives_everywhere(name):
    """At 0 above all, where they are put together from two halves."""
    points = np.float32([-40, -9, -0.5, -1e-4, 0, 1e-4, 0.5, 9, 40])
    for options in SMOOTH[name]:
        loss = functools.partial(getattr(reference, name), **options)

        def mean(x, y, options=options):
            return getattr(wl, name)(x, y, **options).compute()

        derivatives = jax.jit(
            jax.vmap(jax.value_and_grad(jax.grad(mean)), in_axes=(0, None))
        )
        for label in (0.0, 0.25, 1.0):
            slopes, curvatures = derivatives(points, label)
            for x, slope, curvature in zip(points, slopes, curvatures, strict=True):
                element = (np.float64(x), label)
                (first,) = reference.gradients(loss, element, (0,))
                (second,) = reference.second_derivatives(loss, element, (0,), [1.0])
                np.testing.assert_allclose(slope, first, atol=2e-6)
                np.testing.assert_allclose(curvature, second, atol=1e-5)


@pytest.mark.parametrize("error", [-1e30, -1e4, 1e-3, 1e4])
def test_log_cosh_of_extreme_errors_stays_finite(error):
    value, gradient = jax.value_and_grad(lambda x: wl.log_cosh(x, 0.0).compute())(error)
    desired = abs(error) - np.log(2) if abs(error) > 1 else error**2 / 2
    np.testing.assert_allclose(value, desired, rtol=1e-6, atol=1e-7)
    # The difference of two numbers of size 1, each a few roundings of 6e-8 off.
    np.testing.assert_allclose(gradient, np.tanh(error), rtol=1e-6, atol=2e-7)


def test_float16_errors_that_float16_cannot_square():
    x, y = jnp.array([1e4, 1.0], jnp.float16), jnp.array([-1e4, 0.0], jnp.float16)
    m = wl.squared_error(x, y)
    np.testing.assert_allclose(m.compute(), 2e8, rtol=1e-3)
    gradient = jax.grad(lambda x: wl.squared_error(x, y).compute())(x)
    np.testing.assert_allclose(gradient, [2e4, 1], rtol=1e-3)


@pytest.mark.parametrize("label", [-1, 2, 7])
def test_a_sparsemax_label_that_is_neither_0_nor_1_is_nan(label):
    labels = jnp.array([1, label])
    assert jnp.isnan(wl.sparsemax_loss(jnp.zeros(2), labels).compute())
    assert wl.sparsemax_loss(jnp.zeros(2), labels, lengths=1).compute() == 0.25


def test_bool_labels_are_0_and_1():
    x, labels = jnp.array([0.5, -2.0]), np.array([True, False])
    for loss in (
        *(wl.sparsemax_loss, wl.sigmoid_binary_cross_entropy, wl.sigmoid_focal_loss),
        *(wl.absolute_error, wl.huber_loss, wl.poisson_nll, wl.hinge_loss),
    ):
        of_bool, of_int = loss(x, labels), loss(x, labels.astype(np.int32))
        np.testing.assert_array_equal(of_bool.total, of_int.total)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
def test_ctc_under_shard_map_that_checks_what_varies():
    """optax's scan starts from constants, and goes on to what varies."""
    (case,) = (case for case in grid.CASES if case.name == "ctc_loss")
    batch = grid.ragged(case, 16, LENGTHS)
    arrays, keywords = grid.pad(batch, L)
    sharded = jax.shard_map(
        lambda arrays, keywords: case.loss(*arrays, **keywords).psum("devices"),
        mesh=Mesh(np.array(jax.devices()[:2]), ("devices",)),
        in_specs=PartitionSpec("devices"),
        out_specs=PartitionSpec(),
    )
    m = jax.jit(sharded)(arrays, keywords)
    oracle = grid.expected(case, batch, L)
    assert_close(m.compute(), oracle.mean, oracle.magnitude)
    assert_close(m.weight, oracle.weight)


LOSSES_WITH_AXIS = [
    case
    for case in grid.CASES
    if "axis" in inspect.signature(case.loss).parameters and case.name[:6] != "masked"
]


@pytest.mark.parametrize("case", LOSSES_WITH_AXIS, ids=repr)
def test_axis_says_where_the_events_are(case):
    arrays, keywords = grid.pad(grid.ragged(case, 0, [L] * B), L)
    m = case.loss(*arrays, **keywords)

    def moved(source, destination, split=False):
        for x in arrays:
            if x.ndim < 3:
                yield x
            elif split:  # one axis of 3 into two, of 1 and 3
                yield np.moveaxis(x[..., None], -1, destination)
            else:
                yield np.moveaxis(x, source, destination)

    with jax.disable_jit():  # which spares compiling
        for axis in (0, 1, -3):
            other = case.loss(*moved(2, axis), axis=axis, **keywords)
            jax.tree.map(functools.partial(assert_close, scale=50), other, m)
        if case.name != "triplet_margin_loss":
            other = case.loss(*moved(2, 0, split=True), axis=(0, -1), **keywords)
            jax.tree.map(functools.partial(assert_close, scale=50), other, m)
            one = [x[0, 0] for x in arrays]
            assert case.loss(*one, axis=None).total.shape == ()


# ------------------------------------------------------ labels, and their four options


cross_entropy = wl.softmax_cross_entropy_with_integer_labels


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 2**24])
def test_ignore_index_is_where_the_label_is_another(ignore_index):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 3)).astype(np.float32)
    # 2**24 + 1 is 2**24 in float32: labels are compared as the integers they are.
    labels = np.where(rng.random((3, 4)) < 0.4, ignore_index, 1)
    where = np.array([True, False, True])
    ignored = cross_entropy(logits, labels, ignore_index=ignore_index, where=where)
    both = (labels != ignore_index) & where[:, None]
    jax.tree.map(
        np.testing.assert_array_equal,
        ignored,
        cross_entropy(logits, labels, where=both),
    )
    other = cross_entropy(logits, np.full((3, 4), 2**24 + 1), ignore_index=2**24)
    assert other.weight == 12
    assert jnp.isnan(other.compute())


def test_the_finder_of_nan_finds_none_in_ignored_labels():
    """Outside of a jit a gradient is looked at operation by operation."""
    logits, labels = jnp.ones((2, 3)), jnp.array([1, -100])
    with jax.debug_nans(True):
        gradient = jax.grad(
            lambda x: cross_entropy(x, labels, ignore_index=-100).compute()
        )(logits)
    np.testing.assert_allclose(gradient[0], [1 / 3, -2 / 3, 1 / 3], rtol=1e-6)


def test_class_weights_are_in_the_denominator():
    """PyTorch's convention; smoothing and z-loss are weighted with their element."""
    logits = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    labels = np.array([0, 2, 2, 1])
    options = {"label_smoothing": 0.2, "z_loss": 0.1}
    m = cross_entropy(
        logits,
        labels,
        class_weights=np.float32([1, 0, 5]),
        weights=np.float32([1, 2, 3, 4]),
        **options,
    )
    each = wl.per_sample(cross_entropy)(logits, labels, **options).total
    np.testing.assert_allclose(m.total, np.dot([1, 10, 15, 0], each), rtol=1e-6)
    assert m.weight == 26


def test_class_weights_are_multiplied_in_float32():
    """Of 300 and 300 the product is no float16."""
    many = jnp.full(3, 300, jnp.float16)
    m = cross_entropy(
        jnp.zeros((1, 3)), np.array([0]), class_weights=many, weights=many[:1]
    )
    assert m.weight == 90000


def test_class_weights_are_multiplied_in_the_precision_of_the_logits():
    """Of 1 + 2**-23 and itself the product is no float32."""
    odd = np.full(3, 1 + 2**-23, np.float32)
    with jax.enable_x64(True):
        m = cross_entropy(
            np.zeros((1, 3)), np.array([0]), class_weights=odd, weights=odd[:1]
        )
    assert float(m.weight) == (1 + 2**-23) ** 2


def test_no_gradient_through_class_weights():
    gradient = jax.grad(
        lambda w: (
            cross_entropy(jnp.ones((2, 3)), jnp.array([0, 1]), class_weights=w).total
        )
    )(jnp.ones(3))
    np.testing.assert_array_equal(gradient, 0)


def test_a_nan_class_weight_of_no_label_that_counts_is_gone():
    weights = jnp.array([jnp.nan, 1.0, 2.0])
    m = cross_entropy(
        jnp.zeros((3, 3)),
        jnp.array([1, 2, -100]),
        class_weights=weights,
        ignore_index=-100,
    )
    assert m.weight == 3


# -------------------------------------------------------------------------- per_sample


def test_per_sample_shares_options_and_class_weights():
    """Of B == V classes, where mapping the class weights would go unnoticed."""
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(3, 2, 3)), rng.integers(0, 3, (3, 2))
    logits, class_weights = np.float32(logits), np.float32([1, 5, 9])
    options = {"class_weights": class_weights, "label_smoothing": 0.1, "z_loss": 0.1}
    kept = wl.per_sample(cross_entropy)(
        logits, labels, lengths=np.array([2, 0, 1]), **options
    )
    merged = cross_entropy(logits, labels, lengths=np.array([2, 0, 1]), **options)
    np.testing.assert_allclose(kept.merge().total, merged.total, rtol=1e-6)
    np.testing.assert_array_equal(kept.weight[1], 0)
    np.testing.assert_array_equal(kept.merge().weight, merged.weight)


def test_per_sample_shares_kernel_and_bias():
    def linear(features, kernel, targets, *, bias=None, **keywords):
        predictions = features @ kernel + (0 if bias is None else bias)
        return wl.squared_error(predictions, targets, **keywords)

    rng = np.random.default_rng(3)
    features, kernel = rng.normal(size=(4, 3, 4)), rng.normal(size=4)
    targets, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    arrays = [x.astype(np.float32) for x in (features, kernel, targets, bias)]
    m = wl.per_sample(linear)(
        *arrays[:3], bias=arrays[3], lengths=np.array([3, 0, 1, 2])
    )
    errors = (features @ kernel + bias - targets) ** 2
    desired = [errors[b, :n].sum() for b, n in enumerate([3, 0, 1, 2])]
    np.testing.assert_allclose(m.total, desired, rtol=1e-5)
    assert m.weight.tolist() == [3, 0, 1, 2]


def test_per_sample_takes_arrays_by_name_and_packed_rows():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    m = wl.per_sample(wl.absolute_error)(
        predictions=x,
        targets=0 * x,
        segment_ids=np.array([[0, 1, 1], [-1, 0, 0]]),
        num_segments=2,
    )
    assert m.total.tolist() == [[0, 3], [9, 0]]
    assert m.weight.tolist() == [[1, 2], [2, 0]]


def test_per_sample_shares_the_options_of_a_users_loss():
    scaled = wl.masked(lambda x, y, scale=1.0: scale * (x - y))
    m = wl.per_sample(scaled)(np.ones((2, 3), "f"), np.zeros((2, 3), "f"), scale=2.0)
    assert m.compute().tolist() == [2, 2]


# ------------------------------------------------------------- masked, of user's losses

SINGULAR = {
    "sqrt": lambda x, y: jnp.sqrt(x) + jnp.sqrt(y),
    "rsqrt": lambda x, y: jax.lax.rsqrt(x * y),
    "log": lambda x, y: jnp.log(x) * jnp.log(y),
    "log1p": lambda x, y: jnp.log1p(-x) - jnp.log1p(-y),
    "reciprocal": lambda x, y: 1 / x + 1 / y + 1 / (x - 1) + 1 / (y + 1),
    "reciprocal of the error": lambda x, y: 1 / (x - y),
    "log of the error": lambda x, y: jnp.log((x - y) ** 2),
    "root of the error": lambda x, y: jnp.sqrt((x - y) ** 2),
    "power": lambda x, y: x**y,
    "arcsin": lambda x, y: jnp.arcsin(x) + jnp.arccos(y) + jnp.arctanh(x),
    "logit": lambda x, y: jax.scipy.special.logit(x) - jax.scipy.special.logit(y),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_a_users_loss_is_as_if_padding_were_not_there(name):
    """Gradients too, of the data and of what the loss closes over."""
    data = np.float32([[0.75, 0.3, 0.6], [0.2, 0.45, 0.9]])

    @jax.jit
    def value_and_gradients(data, lengths):
        def mean(scale, shift, data):
            def loss(x, y):
                return scale * SINGULAR[name](scale * x + shift, scale * y)

            return wl.masked(loss)(*data, lengths=lengths).compute()

        return jax.value_and_grad(mean, (0, 1, 2))(1.0, 0.0, data)

    value, (scale, shift, of_data) = value_and_gradients(data, 3)
    assert np.isfinite(value)
    for poison in (np.nan, np.inf, 0.0, 1.0, -1.0):
        padded = value_and_gradients(
            np.pad(data, ((0, 0), (0, 3)), constant_values=poison), 3
        )
        np.testing.assert_allclose(padded[0], value, rtol=1e-6)
        np.testing.assert_allclose(padded[1][0], scale, rtol=1e-5)
        np.testing.assert_allclose(padded[1][1], shift, rtol=1e-5)
        np.testing.assert_allclose(padded[1][2][:, :3], of_data, rtol=1e-5)
        np.testing.assert_array_equal(padded[1][2][:, 3:], 0)


@pytest.mark.parametrize("event_ndim", [1, 2])
def test_a_users_loss_of_vectors_and_what_it_closes_over(event_ndim):
    x = np.random.default_rng(4).normal(size=(2, 3, 2, 2)).astype(np.float32)
    where = np.array([[True, False, True], [False, False, True]])
    x, where = (x[..., 0], where) if event_ndim == 1 else (x, where)
    poisoned = np.where(where.reshape(2, 3, *[1] * event_ndim), x, np.nan)

    def mean(scale, x, y):
        def norm(x, y):
            axes = tuple(range(-event_ndim, 0))
            return jnp.sqrt((scale * (x - y) ** 2).sum(axes))

        m = wl.masked(norm, event_ndim=event_ndim)(x, y, where=where)
        return m.compute()

    gradients = jax.jit(jax.value_and_grad(mean, (0, 1, 2)))
    value, gradients = gradients(1.0, poisoned, 2 * poisoned)
    norms = [np.sqrt((one**2).sum()) for one in x[where]]
    np.testing.assert_allclose(value, np.mean(norms), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], np.mean(norms) / 2, rtol=1e-6)
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient[~where], 0)
        assert np.isfinite(gradient).all()


def test_a_users_loss_gets_integers_as_they_are_and_floats_as_float32():
    seen = {}

    def loss(x, labels, flags, *, option):
        seen.update(x=x.dtype, labels=labels.dtype, flags=flags.dtype, option=option)
        return x

    wl.masked(loss)(
        jnp.ones(2, jnp.bfloat16),
        np.ones(2, np.uint8),
        np.ones(2, bool),
        option="any object",
        lengths=1,
    )
    assert seen == {
        "x": jnp.float32,
        "labels": np.uint8,
        "flags": bool,
        "option": "any object",
    }


def test_a_users_loss_may_take_any_number_of_arrays():
    def spread(*arrays):
        return jnp.stack(arrays).std(axis=0)

    m = wl.masked(spread)(
        *(jnp.array([i, jnp.nan]) for i in (1.0, 2.0, 6.0)), lengths=1
    )
    np.testing.assert_allclose(m.compute(), np.std([1, 2, 6]), rtol=1e-6)
    doubled = wl.masked(functools.partial(optax.losses.huber_loss, delta=2.0))
    assert doubled(jnp.array([3.0]), jnp.zeros(1)).compute() == 4
    assert wl.masked(jnp.subtract)(jnp.array([3.0]), jnp.ones(1)).compute() == 2


OUTSIDE = {  # domains that no constant is in, and an element of each
    "arccosh": (lambda x: jnp.arccosh(x), 1.5),
    "log(x - 1)": (lambda x: jnp.log(x - 1), 1.5),
    "sqrt(x - 7)": (lambda x: jnp.sqrt(x - 7), 8.0),
    "log(-x)": (lambda x: jnp.log(-x), -2.0),
    "a beta of 3": (lambda x: jnp.sqrt(9 - (x - 50) ** 2), 50.5),
}


@pytest.mark.parametrize(
    ("domain", "padding"), one_of_each(OUTSIDE, ["valid", "outside"])
)
def test_what_a_users_loss_closes_over_stays_in_the_domain(domain, padding):
    formula, inside = OUTSIDE[domain]
    pad = inside if padding == "valid" else np.nan
    x = jnp.array([[pad, inside, inside * 1.01], [pad, pad, pad]])
    where = jnp.array([[False, True, True], [False] * 3])

    def mean(s, x, where):
        return wl.masked(lambda x: s * formula(x))(x, where=where)

    expected = float(np.mean(formula(x[0, 1:])))
    whole = jax.grad(lambda s: mean(s, x, where).compute())(1.0)
    first = jax.grad(lambda s: mean(s, x[0], where[0]).compute())(1.0)
    rows = jax.grad(
        lambda s: jax.vmap(lambda x, w: mean(s, x, w))(x, where).merge().compute()
    )(1.0)
    # One sum of two terms.
    np.testing.assert_allclose([whole, first, rows], expected, rtol=1e-6)
    forward = jax.jvp(lambda s: mean(s, x, where).compute(), (1.0,), (1.0,))
    np.testing.assert_allclose(forward, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("domain", "how"),
    one_of_each(OUTSIDE, ["a batch", "microbatches", "devices", "mesh"]),
)
def test_where_nothing_counts_what_a_users_loss_closes_over_has_no_gradient(
    domain, how
):
    formula, inside = OUTSIDE[domain]
    x = jnp.array([[inside, inside * 1.01], [inside, np.nan]])
    batch = {"x": x, "where": jnp.array([[True, True], [False, False]])}

    def loss_fn(s, batch):
        return wl.masked(lambda x: s * formula(x))(batch["x"], where=batch["where"])

    if how == "a batch":
        nothing = batch | {"where": jnp.zeros((2, 2), bool)}
        assert jax.grad(lambda s: loss_fn(s, nothing).compute())(1.0) == 0
        assert jax.jvp(lambda s: loss_fn(s, nothing).total, (1.0,), (1.0,))[1] == 0
        return
    gradients = []
    if how == "microbatches":
        step = wl.value_and_grad(loss_fn, num_microbatches=2)
        gradients = [step(1.0, batch)[1], jax.jit(step)(1.0, batch)[1]]
    elif how == "devices":
        step = wl.value_and_grad(loss_fn, axis_name="data")
        for check_vma in (True, False):
            over = jax.shard_map(
                lambda s, batch: step(s, batch)[1],
                mesh=Mesh(np.array(jax.devices()[:2]), ("data",)),
                in_specs=(PartitionSpec(), PartitionSpec("data")),
                out_specs=PartitionSpec(),
                check_vma=check_vma,
            )
            gradients.append(jax.jit(over)(1.0, batch))
    else:
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
        spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        gradients = [jax.jit(wl.value_and_grad(loss_fn))(1.0, spread)[1]]
        nothing = spread | {"where": spread["where"] & False}
        assert jax.jit(wl.value_and_grad(loss_fn))(1.0, nothing)[1] == 0
    # One sum of two terms.
    np.testing.assert_allclose(gradients, np.mean(formula(x[0])), rtol=1e-6)


def test_a_users_loss_that_cannot_be_traced_is_called_as_it_is():
    def by_size(x):
        return 2 * x if x[0] > 1 else x

    loss = wl.masked(by_size)
    x = jnp.array([3.0, np.nan])
    assert loss(x, lengths=1).compute() == 6
    np.testing.assert_array_equal(
        jax.grad(lambda x: loss(x, lengths=1).compute())(x), [2, 0]
    )


def test_where_nothing_counts_a_users_loss_sees_no_two_alike():
    distance = wl.masked(
        lambda x, y, s: jnp.linalg.norm(s * (x - y), axis=-1), event_ndim=1
    )
    x, nothing = jnp.zeros((3, 2)), jnp.zeros(3, bool)
    # Nothing of it comes back, so only JAX's alarm tells: no distance of 0 has a slope.
    with jax.debug_nans(True):
        gradient = jax.grad(lambda s: distance(x, x, s=s, where=nothing).compute())(1.0)
    assert gradient == 0


def test_further_arrays_of_a_users_loss_may_lack_event_axes():
    def gathered(x, label, factor):
        return jnp.take_along_axis(x, label[:, None], 1)[:, 0] * factor.sum(-1)

    x, label = jnp.arange(6.0).reshape(2, 3), jnp.array([2, -100])
    m = wl.masked(gathered, event_ndim=1)(x, label, x, lengths=1)
    assert (m.total, m.weight) == (2 * 3, 1)


@pytest.mark.parametrize("transform", ["remat", "scan", "hessian", "vmap of grad"])
def test_losses_stand_inside_other_transformations(transform):
    x, y = np.float32([[1, np.nan], [3, 4], [np.inf, 0]]), np.zeros((3, 2), np.float32)
    lengths = np.array([1, 2, 0])
    gradient = np.float32([[2, 0], [6, 8], [0, 0]]) / 3

    def mean(x, y=y, lengths=lengths):
        return wl.squared_error(x, y, lengths=lengths).compute()

    def scanned(x):
        def step(m, row):
            return m + wl.squared_error(row[0], row[1], lengths=row[2]), None

        return jax.lax.scan(step, wl.WeightedMean.zeros(), (x, y, lengths))[0].compute()

    function, arguments, desired = {
        "remat": (jax.grad(jax.checkpoint(mean)), (x,), gradient),
        "scan": (jax.grad(scanned), (x,), gradient),
        "hessian": (
            lambda x: jax.hessian(mean)(x).reshape(6, 6),
            (x,),
            np.diag([1, 0, 1, 1, 0, 0]) * 2 / 3,
        ),
        "vmap of grad": (
            jax.vmap(jax.grad(mean)),
            (x, y, lengths),
            [[2, 0], [3, 4], [0, 0]],
        ),
    }[transform]
    np.testing.assert_allclose(jax.jit(function)(*arguments), desired, rtol=1e-6)
