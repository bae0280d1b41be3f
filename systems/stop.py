"""Stopping a run between two steps, where everything that a checkpoint holds fits together."""

import signal
import threading
from typing import Any


class StopRequest:
    """Ctrl-C and a scheduler's SIGTERM, kept until the step under way is done; a second interrupts at once.

    Within the ``with`` block a first signal only sets :attr:`is_made`; behind it the old handlers are back.
    """

    _signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.is_made = False
        self._previous: list[Any] = []

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; elsewhere a run is stopped by whoever started the thread.
        if threading.current_thread() is threading.main_thread():
            self._previous = [signal.signal(number, self._receive) for number in self._signals]
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in zip(self._signals, self._previous, strict=False):
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.is_made:
            raise KeyboardInterrupt
        self.is_made = True
