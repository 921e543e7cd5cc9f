"""Stopping a run: by a signal, once to stop and save, twice to abort; or by a file in its folder."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

ASK_EVERY = 0.1
"""Seconds between looks at whether someone asked; a network's file system makes each of them slow."""


class StopRequested(BaseException):
    """Raised where a run can stop without losing more than the step it is in.

    Not an Exception: what survives errors of others' code, such as a preview, ends with the run all the same.
    """


class StopSignals:
    """While entered (in the main thread), SIGINT and SIGTERM set `requested`; a second one raises KeyboardInterrupt.

    `asked` says whether someone asked by other means than a signal; `on_request` is called once, when someone did.
    """

    def __init__(self, on_request: Callable[[], None], asked: Callable[[], bool] = lambda: False) -> None:
        self.requested = False
        self._on_request, self._asked = on_request, asked
        self._previous: dict[int, Any] = {}
        self._looked = -ASK_EVERY
        self._anywhere = False

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
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self._request()
        if self._anywhere:
            raise StopRequested

    def _request(self) -> None:
        self.requested = True
        with contextlib.suppress(RuntimeError, OSError):  # in the middle of a print, or to a terminal that has closed
            self._on_request()

    def check(self) -> None:
        """Raise StopRequested if a signal came, or if someone asked."""
        now = time.monotonic()
        if not self.requested and now - self._looked >= ASK_EVERY:
            self._looked = now
            if self._asked():
                self._request()
        if self.requested:
            raise StopRequested

    @contextlib.contextmanager
    def anywhere(self) -> Iterator[None]:
        """Inside the context a request raises StopRequested wherever the main thread stands, within about a second.

        For work that loses nothing then, such as loading. Elsewhere than in the main thread it only checks before and
        after.
        """
        self.check()
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        if self._previous:
            self._anywhere = True
            watcher.start()
        try:
            yield
        finally:
            self._anywhere = False
            done.set()
            if watcher.ident is not None:
                watcher.join()  # its signal must not come later, as a second one
        self.check()

    def _watch(self, done: threading.Event) -> None:
        """Turn the first request by other means into a signal to the main thread."""
        while not done.wait(ASK_EVERY):
            if self._asked():
                if not self.requested:
                    _signal_main()
                return


def _signal_main() -> None:
    """Have the main thread handle SIGTERM; a system call that it waits in ends where the system can do so."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    else:
        _thread.interrupt_main(signal.SIGTERM)
