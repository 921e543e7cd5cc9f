"""Curves of a run's metrics; several runs are overlaid, a colour each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from srpo_core.columns import WORD
from srpo_core.report.charts import Series, line_chart, stacked_chart
from srpo_core.report.compare import measure_order
from srpo_core.report.data import RunData
from srpo_core.report.markup import section
from srpo_core.report.words import small

_HINT = (
    "All against the optimizer step. Previews are the fair signs of progress: fixed held-out prompts with fixed noise. "
    "The branches' scores pull against each other by design, so the loss stays close to flat."
)


def curves_section(runs: Sequence[RunData], label: Callable[[str], str]) -> str:
    """The section of curves, or a sentence where nothing is logged."""
    charts = [*_preview_charts(runs, label), *_training_charts(runs), *_cost_charts(runs)]
    charts = [chart for chart in charts if chart]
    if not charts:
        return section("curves", "Curves", "metrics.jsonl holds no steps yet.")
    missing = "" if any(line.get("preview") for run in runs for line in run.steps) else " There are no previews here."
    return section("curves", "Curves", _HINT + missing, f'<div class="charts">{"".join(charts)}</div>')


def _per_run(runs: Sequence[RunData], *keys: str, smooth: bool = False, marks: bool = False) -> list[Series]:
    return [Series(run.name, *run.series(*keys), colour=i, smooth=smooth, marks=marks) for i, run in enumerate(runs)]


def _branches(runs: Sequence[RunData], *keys: str) -> list[Series]:
    """A line per branch of a metric; with several runs, a colour per run and dashes for inversion."""
    lines = []
    for i, run in enumerate(runs):
        for j, branch in enumerate(run.config.align.branches):
            name = branch if len(runs) == 1 else f"{run.name}, {branch}"
            colour, dash = (j, False) if len(runs) == 1 else (i, branch == "inversion")
            lines.append(Series(name, *run.series(*keys, branch), colour=colour, dash=dash, smooth=True))
    return lines


def _mixture_charts(runs: Sequence[RunData]) -> list[str]:
    """Where several rewards are mixed: each one's own score and value."""
    names = dict.fromkeys(name for run in runs for line in run.trained for name in line.get("rewards") or {})
    charts = []
    for name in names:
        lines = _branches(runs, "scores", name)
        charts.append(line_chart(f"Score per branch: {name}", lines, note="this reward's part of the mixture"))
        lines = _branches(runs, "rewards", name)
        charts.append(line_chart(f"Reward of the preferred wording: {name}", lines, note="in its own range"))
    return charts


def _preview_charts(runs: Sequence[RunData], label: Callable[[str], str]) -> list[str]:
    names = dict.fromkeys(name for run in runs for line in run.steps for name in line.get("preview") or {})
    return [
        line_chart(f"Previews: {small(label(name))}", _per_run(runs, "preview", name, marks=True))
        for name in measure_order([name for name in names if not name.startswith(WORD)])
    ]


def _training_charts(runs: Sequence[RunData]) -> list[str]:
    config = runs[0].config
    clip = ("clipped above", config.optim.max_grad_norm)
    return [
        line_chart("Score per branch", _branches(runs, "score"),
                   note="(1 + k) · preferred wording − other wording, as trained on"),
        line_chart("Reward of the preferred wording", _branches(runs, "reward")),
        *_mixture_charts(runs),
        line_chart("Loss", _per_run(runs, "loss", smooth=True), note="close to flat by design: no sign of progress"),
        line_chart("Gradient norm before clipping", _per_run(runs, "grad_norm", smooth=True), clip, from_zero=True),
        line_chart("Velocity drift from the start", _per_run(runs, "velocity_drift", smooth=True), from_zero=True,
                   note="how far the model's predictions have moved from the untrained model's"),
        line_chart("Learning rate", _per_run(runs, "lr"), from_zero=True),
    ]  # fmt: skip


def _phases(run: RunData) -> tuple[list[int], dict[str, list[float]]]:
    """(steps, seconds of each phase at each step); what no phase accounts for is "other"."""
    lines = [line for line in run.trained if isinstance(line.get("seconds"), dict)]
    names = list(dict.fromkeys(name for line in lines for name in line["seconds"] if name != "total"))
    layers = {name: [float(line["seconds"].get(name) or 0.0) for line in lines] for name in names}
    totals = [float(line["seconds"].get("total") or 0.0) for line in lines]
    rest = [max(0.0, total - sum(layers[name][i] for name in names)) for i, total in enumerate(totals)]
    if sum(rest) > 0.01 * sum(totals):
        layers["other"] = rest
    kept = {name: values for name, values in layers.items() if sum(values) > 0.002 * max(sum(totals), 1e-9)}
    return [line["step"] for line in lines], kept


def _cost_charts(runs: Sequence[RunData]) -> list[str]:
    charts = []
    for run in runs[:4]:
        title = "Seconds per step" + (f" · {run.name}" if len(runs) > 1 else "")
        charts.append(stacked_chart(title, *_phases(run)))
    charts.append(line_chart("Peak memory, GiB", _per_run(runs, "peak_memory_gib"), from_zero=True))
    return charts
