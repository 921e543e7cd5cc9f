"""Charts as inline SVG. Colours are the page's CSS classes s0, s1, ..., so a chart follows the colour scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from srpo_core.intervals import Interval

COLOURS = 8
_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 26


@dataclass
class Series:
    """A line of a chart. `dash` tells the lines of one colour apart; `marks` draws the points; `faint` has no key."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    dash: bool = False
    marks: bool = False
    smooth: bool = False
    faint: bool = False


def number(value: float, decimals: int | None = None) -> str:
    """A readable number: with so many decimals, else with three significant digits."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if decimals is None:
        if value and (abs(value) < 1e-4 or abs(value) >= 1e6):
            return f"{value:.1e}".replace("-", "−")
        decimals = decimals_for(value, 3)
    text = f"{value:.{decimals}f}"
    return text.replace("-", "−" if text.strip("-0.") else "")


def decimals_for(scale: float, digits: int) -> int:
    """Decimals (0 to 6) that show `digits` significant digits of a number of this size."""
    if not math.isfinite(scale) or scale == 0:
        return digits - 1
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(scale)))))


def interval_decimals(interval: Interval) -> int:
    """Decimals for an interval: two digits of its half width, but no more than three of its larger end."""
    half, end = (interval.high - interval.low) / 2, max(abs(interval.low), abs(interval.high))
    if not math.isfinite(half) or half == 0:
        return decimals_for(interval.estimate, 3)
    return min(decimals_for(half, 2), decimals_for(end, 3))


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover [low, high]; the ends lie outside it or on it."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values, fewer at the ends."""
    half = window // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


