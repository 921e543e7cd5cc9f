"""The claim that the inversion branch keeps a run from over-optimising its reward, for method_check.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srpo_core.assemble import assemble
from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import load_run
from srpo_core.files import write_atomic
from srpo_core.intervals import Interval, bootstrap_runs_ci
from srpo_core.metrics import read_metrics
from srpo_core.report.data import RunData, read_run
from srpo_core.run_folder import changed_settings

ARMS = {"both branches": "[denoise, inversion]", "denoise only": "[denoise]"}
"""align.branches of each arm."""
MEASURES = ("look", "natural_colour", "judge_liked", "content", "exact", "reward", "relative")
LOOKS = ("look", "texture", "light", "natural_colour")
DROPS = (0.02, 0.10)
"""Losses of content that count as over-optimisation, a slight one and a grave one."""
COLOURS = {"both branches": "#1f6fb4", "denoise only": "#d1622b"}


class Stopped(Exception):
    """A signal stopped a run; its state is saved."""


@dataclass(frozen=True)
class Curves:
    """The previews of an arm's runs: scores[measure] is [seeds, steps, prompts], of the same prompts in every run."""

    arm: str
    steps: list[int]
    scores: dict[str, np.ndarray]
    drift: np.ndarray
    """Relative change of the velocity, [seeds, steps]."""

    def mean(self, name: str) -> np.ndarray:
        """Over seeds and prompts, [steps]."""
        return self.scores[name].mean((0, 2))

    def by_seed(self, name: str) -> np.ndarray:
        """Over prompts, [seeds, steps]."""
        return self.scores[name].mean(2)

    def change(self, name: str, index: int) -> Interval:
        """95 % interval, over seeds and prompts, of the change from the base to the preview `index`."""
        return bootstrap_runs_ci(list(self.scores[name][:, index] - self.scores[name][:, 0]), same_prompts=True)


def first_crossing(
    steps: Sequence[int], values: Sequence[float] | np.ndarray, level: float, below: bool = True
) -> int | None:
    """The first step whose value lies below `level` (or above it), by more than rounding; None if there is none."""
    excess = level - np.asarray(values) if below else np.asarray(values) - level
    return next((step for step, beyond in zip(steps, excess, strict=True) if beyond > 1e-6), None)


def content_crossing(steps: Sequence[int], content: Sequence[float] | np.ndarray, drop: float) -> int | None:
    """The first step at which content is more than `drop` below that of the first step, the base."""
    return first_crossing(steps, content, float(content[0]) - drop)


def arm_config(
    preset: str,
    overrides: Sequence[str],
    folder: Path,
    arm: str,
    seed: int,
    steps: int | None,
    prompts: int,
    every: int,
) -> RunConfig:
    """A run of an arm: the preset's, but for branches, seed, length, previews and no evaluation."""
    name = arm.replace(" ", "-")
    settings = [
        f"align.branches={ARMS[arm]}", f"seed={seed}", f"output.preview_prompts={prompts}",
        f"output.preview_every={every}", "output.evaluate_prompts=0", "output.tensorboard=false",
    ]  # fmt: skip
    config = load_run(preset, [*overrides, *settings, *([f"optim.steps={steps}"] if steps else [])])
    config.output.dir = str(folder / f"{name}-{seed}")
    return config


def is_finished(config: RunConfig) -> bool:
    """Whether output.dir holds the run with these settings, to its end or beyond."""
    logged = read_metrics(config.output.dir)
    if not logged or logged[-1]["step"] < config.optim.steps:
        return False
    return not list(changed_settings(load_run(str(Path(config.output.dir) / "run.json")), config))


def finish_run(config: RunConfig) -> RunData:
    """The finished run: read if it is there, gone on with or started if not. Stopped if a signal ends it early."""
    if not is_finished(config):
        print(f"training {config.output.dir}", flush=True)
        outcome = assemble(config).train(resume=True)
        if not outcome.finished:
            raise Stopped(f"stopped after step {outcome.step} of {config.optim.steps} in {config.output.dir}")
    return read_run(config.output.dir)


