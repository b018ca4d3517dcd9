"""The main job as a program: a short run from the command line, and its errors."""

import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_two_head.py"
REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "ribonanza_sample.csv"

pytestmark = pytest.mark.program


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """What the runs here compile is the same, and half of their time."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("compiled")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def command(*options):
    return [sys.executable, str(EXAMPLE), *map(str, options)]


def run(*options):
    return subprocess.run(
        command(*options), capture_output=True, text=True, timeout=600
    )


def run_until(step, stop, *options):
    """Starts a run, and sends it the signal ``stop`` once it has done ``step``."""
    progress = b""
    with subprocess.Popen(
        command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while max(steps_done(progress), default=0) < step:
            byte = process.stderr.read(1)
            assert byte, progress.decode()
            progress += byte
        process.send_signal(stop)
        output, errors = process.communicate(timeout=600)
    return process.returncode, output.decode(), progress + errors


def steps_done(progress):
    """The steps that a progress bar has shown, in order."""
    return [int(step) for step in re.findall(rb" (\d+)/\d+ ", progress)]


SHORT = ["--steps", 30, "--batch-size", 8]  # so saved at every third step


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """What a run writes that nothing stops: its figures and its picture."""
    directory = tmp_path_factory.mktemp("short")
    figures, picture = directory / "figures.json", directory / "picture.png"
    done = run(*SHORT, "--json", figures, "--plot", picture)
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text()), picture


def test_a_short_run_writes_its_figures_and_its_picture(short_run):
    report, picture = short_run
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


def test_a_run_that_was_stopped_and_killed_ends_like_one_that_was_not(
    short_run, tmp_path
):
    figures = tmp_path / "figures.json"
    saved = [*SHORT, "--checkpoint", tmp_path / "run", "--json", figures]
    step = random.randint(3, 9)
    code, output, errors = run_until(step, signal.SIGINT, *saved)
    assert code == 130, errors
    (stopped,) = re.findall(r"stopped after step (\d+) of 30, saved in", output)
    assert int(stopped) >= step

    code, _, errors = run_until(int(stopped) + 8, signal.SIGKILL, *saved)
    assert code == -signal.SIGKILL
    assert steps_done(errors)[0] == int(stopped)

    other = run(*saved, "--seed", 1)
    assert other.returncode == 1
    assert other.stderr.endswith("a run with other options: seed=0\n")

    resumed = run(*saved)
    assert resumed.returncode == 0, resumed.stderr
    assert steps_done(resumed.stderr.encode())[0] > int(stopped)
    expected, got = short_run[0], json.loads(figures.read_text())
    for name in ("test_mae", "median_mae", "evaluation"):
        assert got[name] == expected[name]  # to the last digit


def test_ctrl_c_without_a_checkpoint_says_that_nothing_is_saved():
    code, output, errors = run_until(1, signal.SIGINT, "--steps", 50)
    assert code == 130, errors
    assert "not saved" in output
    assert b"Traceback" not in errors