class _Axes:
    """Scales, grid and labels of one chart."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], from_zero: bool = False) -> None:
        self.x_low, self.x_high = min(xs), max(max(xs), min(xs) + 1)
        self.ticks = nice_ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
        self.y_low, self.y_high = self.ticks[0], self.ticks[-1]

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> str:
        parts = []
        tick_size = max(abs(self.ticks[1] - self.ticks[0]), max(map(abs, self.ticks)) * 0.02)
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick_label(tick, tick_size)}</text>'
            )
        for tick in nice_ticks(self.x_low, self.x_high, 5):
            if self.x_low <= tick <= self.x_high and tick == int(tick):
                parts.append(f'<text x="{self.x(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{int(tick)}</text>')
        return "".join(parts)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def _tick_label(tick: float, step: float) -> str:
    if tick == 0:
        return "0"
    if abs(tick) < 1e-3 or abs(tick) >= 1e5:
        mantissa, _, exponent = f"{tick:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    text = f"{tick:.{min(5, max(0, 2 - math.floor(math.log10(step))))}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _svg(title: str, body: str, height: int = _HEIGHT) -> str:
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{body}</svg>'


def _figure(title: str, chart: str, legend: Sequence[tuple[str, int, bool]], note: str) -> str:
    keys = "".join(
        f'<span class="key"><i class="s{colour % COLOURS}{" dash" if dash else ""}"></i>{escape(label)}</span>'
        for label, colour, dash in legend
    )
    legend_line = f'<div class="legend">{keys}</div>' if keys else ""
    note_line = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend_line}{chart}{note_line}</figure>'


def line_chart(
    title: str, series: Sequence[Series], rule: tuple[str, float] | None = None, note: str = "", from_zero: bool = False
) -> str:
    """A figure of lines over steps; "" where no series has a point. `rule` is a labelled horizontal line."""
    series = [line for line in series if len(line.xs)]
    if not series:
        return ""
    ys = [y for line in series for y in line.ys]
    axes = _Axes([x for line in series for x in line.xs], ys + ([rule[1]] if rule else []), from_zero)
    parts = [axes.grid()]
    if rule:
        y = axes.y(rule[1])
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label_y = y - 4 if y > 24 else y + 12
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{label_y:.1f}" text-anchor="end">{escape(rule[0])}</text>')
    for line in series:
        parts.append(_line(axes, line))
    legend = [(line.label, line.colour, line.dash) for line in series if not line.faint] if len(series) > 1 else []
    return _figure(title, _svg(title, "".join(parts)), legend, note)


def _line(axes: _Axes, line: Series) -> str:
    style = f"line s{line.colour % COLOURS}{' dash' if line.dash else ''}{' faint' if line.faint else ''}"
    window = max(1, len(line.xs) // 12)
    if not line.smooth or window < 3:
        drawn = f'<path class="{style}" d="{axes.path(line.xs, line.ys)}"/>'
    else:
        smooth = moving_average(line.ys, window)
        drawn = f'<path class="{style} faint" d="{axes.path(line.xs, line.ys)}"/>'
        drawn += f'<path class="{style}" d="{axes.path(line.xs, smooth)}"/>'
    if line.marks or len(line.xs) == 1:
        drawn += "".join(
            f'<circle class="dot s{line.colour % COLOURS}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3">'
            f"<title>{escape(line.label)}, step {x:g}: {number(y)}</title></circle>"
            for x, y in zip(line.xs, line.ys, strict=True)
        )
    return drawn


def stacked_chart(title: str, xs: Sequence[float], layers: dict[str, Sequence[float]], note: str = "") -> str:
    """A figure of bars over steps, stacked from the first layer up; many steps are averaged into 60 bars."""
    if not xs or not layers:
        return ""
    size = math.ceil(len(xs) / 60)
    groups = [slice(i, i + size) for i in range(0, len(xs), size)]
    bars = {name: [sum(v[g]) / len(v[g]) for g in groups] for name, v in layers.items()}
    totals = [sum(column) for column in zip(*bars.values(), strict=True)]
    axes = _Axes([min(xs) - 0.5, max(xs) + 0.5], totals, from_zero=True)
    parts, below = [axes.grid()], [0.0] * len(groups)
    for colour, values in enumerate(bars.values()):
        for i, (group, value) in enumerate(zip(groups, values, strict=True)):
            left, right = axes.x(xs[group][0] - 0.5), axes.x(xs[group][-1] + 0.5)
            top, bottom = axes.y(below[i] + value), axes.y(below[i])
            gap = 1 if right - left > 4 else 0
            parts.append(
                f'<rect class="fill s{colour}" x="{left:.1f}" y="{top:.1f}" '
                f'width="{max(right - left - gap, 0.5):.1f}" height="{max(bottom - top, 0):.2f}"/>'
            )
            below[i] += value
    return _figure(title, _svg(title, "".join(parts)), [(name, i, False) for i, name in enumerate(bars)], note)


def interval_chart(title: str, rows: Sequence[tuple[str, Interval]], note: str = "", gutter: int = 124) -> str:
    """A figure of estimates with their intervals, a row each, and a line at 0; rows that aren't finite are left out.

    Names take `gutter` of the figure's 360 units of width.
    """
    rows = [row for row in rows if all(map(math.isfinite, (row[1].estimate, row[1].low, row[1].high)))]
    if not rows:
        return ""
    low, high = min(0.0, *(r.low for _, r in rows)), max(0.0, *(r.high for _, r in rows))
    pad = (high - low) * 0.04 or 1.0
    low, high = low - pad, high + pad
    ticks = [tick for tick in nice_ticks(low, high, 5) if low <= tick <= high]
    left, row_height = gutter, 24
    height = len(rows) * row_height + 30

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - 14)

    parts = []
    for tick in ticks:
        style = "rule" if tick == 0 else "grid"
        parts.append(f'<line class="{style}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 22}"/>')
        label = _tick_label(tick, (high - low) / 5)
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{label}</text>')
    for i, (name, interval) in enumerate(rows):
        y = 16 + i * row_height
        colour = "s0" if interval.excludes_zero else "muted"
        short = escape(_short(name, gutter * 19 // 124))
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end" class="name">{short}</text>')
        parts.append(
            f'<line class="bar {colour}" x1="{x(interval.low):.1f}" x2="{x(interval.high):.1f}" y1="{y}" y2="{y}"/>'
        )
        hint = f"{escape(name)}: {number(interval.estimate)} [{number(interval.low)}, {number(interval.high)}]"
        parts.append(
            f'<circle class="dot {colour}" cx="{x(interval.estimate):.1f}" cy="{y}" r="4.5">'
            f"<title>{hint}</title></circle>"
        )
    return _figure(title, _svg(title, "".join(parts), height), [], note)


def histogram(title: str, values: Sequence[float], bins: int = 24) -> str:
    """A small picture of how values are spread, without axes; "" for fewer than 8 or for equal ones."""
    low, high = min(values), max(values)
    if len(values) < 8 or high <= low:
        return ""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    width, tallest = 240 / bins, max(counts)
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{34 - 34 * count / tallest:.1f}" width="{width - 1.5:.1f}"'
        f' height="{34 * count / tallest:.1f}"/>'
        for i, count in enumerate(counts)
    )
    label = escape(f"{title} from {number(low)} to {number(high)}", quote=True)
    shape = 'class="histogram" viewBox="0 0 240 34" preserveAspectRatio="none"'
    return f'<svg {shape} role="img" aria-label="{label}">{bars}</svg>'


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
