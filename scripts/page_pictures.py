"""Pictures of ComfyUI's page for the README: graphs that have really run, the template browser, a help page.

    COMFYUI_PATH=~/ComfyUI python scripts/page_pictures.py [NAME ...]

starts a server of its own and a headless Chromium, and writes scripts/results/page_NAME.jpg. About six minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comfyui_page import ComfyPage, chromium, comfy_page, missing  # noqa: E402
from comfyui_server import NAME, Server  # noqa: E402
from comfyui_training import end_trainings  # noqa: E402

OUT = ROOT / "scripts" / "results"
WIDTH = 1600
"""Of the written pictures, in pixels."""
FRAME = """([margin, types]) => {
  const shown = app.graph.nodes.filter((node) => !types || types.includes(node.type));
  const boxes = shown.map((node) => node.getBounding());
  const left = Math.min(...boxes.map((box) => box[0])) - margin, top = Math.min(...boxes.map((box) => box[1])) - margin;
  const right = Math.max(...boxes.map((box) => box[0] + box[2])) + margin;
  const bottom = Math.max(...boxes.map((box) => box[1] + box[3])) + margin;
  const { width, height } = app.canvas.canvas.getBoundingClientRect();
  app.canvas.ds.scale = Math.min((width - 60) / (right - left), (height - 120) / (bottom - top), 1);
  app.canvas.ds.offset = [60 / app.canvas.ds.scale - left, 120 / app.canvas.ds.scale - top];
  app.canvas.setDirty(true, true);
  return [right - left, bottom - top].map((side) => side * app.canvas.ds.scale);
}"""
"""Puts all nodes, or those of some types, below and right of the page's bars; returns their size on the screen."""
SETTINGS_AND_TRAIN = [
    "SRPOPrompts", "SRPOControlWords", "SRPOLoadReward", "SRPORollout", "SRPOAlign", "SRPOOptimizer", "SRPOLoRA",
    "SRPOTrain",
]  # fmt: skip


