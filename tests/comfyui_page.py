"""ComfyUI's real page in a headless Chromium, driven through its own `app`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from comfyui_server import NAME, Server

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False,
    "Comfy.RightSidePanel.IsOpen": False, "Comfy.Workflow.ShowMissingModelsWarning": False,
}  # fmt: skip
"""Of a user who has been here before: no dialogue opens by itself."""
TRAINING_LIMIT = 300
"""Seconds until what a short run does can be seen."""
START_LIMIT, RUN_LIMIT = 120_000, 300_000
"""Milliseconds for the page to be there, and for a graph to have run, on a busy machine."""

QUEUE = """async () => {
  window.srpoEnd = undefined;
  for (const type of ["execution_success", "execution_error", "execution_interrupted"])
    app.api.addEventListener(type, ({ detail }) => (window.srpoEnd ??= { type, detail: detail.exception_message }), {
      once: true,
    });
  await app.queuePrompt(0, 1);
  if (Object.keys(app.lastNodeErrors ?? {}).length) window.srpoEnd = { type: "refused", detail: app.lastNodeErrors };
}"""
LOADED = """() => {
  app.canvas.draw(true, true);  // a node loads its pictures when it is drawn
  const nodes = LiteGraph.vueNodesMode ? [] : app.canvas.visible_nodes;
  const waiting = nodes.filter((node) => app.nodeOutputs[node.id]?.images?.length && !node.imgs?.length);
  const images = [...nodes.flatMap((node) => node.imgs ?? []), ...document.querySelectorAll("[data-node-id] img")];
  return !waiting.length && images.every((image) => image.complete);
}"""
RESULTS = """(id) => {
  const element = app.graph.getNodeById(id)?.widgets?.find((widget) => widget.name === "srpo_results")?.element;
  if (!element) return null;
  const texts = (parent, selector) => [...parent.querySelectorAll(selector)].map((found) => found.textContent);
  return {
    texts: texts(element, "p:not(.note)"), notes: texts(element, "p.note"), titles: texts(element, "header span"),
    tables: [...element.querySelectorAll("table")].map((table) => ({
      columns: texts(table, "th button"), rows: [...table.tBodies[0].rows].map((row) => texts(row, "td")),
    })),
  };
}"""

TRAINING = """(box) => {
  const seen = (selector) => [...box.querySelectorAll(selector)].filter((found) => found.checkVisibility());
  const text = (selector) => seen(selector)[0]?.textContent ?? "";
  const image = seen("figure img")[0];
  return {
    name: text("header strong"), status: text(".srpo-run .srpo-status"), left: text("header .left"), line: text(".now"),
    percent: Number(seen("[role=progressbar]")[0]?.ariaValueNow), error: text(".error"), said: text(".said"),
    idle: text(".srpo-live > p"), refusal: text(".srpo-live > .error"), log: text(".log"),
    buttons: seen("footer .srpo-button").map((button) => button.textContent),
    plan: seen(".srpo-run tr").map((row) => [...row.cells].map((cell) => cell.textContent)),
    legends: seen(".legend").map((legend) => Object.fromEntries([...legend.querySelectorAll("span:has(b)")].map(
      (entry) => [entry.childNodes[1].textContent, Number(entry.querySelector("b").textContent)]))),
    tabs: seen(".srpo-chart nav").map((nav) => [...nav.querySelectorAll("button, option:not([hidden])")].map(
      (tab) => tab.textContent)),
    curves: seen(".srpo-chart svg").map((svg) => svg.querySelectorAll("path.line").length),
    preview: image?.naturalWidth ? image.getAttribute("src") : "",
    caption: text("figcaption span"),
  };
}"""
"""What stands in the view of a training, as far as it can be seen."""


def browser_path() -> str | None:
    """A Chromium of this machine: what CHROMIUM names, or one on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def missing() -> str:
    """Why pages can't be driven here; empty if they can."""
    if importlib.util.find_spec("playwright") is None:
        return "the Python package playwright is not installed"
    return "" if browser_path() else f"no Chromium: set CHROMIUM, or install one of {', '.join(BROWSERS)}"


