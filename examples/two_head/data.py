"""The profiles, and batches of them: padded to a few lengths, and filled up."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import rna

import wloss_jax as wl


def load(
    options: argparse.Namespace, num_buckets: int
) -> tuple[list[rna.Profile], list[rna.Profile], tuple[int, ...]]:
    """Profiles to train on, others to test, and the lengths to pad them to.

    Ends the program, with a line, if their file is not what it should be.
    """
    try:
        profiles = read(options)
        train, test = rna.hold_back(profiles)
    except (OSError, rna.MalformedFileError) as error:
        sys.exit(f"error: {error}")
    lengths = [len(profile.sequence) for profile in profiles]
    return train, test, wl.bucket_sizes(lengths, num_buckets, multiple_of=8)


def read(options: argparse.Namespace) -> list[rna.Profile]:
    """Reads the profiles, or makes them up."""
    if options.data is None:
        return rna.synthetic()
    profiles = rna.read_ribonanza(options.data, with_errors=options.error_weights)
    return [
        dataclasses.replace(profile, reactivity=profile.reactivity.clip(0, 1))
        for profile in profiles
    ]


class Batch(NamedTuple):
    """B samples, padded to one length L."""

    features: jax.Array  # [B, L, F]
    targets: jax.Array  # [B, L], NaN where nothing was measured
    weights: jax.Array | None  # [B, L], how much each position counts in training
    heads: jax.Array  # [B], the experiment
    lengths: jax.Array  # [B]


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


def epochs(
    profiles: Sequence[rna.Profile],
    buckets: Sequence[int],
    batch_size: int,
    seed: int,
) -> Iterator[Batch]:
    """Passes over the data again and again, in another order each time."""
    rng = np.random.default_rng(seed)
    return itertools.chain.from_iterable(
        batches(profiles, buckets, batch_size, rng) for _ in itertools.count()
    )
