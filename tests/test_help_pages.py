"""A help page for every node, and what the page's script may do; ComfyUI is not needed here."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEB = ROOT / "nodes" / "web"
PAGES = {path.stem: path for path in (WEB / "docs").glob("*.md")}
PARTS = ["Outputs", "Example", "When something goes wrong"]


def schemas():
    """Display names by node id, as the nodes' schemas give them."""
    found = {}
    for path in (ROOT / "nodes").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                given = {one.arg: one.value.value for one in call.keywords if isinstance(one.value, ast.Constant)}
                if "node_id" in given:
                    found[given["node_id"]] = given["display_name"]
    return found


NAMES = schemas()


def test_every_node_has_a_page_and_every_page_a_node():
    assert len(NAMES) >= 12
    assert set(PAGES) == set(NAMES)


def test_the_pack_tells_comfyui_where_they_are():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert (ROOT / values["WEB_DIRECTORY"]).resolve() == WEB


@pytest.mark.parametrize("node", sorted(PAGES))
def test_a_page_has_its_parts(node):
    text = PAGES[node].read_text(encoding="utf-8")
    assert text.startswith(f"# {NAMES[node]}\n")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in PARTS] == PARTS
    assert "## Inputs" in text or node == "SRPOMiniature"
    assert all(ord(one) < 128 or one in "→" for one in text)


@pytest.mark.parametrize("node", sorted(PAGES))
def test_what_a_page_points_to_is_there(node):
    """Other nodes by their display names, templates by their files' names."""
    text = PAGES[node].read_text(encoding="utf-8")
    known = sorted(NAMES.values(), key=len, reverse=True)
    for found in re.finditer(r"SRPO (?=[A-Z])", text):
        assert any(text.startswith(name, found.start()) for name in known), text[found.start() : found.start() + 40]
    for line in re.findall(r"Templates?(?: → ComfyUI-SRPO →|:)([^.]*)", text):
        for name in re.findall(r"\*([\w-]+)\*", line):
            assert (ROOT / "workflows" / f"{name}.json").is_file(), name


@pytest.mark.parametrize("name", sorted(path.name for path in WEB.glob("*.js")))
def test_a_script_needs_nothing_but_comfyuis_own_and_its_siblings(name):
    """No markup is made of texts, nothing is evaluated, and the server is asked by ComfyUI's own way alone."""
    text = (WEB / name).read_text(encoding="utf-8")
    for source in re.findall(r'^(?:import|\}) .*from "(.+)"', text, re.MULTILINE):
        ours = source.startswith("./") and (WEB / source).is_file()
        assert ours or source in ("../../scripts/app.js", "../../scripts/api.js"), source
    assert "import(" not in text
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "Function(", "XMLHttpRequest"):
        assert word not in text
    assert not re.search(r"(?<!\.)\bfetch\(", text)
