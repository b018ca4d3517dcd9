"""RNA chemical mapping: how much each base of a sequence reacts with a reagent.

Two sources of profiles, one format. `synthetic` makes them up: structures from a small
grammar, and reactivities as they are distributed in real data. `read_ribonanza` reads
measured ones, in the layout of ``train_data.csv`` of the Kaggle competition "Stanford
Ribonanza RNA Folding".
"""

import csv
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

BASES = "ACGU"
BRACKETS = ".()"
EXPERIMENTS = ("2A3", "DMS")  # the two reagents, one head of the model each

_EXPERIMENT_TYPES = ("2A3_MaP", "DMS_MaP")  # their names in Kaggle's files

# Mean reactivities of A C G U, paired and unpaired, as measured on real data.
_MEANS = np.array(
    [
        [(0.11, 0.52), (0.10, 0.77), (0.11, 0.59), (0.20, 0.97)],  # 2A3
        [(0.27, 0.83), (0.18, 1.18), (0.06, 0.10), (0.04, 0.19)],  # DMS
    ]
)
_READ_BASES = ("ACGU", "AC")  # DMS reads A and C only
_UNPAIRED_SHARES = (0.37, 0.16, 0.21, 0.26)
_PAIRS = ("CG", "GC", "AU", "UA", "GU", "UG")
_PAIR_SHARES = (0.26, 0.26, 0.19, 0.19, 0.05, 0.05)


class MalformedFileError(ValueError):
    """A file that is not what it should be; says where: file, row and column."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """One sequence of length L, probed by one experiment.

    Attributes:
      sequence: L letters of `BASES`.
      experiment: index into `EXPERIMENTS`.
      reactivity: float32 ``[L]``; NaN where nothing was measured.
      error: float32 ``[L]``, the standard errors; None if unknown.
      structure: L letters of `BRACKETS`, or empty if unknown.
    """

    sequence: str
    experiment: int
    reactivity: np.ndarray
    error: np.ndarray | None = None
    structure: str = ""

    def features(self) -> np.ndarray:
        """Encodes what a model may see: float32 ``[L, 4]``, or 7 with a structure."""
        columns = [one_hot(self.sequence, BASES)]
        if self.structure:
            columns.append(one_hot(self.structure, BRACKETS))
        return np.concatenate(columns, axis=-1)


def one_hot(letters: str, alphabet: str) -> np.ndarray:
    """Encodes each letter as a row with one 1: float32 ``[L, len(alphabet)]``."""
    rows = np.eye(len(alphabet), dtype=np.float32)
    return rows[[alphabet.index(letter) for letter in letters]]


def synthetic(count: int = 1300, *, seed: int = 0) -> list[Profile]:
    """Makes up ``count`` profiles with lengths from 30 to 120, their structures known.

    Reactivities are gamma distributed (shape 2) around the mean of their base, paired
    or not, under their experiment, plus normal noise of 0.05. The last 10 positions
    and a random tenth are missing, and so is what DMS does not read.
    """
    rng = np.random.default_rng(seed)
    profiles = []
    for _ in range(count):
        structure = _structure(rng, shortest=30, longest=120)
        bases = _bases(rng, structure)
        experiment = int(rng.integers(len(EXPERIMENTS)))
        unpaired = np.array([bracket == "." for bracket in structure])
        means = _MEANS[experiment, bases, unpaired.astype(int)]

        length = len(structure)
        reactivity = rng.gamma(2, means / 2) + rng.normal(0, 0.05, length)
        sequence = "".join(BASES[base] for base in bases)
        missing = rng.random(length) < 0.1
        missing[-10:] = True
        missing |= [base not in _READ_BASES[experiment] for base in sequence]
        reactivity[missing] = np.nan
        profiles.append(
            Profile(
                sequence,
                experiment,
                reactivity.astype(np.float32),
                structure=structure,
            )
        )
    return profiles


def _structure(rng: np.random.Generator, shortest: int, longest: int) -> str:
    """Draws a bracket string from the grammar of Knudsen and Hein (1999)."""
    while True:
        brackets: list[str] = []
        stack = ["S"]
        while stack and len(brackets) <= longest:
            symbol = stack.pop()
            if symbol in BRACKETS:
                brackets.append(symbol)
                continue
            # The two ways to go on, written backwards, for a stack.
            share, usual, other = {
                "S": (0.868, "SL", "L"),
                "L": (0.895, ".", ")F("),
                "F": (0.788, ")F(", "SL"),
            }[symbol]
            stack.extend(usual if rng.random() < share else other)
        if shortest <= len(brackets) <= longest:
            return "".join(brackets)


def _bases(rng: np.random.Generator, structure: str) -> np.ndarray:
    """Draws a base for each unpaired position, and a pair for each two brackets."""
    bases = rng.choice(len(BASES), len(structure), p=_UNPAIRED_SHARES)
    opened: list[int] = []
    for i, bracket in enumerate(structure):
        if bracket == "(":
            opened.append(i)
        elif bracket == ")":
            pair = _PAIRS[rng.choice(len(_PAIRS), p=_PAIR_SHARES)]
            bases[opened.pop()], bases[i] = map(BASES.index, pair)
    return bases


def hold_back(profiles: Sequence[Profile]) -> tuple[list[Profile], list[Profile]]:
    """Splits into training and test: every fifth sequence, with all its profiles.

    Raises:
      MalformedFileError: there are fewer than 5 sequences.
    """
    sequences = list(dict.fromkeys(profile.sequence for profile in profiles))
    held_back = set(sequences[4::5])
    if not held_back:
        raise MalformedFileError("fewer than 5 sequences: none can be held back")
    train = [profile for profile in profiles if profile.sequence not in held_back]
    test = [profile for profile in profiles if profile.sequence in held_back]
    return train, test


def read_ribonanza(
    path: str | os.PathLike[str], *, with_errors: bool = False
) -> list[Profile]:
    """Reads profiles in the layout of Kaggle's ``train_data.csv``.

    An empty field is a position that was not measured. Rows whose ``SN_filter`` is 0
    are too noisy to use, and are left out.

    Args:
      path: the file.
      with_errors: read the standard errors too, of which each measured position must
        then have a positive one.

    Raises:
      MalformedFileError: names the file, the row (the header is row 1) and the column.
      OSError: the file cannot be opened.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        try:
            profiles = list(_profiles(rows, with_errors))
        except UnicodeDecodeError as error:
            raise MalformedFileError(f"{path}: not a text file") from error
        except (ValueError, csv.Error) as error:
            raise MalformedFileError(
                f"{path}, row {max(rows.line_num, 1)}, {error}"
            ) from error
    if not profiles:
        raise MalformedFileError(f"{path}: holds no profiles")
    return profiles


