"""Write the graphs of workflows/ from their descriptions in scripts/graphs.

python scripts/build_workflows.py                                     with the nodes as last seen
python scripts/build_workflows.py --server http://127.0.0.1:8188      with a running ComfyUI's nodes, kept for next time
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from graphs import schemas
from graphs.drawing import best_of_n, srpo_workflow
from graphs.layout import Graph
from graphs.looking import align_preview, compare_lora, score_images
from graphs.schemas import Json, NodeSchema
from graphs.training import train_full, train_lora, train_miniature, train_photos
from graphs.world import FULL, MINIATURE, World

FOLDER = Path(__file__).parents[1] / "workflows"
GRAPHS: dict[str, Callable[[Graph, World], None]] = {
    "SRPO-workflow": srpo_workflow,
    "score_images": score_images,
    "best_of_n": best_of_n,
    "align_preview": align_preview,
    "compare_lora": compare_lora,
}
"""Graphs that draw and look; each has a twin for the miniature."""
TRAINING: dict[str, tuple[Callable[[Graph, World], None], World]] = {
    "train_lora": (train_lora, FULL),
    "train_full": (train_full, FULL),
    "train_photos": (train_photos, FULL),
    "train_miniature": (train_miniature, MINIATURE),
}


def build(known: dict[str, NodeSchema]) -> dict[str, Json]:
    """Every graph, by file name without suffix."""
    descriptions = dict(TRAINING)
    for name, describe in GRAPHS.items():
        descriptions |= {name: (describe, FULL), f"{name}-miniature": (describe, MINIATURE)}
    found = {}
    for name, (describe, world) in descriptions.items():
        graph = Graph(name, known)
        describe(graph, world)
        found[name] = graph.json()
    return found


def text_of(workflow: Json) -> str:
    """A graph's file: a line for each node, link and group, so that a change can be read."""
    parts = []
    for key, value in workflow.items():
        if key in ("nodes", "links", "groups"):
            lines = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in value)
            parts.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


class _Asked(dict):
    """Schemas fetched from a server when a graph first asks for them."""

    def __init__(self, server: str) -> None:
        super().__init__()
        self.server = server

    def __missing__(self, type: str) -> NodeSchema:
        self[type] = schemas.fetch(self.server, type)
        return self[type]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="address of a running ComfyUI that has this pack")
    options = parser.parse_args(arguments)
    known = _Asked(options.server) if options.server else schemas.load()
    workflows = build(known)
    if options.server:
        schemas.save(dict(sorted(known.items())))
    FOLDER.mkdir(exist_ok=True)
    for name, workflow in workflows.items():
        (FOLDER / f"{name}.json").write_text(text_of(workflow), encoding="utf-8")
        print(f"{name}.json: {len(workflow['nodes'])} nodes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
