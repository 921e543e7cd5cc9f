"""What SRPO Train refuses before it begins: a second run on a device, and one for which a GPU's memory is too small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_comfyui_memory import smaller_card
from bench_comfyui_run import ROOT, Bench, Graph, Row, changed, nodes_of, reseeded
from bench_comfyui_training import SHORT, Follower, record, with_settings
from comfyui_training import QUICK, at_work, end_trainings
from comfyui_training import runs as runs_folder
from filelock import FileLock, Timeout

from srpo_core.device_locks import CPU, holder, lock_folder
from srpo_core.gpus import list_gpus
from srpo_core.run_state import is_alive, read_state

END_LIMIT = 60.0
"""Seconds in which a run that was asked to stop is gone."""
LARGE = {"data.batch_size": 8, "model.recompute": False}
"""A step of FLUX.1-dev at 720 x 720 with these takes over 200 GiB."""
BY_HAND = [f"{name}={value}" for name, value in {**QUICK, "optim.steps": 1}.items()]


def refusals(bench: Bench, full: bool, card_gib: float) -> None:
    """On a device where the miniature trains; at full size on a card that is too small, then with what is advised."""
    name = f"refusals-{os.getpid()}"
    try:
        if full:
            _too_large(bench, name, card_gib)
        else:
            _taken(bench, name)
    finally:
        end_trainings(bench.base)


def training_alone(graph: Graph, name: str, widgets: Mapping[str, Any], settings: Mapping[str, Any]) -> Graph:
    """A graph's SRPO Train, with other widgets and more settings, and the nodes that lead to it."""
    wanted, found = nodes_of(graph, "SRPOTrain"), {}
    while wanted:
        id = wanted.pop()
        found[id] = graph[id]
        wanted += [value[0] for value in graph[id]["inputs"].values() if isinstance(value, list)]
    return changed(with_settings(found, settings), "SRPOTrain", name=name, **widgets)


def _taken(bench: Bench, name: str) -> None:
    """While a run trains in the background: its locks, a second one by the node, by hand, and where it may share."""
    graph = bench.graph("train_miniature")
    second = training_alone(graph, f"{name}-second", {"steps": 2}, {"output.evaluate_prompts": 0})
    folder = runs_folder(bench.server) / name
    bench.run("a training in the background", training_alone(graph, name, {"mode": "background", "steps": 5000}, {}))
    at_work(folder, "training", 1)
    bench.add("who trains on what", pid=read_state(folder).pid, **_locks())
    bench.run("a second one on its device", second, refused=True)
    bench.add("left of it", folder=folder.with_name(f"{name}-second").exists())
    _by_hand(bench, folder.with_name(f"{name}-by-hand"))
    bench.run("a second one that shares the device", changed(second, "SRPOTrain", share_gpu=True))
    begin = time.perf_counter()
    bench.server.send(f"/srpo/runs/{name}/stop", {})
    _until(lambda: not is_alive(read_state(folder)))
    bench.add("the first one is stopped", seconds=round(time.perf_counter() - begin, 2), **record(folder), **_locks())


def _locks() -> Row:
    """The keys of the machine's GPUs by nvidia-smi, the locks that processes hold, and whose they are."""
    keys = [gpu.key for gpu in list_gpus()]
    known = {key: one for key in keys or [CPU] if (one := holder(key)) is not None}
    held = [path.name for path in sorted(lock_folder().glob("*.lock")) if _is_held(path)]
    return {"gpus": keys, "locks_held": held, "holders": {key: asdict(one) for key, one in known.items()}}


def _is_held(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _by_hand(bench: Bench, folder: Path) -> None:
    """`srpo train` of one step in a process of its own: refused on a GPU that is taken; the CPU may be shared."""
    command = [sys.executable, str(ROOT / "srpo_core" / "__main__.py"), "train", "miniature", f"output.dir={folder}"]
    begin = time.perf_counter()
    ended = subprocess.run([*command, *BY_HAND], capture_output=True, text=True, timeout=180)
    said = (ended.stdout + ended.stderr).strip()
    seconds = round(time.perf_counter() - begin, 2)
    bench.add("srpo train by hand on its device", seconds=seconds, exit_code=ended.returncode, said=said[-1500:])


def _too_large(bench: Bench, name: str, card_gib: float) -> None:
    """What is too large for the whole card, and for a small one; there with what is advised, after a picture."""
    graph = bench.graph("train_lora")
    inputs = {"mode": "background", "recipe": "flux-dev-lora"}  # one that is not refused would begin, and be ended
    _refused(bench, "kept activations of 8 pictures", training_alone(graph, f"{name}-large", inputs, LARGE))
    bench.free("POST /free before")
    with smaller_card(card_gib) as free:
        bench.add("another program holds the rest of the memory", free_gib=free)
        lora = training_alone(graph, name, inputs | {"steps": 1}, SHORT)
        error = _refused(bench, "flux-dev-lora on the small card", lora)
        settings = advised(error)
        bench.add("advised", settings=settings)
        if settings:
            bench.run("a picture there", reseeded(bench.graph("SRPO-workflow")))
            lora = changed(with_settings(lora, settings), "SRPOTrain", mode="wait")
            _with_advice(bench, lora, runs_folder(bench.server) / name)


def _refused(bench: Bench, what: str, graph: Graph) -> str:
    """A run that must not begin; what is said of it."""
    error = bench.run(what, graph, refused=True).error
    end_trainings(bench.base)
    return error


def advised(error: str) -> dict[str, str]:
    """The settings of the first line "setting=value ...: size" of a refusal; {} where no setting helps."""
    lines = (re.fullmatch(r"\s*((?:[\w.]+=\S+ ?)+): [\d.]+ \wi?B\s*", line) for line in error.splitlines())
    first = next((found[1] for found in lines if found), "")
    return dict(word.split("=", 1) for word in first.split())


def _with_advice(bench: Bench, graph: Graph, folder: Path) -> None:
    with Follower(folder, bench.server.process.pid, bench.memory) as seen:
        bench.run("flux-dev-lora on the small card, as advised", graph)
    bench.add("that training", seconds_from_the_queue_to=seen.began, peak_gib=seen.memory, **record(folder))


def _until(condition: Callable[[], bool]) -> None:
    end = time.perf_counter() + END_LIMIT
    while not condition() and time.perf_counter() < end:
        time.sleep(0.02)
