"""Tables and pictures of what a run has learned."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rna
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from two_head.runs import Curve


def print_tables(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the errors, beside those of medians, and of other ways to evaluate."""
    label = "this model" + ", a mean of means" * options.mean_of_means
    medians, evaluation = figures["median_mae"], figures["evaluation"]
    print_table(
        "MAE over the measured positions that were held back",
        {
            label: figures["test_mae"],
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
    print(f"\n{figures['seconds']:.0f} seconds")


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints numbers by row and column."""
    print(f"\n{title}")
    print(f"{'':36}" + "".join(f"{column:>8}" for column in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:36}" + "".join(f"{value:8.4f}" for value in row.values()))


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Writes the figures; of the medians, those over both experiments."""
    both = {name: mae["both"] for name, mae in figures["median_mae"].items()}
    path.write_text(json.dumps(figures | {"median_mae": both}, indent=2) + "\n")


def examples(profiles: Sequence[rna.Profile]) -> list[rna.Profile]:
    """The first two profiles of each experiment."""
    return [
        profile
        for head in range(len(rna.EXPERIMENTS))
        for profile in [p for p in profiles if p.experiment == head][:2]
    ]


def plot(
    path: Path,
    figures: dict[str, Any],
    curve: Curve,
    profiles: Sequence[rna.Profile],
    predictions: np.ndarray,
) -> None:
    """Draws the learning curves, and predictions ``[N, L]`` over profiles."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    axes = left.subplots()
    axes.plot(curve.step, curve.train, "o-", label="training loss")
    axes.plot(curve.step, curve.test, "s-", label="test MAE")
    label = "median of each experiment and base"
    baseline = figures["median_mae"]["experiment_and_base"]["both"]
    axes.axhline(baseline, color="0.5", ls="--", label=label)
    axes.set(xlabel="step", ylabel="absolute error", title="Learning curves")
    axes.legend()

    right.suptitle("Held-back profiles: measured (bars) and predicted (line)")
    rows = right.subplots(len(profiles), squeeze=False)[:, 0]
    for axes, profile, prediction in zip(rows, profiles, predictions, strict=True):
        plot_profile(axes, profile, prediction)
    rows[-1].set_xlabel("position in the sequence (blue: not measured)")
    figure.savefig(path, dpi=120)


def plot_profile(axes: Axes, profile: rna.Profile, prediction: np.ndarray) -> None:
    """Draws one profile and its prediction, without the padding."""
    length = len(profile.sequence)
    position = np.arange(1, length + 1)
    axes.bar(position, profile.reactivity, width=1.0, color="0.7")
    axes.plot(position, prediction[:length], color="tab:red")
    # Not measured, so neither trained on nor scored.
    missing = position[np.isnan(profile.reactivity)]
    axes.plot(missing, np.zeros(len(missing)), "|", color="tab:blue")
    axes.set(xlim=(0, length + 1), ylabel=rna.EXPERIMENTS[profile.experiment])
