"""Losses as found in the wild, and what the laws of `wl.testing` say of them.

Each is the squared error of sequences that are padded to one length, and each is right
for a batch without padding. It prints:

    mean_over_padding
        Padding law broken: with all leaves of [4, 6] padded to 12 on axis 1, the
        mean of `loss` is 0.23558, not 0.47116
        Likeliest cause: a denominator that counts padding, such as `jnp.mean` of a
        masked loss
    mask_by_multiplication
        Padding law broken: with nan at the padding of ['y'], the mean of `loss` is
        nan, not 1.028
        Likeliest cause: a mask by multiplication: 0 times NaN is NaN, and so is 0
        times infinity
    mean_of_sample_means
        Split law broken: averaged over 2 microbatches, the mean of `loss` is
        1.8553, not 1.5534
        Likeliest cause: a denominator taken per microbatch, or per device, so that
        each part has the same say however little of it counts
    floor_under_the_weight
        Split law broken: averaged over 2 microbatches, the mean of `loss` is
        0.98038, not 0.99914
        Likeliest cause: an epsilon in the denominator, or a floor such as
        `max(weight, 1)`
    mean_of_each_microbatch
        Split law broken: averaged over 2 microbatches, the mean of `loss` is
        1.8078, not 1.028
        Likeliest cause: a denominator taken per microbatch, or per device, so that
        each part has the same say however little of it counts
    of_this_package
        All laws hold
"""

import textwrap

import jax.numpy as jnp
import numpy as np

import wloss_jax as wl

rng = np.random.default_rng(0)
LENGTHS = np.array([6, 1, 4, 0], np.int32)  # as ragged as the data ever are: one empty
WHERE = np.arange(6) < LENGTHS[:, None]
BATCH = {
    "x": np.where(WHERE, rng.normal(size=(4, 6)), 0).astype(np.float32),
    "y": np.where(WHERE, rng.normal(size=(4, 6)), 0).astype(np.float32),
    "weights": np.where(WHERE, rng.uniform(0.1, 1, (4, 6)), 0).astype(np.float32),
    "lengths": LENGTHS,
}


def squared_errors(scale, batch):
    """The losses ``[B, L]`` of a model of one parameter, and which of them count."""
    errors = (scale * batch["x"] - batch["y"]) ** 2
    return errors, wl.length_mask(batch["lengths"], errors.shape[1])


def safe_squared_errors(scale, batch):
    """The same, and 0 where they do not count, whatever the padding holds."""
    mask = wl.length_mask(batch["lengths"], batch["y"].shape[1])
    y = jnp.where(mask, batch["y"], 0)
    return squared_errors(scale, batch | {"y": y})


def mean_over_padding(scale, batch):
    """The errors in the padding are 0, and are counted."""
    errors, _ = safe_squared_errors(scale, batch)
    return errors.mean()


def mask_by_multiplication(scale, batch):
    """What stands in the padding is multiplied by 0."""
    errors, mask = squared_errors(scale, batch)
    return wl.WeightedMean((errors * mask).sum(), mask.sum().astype(jnp.float32))


def mean_of_sample_means(scale, batch):
    """Each sample's mean, then the mean of those; an empty sample has no mean."""
    errors, mask = safe_squared_errors(scale, batch)
    means = errors.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
    return means.sum() / mask.any(axis=1).sum()


def floor_under_the_weight(scale, batch):
    """The floor keeps off a division by 0, and makes small weights smaller."""
    errors, _ = safe_squared_errors(scale, batch)
    weights = batch["weights"]
    return (weights * errors).sum() / jnp.maximum(weights.sum(), 1)


def mean_of_each_microbatch(scale, batch):
    """The training loop averages the microbatches, as if each held as many tokens."""
    errors, mask = safe_squared_errors(scale, batch)
    return errors.sum() / mask.sum()


def of_this_package(scale, batch):
    """Divided by nothing, yet."""
    return wl.squared_error(
        scale * batch["x"],
        batch["y"],
        lengths=batch["lengths"],
        weights=batch["weights"],
    )


def laws(loss_fn):
    """Yields what each law says of a loss, where it is broken."""
    scale = jnp.float32(0.5)
    where = {"x": None, "y": WHERE, "weights": None, "lengths": None}
    for check, keywords in (
        (wl.testing.assert_padding_invariant, {"where": where}),
        (wl.testing.assert_permutation_invariant, {}),
        (wl.testing.assert_split_invariant, {}),
    ):
        try:
            check(loss_fn, scale, BATCH, **keywords)
        except AssertionError as error:
            yield str(error)


def main():
    """Prints what the laws say."""
    for loss_fn in (
        mean_over_padding,
        mask_by_multiplication,
        mean_of_sample_means,
        floor_under_the_weight,
        mean_of_each_microbatch,
        of_this_package,
    ):
        print(loss_fn.__name__)
        for message in list(laws(loss_fn)) or ["All laws hold"]:
            for line in message.splitlines():  # what broke, and the likeliest cause
                sentence = line.partition(". ")[0].removesuffix(".")
                print(textwrap.indent(textwrap.fill(sentence, 76), "    "))


if __name__ == "__main__":
    main()
