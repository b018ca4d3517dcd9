"""The typed client program runs; that its types hold, mypy says (see pyproject)."""

import pytest

from tests.tools import typed_client


@pytest.mark.core
def test_the_typed_client_runs():
    typed_client.main()
