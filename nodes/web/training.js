/** The live view in SRPO Train and SRPO Training Status. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addBox, addStyle, heightIn, make, nodeOf } from "./parts.js";
import { RunView } from "./run_view.js";
import { drawTable } from "./tables.js";
import { all, askNow, hurry, known, visible, watch } from "./watch.js";

const WIDGET = "srpo_run";
const STATUS = "SRPOTrainingStatus";
const NAMED_BY = { SRPOTrain: "name", [STATUS]: "run" }; // the widget with a run's name
const LEAST_HEIGHT = 50;

const STYLE = `
.srpo-box.srpo-live { gap: 8px; padding: 8px; background: var(--comfy-menu-bg); }
.srpo-live .srpo-table thead:not(:has(button:not(:empty))) { display: none; }
.srpo-live .srpo-table :is(td, td.long) { max-width: none; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.srpo-live .srpo-table td:first-child { width: auto; white-space: nowrap; color: var(--descrip-text); }
.srpo-live p { margin: 0; color: var(--descrip-text); white-space: pre-wrap; overflow-wrap: anywhere; }
`;

/** Whether a run came of a node that asks for `name`: "look-2" is what "look" became where there was one. */
const comesOf = (run, name) => run === name || (run.startsWith(`${name}-`) && /^\d+$/.test(run.slice(name.length + 1)));

/** A view of `watch` in a node. */
class LiveView {
  constructor(node) {
    addStyle(STYLE);
    this.node = node;
    this.height = LEAST_HEIGHT;
    this.announced = ""; // the run that the server last told of for this node
    this.drawn = "";
    const options = { hideOnZoom: false, getMinHeight: () => this.height };
    this.element = addBox(node, WIDGET, "srpo-live", options).element;
    this.given = make("div", { style: "display: contents" }); // what a run that isn't there would be
    this.refusal = make("div", { className: "error" }); // why the node failed
    this.idle = make("p");
    this.run = new RunView({ changed: () => this.measure() });
    this.element.append(this.idle, this.refusal, this.given, this.run.element);
    this.listed();
    this.end = watch(this);
  }

  /** The name in the node's widget; undefined where it comes by a link. */
  asked() {
    const name = NAMED_BY[this.node.type];
    const linked = this.node.inputs?.some((input) => input.widget?.name === name && input.link != null);
    return linked ? undefined : String(this.node.widgets.find((widget) => widget.name === name)?.value ?? "").trim();
  }

  name() {
    const asked = this.asked();
    if (this.node.type === STATUS) return (asked ?? this.announced) || all.runs[0]?.name || "";
    const key = Object.keys(all.nodes).find((one) => nodeOf(one) === this.node);
    const told = [this.announced, all.nodes[key]].filter(Boolean);
    if (asked === undefined) return told[0] ?? "";
    return told.find((run) => comesOf(run, asked)) ?? all.runs.find((run) => run.name === asked)?.name ?? "";
  }

  lists() {
    const newest = this.node.type === STATUS && !this.asked();
    return newest || !this.name() ? "sometimes" : "";
  }

  lines() {
    return this.run.lines();
  }

  shown() {
    if (this.name() !== this.drawn || this.asked() !== this.drawnFor) this.listed();
    return visible(this.element);
  }

  listed() {
    const name = this.name();
    if (name !== this.drawn) this.told(known(name));
    else if (!name) this.drawIdle();
  }

  told(run) {
    this.drawn = run.name;
    this.run.draw(run);
    this.drawIdle();
    this.measure();
  }

  /** A line in place of a run that isn't there. */
  drawIdle() {
    const run = known(this.drawn);
    const asked = this.asked();
    this.drawnFor = asked;
    const refused = this.refusal.textContent !== "" && !run.data?.error; // a run says itself why it failed
    const show = (element, shown) => (element.style.display = shown ? "" : "none");
    show(this.refusal, refused);
    show(this.idle, !run.data && !refused && !this.given.hasChildNodes());
    if (all.error || run.error) this.idle.textContent = run.missing ? `There is no run "${run.name}".` : `No answer from ComfyUI: ${run.error || all.error}`;
    else if (this.drawn) this.idle.textContent = `${this.drawn} …`;
    else if (this.node.type === STATUS) this.idle.textContent = "No training yet.";
    else this.idle.textContent = asked ? `Progress, curves and pictures of "${asked}" show here once it is queued.` : "Progress, curves and pictures show here.";
    this.measure();
  }

  /** What came of the node: its run, or tables and texts if there is none. */
  executed(output) {
    const [run] = [output?.srpo_run ?? []].flat();
    const tables = run ? [] : [output?.srpo_table ?? []].flat();
    const texts = run ? [] : [output?.text ?? []].flat();
    this.failed("");
    this.given.replaceChildren(...texts.map((text) => make("p", { text })), ...tables.map(drawTable));
    if (run) {
      this.announce(run);
      askNow(run);
    }
    this.drawIdle();
  }

  /** What the server tells of a node is for every page that is open; another one's graph may have a node of this id. */
  heard(run) {
    const asked = this.asked();
    if (!asked || (this.node.type === STATUS ? run === asked : comesOf(run, asked))) this.announce(run);
  }

  announce(run) {
    this.announced = run;
    this.failed("");
    this.given.replaceChildren();
    hurry(run);
    hurry();
    this.listed();
  }

  /** Why the node failed, until it is at work again. */
  failed(message) {
    this.refusal.textContent = message.trim();
    this.drawIdle();
  }

  /** The canvas gives the box its height; elements of the page have their own. */
  measure() {
    if (LiteGraph.vueNodesMode || !this.run) return;
    const height = Math.max(LEAST_HEIGHT, heightIn(this.node, this.element));
    if (height === this.height) return;
    this.height = height;
    this.node.setDirtyCanvas?.(true, true);
    requestAnimationFrame(() => requestAnimationFrame(() => this.node.setDirtyCanvas?.(true, true))); // a node that grew is drawn anew
  }
}

const views = new WeakMap();

/** Do something with a node's view; what goes wrong there must not stop the page. */
function withView(node, what) {
  try {
    const view = views.get(node);
    if (view) what(view);
  } catch (error) {
    console.error("SRPO: a training can't be shown:", error);
  }
}

app.registerExtension({
  name: "SRPO.training",

  setup() {
    api.addEventListener("srpo.run", ({ detail }) => withView(nodeOf(detail.node), (view) => view.heard(detail.run)));
    api.addEventListener("execution_error", ({ detail }) => withView(nodeOf(detail.node_id), (view) => view.failed(detail.exception_message ?? "")));
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!(nodeData.name in NAMED_BY)) return;
    const { onNodeCreated, onExecuted, onRemoved } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      const result = onNodeCreated?.apply(this, arguments);
      views.set(this, new LiveView(this));
      return result;
    };
    nodeType.prototype.onExecuted = function (output) {
      const result = onExecuted?.apply(this, arguments);
      withView(this, (view) => view.executed(output));
      return result;
    };
    nodeType.prototype.onRemoved = function () {
      withView(this, (view) => view.end());
      return onRemoved?.apply(this, arguments);
    };
  },

  /** A graph's results came back: its tab was chosen again, or it was opened from the history. */
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs)) {
      withView(nodeOf(key), (view) => view.announced || view.executed(output)); // what it was told since is newer
    }
  },
});
