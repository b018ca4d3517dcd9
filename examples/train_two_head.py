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
import contextlib
import dataclasses
import functools
import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import rna
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import wloss_jax as wl

NUM_BUCKETS = 3  # how many padded lengths, and so how many compilations, an epoch takes
EVALUATION_SIZES = (1, 8, 64)  # batch sizes at which the trained model is evaluated


# The model -------------------------------------------------------------------------


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


class Batch(NamedTuple):
    """B samples, padded to one length L."""

    features: jax.Array  # [B, L, F]
    targets: jax.Array  # [B, L], NaN where nothing was measured
    weights: jax.Array | None  # [B, L], how much each position counts in training
    heads: jax.Array  # [B], the experiment
    lengths: jax.Array  # [B]


def sample_loss(
    first: jax.Array,
    second: jax.Array,
    target: jax.Array,
    weights: jax.Array | None,
    head: jax.Array,
    length: jax.Array,
) -> wl.WeightedMean:
    """One sample: predictions and target ``[L]``, its head and length scalars."""
    chex.assert_rank([first, second, target], 1)
    chex.assert_rank([head, length], 0)
    prediction = wl.select_head((first, second), head)
    where = wl.observed_mask(target)
    return wl.absolute_error(
        prediction, target, where=where, lengths=length, weights=weights
    )


def batch_losses(model: TwoHeadModel, batch: Batch) -> wl.WeightedMean:
    """All samples of a batch: a `WeightedMean` of ``[B]``."""
    first, second = model(batch.features, batch.lengths)
    return jax.vmap(sample_loss)(
        first, second, batch.targets, batch.weights, batch.heads, batch.lengths
    )


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

        def loss_fn(model: TwoHeadModel) -> tuple[jax.Array, wl.WeightedMean]:
            mean = reduce(batch_losses(model, batch))
            return mean.compute(), mean

        (_, mean), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, gradients)
        return mean

    return train_step, compiled


# The data ----------------------------------------------------------------------------


def pad(profiles: Sequence[rna.Profile], buckets: Sequence[int]) -> Batch:
    """Pads profiles to the smallest bucket that holds them all."""
    features, lengths = wl.pad_ragged(
        [profile.features() for profile in profiles], buckets=buckets
    )
    size = features.shape[1]
    targets, _ = wl.pad_ragged([profile.reactivity for profile in profiles], size=size)
    weights = None
    if profiles[0].error is not None:
        inverse_variances = [profile.error**-2 for profile in profiles]
        weights, _ = wl.pad_ragged(inverse_variances, size=size)
    heads = np.array([profile.experiment for profile in profiles], np.int32)
    return Batch(features, targets, weights, heads, lengths)


def batches(
    profiles: Sequence[rna.Profile],
    buckets: Sequence[int],
    batch_size: int,
    rng: np.random.Generator | None = None,
) -> Iterator[Batch]:
    """Passes over the data once, in batches of one bucket each; shuffled by an ``rng``.

    A batch that comes out short is filled up with empty samples, which weigh nothing:
    so there is one shape, and one compilation, for each bucket.
    """
    lengths = [len(profile.sequence) for profile in profiles]
    bucket_of = np.searchsorted(buckets, lengths)
    order = np.arange(len(profiles)) if rng is None else rng.permutation(len(profiles))
    chunks = []
    for bucket in range(len(buckets)):
        members = order[bucket_of[order] == bucket]
        chunks += np.split(members, range(batch_size, len(members), batch_size))
    if rng is not None:
        chunks = [chunks[i] for i in rng.permutation(len(chunks))]
    nothing = np.zeros(0, np.float32)
    filler = rna.Profile("", experiment=0, reactivity=nothing, error=nothing)
    for chunk in filter(len, chunks):
        missing = batch_size - len(chunk)
        yield pad([profiles[i] for i in chunk] + [filler] * missing, buckets)


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


