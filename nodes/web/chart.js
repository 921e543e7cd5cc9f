/** A line chart in SVG: several series over steps, a group of them at a time, values under the pointer in the legend. */

import { addStyle, make } from "./parts.js";

const COLOURS = ["#4d96ff", "#f08c3c", "#35b37e", "#b57edc", "#e5589b", "#9aa53a"];
const LEFT = 40;
const RIGHT = 8;
const TOP = 6;
const BOTTOM = 16;
const MOST_TABS = 4; // groups beyond these are in a list to choose from
const MOST_POINTS = 300; // of a drawn line; longer runs are drawn by means of neighbours

const STYLE = `
.srpo-chart { display: flex; flex-direction: column; min-width: 0; flex: 1 1 165px; }
.srpo-chart nav { display: flex; gap: 0 7px; white-space: nowrap; overflow: hidden; font-size: 11px; min-height: 18px; }
.srpo-chart nav select { font: inherit; color: var(--descrip-text); background: none; border: 0; padding: 0; margin: 0; height: 18px; cursor: pointer; max-width: 80px; min-width: 0; field-sizing: content; }
.srpo-chart nav option { color: var(--input-text); background: var(--comfy-menu-bg); }
.srpo-chart nav select.chosen { color: var(--input-text); font-weight: 600; }
.srpo-chart nav button { font: inherit; color: var(--descrip-text); background: none; border: 0; padding: 0; cursor: pointer; }
.srpo-chart nav button:hover { color: var(--input-text); }
.srpo-chart nav button[aria-pressed=true] { color: var(--input-text); font-weight: 600; cursor: default; }
.srpo-chart .plot { position: relative; flex: 1 1 108px; min-height: 108px; }
.srpo-chart svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; font: 10px system-ui, sans-serif; }
.srpo-chart text { fill: var(--descrip-text); font-variant-numeric: tabular-nums; }
.srpo-chart .grid { stroke: var(--border-color); stroke-opacity: .45; }
.srpo-chart .zero { stroke: var(--descrip-text); stroke-opacity: .6; stroke-dasharray: 2 3; }
.srpo-chart .cursor { stroke: var(--descrip-text); stroke-dasharray: 2 2; }
.srpo-chart .raw { fill: none; stroke-opacity: .3; stroke-width: 1; }
.srpo-chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.srpo-chart .waiting { position: absolute; inset: 0; display: grid; place-items: center; color: var(--descrip-text); pointer-events: none; }
.srpo-chart .legend { display: flex; flex-wrap: wrap; gap: 0 12px; min-height: 18px; font-variant-numeric: tabular-nums; color: var(--descrip-text); }
.srpo-chart .legend i { display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin-right: 5px; }
.srpo-chart .legend b { font-weight: 600; color: var(--input-text); margin-left: 4px; }
`;

function svg(tag, given, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(given)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Pairs [step, value] of a series without its gaps, at most MOST_POINTS of them. */
export function points(steps, values) {
  const known = steps.flatMap((step, i) => (Number.isFinite(values[i]) ? [[step, values[i]]] : []));
  const size = Math.ceil(known.length / MOST_POINTS);
  if (size <= 1) return known;
  const mean = (group, i) => group.reduce((sum, pair) => sum + pair[i], 0) / group.length;
  return Array.from({ length: Math.ceil(known.length / size) }, (_, i) => known.slice(i * size, (i + 1) * size))
    .map((group) => [mean(group, 0), mean(group, 1)]);
}

/** The pairs' running mean, over about a twelfth of them; unbiased at the start. */
export function smooth(pairs) {
  const keep = 1 - 1 / Math.max(1, pairs.length / 12);
  let sum = 0;
  let weight = 0;
  return pairs.map(([step, value]) => {
    sum = keep * sum + value;
    weight = keep * weight + 1;
    return [step, sum / weight];
  });
}

/** Round numbers that divide [low, high] into about `count` parts. */
export function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((one) => one * power >= rough * 0.999) * power;
  const first = Math.ceil(low / unit - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(high / unit + 1e-9) - first + 1) }, (_, i) => (first + i) * unit);
}