def collect(runs: Mapping[str, Sequence[RunData]], last: int) -> list[Curves]:
    """An arm's curves over the steps up to `last` and the prompts that all runs of all arms drew previews of."""
    everyone = [run for arm in runs.values() for run in arm]
    steps = sorted(set.intersection(*({p.step for p in run.previews if p.scores} for run in everyone)))
    steps = [step for step in steps if step <= last]
    if len(steps) < 2 or steps[0] != 0:
        raise ConfigError("the runs share too few previews to compare; look for warnings above, or remove the runs")
    count = min(len(preview.prompts) for run in everyone for preview in run.previews if preview.step in steps)
    return [_curves(arm, found, steps, count) for arm, found in runs.items()]


def _curves(arm: str, runs: Sequence[RunData], steps: list[int], count: int) -> Curves:
    tables = [{preview.step: preview.scores for preview in run.previews} for run in runs]
    names = tables[0][0]
    scores = {
        name: np.array([[table[step][name][:count] for step in steps] for table in tables], dtype=float)
        for name in names
    }
    drifts = [{0: 0.0} | dict(zip(*run.series("velocity_drift"), strict=True)) for run in runs]
    drift = np.array([[by_step[step] for step in steps] for by_step in drifts])
    return Curves(arm, steps, scores, drift)


def summary_row(curves: Curves) -> dict[str, Any]:
    """When an arm loses content, whether its trained reward still rises then, whether its look overshoots, its end."""
    steps, content, relative = curves.steps, curves.mean("content"), curves.mean("relative")
    row: dict[str, Any] = {"arm": curves.arm}
    for drop in DROPS:
        label = f"content {drop * 100:.0f} points down"
        crossing = content_crossing(steps, content, drop)
        by_seed = [content_crossing(steps, one, drop) for one in curves.by_seed("content")]
        row[f"{label}: step"] = "never" if crossing is None else crossing
        row[f"{label}: by seed"] = ", ".join("never" if step is None else str(step) for step in by_seed)
        at = None if crossing is None else steps.index(crossing)
        row[f"{label}: relative reward then its highest"] = (
            None if at is None else bool(relative[at] > relative[:at].max())
        )
    over = {name: first_crossing(steps, curves.mean(name), 1.0, below=False) for name in LOOKS if name in curves.scores}
    row["look beyond the liked side"] = ", ".join(f"{k} at {v}" for k, v in over.items() if v is not None) or "never"
    for name in ("look", "judge_liked", "content", "exact", "natural_colour", "relative", "reward"):
        change = curves.change(name, len(steps) - 1)
        row[f"{name}: change at step {steps[-1]}"] = f"{change.estimate:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
    return row


def summary_rows(arms: Sequence[Curves]) -> list[dict[str, Any]]:
    """The arms' summaries side by side: a row per quantity, a column per arm."""
    columns = {curves.arm: summary_row(curves) for curves in arms}
    names = [name for name in columns[arms[0].arm] if name != "arm"]
    return [{"quantity": name} | {arm: column[name] for arm, column in columns.items()} for name in names]


def step_rows(arms: Sequence[Curves]) -> list[dict[str, Any]]:
    """A row per step and arm: means over seeds and prompts."""
    return [
        {"step": step, "arm": curves.arm}
        | {name: round(float(curves.mean(name)[i]), 4) for name in MEASURES}
        | {"velocity drift": round(float(curves.drift.mean(0)[i]), 4)}
        for i, step in enumerate(arms[0].steps)
        for curves in arms
    ]


