/* The list of soft prompts: search, sort, choose. A grid for the keyboard: arrows between rows and along them. */

import { showDetails } from "./details.js";
import { button, byId, element, number, plural, recall, remember, tell } from "./dom.js";
import { reasonLine, tokensText, verdictChip } from "./entry.js";
import { say } from "./files.js";
import { choose, isConnected, nameOf, onChange, refresh, render, state, toggle, wanted } from "./state.js";

const NONE = { filename: "", name: "None", description: "The model alone.", usable: true };

const byText = (one, other) => one.localeCompare(other, undefined, { numeric: true, sensitivity: "base" });
const byName = (one, other) => byText(one.name, other.name) || byText(one.filename, other.filename);
const ORDERS = {
  usable: (one, other) => other.usable - one.usable || byName(one, other),
  name: byName,
  filename: (one, other) => byText(one.filename, other.filename),
  author: (one, other) => !one.author - !other.author || byText(one.author, other.author) || byName(one, other),
  tokens: (one, other) => (one.n_tokens ?? Infinity) - (other.n_tokens ?? Infinity) || byName(one, other),
};

const rowList = byId("rows");
const rows = new Map(); // filename -> {row, content}
let rowsMade = 0;

/** `text` without case and accents, to search in. */
const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

/** The entries that the toolbar leaves, in its order. */
function shown() {
  const words = plain(byId("search").value).split(/\s+/).filter(Boolean);
  const usableOnly = byId("usable-only").checked;
  const found = state.server.entries.filter((entry) => {
    if (usableOnly && !entry.usable) return false;
    const { name, filename, author, description, supported, verdict } = entry;
    const text = plain([name, filename, author, description, ...supported, verdict].join("\n"));
    return words.every((word) => text.includes(word));
  });
  found.sort(ORDERS[byId("sort").value]);
  return words.length ? found : [NONE, ...found];
}

/** Fills a row with an entry's texts; the row itself stays, and with it the keyboard's place. */
function fillRow(row, entry) {
  const name = element("span", "name", entry.name);
  name.id = `${row.id}-name`;
  const about = element("div", "about");
  about.id = `${row.id}-about`;
  row.setAttribute("aria-labelledby", name.id);
  row.setAttribute("aria-describedby", about.id);

  const facts = element("p", "facts");
  const tokens = tokensText(entry);
  if (tokens) facts.append(element("span", "tokens", tokens));
  if (entry.filename) facts.append(element("span", "filename", entry.filename));
  if (entry.author) facts.append(element("span", "author", `by ${entry.author}`));
  if (entry.supported?.length) facts.append(element("span", "supported", `made for ${entry.supported.join(", ")}`));
  if (facts.childElementCount) about.append(facts);
  if (entry.description) about.append(element("p", "description", entry.description));
  if (entry.reason) about.append(reasonLine(entry));

  const head = element("div", "head");
  head.append(element("span", "dot"), name);
  if (entry.verdict) head.append(verdictChip(entry));
  const what = element("div", "what");
  what.setAttribute("role", "gridcell");
  what.append(head, about);
  const actions = element("div", "actions");
  actions.setAttribute("role", "gridcell");
  if (entry.filename) {
    actions.append(
      button("+", `Add ${entry.name} to those in use`, () => toggle(entry.filename), "add round"),
      button("i", `Details of ${entry.name}`, () => showDetails(entry.filename), "round info"),
    );
    for (const each of actions.children) each.tabIndex = -1;
  }
  row.replaceChildren(what, actions);
}

function rowFor(entry) {
  let known = rows.get(entry.filename);
  if (!known) {
    const row = element("div", rows.size ? "row arrived" : "row");
    row.id = `row-${(rowsMade += 1)}`;
    row.dataset.filename = entry.filename;
    row.setAttribute("role", "row");
    row.tabIndex = -1;
    known = { row, content: "" };
    rows.set(entry.filename, known);
  }
  const content = JSON.stringify([entry, state.server.context]);
  if (content !== known.content) fillRow(known.row, entry);
  known.content = content;
  return known.row;
}

const isSelected = (filename) => {
  const { selection } = state.server;
  return filename ? selection.includes(filename) : !selection.length;
};

function markRow(row, entry) {
  const { filename } = entry;
  const active = isConnected() && isSelected(filename);
  const cannot = !entry.usable || !isConnected();
  row.classList.toggle("active", active);
  row.classList.toggle("unusable", !entry.usable);
  row.setAttribute("aria-selected", String(active));
  row.setAttribute("aria-disabled", String(cannot));
  row.setAttribute("aria-busy", String(Boolean(state.asked) && isAskedFor(filename)));
  const add = row.querySelector(".add");
  if (!add) return;
  add.disabled = cannot;
  add.textContent = active ? "−" : "+";
  add.title = active ? `Take ${entry.name} off` : `Add ${entry.name} to those in use`;
  add.setAttribute("aria-label", add.title);
}

