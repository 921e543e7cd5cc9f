/** Tables and texts under SRPO's nodes: what `nodes/show.py` sends as `srpo_table` and `text` when a node has run. */

import { app } from "../../scripts/app.js";
import { addBox, addStyle, heightIn, make, nodeOf } from "./parts.js";
import { drawTable } from "./tables.js";

const WIDGET = "srpo_results";
const SOCKET_HEIGHT = 24;
const TEXT_HEIGHT = 72;
const OWN_VIEW = ["SRPOTrain", "SRPOTrainingStatus"]; // training.js shows what these send
const MOST_OF_A_NODE = 240; // pixels of height; what is longer scrolls, and shows as the node is made larger

const STYLE = `
.srpo { max-height: 300px; }
.dom-widget > .srpo { max-height: none; }
.srpo p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
`;

/** Show a run's tables and texts under a node, in place of what was there. */
function show(node, output) {
  const [texts, tables] = [output?.text, output?.srpo_table].map((given) => [given ?? []].flat());
  let widget = node.widgets?.find((other) => other.name === WIDGET);
  if (!widget && !texts.length && !tables.length) return;
  widget ??= addBox(node, WIDGET, "srpo", {
    getMinHeight: () => Math.min(widget.srpoHeight, MOST_OF_A_NODE),
    getMaxHeight: () => widget.srpoHeight,
  });
  widget.element.replaceChildren(...texts.map((text) => make("p", { text })), ...tables.map(drawTable));
  widget.srpoHeight = widget.element.firstChild ? heightIn(node, widget.element) : 0;
  node.setDirtyCanvas?.(true, true);
}

/** A text that comes through a link needs no more room than its socket: the rest is left to pictures and tables. */
function shrinkLinkedTexts(node) {
  for (const widget of node.widgets ?? []) {
    if (widget.type !== "customtext" || !widget.options || widget.options.getMinHeight) continue;
    const linked = () => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
    const most = OWN_VIEW.includes(node.type) ? TEXT_HEIGHT : undefined; // the view needs the room
    const height = (other) => () => (linked() ? SOCKET_HEIGHT : other);
    Object.assign(widget.options, { getMinHeight: height(undefined), getMaxHeight: height(most) });
  }
}

const ours = (node) => Boolean(node?.type?.startsWith("SRPO"));

function safely(node, output) {
  if (OWN_VIEW.includes(node.type)) return;
  try {
    show(node, output);
  } catch (error) {
    console.error("SRPO: results of a node can't be shown:", error);
  }
}

app.registerExtension({
  name: "SRPO.results",

  setup() {
    addStyle(STYLE);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("SRPO")) return;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      const result = onNodeCreated?.apply(this, arguments);
      shrinkLinkedTexts(this);
      return result;
    };
    nodeType.prototype.onExecuted = function (output) {
      const result = onExecuted?.apply(this, arguments);
      safely(this, output);
      return result;
    };
  },

  /** A graph's results came back: its tab was chosen again, or it was opened from the history. */
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs)) {
      const node = nodeOf(key);
      if (ours(node)) safely(node, output);
    }
  },
});