def read(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def save(page: ComfyPage, name: str, clip: dict[str, float] | None = None) -> None:
    shot = Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")
    if shot.width > WIDTH:
        shot = shot.resize((WIDTH, round(shot.height * WIDTH / shot.width)), Image.Resampling.LANCZOS)
    shot.save(OUT / f"page_{name}.jpg", quality=88, optimize=True)
    print(OUT / f"page_{name}.jpg", shot.size)


def graph(page: ComfyPage, name: str) -> None:
    """A miniature graph with its results, as large as it is."""
    page.load(read(f"{name}-miniature"))
    end = page.run()
    if end["type"] != "execution_success":
        raise SystemExit(f"{name}: {end}")
    page.settled()
    page.page.locator("text=Job completed").first.wait_for(state="hidden", timeout=30_000)
    save(page, name, framed(page))


def framed(page: ComfyPage, types: list[str] | None = None) -> dict[str, float]:
    """The part of the page with the graph's nodes (those of some types), as large as they are."""
    width, height = page.page.evaluate(FRAME, [30, types])
    page.settled()
    size = page.page.viewport_size
    return {"x": 0, "y": 0, "width": min(width + 90, size["width"]), "height": min(height + 150, size["height"])}


def training(page: ComfyPage) -> None:
    """The miniature's training while it is at work: settings, and the live view in its node."""
    box = train(page)
    page.until_training(box, lambda shown: shown["percent"] >= 60 and "step=" in shown["preview"])
    save(page, "training", framed(page, SETTINGS_AND_TRAIN))
    ended(page)


def trained(page: ComfyPage) -> None:
    """The same at its end."""
    box = train(page)
    ended(page)
    page.until_training(box, lambda shown: shown["status"] == "Finished" and shown["preview"])
    save(page, "trained", framed(page, ["SRPORollout", "SRPOTrain"]))


def runs(page: ComfyPage) -> None:
    """The side panel with a training that has ended and one in the background, beside its graph."""
    train(page)
    ended(page)
    page.page.evaluate(
        """() => {
          const { widgets } = app.graph.nodes.find((node) => node.type === "SRPOTrain");
          const values = { name: "another-look", mode: "background", seed: 1 };
          for (const [name, value] of Object.entries(values)) widgets.find((one) => one.name === name).value = value;
        }"""
    )
    page.run()
    page.command("Workspace.ToggleSidebarTab.srpo-runs")
    panel = page.page.wait_for_selector(".srpo-runs")
    page.until_training(panel, lambda shown: shown["percent"] >= 60 and "another-look" in shown["preview"])
    framed(page, SETTINGS_AND_TRAIN)
    save(page, "runs")


def train(page: ComfyPage) -> Any:
    """Queue the graph that trains the miniature; the box of its live view."""
    workflow = read("train_miniature")
    page.load(workflow)
    page.queue()
    return page.live_box(next(node["id"] for node in workflow["nodes"] if node["type"] == "SRPOTrain"))


def ended(page: ComfyPage) -> None:
    end = page.end()
    if end["type"] != "execution_success":
        raise SystemExit(f"train_miniature: {end}")
    page.settled()
    page.page.locator("text=Job completed").first.wait_for(state="hidden", timeout=30_000)


def templates(page: ComfyPage) -> None:
    page.command("Comfy.BrowseTemplates")
    page.page.get_by_text(NAME, exact=True).click()
    page.page.wait_for_function(
        """() => [...document.querySelectorAll('[data-testid^="template-workflow-"] img')]
          .every((image) => image.complete && image.naturalWidth && !image.src.includes("default"))"""
    )
    save(page, "templates")


def help_page(page: ComfyPage) -> None:
    """A node with its results, and its help beside it."""
    workflow = read("score_images-miniature")
    page.load(workflow)
    page.run()
    node = next(node for node in workflow["nodes"] if node["type"] == "SRPORelativeScore")
    page.page.evaluate(
        """(id) => {
          const node = app.graph.getNodeById(id);
          app.canvas.ds.scale = 1.2;
          app.canvas.ds.offset = [250 - node.pos[0], 180 - node.pos[1]];
          app.canvas.draw(true, true);
        }""",
        node["id"],
    )
    page.settled()
    page.page.mouse.click(400, 200)  # its title
    page.page.locator('[data-testid="info-button"]').click()
    page.page.locator(".node-help-content h1").wait_for()
    page.settled()
    save(page, "help")


@contextlib.contextmanager
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as base:
        one = Server(Path(base))
        try:
            yield one.wait()
        finally:
            end_trainings(Path(base))  # they outlive the server
            one.stop()


PICTURES: dict[str, tuple[Callable[[ComfyPage], None], dict]] = {
    "compare_lora": (lambda page: graph(page, "compare_lora"), {"size": (2400, 1400)}),
    "align_preview": (lambda page: graph(page, "align_preview"), {"size": (2400, 1400)}),
    "best_of_n": (lambda page: graph(page, "best_of_n"), {"size": (2400, 1400)}),
    "score_images": (lambda page: graph(page, "score_images"), {"size": (2400, 1500), "vue_nodes": True}),
    "training": (training, {"size": (1700, 1500)}),
    "trained": (trained, {"size": (1100, 1500), "theme": "light"}),
    "runs": (runs, {"size": (1600, 1250), "vue_nodes": True}),
    "templates": (templates, {"size": (1500, 950)}),
    "help": (help_page, {"size": (1500, 950)}),
}
"""What is drawn, and on which page."""


def main(names: list[str]) -> None:
    if reason := missing():
        raise SystemExit(f"no page: {reason}")
    with server() as running, chromium() as browser:
        for name in names or PICTURES:
            draw, how = PICTURES[name]
            with comfy_page(browser, running, **how) as page:
                draw(page)


if __name__ == "__main__":
    main(sys.argv[1:])
