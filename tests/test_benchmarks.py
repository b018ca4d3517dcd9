"""The benchmarks run, their contestants agree, and the compilers' gates hold."""

import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import compiled, picture, report, timing, two_heads
from tests.benchmarks.timing import OURS

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(module, *arguments):
    """Runs a command of the benchmarks in a process of its own."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


# --------------------------------------------------------------------- contestants


@pytest.fixture(autouse=True)
def in_32_bits():
    """What is timed; in x64 some contestants, optax's sparsemax too, do not run."""
    with jax.enable_x64(False):
        yield


# What these are named for is that they compute another number.
ANOTHER = "which averages"

# Rows that run nothing. What `trace_time` traces are the contestants of `losses`.
WITHOUT_NUMBERS = ("compiles", "import_time", "trace_time")


def quick_cases():
    for row in command.ROWS:
        cases = importlib.import_module(f"tests.benchmarks.{row}").cases(quick=True)
        for name, make in cases.items():
            if row not in WITHOUT_NUMBERS and "memory" not in name:
                yield pytest.param(make, id=f"{row}: {name}")


@pytest.mark.program
@pytest.mark.parametrize("make", list(quick_cases()))
def test_contestants_agree(make, request):
    """A race between different numbers would mean nothing."""
    results = {
        name: first_leaf(function())
        for name, function in make().contestants.items()
        if callable(function) and ANOTHER not in name
    }
    assert len(results) > 1
    # Contestants in bfloat16 have 8 bits to the end.
    rtol = 2e-2 if "bfloat16" in request.node.name else 2e-5
    for name, value in results.items():
        np.testing.assert_allclose(value, results[OURS], rtol=rtol, err_msg=name)


def first_leaf(result):
    leaf = jax.tree.leaves(result)[0]
    return np.asarray(leaf.detach() if hasattr(leaf, "detach") else leaf, np.float64)


@pytest.mark.program
def test_gradients_of_the_two_head_contestants_agree():
    contestants = two_heads.cases(quick=True)["MAE 8x32"]().contestants
    _, desired = contestants[OURS]()
    for name, function in contestants.items():
        if callable(function):
            for actual, one in zip(function()[1], desired, strict=True):
                np.testing.assert_allclose(actual, one, rtol=1e-5, err_msg=name)


# ------------------------------------------------------------------------- the race


