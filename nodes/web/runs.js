/** The side panel that lists trainings: each with its progress, and open the whole view of one. */

import { app } from "../../scripts/app.js";
import { addStyle, make } from "./parts.js";
import { RunView } from "./run_view.js";
import { duration, progressText, share, statusOf, statusText } from "./run_words.js";
import { active, all, known, visible, watch } from "./watch.js";

const MANY = 8; // from here on there is a box to search in

const STYLE = `
.srpo-runs { box-sizing: border-box; height: 100%; overflow: auto; padding: 12px; display: flex; flex-direction: column; gap: 8px; contain: inline-size;
  color: var(--input-text); font: 12px/18px system-ui, sans-serif; user-select: text; }
.srpo-runs h2 { margin: 0; font-size: 14px; font-weight: 600; display: flex; align-items: baseline; gap: 8px; }
.srpo-runs h2 span { font-size: 12px; font-weight: 400; color: var(--descrip-text); }
.srpo-runs input[type=search] { font: inherit; color: inherit; padding: 4px 8px; border-radius: 6px; border: 1px solid var(--border-color); background: var(--comfy-input-bg); }
.srpo-runs p { margin: 0; color: var(--descrip-text); }
.srpo-runs ul { list-style: none; margin: 0; padding: 0; display: flex; flex-direction: column; gap: 6px; }
.srpo-runs li { border: 1px solid color-mix(in srgb, var(--border-color) 70%, transparent); border-radius: 8px; background: color-mix(in srgb, var(--fg-color) 3%, transparent); }
.srpo-runs li > button { all: unset; box-sizing: border-box; width: 100%; padding: 8px 10px; cursor: pointer; display: grid; gap: 4px; border-radius: 8px; }
.srpo-runs li > button:hover { background: color-mix(in srgb, var(--fg-color) 6%, transparent); }
.srpo-runs li > button:focus-visible { outline: 2px solid var(--srpo-blue); outline-offset: -1px; }
.srpo-runs .top { display: flex; gap: 8px; align-items: baseline; min-width: 0; }
.srpo-runs .top strong { flex: 1 1 auto; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: 13px; }
.srpo-runs .line { color: var(--descrip-text); display: flex; justify-content: space-between; gap: 8px; font-variant-numeric: tabular-nums; min-width: 0; }
.srpo-runs .line span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.srpo-runs .line span:last-child { flex: none; }
.srpo-runs .open { padding: 0 10px 10px; }
`;

/** How long ago, of a time in seconds since 1970. */
function ago(time) {
  const seconds = Date.now() / 1000 - time;
  if (seconds < 90) return "just now";
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

class Card {
  constructor(toggle) {
    this.title = make("strong");
    this.status = make("span", { className: "srpo-status" });
    this.fill = make("i");
    this.bar = make("span", { className: "srpo-bar" }, this.fill);
    this.what = make("span");
    this.when = make("span");
    this.button = make("button", { type: "button" }, make("span", { className: "top" }, this.title, this.status),
      this.bar, make("span", { className: "line" }, this.what, this.when));
    this.button.onclick = toggle;
    this.element = make("li", { className: "srpo-tone" }, this.button);
  }

  draw(run, open) {
    this.element.dataset.status = statusOf(run);
    this.title.textContent = this.title.title = run.name;
    this.status.textContent = statusText(run);
    this.fill.style.width = `${Math.round(share(run) * 100)}%`;
    this.bar.hidden = open || run.status === "finished";
    this.button.ariaExpanded = String(open);
    const left = active(run) && Number.isFinite(run.seconds_left) ? `about ${duration(run.seconds_left)} left` : "";
    const time = run.ended ?? run.began;
    this.when.textContent = left || (time ? ago(time) : "");
    this.what.textContent = this.what.title = open ? [run.base, run.reward].filter(Boolean).join(" · ") : progressText(run);
  }
}

/** A view of `watch`: the list, and the run in it that is open. */
class Panel {
  constructor() {
    addStyle(STYLE);
    this.cards = new Map();
    this.opened = undefined;
    this.view = new RunView({ titled: false });
    this.place = make("div", { className: "open" }, this.view.element);
    this.count = make("span");
    this.search = make("input", { type: "search", placeholder: "Find a run", hidden: true, oninput: () => this.listed() });
    this.search.ariaLabel = "Find a run";
    this.said = make("p", { text: "…" });
    this.list = make("ul");
    this.templates = make("button", { type: "button", className: "srpo-button", text: "Browse templates", hidden: true });
    this.templates.onclick = () => app.extensionManager.command.execute("Comfy.BrowseTemplates");
    this.element = make("div", { className: "srpo-runs" }, make("h2", { text: "SRPO trainings " }, this.count), this.search, this.said,
      make("div", {}, this.templates), this.list);
    watch(this);
  }

  name() {
    return this.opened ?? "";
  }

  lines() {
    return this.view.lines();
  }

  lists() {
    return "always";
  }

  shown() {
    return visible(this.element);
  }

  toggle(name) {
    this.opened = this.opened === name ? "" : name;
    if (this.opened) this.view.draw(known(this.opened));
    this.listed();
  }

  listed() {
    const { runs } = all;
    if (this.opened === undefined && runs.length) this.toggle((runs.find(active) ?? runs[0]).name);
    const working = runs.filter(active).length;
    this.count.textContent = runs.length ? `${runs.length}${working ? `, ${working} at work` : ""}` : "";
    this.search.hidden = runs.length < MANY && !this.search.value;
    this.templates.hidden = !all.known || Boolean(all.error) || runs.length > 0;
    const wanted = this.search.value.trim().toLowerCase();
    const found = runs.filter((run) => run.name.toLowerCase().includes(wanted));
    if (all.error) this.said.textContent = `No answer from ComfyUI: ${all.error}`;
    else if (!runs.length) this.said.textContent = "No training yet. Queue a graph with an SRPO Train node: the templates of this pack have some, and one trains in minutes on any machine.";
    else this.said.textContent = found.length ? "" : "No run has this in its name.";
    this.said.hidden = !this.said.textContent;
    this.drawCards(found);
  }

  drawCards(runs) {
    const elements = runs.map((run) => {
      if (!this.cards.has(run.name)) this.cards.set(run.name, new Card(() => this.toggle(run.name)));
      const card = this.cards.get(run.name);
      const open = run.name === this.opened;
      card.draw(run, open);
      if (open && this.place.parentElement !== card.element) card.element.append(this.place);
      return card.element;
    });
    if (!runs.some((run) => run.name === this.opened)) this.place.remove();
    const there = [...this.list.children];
    const same = elements.length === there.length && elements.every((element, i) => element === there[i]);
    if (!same) this.list.replaceChildren(...elements); // else what has the focus would lose it
  }

  told(run) {
    this.view.draw(run);
    if (run.data) this.cards.get(run.name)?.draw(run.data, true);
  }
}

let panel;

app.registerExtension({
  name: "SRPO.runs",

  setup() {
    app.extensionManager.registerSidebarTab({
      id: "srpo-runs",
      title: "SRPO",
      icon: "pi pi-chart-line",
      tooltip: "SRPO trainings",
      type: "custom",
      render: (element) => {
        panel ??= new Panel();
        element.style.height = "100%";
        if (panel.element.parentElement !== element) element.replaceChildren(panel.element);
      },
    });
  },
});
