"""The main job as a program: a short run from the command line, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_two_head.py"
REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "ribonanza_sample.csv"


def run(*options):
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_short_run_writes_its_figures_and_its_picture(tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    done = run("--steps", 12, "--json", figures, "--plot", picture)
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    assert set(report["test_mae"]) == {"both", "2A3", "DMS"}
    assert set(report["median_mae"]) == {"experiment", "experiment_and_base"}
    assert 1 <= report["compiles"] <= 3  # one for each bucket that came up
    weighted = list(report["evaluation"]["weighted"].values())
    # The size-weighted mean does not move with the batch size, to rounding of float32
    # sums and of a convolution in batches; the mean of means does.
    np.testing.assert_allclose(weighted, report["test_mae"]["both"], rtol=1e-5)
    of_means = list(report["evaluation"]["mean_of_means"].values())
    assert np.ptp(of_means) > 1e-3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mean_of_means_reports_the_wrong_way(tmp_path):
    figures = tmp_path / "figures.json"
    done = run("--steps", 1, "--mean-of-means", "--json", figures)
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    assert report["test_mae"]["both"] == report["evaluation"]["mean_of_means"]["64"]


def test_a_malformed_file_ends_with_one_line(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("sequence_id,sequence\nx,ACGU\n")
    done = run("--data", table)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(table) in done.stderr
    assert "column" in done.stderr


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real sample is not at hand")
def test_measured_profiles_weighted_by_their_errors(tmp_path):
    figures = tmp_path / "figures.json"
    done = run("--data", REAL_DATA, "--error-weights", "--steps", 2, "--json", figures)
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    # The data's README has 0.223, with another fifth of the sequences held back.
    assert abs(report["median_mae"]["experiment_and_base"] - 0.223) < 0.01
