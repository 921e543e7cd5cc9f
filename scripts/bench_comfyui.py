"""What this pack costs in a real ComfyUI server: seconds and memory of its graphs, printed and written as JSON.

    export COMFYUI_PATH=/path/to/ComfyUI PYTHONPATH=.           (its Python runs this script too)
    python scripts/bench_comfyui.py --cpu --out comfyui.json                               the miniature, anywhere
    python scripts/bench_comfyui.py --full-size --base /big/disk/base --out comfyui.json   on an NVIDIA GPU

`--full-size` makes files of random weights in the shapes of FLUX.1-dev, its text encoders and HPS v2.1 below --base
(36 GB, and 12 GB of a scaled-fp8 copy) and runs the graphs of workflows/ as they are; --base may instead be the folder
of a ComfyUI that has the real files. Device memory is what the driver says is taken by all programs. A part that fails
is a row with its error; the others still run. Servers' logs are kept in --base.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import bench_comfyui_files as files
from bench_comfyui_memory import process_seconds, smaller_card
from bench_comfyui_refusals import refusals
from bench_comfyui_run import Bench, Graph, Row, changed, nodes_of, reseeded
from bench_comfyui_training import training

STARTS = 3
"""Starts of the server with the pack and as many without, in turn."""
PICTURES = 4
"""Pictures that are scored to see what a reward takes."""


class Parts:
    """The parts of the benchmark, by name; each is a method that adds rows."""

    def __init__(self, full: bool, card_gib: float, comfyui: Path) -> None:
        self.full, self.card_gib, self.comfyui = full, card_gib, comfyui
        self.suffix = "" if full else "-miniature"

    def start(self, bench: Bench) -> None:
        """From the process's start to the first answer, with the pack and without any: by the clock, of a processor."""
        found: dict[str, list[list[float]]] = {"with the pack": [], "without": []}
        for _ in range(STARTS):
            for name, extra in (("with the pack", ()), ("without", ("--disable-all-custom-nodes",))):
                server = bench.start(*extra)
                found[name].append([round(bench.start_seconds, 2), process_seconds(server.process.pid)])
        own = re.findall(r"([\d.]+) seconds[^:]*: \S*ComfyUI-SRPO", bench.start().log())
        medians = {
            name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()
        }
        bench.add("start: [seconds, processor seconds]", runs=found, medians=medians, import_seconds_in_log=own)

    def files(self, bench: Bench) -> None:
        """Files of random weights, where they are missing."""
        files.make(bench.base, self.comfyui, tiny=not self.full)
        made = [path for path in (bench.base / "models").rglob("*") if path.is_file()]
        bench.add("files", gigabytes={path.name: round(path.stat().st_size / 1e9, 2) for path in made})

    def workflow(self, bench: Bench) -> None:
        """SRPO-workflow: cold, with another seed, and unchanged."""
        graph = reseeded(bench.graph(f"SRPO-workflow{self.suffix}"))
        result = bench.run("SRPO-workflow, first picture: models are loaded", graph)
        bench.add("its picture", **_picture(bench, result.outputs))
        bench.run("SRPO-workflow, another seed", reseeded(graph))
        bench.run("SRPO-workflow, another seed again", last := reseeded(graph))
        bench.run("SRPO-workflow, nothing changed", last)

    def interrupt(self, bench: Bench) -> None:
        """From POST /interrupt, sent at a step, to the message that the graph has ended."""
        for step in (2, 10, 30):
            _interrupted(bench, reseeded(bench.graph(f"SRPO-workflow{self.suffix}")), f"at step {step}", step)

    def score_images(self, bench: Bench) -> None:
        """score_images with the reward still to load, then with another prompt."""
        graph = bench.graph(f"score_images{self.suffix}")
        bench.run("score_images, first: the reward is loaded", graph)
        kind = "PrimitiveStringMultiline"
        bench.run("score_images, another prompt", changed(graph, kind, value="a glass of water on a table"))

    def reward_memory(self, bench: Bench) -> None:
        """What a reward takes and gives back, by its offload policy."""
        bench.free("POST /free before")
        for offload in ("when needed", "after use"):
            for amount in (PICTURES, PICTURES + 1):
                graph = _score_graph(self.reward, offload, amount)
                bench.run(f"{self.reward} scores {amount} pictures, offload {offload!r}", graph)
            bench.free(f"POST /free after offload {offload!r}")

    def best_of_n(self, bench: Bench) -> None:
        bench.run("best_of_n", reseeded(bench.graph(f"best_of_n{self.suffix}")))

    def align_preview(self, bench: Bench) -> None:
        bench.run("align_preview", reseeded(bench.graph(f"align_preview{self.suffix}")))

    def compare_lora(self, bench: Bench) -> None:
        bench.run("compare_lora", reseeded(bench.graph(f"compare_lora{self.suffix}")))

    def free(self, bench: Bench) -> None:
        """Everything that was loaded leaves the GPU."""
        bench.free()

    def fp8(self, bench: Bench) -> None:
        """The scaled-fp8 copy that SRPO Load Checkpoint makes: interrupted, made, drawn with."""
        folder = bench.base / "models" / "diffusion_models" / Path(files.SRPO_FILE).parent
        before = set(folder.rglob("*"))
        load = _load_graph("scaled fp8")
        if not any("fp8" in path.name for path in before):
            after = 3.0 if self.full else 0.0
            _interrupted(bench, load, f"{after:g} s after the conversion's start", after=after)
            bench.add("left of it on the disk", paths=[str(path) for path in set(folder.rglob("*")) - before])
        result = bench.run("SRPO Load Checkpoint, scaled fp8: the copy is made", load)
        made = {path.name: path.stat().st_size for path in set(folder.rglob("*")) - before if path.is_file()}
        bench.add("the copy", bytes=made, shown=str(result.outputs)[:600])
        bench.run("SRPO Load Checkpoint, as stored", _load_graph("as stored"))
        if self.full:
            graph = _checkpoint(bench.graph("SRPO-workflow"), "scaled fp8")
            bench.run("SRPO-workflow in scaled fp8, first", reseeded(graph))
            bench.run("SRPO-workflow in scaled fp8, another seed", reseeded(graph))

    def training(self, bench: Bench) -> None:
        """SRPO Train: a whole training after a picture, the result in use, and Cancel."""
        training(bench, self.full)

    def refusals(self, bench: Bench) -> None:
        """SRPO Train on a device where another run trains, and on a card with too little memory for it."""
        refusals(bench, self.full, self.card_gib)

    def small_card(self, bench: Bench) -> None:
        """SRPO-workflow with a reward's score, in scaled fp8 and then as stored, on a card with little memory."""
        bench.stop()
        with smaller_card(self.card_gib) as free:
            bench.add("another program holds the rest of the memory", free_gib=free)
            bench.start()
            for weights in ("scaled fp8", "as stored"):
                graph = _scored(_checkpoint(bench.graph("SRPO-workflow"), weights), self.reward)
                bench.run(f"SRPO-workflow, {weights}, with {self.reward}'s score, first", reseeded(graph))
                bench.run(f"SRPO-workflow, {weights}, with {self.reward}'s score, again", reseeded(graph))
            bench.stop()

    @property
    def reward(self) -> str:
        return "hpsv2" if self.full else "miniature"

    @property
    def default(self) -> list[str]:
        """Names in order: what another part needs comes before it."""
        names = ["workflow", "interrupt", "score_images", "reward_memory", "best_of_n", "align_preview"]
        names += ["compare_lora", "free"]
        trained = ["training", "refusals"]
        return ["files", *names, "fp8", *trained, "small_card"] if self.full else ["start", *names, *trained]


