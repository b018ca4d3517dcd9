"""Trains one model with two heads on sequences of different lengths.

RNA chemical mapping: each sample is a sequence that was probed by one of two
experiments. The model predicts a reactivity for every position under both, one head
each; the sample's experiment says which head is scored. Positions that were not
measured do not count, and neither does padding. The metric is the mean absolute error
(MAE) over the measured positions of sequences that were held back.

Without options the data is synthetic; --data reads the Kaggle competition "Stanford
Ribonanza RNA Folding". With --checkpoint, a run that was stopped goes on where it was
saved last, and ends as it would have without the break.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import optax
import rna
from flax import nnx
from two_head import medians, report, runs
from two_head.data import Batch, batches, epochs, load, pad
from two_head.options import parse

import wloss_jax as wl

NUM_BUCKETS = 3  # how many padded lengths, and so how many compilations, an epoch takes
EVALUATION_SIZES = (1, 8, 64)  # batch sizes at which the trained model is evaluated


# The model ---------------------------------------------------------------------------


class Block(nnx.Module):
    """Adds to its input what a dilated convolution makes of it."""

    def __init__(self, width: int, dilation: int, *, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.convolution = nnx.Conv(
            width, width, kernel_size=(5,), kernel_dilation=dilation, rngs=rngs
        )

    def __call__(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """Maps ``[B, L, width]`` to the same; ``where`` ``[B, L, 1]`` marks no padding.

        The convolution sees zeros in the padding, as it does past the end of the array,
        so that no prediction depends on how much padding there is.
        """
        hidden = jnp.where(where, nnx.relu(self.norm(x)), 0)
        return x + nnx.relu(self.convolution(hidden))


class TwoHeadModel(nnx.Module):
    """Predicts the reactivity of every position under both experiments."""

    def __init__(self, num_features: int, *, width: int = 64, rngs: nnx.Rngs):
        self.stem = nnx.Conv(num_features, width, kernel_size=(5,), rngs=rngs)
        self.blocks = nnx.List(
            Block(width, dilation, rngs=rngs) for dilation in (1, 2, 4, 8, 16)
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.heads = nnx.Linear(width, 2, rngs=rngs)

    def __call__(
        self, features: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Maps features ``[B, L, F]`` and lengths ``[B]`` to ``[B, L]`` a head."""
        chex.assert_rank(features, 3)
        chex.assert_shape(lengths, features.shape[:1])
        where = wl.length_mask(lengths, features.shape[1])[..., None]
        x = self.stem(features)
        for block in self.blocks:
            x = block(x, where)
        predictions = self.heads(self.norm(x))
        return predictions[..., 0], predictions[..., 1]


# The loss and the step ---------------------------------------------------------------


def sample_loss(first: jax.Array, second: jax.Array, sample: Batch) -> wl.WeightedMean:
    """One sample: predictions ``[L]`` of both heads, and a `Batch` without its B."""
    chex.assert_rank([first, second, sample.targets], 1)
    return wl.absolute_error(
        wl.select_head((first, second), sample.heads),
        sample.targets,
        where=wl.observed_mask(sample.targets),
        lengths=sample.lengths,
        weights=sample.weights,
    )


def batch_losses(model: TwoHeadModel, batch: Batch) -> wl.WeightedMean:
    """All samples of a batch: a `WeightedMean` of ``[B]``."""
    return jax.vmap(sample_loss)(*model(batch.features, batch.lengths), batch)


Reduction = Callable[[wl.WeightedMean], wl.WeightedMean]


def size_weighted(per_sample: wl.WeightedMean, *, power: float) -> wl.WeightedMean:
    """The mean over samples, each weighing its size to a power."""
    return per_sample.reweight(wl.size_power(power)).merge()


def mean_of_means(per_sample: wl.WeightedMean) -> wl.WeightedMean:
    """The usual mistake: a plain mean of the samples' means, one vote a batch."""
    return wl.WeightedMean(per_sample.compute().mean(), 1.0)


def make_train_step(
    reduce: Reduction, *, max_traces: int
) -> tuple[Callable[[TwoHeadModel, nnx.Optimizer, Batch], wl.WeightedMean], list[int]]:
    """Makes the compiled step, and a list of the padded lengths it was compiled for."""
    compiled: list[int] = []

    @nnx.jit
    @chex.assert_max_traces(n=max_traces)
    def train_step(
        model: TwoHeadModel, optimizer: nnx.Optimizer, batch: Batch
    ) -> wl.WeightedMean:
        compiled.append(batch.features.shape[1])  # runs while tracing only

        def loss_fn(model: TwoHeadModel, batch: Batch) -> wl.WeightedMean:
            return reduce(batch_losses(model, batch))

        mean, gradients = wl.nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, gradients)
        return mean

    return train_step, compiled