def score_medians(
    train: Sequence[rna.Profile], test: Sequence[rna.Profile]
) -> dict[str, Score]:
    """What predicting a median scores: of each experiment, and of each base in it."""

    def flatten(profiles: Sequence[rna.Profile]) -> tuple[np.ndarray, ...]:
        targets = np.concatenate([profile.reactivity for profile in profiles])
        lengths = [len(profile.sequence) for profile in profiles]
        heads = np.repeat([profile.experiment for profile in profiles], lengths)
        letters = "".join(profile.sequence for profile in profiles)
        bases = np.array([rna.BASES.index(letter) for letter in letters])
        observed = ~np.isnan(targets)
        return targets[observed], heads[observed], bases[observed]

    train_targets, train_heads, train_bases = flatten(train)
    targets, heads, bases = flatten(test)
    scores = {}
    for name, train_groups, groups in (
        ("experiment", train_heads, heads),
        ("experiment_and_base", 4 * train_heads + train_bases, 4 * heads + bases),
    ):
        predictions = np.zeros_like(targets)
        for group in np.unique(train_groups):
            median = np.median(train_targets[train_groups == group])
            predictions[groups == group] = median
        means = wl.absolute_error(
            predictions, targets, segment_ids=heads, num_segments=len(rna.EXPERIMENTS)
        )
        scores[name] = score(jax.tree.map(lambda leaf: leaf[None], means))
    return scores


# Checkpoints -------------------------------------------------------------------------


class Curve(NamedTuple):
    """What is recorded during training."""

    step: list[int]
    train: list[float]
    test: list[float]


Modules = tuple[TwoHeadModel, nnx.Optimizer]


def open_checkpoints(
    options: argparse.Namespace,
) -> contextlib.AbstractContextManager[ocp.CheckpointManager | None]:
    """Opens the directory of a run; exits if it holds a run with other options."""
    if options.checkpoint is None:
        return contextlib.nullcontext()
    output = ("checkpoint", "plot", "json")
    settings = {k: str(v) for k, v in vars(options).items() if k not in output}
    manager = ocp.CheckpointManager(
        options.checkpoint.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=1),
        metadata=settings,  # which stays what it was when the directory was made
    )
    began_with = manager.metadata().custom_metadata
    others = [f"{k}={v}" for k, v in began_with.items() if settings.get(k) != v]
    if others:
        names = ", ".join(others)
        sys.exit(f"error: {options.checkpoint} holds a run with other options: {names}")
    return manager


def save(
    manager: ocp.CheckpointManager,
    step: int,
    modules: Modules,
    recent: wl.WeightedMean,
    curve: Curve,
) -> None:
    """Saves all that a run needs to go on after ``step``."""
    manager.save(
        step,
        args=ocp.args.Composite(
            arrays=ocp.args.StandardSave((nnx.state(modules), recent)),
            curve=ocp.args.JsonSave(curve._asdict()),
        ),
    )


def restore(
    manager: ocp.CheckpointManager | None, modules: Modules
) -> tuple[int, wl.WeightedMean, Curve]:
    """Puts the last checkpoint, if any, into ``modules``; returns what else it has."""
    recent = wl.WeightedMean.zeros()
    if manager is None or (step := manager.latest_step()) is None:
        return 0, recent, Curve([], [], [])
    saved = manager.restore(
        step,
        args=ocp.args.Composite(
            arrays=ocp.args.StandardRestore((nnx.state(modules), recent)),
            curve=ocp.args.JsonRestore(),
        ),
    )
    state, recent = saved.arrays
    nnx.update(modules, state)
    return step, recent, Curve(**saved.curve)


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[threading.Event]:
    """Turns Ctrl-C into an event, so that the step can finish; a second is at once."""
    event = threading.Event()

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, default)

    default = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, default)


# The program -------------------------------------------------------------------------


