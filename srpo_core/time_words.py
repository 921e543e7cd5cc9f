"""Times in words, for people."""

from __future__ import annotations


def duration_text(seconds: float) -> str:
    """Seconds in words: "45 s", "12 min", "3 h 40 min", "2 days 5 h"."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
