"""What is wrong with a loss that breaks a law: the likely causes, in words."""

from __future__ import annotations

READ = (
    "padding is read, as nothing masks this leaf, or as the model mixes positions "
    "(convolution, attention, batch statistics) before the mask. Mask its inputs: "
    "`jnp.where(mask, x, 0)`. A leaf that says itself what counts has None in `where`."
)
MULTIPLIED = (
    "a mask by multiplication: 0 times NaN is NaN, and so is 0 times infinity. Choose, "
    "`jnp.where(mask, loss, 0)`, and put harmless values in before the loss as well, "
    "or wrap the loss in `wl.masked`."
)
MASKED_AFTER = (
    "a mask on the output only: NaN goes round it into the gradient, as 0 times NaN. "
    "Put harmless values in before the loss or model, `jnp.where(mask, x, 0)`; "
    "`wl.masked` does it for a loss."
)
COUNTED = (
    "a denominator that counts padding, such as `jnp.mean` of a masked loss. Divide by "
    "the number of elements that count, or use `wl.weighted_mean(loss, where=mask)`."
)
MISALIGNED = (
    "an array of [B] lined up with another axis of the same size, as NumPy broadcasts. "
    "Write `x[:, None]`; `weights` and `where` of the losses of this package line up "
    "with the leading axes."
)
PLACED = (
    "a sample's loss depends on its place: random numbers drawn by row (put a key a "
    "sample in the batch), or means of microbatches or devices (`jax.lax.pmean`), "
    "averaged. Add up `WeightedMean`s instead."
)
DIVIDED = (
    "a denominator taken per microbatch, or per device, so that each part has the same "
    "say however little of it counts. Return the `WeightedMean`, not divided. (Rows "
    "that look at each other, as in batch statistics, split no way.)"
)
FLOOR = (
    "an epsilon in the denominator, or a floor such as `max(weight, 1)`. Divide by the "
    "plain sum of the weights, guarded where it is 0, as `WeightedMean.compute` does."
)
WEIGHT_NO_SUM = (
    "a weight that is no plain sum: a floor such as `max(count, 1)`, an epsilon, a "
    "constant. `WeightedMean(total, weight)` takes the sums as they are."
)
TOTAL_NO_SUM = (
    "a total that is no plain sum: a denominator taken per microbatch, in front of the "
    "`WeightedMean`. (Rows that look at each other, as in batch statistics, split no "
    "way.)"
)
PART_NO_SUM = (
    "a part that is neither a plain sum nor a row by itself: a denominator or a floor "
    "taken in `loss_fn`, which sees a part of the batch, or rows that look at each "
    "other there. Return the sums and the rows, and do the rest in `combine`."
)
