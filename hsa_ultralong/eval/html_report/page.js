"use strict";
// Comfort only: without this script everything can be read. Tables of coloured cells take one tab stop and the arrow
// keys; the list of misses can be narrowed down.
for (const table of document.querySelectorAll("table")) {
  const rows = [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("td.cell")]);
  const cells = rows.flat();
  if (!cells.length) continue;
  for (const cell of cells) cell.tabIndex = -1;
  cells[0].tabIndex = 0;
  table.addEventListener("focusin", (event) => {
    if (!cells.includes(event.target)) return;
    for (const cell of cells) cell.tabIndex = cell === event.target ? 0 : -1;
  });
  table.addEventListener("keydown", (event) => {
    const y = rows.findIndex((row) => row.includes(event.target));
    if (y < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const x = rows[y].indexOf(event.target);
    const down = (step) => {
      for (let at = y + step; rows[at]; at += step) if (rows[at].length) return rows[at][Math.min(x, rows[at].length - 1)];
    };
    const next = {
      ArrowRight: () => rows[y][x + 1], ArrowLeft: () => rows[y][x - 1], ArrowDown: () => down(1), ArrowUp: () => down(-1),
      Home: () => rows[y][0], End: () => rows[y][rows[y].length - 1],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    const target = next();
    if (target) target.focus();
  });
}

const filters = document.getElementById("filters");
if (filters) {
  filters.hidden = false;
  const articles = [...document.querySelectorAll("article.failure")];
  const output = filters.querySelector("output");
  const narrow = () => {
    const wanted = new FormData(filters);
    const text = wanted.get("text").toLowerCase();
    let shown = 0;
    for (const article of articles) {
      const fits =
        (!wanted.get("task") || article.dataset.task === wanted.get("task")) &&
        (!wanted.get("length") || article.dataset.length === wanted.get("length")) &&
        (!wanted.get("cause") || article.dataset.cause.split("|").includes(wanted.get("cause"))) &&
        (!text || article.textContent.toLowerCase().includes(text));
      article.hidden = !fits;
      shown += fits;
    }
    output.textContent = shown === articles.length ? "" : `${shown} of ${articles.length}`;
  };
  filters.addEventListener("input", narrow);
  filters.addEventListener("submit", (event) => event.preventDefault());
}
