/** Tables and texts under SRPO's nodes: what `nodes/show.py` sends as `srpo_table` and `text` when a node has run. */

import { app } from "../../scripts/app.js";

const WIDGET = "srpo_results";
const MARGIN = 8;
const SOCKET_HEIGHT = 24;
const MOST_OF_A_NODE = 240; // pixels of height; what is longer scrolls, and shows as the node is made larger

const STYLE = `
.srpo { box-sizing: border-box; display: flex; flex-direction: column; gap: 6px; padding: 6px; overflow: auto; outline: none;
  border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-input-bg); color: var(--input-text);
  font: 12px/18px system-ui, sans-serif; user-select: text; cursor: auto; contain: inline-size; max-height: 300px; }
.dom-widget > .srpo { max-height: none; }
.srpo:focus-visible { border-color: var(--descrip-text); }
.srpo:empty { display: none; }
.srpo p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.srpo header { display: flex; justify-content: space-between; gap: 8px; font-weight: 600; position: sticky; left: 0; }
.srpo button { font: inherit; color: inherit; background: none; border: 0; padding: 0; margin: 0; cursor: pointer; }
.srpo header button { flex: none; font-weight: 400; color: var(--descrip-text); }
.srpo button:hover, .srpo button:focus-visible { color: var(--input-text); text-decoration: underline; }
.srpo table { border-collapse: collapse; font-variant-numeric: tabular-nums; align-self: flex-start; }
.srpo table:has(.long) { width: 100%; }
.srpo th, .srpo td { padding: 1px 10px 1px 0; text-align: left; white-space: nowrap; font-weight: 400; }
.srpo td { border-top: 1px solid var(--border-color); overflow: hidden; text-overflow: ellipsis; max-width: 320px; }
.srpo td.long { max-width: 120px; width: 100%; }
.srpo th { color: var(--descrip-text); position: sticky; top: -6px; background: var(--comfy-input-bg); }
.srpo .number { text-align: right; }
.srpo th[aria-sort=ascending] button::after { content: " ↑"; }
.srpo th[aria-sort=descending] button::after { content: " ↓"; }
.srpo .note { color: var(--descrip-text); position: sticky; left: 0; }
`;

function make(tag, { text, ...given } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), given);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

/** How the numbers of a column are written: whole ones as they are, others with four digits of the largest. */
function writer(values) {
  const numbers = values.filter((value) => typeof value === "number");
  if (numbers.every(Number.isInteger)) return String;
  const largest = Math.max(...numbers.map(Math.abs), 1e-3);
  const decimals = Math.min(6, Math.max(0, 3 - Math.floor(Math.log10(largest))));
  return (value) => value.toFixed(decimals);
}

/** "number", or "long" for texts that give way when the node is narrow, or "" for short ones. */
function kindOf(values) {
  if (values.some((value) => typeof value === "number")) return "number";
  return values.some((value) => plain(value).length > 16) ? "long" : "";
}

const plain = (cell) => (cell === null || cell === undefined ? "" : String(cell));
const tsv = ({ columns, rows }) => [columns, ...rows].map((row) => row.map((cell) => plain(cell).replace(/\s+/g, " ")).join("\t")).join("\n");

/** Order of two cells; empty ones come last either way. */
function order(a, b, sign) {
  const empty = (a === null || a === "") - (b === null || b === "");
  if (empty) return empty;
  const bothNumbers = typeof a === "number" && typeof b === "number";
  return sign * (bothNumbers ? a - b : plain(a).localeCompare(plain(b), undefined, { numeric: true }));
}

/** Put a text on the clipboard; pages that aren't served by https or from this machine have only the old way. */
async function copy(text) {
  if (navigator.clipboard?.writeText) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, style: "position: fixed; opacity: 0" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser refused");
}

