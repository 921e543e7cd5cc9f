"""A training begun from a graph: checked, planned, started, and what it gives when it is done."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as management

from srpo_core import launch, result
from srpo_core.at_work import work_folder
from srpo_core.config import ConfigError, RunConfig
from srpo_core.errors import TrainingError
from srpo_core.files import write_atomic
from srpo_core.gpus import check_free
from srpo_core.plan import Plan, plan_run
from srpo_core.run_sources import typed
from srpo_core.run_state import log_tail
from srpo_core.run_view import in_words, summary

from . import more_settings, packages, run_outputs, run_safety
from .follow import wait_for_stopping
from .io_types import RunSettings
from .memory import LoadedReward
from .run_names import run_place
from .show import Table, table
from .training_models import comfyui_known, environment
from .training_run import Described, describe, texts_there, there_already

PLAN_FILE = "plan.json"
LOG_LINES = 100
NOTHING_YET = "Only checked: the folder and its run.json are there once the mode is wait or background."
_WIDGETS = {
    r"parallel\.(processes|gpus|share_gpu|nodes|node_rank|rendezvous)\b": r"\1",
    r"output\.(preview_every|checkpoint_every)\b": r"\1",
    r"optim\.(steps)\b": r"\1",
    r"output\.(dir|result)\b": "name",
    r"model\.(transformer|path)\b": "base",
    r"model\.clip\b": "clip_l",
    r"model\.t5\b": "t5xxl",
    r"model\.autoencoder\b": "vae",
    r"srpo stop RUN": "in SRPO's side panel",
}
"""Settings in an error of the engine, and what SRPO Train calls them."""


@dataclass(frozen=True)
class Begun:
    """A training that a graph has asked for."""

    name: str
    config: RunConfig
    tables: Sequence[Table]
    """Its plan, where it was only to be checked."""

    @property
    def folder(self) -> Path:
        """Where this machine's part of it tells of itself."""
        return work_folder(self.config)


def begin(
    name: str,
    if_there: str,
    given: Mapping[str, Any],
    settings: Sequence[RunSettings],
    reward: LoadedReward | None,
    only_check: bool = False,
) -> Begun:
    """Start a training, or find it at work or done; `only_check` starts nothing and leaves nothing.

    ConfigError, before anything is begun, with all that is missing or can't be.
    """
    packages.check()
    place = run_place(name, if_there)
    with comfyui_known():
        described = describe(place, given, settings, reward)
        with _in_widgets(given["more_settings"]):
            if not only_check:
                wait_for_stopping(work_folder(described.config))
            there = there_already(described.config)
            if there in ("nothing", "a part"):
                tables = _checked_or_started(described, given["more_settings"], there == "a part", only_check)
            else:
                tables = [_plan_table(_kept_rows(work_folder(described.config)), words(place.folder))]
    return Begun(place.name, described.config, tables)


def _checked_or_started(described: Described, lines: str, resume: bool, only_check: bool) -> list[Table]:
    config = described.config
    taken = _by_widgets(_taken(config), lines) if only_check else ""
    launch.check(_shared(config) if taken else config, resume)
    with texts_there(described.texts) as keep:
        plan = _planned(config, resume)
        rows = (*plan.rows, ("result", config.output.result or ""))
        if only_check:
            command = typed(launch.train_command(work_folder(config) / "run.json", resume, config.parallel))
            rows = (*rows, ("folder", config.output.dir), ("command", command))
            return [_plan_table(rows, "\n".join(filter(None, [_refusal(plan), taken, "" if resume else NOTHING_YET])))]
        if plan.refusal is not None:
            raise ConfigError(_refusal(plan))
        management.throw_exception_if_processing_interrupted()  # checks may take minutes where there are many photos
        _unload()
        launch.start(config, resume, environment())
        keep()
    with suppress(OSError):  # a full disk ends the run, which says so
        write_atomic(work_folder(config) / PLAN_FILE, json.dumps(rows, indent=1))
    return []


