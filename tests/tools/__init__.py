"""Programs beside the tests, each run as ``python -m tests.tools.NAME``."""