def _profiles(rows: Iterator[list[str]], with_errors: bool) -> Iterator[Profile]:
    header = next(rows, [])
    column = {name: i for i, name in enumerate(header)}
    for name in ("sequence", "experiment_type"):
        if name not in column:
            raise ValueError(f"column {name}: missing from the header")
    values = _numbered_columns(header, "reactivity_")
    errors = _numbered_columns(header, "reactivity_error_") if with_errors else {}

    for fields in filter(None, rows):  # blank lines are skipped
        if len(fields) != len(header):
            first_wrong = header[min(len(fields), len(header) - 1)]
            raise ValueError(
                f"column {first_wrong}: the row has {len(fields)} fields where the "
                f"header has {len(header)}"
            )
        if "SN_filter" in column and fields[column["SN_filter"]] == "0":
            continue
        sequence = fields[column["sequence"]]
        if not sequence or set(sequence) - set(BASES):
            raise ValueError(f"column sequence: {sequence!r} is not made of {BASES}")
        experiment = fields[column["experiment_type"]]
        if experiment not in _EXPERIMENT_TYPES:
            raise ValueError(
                f"column experiment_type: {experiment!r} is none of "
                f"{', '.join(_EXPERIMENT_TYPES)}"
            )
        reactivity = _numbers(fields, values, len(sequence))
        error = _numbers(fields, errors, len(sequence)) if with_errors else None
        if error is not None:
            unweighable = np.flatnonzero(~np.isnan(reactivity) & ~(error > 0))
            if unweighable.size:
                name = list(errors)[unweighable[0]]
                raise ValueError(
                    f"column {name}: {fields[errors[name]]!r} is not the positive "
                    "error of a measured position"
                )
        yield Profile(
            sequence, _EXPERIMENT_TYPES.index(experiment), reactivity, error=error
        )


def _numbered_columns(header: list[str], prefix: str) -> dict[str, int]:
    """Finds the columns ``prefix0001``, ``prefix0002``, ... and where they are."""
    found = {
        name: i for i, name in enumerate(header) if re.fullmatch(rf"{prefix}\d+", name)
    }
    expected = [f"{prefix}{n:04d}" for n in range(1, max(len(found), 1) + 1)]
    for name in expected:
        if name not in found:
            raise ValueError(f"column {name}: missing from the header")
    return {name: found[name] for name in expected}


def _numbers(fields: list[str], columns: dict[str, int], length: int) -> np.ndarray:
    """Parses the number of each position of a sequence, NaN for an empty field."""
    numbers = np.full(length, np.nan, np.float32)
    for position, (name, i) in enumerate(columns.items()):
        if not (text := fields[i]):
            continue
        if position >= length:
            raise ValueError(
                f"column {name}: {text!r} lies past the end of the sequence, which has "
                f"{length} bases"
            )
        try:
            numbers[position] = float(text)
        except ValueError:
            numbers[position] = np.inf
        if not np.isfinite(numbers[position]):
            raise ValueError(f"column {name}: {text!r} is not a number")
    return numbers
