"""What a node shows under itself: tables (drawn by web/srpo.js), pictures and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

Cell = str | int | float | None
Table = dict[str, Any]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> Table:
    """A table for the page; numbers stay numbers, so that it can sort them. `note` stands below it."""
    return {"title": title, "columns": list(columns), "rows": [[*map(_exact, row)] for row in rows], "note": note}


def _exact(cell: Cell) -> Cell:
    """Whole numbers that JavaScript would round (seeds) as text."""
    return str(cell) if isinstance(cell, int) and abs(cell) > 2**53 else cell


def as_text(shown: Table) -> str:
    """A table as tab-separated lines, columns first; numbers with up to six significant digits."""
    lines = [shown["columns"], *shown["rows"]]
    return "\n".join("\t".join(_cell(cell) for cell in line) for line in lines)


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def shown(
    cls: type[io.ComfyNode], tables: Sequence[Table] = (), images: Tensor | None = None, text: str | None = None
) -> dict[str, Any]:
    """The `ui` of a NodeOutput: tables, pictures [B, H, W, 3] as previews, and a text."""
    result: dict[str, Any] = {}
    if images is not None:
        result |= ui.PreviewImage(images, cls=cls).as_dict()
    if tables:
        result["srpo_table"] = list(tables)
    if text is not None:
        result["text"] = (text,)
    return result
