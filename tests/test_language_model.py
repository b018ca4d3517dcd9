"""examples/language_model.py as a program, run small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "language_model.py"
OPTIONS = (
    "--steps 6 --vocab-size 4096 --width 32 --row-size 64 --rows 4 --kilobytes 100"
)

pytestmark = pytest.mark.program


def test_both_losses_learn_the_same():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *OPTIONS.split()],
        env=os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = dict(re.findall(r"^(\S.*?)  +(\S+ +\S+)$", done.stdout, re.M))
    numbers = {name: np.array(row.split(), float) for name, row in table.items()}
    first, last = numbers["loss of the first step"], numbers["loss of the last step"]
    # Four digits are printed; Adam, which divides by what is nearly 0 at first,
    # makes more of roundings than a gradient step would.
    np.testing.assert_allclose(first[0], first[1], atol=2e-4)
    np.testing.assert_allclose(last[0], last[1], rtol=5e-3)
    assert last[0] < first[0]
    fused, plain = numbers["temporary memory, MiB"]
    assert fused < plain
    assert np.all(numbers["tokens that count a second"] > 0)
