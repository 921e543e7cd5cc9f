"""Pictures of the graphs for ComfyUI's template browser: workflows/NAME.jpg.

    COMFYUI_PATH=~/ComfyUI python scripts/workflow_pictures.py [NAME ...]

starts a server of its own and runs the miniature graphs: their pictures show what came out. A graph for FLUX.1-dev,
which takes files that are not here, is shown as a map of itself.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comfyui_server import Server  # noqa: E402
from graphs import prompt, schemas  # noqa: E402
from graphs.layout import NEVER, NOTE, TITLE  # noqa: E402

from srpo_core.lettering import font  # noqa: E402

FOLDER = ROOT / "workflows"
SIDE = 512
"""Pixels: the template browser shows squares."""
MAP_HEIGHT = 200
PAPER, INK, NODE = "#1d1f25", "#e8e8ea", "#45474f"
WIRES = {"MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
         "IMAGE": "#64b5f6", "SRPO_REWARD": "#7fd0a8", "LORA_MODEL": "#e0a35c", "SRPO_PROMPTS": "#8fc1e3",
         "SRPO_WORDS": "#8fc1e3"}  # fmt: skip
Pictures = dict[str, list[Image.Image]]
"""What each kind of node showed."""


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def pictures_of(server: Server, name: str) -> Pictures:
    """Run a graph; what its nodes show, by their types, those of one type in the order of their numbers."""
    nodes = prompt.prompt_of(read(name), schemas.load())
    result = server.run(nodes)
    if result.status != "success":
        raise SystemExit(f"{name}: {result.error}")
    found: Pictures = {}
    for id, node in nodes.items():
        for entry in result.outputs.get(id, {}).get("images", ()):
            image = Image.open(io.BytesIO(server.view(entry))).convert("RGB")
            found.setdefault(node["class_type"], []).append(image)
    return found


def sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in a grid that fills the square's width, on paper, in the middle."""
    width = SIDE // columns
    small = [one.resize((width, round(one.height * width / one.width)), Image.Resampling.LANCZOS) for one in images]
    height = small[0].height
    rows = -(-len(small) // columns)
    card = Image.new("RGB", (SIDE, SIDE), PAPER)
    top = (SIDE - rows * height) // 2
    for i, one in enumerate(small):
        card.paste(one, (i % columns * width, top + i // columns * height))
    return card


def halves(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """The middle halves of two cards, one above the other."""
    card = Image.new("RGB", (SIDE, SIDE), PAPER)
    for i, one in enumerate((upper, lower)):
        card.paste(one.crop((0, SIDE // 4, SIDE, SIDE * 3 // 4)), (0, i * SIDE // 2))
    return card


RESULTS: dict[str, Callable[[Pictures], Image.Image]] = {
    "SRPO-workflow-miniature": lambda shown: sheet(shown["SaveImage"], 1),
    "score_images-miniature": lambda shown: sheet(shown["SRPORelativeScore"], 2),
    "best_of_n-miniature": lambda shown: halves(sheet(shown["SRPOScoreImages"], 4), sheet(shown["SaveImage"], 2)),
    "align_preview-miniature": lambda shown: sheet(shown["SRPOAlignPreview"], 1),
    "compare_lora-miniature": lambda shown: sheet(shown["SRPOCompare"][:6], 2),
    "train_miniature": lambda shown: sheet(shown["SRPOCompare"][:6], 2),
}
"""How the results of a graph become its picture."""


def map_of(name: str) -> Image.Image:
    """A graph's frames, nodes and wires, and what the frames are called; the browser's badge covers the upper left."""
    workflow = read(name)
    card = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen = ImageDraw.Draw(card)
    pen.text((SIDE - 24, 28), "FLUX.1-dev", INK, font(30), anchor="ra")
    bottom = _draw_graph(pen, workflow, 92)
    for i, frame in enumerate(workflow["groups"][1:]):
        title = frame["title"].partition("  (")[0]
        y = bottom + 22 + 35 * i
        pen.rectangle((24, y + 4, 42, y + 22), frame["color"])
        pen.text((54, y), title, INK, font(20, title))
    return card


def _draw_graph(pen: ImageDraw.ImageDraw, workflow: dict, top: float) -> float:
    """Draw frames, wires and nodes below `top`, as large as fits; where they end."""
    frames = [group["bounding"] for group in workflow["groups"]]
    height = max(y + height for _, y, _, height in frames)
    width = max(x + width for x, _, width, _ in frames)
    scale = min((SIDE - 32) / width, MAP_HEIGHT / height)
    left = (SIDE - width * scale) / 2

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * scale, top + y * scale

    for group in workflow["groups"]:
        x, y, w, h = group["bounding"]
        pen.rounded_rectangle((*at(x, y), *at(x + w, y + h)), 4, _mixed(group["color"], PAPER, 0.4))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, slot, target, position, kind in workflow["links"]:
        start, end = nodes[source], nodes[target]
        points = at(start["pos"][0] + start["size"][0], start["pos"][1] + 20 * slot + 10)
        pen.line((*points, *at(end["pos"][0], end["pos"][1] + 20 * position + 10)), WIRES.get(kind, "#9a9ca5"), 1)
    for node in workflow["nodes"]:
        (x, y), (w, h) = node["pos"], node["size"]
        colour = "#0c0d10" if node["type"] == NOTE else _mixed(NODE, PAPER, 0.4 if node["mode"] == NEVER else 1.0)
        pen.rounded_rectangle((*at(x, y - TITLE), *at(x + w, y + h)), 2, colour)
    return top + height * scale


def _mixed(colour: str, other: str, share: float) -> tuple[int, ...]:
    """`share` of a colour and the rest of another, both as #rrggbb."""
    pairs = [(int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return tuple(round(share * one + (1 - share) * two) for one, two in pairs)


def main(names: list[str]) -> None:
    names = names or sorted(file.stem for file in FOLDER.glob("*.json"))
    cards = {name: map_of(name) for name in names if name not in RESULTS}
    if len(cards) < len(names):
        with tempfile.TemporaryDirectory() as base:
            server = Server(Path(base))
            try:
                server.wait()
                cards |= {name: RESULTS[name](pictures_of(server, name)) for name in names if name in RESULTS}
            finally:
                server.stop()
    for name, card in cards.items():
        card.save(FOLDER / f"{name}.jpg", quality=88, optimize=True)
        print(f"{name}.jpg: {(FOLDER / f'{name}.jpg').stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