def _picture(bench: Bench, outputs: Row) -> Row:
    """Size and spread of the first picture that a graph saved."""
    from PIL import Image, ImageStat

    shown = next(picture for output in outputs.values() for picture in output.get("images", []))
    picture = Image.open(BytesIO(bench.server.view(shown))).convert("RGB")
    statistic = ImageStat.Stat(picture)
    mean, std = ([round(value, 1) for value in values] for values in (statistic.mean, statistic.stddev))
    picture.resize((picture.width // 2, picture.height // 2)).save(bench.base / "picture.jpg", quality=80)
    return {"size": picture.size, "mean": mean, "std": std}


def _interrupted(bench: Bench, graph: Graph, when: str, step: int = 0, after: float = 0.0) -> None:
    """Run the graph, interrupt it at the first progress from a step and some seconds on, tell how long it went on."""
    sent: list[float] = []
    ended: list[float] = []

    def heard(event: Row) -> None:
        now = time.perf_counter()
        if event["type"] == "execution_interrupted":
            ended.append(now)
        if event["type"] == "progress" and event["data"]["value"] >= step and now - begin >= after and not sent:
            sent.append(now)
            bench.server.interrupt()

    begin = time.perf_counter()
    bench.run(f"interrupted {when}", graph, heard)
    latency = round(ended[0] - sent[0], 3) if sent and ended else None
    bench.add("from the interrupt to the graph's end", seconds=latency)


def _load_graph(weights: str) -> Graph:
    given = {"checkpoint": files.SRPO_FILE, "weights": weights}
    return {
        "1": {"class_type": "SRPOLoadCheckpoint", "inputs": given},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
    }


def _load_reward(name: str, offload: str) -> Row:
    given = {"reward": name, "file": "auto", "fit": "official", "device": "auto", "offload": offload}
    return {"class_type": "SRPOLoadReward", "inputs": given}


def _score(reward: str, images: list[object]) -> Row:
    given = {"reward": [reward, 0], "images": images, "prompt": "a red fox in the snow", "one_prompt_per_line": False}
    return {"class_type": "SRPOScoreImages", "inputs": given}


def _score_graph(reward: str, offload: str, amount: int) -> Graph:
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 1280, "height": 720, "batch_size": amount, "color": 0x708090},
        },
        "2": _load_reward(reward, offload),
        "3": _score("2", ["1", 0]),
    }


