"""Each short example prints what its docstring says."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.program
@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        "choose_your_mean",
        "check_your_own_loss",
        "accumulate_and_shard",
        "any_loss",
    ],
)
def test_the_example_prints_what_its_docstring_says(name):
    example = ROOT / "examples" / f"{name}.py"
    docstring = ast.get_docstring(ast.parse(example.read_text()))
    _, expected = docstring.split(":\n\n    ", maxsplit=1)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # one device, or those that the example makes
    run = subprocess.run(
        [sys.executable, "-W", "error", example],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.rstrip() == textwrap.dedent("    " + expected)


@pytest.mark.program
def test_the_pictures_are_drawn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import draw_pictures  # its main trains for a minute

    monkeypatch.setattr(draw_pictures, "FOLDER", tmp_path)
    monkeypatch.setattr(draw_pictures, "evaluate", lambda: ([0.2] * 8, [0.3] * 8))
    draw_pictures.main()
    drawn = sorted(path.name for path in tmp_path.iterdir())
    checked_in = ROOT / "examples" / "pictures"
    assert drawn == ["combine.svg", "evaluation.svg", "flow.svg"]
    assert all((checked_in / name).is_file() for name in drawn)


def test_the_main_example_is_short_enough_to_copy_from():
    example = (ROOT / "examples" / "train_two_head.py").read_text()
    assert len(example.splitlines()) <= 250
