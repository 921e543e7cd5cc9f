/** A run as the user follows it: how far it is, its curves, before | now, its plan and log, and what can be done. */

import { Chart } from "./chart.js";
import { addStyle, copyButton, make } from "./parts.js";
import { STYLE } from "./run_style.js";
import { base, duration, progressText, share, statusOf, statusText } from "./run_words.js";
import { act, active, address } from "./watch.js";

const LOG_LINES = 40;
const FULL_WIDTH = 3200; // pixels of a preview that is opened on its own
const NARROW = 520; // pixels of a view that shows two pairs of pictures beside each other; a wider one shows four

/** Groups of a Chart: what each step measured, one tab a kind. */
function stepGroups({ steps, series }) {
  const of = (kind) => Object.fromEntries(Object.entries(series).flatMap(([key, values]) => (key.startsWith(`${kind}/`) ? [[key.slice(kind.length + 1), values]] : [])));
  const one = (key, name) => (series[key] ? { [name]: series[key] } : {});
  return [
    { name: "Score", title: "Relative reward of each branch: liked less disliked wording", steps, series: of("score") },
    { name: "Reward", title: "Reward of each branch's pictures", steps, series: of("reward") },
    { name: "Loss", steps, series: one("loss", "loss") },
    { name: "Gradient", title: "Norm of the gradient before clipping", steps, series: one("grad_norm", "norm") },
  ];
}

/** Groups of a Chart: what the previews of the fixed prompts scored, one tab a column. */
function previewGroups({ steps, series }) {
  const first = ["relative", "reward"];
  const names = Object.keys(series).filter((name) => !/[:/]/.test(name));
  const ordered = [...first.filter((name) => names.includes(name)), ...names.filter((name) => !first.includes(name))];
  const labels = { relative: ["Preview score", "Previews: liked less disliked wording"], reward: ["reward", "Previews: reward of the plain prompt"] };
  return ordered.map((key) => {
    const [name, title] = labels[key] ?? [key.replaceAll("_", " "), `Previews: ${key}`];
    return { name, title, steps, series: { [key]: series[key] }, dots: true };
  });
}

export class RunView {
  /** `changed()` is called when the view needs another height. `titled`: with the run's name and status on top. */
  constructor({ titled = true, changed = () => {} } = {}) {
    addStyle(STYLE);
    this.changed = changed;
    this.open = { log: false, plan: false };
    this.build(titled);
  }

  build(titled) {
    this.title = make("strong");
    this.status = make("span", { className: "srpo-status" });
    this.left = make("span", { className: "left" });
    this.header = make("header", {}, ...(titled ? [this.title, this.status] : []), this.left);
    this.header.hidden = !titled;
    this.fill = make("i");
    this.bar = make("div", { className: "srpo-bar", role: "progressbar" }, this.fill);
    this.bar.ariaValueMin = "0";
    this.bar.ariaValueMax = "100";
    this.now = make("p", { className: "now" });
    this.error = make("div", { className: "error", hidden: true });
    this.plan = make("table", { hidden: true });
    this.charts = [new Chart("scores appear with the first step"), new Chart("preview scores appear with the first preview")];
    this.chartRow = make("div", { className: "charts", hidden: true }, ...this.charts.map((chart) => chart.element));
    this.buildPreview();
    this.buildActions();
    this.said = make("p", { className: "said", role: "status", hidden: true });
    this.log = make("pre", { className: "log", hidden: true, tabIndex: 0 });
    this.element = make("section", { className: "srpo-run srpo-tone", hidden: true }, this.header, this.bar, this.now, this.error,
      this.footer, this.said, this.plan, this.log, this.chartRow, this.preview);
  }

  buildPreview() {
    this.image = make("img", { alt: "pictures of the fixed prompts before training and now" });
    this.link = make("a", { target: "_blank", rel: "noopener", title: "Open in full size", draggable: false }, this.image);
    this.caption = make("span");
    this.slider = make("input", { type: "range", min: 0, step: 1, title: "Earlier previews" });
    this.slider.ariaLabel = "Preview";
    this.slider.oninput = () => {
      const steps = this.run.curves.preview.steps;
      this.chosen = Number(this.slider.value) < steps.length - 1 ? steps[this.slider.value] : undefined; // the last one: follow
      this.drawPreview();
    };
    this.preview = make("figure", { hidden: true }, this.link, make("figcaption", {}, this.caption, this.slider));
  }