def _planned(config: RunConfig, resume: bool) -> Plan:
    """A run's plan; where it has no room beside ComfyUI's models, these are unloaded and it is planned once more.

    What they take isn't all known: ComfyUI holds weights outside torch's memory too.
    """
    plan = plan_run(config, resume)
    if plan.refusal is None:
        return plan
    _unload()
    return plan_run(config, resume)


def _unload() -> None:
    management.unload_all_models()
    management.soft_empty_cache()


def _taken(config: RunConfig) -> str:
    """Which other run is at work on the device; empty if none is. ConfigError if the device itself can't be."""
    try:
        check_free(config)
    except ConfigError as error:
        check_free(_shared(config))
        return str(error)
    return ""


def _shared(config: RunConfig) -> RunConfig:
    """The run, which doesn't mind another one on its device."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"share_gpu": True})})


def _refusal(plan: Plan) -> str:
    return f"{plan.refusal}\n(such settings go into more_settings, one a line)" if plan.refusal else ""


@contextmanager
def _in_widgets(lines: str) -> Iterator[None]:
    """Errors of the engine in the words of SRPO Train's widgets, and of the lines of its more_settings."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(_by_widgets(str(error), lines)) from error


def _by_widgets(message: str, lines: str) -> str:
    """A message in the words of widgets; what a line of more_settings sets keeps the name that it has there."""
    kept = {name for _, name, _ in more_settings.said(lines)}
    message = more_settings.with_lines(message, lines)
    for setting, widget in _WIDGETS.items():
        message = re.sub(setting, partial(_renamed, widget, kept), message)
    return message


def _renamed(widget: str, kept: Collection[str], found: re.Match[str]) -> str:
    return found[0] if found[0] in kept else found.expand(widget)


def _plan_table(rows: Sequence[tuple[str, str]], note: str = "") -> Table:
    return table("Plan", ("", ""), rows, note)


def _kept_rows(folder: Path) -> list[tuple[str, str]]:
    """The plan of a run that was started; none if that was on the command line."""
    try:
        rows = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        return [(str(name), str(text)) for name, text in rows]
    except (OSError, ValueError, TypeError):
        return []


def words(folder: Path) -> str:
    """How a run stands."""
    return in_words(summary(folder))


def outputs(config: RunConfig) -> tuple[tuple[Any, ...], list[str]]:
    """What a finished run gives, as far as it is there, and a line for each thing that isn't."""
    folder = Path(config.output.dir)
    (before, after), no_pictures = run_outputs.pictures(folder, config)
    if no_pictures:
        no_pictures = _last_said(folder, "warning: the preview") or no_pictures
    lora, no_lora = run_outputs.newest_lora(folder) if config.lora.rank else (run_outputs.NOT_YET, "")
    path, no_file = _result_file(config)
    found = (lora, run_outputs.losses(folder), before, after, path)
    return found, [note for note in (no_pictures, no_lora, no_file) if note]


def _last_said(folder: Path, beginning: str) -> str:
    """The last line of what a run printed that begins so; empty if none does."""
    return next((line for line in reversed(log_tail(folder, LOG_LINES)) if line.startswith(beginning)), "")


def _result_file(config: RunConfig) -> tuple[str, str]:
    """The result's file, written again if it is gone; the run's folder, and why, where that fails."""
    from srpo_core.export import export_run

    folder = Path(config.output.dir)
    written = result.read(folder)
    path = written["path"] if written is not None else None
    if path is not None and Path(path).is_file():
        return path, ""
    try:
        if path is not None and path == config.output.result:
            return str(export_run(folder, path, checkpoint=written["step"], config=config)), ""
        return str(result.save_now(folder, check=lambda config: run_safety.check(config, folder))), ""
    except (ConfigError, TrainingError, OSError) as error:
        return str(folder), f"no file of the result: {error}"
