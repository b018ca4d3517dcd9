"""Draws the pictures of the README, into the folder ``pictures`` beside this file.

``evaluation.svg``: the two-head model of train_two_head.py, trained once and evaluated
in batches of many sizes, both ways. ``flow.svg``: from two ragged samples to a number.
``combine.svg``: the losses of any_loss.py, and how far the gradient of averaged
microbatches is from that of the whole batch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import any_loss
import jax
import jax.numpy as jnp
import matplotlib as mpl
import train_two_head as two_head
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import wloss_jax as wl

FOLDER = Path(__file__).with_name("pictures")
# Readable on white and on black, as nothing is drawn behind the pictures.
TEXT, BLUE, ORANGE, FAINT = "#7f868e", "#3182ce", "#dd6b20", "#a0a8b04d"
STYLE = {
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "font.size": 12,
    "svg.hashsalt": "wloss_jax",  # the same file at every run
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}
NUM_MICROBATCHES = (1, 2, 4, 8, 16)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def evaluate() -> tuple[list[float], list[float]]:
    """Trains the model; its MAE at every batch size, weighted and as mean of means."""
    options = two_head.parse([], two_head.__doc__)
    train, test, buckets = two_head.load(options, two_head.NUM_BUCKETS)
    model, *_ = two_head.train_model(train, test, buckets, options)
    means = [two_head.evaluate(model, test, buckets, size) for size in BATCH_SIZES]
    weighted, of_means = (
        [two_head.score(m, of_means=wrong)["both"] for m in means]
        for wrong in (False, True)
    )
    return weighted, of_means


def draw_evaluation(weighted: list[float], of_means: list[float]) -> Figure:
    """One model, one set of test data: only the batch size differs."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.plot(BATCH_SIZES, of_means, "s-", color=ORANGE)
    axes.plot(BATCH_SIZES, weighted, "o-", color=BLUE)
    for values, name, color in (
        (of_means, "mean of the batches' means", ORANGE),
        (weighted, "wloss_jax", BLUE),
    ):
        axes.annotate(
            name, (BATCH_SIZES[1], values[1]), (0, 9), color=color,
            textcoords="offset points", weight="bold",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCH_SIZES, map(str, BATCH_SIZES))
    axes.margins(y=0.25)
    axes.set(xlabel="batch size of the evaluation", ylabel="test MAE")
    axes.set_title("One model, one test set, and its error", loc="left", size=12)
    return figure


def errors(params: Any, batch: Any) -> Any:
    """The parts of a root mean squared error: one mean."""
    predictions = (batch["x"] @ params["w"])[..., 0]
    return wl.squared_error(predictions, batch["x"][..., 1], lengths=batch["lengths"])


def off(
    parts: Callable[..., Any], combine: Callable[..., Any], *, by_hand: bool
) -> Any:
    """How far the gradient is off at each number of microbatches, relative."""

    def flat(grads: Any) -> jax.Array:
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(grads)])

    def gradient(k: int) -> jax.Array:
        if not by_hand:
            of_batch = wl.value_and_grad(parts, combine=combine, num_microbatches=k)
            return flat(jax.jit(of_batch)(any_loss.PARAMS, any_loss.BATCH)[1])
        cut = jax.tree.map(lambda x: x.reshape(k, -1, *x.shape[1:]), any_loss.BATCH)
        of_one = jax.vmap(wl.value_and_grad(parts, combine=combine), (None, 0))
        return flat(jax.tree.map(lambda x: x.mean(0), of_one(any_loss.PARAMS, cut)[1]))

    exact = flat(
        wl.value_and_grad(parts, combine=combine)(any_loss.PARAMS, any_loss.BATCH)[1]
    )
    return [
        float(jnp.linalg.norm(gradient(k) - exact) / jnp.linalg.norm(exact))
        for k in NUM_MICROBATCHES
    ]


