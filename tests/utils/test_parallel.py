"""Items in threads: order, errors, the progress bar."""

import threading
import time

import pytest

from utils.parallel import map_in_threads


def test_results_keep_the_items_order() -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0.0)
        return item * item

    assert map_in_threads(slow_at_first, range(30), "squares") == [item * item for item in range(30)]
    assert map_in_threads(slow_at_first, [], "nothing") == []


def test_an_error_drops_what_is_still_waiting() -> None:
    started: list[int] = []
    lock = threading.Lock()

    def fail_at_once(item: int) -> int:
        with lock:
            started.append(item)
        time.sleep(0.005)
        if item == 0:
            raise ValueError("item 0")
        return item

    with pytest.raises(ValueError, match="item 0"):
        map_in_threads(fail_at_once, range(500), "items")
    assert len(started) < 100


@pytest.mark.parametrize(("number", "is_shown"), [(20, False), (21, True)])
def test_progress_bar_from_21_items_on(
    capsys: pytest.CaptureFixture[str], number: int, is_shown: bool
) -> None:
    map_in_threads(str, range(number), "title")
    assert ("title" in capsys.readouterr().err) == is_shown