def train_model(
    train: Sequence[rna.Profile],
    test: Sequence[rna.Profile],
    buckets: Sequence[int],
    options: argparse.Namespace,
) -> tuple[TwoHeadModel, Curve, list[int]]:
    """Trains; returns the model, its learning curve, and the lengths compiled for."""
    if options.mean_of_means:
        reduce: Reduction = mean_of_means
    else:
        reduce = functools.partial(size_weighted, power=options.weighting)
    train_step, compiled = make_train_step(reduce, max_traces=len(buckets))

    num_features = train[0].features().shape[1]
    model = TwoHeadModel(num_features, rngs=nnx.Rngs(options.seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 3e-3, warmup_steps=options.steps // 10, decay_steps=options.steps
    )
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)

    rng = np.random.default_rng(options.seed)
    epochs = (
        batches(train, buckets, options.batch_size, rng) for _ in itertools.count()
    )
    stream = itertools.chain.from_iterable(epochs)
    modules = (model, optimizer)
    with open_checkpoints(options) as manager, delayed_interrupt() as interrupted:
        start, recent, curve = restore(manager, modules)
        step, stopped = start, False
        # What was trained on before is drawn again, and passed over.
        rest = itertools.islice(stream, start, options.steps)
        progress = tqdm(
            rest, initial=start, total=options.steps, desc="training", unit="step"
        )
        for step, batch in enumerate(progress, start=start + 1):
            recent += train_step(model, optimizer, batch)  # adds totals and weights
            progress.set_postfix(loss=f"{recent.compute():.4f}", refresh=False)
            is_tenth = step % max(options.steps // 10, 1) == 0 or step == options.steps
            if is_tenth:
                test_means = evaluate(model, test, buckets, EVALUATION_SIZES[-1])
                curve.step.append(step)
                curve.train.append(float(recent.compute()))
                curve.test.append(score(test_means)["both"])
                recent = wl.WeightedMean.zeros()
            stopped = interrupted.is_set()
            if manager and (is_tenth or stopped):
                save(manager, step, modules, recent, curve)
            if stopped:
                break
        progress.close()
    if stopped:
        print(f"stopped after step {step} of {options.steps}", end=", ")
        print(
            f"saved in {options.checkpoint}: the same command goes on from there"
            if options.checkpoint
            else "not saved: that takes --checkpoint"
        )
        sys.exit(130)
    return model, curve, sorted(compiled)


def plot(
    path: Path,
    model: TwoHeadModel,
    curve: Curve,
    baseline: Score,
    test: Sequence[rna.Profile],
    buckets: Sequence[int],
) -> None:
    """Draws the learning curves, and predictions over measurements."""
    shown = [
        profile
        for head in range(len(rna.EXPERIMENTS))
        for profile in [p for p in test if p.experiment == head][:2]
    ]
    batch = pad(shown, buckets)
    predictions = wl.select_head(model(batch.features, batch.lengths), batch.heads)

    figure = Figure(figsize=(12, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    axes = left.subplots()
    axes.plot(curve.step, curve.train, "o-", label="training loss")
    axes.plot(curve.step, curve.test, "s-", label="test MAE")
    label = "median of each experiment and base"
    axes.axhline(baseline["both"], color="0.5", ls="--", label=label)
    axes.set(xlabel="step", ylabel="absolute error", title="Learning curves")
    axes.legend()

    right.suptitle("Held-back profiles: measured (bars) and predicted (line)")
    rows = right.subplots(len(shown), squeeze=False)[:, 0]
    for axes, profile, prediction in zip(rows, shown, predictions, strict=True):
        length = len(profile.sequence)
        position = np.arange(1, length + 1)
        axes.bar(position, profile.reactivity, width=1.0, color="0.7")
        axes.plot(position, prediction[:length], color="tab:red")
        # Not measured, so neither trained on nor scored.
        missing = position[np.isnan(profile.reactivity)]
        axes.plot(missing, np.zeros(len(missing)), "|", color="tab:blue")
        axes.set(xlim=(0, length + 1), ylabel=rna.EXPERIMENTS[profile.experiment])
    rows[-1].set_xlabel("position in the sequence (blue: not measured)")
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a table in the layout of Ribonanza's train_data.csv, whose reactivities "
        "are clipped to 0..1, as in the competition (default: synthetic profiles)",
    )
    data.add_argument(
        "--error-weights",
        action="store_true",
        help="in training, weigh each position by its inverse error variance, from the "
        "columns reactivity_error_*; needs --data",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--steps",
        type=positive,
        default=600,
        metavar="N",
        help="optimizer steps (default: %(default)s)",
    )
    training.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="samples in a step (default: %(default)s)",
    )
    training.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the initial parameters and the order of the batches; the data, and "
        "what is held back of it, stay the same (default: %(default)s)",
    )
    way = training.add_mutually_exclusive_group()
    way.add_argument(
        "--weighting",
        type=weighting,
        default="element",
        metavar="WAY",
        help="what a sample weighs in the loss: 'element', as much as it has measured "
        "positions; 'sample', all the same; or a number, that power of its measured "
        "positions (default: %(default)s)",
    )
    way.add_argument(
        "--mean-of-means",
        action="store_true",
        help="train on, and report, means of means: the wrong way, for comparison",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--plot",
        type=writable,
        metavar="FILE",
        help="draw the learning curves and a few predicted profiles (.png, .pdf, .svg)",
    )
    output.add_argument(
        "--json", type=writable, metavar="FILE", help="write the figures as JSON"
    )
    output.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="save the run in DIR, ten times and at Ctrl-C; the same command goes on "
        "from there",
    )
    options = parser.parse_args(arguments)
    if options.error_weights and options.data is None:
        parser.error("--error-weights needs --data: synthetic profiles have no errors")
    return options


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def weighting(text: str) -> float:
    """The power of its size that a sample weighs."""
    named = {"element": 1.0, "sample": 0.0}
    return named[text] if text in named else float(text)


