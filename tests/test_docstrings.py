"""Every public name says what it does, in one order, with an example."""

import inspect
import re

import pytest

import wloss_jax as wl
from tests import test_losses

pytestmark = pytest.mark.core

ORDER = ["Args", "Returns", "Attributes", "Raises", "Example", "Source"]
SHARED = {"where", "lengths", "weights", "segment_ids", "num_segments"}


def public_names():
    """Every public function and class by its name, those of public modules too."""
    for name in wl.__all__:
        value = getattr(wl, name)
        if not inspect.ismodule(value):
            yield name, value
            continue
        for inner, part in vars(value).items():
            if inner[0] != "_" and getattr(part, "__module__", "").startswith(
                value.__name__
            ):
                yield f"{name}.{inner}", part


PUBLIC = {
    name: value
    for name, value in public_names()
    if inspect.isclass(value) or inspect.isroutine(value) or hasattr(value, "lower")
}
every_name = pytest.mark.parametrize("name", PUBLIC)


def sections(name):
    """The docstring's sections by heading; what is before them under ''."""
    parts = re.split(r"^(\w+):\s", inspect.getdoc(PUBLIC[name]), flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def test_the_table_has_functions_classes_and_both_modules():
    assert {"pad_ragged", "WeightedMean", "huber_loss"} <= set(PUBLIC)
    assert {"nnx.value_and_grad", "testing.assert_valid_batch"} <= set(PUBLIC)


@every_name
def test_the_first_line_is_a_sentence_that_begins_with_a_verb(name):
    methods = vars(PUBLIC[name]) if inspect.isclass(PUBLIC[name]) else {}
    for value in (PUBLIC[name], *(m for k, m in methods.items() if k[0] != "_")):
        if callable(value) or isinstance(value, classmethod):
            first, *rest = inspect.getdoc(value).splitlines()
            assert re.match(r"[A-Z]\w*s\b.*\.$", first), first
            assert not rest or not rest[0]


@every_name
def test_sections_stand_in_one_order_and_the_example_runs(name):
    found = sections(name)
    headings = [heading for heading in found if heading]
    assert headings == sorted(headings, key=ORDER.index)
    assert ">>> import wloss_jax as wl" in found["Example"]


@every_name
def test_every_argument_is_documented(name):
    if inspect.isclass(PUBLIC[name]):
        return  # their attributes say it
    documented = set(re.findall(r"^  \*{0,2}(\w+):", sections(name)["Args"], re.M))
    if "reduction" in documented:  # stands for the keywords of `weighted_mean`
        documented = documented - {"reduction"} | SHARED
    assert documented == set(inspect.signature(PUBLIC[name]).parameters)


@pytest.mark.parametrize("loss", test_losses.PUBLIC, ids=lambda loss: loss.__name__)
def test_every_loss_has_its_formula_first(loss):
    assert inspect.getdoc(loss).split("\n\n")[1].startswith("``")
