"""Runs as a page shows them: plain dicts for JSON, read from their folders, finished, at work or half written."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srpo_core import result, run_state
from srpo_core.checkpoint import checkpoint_step, latest
from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import load_run
from srpo_core.files import write_atomic
from srpo_core.launch import train_command
from srpo_core.metrics import metrics_file, read_metrics
from srpo_core.report.data import read_runs
from srpo_core.report.page import render
from srpo_core.run_curves import curves, finite
from srpo_core.run_pictures import preview_steps
from srpo_core.run_sources import typed
from srpo_core.run_state import LOG_FILE, RunState, log_tail, read_state, recent_metrics, seconds_left, stop_asked
from srpo_core.time_words import duration_text

RECORD, PLAN, REPORT = "run.json", "plan.json", "report.html"
_READ = (RECORD, PLAN, REPORT, result.RECORD, run_state.FILE, LOG_FILE, "metrics.jsonl", "previews", "evaluation")
"""What of a run's folder is shown: none of it may be a link to another place."""
MOST_LOG_LINES = 1000
_UNKNOWN: dict[str, Any] = {
    **{"status": "stopped", "stopping": False, "phase": "", "phase_done": 0, "phase_total": 0, "step": 0, "steps": 0},
    **{"began": 0.0, "worked": 0.0},
    **dict.fromkeys(("seconds_left", "ended", "result", "preview_step")),
    **dict.fromkeys(("kind", "base", "reward", "version"), ""),
    **dict.fromkeys(("can_stop", "can_resume", "can_continue", "can_save"), False),
}
_rendering = threading.Lock()


class NoRun(ConfigError):
    """There is no run of that name."""


def find_run(runs: Path, name: str) -> Path:
    """The folder of a run by its name in `runs`. NoRun if there is none, or if it leads out of `runs`."""
    if name not in _names(runs):  # what is no name in the folder, such as a path, is none here either
        raise NoRun(f"there is no run {name!r} in {runs}")
    folder = runs / name
    if not _holds_run(folder):
        raise NoRun(f"{folder} is no run: it holds neither {RECORD} nor {run_state.FILE}")
    place = runs.resolve() / name
    strays = [part for part in ("", *_READ) if (folder / part).resolve() != place / part]
    if strays:
        raise NoRun(f"{folder / strays[0]} is a link to another place, and is not followed")
    return folder


def _names(runs: Path) -> list[str]:
    try:
        return os.listdir(runs)
    except OSError:
        return []


def _holds_run(folder: Path) -> bool:
    return (folder / RECORD).is_file() or (folder / run_state.FILE).is_file()


def list_runs(runs: Path) -> list[Path]:
    """Folders of the runs in a folder, the one that began last first."""
    found = _found(runs)
    return sorted(found, key=lambda folder: (_began(folder, read_state(folder)), folder.name), reverse=True)


def _found(runs: Path) -> list[Path]:
    found = []
    for name in _names(runs):
        try:
            found.append(find_run(runs, name))
        except (NoRun, OSError):
            continue
    return found


def _began(folder: Path, state: RunState | None) -> float:
    """When a run began, in seconds since 1970; where nothing tells, when it was described."""
    known = state.began if state is not None else 0.0
    return known or max(_stamp(folder / RECORD)[0], _stamp(folder / run_state.FILE)[0]) / 1e9


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file does: (time in ns, size, number); zeros where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def run_config(run_dir: Path) -> RunConfig | None:
    """A run's settings; None while its record can't be read."""
    return _config(run_dir / RECORD, _stamp(run_dir / RECORD))


