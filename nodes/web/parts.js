/** What SRPO's scripts share: elements, the clipboard, and a box of their own under a node that both of ComfyUI's renderers draw. */

import { app } from "../../scripts/app.js";

const MARGIN = 8;

const STYLE = `
.srpo-box { box-sizing: border-box; display: flex; flex-direction: column; gap: 6px; padding: 6px; overflow: auto; outline: none;
  border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-input-bg); color: var(--input-text);
  font: 12px/18px system-ui, sans-serif; user-select: text; cursor: auto; contain: inline-size; }
.srpo-box:focus-visible { border-color: var(--descrip-text); }
.srpo-box:empty { display: none; }
`;

/** An element with a text (never markup), properties and children. */
export function make(tag, { text, ...given } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), given);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

/** Add rules to the page, once for each text. */
export function addStyle(text) {
  if (![...document.head.querySelectorAll("style")].some((style) => style.textContent === text)) {
    document.head.append(make("style", { text }));
  }
}

/** Put a text on the clipboard; pages that aren't served by https or from this machine have only the old way. */
export async function copy(text) {
  if (navigator.clipboard?.writeText) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, style: "position: fixed; opacity: 0" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser refused");
}

/** A button that copies what `text()` returns, and says that it has. */
export function copyButton(text, title) {
  const button = make("button", { text: "Copy", type: "button", title });
  button.onclick = async () => {
    button.textContent = await copy(text()).then(() => "Copied", () => "Not allowed");
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  return button;
}

function scrolls(element) {
  const { overflowX, overflowY } = getComputedStyle(element);
  const down = /auto|scroll/.test(overflowY) && element.scrollHeight > element.clientHeight;
  return down || (/auto|scroll/.test(overflowX) && element.scrollWidth > element.clientWidth);
}

/** The wheel scrolls in a box that was clicked on, and zooms the canvas over others, as with ComfyUI's own text boxes. */
function onWheel(event) {
  const box = event.currentTarget;
  const chosen = box.contains(document.activeElement) && !event.ctrlKey && !event.metaKey;
  event.stopPropagation();
  for (let element = event.target; chosen && box.contains(element); element = element.parentElement) if (scrolls(element)) return;
  event.preventDefault();
  app.canvas.processMouseWheel(event);
}

/**
 * A box under a node, as a widget that is no setting: saved graphs and queued prompts don't hold it.
 * `options`: getMinHeight and getMaxHeight in pixels with both margins, for the canvas.
 */
export function addBox(node, name, className, options) {
  addStyle(STYLE);
  const element = make("div", { className: `srpo-box ${className}`, tabIndex: 0 });
  element.dataset.captureWheel = "true";
  element.addEventListener("wheel", onWheel, { passive: false });
  element.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
  element.addEventListener("copy", (event) => event.stopPropagation()); // else the page copies the selected nodes
  const widget = node.addDOMWidget(name, name, element, { serialize: false, hideInPanel: true, margin: MARGIN, ...options });
  widget.serialize = false; // the page's own saving asks this one
  return widget;
}

/** Pixels that an element's content takes, with the box's margins, in a node of this width. */
export function heightIn(node, element) {
  const probe = element.cloneNode(true);
  probe.style.cssText = `position: fixed; visibility: hidden; height: auto; max-height: none; width: ${node.size[0] - 2 * MARGIN}px`;
  document.body.append(probe);
  const height = probe.offsetHeight;
  probe.remove();
  return height && height + 2 * MARGIN;
}

/** The node of a key of `app.nodeOutputs` ("id" or "subgraph:id") or of the server's ("id of a subgraph's node:id"). */
export function nodeOf(key) {
  const root = app.rootGraph ?? app.graph;
  const within = (graph, id) => graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
  const path = String(key).split(":");
  let graph = root;
  for (const part of path.slice(0, -1)) graph = root?.subgraphs?.get(part) ?? within(graph, part)?.subgraph;
  return within(graph, path.at(-1));
}
