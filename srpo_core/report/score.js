"use strict";
document.documentElement.classList.add("script");
const table = document.getElementById("scores"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const rows = [...body.rows], find = (id) => document.getElementById(id);
const order = find("order"), upward = find("upward"), filter = find("filter"), words = find("showwords");
const value = (row, column) => column === 0
  ? row.cells[0].querySelector("b").textContent
  : parseFloat(row.cells[column].textContent.replace("−", "-"));
const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, undefined, {numeric: true}) : a - b);

function card(row, column) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  const picture = row.querySelector(".what a, .what img, .what .none").cloneNode(true);
  const number = document.createElement("b");
  number.textContent = row.cells[column].textContent + " ";
  caption.append(number, row.cells[0].querySelector("div > span:last-child").lastChild.textContent);
  figure.append(picture, caption);
  return figure;
}

function arrange() {
  const column = Number(order.value), sign = upward.checked ? 1 : -1;
  const sorted = [...rows].sort((a, b) => sign * compare(value(a, column), value(b, column)));
  body.append(...sorted);
  heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : sign > 0 ? "ascending" : "descending"));
  if (column === 0 || !find("best")) return;
  const highest = upward.checked ? [...sorted].reverse() : sorted;
  const most = Math.min(6, Math.floor(rows.length / 2));
  find("best").replaceChildren(...highest.slice(0, most).map((row) => card(row, column)));
  find("worst").replaceChildren(...highest.slice(-most).reverse().map((row) => card(row, column)));
  const name = order.selectedOptions[0].textContent;
  document.querySelectorAll(".by").forEach((by) => { by.textContent = name[0].toLowerCase() + name.slice(1); });
}

function search() {
  const wanted = filter.value.trim().toLowerCase();
  let shown = 0;
  for (const row of rows) {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    shown += !row.hidden;
  }
  find("count").textContent = wanted ? `${shown} of ${rows.length}` : `${rows.length} in all`;
}

heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  upward.checked = Number(order.value) === column ? !upward.checked : column === 0;
  order.value = String(column);
  arrange();
}));
order.addEventListener("change", () => { upward.checked = order.value === "0"; arrange(); });
upward.addEventListener("change", arrange);
filter.addEventListener("input", search);
words.addEventListener("change", () => table.classList.toggle("words", words.checked));
arrange();
search();