  buildActions() {
    const button = (text, title, onclick, kind = "") => make("button", { type: "button", text, title, onclick, className: `srpo-button ${kind}` });
    this.stop = button("Stop", "Save a checkpoint and end; Resume goes on from there", () => this.act(this.stop, "Stopping…", "stop"), "danger");
    this.kill = button("End now", "End its processes at once; what came after the last checkpoint is lost", () => this.act(this.kill, "Ending…", "stop", { now: true }), "danger");
    this.resume = button("Resume", "Go on from the last checkpoint", () => this.act(this.resume, "Starting…", "resume"), "main");
    this.save = button("Save LoRA", "Write the newest checkpoint beside the result, under a name with its step", () => this.act(this.save, "Saving…", "save"));
    this.report = make("a", { text: "Open report", title: "Curves, previews and settings on one page", className: "srpo-button", target: "_blank", rel: "noopener" });
    this.more = this.moreSteps();
    this.toggles = Object.fromEntries([["plan", "Plan"], ["log", "Log"]].map(([key, text]) => [key, button(text, key === "log" ? "The last lines that it printed" : "Steps, memory, the command line and the folder", () => this.toggle(key))]));
    this.footer = make("footer", {}, this.stop, this.kill, this.resume, this.more, this.save, this.report, make("span", { className: "gap" }), this.toggles.plan, this.toggles.log);
  }

  /** A finished run goes on to a later step. */
  moreSteps() {
    this.steps = make("input", { type: "number", min: 1, step: 1, required: true });
    this.steps.ariaLabel = "Train on to step";
    this.go = make("button", { type: "submit", text: "Train on", title: "Go on to this step", className: "srpo-button" });
    const form = make("form", {}, this.go, "to", this.steps);
    form.onsubmit = (event) => {
      event.preventDefault();
      this.act(this.go, "Starting…", "resume", { steps: Number(this.steps.value) });
    };
    return form;
  }

  /** Ask the server for something; `saying` stands there until it answers. */
  async act(button, saying, verb, body) {
    const { run } = this;
    button.disabled = true;
    this.say(saying);
    let [said, bad] = ["", false];
    try {
      await act(run.name, verb, body);
      if (verb === "save") said = `Saved as ${base(run.data?.result ?? "")}`;
    } catch (error) {
      [said, bad] = [error.message, true];
    }
    button.disabled = false;
    if (run !== this.run) return;
    this.say(said, bad);
    this.draw(run);
  }

  say(text, bad = false) {
    this.said.textContent = text;
    this.said.classList.toggle("bad", bad);
    this.said.hidden = !text;
    this.changed();
  }

  toggle(key) {
    this.open[key] = !this.open[key];
    if (this.run) this.draw(this.run);
  }

  /** Lines of the log that the view needs. */
  lines() {
    return this.open.log ? LOG_LINES : 0;
  }

  /** Show a run as `known` has it. */
  draw(run) {
    if (run.name !== this.run?.name) this.forget();
    this.run = run;
    const { data } = run;
    this.element.hidden = !data;
    if (!data) return this.changed();
    this.element.dataset.status = statusOf(data);
    this.title.textContent = this.title.title = data.name;
    this.status.textContent = statusText(data);
    this.left.textContent = active(data) && Number.isFinite(data.seconds_left) ? `about ${duration(data.seconds_left)} left` : "";
    this.drawProgress(data);
    this.error.hidden = !(data.error || run.error);
    this.error.textContent = run.error ? `No answer from ComfyUI: ${run.error}.${active(data) ? " The training goes on without it." : ""}` : data.error;
    const curves = run.curves.steps.length > 0 || run.curves.preview.steps.length > 0;
    this.drawPlan(data, this.open.plan || (active(data) && !curves));
    this.chartRow.hidden = !curves;
    this.charts[0].draw(stepGroups(run.curves), data.steps);
    this.charts[1].draw(previewGroups(run.curves.preview), data.steps);
    this.drawPreview();
    this.drawActions(data, curves);
    this.drawLog(data);
    this.changed();
  }

