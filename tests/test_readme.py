"""The README runs as printed: every block, in order, with the output that it shows."""

import contextlib
import io
import re
from pathlib import Path

from tests.tools import peers

README = Path(__file__).parents[1] / "README.md"


def blocks(text: str) -> list[tuple[str, str]]:
    """Every fenced block of ``text``, as (language, block)."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


def test_python_blocks_run_and_print_what_the_text_after_them_says():
    namespace: dict = {}
    fenced = blocks(README.read_text())
    compared = 0
    for (language, text), (following, expected) in zip(
        fenced, [*fenced[1:], ("", "")], strict=True
    ):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, str(README), "exec"), namespace)
        if following == "text" and f"{text}```\n\n```text" in README.read_text():
            assert printed.getvalue() == expected
            compared += 1
    assert compared >= 1


def test_a_new_user_sees_code_run_by_line_30():
    head = "\n".join(README.read_text().splitlines()[:30])
    assert "```python" in head
    assert "import wloss_jax as wl" in head


def test_relative_links_resolve():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text())
    for link in links:
        assert (README.parent / link).exists(), link


def test_the_table_has_what_other_packages_do(capsys):
    peers.main()
    rows = capsys.readouterr().out.splitlines()
    numbers = {row[:32].strip(): row[32:].split() for row in rows[1:]}
    assert numbers["wloss_jax"] == ["5.800", "5.800", "5.800,", "gradient", "finite"]
    assert numbers["optax"] == ["5.800", "13.000", "5.800,", "gradient", "NaN"]
    assert numbers["flax"] == ["5.800", "5.800", "nan,", "gradient", "NaN"]