/** The range of values to show: single spikes of long series are cut off. */
function range(lines) {
  const values = lines.flatMap(({ raw }) => raw.map((pair) => pair[1])).sort((a, b) => a - b);
  const cut = values.length > 60 ? Math.floor(values.length * 0.02) : 0;
  const smoothed = lines.flatMap(({ line }) => line.map((pair) => pair[1]));
  const low = Math.min(values[cut], ...smoothed);
  const high = Math.max(values[values.length - 1 - cut], ...smoothed);
  const pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 0.1;
  return [low - pad, high + pad];
}

/** As many digits as tell values apart on an axis of this span. */
export function written(value, span) {
  if (!Number.isFinite(value)) return "–";
  const small = span < 1e-4 || Math.abs(value) >= 1e6;
  return small && value ? value.toExponential(1) : value.toFixed(Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(span || 1)))));
}

/** A chart's element, and `draw(groups, until)` for its contents. */
export class Chart {
  /** `waiting`: what stands there as long as there is nothing to draw. */
  constructor(waiting) {
    addStyle(STYLE);
    this.groups = [];
    this.tabs = make("nav");
    this.plot = make("div", { className: "plot" });
    this.legend = make("div", { className: "legend" });
    this.waiting = make("div", { className: "waiting", text: waiting });
    this.svg = svg("svg", { role: "img" });
    this.plot.append(this.svg, this.waiting);
    this.element = make("div", { className: "srpo-chart" }, this.tabs, this.plot, this.legend);
    this.plot.onpointermove = (event) => this.point(event);
    this.plot.onpointerleave = () => this.point(null);
    new ResizeObserver(() => this.redraw()).observe(this.plot);
  }

  /**
   * Show groups of series, one at a time.
   * `groups`: [{name, title, steps, series: {name: values or null}, dots: whether each value is marked and none smoothed}];
   * `until`: the last step of the axis.
   */
  draw(groups, until) {
    this.groups = groups.filter((group) => Object.values(group.series).some((values) => values.some(Number.isFinite)));
    this.until = until;
    const names = this.groups.map((group) => group.name).join("\n");
    if (names !== this.names) {
      this.names = names;
      this.drawTabs();
    }
    this.redraw();
  }

  drawTabs() {
    const most = this.groups.length > MOST_TABS ? 2 : MOST_TABS;
    const tabs = this.groups.slice(0, most).map(({ name, title }) =>
      make("button", { type: "button", text: name, title: title ?? "", onclick: () => this.choose(name) }));
    const others = this.groups.slice(most).map(({ name }) => make("option", { text: name, value: name }));
    this.more = make("select", { title: "Other values", onchange: () => this.choose(this.more.value) }, make("option", { text: "more", value: "", hidden: true }), ...others);
    this.tabs.replaceChildren(...tabs, ...(others.length ? [this.more] : []));
  }

  choose(name) {
    this.chosen = name;
    this.redraw();
  }

  markTab(name) {
    for (const tab of this.tabs.querySelectorAll("button")) tab.ariaPressed = String(tab.textContent === name);
    if (!this.more) return;
    this.more.value = [...this.more.options].some((option) => option.value === name) ? name : "";
    this.more.classList.toggle("chosen", Boolean(this.more.value));
  }

