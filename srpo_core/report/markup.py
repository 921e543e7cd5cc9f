"""Small pieces of HTML. Text is escaped here; cells that are HTML already say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""


def text(value: object) -> Html:
    """Escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def row(cells: Iterable[object], style: str = "", first: str = "") -> Html:
    """A table row; `style` is its class, `first` that of its first cell."""
    inner = "".join(
        f'<td class="{first}">{text(cell)}</td>' if i == 0 and first else f"<td>{text(cell)}</td>"
        for i, cell in enumerate(cells)
    )
    return Html(f'<tr class="{style}">{inner}</tr>' if style else f"<tr>{inner}</tr>")


def table(head: Sequence[object], rows: Iterable[Html], style: str = "") -> Html:
    """A table that scrolls sideways by itself where the screen is narrow."""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    start = f"<thead><tr>{top}</tr></thead>" if head else ""
    return Html(f'<div class="scroll {style}"><table>{start}<tbody>{"".join(rows)}</tbody></table></div>')


def section(anchor: str, title: str, hint: str, *parts: str) -> Html:
    """A section of the page; `hint` is HTML."""
    lead = f'<p class="hint">{hint}</p>' if hint else ""
    return Html(f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{"".join(parts)}</section>')


def folded(title: str, body: str, opened: bool = False) -> Html:
    """A part that opens on a click."""
    return Html(f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>")
