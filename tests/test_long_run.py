"""A long run compiles nothing new, and what it holds does not grow."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.program
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_steps_on_ragged_batches_leave_nothing_behind():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.long_run", "--steps", "1000"],
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = np.array([line.split() for line in done.stdout.splitlines()[1:]], float)
    step, compiled, arrays, resident = rows.T
    assert step.tolist() == list(range(100, 1001, 100))
    assert compiled[0] > 3  # the training step for each of three lengths, and more
    np.testing.assert_array_equal(compiled, compiled[0])
    np.testing.assert_array_equal(arrays, arrays[0])
    # The allocator's; a batch kept at each step would come to 7 MiB or more.
    assert resident[-1] - resident[1] < 4
