"""The pack in ComfyUI's real page: graphs open and run there, results stand under their nodes, help opens."""

import json
import re

import pytest
from comfyui_page import missing
from comfyui_server import NAME, PACK
from comfyui_side import needs_comfyui
from PIL import Image

GRAPHS = sorted((PACK / "workflows").glob("*.json"))
MINIATURE = [graph for graph in GRAPHS if graph.stem.endswith("-miniature")]
HELP = PACK / "nodes" / "web" / "docs"
SCORES = PACK / "workflows" / "score_images-miniature.json"

pytestmark = [needs_comfyui, pytest.mark.skipif(bool(missing()), reason=f"no page: {missing()}")]


SHOW = "([id, output]) => app.graph.getNodeById(id).onExecuted(output)"
"""What ComfyUI does with the outputs that a node sends."""


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def scored(clean):
    """The page with a graph of scores that has run, and the nodes that show a table."""
    clean.load(read(SCORES))
    assert clean.run()["type"] == "execution_success"
    clean.settled()
    return clean, shown_tables(clean)


def shown_tables(page):
    """Tables that the server sent, by the id of their node."""
    return {node: output["srpo_table"] for node, output in page.outputs().items() if "srpo_table" in output}


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.stem)
def test_a_graph_opens_as_it_is_saved(clean, graph):
    """No node is missing, and what the page would save holds the same nodes, values and links.

    Only widgets that ComfyUI's own nodes got in later versions may lack, at their end.
    """
    workflow = read(graph)
    clean.load(workflow)
    assert clean.unknown_types() == []
    again = clean.serialized()
    values = {node["id"]: (node["type"], node.get("widgets_values") or []) for node in again["nodes"]}
    saved = {node["id"]: (node["type"], node.get("widgets_values") or []) for node in workflow["nodes"]}
    assert values.keys() == saved.keys()
    for id, (kind, given) in saved.items():
        ours = kind.startswith("SRPO")
        assert values[id] == (kind, given if ours else given[: len(values[id][1])]), id
    assert sorted(link[1:5] for link in again["links"]) == sorted(link[1:5] for link in workflow["links"])


@pytest.mark.parametrize("page", [False], ids=["canvas"], indirect=True)
@pytest.mark.parametrize("graph", MINIATURE, ids=lambda graph: graph.stem)
def test_a_miniature_graph_runs(clean, graph):
    """Every table that a node sent stands under it, whole, and every picture is there."""
    clean.load(read(graph))
    end = clean.run()
    assert end["type"] == "execution_success", end["detail"]
    clean.settled()
    for node, tables in shown_tables(clean).items():
        clean.look_at(node)
        there = clean.results(node)
        assert there["titles"] == [table["title"] for table in tables]
        assert [table["columns"] for table in there["tables"]] == [table["columns"] for table in tables]
        assert [len(table["rows"]) for table in there["tables"]] == [len(table["rows"]) for table in tables]
    assert any("images" in output for output in clean.outputs().values())
    broken = "app.graph.nodes.flatMap((node) => node.imgs ?? []).filter((image) => !image.naturalWidth).length"
    assert clean.page.evaluate(broken) == 0


def test_numbers_are_those_that_the_server_sent(scored):
    page, tables = scored
    assert tables
    for node, sent in tables.items():
        for table, there in zip(sent, page.results(node)["tables"], strict=True):
            for row, cells in zip(table["rows"], there["rows"], strict=True):
                for value, cell in zip(row, cells, strict=True):
                    if isinstance(value, (int, float)):
                        assert float(cell) == pytest.approx(value, abs=0.5 * 10 ** -len(cell.partition(".")[2]))
                    else:
                        assert cell == (value or "")


def test_a_column_sorts_both_ways(scored):
    page, tables = scored
    node, (table, *_) = next(iter(tables.items()))
    page.look_at(node)
    column = table["columns"].index("score")
    head = page.box(node).query_selector(f"th:nth-child({column + 1})")
    in_order = sorted(row[column] for row in table["rows"])
    assert len(set(in_order)) > 1
    for way, expected in (("descending", in_order[::-1]), ("ascending", in_order)):
        head.query_selector("button").click()
        assert head.get_attribute("aria-sort") == way
        there = [float(row[column]) for row in page.results(node)["tables"][0]["rows"]]
        assert there == pytest.approx(expected, abs=1e-3)


def test_copies_a_table_for_a_spreadsheet(scored):
    page, tables = scored
    node, (table, *_) = next(iter(tables.items()))
    page.look_at(node)
    page.box(node).query_selector("header button").click()
    page.page.wait_for_function(
        "(box) => box.querySelector('header button').textContent === 'Copied'", arg=page.box(node)
    )
    lines = [line.split("\t") for line in page.page.evaluate("navigator.clipboard.readText()").split("\n")]
    assert lines[0] == table["columns"]
    assert [[float(cell) for cell in line] for line in lines[1:]] == table["rows"]


def test_results_are_not_saved_with_the_graph(scored):
    page, tables = scored
    values = {node["id"]: node.get("widgets_values") or [] for node in page.serialized()["nodes"]}
    assert values == {node["id"]: node.get("widgets_values") or [] for node in read(SCORES)["nodes"]}
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert all("srpo_results" not in prompt[node]["inputs"] for node in tables)


def test_results_come_back_with_the_next_run(scored):
    """A page that was loaded again shows them when the graph is queued: the server sends what it has in its cache."""
    page, tables = scored
    page.reload()
    page.load(read(SCORES))
    assert all(page.results(node) is None for node in tables)
    assert page.run()["type"] == "execution_success"
    titles = {node: [table["title"] for table in sent] for node, sent in tables.items()}
    assert {node: page.results(node)["titles"] for node in tables} == titles


