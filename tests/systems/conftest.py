"""Runs send the log to files in folders that go away with the test; here they let go of them."""

import logging
from collections.abc import Iterator

import pytest

from systems.record import release_log


@pytest.fixture(autouse=True)
def _no_log_of_earlier_runs() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    release_log()
