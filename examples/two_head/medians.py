"""The simplest predictions: medians of what was measured in training."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import rna

import wloss_jax as wl


class Positions(NamedTuple):
    """The measured positions of some profiles, one after the other."""

    targets: np.ndarray  # [N]
    heads: np.ndarray  # [N], the experiment
    bases: np.ndarray  # [N], the index into `rna.BASES`


def measured(profiles: Sequence[rna.Profile]) -> Positions:
    """Flattens profiles to the positions that were measured."""
    targets = np.concatenate([profile.reactivity for profile in profiles])
    lengths = [len(profile.sequence) for profile in profiles]
    heads = np.repeat([profile.experiment for profile in profiles], lengths)
    letters = "".join(profile.sequence for profile in profiles)
    bases = np.array([rna.BASES.index(letter) for letter in letters])
    observed = ~np.isnan(targets)
    return Positions(targets[observed], heads[observed], bases[observed])


def evaluate(
    train: Sequence[rna.Profile], test: Sequence[rna.Profile]
) -> dict[str, wl.WeightedMean]:
    """The absolute error of medians: of each experiment, and of each base in it.

    Each a `WeightedMean` of ``[1, 2]``: one batch of all positions, by head.
    """
    train, test = measured(train), measured(test)
    groups = {
        "experiment": (train.heads, test.heads),
        "experiment_and_base": (
            len(rna.BASES) * train.heads + train.bases,
            len(rna.BASES) * test.heads + test.bases,
        ),
    }
    means = {}
    for name, (train_groups, test_groups) in groups.items():
        predictions = np.zeros_like(test.targets)
        for group in np.unique(train_groups):
            median = np.median(train.targets[train_groups == group])
            predictions[test_groups == group] = median
        means[name] = wl.absolute_error(
            predictions,
            test.targets,
            segment_ids=test.heads,
            num_segments=len(rna.EXPERIMENTS),
        )
    return jax.tree.map(lambda leaf: leaf[None], means)