def test_results_come_back_with_their_tab(scored):
    """Where the page keeps the outputs of a tab: ComfyUI 0.9's often forgets them, and all pictures with them."""
    page, tables = scored
    before = {node: page.results(node)["tables"] for node in tables}
    page.command("Comfy.NewBlankWorkflow")
    page.page.wait_for_function("() => app.graph.nodes.length === 0")
    page.command("Workspace.PreviousOpenedWorkflow")
    page.page.wait_for_function("(id) => app.graph.getNodeById(id)", arg=next(iter(tables)))
    page.settled()
    if not page.outputs():
        pytest.skip("this ComfyUI has forgotten what the nodes of the tab have shown")
    assert {node: page.results(node)["tables"] for node in tables} == before


def test_results_that_are_gone_are_not_shown(scored):
    """A second run that shows nothing takes the first one's table away."""
    page, tables = scored
    node = next(iter(tables))
    page.page.evaluate(SHOW, [node, {}])
    there = page.results(node)
    assert there["tables"] == [] and there["texts"] == []


@pytest.mark.parametrize("page", [False], ids=["canvas"], indirect=True)
def test_a_text_that_comes_by_a_link_takes_no_room(scored):
    page, _ = scored
    node = next(one["id"] for one in read(SCORES)["nodes"] if one["type"] == "SRPORelativeScore")
    page.look_at(node)
    height = """(id) => app.graph.getNodeById(id).widgets.find((widget) => widget.name === "prompt").computedHeight"""
    assert page.page.evaluate(height, node) == 24
    page.page.evaluate(
        """(id) => {
          const node = app.graph.getNodeById(id);
          node.disconnectInput(node.inputs.findIndex((input) => input.name === "prompt"));
        }""",
        node,
    )
    page.look_at(node)
    assert page.page.evaluate(height, node) >= 50


def test_the_wheel_zooms_until_results_are_clicked_on(scored):
    """As over ComfyUI's own text boxes: with the focus in a long table it scrolls that."""
    page, tables = scored
    node = next(iter(tables))
    table = {"title": "long", "columns": ["n"], "rows": [[i] for i in range(100)], "note": ""}
    page.page.evaluate(SHOW, [node, {"srpo_table": [table]}])
    page.look_at(node)
    box = page.box(node)
    box.hover()
    page.page.mouse.wheel(0, -100)
    page.page.wait_for_function("() => app.canvas.ds.scale > 1")
    page.look_at(node)
    box.click()
    page.page.mouse.wheel(0, 100)
    page.page.wait_for_function("(box) => box.scrollTop > 0", arg=box)
    assert page.page.evaluate("app.canvas.ds.scale") == 1


def test_texts_of_files_are_no_markup(scored):
    """Names and prompts are text, whatever is written in them."""
    page, tables = scored
    node, text = next(iter(tables)), "<img src=x onerror='window.broken = true'> & <b>bold</b>"
    table = {"title": text, "columns": [text], "rows": [[text], [None]], "note": text}
    page.page.evaluate(SHOW, [node, {"srpo_table": [table], "text": [text]}])
    there = page.results(node)
    assert (there["titles"], there["texts"], there["notes"]) == ([text], [text], [text])
    assert there["tables"] == [{"columns": [text], "rows": [[text], [""]]}]
    assert page.page.evaluate("window.broken") is None


@pytest.fixture
def cards(clean):
    """The cards of the pack's graphs in the template browser, which is closed afterwards."""
    cards = clean.page.locator('[data-testid^="template-workflow-"]')
    clean.command("Comfy.BrowseTemplates")
    clean.page.get_by_text(NAME, exact=True).click()
    yield cards
    clean.reload()


def test_the_template_browser_lists_every_graph_with_its_picture(clean, cards):
    """The picture in the card is the file's, not the one that the page has for graphs without any."""
    shown = "([card, size]) => [...card.querySelectorAll('img')].some((one) => one.naturalWidth === size)"
    for graph in GRAPHS:
        card = cards.and_(clean.page.get_by_test_id(f"template-workflow-{graph.stem}"))
        card.scroll_into_view_if_needed()
        with Image.open(graph.with_suffix(".jpg")) as picture:
            clean.page.wait_for_function(shown, arg=[card.element_handle(), picture.width])


def test_a_node_opens_its_help_page(clean):
    clean.page.evaluate(
        """() => {
          app.graph.clear();
          const node = LiteGraph.createNode("SRPOSampler");
          node.pos = [500, 300];
          app.graph.add(node);
          app.canvas.ds.reset();
          app.canvas.draw(true, true);
        }"""
    )
    clean.settled()
    clean.page.mouse.click(600, 285)  # its title
    clean.page.locator('[data-testid="info-button"]').click()
    clean.page.locator(".node-help-content h1", has_text="SRPO Sampler").wait_for()
    assert "Euler" in clean.page.locator(".node-help-content").inner_text()


def test_every_help_page_is_served_and_names_all_inputs_and_outputs(server):
    nodes = {name: info for name, info in server.object_info().items() if name.startswith("SRPO")}
    assert {path.stem for path in HELP.glob("*.md")} == set(nodes)
    for name, info in nodes.items():
        text = server.bytes(f"/extensions/{NAME}/docs/{name}.md").decode()
        assert text.startswith(f"# {info['display_name']}\n")
        named = set(re.findall(r"\*\*([^*]+)\*\*", text))
        inputs = {one for kind in ("required", "optional") for one in info["input"].get(kind, {})}
        assert inputs | set(info["output_name"]) <= named, name
