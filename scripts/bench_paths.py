"""How much the miniature learns by the exact path and by the fast one, on the device that is there.

    PYTHONPATH=. python scripts/bench_paths.py --folder /tmp/paths --out paths.json [--seeds 3] [--at-once 6]
    PYTHONPATH=. python scripts/bench_paths.py --folder /tmp/parts --ways lora --paths "fp8 rollouts" bfloat16
    PYTHONPATH=. python scripts/bench_paths.py --folder /tmp/mine --paths --path "mine: rollout.calls=4"

Trains the preset `miniature` with each seed by the exact path and by others, all weights and as a LoRA, and compares
what that changed on the held-out prompts: effect sizes with 95 % intervals over seeds and prompts, and the difference
of the changes, prompt by prompt. The path `fast` is all at once that makes FLUX.1-dev's steps fast and small: compiled
blocks, rollouts in fp8 by half of the calls, products in bfloat16; with all weights also these and their moments in
fewer bits. The others are parts of it, to see what costs learning.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bench_load import machine
from seed_results import numbers, pooled

from srpo_core.files import write_atomic
from srpo_core.intervals import bootstrap_runs_ci
from srpo_core.report.data import read_run

ROOT = Path(__file__).resolve().parents[1]
NARROW = ["model.trained_memory=bfloat16", "optim.states=8bit"]
PATHS = {
    "fast": ["model.dtype=bfloat16", "model.compile=true", "rollout.precision=fp8", "rollout.calls=6"],
    "bfloat16": ["model.dtype=bfloat16"],
    "fp8 rollouts": ["rollout.precision=fp8"],
    "half of the calls": ["rollout.calls=6"],
    "compiled": ["model.compile=true"],
}
"""By name: what differs from the exact path."""
WAYS = {
    "all": (["lora.rank=0", "optim.lr=2e-5"], NARROW),
    "lora": ([], []),
}
"""By name: settings of every path, and further ones of the fast one."""
MEASURES = ("look", "relative", "sgp", "reward", "content", "exact", "judge_liked")


def train(folder: Path, settings: list[str], log: Path) -> float:
    """A run in a process of its own; its seconds. RuntimeError with what it said last if it fails."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "srpo_core", "train", "miniature", f"output.dir={folder}", *settings]
    with log.open("w", encoding="utf-8") as said:
        done = subprocess.run(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {log.read_text(encoding='utf-8')[-2000:]}")
    return time.perf_counter() - start


def beside(folders: dict[str, list[Path]]) -> dict[str, Any]:
    """By measure: each path's change, and how much more it is than the exact one's, prompt by prompt of one seed."""
    tables = {path: pooled(each)["measures"] for path, each in folders.items()}
    changes = {
        path: [
            {key: np.asarray(run.after[key]) - np.asarray(run.before[key]) for key in MEASURES if key in run.before}
            for run in (read_run(folder).evaluation for folder in each)
        ]
        for path, each in folders.items()
    }
    found: dict[str, Any] = {}
    for key in changes["exact"][0]:
        found[key] = {path: table[key] for path, table in tables.items()}
        for path in (one for one in folders if one != "exact"):
            more = [one[key] - other[key] for one, other in zip(changes[path], changes["exact"], strict=True)]
            found[key][f"{path} minus exact"] = numbers(bootstrap_runs_ci(more, True))
    return found


def main() -> None:
    """Train all, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the runs; each must not be there yet")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=6, help="runs that share the device")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--paths", nargs="*", choices=list(PATHS), default=["fast"], help="beside the exact one")
    parser.add_argument("--path", action="append", default=[], help='a path of your own, "name: key=value key=value"')
    parser.add_argument("--set", nargs="*", default=[], help="settings of all runs, such as optim.steps=8")
    args = parser.parse_args()
    own = {name: settings.split() for name, settings in (one.split(": ", 1) for one in args.path)}
    paths = {"exact": [], **{name: PATHS[name] for name in args.paths}, **own}
    args.folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, list[Path]]] = {}
    jobs = []
    for way in args.ways:
        common, narrow = WAYS[way]
        for path, settings in paths.items():
            for seed in range(args.seeds):
                folder = args.folder / f"{way}-{path.replace(' ', '-')}-{seed}"
                runs.setdefault(way, {}).setdefault(path, []).append(folder)
                shared = [f"seed={seed}", "parallel.share_gpu=true", *args.set]
                further = narrow if path == "fast" else []
                jobs.append((folder, [*common, *settings, *further, *shared], folder.with_suffix(".log")))
    with ThreadPoolExecutor(args.at_once) as pool:
        seconds = dict(zip((folder.name for folder, *_ in jobs), pool.map(lambda job: train(*job), jobs), strict=True))
    result = {
        "machine": machine("PYTHONPATH=. python scripts/bench_paths.py --folder FOLDER --out paths.json"),
        "runs": {name: round(each, 1) for name, each in seconds.items()},
        "ways": {way: beside(folders) for way, folders in runs.items()},
    }
    if args.out is not None:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    for way, table in result["ways"].items():
        for key, row in table.items():
            sizes = {name: row[name]["effect size d"] for name in paths}
            more = {name: row[f"{name} minus exact"] for name in paths if name != "exact"}
            print(f"{way} {key}: effect sizes {sizes}, more than the exact path's {more}", flush=True)


if __name__ == "__main__":
    main()
