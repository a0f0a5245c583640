"""One flag per process: were we asked to stop? SIGTERM and Ctrl-C set it, a run looks at it after each logged step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_stop = threading.Event()


def stop_requested() -> bool:
    return _stop.is_set()


def request_stop(*_: object) -> None:
    """As if SIGTERM had arrived; also fits as a signal handler."""
    _stop.set()


class StopSignals:
    """While installed, the first SIGTERM or SIGINT sets the flag and the second acts as if we were not here.

    Does nothing outside the main thread, where Python allows no handlers, and leaves handlers of others alone.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            current = signal.getsignal(number)
            if current in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = current
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        _stop.set()
        signal.signal(number, self._previous[number])

    def remove(self) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        _stop.clear()
