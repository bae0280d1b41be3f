"""Runs send the log to files in folders that go away with the test; here they let go of them."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_log_of_earlier_runs() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if getattr(handler, "belongs_to_run", False):
            root.removeHandler(handler)
            handler.close()
