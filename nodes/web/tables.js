/** Tables of results as elements: columns that sort, numbers of one length, copied for a spreadsheet. */

import { addStyle, copyButton, make } from "./parts.js";

const STYLE = `
.srpo-table { display: contents; }
.srpo-table header { display: flex; justify-content: space-between; gap: 8px; font-weight: 600; position: sticky; left: 0; }
.srpo-table button { font: inherit; color: inherit; background: none; border: 0; padding: 0; margin: 0; cursor: pointer; }
.srpo-table header button { flex: none; font-weight: 400; color: var(--descrip-text); }
.srpo-table button:hover, .srpo-table button:focus-visible { color: var(--input-text); text-decoration: underline; }
.srpo-table table { border-collapse: collapse; font-variant-numeric: tabular-nums; align-self: flex-start; }
.srpo-table table:has(.long) { width: 100%; }
.srpo-table th, .srpo-table td { padding: 1px 10px 1px 0; text-align: left; white-space: nowrap; font-weight: 400; }
.srpo-table td { border-top: 1px solid var(--border-color); overflow: hidden; text-overflow: ellipsis; max-width: 320px; }
.srpo-table td.long { max-width: 120px; width: 100%; }
.srpo-table th { color: var(--descrip-text); position: sticky; top: -6px; background: var(--comfy-input-bg); }
.srpo-table .number { text-align: right; }
.srpo-table th[aria-sort=ascending] button::after { content: " ↑"; }
.srpo-table th[aria-sort=descending] button::after { content: " ↓"; }
.srpo-table .note { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--descrip-text); position: sticky; left: 0; }
`;

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

/** A table {title, columns, rows, note} as an element: rows that a click on a column's name sorts. */
export function drawTable(table) {
  addStyle(STYLE);
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
  const copier = copyButton(() => tsv(table), "Copy as tab-separated text, for a spreadsheet");
  const header = make("header", {}, make("span", { text: table.title }), copier);
  const drawn = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  const note = table.note ? [make("p", { text: table.note, className: "note" })] : [];
  return make("div", { className: "srpo-table" }, header, drawn, ...note);
}