def draw_curves(arms: Sequence[Curves], path: Path) -> None:
    """A panel per measure: arms' means over seeds in bold, each seed thin; dotted where over-optimisation begins."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 4).flat
    for panel, name in zip(panels, (*MEASURES, "velocity drift"), strict=True):
        for curves in arms:
            lines = curves.drift if name == "velocity drift" else curves.by_seed(name)
            colour = COLOURS[curves.arm]
            for line in lines:
                panel.plot(curves.steps, line, color=colour, linewidth=0.8, alpha=0.4)
            panel.plot(curves.steps, lines.mean(0), color=colour, linewidth=2.2, label=curves.arm)
        if name == "content":
            for drop in DROPS:
                panel.axhline(arms[0].mean("content")[0] - drop, color="#888888", linewidth=0.9, linestyle=":")
        if name in LOOKS and max(curves.mean(name).max() for curves in arms) > 0.8:
            panel.axhline(1.0, color="#888888", linewidth=0.9, linestyle=":")
        panel.set_title(name.replace("_", " ").capitalize(), fontsize=11)
        panel.grid(color="#e8e8e8", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    for panel in figure.axes[4:]:
        panel.set_xlabel("step", fontsize=9)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(arms), frameon=False
    )
    FigureCanvasAgg(figure).print_png(str(path))


def arm_sentence(curves: Curves) -> str:
    """What an arm's curves say about over-optimisation."""
    content, relative = curves.mean("content"), curves.mean("relative")
    crossing = content_crossing(curves.steps, content, DROPS[0])
    told = f"{curves.arm}: content {content[0]:.3f} to {content[-1]:.3f}, look {curves.mean('look')[0]:.2f} to"
    told += f" {curves.mean('look')[-1]:.2f}, relative reward {relative[0]:.3f} to {relative[-1]:.3f}; "
    if crossing is None:
        return told + f"content never more than {DROPS[0] * 100:.0f} points below the base"
    index = curves.steps.index(crossing)
    rises = "was at its highest so far" if relative[index] > relative[:index].max() else "had been higher before"
    lost = curves.change("content", index)
    sure = "" if lost.high < 0 else ", within what chance gives"
    return (
        told
        + f"content {-lost.estimate * 100:.1f} points down at step {crossing}{sure}, when the relative reward {rises}"
    )


def inversion_finding(arms: Sequence[Curves]) -> str:
    """Both arms, their difference at the last step, and how they differ beside the branch."""
    both, alone = arms
    seeds, _, prompts = both.scores["content"].shape
    differences = []
    for name in ("content", "exact", "look", "natural_colour", "relative"):
        found = bootstrap_runs_ci(list(alone.scores[name][:, -1] - both.scores[name][:, -1]), same_prompts=True)
        differences.append(f"{name} {found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
    return (
        f"{'; '.join(arm_sentence(curves) for curves in arms)}. Denoise only less both branches at step"
        f" {both.steps[-1]}: {', '.join(differences)}. Means over {seeds} seed{'s' if seeds > 1 else ''} and {prompts}"
        " held-out prompts with 95 % intervals over both; prompts, noise and levels are the same in either arm. Without"
        " inversion a step costs one gradient instead of two and the loss of its branch counts fully instead of half;"
        " AdamW's steps hardly depend on that factor."
    )


def check_inversion(
    preset: str, overrides: Sequence[str], out: Path, prompts: int, steps: int | None, seeds: Sequence[int], every: int
) -> list[dict[str, Any]]:
    """Train what is missing of every arm and seed; inversion.png and inversion.json in `out`; the claims."""
    runs: dict[str, list[RunData]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            config = arm_config(preset, overrides, out / "inversion", arm, seed, steps, prompts, every)
            runs[arm].append(finish_run(config))
    arms = collect(runs, config.optim.steps)
    draw_curves(arms, out / "inversion.png")
    record = {
        curves.arm: {
            "steps": curves.steps, "seeds": list(seeds), "velocity_drift": curves.drift.tolist(),
            "scores": {name: values.tolist() for name, values in curves.scores.items()},
        }
        for curves in arms
    }  # fmt: skip
    write_atomic(out / "inversion.json", json.dumps(record))
    return [
        {
            "name": "inversion",
            "title": "Training with and without the inversion branch",
            "finding": inversion_finding(arms),
            "rows": summary_rows(arms),
            "image": "inversion.png",
        },
        {
            "name": "inversion-steps",
            "title": "With and without the inversion branch, step by step",
            "finding": "Means over seeds and held-out prompts; step 0 is the base model.",
            "rows": step_rows(arms),
        },
    ]
