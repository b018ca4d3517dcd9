"""Tables of tests too large to run whole, each time, on two cores."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest


def one_of_each(
    first: Iterable[Any], *others: Iterable[Any], every: int = 1
) -> list[Any]:
    """All combinations; all but one for each of ``first`` are marked `exhaustive`.

    The one moves on from one to the next, so that others too have their turn: each of
    them, where there are as many of ``first``. With ``every=2`` it is one for every
    second.
    """
    rest = list(itertools.product(*others))
    # Prime to the number of combinations, so that it goes through all of them.
    stride = next(n for n in (5, 7) if math.gcd(n, len(rest)) == 1)
    return [
        _param(
            value,
            *combination,
            unasked=bool(i % every) or j != i // every * stride % len(rest),
        )
        for i, value in enumerate(first)
        for j, combination in enumerate(rest)
    ]


def every_third(values: Iterable[Any], start: int = 0) -> list[Any]:
    """All values; all but every third are marked `exhaustive`.

    Laws of one table begin at 0, 1 and 2 in turn, so that each value has some of them.
    """
    return [_param(value, unasked=i % 3 != start) for i, value in enumerate(values)]


def unasked(*values: Any) -> Any:
    """A row of a table that is marked `exhaustive`."""
    return _param(*values, unasked=True)


def _param(*values: Any, unasked: bool) -> Any:
    return pytest.param(*values, marks=pytest.mark.exhaustive if unasked else ())
