"""A run folder as a report reads it: finished, interrupted or still being written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import load_run
from srpo_core.metrics import parse_metrics


@dataclass
class PairedScores:
    """Scores of the same prompts before and after training: {measure: one number per prompt}."""

    prompts: list[str]
    before: dict[str, list[float]]
    after: dict[str, list[float]]

    def names(self) -> list[str]:
        """Measures scored on both sides for every prompt, in the order of the file."""
        count = len(self.prompts)
        return [name for name, values in self.before.items() if len(values) == len(self.after.get(name, ())) == count]


@dataclass
class Preview:
    """A contact sheet of the preview prompts and its scores {measure: one number per prompt}."""

    step: int
    image: Path | None
    prompts: list[str]
    scores: dict[str, list[float]]


@dataclass
class RunData:
    """Everything a report shows of one run."""

    folder: Path
    name: str
    config: RunConfig
    made_with: dict[str, Any]
    steps: list[dict[str, Any]]
    """metrics.jsonl in order of step, a line per step; step 0 is the untrained model's preview"""
    previews: list[Preview]
    evaluation: PairedScores | None
    method_check: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    """what could not be read, in the reader's words"""

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The optimizer steps: every line but step 0."""
        return [line for line in self.steps if line["step"] > 0]

    @property
    def last_step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def finished(self) -> bool:
        return self.last_step >= self.config.optim.steps

    def series(self, *keys: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric where it is a finite number; series("score", "denoise")."""
        found = [(line["step"], _dig(line, keys)) for line in self.steps]
        pairs = [(step, float(value)) for step, value in found if _is_number(value)]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def compared(self) -> tuple[PairedScores, str] | None:
        """Scores before and after, and where they come from: the final evaluation, else the first and last preview."""
        if self.evaluation is not None:
            return self.evaluation, "final evaluation"
        first, last = (self.previews[0], self.previews[-1]) if self.previews else (None, None)
        if first is None or first.step != 0 or last.step == 0 or first.prompts != last.prompts:
            return None
        return PairedScores(first.prompts, first.scores, last.scores), f"previews of step 0 and step {last.step}"

    def pictures(self, index: int) -> tuple[Path, Path]:
        """Files of prompt `index` before and after training."""
        return tuple(self.folder / "evaluation" / side / f"{index:03d}.png" for side in ("before", "after"))


def read_run(folder: str | Path) -> RunData:
    """Read a run folder. ConfigError if it is none; anything else that is missing or broken becomes a note."""
    folder = Path(folder)
    record = folder / "run.json"
    if not record.is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no run.json")
    config, notes = load_run(str(record)), []
    made_with = _read_json(record, notes) or {}
    return RunData(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        made_with=made_with.get("made_with") or {},
        steps=_read_metrics(folder, notes),
        previews=_read_previews(folder / "previews", notes),
        evaluation=_read_evaluation(folder / "evaluation" / "evaluation.json", notes),
        method_check=_read_method_check(folder / "method_check.json", notes),
        notes=notes,
    )


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Several runs, with names that tell them apart."""
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = "/".join(run.folder.resolve().parts[-2:])
    return runs


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _dig(line: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        line = line.get(key) if isinstance(line, dict) else None
    return line


def _read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} can't be read: {error}")
        return None
    if not isinstance(data, dict):
        notes.append(f"{path.name} holds no object")
        return None
    return data


def _read_metrics(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    lines, broken = parse_metrics(folder)
    if broken:
        notes.append(f"{broken} {'line' if broken == 1 else 'lines'} of metrics.jsonl can't be read and are left out")
    return lines


def _scores(data: dict[str, Any], count: int) -> dict[str, list[float]]:
    """The entries that hold a finite number per prompt."""
    return {
        name: [float(value) for value in values]
        for name, values in data.items()
        if name != "prompts" and isinstance(values, list) and len(values) == count and all(map(_is_number, values))
    }


def _read_previews(folder: Path, notes: list[str]) -> list[Preview]:
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("step-*")):
        match = re.fullmatch(r"step-(\d+)\.(png|json)", path.name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = path
    previews = []
    for step, files in sorted(found.items()):
        data = (_read_json(files["json"], notes) if "json" in files else None) or {}
        prompts = [str(prompt) for prompt in data.get("prompts", [])]
        previews.append(Preview(step, files.get("png"), prompts, _scores(data, len(prompts))))
    return previews


def _read_evaluation(path: Path, notes: list[str]) -> PairedScores | None:
    data = _read_json(path, notes)
    if data is None:
        return None
    prompts = [str(prompt) for prompt in data.get("prompts") or []]
    before, after = (data.get(side) for side in ("before", "after"))
    if not prompts or not isinstance(before, dict) or not isinstance(after, dict):
        notes.append("evaluation.json is incomplete and is left out")
        return None
    scores = PairedScores(prompts, _scores(before, len(prompts)), _scores(after, len(prompts)))
    dropped = [name for name in before if name not in scores.names()]
    if dropped:
        notes.append(f"evaluation.json: {', '.join(dropped)} lack a finite number for every prompt and are left out")
    return scores


def _read_method_check(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    data = _read_json(path, notes) or {}
    claims = data.get("claims") or []
    return [claim for claim in claims if isinstance(claim, dict)] if isinstance(claims, list) else []