def draw_combine() -> Figure:
    """Averages of microbatches by hand, and `combine`, which is flat at 0."""
    losses = {
        "CLIP": (any_loss.pairs, any_loss.clip),
        "Dice": (any_loss.overlaps, any_loss.dice),
        "Cox": (any_loss.risks, any_loss.cox),
        "RMSE": (errors, lambda m, params: jnp.sqrt(m.compute())),
    }
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.subplots()
    for (name, (parts, combine)), mark in zip(losses.items(), "sD^v", strict=True):
        by_hand = off(parts, combine, by_hand=True)
        axes.plot(NUM_MICROBATCHES, by_hand, mark + "-", color=ORANGE)
        axes.annotate(
            name, (NUM_MICROBATCHES[-1], by_hand[-1]), (8, -4), color=ORANGE,
            textcoords="offset points",
        )  # fmt: skip
        ours = off(parts, combine, by_hand=False)
        axes.plot(NUM_MICROBATCHES, ours, mark + "-", color=BLUE)
    axes.annotate(
        "combine", (NUM_MICROBATCHES[-1], 0), (8, -4), color=BLUE,
        textcoords="offset points", weight="bold",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(NUM_MICROBATCHES, map(str, NUM_MICROBATCHES))
    axes.set(xlabel="microbatches", ylabel="error of the gradient")
    title = "Averaged over microbatches, a loss that is no mean is another loss"
    axes.set_title(title, loc="left", size=12)
    return figure


def draw_flow() -> Figure:
    """The first example of the README, errors of 1, 1, 1, 1 and 5, step by step."""
    figure = Figure(figsize=(9.6, 2.2))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 24), ylim=(0, 5.5))
    axes.axis("off")
    samples = ((1, 1, 1, 1), (5,))
    for row, errors in enumerate(samples):
        y = 3 - 1.6 * row
        for i, error in enumerate(errors):
            cell(axes, 0.3 + i, y, BLUE, str(error))
            cell(axes, 6.3 + i, y, BLUE, str(error))
        for i in range(len(errors), 4):
            cell(axes, 6.3 + i, y, FAINT, "?")
        box(axes, 12.3, y, f"{sum(errors)} | {len(errors)}")
        arrow(axes, (10.5, y + 0.5), (12.1, y + 0.5))
        arrow(axes, (14.8, y + 0.5), (16.5, 2.7 - 0.4 * row))
    arrow(axes, (4.5, 2.7), (6.1, 2.7))
    box(axes, 16.7, 1.95, "9 | 5")
    arrow(axes, (19.2, 2.45), (21, 2.45))
    axes.text(22.1, 2.45, "1.8", size=17, weight="bold", color=ORANGE, va="center",
              ha="center")  # fmt: skip
    for x, text in (
        (2.3, "ragged samples"),
        (8.3, "padded, and what counts"),
        (13.5, "total | weight"),
        (17.9, "added up"),
        (22.1, "divided, once"),
    ):
        axes.text(x, 4.75, text, ha="center", va="center")
    axes.text(
        17.9, 0.55, "over samples, microbatches,\ndevices, steps", size=10,
        ha="center", va="center",
    )  # fmt: skip
    return figure


def cell(axes: Axes, x: float, y: float, color: str, text: str) -> None:
    """One element of an array."""
    axes.add_patch(Rectangle((x, y), 0.9, 1, color=color, lw=0))
    light = "white" if color == BLUE else TEXT
    axes.text(x + 0.45, y + 0.47, text, color=light, ha="center", va="center")


def box(axes: Axes, x: float, y: float, text: str) -> None:
    """A total and a weight."""
    style = "round,pad=0,rounding_size=0.25"
    axes.add_patch(
        FancyBboxPatch((x, y), 2.4, 1, boxstyle=style, ec=ORANGE, fc="none", lw=2)
    )
    axes.text(x + 1.2, y + 0.47, text, ha="center", va="center", weight="bold")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one stage to the next."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=TEXT)
    )


def main() -> None:
    """Draws all of them."""
    with mpl.rc_context(STYLE):
        pictures = {
            "flow": draw_flow(),
            "combine": draw_combine(),
            "evaluation": draw_evaluation(*evaluate()),
        }
        for name, figure in pictures.items():
            figure.savefig(
                FOLDER / f"{name}.svg", transparent=True, metadata={"Date": None}
            )


if __name__ == "__main__":
    main()
