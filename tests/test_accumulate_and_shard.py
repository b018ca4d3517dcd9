"""examples/accumulate_and_shard.py prints what its docstring says."""

import ast
import os
import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "accumulate_and_shard.py"


def test_the_example_prints_what_its_docstring_says():
    docstring = ast.get_docstring(ast.parse(EXAMPLE.read_text()))
    _, expected = docstring.split("It prints:\n\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # the example makes its own devices
    run = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == textwrap.dedent(expected) + "\n"
