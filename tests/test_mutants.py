"""The list of faults does not rot; running it is `python -m tests.tools.mutants`."""

import pathlib
import re

import pytest

import wloss_jax
from tests.tools import mutants

pytestmark = pytest.mark.core


@pytest.mark.parametrize("fault", mutants.FAULTS, ids=lambda fault: fault.name)
def test_the_text_of_each_fault_occurs_once_and_its_tests_exist(fault):
    package = pathlib.Path(wloss_jax.__file__).parent
    assert mutants.occurrences(fault, package).get(fault.module) == 1
    assert fault.new != fault.old
    # A word of it is of a test's name; of parameters' names, running it tells.
    text = pathlib.Path(__file__).with_name(f"{fault.test_file}.py").read_text()
    words = set(re.findall(r"\w+", fault.tests)) - {"and", "or", "not"}
    assert any(re.search(rf"def \w*{word}", text) for word in words)


def test_a_fault_that_does_not_fit_is_told(tmp_path):
    fault = next(fault for fault in mutants.FAULTS if fault.module == "masks")
    (tmp_path / "masks.py").write_text("nothing of it")
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "_masked.py").write_text(2 * fault.old)
    with pytest.raises(ValueError, match=r"once in 'masks', .* {'losses/_masked': 2}"):
        mutants.apply(fault, tmp_path)


def test_names_are_told_apart():
    assert len({fault.name for fault in mutants.FAULTS}) == len(mutants.FAULTS) > 20
