"""Stopping a run: by a signal, once to finish the step and save, twice to abort; or by a file in its folder."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopRequested(Exception):
    """Raised where a run can stop without losing anything."""


class StopSignals:
    """While entered (in the main thread), SIGINT and SIGTERM set `requested`; a second one raises KeyboardInterrupt.

    `asked` says whether someone asked by other means than a signal.
    """

    def __init__(self, on_request: Callable[[], None], asked: Callable[[], bool] = lambda: False) -> None:
        self.requested = False
        self._on_request, self._asked = on_request, asked
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(RuntimeError):  # Python refuses to print in the middle of a print
            self._on_request()

    def check(self) -> None:
        """Raise StopRequested if a signal came, or if someone asked."""
        if not self.requested and self._asked():
            self.requested = True
            self._on_request()
        if self.requested:
            raise StopRequested
