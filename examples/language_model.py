"""Trains a small decoder with a vocabulary that is large beside everything else.

The text is on every machine with Python: the sources of its standard library. A sample
is a function, a class, or what stands between them, in pieces: the most frequent words
and signs, and the bytes of all others. Samples differ in length, so they are packed
into rows; segment_ids keep what a position attends to, and what it is scored on, within
its own sample, and what is left of a row does not count.

Two models, equal at first, are trained on the same batches: one by the fused loss of
features and kernel, one by the loss of the logits. They learn the same; the table says
what each takes. Last, held-back samples are scored, each by its own mean.

Prints in some minutes on two CPU cores, with speeds that are the machine's, and losses
that are those of its Python's sources::

                                       fused       plain
    loss of the first step           10.9755     10.9755
    loss of the last step             4.0491      4.0491
    tokens that count a second           ...         ...
    temporary memory, MiB                212         851

    held back, one vote a token:  4.3370
    held back, one vote a sample: 4.2842
"""

import argparse
import itertools
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import wloss_jax as wl
import wloss_jax.nnx

PADDING = -1  # the segment of positions that belong to no sample


# The data ----------------------------------------------------------------------------


def read_samples(max_bytes: int) -> list[str]:
    """Cuts sources of the standard library before each function and class."""
    samples = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        samples += filter(
            str.strip, re.split(r"(?m)^(?=(?:async )?def |class |@)", text)
        )
        size += len(text)
        if size >= max_bytes:
            break
    return samples


class Tokenizer:
    """Turns text into the ids of pieces: 256 bytes, then the most frequent words."""

    def __init__(self, samples: Sequence[str], vocab_size: int):
        counts = Counter(itertools.chain.from_iterable(map(self.split, samples)))
        words = [word for word, _ in counts.most_common(vocab_size - 256)]
        self.ids = {word: 256 + i for i, word in enumerate(words)}

    @staticmethod
    def split(text: str) -> list[str]:
        """Words, runs of blanks, and all other signs one by one."""
        return re.findall(r"\w+|\s+|[^\w\s]", text)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, the bytes of a word where it is a rare one."""
        pieces = (
            [self.ids[w]] if w in self.ids else w.encode() for w in self.split(text)
        )
        return np.fromiter(itertools.chain.from_iterable(pieces), np.int32)


class Batch(NamedTuple):
    """B rows of L positions, each with samples one after the other."""

    tokens: np.ndarray  # [B, L]
    labels: np.ndarray  # [B, L], the token that comes next
    positions: np.ndarray  # [B, L], within the sample
    segment_ids: np.ndarray  # [B, L], the sample of the row, or PADDING


def pack(samples: Sequence[np.ndarray], size: int) -> Batch:
    """Packs samples, cut to ``size``, into rows: the next where one does not fit."""
    rows: list[list[np.ndarray]] = [[]]
    for sample in samples:
        cut = sample[: size + 1]
        if sum(len(x) - 1 for x in rows[-1]) + len(cut) - 1 > size:
            rows.append([])
        rows[-1].append(cut)
    batch = Batch(*(np.zeros((len(rows), size), np.int32) for _ in Batch._fields))
    batch.segment_ids[:] = PADDING
    for i, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row):
            here = np.s_[i, start : start + len(sample) - 1]
            batch.tokens[here], batch.labels[here] = sample[:-1], sample[1:]
            batch.positions[here] = np.arange(len(sample) - 1)
            batch.segment_ids[here] = segment
            start += len(sample) - 1
    return batch


def batches(
    samples: Sequence[np.ndarray], size: int, rows: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Passes over the samples forever, each time in another order."""
    while True:
        packed = pack([samples[i] for i in rng.permutation(len(samples))], size)
        for start in range(0, len(packed.tokens) - rows + 1, rows):
            yield Batch(*(array[start : start + rows] for array in packed))


# The model ---------------------------------------------------------------------------