  forget() {
    this.chosen = undefined;
    this.shown = undefined;
    this.image.removeAttribute("src");
    this.steps.value = "";
    this.say("");
  }

  drawProgress(data) {
    const percent = Math.round(share(data) * 100);
    this.fill.style.width = `${percent}%`;
    this.bar.ariaValueNow = String(percent);
    this.bar.ariaLabel = `Progress of ${data.name}`;
    this.now.textContent = progressText(data);
    this.now.title = data.result ?? "";
  }

  drawPlan(data, shown) {
    this.plan.hidden = !shown;
    this.toggles.plan.ariaPressed = String(shown);
    this.toggles.plan.hidden = !(data.plan?.length || data.command);
    const key = JSON.stringify([data.plan, data.command, data.folder]);
    if (!shown || key === this.planned) return;
    this.planned = key;
    const row = (name, ...cells) => make("tr", {}, make("th", { text: name, scope: "row" }), make("td", {}, ...cells));
    const copied = (name, text) => (text ? [row(name, make("code", { text }), copyButton(() => text, `Copy the ${name}`))] : []);
    const given = (data.plan ?? []).filter(([name]) => !["command", "folder"].includes(name));
    this.plan.replaceChildren(make("tbody", {}, ...given.map(([name, text]) => row(name, text)), ...copied("command", data.command), ...copied("folder", data.folder)));
  }

  drawPreview() {
    const steps = this.run.curves.preview.steps;
    const newest = this.run.data.preview_step ?? steps.at(-1);
    const none = newest === undefined || newest === null;
    this.preview.hidden = none || !this.image.hasAttribute("src");
    if (none) return;
    const step = this.chosen ?? newest;
    this.slider.hidden = steps.length < 2;
    this.slider.max = steps.length - 1;
    this.slider.value = this.chosen === undefined ? steps.length - 1 : steps.indexOf(this.chosen);
    this.caption.textContent = step ? `before | after ${step} steps` : "before training";
    const picture = (width, columns) => address(this.run.name, `preview.jpg?step=${step}&width=${width}&columns=${columns}&of=${encodeURIComponent(this.run.data.course ?? "")}`);
    this.link.href = picture(FULL_WIDTH, 4);
    const room = this.element.clientWidth;
    const url = picture(room < NARROW ? 2 * NARROW : FULL_WIDTH / 2, room < NARROW ? 2 : 4);
    if (url !== this.shown) this.loadPreview(url);
  }

  /** The picture is swapped when the next one is there; a step whose picture can't be had keeps the last. */
  loadPreview(url) {
    this.shown = url;
    const next = new Image();
    next.onload = () => {
      if (this.shown !== url) return;
      this.image.style.aspectRatio = `${next.naturalWidth} / ${next.naturalHeight}`;
      this.image.src = url;
      this.preview.hidden = false;
      this.changed();
    };
    next.onerror = () => setTimeout(() => this.shown === url && (this.shown = undefined), 5000);
    next.src = url;
  }

  drawActions(data, curves) {
    this.stop.hidden = !data.can_stop;
    this.stop.textContent = data.stopping ? "Stopping…" : "Stop";
    this.stop.disabled = Boolean(data.stopping);
    this.kill.hidden = !(data.can_stop && data.stopping);
    this.resume.hidden = !data.can_resume;
    this.more.hidden = !data.can_continue;
    this.steps.min = data.steps + 1;
    const typing = document.activeElement === this.steps;
    if (!typing && !(Number(this.steps.value) > data.steps)) this.steps.value = data.steps * 2;
    this.save.hidden = !data.can_save;
    this.save.textContent = data.kind === "full" ? "Save model" : "Save LoRA";
    this.report.hidden = !curves;
    this.report.href = address(data.name, "report");
  }

  drawLog(data) {
    this.log.hidden = !this.open.log;
    this.toggles.log.ariaPressed = String(this.open.log);
    if (!this.open.log) return;
    const text = (data.log ?? []).join("\n") || "nothing printed yet";
    if (text === this.log.textContent) return;
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 24;
    this.log.textContent = text;
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }
}
