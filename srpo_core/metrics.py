"""What a run records: a JSON line a step in metrics.jsonl, TensorBoard beside it, seconds and memory."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from srpo_core.config import ConfigError, flat
from srpo_core.files import write_atomic
from srpo_core.keeping import CudaMemory


@dataclass
class StepMetrics:
    """One optimizer step; 0 is the base. `score` and `reward` (the preferred wording's own) are means per branch."""

    step: int
    loss: float | None = None
    score: dict[str, float] = field(default_factory=dict)
    reward: dict[str, float] = field(default_factory=dict)
    liked: str | None = None
    disliked: str | None = None
    grad_norm: float | None = None
    """Before clipping."""
    lr: float | None = None
    velocity_drift: float | None = None
    """Relative RMS change of the velocity against the base weights, on a fixed probe."""
    sigma: float | None = None
    """Mean level of the gradient steps."""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gib: float | None = None
    preview: dict[str, float] = field(default_factory=dict)
    """Means over the preview prompts, on steps that drew them."""
    source: dict[str, int] = field(default_factory=dict)
    """Prompts that were rolled out ("rollouts") and photos trained on ("photos") in their place."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Where several rewards are mixed: each one's own `score`, by its name and branch."""
    rewards: dict[str, dict[str, float]] = field(default_factory=dict)
    """Where several rewards are mixed: each one's own `reward`, in its own range, by its name and branch."""

    def line(self) -> dict[str, Any]:
        """As written to metrics.jsonl: what is unset is left out, numbers that aren't finite are null."""
        return {key: _finite(value) for key, value in asdict(self).items() if value not in (None, {})}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def over_processes(parts: Sequence[Any]) -> Any:
    """What each process measured, as one: means of floats, sums of counts, in dicts of the same keys (or fewer)."""
    if isinstance(parts[0], dict):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: over_processes([part[key] for part in parts if key in part]) for key in keys}
    return sum(parts) if isinstance(parts[0], int) else sum(parts) / len(parts)


class Clock:
    """Seconds spent in named phases, which may nest and repeat.

    On a CUDA `device` its own clock is read, so that nothing waits before `seconds` are asked for; elsewhere
    `synchronize` waits for the device at the end of each phase.
    """

    def __init__(self, synchronize: Callable[[], None], device: torch.device | None = None) -> None:
        self._device, self._by_events = device, device is not None and device.type == "cuda"
        self._synchronize = synchronize
        self._spans: list[tuple[str, Any, Any]] = []
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the context's time to a phase."""
        start = self._now()
        try:
            yield
        finally:
            if not self._by_events:
                self._synchronize()
            self._spans.append((name, start, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, as far as these have ended; waits for the device."""
        if self._by_events and self._spans:
            self._synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            spent = start.elapsed_time(end) / 1e3 if self._by_events else end - start
            seconds[name] = seconds.get(name, 0.0) + spent
        return seconds

    def _now(self) -> Any:
        """A moment: a number, or an event that the device will note the time of."""
        if not self._by_events:
            return time.perf_counter()
        moment = torch.cuda.Event(enable_timing=True)
        moment.record(torch.cuda.current_stream(self._device))
        return moment

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started


def peak_memory_gib(device: torch.device) -> float | None:
    """The most memory that the process held so far: on its CUDA device, else resident; None on Windows without CUDA."""
    if device.type == "cuda":
        return CudaMemory(device).peak() / 2**30
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def metrics_file(run_dir: Path | str) -> Path:
    """Where a run's lines lie."""
    return Path(run_dir) / "metrics.jsonl"


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The run's lines so far, by step; those that can't be read are left out. Empty if there is no file yet."""
    return parse_metrics(run_dir)[0]


def parse_metrics(run_dir: Path | str) -> tuple[list[dict[str, Any]], int]:
    """(lines in order of step, how many are damaged). A step that stands twice counts as its later line.

    A last line that a killed run left torn, or that is being written, is no damage.
    """
    path = metrics_file(run_dir)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    steps: dict[int, dict[str, Any]] = {}
    damaged = 0
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            steps[int(line["step"])] = line
        except (ValueError, KeyError, TypeError):
            damaged += number < len(lines)
    return [steps[step] for step in sorted(steps)], damaged


class MetricsLog:
    """Writes a run's lines and its TensorBoard events from step `after` on; later ones are dropped first.

    `last` is the line of step `after` as its checkpoint knows it, for a run that was killed before it wrote the line.
    """

    def __init__(
        self, run_dir: Path | str, after: int = -1, last: Mapping[str, Any] | None = None, tensorboard: bool = False
    ) -> None:
        kept = [record for record in read_metrics(run_dir) if record["step"] <= after]
        if last and (not kept or kept[-1]["step"] != after):
            kept.append(dict(last))
        write_atomic(metrics_file(run_dir), "".join(f"{json.dumps(record)}\n" for record in kept))
        self._file = metrics_file(run_dir).open("a", encoding="utf-8")
        self._newest = kept[-1]["step"] if kept else -1
        self._writer = _tensorboard_writer(Path(run_dir) / "tensorboard", after + 1) if tensorboard else None

    def write(self, metrics: StepMetrics) -> None:
        """Append a step."""
        line = metrics.line()
        self._newest = metrics.step
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in flat(line, "/"):
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, metrics.step)
            self._writer.flush()

    def write_missing(self, metrics: StepMetrics) -> None:
        """Append a step that was done and whose line isn't there yet."""
        if metrics.step > max(0, self._newest):
            self.write(metrics)

    def picture(self, step: int, image: Image.Image) -> None:
        """Show a preview in TensorBoard."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image("preview", np.array(image), step, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoLog(MetricsLog):
    """That of a process whose run another one records."""

    def __init__(self) -> None:
        pass

    def write(self, metrics: StepMetrics) -> None:
        """Nothing."""

    def write_missing(self, metrics: StepMetrics) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _tensorboard_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"output.tensorboard=true needs the package tensorboard ({error}); or set it to false"
        ) from error
    return SummaryWriter(str(folder), purge_step=first_step)
