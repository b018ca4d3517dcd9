"""testing.py: sound losses pass, and each broken one is told what is wrong with it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import wloss_jax as wl
from tests.oracle.tables import one_of_each
from wloss_jax.testing import (
    assert_padding_invariant,
    assert_permutation_invariant,
    assert_split_invariant,
    assert_valid_batch,
)

B, L, FEATURES, CLASSES = 3, 5, 2, 4
LENGTHS = jnp.array([5, 0, 3])
RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.normal(size=(B, L, FEATURES)).astype(np.float32),
    "y": RNG.normal(size=(B, L)).astype(np.float32) + 3,
    "labels": RNG.integers(0, CLASSES, (B, L)),
    "weights": RNG.uniform(0.01, 0.1, (B, L)).astype(np.float32),
    "lengths": LENGTHS,
}
MASK = wl.length_mask(LENGTHS, L)
# All content of padding is masked; lengths say what counts.
WHERE = dict.fromkeys(BATCH, MASK) | {"lengths": None}
PARAMS = {
    "head": RNG.normal(size=FEATURES).astype(np.float32),
    "classes": RNG.normal(size=(FEATURES, CLASSES)).astype(np.float32),
}


def mask_of(batch):
    return wl.length_mask(batch["lengths"], batch["y"].shape[1])


def features(batch):
    """Inputs made safe, without which NaN in them is in the gradient of any model."""
    return jnp.where(mask_of(batch)[..., None], batch["x"], 0.0)


def prediction(params, batch):
    return features(batch) @ params["head"]


def squares(params, batch):
    return optax.losses.squared_error(prediction(params, batch), batch["y"])


def safe_squares(params, batch):
    return squares(params, batch | {"y": jnp.where(mask_of(batch), batch["y"], 0.0)})


def check(assertion, loss_fn, batch=BATCH, params=PARAMS, **options):
    if assertion is assert_padding_invariant:
        options = {"where": WHERE} | options
    assertion(loss_fn, params, batch, **options)


LAWS = [assert_padding_invariant, assert_permutation_invariant, assert_split_invariant]


# ------------------------------------------------------------------- sound losses


def of_predictions(loss, params, batch, **options):
    return loss(
        prediction(params, batch),
        batch["y"],
        lengths=batch["lengths"],
        weights=batch["weights"],
        **options,
    )


def two_terms(params, batch):
    logits = features(batch) @ params["classes"]
    return {
        "number": of_predictions(wl.squared_error, params, batch),
        "class": wl.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"], where=mask_of(batch)
        ),
    }


def many_terms(params, batch):
    logits = features(batch) @ params["classes"]
    targets = jax.nn.one_hot(batch["labels"], CLASSES)
    return two_terms(params, batch) | {
        "absolute": of_predictions(wl.absolute_error, params, batch),
        "quantile": of_predictions(wl.quantile_loss, params, batch, quantile=0.9),
        "log_cosh": of_predictions(wl.log_cosh, params, batch),
        "binary": of_predictions(wl.sigmoid_binary_cross_entropy, params, batch),
        "poisson": of_predictions(wl.poisson_nll, params, batch),
        "cosine": wl.cosine_distance(logits, targets, where=mask_of(batch)),
    }


def every_sample_the_same(params, batch):
    per_sample = wl.per_sample(wl.squared_error)(
        prediction(params, batch), batch["y"], lengths=batch["lengths"]
    )
    return per_sample.reweight(wl.size_power(0.0)).merge()


def packed(params, batch):
    rows = jnp.arange(batch["y"].shape[0])
    ids = jnp.where(mask_of(batch), rows[:, None], -1)
    return wl.absolute_error(
        prediction(params, batch), batch["y"], segment_ids=ids, num_segments=len(rows)
    ).merge()


def summed(params, batch):
    """A scalar, over a constant: the parts add up."""
    return jnp.where(mask_of(batch), safe_squares(params, batch), 0.0).sum() / 100


def weighted_sum(params, batch):
    """A scalar that scales with its weights."""
    return of_predictions(wl.squared_error, params, batch).total


SOUND = [many_terms, every_sample_the_same, packed, summed, weighted_sum]


@pytest.mark.parametrize(("loss_fn", "law"), one_of_each(SOUND, LAWS))
def test_sound_losses_pass(loss_fn, law):
    check(law, loss_fn)


def test_a_batch_may_be_one_bare_array():
    def loss_fn(params, batch):
        return wl.squared_error(params * batch, batch)

    assert_split_invariant(loss_fn, jnp.float32(2), np.ones((4, 3), np.float32))


def test_a_scalar_mean_passes_where_all_rows_weigh_the_same():
    def loss_fn(params, batch):
        return squares(params, batch).mean()

    check(assert_split_invariant, loss_fn)
    check(assert_permutation_invariant, loss_fn)


@pytest.mark.parametrize(
    ("dtype", "law"),
    one_of_each(
        [jnp.bfloat16, jnp.float16], [assert_padding_invariant, assert_split_invariant]
    ),
)
def test_half_precision(law, dtype):
    batch, params = jax.tree.map(
        lambda x: x.astype(dtype) if x.dtype == np.float32 else x, (BATCH, PARAMS)
    )
    check(law, two_terms, batch, params)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_small_labels(dtype):
    labels = jnp.asarray(BATCH["labels"], dtype)
    check(assert_padding_invariant, two_terms, BATCH | {"labels": labels})


def pooled(params, batch):
    x = features(batch) @ params["classes"]
    return wl.per_sample(wl.weighted_mean)(
        x[..., 0], lengths=batch["lengths"]
    ).compute()


def pairs(rows, params):
    """Looks at every pair of rows, and at the parameters."""
    loss = jax.nn.logsumexp(rows[:, None] * rows, 1).mean()
    return loss + (params["head"] ** 2).sum()


def root(mean, params):
    return jnp.sqrt(mean.compute())


@pytest.mark.parametrize("law", LAWS)
def test_sound_combined_losses_pass(law):
    check(law, pooled, combine=pairs)
    check(law, every_sample_the_same, combine=root)


@pytest.mark.parametrize("law", LAWS)
def test_trees_of_terms_pass(law):
    def nested(params, batch):
        terms = two_terms(params, batch)
        return [terms["number"], {"class": (terms["class"], None)}]

    check(law, nested)


# ------------------------------------------------------------------ broken losses


def masked_after(params, batch):
    return squares(params, batch).mean(where=mask_of(batch))


def multiplied(params, batch):
    mask = mask_of(batch).astype(jnp.float32)
    return wl.WeightedMean((squares(params, batch) * mask).sum(), mask.sum())


def multiplied_cross_entropy(params, batch):
    mask = mask_of(batch).astype(jnp.float32)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        features(batch) @ params["classes"], batch["labels"]
    )
    return (loss * mask).sum() / mask.sum()


def inputs_not_safe(params, batch):
    return wl.squared_error(
        batch["x"] @ params["head"], batch["y"], lengths=batch["lengths"]
    )


def reads_padding(params, batch):
    return wl.squared_error(
        prediction(params, batch), batch["y"] - batch["y"].mean(), where=mask_of(batch)
    )


def counts_padding(params, batch):
    return jnp.where(mask_of(batch), safe_squares(params, batch), 0.0).mean()


def mean_of_masked(params, batch):
    return of_predictions(wl.squared_error, params, batch).compute()


def mean_then_weight(params, batch):
    mean = safe_squares(params, batch).mean(where=mask_of(batch), keepdims=False)
    return wl.WeightedMean(mean, mask_of(batch).sum().astype(jnp.float32))


def clamped_weight(params, batch):
    sound = every_element(params, batch)
    return wl.WeightedMean(sound.total, jnp.maximum(sound.weight, 1.0))


def every_element(params, batch):
    return wl.squared_error(
        prediction(params, batch), batch["y"], lengths=batch["lengths"]
    )


def clamped(params, batch):
    sound = of_predictions(wl.squared_error, params, batch)
    return sound.total / jnp.maximum(sound.weight, 1.0)


def with_epsilon(params, batch):
    sound = of_predictions(wl.squared_error, params, batch)
    return sound.total / (sound.weight + 1e-6)


def epsilon_in_the_weight(params, batch):
    sound = of_predictions(wl.squared_error, params, batch)
    return {"term": wl.WeightedMean(sound.total, sound.weight + 1e-6)}


def drawn_by_row(params, batch):
    noise = jax.random.uniform(jax.random.key(0), batch["y"].shape)
    return wl.weighted_mean(noise * safe_squares(params, batch), where=mask_of(batch))


def pmean_of_means(params, batch):
    """What a training step does that averages over its devices."""

    def local(params, batch):
        return jax.lax.pmean(every_element(params, batch).compute(), "data")

    return jax.shard_map(
        local,
        mesh=Mesh(jax.devices()[:2], "data"),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )(params, batch)


def on_devices_only(params, batch):
    try:
        scale = jax.lax.axis_size("devices")
    except NameError:
        scale = 1
    return every_element(params, batch).compute() * 0 + scale


BROKEN = [
    (
        assert_padding_invariant,
        masked_after,
        "nan at the padding of ['y'], the gradient of ['head'] is nan",
        "a mask on the output only",
    ),
    (
        assert_split_invariant,
        masked_after,
        "averaged over 3 microbatches, the mean of `loss` is nan, not",
        "a denominator taken per microbatch",
    ),
    (
        assert_padding_invariant,
        multiplied,
        "nan at the padding of ['y'], the mean of `loss` is nan",
        "a mask by multiplication",
    ),
    (
        assert_padding_invariant,
        multiplied_cross_entropy,
        "at the padding of ['labels'], the mean of `loss` is nan",
        "a mask by multiplication",
    ),
    (
        assert_padding_invariant,
        inputs_not_safe,
        "nan at the padding of ['x'], the gradient of ['head'] is nan",
        "a mask on the output only",
    ),
    (
        assert_padding_invariant,
        reads_padding,
        "0.5 at the padding of ['y'], the mean of `loss` is",
        "padding is read",
    ),
    (
        assert_padding_invariant,
        counts_padding,
        "leaves of [3, 5] padded to 10 on axis 1, the mean of `loss`",
        "a denominator that counts padding",
    ),
    (
        assert_split_invariant,
        mean_of_masked,
        "averaged over 3 microbatches",
        "a denominator taken per microbatch",
    ),
    (
        assert_split_invariant,
        mean_then_weight,
        "added up over 3 microbatches, the mean of `loss`",
        "a total that is no plain sum",
    ),
    (
        assert_split_invariant,
        clamped_weight,
        "added up over 3 microbatches, the weight of `loss` is 9, not 8",
        "a weight that is no plain sum: a floor such as `max(count, 1)`",
    ),
    (assert_split_invariant, clamped, "a floor such as `max(weight, 1)`"),
    (assert_split_invariant, with_epsilon, "an epsilon in the denominator"),
    (
        assert_split_invariant,
        epsilon_in_the_weight,
        "`weights` scaled by a constant, the mean of `term`",
        "an epsilon in the denominator",
    ),
    (
        assert_permutation_invariant,
        drawn_by_row,
        "with rows reversed, the mean of `loss` is",
        "a sample's loss depends on its place",
    ),
    (
        assert_split_invariant,
        on_devices_only,
        "averaged over 3 devices, the mean of `loss` is 3, not 1",
    ),
]


@pytest.mark.parametrize(
    ("law", "loss_fn", "texts"),
    [(law, loss_fn, texts) for law, loss_fn, *texts in BROKEN],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_broken_losses_are_told_what_is_wrong(law, loss_fn, texts):
    with pytest.raises(AssertionError) as error:
        check(law, loss_fn)
    for text in texts:
        assert text in str(error.value)


def test_combined_losses_that_are_broken_are_told_what_is_wrong():
    def centered(params, batch):
        return 5 * (pooled(params, batch) - pooled(params, batch).mean())

    with pytest.raises(AssertionError) as error:
        check(assert_split_invariant, centered, combine=pairs)
    assert "Split law broken: combined over 3 micro" in str(error.value)
    assert "do the rest in `combine`" in str(error.value)

    def by_place(rows, params):
        return (rows * jnp.arange(len(rows))).sum()

    with pytest.raises(AssertionError, match=r"Permutation law .* rows reversed"):
        check(assert_permutation_invariant, pooled, combine=by_place)


def test_a_broken_term_of_a_tree_is_named_by_its_path():
    def nested(params, batch):
        return {"a": [every_element(params, batch), mean_then_weight(params, batch)]}

    with pytest.raises(AssertionError, match=r"the mean of `\['a'\]\[1\]` is"):
        check(assert_split_invariant, nested)


def test_means_averaged_over_devices_are_told_by_the_order():
    batch = jax.tree.map(lambda x: x[jnp.array([0, 1, 2, 2])], BATCH)
    with pytest.raises(AssertionError, match=r"rows moved on by one(.|\n)*lax\.pmean"):
        check(assert_permutation_invariant, pmean_of_means, batch)


def test_misaligned_weights_are_told_by_the_square():
    batch = {"y": BATCH["y"][:, :B], "weights": jnp.arange(1.0, B + 1)}

    def loss_fn(params, batch):
        weights = jnp.broadcast_to(batch["weights"], (B, B))
        return wl.weighted_mean(params * batch["y"], weights=weights)

    with pytest.raises(
        AssertionError, match=r"an array of \[B\] lined up with another"
    ):
        assert_permutation_invariant(loss_fn, 1.0, batch)


def test_the_gradient_alone_is_enough():
    def loss_fn(params, batch):
        sound = every_element(params, batch)
        straight = jax.lax.stop_gradient(sound.total) - sound.total * batch["y"][0, 0]
        return wl.WeightedMean(
            straight + jax.lax.stop_gradient(sound.total - straight), sound.weight
        )

    for law in (assert_permutation_invariant, assert_split_invariant):
        with pytest.raises(
            AssertionError, match=r"the gradient of \['head'\] is off by"
        ):
            check(law, loss_fn)


# ----------------------------------------------------------------- data as it comes


def test_padding_may_hold_nan_from_the_start():
    batch = {
        name: np.where(mask.reshape(mask.shape + (1,) * (np.ndim(x) - 2)), x, np.nan)
        if mask is not None and np.issubdtype(np.asarray(x).dtype, np.floating)
        else x
        for (name, x), mask in zip(BATCH.items(), WHERE.values(), strict=True)
    }
    check(assert_padding_invariant, two_terms, batch)
    with pytest.raises(AssertionError, match="a mask by multiplication"):
        check(assert_padding_invariant, multiplied, batch)
    batch["y"][0, 0] = np.nan
    for law in LAWS:
        with pytest.raises(AssertionError, match="look for NaN at an element that"):
            check(law, two_terms, batch)


def test_a_leaf_that_says_what_counts_has_no_mask():
    def loss_fn(params, batch):
        where = mask_of(batch) & wl.observed_mask(batch["y"])
        return wl.squared_error(prediction(params, batch), batch["y"], where=where)

    y = np.where(MASK, BATCH["y"], np.nan)
    check(
        assert_padding_invariant, loss_fn, BATCH | {"y": y}, where=WHERE | {"y": None}
    )


def test_a_mask_with_holes_is_filled_and_not_lengthened():
    holes = MASK & (RNG.random((B, L)) < 0.5)

    def loss_fn(params, batch):
        assert batch["y"].shape == (B, L)
        return wl.squared_error(prediction(params, batch), batch["y"], where=holes)

    where = dict.fromkeys(BATCH, None) | {"y": holes}
    check(assert_padding_invariant, loss_fn, where=where)
    with pytest.raises(AssertionError, match=r"at the padding of \['y'\]"):
        check(assert_padding_invariant, masked_after, where=where)


def test_a_model_bound_to_one_length():
    bias = jnp.arange(float(L))[None]

    def loss_fn(params, batch):
        return wl.squared_error(
            prediction(params, batch) + bias, batch["y"], lengths=batch["lengths"]
        )

    with pytest.raises((TypeError, ValueError)) as error:
        check(assert_padding_invariant, loss_fn)
    assert any("lengthen=False leaves out" in x for x in error.value.__notes__)
    check(assert_padding_invariant, loss_fn, lengthen=False)


def test_the_finder_of_nan_is_off():
    with jax.debug_nans(True), pytest.raises(AssertionError, match="Padding law"):
        check(assert_padding_invariant, masked_after)


def test_rtol_says_how_much_may_move():
    check(assert_permutation_invariant, drawn_by_row, rtol=100.0)
    with pytest.raises(AssertionError, match="Split law"):
        check(assert_split_invariant, two_terms, rtol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": dict.fromkeys(BATCH)}, "`where` masks nothing"),
        ({"where": MASK}, "`where` must be a tree like `batch`"),
        ({"where": WHERE | {"y": jnp.float32(MASK)}}, r"`where\['y'\]` is float32"),
        ({"where": WHERE | {"lengths": MASK}}, r"`where\['lengths'\]` has shape"),
        ({"loss_fn": squares}, "`loss_fn` must return a floating scalar"),
        ({"loss_fn": lambda p, b: {"a": wl.WeightedMean(1, 1), "b": p}}, "or a tree"),
    ],
)
def test_bad_arguments_of_padding(options, message):
    options = {"loss_fn": two_terms, "where": WHERE} | options
    with pytest.raises(AssertionError, match=message):
        assert_padding_invariant(options.pop("loss_fn"), PARAMS, BATCH, **options)


@pytest.mark.parametrize("law", LAWS[1:])
def test_bad_batches(law):
    for batch in ({"y": jnp.ones((1, 2))}, {"y": jnp.ones(2), "z": jnp.ones(3)}):
        with pytest.raises(AssertionError, match="`batch` must have the batch as"):
            law(lambda params, batch: params * batch["y"].sum(), 1.0, batch)


# -------------------------------------------------------------------- valid values

VALID = {
    "lengths": jnp.array([3, 0]),
    "size": 3,
    "labels": jnp.array([[0, 3, -100], [-7, 9, 4]]),
    "num_classes": 4,
    "ignore_index": -100,
    "weights": jnp.array([[0.0, 1.0, 2.5], [jnp.nan, -1.0, jnp.inf]]),
}
INVALID = [
    ({"lengths": jnp.array([3, -2])}, "`lengths` negative at [1]: -2."),
    (
        {"lengths": jnp.array([4, 0])},
        "`lengths` past the end of the padded axis, 3, at",
    ),
    ({"labels": jnp.array([[0, 4, 1]] * 2)}, "`labels` out of range at [0, 1]: 4."),
    ({"labels": jnp.array([[0, 1, -1]] * 2)}, "`labels` out of range at [0, 2]: -1."),
    ({"ignore_index": None}, "`labels` out of range at [0, 2]: -100."),
    ({"labels": jnp.array(-1), "lengths": None}, "`labels` out of range at []: -1."),
    ({"lengths": None}, "`labels` out of range at [1, 0]: -7."),
    ({"weights": jnp.array([[0.0, -0.5, 1.0]] * 2)}, "NaN at [0, 1]: -0.5."),
    ({"weights": jnp.array([jnp.inf, 1.0])}, "negative, infinite or NaN at [0]: inf."),
    ({"weights": jnp.array([1.0, jnp.nan])}, "negative, infinite or NaN at [1]: nan."),
]


def test_valid_values_pass():
    assert_valid_batch()
    assert_valid_batch(**VALID)
    assert_valid_batch(labels=jnp.array([10**6]), lengths=jnp.array([10**6]))
    assert_valid_batch(lengths=jnp.zeros((0,), int), weights=jnp.zeros((0, 3)))


@pytest.mark.parametrize(("change", "message"), INVALID)
def test_invalid_values_are_named(change, message):
    with pytest.raises(AssertionError) as error:
        assert_valid_batch(**VALID | change)
    assert message in str(error.value)


@pytest.mark.parametrize(("change", "message"), [INVALID[0], INVALID[4], INVALID[9]])
def test_invalid_values_are_named_under_jit(change, message):
    static = ("size", "num_classes", "ignore_index")
    check = chex.chexify(
        jax.jit(assert_valid_batch, static_argnames=static), async_check=False
    )
    check(**VALID)
    with pytest.raises(AssertionError) as error:
        check(**VALID | change)
    assert message in str(error.value)


def test_values_have_types():
    with pytest.raises(AssertionError, match="`labels` is float32"):
        assert_valid_batch(labels=jnp.ones(3, jnp.float32))
    with pytest.raises(AssertionError, match="`weights` is bool"):
        assert_valid_batch(weights=jnp.ones(3, bool))
    with pytest.raises(AssertionError, match="`lengths` has shape"):
        assert_valid_batch(lengths=jnp.array([1, 2]), weights=jnp.ones((3, 2)))
