"""What a run tells the terminal: a bar with the time left, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from srpo_core.columns import is_detail
from srpo_core.metrics import StepMetrics
from srpo_core.time_words import duration_text

LINES_EVERY = 10
"""Fewest steps between plain lines; a long phase has about a hundred of them."""


class Display:
    """A run's voice. `quiet` silences it (ranks other than the main one).

    `on_phase(name, done, total)` hears of every change; total is 0 where nothing is counted.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.on_phase: Callable[[str, int, int], None] = lambda name, done, total: None
        self.console = console or Console(quiet=quiet, highlight=False, emoji=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._first = 0
        self._done = 0
        self._total = 0
        self._name = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line for the user."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line about something that went wrong and doesn't stop the run."""
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """From now on, count `total` things done, `done` of them before."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total, completed=done, text="")
        self._bar.start()
        self._began, self._first, self._done, self._total, self._name = time.monotonic(), done, done, total, name
        self.on_phase(name, done, total)
        if not self.console.is_terminal:
            self.say(f"{name}: {total - done} to do")

    def advance(self, done: int, text: str = "") -> None:
        """`done` of the phase's things are done by now; plain lines come at the first, the last and some between."""
        self._bar.update(self._task, completed=done, text=text)
        self._done = done
        self.on_phase(self._name, done, self._total)
        due = done in (self._first + 1, self._total) or done % max(LINES_EVERY, self._total // 100) == 0
        if not self.console.is_terminal and due:
            self.say(f"{done}/{self._total}  {text}  {self._time_left(done)}")

    @contextlib.contextmanager
    def during(self, name: str, total: int = 0) -> Iterator[Callable[[int], None]]:
        """A phase within another one, which goes on after it; the terminal isn't told. Gives a count of things done."""
        self.on_phase(name, 0, total)
        try:
            yield lambda done: self.on_phase(name, done, total)
        finally:
            if self._name:
                self.on_phase(self._name, self._done, self._total)

    def step(self, metrics: StepMetrics) -> None:
        """A training step is done."""
        scores = "  ".join(f"{branch} {score:+.3f}" for branch, score in metrics.score.items())
        drift = f"  drift {metrics.velocity_drift:.2%}" if metrics.velocity_drift is not None else ""
        self.advance(metrics.step, f"score: {scores}{drift}")

    def scores(self, title: str, scores: Mapping[str, float]) -> None:
        """Mean scores of a preview or an evaluation, without those of single words and of a mixture's parts."""
        told = {name: value for name, value in scores.items() if not is_detail(name)}
        self.say(f"{title}: " + "  ".join(f"{name} {value:+.4f}" for name, value in told.items()))

    def _time_left(self, done: int) -> str:
        per_step = (time.monotonic() - self._began) / max(1, done - self._first)
        left = per_step * (self._total - done)
        return f"{duration_text(per_step)} each, {duration_text(left)} left"