class Block(nnx.Module):
    """Attention, then a small network, each added to what comes in."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.inputs = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.output = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.wide = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, attends: jax.Array) -> jax.Array:
        """Maps ``[B, L, width]`` to the same; ``attends`` is bool ``[B, 1, L, L]``."""
        inputs = self.inputs(self.attention_norm(x))
        inputs = inputs.reshape(*x.shape[:2], self.heads, -1)
        attended = jax.nn.dot_product_attention(*jnp.split(inputs, 3, -1), mask=attends)
        x += self.output(attended.reshape(x.shape))
        return x + self.narrow(nnx.gelu(self.wide(self.norm(x))))


class Decoder(nnx.Module):
    """Features of each position, and the kernel that makes logits of them."""

    def __init__(self, vocab_size: int, size: int, *, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab_size, width, rngs=rngs)
        self.place = nnx.Embed(size, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, 4, rngs=rngs) for _ in range(2))
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        kernel = jax.random.normal(rngs.params(), (width, vocab_size))
        self.kernel = nnx.Param(kernel / np.sqrt(width))

    def __call__(self, batch: Batch) -> jax.Array:
        """Features ``[B, L, width]``: a sample sees nothing of its neighbours."""
        chex.assert_rank(batch.tokens, 2)
        chex.assert_equal_shape(batch)
        ids = batch.segment_ids
        earlier = jnp.tri(ids.shape[1], dtype=bool)[None]
        attends = (ids[:, :, None] == ids[:, None, :]) & earlier
        x = self.embed(batch.tokens) + self.place(batch.positions)
        for block in self.blocks:
            x = block(x, attends[:, None])
        return self.norm(x)


# The losses and the step -------------------------------------------------------------


def fused_loss(model: Decoder, batch: Batch) -> wl.WeightedMean:
    """The cross-entropy of features and kernel, without logits."""
    return wl.linear_softmax_cross_entropy(
        model(batch),
        model.kernel[...],
        batch.labels,
        where=batch.segment_ids != PADDING,
    )


def plain_loss(model: Decoder, batch: Batch) -> wl.WeightedMean:
    """The same of the logits ``[B, L, V]``."""
    return wl.softmax_cross_entropy_with_integer_labels(
        model(batch) @ model.kernel[...],
        batch.labels,
        where=batch.segment_ids != PADDING,
    )


LossFn = Callable[[Decoder, Batch], wl.WeightedMean]
LOSSES: dict[str, LossFn] = {"fused": fused_loss, "plain": plain_loss}


def make_train_step(
    loss_fn: LossFn,
) -> Callable[[Decoder, nnx.Optimizer, Batch], wl.WeightedMean]:
    """Makes the compiled step of one of the losses."""

    @nnx.jit
    def train_step(
        model: Decoder, optimizer: nnx.Optimizer, batch: Batch
    ) -> wl.WeightedMean:
        mean, gradients = wl.nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, gradients)
        return mean

    return train_step


@nnx.jit(static_argnames="num_segments")
def score(model: Decoder, batch: Batch, *, num_segments: int) -> wl.WeightedMean:
    """The loss of each sample of one row: a `WeightedMean` of ``[num_segments]``."""
    return wl.linear_softmax_cross_entropy(
        model(batch),
        model.kernel[...],
        batch.labels,
        segment_ids=batch.segment_ids,
        num_segments=num_segments,
    )


# The program -------------------------------------------------------------------------


class Run(NamedTuple):
    """What training by one loss came to."""

    model: Decoder
    losses: list[wl.WeightedMean]
    seconds: list[float]
    temporary: float  # MiB, of the compiled step


def train(samples: Sequence[np.ndarray], options: argparse.Namespace) -> dict[str, Run]:
    """Trains by each loss in turn, step by step, on the same batches."""
    rng = np.random.default_rng(options.seed)
    stream = batches(samples, options.row_size, options.rows, rng)
    first = next(stream)
    runs, steps = {}, {}
    for name in options.losses:
        model = Decoder(
            options.vocab_size,
            options.row_size,
            width=options.width,
            rngs=nnx.Rngs(options.seed),
        )
        optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
        step = make_train_step(LOSSES[name])
        memory = step.lower(model, optimizer, first).compile().memory_analysis()
        runs[name] = Run(model, [], [], memory.temp_size_in_bytes / 2**20)
        steps[name] = step, optimizer
    progress = tqdm(range(options.steps), desc="training", unit="step")
    for _, batch in zip(progress, itertools.chain([first], stream), strict=False):
        for name, run in runs.items():
            step, optimizer = steps[name]
            start = time.perf_counter()
            mean = jax.block_until_ready(step(run.model, optimizer, batch))
            run.seconds.append(time.perf_counter() - start)
            run.losses.append(mean)
        progress.set_postfix(loss=f"{mean.compute():.4f}", refresh=False)
    return runs


def score_samples(
    model: Decoder, samples: Sequence[np.ndarray], size: int
) -> wl.WeightedMean:
    """The loss of each of the samples, row by row."""
    packed = pack(samples, size)
    most = int(packed.segment_ids.max()) + 1
    rows = [
        score(model, Batch(*(array[i : i + 1] for array in packed)), num_segments=most)
        for i in range(len(packed.tokens))
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, what in (
        ("--steps", 40, "optimizer steps"),
        ("--vocab-size", 32768, "pieces in the vocabulary, used or not"),
        ("--width", 128, "features of each position"),
        ("--row-size", 256, "positions in a row"),
        ("--rows", 8, "rows in a batch"),
        ("--kilobytes", 4000, "how much of the standard library to read"),
        ("--seed", 0, "of the initial parameters and the order of the samples"),
    ):
        what = f"{what} (default: %(default)s)"
        parser.add_argument(name, type=int, default=default, metavar="N", help=what)
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=LOSSES,
        default=list(LOSSES),
        help="which to train by (default: both)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    texts = read_samples(1000 * options.kilobytes)
    tokenizer = Tokenizer(texts, options.vocab_size)
    samples = [tokenizer.encode(text) for text in texts]
    samples = [sample for sample in samples if len(sample) > 1]
    train_samples = [sample for i, sample in enumerate(samples) if i % 20]
    test_samples = samples[::20][:100]
    print(
        f"{len(train_samples)} samples to train on, {len(test_samples)} held back; "
        f"{256 + len(tokenizer.ids)} of {options.vocab_size} pieces are in use"
    )
    runs = train(train_samples, options)

    positions = options.rows * options.row_size
    tokens = float(
        np.mean([mean.weight for run in runs.values() for mean in run.losses])
    )
    print(f"\n{tokens / positions:.0%} of {positions} positions in a step count")
    print(f"{'':28}" + "".join(f"{name:>12}" for name in runs))
    for what, numbers in {
        "loss of the first step": [run.losses[0].compute() for run in runs.values()],
        "loss of the last step": [run.losses[-1].compute() for run in runs.values()],
        "tokens that count a second": [
            tokens / np.median(run.seconds) for run in runs.values()
        ],
        "temporary memory, MiB": [run.temporary for run in runs.values()],
    }.items():
        digits = 4 if what.startswith("loss") else 0
        print(f"{what:28}" + "".join(f"{number:12.{digits}f}" for number in numbers))

    model = next(iter(runs.values())).model
    per_sample = score_samples(model, test_samples, options.row_size)
    by_sample = per_sample.reweight(wl.size_power(0.0)).merge()
    print(f"\nheld back, one vote a token:  {per_sample.merge().compute():.4f}")
    print(f"held back, one vote a sample: {by_sample.compute():.4f}")


if __name__ == "__main__":
    main()
