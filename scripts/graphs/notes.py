"""The words in the graphs: notes/<graph>.md in Markdown, with $pieces that several share (notes/_<piece>.md)."""

from __future__ import annotations

from pathlib import Path
from string import Template

FOLDER = Path(__file__).parent / "notes"


def words_of(graph: str) -> str:
    """The note of a graph. KeyError if it asks for a piece that isn't there."""
    pieces = {path.stem[1:]: path.read_text(encoding="utf-8").strip() for path in FOLDER.glob("_*.md")}
    pieces["try"] = Template(pieces["try"]).substitute(name=graph)
    return Template((FOLDER / f"{graph}.md").read_text(encoding="utf-8").strip()).substitute(pieces)