function copyButton(table) {
  const button = make("button", { text: "Copy", type: "button", title: "Copy as tab-separated text, for a spreadsheet" });
  button.onclick = async () => {
    button.textContent = await copy(tsv(table)).then(() => "Copied", () => "Not allowed");
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  return button;
}

/** A table as DOM: its title, rows that a click on a column's name sorts, and its note. */
function drawTable(table) {
  const columns = table.columns.map((_, i) => table.rows.map((row) => row[i]));
  const writers = columns.map(writer);
  const kinds = columns.map(kindOf);
  const body = make("tbody");
  const fill = (rows) =>
    body.replaceChildren(...rows.map((row) => make("tr", {}, ...row.map((cell, i) => {
      const text = typeof cell === "number" ? writers[i](cell) : plain(cell);
      return make("td", { text, title: plain(cell), className: kinds[i] });
    }))));
  const heads = table.columns.map((name, i) => {
    const head = make("th", { className: kinds[i], ariaSort: "none" });
    const button = make("button", { text: name, type: "button", title: "Sort by this column" });
    button.onclick = () => {
      const downward = head.ariaSort === "none" ? kinds[i] === "number" : head.ariaSort === "ascending";
      heads.forEach((other) => (other.ariaSort = "none"));
      head.ariaSort = downward ? "descending" : "ascending";
      fill([...table.rows].sort((a, b) => order(a[i], b[i], downward ? -1 : 1)));
    };
    head.append(button);
    return head;
  });
  fill(table.rows);
  const parts = [make("header", {}, make("span", { text: table.title }), copyButton(table))];
  parts.push(make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
  if (table.note) parts.push(make("p", { text: table.note, className: "note" }));
  return parts;
}

/** Height that an element's content takes at a width, in pixels. */
function heightAt(element, width) {
  const probe = element.cloneNode(true);
  probe.style.cssText = `position: fixed; visibility: hidden; height: auto; max-height: none; width: ${width}px`;
  document.body.append(probe);
  const height = probe.offsetHeight;
  probe.remove();
  return height;
}

/** The wheel scrolls results that were clicked on, and zooms the canvas over others, as with ComfyUI's own text boxes. */
function onWheel(event) {
  const box = event.currentTarget;
  const scrolls = box.contains(document.activeElement) && !event.ctrlKey && !event.metaKey;
  event.stopPropagation();
  if (scrolls && (box.scrollHeight > box.clientHeight || box.scrollWidth > box.clientWidth)) return;
  event.preventDefault();
  app.canvas.processMouseWheel(event);
}

function addResults(node) {
  const element = make("div", { className: "srpo", tabIndex: 0 });
  element.dataset.captureWheel = "true";
  element.addEventListener("wheel", onWheel, { passive: false });
  element.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
  element.addEventListener("copy", (event) => event.stopPropagation()); // else the page copies the selected nodes
  const widget = node.addDOMWidget(WIDGET, "srpo_results", element, {
    serialize: false,
    hideInPanel: true,
    margin: MARGIN,
    getMinHeight: () => Math.min(widget.srpoHeight, MOST_OF_A_NODE),
    getMaxHeight: () => widget.srpoHeight,
  });
  widget.serialize = false; // a result is no setting: saved graphs don't hold it
  return widget;
}

/** Show a run's tables and texts under a node, in place of what was there. */
function show(node, output) {
  const [texts, tables] = [output?.text, output?.srpo_table].map((given) => [given ?? []].flat());
  let widget = node.widgets?.find((other) => other.name === WIDGET);
  if (!widget && !texts.length && !tables.length) return;
  widget ??= addResults(node);
  widget.element.replaceChildren(...texts.map((text) => make("p", { text })), ...tables.flatMap(drawTable));
  const empty = !widget.element.firstChild;
  widget.srpoHeight = empty ? 0 : heightAt(widget.element, node.size[0] - 2 * MARGIN) + 2 * MARGIN;
  node.setDirtyCanvas?.(true, true);
}

/** The node of a key of `app.nodeOutputs`: an id, or "subgraph:id". */
function nodeOf(key) {
  const [id, subgraph] = String(key).split(":").reverse();
  const graph = subgraph ? app.rootGraph?.subgraphs?.get(subgraph) : (app.rootGraph ?? app.graph);
  return graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
}

/** A text that comes through a link needs no more room than its socket: the rest is left to pictures and tables. */
function shrinkLinkedTexts(node) {
  for (const widget of node.widgets ?? []) {
    if (widget.type !== "customtext" || !widget.options || widget.options.getMinHeight) continue;
    const linked = () => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
    const height = () => (linked() ? SOCKET_HEIGHT : undefined);
    Object.assign(widget.options, { getMinHeight: height, getMaxHeight: height });
  }
}

const ours = (node) => Boolean(node?.type?.startsWith("SRPO"));

function safely(node, output) {
  try {
    show(node, output);
  } catch (error) {
    console.error("SRPO: results of a node can't be shown:", error);
  }
}

app.registerExtension({
  name: "SRPO.results",

  setup() {
    document.head.append(make("style", { text: STYLE }));
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
