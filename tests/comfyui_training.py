"""Trainings of the miniature from graphs in a real server: their nodes, folders, processes and moments."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from comfyui_server import Result, Server
from comfyui_shown import node

from srpo_core.config import RunConfig
from srpo_core.description import load_run
from srpo_core.metrics import read_metrics
from srpo_core.run_state import ACTIVE, log_tail

BUILT_IN = "miniature (built in)"
QUICK = {
    "data.batch_size": 1, "rollout.num_steps": 2, "output.preview_steps": 2, "output.preview_prompts": 2,
    "output.evaluate_prompts": 0, "output.tensorboard": "false", "optim.schedule": "constant",
}  # fmt: skip
"""Settings with which a step of the miniature takes a fraction of a second."""
DEFAULTS = {
    "base": BUILT_IN, "clip_l": "auto", "t5xxl": "auto", "vae": "auto", "recipe": "auto", "steps": 3, "seed": 0,
    "mode": "wait", "if_there": "go on", "preview_every": 2, "checkpoint_every": 2, "processes": 1, "gpus": "auto",
    "share_gpu": False, "nodes": 1, "node_rank": 0, "rendezvous": "",
}  # fmt: skip
LIMIT = 180
"""Seconds in which anything asked of a short run has happened, on a busy machine."""


def train(name: str, settings: dict[str, Any] | None = None, quick: bool = True, **inputs: Any) -> dict[str, Any]:
    """SRPO Train: its widgets, sockets, and `settings` as lines of more_settings."""
    lines = {**(QUICK if quick else {}), **(settings or {})}
    more = "\n".join(f"{key}={value}" for key, value in lines.items())
    return node("SRPOTrain", **{**DEFAULTS, "name": name, "more_settings": more, **inputs})


def quick_run(folder: Path, steps: int, settings: dict[str, Any] | None = None) -> RunConfig:
    """The description of such a run, to be started without a graph."""
    own = {"output.preview_every": 2, "output.checkpoint_every": 2, "lora.rank": 4, "parallel.share_gpu": "true"}
    lines = {**QUICK, **own, "optim.steps": steps, "output.dir": folder, **(settings or {})}
    return load_run("miniature", [f"{key}={value}" for key, value in lines.items()])


def graph(name: str, settings: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
    """A training, and two nodes that use what comes of it."""
    return {
        "train": train(name, settings, **inputs),
        "path": node("PreviewAny", source=["train", 4]),
        "after": node("PreviewImage", images=["train", 3]),
    }


def runs(server: Server) -> Path:
    return server.base / "output" / "srpo"


def lora_file(server: Server, name: str) -> Path:
    return server.base / "models" / "loras" / f"{name}.safetensors"


def state(run_dir: Path) -> dict[str, Any]:
    """state.json as it stands; {} where there is none, or a half."""
    try:
        return json.loads((run_dir / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def steps(run_dir: Path) -> list[int]:
    """Steps in the run's record, in order; 0 is the preview before training."""
    return [line["step"] for line in read_metrics(run_dir)]


def trainings(base: Path) -> list[psutil.Process]:
    """Processes that train in folders below `base`, launchers and ranks included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and any(word.startswith(str(base / "output")) for word in words[1:]):
                found.append(process)
    return found


def end_trainings(base: Path) -> None:
    """End whatever a test has left at work below `base`."""
    for process in trainings(base):
        with contextlib.suppress(psutil.Error):
            process.kill()


def until(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    """What a condition gives as soon as it is true. AssertionError with `what` after `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {limit} s: {what}")


def at_work(run_dir: Path, phase: str = "", step: int = 0) -> dict[str, Any]:
    """The state of a run once a process works on it in a phase, and has recorded a step."""

    def there() -> dict[str, Any] | None:
        now = state(run_dir)
        ok = now.get("status") in ACTIVE and phase in now.get("phase", "") and psutil.pid_exists(now["pid"])
        return now if ok and (not step or step <= max(steps(run_dir), default=0)) else None

    return until(there, f"{run_dir.name} in {phase!r} at step {step}: {state(run_dir)} {log_tail(run_dir)}")


@contextlib.contextmanager
def meanwhile(act: Callable[[], Any]) -> Iterator[None]:
    """Inside the context `act` runs in a thread; what goes wrong there is raised at the end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(LIMIT)
    if failed:
        raise failed[0]


def cancelled(server: Server, given: dict[str, Any], moment: Callable[[], Any]) -> tuple[Result, float]:
    """A graph that is interrupted when `moment` returns: its result, and the seconds it took to end after that."""
    times: dict[str, float] = {}

    def act() -> None:
        moment()
        times["asked"] = time.monotonic()
        server.interrupt()

    with meanwhile(act):
        result = server.run(given)
        ended = time.monotonic()
    return result, ended - times["asked"]


def refusal(server: Server, given: dict[str, Any]) -> str:
    """What is said of a graph that can't be queued or that fails; empty if it succeeds."""
    status, answer = server.post(given)
    if status != 200:
        errors = [error for one in answer["node_errors"].values() for error in one["errors"]]
        return "\n".join(f"{error['message']}: {error['details']}" for error in errors)
    number = answer["prompt_id"]
    history = until(lambda: server.get(f"/history/{number}").get(number), "the end of a graph")
    told = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
    return told[0]["exception_message"] if told else ""


class Watcher:
    """Another page of a server: what its websocket is told while entered."""

    def __init__(self, server: Server) -> None:
        self.url, self.events = f"{server.url}/ws?clientId={uuid.uuid4().hex}", []
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        assert self._ready.wait(30), "no websocket"
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def _run(self) -> None:
        self._task = self._loop.create_task(self._listen())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)

    async def _listen(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession() as session, session.ws_connect(self.url, max_msg_size=0) as socket:
            self._ready.set()
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    self.events.append(json.loads(message.data))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all events of a type."""
        return [event["data"] for event in self.events if event["type"] == kind]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """(size, time of change) of every file below a folder, by its path there; links are not followed."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.is_symlink() for part in (path, *path.parents)):
            files[str(path.relative_to(folder))] = (path.stat().st_size, path.stat().st_mtime_ns)
    return files
