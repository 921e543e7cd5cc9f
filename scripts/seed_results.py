"""Several seeds of the miniature, pooled: the numbers and the picture of the README.

    for s in 0 1 2; do srpo train miniature seed=$s output.dir=runs/seed-$s; done
    python scripts/seed_results.py runs/seed-0 runs/seed-1 runs/seed-2 [--out scripts/results]

Writes <out>/seeds.json (per measure: before, after, paired difference and effect size with 95 % intervals over seeds
and prompts, share of prompts on which it rose; per run: means, seconds and machine) and <out>/before_after.jpg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from srpo_core.config import ConfigError
from srpo_core.files import write_atomic
from srpo_core.intervals import Interval
from srpo_core.metrics import read_metrics
from srpo_core.report.compare import changes
from srpo_core.report.data import read_run

COLUMNS = 12


def numbers(interval: Interval) -> list[float]:
    """[estimate, low, high]."""
    return [round(value, 4) for value in astuple(interval)]


def pooled(folders: list[Path]) -> dict[str, Any]:
    """What changed over all runs, and what each run was."""
    runs = [read_run(folder) for folder in folders]
    unfinished = [str(run.folder) for run in runs if run.evaluation is None]
    if unfinished:
        raise ConfigError(f"no finished evaluation in {', '.join(unfinished)}")
    table = {
        change.name: {
            "before": round(change.before, 4),
            "after": round(change.after, 4),
            "difference": numbers(change.difference),
            "effect size d": numbers(change.effect),
            "rose": numbers(change.rose),
        }
        for change in changes([run.evaluation for run in runs])
    }
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "measures": table,
        "runs": [*map(_run, folders)],
    }


def _run(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    means = {
        name: {when: round(sum(evaluation[when][name]) / len(values), 4) for when in ("before", "after")}
        for name, values in evaluation["before"].items()
    }
    seconds = sum(line["seconds"].get("total", 0.0) for line in read_metrics(folder))  # a killed step has no total
    return {
        "seed": record["seed"],
        "training seconds": round(seconds, 1),
        "means": means,
        "made_with": record["made_with"],
    }


def before_after(folder: Path) -> Image.Image:
    """The first pictures of a run's evaluation, before above after."""
    rows = [
        [Image.open(folder / "evaluation" / when / f"{i:03d}.png") for i in range(COLUMNS)]
        for when in ("before", "after")
    ]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (COLUMNS * width, 2 * height + 8), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * (height + 8)))
    return sheet


def main() -> None:
    """Pool the runs, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs that differ in their seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = parser.parse_args()
    result = pooled(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "seeds.json", json.dumps(result, indent=1) + "\n")
    before_after(args.runs[0]).save(args.out / "before_after.jpg", quality=90)
    for name, row in result["measures"].items():
        print(f"{name:16}", "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
