"""Tables of tests too large to run whole, each time, on two cores."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest


def one_of_each(first: Iterable[Any], *others: Iterable[Any]) -> Iterator[Any]:
    """All combinations; all but one for each of ``first`` are marked `exhaustive`.

    The one moves on from one to the next, so that others too have their turn: each of
    them, where there are as many of ``first``.
    """
    rest = list(itertools.product(*others))
    # Odd, so that it goes through all: their number is a power of 2, or 3, or small.
    stride = 5
    for i, value in enumerate(first):
        for j, combination in enumerate(rest):
            chosen = j == i * stride % len(rest)
            marks = () if chosen else pytest.mark.exhaustive
            yield pytest.param(value, *combination, marks=marks)


def every_third(values: Iterable[Any]) -> Iterator[Any]:
    """All values; all but every third are marked `exhaustive`."""
    for i, value in enumerate(values):
        yield pytest.param(value, marks=() if i % 3 == 0 else pytest.mark.exhaustive)
