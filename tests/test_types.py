"""The typed client program runs; that its types hold, mypy says (see pyproject)."""

from tests.tools import typed_client


def test_the_typed_client_runs():
    typed_client.main()
