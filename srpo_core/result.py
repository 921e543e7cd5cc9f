"""output.result: the file of a run's trained weights, written when it ends, that takes no other file's place.

result.json in the run's folder says which file it is, and which others the run has written before: {"path", "step",
"error", "files"}. Files that lie in the run's folder move with it: their paths are relative.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo_core.checkpoint import checkpoint_step, latest
from srpo_core.config import ConfigError, RunConfig
from srpo_core.files import check_writable, nearest_existing, write_atomic
from srpo_core.run_folder import load_folder

if TYPE_CHECKING:
    from srpo_core.progress import Display

RECORD = "result.json"
SUFFIX = ".safetensors"


def check(config: RunConfig) -> Path | None:
    """The file that the run's weights go to when it ends; None where output.result is unset. Before long work.

    ConfigError if it isn't called .safetensors, if its folder can't be written to, or if a file is there that isn't the
    run's own.
    """
    if config.output.result is None:
        return None
    path = Path(config.output.result).absolute()
    if path.suffix != SUFFIX:
        raise ConfigError(f"output.result={str(path)!r}: weights are one file, whose name ends in {SUFFIX}")
    there = nearest_existing(path.parent)
    if not there.is_dir():
        raise ConfigError(f"output.result={str(path)!r}: {there} is no folder; name another file")
    check_writable(there, "output.result", "name another file")
    place = _place(config, path, config.optim.steps)
    if place.exists() and place not in files(config.output.dir):
        raise ConfigError(
            f"output.result={str(path)!r}: {place} is there already and not of this run, and stays; name another file,"
            " or remove it"
        )
    return place


def _place(config: RunConfig, path: Path, step: int) -> Path:
    """The name itself, or once the run has given it to an earlier step's weights, the one with the step."""
    own = files(config.output.dir)
    return step_file(path, step) if path in own and own[path] != step else path


def step_file(path: Path | str, step: int) -> Path:
    """A result's name with its step: look.safetensors, 80 -> look-000080.safetensors."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{step:06d}{path.suffix}")


def read(run_dir: Path | str) -> dict[str, Any] | None:
    """The run's result: {"path": file or None, "step", "error": why there is none, "files"}; None if none yet."""
    folder = Path(run_dir).absolute()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        path = record["path"] and str(folder / record["path"])
        written = {str(folder / name): step for name, step in record["files"].items()}
        return {"path": path, "step": record["step"], "error": record["error"], "files": written}
    return None


def files(run_dir: Path | str) -> dict[Path, int]:
    """The files that a run has written and their steps; they may have been moved or removed since."""
    record = read(run_dir)
    return {Path(path): step for path, step in record["files"].items()} if record else {}


def write(config: RunConfig, step: int, display: Display) -> Path | None:
    """Write the finished run's weights where output.result says; the file, None if that is unset or fails.

    What goes wrong is told and recorded, and no more: the run is done, and its checkpoint can be exported again.
    """
    if config.output.result is None:
        return None
    run_dir = Path(config.output.dir)
    try:
        with display.during("saving the result"):
            place = _place(config, Path(config.output.result).absolute(), step)
            path = place if files(run_dir).get(place) == step and place.is_file() else _export(config, place, step)
        _record(run_dir, str(path), step)
        display.say(f"result: {path}")
        return path
    except Exception as error:
        reason = f"{config.output.result} could not be written: {error}"
        display.warn(f"{reason}; the run itself is saved: srpo export {run_dir} --out FILE{SUFFIX} writes it")
        with contextlib.suppress(OSError):
            _record(run_dir, None, step, reason)
        return None


def save_now(run_dir: Path | str, check: Callable[[RunConfig], None] | None = None) -> Path:
    """Write the newest checkpoint's weights beside output.result, with the step in the name; the file.

    A file that the run has written from this step before is not written again. `check` may refuse the run's description
    by an error. ConfigError if there is no checkpoint.
    """
    run_dir = Path(run_dir)
    config, newest = load_folder(run_dir), latest(run_dir)
    if check is not None:
        check(config)
    if newest is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet")
    step = checkpoint_step(newest)
    for path, of_step in files(run_dir).items():
        if of_step == step and path.is_file():
            return path
    base = config.output.result or run_dir / "export" / f"{run_dir.resolve().name}{SUFFIX}"
    path = _export(config, step_file(Path(base).absolute(), step), step)
    record = read(run_dir) or {"path": None, "step": 0, "error": ""}
    _record(run_dir, record["path"], record["step"], record["error"], also={str(path): step})
    return path


def _export(config: RunConfig, place: Path, step: int) -> Path:
    """Export a step to a place, or the next free one: name-2, name-3, ... A LoRA stays in float32, as it was trained.

    That is exact, so that pictures drawn with the file are those that the run showed.
    """
    from srpo_core.export import export_run

    place.parent.mkdir(parents=True, exist_ok=True)
    free, number = place, 1
    while free.exists():
        number += 1
        free = place.with_name(f"{place.stem}-{number}{place.suffix}")
    return export_run(config.output.dir, free, checkpoint=step, config=config)


def _record(run_dir: Path, path: str | None, step: int, error: str = "", also: dict[str, int] | None = None) -> None:
    folder = run_dir.absolute()

    def told(file: str | Path) -> str:
        return Path(file).relative_to(folder).as_posix() if Path(file).is_relative_to(folder) else str(file)

    written = {told(file): of_step for file, of_step in (files(run_dir) | (also or {})).items()}
    if path is not None:
        written[told(path)] = step
    record = {"path": path and told(path), "step": step, "error": error, "files": written}
    text = json.dumps(record, indent=1)
    write_atomic(run_dir / RECORD, text)