@functools.lru_cache(maxsize=256)
def _config(record: Path, stamp: tuple[int, int, int]) -> RunConfig | None:
    try:
        return load_run(str(record))
    except (ConfigError, OSError, ValueError):
        return None


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics so far; parsed anew only when their file has changed."""
    file = metrics_file(run_dir)
    return _lines(run_dir, _stamp(file))


@functools.lru_cache(maxsize=16)
def _lines(run_dir: Path, stamp: tuple[int, int, int]) -> list[dict[str, Any]]:
    try:
        return [line | {"step": int(line["step"])} for line in read_metrics(run_dir)]
    except OSError:
        return []


def summary(run_dir: Path) -> dict[str, Any]:
    """A run in a line: what it is, where it stands and what may be done with it."""
    config, state = run_config(run_dir), read_state(run_dir)
    step, steps = _progress(run_dir, config, state)
    active = state is not None and state.active
    finished = state.status == "finished" if state is not None else 0 < steps <= step
    (record, files), newest, previews = _result(run_dir), latest(run_dir), preview_steps(run_dir)
    told = {
        "name": run_dir.name,
        "status": state.status if state is not None else "finished" if finished else "stopped",
        "stopping": active and stop_asked(run_dir),
        "phase": state.phase if active else "",
        "phase_done": state.phase_done if active else 0,
        "phase_total": state.phase_total if active else 0,
        "step": step,
        "steps": steps,
        "began": _began(run_dir, state),
        "worked": state.worked if state is not None else 0.0,
        "ended": state.ended if state is not None and not active else None,
        "error": _error(config, state) or record["error"],
        "result": max(files, key=files.get, default=None),
        **_what(config),
        "preview_step": previews[-1] if previews else None,
        "can_stop": active,
        "can_resume": config is not None and not active and not finished,
        "can_continue": config is not None and not active and finished and config.optim.schedule == "constant",
        "can_save": config is not None
        and not active
        and newest is not None
        and checkpoint_step(newest) not in files.values(),
    }
    parts = [metrics_file(run_dir), *(run_dir / name for name in (RECORD, PLAN, result.RECORD, LOG_FILE, "previews"))]
    told["version"] = _digest([told, [_stamp(part) for part in parts]])
    told["seconds_left"] = finite(seconds_left(run_dir, state)) if active else None
    return told


def summaries(runs: Path) -> list[dict[str, Any]]:
    """The summary of every run in a folder, the one that began last first; of a broken one its name and an error."""
    found = []
    for folder in _found(runs):
        try:
            found.append(summary(folder))
        except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:  # its files may hold anything
            found.append(_UNKNOWN | {"name": folder.name, "error": f"its files can't be read: {error!r}"})
    return sorted(found, key=lambda told: (told["began"], told["name"]), reverse=True)


def _progress(run_dir: Path, config: RunConfig | None, state: RunState | None) -> tuple[int, int]:
    """(step, of how many)."""
    lines = recent_metrics(run_dir) if state is None else []
    step = state.step if state is not None else lines[-1]["step"] if lines else 0
    steps = state.steps if state is not None and state.steps else config.optim.steps if config is not None else 0
    return step, steps


def _error(config: RunConfig | None, state: RunState | None) -> str:
    if state is not None and state.error:
        return state.error
    return f"{RECORD} can't be read: the run can't be resumed" if config is None else ""


def _what(config: RunConfig | None) -> dict[str, str]:
    """What is trained, from which model, by which reward."""
    if config is None:
        return {"kind": "", "base": "", "reward": ""}
    place = config.model.transformer or config.model.path
    rewards = [config.reward.name, *(more.name for more in config.reward.more)]
    return {
        "kind": "lora" if config.lora.rank else "full",
        "base": Path(place).name if place else config.model.family,
        "reward": " + ".join(rewards),
    }


def _result(run_dir: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What is recorded of the run's result, and the steps of its files that are there still, by their paths."""
    record = result.read(run_dir) or {"path": None, "step": 0, "error": "", "files": {}}
    return record, {path: step for path, step in record["files"].items() if os.path.isfile(path)}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _digest(parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def in_words(told: Mapping[str, Any]) -> str:
    """A summary in a line or a few, for a person."""
    status = "stopping" if told["stopping"] else told["status"]
    line = f"{told['name']}: {status}, step {told['step']} of {told['steps']}"
    if told["phase"] not in ("", "training"):
        count = f" {told['phase_done']} of {told['phase_total']}" if told["phase_total"] else ""
        line += f", {told['phase']}{count}"
    if told["seconds_left"] is not None:
        line += f", about {duration_text(told['seconds_left'])} left"
    lines = [line, *(f"  {text}" for text in told["error"].splitlines())]
    return "\n".join([*lines, f"result: {told['result']}"] if told["result"] else lines)


def detail(run_dir: Path, after: int = -1, log: int = 0) -> dict[str, Any]:
    """A run's summary, its plan, command, folder, curves of the steps after `after`, and last `log` lines printed.

    "course" changes when steps that were told before are trained anew: curves of the old ones are no longer true.
    """
    told, lines = summary(run_dir), metric_lines(run_dir)
    number = _stamp(metrics_file(run_dir))[2]
    return told | {
        "course": _digest([number, told["began"]]) if number else "",
        "plan": _plan(run_dir),
        "command": command(run_dir),
        "folder": str(run_dir),
        "curves": curves([line for line in lines if line["step"] > after]),
        "log": log_tail(run_dir, min(log, MOST_LOG_LINES)) if log > 0 else [],
    }


def _plan(run_dir: Path) -> list[list[str]]:
    rows = _json(run_dir / PLAN)
    rows = rows if isinstance(rows, list) else []
    return [[str(part) for part in row] for row in rows if isinstance(row, list) and len(row) == 2]


def command(run_dir: Path) -> str:
    """The command that goes on with the run, for the user to type."""
    config = run_config(run_dir)
    if config is None:
        return ""
    return typed(train_command(run_dir / RECORD, resume=True, parallel=config.parallel))


def report(run_dir: Path) -> str:
    """The run's report page; made anew if the run has moved on, and kept in its folder when it isn't at work.

    ConfigError while its record can't be read.
    """
    page = run_dir / REPORT
    sources = (RECORD, "metrics.jsonl", "previews", "evaluation", "evaluation/evaluation.json")
    with _rendering:  # two readers need not both wait for their own
        if _stamp(page)[0] >= max(1, *(_stamp(run_dir / name)[0] for name in sources)):
            return page.read_text(encoding="utf-8")
        html = _rendered(run_dir, tuple(_stamp(run_dir / name) for name in sources))
        state = read_state(run_dir)
        if state is None or not state.active:  # a run at work writes its own
            write_atomic(page, html)
        return html


@functools.lru_cache(maxsize=4)
def _rendered(run_dir: Path, stamps: tuple[tuple[int, int, int], ...]) -> str:
    return render(read_runs([run_dir]))