class ComfyPage:
    """A page of a running server. `errors`: the exceptions that it threw, and what the pack's script complained of."""

    def __init__(self, page: Any, server: Server) -> None:
        self.page, self.server, self.errors = page, server, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._listen)

    def _listen(self, message: Any) -> None:
        ours = f"/extensions/{NAME}/" in message.location.get("url", "") or message.text.startswith("SRPO")
        looked_for = message.text.startswith("Failed to load")  # a help page in the page's own language
        if message.type == "error" and ours and not looked_for:
            self.errors.append(message.text)

    def open(self) -> None:
        """Until the nodes are registered and the first graph is there."""
        self.page.goto(self.server.url, wait_until="domcontentloaded")
        self.ready()

    def reload(self) -> None:
        self.page.reload(wait_until="domcontentloaded")
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_function(
            "Boolean(window.app?.extensionManager?.workflow?.activeWorkflow && app.graph?.nodes?.length"
            " && window.LiteGraph?.registered_node_types.SRPOMiniature)",
            timeout=START_LIMIT,
        )

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a graph in a tab of its own."""
        self.page.evaluate("async (workflow) => { await app.loadGraphData(workflow) }", workflow)

    def serialized(self) -> dict[str, Any]:
        """The graph as the page would save it."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def unknown_types(self) -> list[str]:
        """Types of nodes in the graph that the page has no node for."""
        return self.page.evaluate(
            "() => app.graph.nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type])"
        )

    def run(self) -> dict[str, Any]:
        """Queue the graph as the Run button does and wait for its end: its type, and what was said if it failed."""
        self.queue()
        return self.end()

    def queue(self) -> None:
        """Queue the graph as the Run button does."""
        self.page.evaluate(QUEUE)

    def end(self) -> dict[str, Any]:
        """Wait for the end of what was queued: its type, and what was said if it failed."""
        self.page.wait_for_function("window.srpoEnd !== undefined", timeout=RUN_LIMIT)
        return self.page.evaluate("window.srpoEnd")

    def outputs(self) -> dict[str, dict[str, Any]]:
        """What each node of the graph has shown, by its id."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.nodeOutputs))")

    def results(self, node: int | str) -> dict[str, Any] | None:
        """Tables and texts that stand under a node; None if there is nothing."""
        return self.page.evaluate(RESULTS, node)

    def box(self, node: int | str) -> Any:
        """The element with a node's tables and texts."""
        find = "(id) => app.graph.getNodeById(id).widgets.find((widget) => widget.name === 'srpo_results').element"
        return self.page.evaluate_handle(find, node).as_element()

    def add(self, kind: str, **values: Any) -> int:
        """Put a node of a type into the middle of an empty graph, with these values of its widgets; its id."""
        return self.page.evaluate(
            """async ([kind, values]) => {
              app.graph.clear();
              for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame); // elements of old nodes go
              app.canvas.ds.reset();
              app.canvas.ds.scale = 0.6; // all of SRPO Train can be seen
              const node = LiteGraph.createNode(kind);
              node.pos = [500, 120];
              app.graph.add(node);
              for (const [name, value] of Object.entries(values))
                node.widgets.find((widget) => widget.name === name).value = value;
              node.setSize([460, node.size[1]]);
              app.canvas.draw(true, true);
              return node.id;
            }""",
            [kind, values],
        )

    def live_box(self, node: int | str) -> Any:
        """The element with the view of a training in a node."""
        find = "(id) => app.graph.getNodeById(id).widgets.find((widget) => widget.name === 'srpo_run').element"
        return self.page.evaluate_handle(find, node).as_element()

    def show(self, kind: str = "SRPOTrainingStatus", **values: Any) -> Any:
        """Put a node alone into the graph: the element with its view of a training."""
        node = self.add(kind, **values)
        self.settled()
        return self.live_box(node)

    def training(self, box: Any) -> dict[str, Any]:
        """What stands in an element's view of a training."""
        return self.page.evaluate(TRAINING, box)

    def until_training(self, box: Any, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What stands in a view of a training, once it is as asked. AssertionError if that doesn't come."""
        end = time.monotonic() + TRAINING_LIMIT
        while time.monotonic() < end:
            shown = self.training(box)
            if condition(shown):
                return shown
            self.page.wait_for_timeout(100)
        raise AssertionError(f"the view stays as it is: {shown}")

    def settled(self) -> None:
        """Until all pictures under nodes that can be seen are loaded and drawn."""
        self.page.wait_for_function(LOADED)
        self.page.evaluate(
            """async () => {
              const frame = () => new Promise((done) => requestAnimationFrame(done));
              for (let i = 0; i < 4; i++) { app.canvas.draw(true, true); await frame(); }
            }"""
        )

    def look_at(self, node: int | str) -> None:
        """Bring a node with tables or texts to the middle, in its full size, until they can be seen."""
        self.page.evaluate(
            """(id) => {
              app.canvas.ds.scale = 1;
              app.canvas.centerOnNode(app.graph.getNodeById(id));
            }""",
            node,
        )
        self.settled()
        self.page.wait_for_function("(box) => box.isConnected && box.clientHeight > 0", arg=self.box(node))

    def command(self, name: str) -> None:
        """Run one of the page's commands."""
        self.page.evaluate("(name) => app.extensionManager.command.execute(name)", name)

    def fit(self) -> None:
        """Show the whole graph."""
        self.command("Comfy.Canvas.FitView")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), headless=True, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def comfy_page(
    browser: Any, server: Server, vue_nodes: bool = False, size: tuple[int, int] = (1500, 950), theme: str = "dark"
) -> Iterator[ComfyPage]:
    """The server's page, with nodes drawn on the canvas or (`vue_nodes`) as elements of the page."""
    server.send("/settings", SETTINGS | {"Comfy.VueNodes.Enabled": vue_nodes, "Comfy.ColorPalette": theme})
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    try:
        one = ComfyPage(context.new_page(), server)
        one.open()
        yield one
    finally:
        context.close()
