"""The fuzzer of combined losses runs, and finds what it is there to find."""

import jax.numpy as jnp
import pytest

from tests.tools import fuzz_combine
from wloss_jax import _rows

pytestmark = pytest.mark.program


def test_sixteen_cases_are_the_oracles(capsys):
    failed = fuzz_combine.main(["--cases", "16", "--seed", "3"])
    output = capsys.readouterr().out
    assert not failed, output
    assert output.splitlines() == ["seed 3", "16 cases, 0 failed"]


@pytest.fixture
def planted(monkeypatch):
    """Rows of one microbatch after those of another, not in the order of the batch."""
    put_together = _rows.Cut.put_together

    def one_after_another(cut, groups, axis):
        if axis is None:
            return put_together(cut, groups, axis)
        return jnp.concatenate([rows for group in groups for rows in group], axis)

    monkeypatch.setattr(_rows.Cut, "put_together", one_after_another)
    fuzz_combine.program_of.cache_clear()
    yield
    fuzz_combine.program_of.cache_clear()


def test_a_planted_fault_is_found_and_printed_with_a_line_that_repeats_it(
    planted, capsys
):
    assert fuzz_combine.main(["--cases", "1", "--seed", "2"])
    output = capsys.readouterr().out
    assert "python -m tests.tools.fuzz_combine --seed 2 --case 0" in output
    assert "supervised contrastive" in output
