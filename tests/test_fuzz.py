"""The fuzzer runs, and what it is there to find, it finds and prints."""

import jax.numpy as jnp
import pytest

import wloss_jax as wl
from tests.tools import fuzz

pytestmark = pytest.mark.program


def test_thirty_cases_are_the_oracles(capsys):
    failed = fuzz.main(["--cases", "30", "--seed", "7"])
    output = capsys.readouterr().out
    assert not failed, output
    assert output.splitlines() == ["seed 7", "30 cases, 0 failed"]


def test_a_seed_is_drawn_and_printed(capsys):
    assert not fuzz.main(["--cases", "0"])
    assert capsys.readouterr().out.startswith("seed ")


@pytest.fixture
def planted(monkeypatch):
    """A denominator that is 1 at least; nothing of it may be left compiled."""
    monkeypatch.setattr(
        wl.WeightedMean,
        "compute",
        lambda self, empty=0.0: self.total / jnp.maximum(self.weight, 1),
    )
    fuzz.program_of.cache_clear()
    yield
    fuzz.program_of.cache_clear()


def test_a_planted_fault_is_found_and_printed_with_lines_that_repeat_it(
    planted, capsys
):
    assert fuzz.main(["--cases", "24", "--seed", "7"])
    output = capsys.readouterr().out
    failed = int(output.splitlines()[-1].split()[2])
    assert output.count("FAILED: case") == failed > 0
    number = int(output.split("--seed 7 --case ")[1].split()[0])
    found, program, data = fuzz.run_case(7, number)
    assert "by the oracle" in found[0]
    assert fuzz.report(7, number, found, program, data) in output
