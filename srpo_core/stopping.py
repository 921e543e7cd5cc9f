"""Stopping a run by signal: once to finish the step and save, twice to abort."""

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
    """While entered (in the main thread), SIGINT and SIGTERM set `requested`; a second one raises KeyboardInterrupt."""

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested = False
        self._on_request = on_request
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
        """Raise StopRequested if a signal came."""
        if self.requested:
            raise StopRequested
