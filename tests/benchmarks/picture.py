"""Draws the linear cross-entropy on an H100: ``python -m tests.benchmarks.picture``.

Of the figures in ``h100.json``, which `tests.benchmarks` wrote there, into the picture
of RESULTS.md. Memory is that of the losses whose compiler tells it.
"""

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.benchmarks.timing import OURS

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "examples" / "pictures" / "linear_cross_entropy.svg"
SIZES = "32768, 4096, 128256, bfloat16"
NAMES = {
    OURS: OURS,
    "naive": "logits, then the loss",
    "remat scan, chunks of 512": "remat scan",
    "Liger Kernel": "Liger Kernel",
    "Cut Cross-Entropy": "Cut Cross-Entropy",
}
# Readable on white and on black, as nothing is drawn behind the picture.
TEXT, BLUE, GRAY = "#7f868e", "#3182ce", "#a0a8b0"
STYLE = {
    "axes.edgecolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "font.size": 11,
    "svg.hashsalt": "wloss_jax",  # the same file at every run
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


def draw() -> Figure:
    """Time with all tokens valid and with a third of them; memory, as compiled."""
    figures = json.loads((HERE / "h100.json").read_text())
    cases = figures["rows"]["linear_cross_entropy"]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, share in zip(panels, ("100%", "35%"), strict=False):
        case = cases[f"{SIZES}, {share} valid"]
        _bars(axes, {name: case["values"][name] for name in NAMES}, "{:.0f}")
        axes.axvline(case["limit"]["value"], color=TEXT, linestyle=":", linewidth=1)
        axes.set_title(f"ms, {share} valid", fontsize=11, loc="left")
    panels[1].set_yticks([])
    _bars(panels[2], figures["temporary_gib"], "{:.1f}")  # of those that XLA compiles
    panels[2].set_title("temporary GiB", fontsize=11, loc="left")
    return figure


def _bars(axes, values, form):
    colors = [BLUE, *[GRAY] * (len(values) - 1)]
    bars = axes.barh(range(len(values)), values.values(), color=colors)
    labels = [form.format(value) for value in values.values()]
    axes.bar_label(bars, labels, padding=3, fontsize=10, color=TEXT)
    axes.set_yticks(range(len(values)), [NAMES[name] for name in values])
    axes.set_ylim(len(NAMES) - 0.5, -0.5)  # the first on top, all bars of one height
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.2)


def main() -> None:
    """Draws the picture."""
    with mpl.rc_context(STYLE):
        draw().savefig(PICTURE, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
