"""SRPO Train in a ComfyUI that has drawn with the same model: seconds, memory of both processes, Cancel, the result."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from bench_comfyui_memory import DeviceMemory
from bench_comfyui_run import Bench, Graph, Row, changed, nodes_of, reseeded
from comfyui_server import Result
from comfyui_training import end_trainings

from srpo_core.checkpoint import latest
from srpo_core.metrics import read_metrics
from srpo_core.run_state import RunState, is_alive, log_tail, read_state

LOOK_EVERY = 0.1
MOST_STEPS = 3
"""Steps whose beginning is told."""
MOMENT_LIMIT = 380.0
"""Seconds in which a run that is to be cancelled comes to its moment."""
SHORT = {
    "optim.accumulation": 1, "optim.lr": 1e-3, "optim.schedule": "constant", "output.preview_prompts": 1,
    "output.preview_steps": 4,
}  # fmt: skip
"""At full size: steps of one picture each, and a learning rate with which two of them show in a picture."""
LONG = SHORT | {"optim.accumulation": 12, "rollout.num_steps": 5}
"""At full size: a step of many pictures, as the recipes have it, which are drawn quickly."""


@dataclass(frozen=True)
class Size:
    """What is trained: a workflow's name ending, its widgets, and settings of the run that ends and the cancelled one.

    `moment`: the second run is cancelled that many steps and seconds into its training.
    """

    draw: str
    train: str
    widgets: Mapping[str, Any]
    short: Mapping[str, Any]
    long: Mapping[str, Any]
    moment: tuple[int, float]


SIZES = {
    True: Size("SRPO-workflow", "train_lora", {"recipe": "flux-dev-lora-24gb", "steps": 2}, SHORT, LONG, (1, 5.0)),
    False: Size("SRPO-workflow-miniature", "train_miniature", {}, {}, {}, (3, 0.0)),
}


@dataclass
class Seen:
    """What was seen of a run: when each phase and step began, and the memory of ComfyUI and of the trainer in each."""

    began: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)

    def note(self, state: RunState | None, seconds: float, taken: Mapping[str, float]) -> None:
        phase, step = _phase(state)
        if step <= MOST_STEPS:
            self.began.setdefault(f"{phase} {step}" if step else phase, round(seconds, 2))
        for name, gib in taken.items():
            peaks = self.memory.setdefault(phase, {})
            peaks[name] = max(peaks.get(name, 0.0), gib)


class Follower:
    """Looks at a run's folder and at the GPU in a thread of its own, from its entering on."""

    def __init__(self, folder: Path, server_pid: int, memory: DeviceMemory) -> None:
        self.folder, self.server_pid, self.memory, self.seen = folder, server_pid, memory, Seen()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Seen:
        self._begin = time.perf_counter()
        self._thread.start()
        return self.seen

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(10)

    def _look(self) -> None:
        while not self._end.wait(LOOK_EVERY):
            state = read_state(self.folder)
            by_process, used = self.memory.by_process(), self.memory.used()
            taken = {"all": used} if used is not None else {}
            if self.server_pid in by_process:
                taken["ComfyUI"] = by_process[self.server_pid]
            if state is not None and state.pid in by_process:
                taken["training"] = by_process[state.pid]
            self.seen.note(state, time.perf_counter() - self._begin, taken)


def _phase(state: RunState | None) -> tuple[str, int]:
    """What a run does just now, and at which step it is, or 0."""
    if state is None:
        return "before the run", 0
    if not state.active:
        return f"{state.status}, its process is {'still' if is_alive(state) else 'no longer'} there", 0
    return ("step", state.step + 1) if state.phase == "training" else (state.phase or state.status, 0)


def training(bench: Bench, full: bool) -> None:
    """Draw, train, draw with the result's file, and cancel a second training."""
    size, name = SIZES[full], f"bench-{os.getpid()}"
    drawn = reseeded(bench.graph(size.draw))
    try:
        bench.run("a picture, before training", drawn)
        graph = _named(bench.graph(size.train), name, size.widgets, size.short)
        _trained(bench, graph, name)
        bench.run("the same graph again: the run is there", graph)
        _drawn_with(bench, drawn, f"{name}.safetensors")
        _cancelled(bench, _named(graph, f"{name}-cancelled", {"steps": 400}, size.long), size.moment)
    finally:
        end_trainings(bench.base)


def _named(graph: Graph, name: str, widgets: Mapping[str, Any], settings: Mapping[str, Any]) -> Graph:
    """A graph's training under a name, with other widgets and more settings; what is drawn after it is one picture."""
    graph = changed(with_settings(graph, settings), "SRPOTrain", name=name, **widgets)
    return changed(changed(graph, "EmptySD3LatentImage", batch_size=1), "SRPOCompare", steps=20)


def with_settings(graph: Graph, settings: Mapping[str, Any]) -> Graph:
    """A graph's training with more settings, below those it has."""
    (train,) = nodes_of(graph, "SRPOTrain")
    lines = [graph[train]["inputs"]["more_settings"], *(f"{key}={value}" for key, value in settings.items())]
    return changed(graph, "SRPOTrain", more_settings="\n".join(lines))