class Clock:
    """A clock that only contestants move."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def contestant(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: clock.now)
    return clock


def test_contestants_take_turns(clock):
    runners = {name: clock.contestant(name, n) for n, name in enumerate("abc", 1)}
    times = timing.race(runners, rounds=3)
    assert "".join(clock.calls) == "aabbcc" + "abc" + "bca" + "cab"
    np.testing.assert_allclose(times["c"], [3, 3, 3])
    assert timing.ratio(times["c"], times["b"]) == pytest.approx(1.5)


def test_a_slow_contestant_rests_after_three_rounds(clock):
    runners = {"fast": clock.contestant("f", 1), "slow": clock.contestant("s", 50)}
    times = timing.race(runners, rounds=5, seconds=60)
    assert np.isnan(times["slow"]).tolist() == [False] * 3 + [True] * 2
    assert not np.isnan(times["fast"]).any()
    assert timing.ratio(times["slow"], times["fast"]) == pytest.approx(50)


def test_queued_calls_are_timed_together(clock):
    times = timing.race({"a": clock.contestant("a", 2)}, rounds=2, shortest=7)
    assert clock.calls == ["a"] * (2 + 2 * 4)
    np.testing.assert_allclose(times["a"], [2, 2])


# ------------------------------------------------------------------------ the table


def test_a_peer_that_is_not_installed_is_named_as_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    case = two_heads.cases(quick=True)["MAE 8x32"]()
    times = {name: np.ones(3) for name, f in case.contestants.items() if callable(f)}
    result = report.timed(case, times | {case.limit_name: np.full(3, 0.1)})
    text = report.table("A title", {"a case": result})
    head, _, line = text.splitlines()[2:]
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["PyTorch, vectorised"] == "not installed"
    assert cells[OURS] == "1,000"
    assert cells["jnp by hand"] == "1,000 (1.00x)"
    assert cells[f"limit: {case.limit_name} |"] == "250 (25%) |"


@pytest.mark.program
def test_quick_mode_prints_saves_and_draws(tmp_path):
    rows = ("two_heads", "compiles", "pad_ragged")
    files = tmp_path / "figures.json", tmp_path / "figure.png"
    out = run(
        "tests.benchmarks", *rows, "--quick", "--json", files[0], "--plot", files[1]
    )
    figures = json.loads(files[0].read_text())
    assert list(figures["rows"]) == list(rows)
    assert figures["about"]["jax"] == jax.__version__
    for row in rows:
        title = importlib.import_module(f"tests.benchmarks.{row}").TITLE
        assert f"### {title}" in out
        for one in figures["rows"][row].values():
            assert one["values"][OURS] > 0
            assert one["ratios"][OURS] == 1
            assert one["limit"]["value"] > 0
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_of_the_figures_that_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "picture.svg")
    picture.main()
    figures = json.loads((picture.HERE / "h100.json").read_text())
    case = figures["rows"]["linear_cross_entropy"][f"{picture.SIZES}, 35% valid"]
    drawn = picture.PICTURE.read_text()
    assert f"<!-- {case['values'][OURS]:.0f} -->" in drawn
    for value in figures["temporary_gib"].values():
        assert f"<!-- {value:.1f} -->" in drawn
    # The one that readers see has the same words: nothing that is not known.
    words = re.compile("<!-- (.*) -->")
    checked_in = ROOT / "examples" / "pictures" / "linear_cross_entropy.svg"
    assert words.findall(drawn) == words.findall(checked_in.read_text())


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["two_headed"])
    assert "no such row: two_headed" in capsys.readouterr().err


# ---------------------------------------------------------------- the compilers' gates

# Beside the repository where the developers keep it, and nowhere else.
H100 = ROOT.parent / "shared" / "data" / "h100_sxm.txtpb"
TWO_HEADS = [f"two heads, {name}" for name in two_heads.LOSSES]
MISSING = "two heads, MAE, targets missing"
ELEMENTWISE = ["absolute_error", "gaussian_nll", "sigmoid_binary_cross_entropy"]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    if importlib.util.find_spec("libtpu") is None and not has_cuda():
        pytest.skip("needs libtpu or the CUDA plugin, which compile without a device")
    file = tmp_path_factory.mktemp("compiled") / "figures.json"
    config = ["--target-config", H100] if has_cuda() else []
    names = [*TWO_HEADS, MISSING, *ELEMENTWISE]
    run("tests.benchmarks.compiled", *names, *config, "--no-pods", "--json", file)
    return json.loads(file.read_text())


def has_cuda():
    return H100.exists() and importlib.util.find_spec("jax_cuda13_plugin") is not None


def measured(figures, program, target):
    if target not in figures[program]:
        pytest.skip(f"nothing here compiles for {target}")
    return figures[program][target]


@pytest.mark.program
@pytest.mark.parametrize("program", TWO_HEADS + ELEMENTWISE)
def test_a_loss_and_its_gradient_are_one_kernel_on_h100(figures, program):
    one = measured(figures, program, "H100")
    assert one["kernels"] == 1
    assert one["bytes"] < one["fewest"] + 0.1  # sums of blocks and of lengths


@pytest.mark.program
def test_missing_targets_are_counted_in_a_kernel_of_their_own_on_h100(figures):
    """The gradient's scale is their number, so that they are read twice."""
    one = measured(figures, MISSING, "H100")
    assert (one["kernels"], one["bytes"] < 26.1) == (2, True)


@pytest.mark.program
@pytest.mark.parametrize("target", compiled.TPUS)
@pytest.mark.parametrize("program", [*TWO_HEADS, MISSING])
def test_two_heads_take_30_bytes_an_element_on_tpu(figures, program, target):
    assert measured(figures, program, target)["bytes"] < 30.1


@pytest.mark.program
def test_the_linear_cross_entropy_takes_less_than_2_gib_on_h100():
    """Of 32768 tokens, 2560 features and 128256 classes: 31 with logits."""
    if not has_cuda():
        pytest.skip("needs the CUDA plugin, which compiles without a device")
    sizes = ["--linear", "--no-pods", "--target-config", H100]
    line = run("tests.benchmarks.compiled", *sizes)
    assert float(re.search(r"H100, .*?wloss_jax ([\d.]+)", line)[1]) < 2


def test_the_bytes_of_a_program_are_counted():
    text = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[4,8], y: bf16[4,8]) -> (f32[], pred[4,8]) {
  %x = f32[4,8]{1,0} parameter(0)
  %y = bf16[4,8]{1,0} parameter(1)
  %start = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]) copy-start(%x)
  %done = f32[4,8]{1,0} copy-done(%start)
  %both = (f32[], pred[4,8]{1,0}) fusion(%done, %y), kind=kLoop, metadata={a="%x"}
  %total = f32[] get-tuple-element(%both), index=0
  ROOT %out = (f32[], pred[4,8]{1,0}) tuple(%total, %both)
}
"""
    assert compiled.kernels(text) == {"both": 32 * 4 + 32 * 2 + 4 + 32}
