"""The command line of train_two_head.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
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