def _folder(bench: Bench, graph: Graph) -> Path:
    (train,) = nodes_of(graph, "SRPOTrain")
    return bench.base / "output" / "srpo" / graph[train]["inputs"]["name"]


def _trained(bench: Bench, graph: Graph, name: str) -> None:
    """A whole training, and what its graph draws with it."""
    folder = _folder(bench, graph)
    with Follower(folder, bench.server.process.pid, bench.memory) as seen:
        result = bench.run("trained, and drawn with", graph)
    bench.add(
        "that training", seconds_from_the_queue_to=seen.began, peak_gib=seen.memory, shown=_shown(result),
        **record(folder, bench.base / "models" / "loras" / f"{name}.safetensors"),
    )  # fmt: skip


def record(folder: Path, file: Path | None = None) -> Row:
    """What a run's folder says of it, and how large the file of its result is."""
    state, lines = read_state(folder), read_metrics(folder)
    kept = ("step", "loss", "grad_norm", "peak_memory_gib", "seconds")
    return {
        "status": state.status if state is not None else None,
        "error": state.error if state is not None else "",
        "steps": [{name: line[name] for name in kept if name in line} for line in (*lines[:3], *lines[3:][-1:])],
        "planned": _planned(folder),
        "result_mb": round(file.stat().st_size / 1e6, 1) if file is not None and file.is_file() else None,
        "last_said": log_tail(folder, 6),
    }


def _planned(folder: Path) -> list[str]:
    """What a run's plan says of memory and time."""
    try:
        rows = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = itertools.accumulate((name for name, _ in rows), lambda last, name: name or last)
    return [text for name, (_, text) in zip(names, rows, strict=True) if name in ("memory", "time")]


def _shown(result: Result) -> list[str]:
    return [str(text)[:1500] for output in result.outputs.values() for text in output.get("text", [])]


def _drawn_with(bench: Bench, graph: Graph, file: str) -> None:
    """The first picture once more, without and with the result's file, and how far apart these two are."""
    import numpy as np
    from PIL import Image

    graph = reseeded(graph)
    (guider,) = nodes_of(graph, "BasicGuider")
    given = {"model": graph[guider]["inputs"]["model"], "lora_name": file, "strength_model": 1.0}
    with_file = changed(graph, "BasicGuider", model=["trained", 0])
    with_file["trained"] = {"class_type": "LoraLoaderModelOnly", "inputs": given}
    pictures = []
    for what, one in (("without", graph), ("with", with_file)):
        result = bench.run(f"a picture {what} the result's file", one)
        (saved,) = (node for node in nodes_of(graph, "SaveImage") if node in result.outputs)
        shown = BytesIO(bench.server.view(result.outputs[saved]["images"][0]))
        pictures.append(np.asarray(Image.open(shown).convert("RGB"), dtype=float))
    bench.add("between the two", mean_difference_of_255=round(float(abs(pictures[0] - pictures[1]).mean()), 3))


def _cancelled(bench: Bench, graph: Graph, moment: tuple[int, float]) -> None:
    """Cancel a training in the middle of a step: seconds until it has said so, is gone, and its graph has ended."""
    folder, times, over = _folder(bench, graph), {}, threading.Event()

    def until(what: str, condition: Callable[[], bool]) -> None:
        end = time.perf_counter() + MOMENT_LIMIT
        while not condition() and not over.is_set() and time.perf_counter() < end:
            time.sleep(0.02)
        times[what] = time.perf_counter()

    def act() -> None:
        until("at the step", lambda: _at_step(folder, moment[0]))
        time.sleep(moment[1])
        times["asked"] = time.perf_counter()
        bench.server.interrupt()
        until("saved", lambda: (state := read_state(folder)) is None or not state.active)
        until("gone", lambda: (state := read_state(folder)) is None or not is_alive(state))

    def heard(event: Row) -> None:
        if event["type"].startswith("execution_"):
            times[event["type"]] = time.perf_counter()

    thread = threading.Thread(target=act, daemon=True)
    with Follower(folder, bench.server.process.pid, bench.memory) as seen:
        thread.start()
        bench.run("cancelled in the middle of a step", graph, heard)
        over.set()
        thread.join(10)
    newest, names = latest(folder), ("saved", "gone", "execution_interrupted")
    after = {name: round(times[name] - times["asked"], 2) for name in names if name in times and "asked" in times}
    bench.add(
        "from Cancel until", seconds=after, checkpoint=None if newest is None else newest.name, peak_gib=seen.memory,
        seconds_from_the_queue_to=seen.began, device_after_gib=bench.memory.used(), **record(folder),
    )  # fmt: skip


def _at_step(folder: Path, step: int) -> bool:
    """Whether a run has done so many steps, and is at the next one."""
    state = read_state(folder)
    return state is not None and state.phase == "training" and state.step >= step