def writable(text: str) -> Path:
    """A file in a folder that exists, so that no run ends without its results."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {path.parent}")
    return path


def load(options: argparse.Namespace) -> list[rna.Profile]:
    """Reads the profiles, or makes them up."""
    if options.data is None:
        return rna.synthetic()
    profiles = rna.read_ribonanza(options.data, with_errors=options.error_weights)
    return [
        dataclasses.replace(profile, reactivity=profile.reactivity.clip(0, 1))
        for profile in profiles
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    start = time.perf_counter()
    try:
        profiles = load(options)
        train, test = rna.hold_back(profiles)
    except (OSError, rna.MalformedFileError) as error:
        sys.exit(f"error: {error}")
    buckets = wl.bucket_sizes(
        [len(profile.sequence) for profile in profiles], NUM_BUCKETS, multiple_of=8
    )
    kind = "synthetic" if options.data is None else "measured"
    print(f"{len(train)} {kind} profiles to train on, {len(test)} held back")
    model, curve, compiled = train_model(train, test, buckets, options)
    sizes = ", ".join(map(str, compiled))
    print(f"compiled the training step {len(compiled)} times, for lengths of {sizes}")

    means = {size: evaluate(model, test, buckets, size) for size in EVALUATION_SIZES}
    test_mae = score(means[EVALUATION_SIZES[-1]], of_means=options.mean_of_means)
    medians = score_medians(train, test)
    evaluation = {
        name: {size: score(m, of_means=wrong)["both"] for size, m in means.items()}
        for name, wrong in (("weighted", False), ("mean_of_means", True))
    }
    seconds = time.perf_counter() - start

    label = "this model" + ", a mean of means" * options.mean_of_means
    print_table(
        "MAE over the measured positions that were held back",
        {
            label: test_mae,
            "median of each experiment and base": medians["experiment_and_base"],
            "median of each experiment": medians["experiment"],
        },
    )
    print_table(
        "The same model, evaluated in batches of different sizes",
        {
            "size-weighted mean: does not move": evaluation["weighted"],
            "mean of the batches' means: moves": evaluation["mean_of_means"],
        },
    )
    print(f"\n{seconds:.0f} seconds")

    if options.json:
        figures = {
            "test_mae": test_mae,
            "median_mae": {name: median["both"] for name, median in medians.items()},
            "seconds": seconds,
            "compiles": len(compiled),
            "evaluation": evaluation,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.plot:
        baseline = medians["experiment_and_base"]
        plot(options.plot, model, curve, baseline, test, buckets)


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints numbers by row and column."""
    print(f"\n{title}")
    print(f"{'':36}" + "".join(f"{column:>8}" for column in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:36}" + "".join(f"{value:8.4f}" for value in row.values()))


if __name__ == "__main__":
    main()