# Evaluation --------------------------------------------------------------------------


@nnx.jit
def evaluate_batch(model: TwoHeadModel, batch: Batch) -> wl.WeightedMean:
    """The absolute error of each head: a `WeightedMean` of ``[2]``."""
    predictions = model(batch.features, batch.lengths)
    return wl.absolute_error(
        wl.select_head(predictions, batch.heads),
        batch.targets,
        where=wl.observed_mask(batch.targets),
        lengths=batch.lengths,
        segment_ids=batch.heads,
        num_segments=len(rna.EXPERIMENTS),
    )


def evaluate(
    model: TwoHeadModel,
    profiles: Sequence[rna.Profile],
    buckets: Sequence[int],
    batch_size: int,
) -> wl.WeightedMean:
    """The absolute error of each batch and head: a `WeightedMean` of ``[N, 2]``."""
    means = [
        evaluate_batch(model, batch) for batch in batches(profiles, buckets, batch_size)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *means)


Score = dict[str, float]  # the MAE of "both" and of each experiment


def score(means: wl.WeightedMean, *, of_means: bool = False) -> Score:
    """Reduces the batches of `evaluate`; ``of_means`` averages means, wrongly."""
    both = means.merge(axis=1)
    if of_means:  # every batch, however many elements it holds, has one vote
        means, both = (m.reweight(wl.size_power(0.0)) for m in (means, both))
    heads = means.merge(axis=0).compute().tolist()
    return {
        "both": float(both.merge().compute()),
        **dict(zip(rna.EXPERIMENTS, heads, strict=True)),
    }


# The program -------------------------------------------------------------------------


def train_model(
    train: Sequence[rna.Profile],
    test: Sequence[rna.Profile],
    buckets: Sequence[int],
    options: argparse.Namespace,
) -> tuple[TwoHeadModel, runs.Curve, list[int]]:
    """Trains; returns the model, its learning curve, and the lengths compiled for."""
    weighted = functools.partial(size_weighted, power=options.weighting)
    reduce = mean_of_means if options.mean_of_means else weighted
    train_step, compiled = make_train_step(reduce, max_traces=len(buckets))

    num_features = train[0].features().shape[1]
    model = TwoHeadModel(num_features, rngs=nnx.Rngs(options.seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 3e-3, warmup_steps=options.steps // 10, decay_steps=options.steps
    )
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)

    stream = epochs(train, buckets, options.batch_size, options.seed)
    with runs.resume(options, (model, optimizer)) as run:
        for batch in run.batches(stream):
            run.loss += train_step(model, optimizer, batch)  # adds totals and weights
            if run.is_due:
                test_means = evaluate(model, test, buckets, EVALUATION_SIZES[-1])
                run.record(test=score(test_means)["both"])
    return model, run.curve, sorted(compiled)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments, __doc__)
    start = time.perf_counter()
    train, test, buckets = load(options, NUM_BUCKETS)
    kind = "measured" if options.data else "synthetic"
    print(f"{len(train)} {kind} profiles to train on, {len(test)} held back")
    model, curve, compiled = train_model(train, test, buckets, options)
    sizes = ", ".join(map(str, compiled))
    print(f"compiled the training step {len(compiled)} times, for lengths of {sizes}")

    means = {size: evaluate(model, test, buckets, size) for size in EVALUATION_SIZES}
    figures = {
        "test_mae": score(means[EVALUATION_SIZES[-1]], of_means=options.mean_of_means),
        "median_mae": {k: score(m) for k, m in medians.evaluate(train, test).items()},
        "evaluation": {
            name: {size: score(m, of_means=wrong)["both"] for size, m in means.items()}
            for name, wrong in (("weighted", False), ("mean_of_means", True))
        },
        "compiles": len(compiled),
        "seconds": time.perf_counter() - start,
    }
    report.print_tables(figures, options)
    if options.json:
        report.write_json(options.json, figures)
    if options.plot:
        shown = report.examples(test)
        batch = pad(shown, buckets)
        predictions = wl.select_head(model(batch.features, batch.lengths), batch.heads)
        report.plot(options.plot, figures, curve, shown, predictions)


if __name__ == "__main__":
    main()
