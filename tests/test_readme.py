"""The README and the guides run as printed: every block, in order, and its output."""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path

import pytest

import wloss_jax as wl
from tests.tools import peers

README = Path(__file__).parents[1] / "README.md"
DOCUMENTS = [README, *sorted((README.parent / "examples").glob("*.md"))]
every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.name
)


def blocks(text: str) -> list[tuple[str, str]]:
    """Every fenced block of ``text``, as (language, block)."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.program
@every_document
def test_python_blocks_run_and_print_what_the_text_after_them_says(document):
    namespace: dict = {}
    text = document.read_text()
    fenced = blocks(text)
    for (language, block), (following, expected) in itertools.pairwise(
        [*fenced, ("", "")]
    ):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(document), "exec"), namespace)
        if following == "text" and f"{block}```\n\n```text" in text:
            assert printed.getvalue() == expected


def test_the_readme_fits_a_reader():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert "```text" in text


def test_a_new_user_sees_code_run_by_line_30():
    head = "\n".join(README.read_text().splitlines()[:30])
    assert "```python" in head
    assert "import wloss_jax as wl" in head


def test_some_document_mentions_every_public_name():
    words = set(re.findall(r"\w+", "".join(path.read_text() for path in DOCUMENTS)))
    names = {*wl.__all__, *wl.testing.__all__, "WeightedMeanMetric"}
    assert names - words == set()


@every_document
def test_relative_links_resolve(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    for link in links:
        assert (document.parent / link).exists(), link


def test_the_table_has_what_other_packages_do(capsys):
    peers.main()
    rows = capsys.readouterr().out.splitlines()
    numbers = {row[:32].strip(): row[32:].split() for row in rows[1:]}
    assert numbers["wloss_jax"] == ["5.800", "5.800", "5.800,", "gradient", "finite"]
    assert numbers["optax"] == ["5.800", "13.000", "5.800,", "gradient", "NaN"]
    assert numbers["flax"] == ["5.800", "5.800", "nan,", "gradient", "NaN"]


@pytest.mark.program
def test_the_notebook_prints_what_it_shows():
    notebook = json.loads((README.parent / "examples" / "tour.ipynb").read_text())
    namespace: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            for link in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
                assert (README.parent / "examples" / link).exists(), link
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), namespace)
        shown = "".join(text for output in cell["outputs"] for text in output["text"])
        assert printed.getvalue() == shown
