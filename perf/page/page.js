"use strict";

const COLLATOR = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
const NUMBER = /^[-+−]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?/i;

// The number that a figure such as 1,234 or 1.2e-03 or 95 % or 12+3 begins with; words among figures are above all.
function valueOf(text) {
  const found = NUMBER.exec(text);
  return found ? Number(found[0].replaceAll(",", "").replace("−", "-")) : Infinity;
}

// Equal rows stay in the order in which they are, and empty cells come last either way.
function sortBy(table, header) {
  const body = table.tBodies[0];
  const down = header.getAttribute("aria-sort") === "ascending";
  const isWords = header.classList.contains("text");
  const entries = Array.from(body.rows, (row) => {
    const text = row.cells[header.cellIndex].textContent.trim();
    return { row, text, value: isWords ? 0 : valueOf(text) };
  });
  entries.sort((a, b) => {
    if (!a.text || !b.text) return !a.text - !b.text;
    const order = (a.value > b.value) - (a.value < b.value) || COLLATOR.compare(a.text, b.text);
    return down ? -order : order;
  });
  const sorted = document.createDocumentFragment();
  for (const { row } of entries) sorted.append(row);
  body.append(sorted);
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
}

function makeSortable(table) {
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sortBy(table, header));
    header.replaceChildren(button);
  }
}

// A box above the table: rows stay that hold every word in it, in any of their cells.
function makeFiltered(table) {
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "rows with all of these words";
  input.setAttribute("aria-label", "Show rows with all of these words");
  const count = document.createElement("output");
  const box = document.createElement("div");
  box.className = "filter";
  box.append(input, count);
  table.parentElement.before(box);
  let entries = null;
  input.addEventListener("input", () => {
    entries ??= Array.from(table.tBodies[0].rows, (row) => {
      return { row, text: Array.from(row.cells, (cell) => cell.textContent).join(" ").toLowerCase() };
    });
    const words = input.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const { row, text } of entries) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${entries.length} rows`;
  });
}

document.querySelectorAll(".wide > table").forEach(makeSortable);
document.querySelectorAll(".wide > table.filtered").forEach(makeFiltered);