  redraw() {
    const { clientWidth: width, clientHeight: height } = this.plot;
    const group = this.groups.find((one) => one.name === this.chosen) ?? this.groups[0];
    this.waiting.hidden = Boolean(group);
    this.waiting.style.display = group ? "none" : "";
    this.markTab(group?.name);
    if (!group) {
      this.lines = [];
      this.svg.replaceChildren();
      this.legend.replaceChildren();
      return;
    }
    this.lines = Object.entries(group.series).map(([name, values], i) => {
      const raw = points(group.steps, values);
      return { name, colour: COLOURS[i % COLOURS.length], raw, line: group.dots ? raw : smooth(raw), dots: group.dots };
    }).filter(({ raw }) => raw.length);
    this.span = range(this.lines);
    this.readOut();
    if (width <= LEFT + RIGHT || height <= TOP + BOTTOM) return;
    this.x = (step) => LEFT + (step / Math.max(1, this.until)) * (width - LEFT - RIGHT);
    const [low, high] = this.span;
    this.y = (value) => TOP + ((high - value) / (high - low)) * (height - TOP - BOTTOM);
    this.svg.setAttribute("aria-label", `${group.name} by step`);
    this.svg.replaceChildren(...this.axes(width, height), ...this.lines.flatMap((line) => this.drawLine(line, height)));
  }

  axes(width, height) {
    const [low, high] = this.span;
    const marks = ticks(low, high, Math.max(2, height / 26));
    const unit = (marks[1] ?? high) - marks[0];
    const decimals = Math.min(6, Math.max(0, -Math.floor(Math.log10(unit) + 1e-9)));
    const drawn = marks.flatMap((value) => {
      const y = this.y(value);
      const kind = Math.abs(value) < unit / 1e3 ? "zero" : "grid";
      const text = unit < 1e-5 ? value.toExponential(1) : value.toFixed(decimals);
      return [svg("line", { class: kind, x1: LEFT, x2: width - RIGHT, y1: y, y2: y }), svg("text", { x: LEFT - 6, y: y + 3, "text-anchor": "end" }, text)];
    });
    const steps = ticks(0, Math.max(1, this.until), Math.max(2, width / 70)).filter(Number.isInteger);
    return [...drawn, ...steps.map((step) => {
      const x = this.x(step);
      return svg("text", { x, y: height - 3, "text-anchor": x > width - 20 ? "end" : "middle" }, String(step));
    })];
  }

  drawLine({ colour, raw, line, dots }, height) {
    const clamp = (y) => Math.min(height - BOTTOM, Math.max(TOP, y));
    const path = (pairs) => pairs.map(([step, value], i) => `${i ? "L" : "M"}${this.x(step).toFixed(1)} ${clamp(this.y(value)).toFixed(1)}`).join("");
    const [step, value] = line.at(-1);
    const ends = dots ? line : [[step, value]];
    const marks = ends.map((pair) => svg("circle", { cx: this.x(pair[0]), cy: clamp(this.y(pair[1])), r: 2.5, fill: colour }));
    const faint = dots ? [] : [svg("path", { class: "raw", d: path(raw), stroke: colour })];
    return [...faint, svg("path", { class: "line", d: path(line), stroke: colour }), ...marks];
  }

  /** Follow the pointer: a line at the nearest step, and that step's values in the legend. */
  point(event) {
    this.svg.querySelector(".cursor")?.remove();
    if (!event || !this.lines?.length || !this.x) return this.readOut();
    const box = this.plot.getBoundingClientRect(); // the canvas shows nodes at any scale
    const at = ((event.clientX - box.left) / box.width) * this.plot.clientWidth;
    const all = this.lines.flatMap(({ raw }) => raw.map((pair) => pair[0]));
    const step = all.reduce((best, one) => (Math.abs(this.x(one) - at) < Math.abs(this.x(best) - at) ? one : best));
    const x = this.x(step);
    this.svg.append(svg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: this.plot.clientHeight - BOTTOM }));
    this.readOut(step);
  }

  /** The legend: each series with its value at a step, or its last one. */
  readOut(step) {
    const span = this.span ? this.span[1] - this.span[0] : 1;
    const entries = (this.lines ?? []).map(({ name, colour, line }) => {
      const pair = step === undefined ? line.at(-1) : line.find((one) => one[0] === step);
      return make("span", {}, make("i", { style: `background: ${colour}` }), name, make("b", { text: written(pair?.[1], span) }));
    });
    if (step !== undefined) entries.push(make("span", { text: `step ${Math.round(step)}` }));
    this.legend.replaceChildren(...entries);
  }
}