/** Whether what was asked for is about this row. */
function isAskedFor(filename) {
  const { filenames } = state.asked;
  if (!filename) return !filenames.length;
  return filenames.includes(filename) && !state.server.selection.includes(filename);
}

function renderRows() {
  const entries = shown();
  const filenames = new Set(entries.map((entry) => entry.filename));
  const active = document.activeElement;
  const focused = rowList.contains(active) ? active.closest(".row") : null;
  const place = focused ? [...rowList.children].indexOf(focused) : -1;
  const first = rows.size === 0;
  const known = new Set(state.server.entries.map((entry) => entry.filename));

  for (const [filename, { row }] of rows) {
    if (filenames.has(filename)) continue;
    row.remove();
    row.classList.remove("arrived");
    if (filename && !known.has(filename)) rows.delete(filename);
  }
  let next = rowList.firstElementChild;
  for (const entry of entries) {
    const row = rowFor(entry);
    if (first) row.classList.remove("arrived");
    if (row === next) next = row.nextElementSibling;
    else rowList.insertBefore(row, next);
    markRow(row, entry);
  }
  if (focused && !focused.isConnected) {
    (rowList.children[Math.min(place, rowList.children.length - 1)] || byId("search")).focus();
  } else if (focused && document.activeElement !== active) {
    (active.isConnected ? active : focused).focus(); // what is moved, or filled anew, loses the focus
  } else if (!focused) {
    giveTabStop(rowList.querySelector("[aria-selected=true]") || rowList.firstElementChild);
  }
  return entries.filter((entry) => entry.filename).length;
}

/** One row of the list is reached by Tab; the arrow keys go on from there. */
function giveTabStop(row) {
  for (const other of rowList.children) other.tabIndex = other === row ? 0 : -1;
}

function draw() {
  tell(byId("menu-state"), isConnected() ? "" : "Not connected to the server. This list may be out of date.");
  tell(byId("menu-error"), state.refused);
  byId("refresh").disabled = !isConnected();
  if (!state.server) return;
  const { entries } = state.server;
  const count = renderRows();
  const usable = entries.filter((entry) => entry.usable).length;
  byId("count").textContent = entries.length ? `${number(usable)} of ${number(entries.length)} usable` : "";
  byId("empty").hidden = entries.length > 0;
  tell(byId("nothing-found"), entries.length && !count ? "Nothing here matches." : "");
  tell(byId("found"), count < entries.length ? `${plural(count, "soft prompt")} of ${entries.length} shown` : "");
}

/** Chooses the row's soft prompt in place of all that are in use. */
function chooseRow(row) {
  if (row.getAttribute("aria-disabled") === "true") return;
  const { filename } = row.dataset;
  const before = wanted();
  choose(filename ? [filename] : []);
  if (before.length < 2) return;
  const names = before.map(nameOf).join(" + ");
  say(`${names} made room for another choice.`, false, ["Put back", () => choose(before)]);
}

rowList.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (row && !event.target.closest("button")) chooseRow(row);
});

rowList.addEventListener("focusin", (event) => giveTabStop(event.target.closest(".row")));

rowList.addEventListener("keydown", (event) => {
  const row = event.target.closest(".row");
  const all = [...rowList.children];
  const at = all.indexOf(row);
  const cells = [row, ...row.querySelectorAll("button:not(:disabled)")];
  const along = cells.indexOf(event.target);
  const goal = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  const side = { ArrowRight: along + 1, ArrowLeft: along - 1 }[event.key];
  if (goal !== undefined) all[Math.max(0, Math.min(goal, all.length - 1))].focus();
  else if (side !== undefined) cells[Math.max(0, Math.min(side, cells.length - 1))].focus();
  else if (event.target !== row) return; // a button, which knows what to do
  else if (event.key === "Enter" || event.key === " ") chooseRow(row);
  else if (event.key === "+" && row.querySelector(".add:not(:disabled)")) toggle(row.dataset.filename);
  else return;
  event.preventDefault();
});

byId("refresh").addEventListener("click", refresh);
byId("search").addEventListener("input", render);
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") rowList.firstElementChild?.focus();
  else if (event.key === "Escape" && byId("search").value) {
    byId("search").value = "";
    render();
  } else return;
  event.preventDefault();
});
byId("sort").value = recall("sort") || "usable";
if (!byId("sort").value) byId("sort").value = "usable";
byId("sort").addEventListener("change", () => {
  remember("sort", byId("sort").value);
  render();
});
byId("usable-only").checked = recall("usable-only") === "true";
byId("usable-only").addEventListener("change", () => {
  remember("usable-only", byId("usable-only").checked);
  render();
});
onChange(draw);