def _checkpoint(graph: Graph, weights: str) -> Graph:
    """The graph with SRPO Load Checkpoint in place of ComfyUI's own loader."""
    (loader,) = nodes_of(graph, "UNETLoader")
    return {**graph, loader: _load_graph(weights)["1"]}


def _scored(graph: Graph, reward: str) -> Graph:
    """The graph with its pictures scored."""
    (decoded,) = nodes_of(graph, "VAEDecode")
    return {**graph, "reward": _load_reward(reward, "when needed"), "score": _score("reward", [decoded, 0])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to which the results are added")
    parser.add_argument("--base", type=Path, help="ComfyUI's base directory: models, output, logs; default: a new one")
    parser.add_argument("--full-size", action="store_true", help="FLUX.1-dev and HPS v2.1 instead of the miniature")
    parser.add_argument("--cpu", action="store_true", help="run ComfyUI on the CPU")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, in this order")
    parser.add_argument("--card-gib", type=float, default=23.5, help="free memory of a small card")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no part is begun")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="arguments for ComfyUI; the last option")
    args = parser.parse_args()
    comfyui = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (comfyui / "main.py").is_file():
        parser.error("set COMFYUI_PATH to a checkout of ComfyUI")
    parts = Parts(args.full_size, args.card_gib, comfyui)
    names = args.parts or parts.default
    works: dict[str, Callable[[Bench], None]] = {name: getattr(parts, name, None) for name in names}
    if unknown := [name for name, work in works.items() if not callable(work)]:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(parts.default)}")
    base = args.base or Path(tempfile.mkdtemp(prefix="bench-comfyui-"))
    base.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    bench, begin = Bench(base, args.out, args.server, args.cpu), time.perf_counter()
    try:
        for name, work in works.items():
            if time.perf_counter() - begin > args.deadline:
                bench.add("not begun: the time is over", part_skipped=name)
                continue
            bench.run_part(name, work)
    finally:
        bench.stop()
    return int(any(row["what"] == "failed" or row.get("status") in ("error", "not refused") for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
