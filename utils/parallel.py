"""One function over many files in a few threads, which is how pictures are read and written."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")

_FEW = 20


def map_in_threads(function: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """Run ``function`` on all items in up to four threads, with a progress bar from 21 items on.

    Threads are enough where the work is decoding or encoding: the codecs release the interpreter lock.

    Args:
        function: called once per item; the first exception in the order of the items is raised again.
        items: what to work on.
        title: of the progress bar.

    Returns:
        One result per item, in their order.
    """
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    try:
        results = pool.map(function, items)
        is_short = len(items) <= _FEW
        return list(tqdm(results, total=len(items), desc=title, unit="file", leave=False, disable=is_short))
    finally:
        # After an error or Ctrl-C the items still waiting are dropped instead of worked off.
        pool.shutdown(cancel_futures=True)
