"use strict";

/*
 * The page of the embedded host: a story that streams, and the Soft Prompts menu.
 *
 * What the page says about soft prompts comes from the server's last `softprompts` event and from nothing else: a
 * click asks, the event that follows answers, and "loading" stands between the two. Text is only ever set as text
 * (textContent, value): names and descriptions come out of files from anywhere.
 */

const DEFAULT_OPENING = "The door opened and";
const REASON_CLASS = {
  "different embedding matrix": "warn",
  incompatible: "bad",
  unreadable: "bad",
  "not with this backend": "bad",
};

const byId = (id) => document.getElementById(id);
const story = byId("story");
const mirror = byId("mirror");
const scroller = byId("scroller");
const menu = byId("softprompts");
const menuButton = byId("softprompts-button");
const rowList = byId("rows");

const socket = new SocketClient(
  `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/socket.io/?EIO=4&transport=websocket`,
);

const longest = byId("max-length").max; // where the server knows no context

let server = null; // the server's last `softprompts` payload
let asked = null; // {filename, answered}: what was clicked, until an event tells what became of it
let waitSeconds = 0; // until the next attempt to connect

// ---------------------------------------------------------------------------------------------- small helpers

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Shows `text` in `node`, or hides the node where there is none. A live region speaks only when its text changes. */
function tell(node, text) {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = !text;
}

function remember(key, value) {
  try {
    localStorage.setItem(`kobold_sp.${key}`, value);
  } catch {
    // Storage is full or switched off: the page works, and forgets when it is closed.
  }
}

function recall(key) {
  try {
    return localStorage.getItem(`kobold_sp.${key}`);
  } catch {
    return null;
  }
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// ---------------------------------------------------------------------------------------------- soft prompts

function nameOf(filename) {
  return server.entries.find((entry) => entry.filename === filename)?.name || filename;
}

/** Whether the selection is this file and no other; "" stands for none. */
function isSelected(filename) {
  const { selection } = server;
  return filename ? selection.length === 1 && selection[0] === filename : !selection.length;
}

function effectText(effect) {
  const percent = effect * 100;
  if (percent < 0.1) return "no effect on the next token";
  return `moves ${percent < 10 ? percent.toFixed(1) : Math.round(percent)}% of the next-token probability`;
}

/** [state, text] of the indicator, from what the server said last. */
function indicator() {
  if (!socket.connected || !server) return ["off", "not connected"];
  if (asked) return ["loading", asked.filename ? `loading ${nameOf(asked.filename)}…` : "clearing…"];
  if (!server.selection.length) return ["none", "none active"];
  const parts = [server.selection.map(nameOf).join(" + "), plural(server.n_tokens, "token")];
  if (server.effect !== null && server.effect !== undefined) parts.push(effectText(server.effect));
  return ["active", parts.join(" · ")];
}

function tokensText(entry) {
  if (!Number.isInteger(entry.n_tokens)) return "";
  if (!server.context) return `uses ${plural(entry.n_tokens, "token")}`;
  return `uses ${entry.n_tokens} of ${server.context}`;
}

/** Fills a row with an entry's texts; the row itself stays, and with it the keyboard's place. */
function fillRow(row, entry) {
  const name = element("span", "name", entry.name);
  name.id = `${row.id}-name`;
  const details = element("div", "details");
  details.id = `${row.id}-details`;
  row.setAttribute("aria-labelledby", name.id);
  row.setAttribute("aria-describedby", details.id);

  const facts = element("p", "facts");
  const tokens = tokensText(entry);
  if (tokens) facts.append(element("span", "tokens", tokens));
  if (entry.filename) facts.append(element("span", "filename", entry.filename));
  if (entry.author) facts.append(element("span", "author", `by ${entry.author}`));
  if (entry.supported?.length) facts.append(element("span", "supported", `made for ${entry.supported.join(", ")}`));
  details.append(facts);
  if (entry.description) details.append(element("p", "description", entry.description));
  if (entry.reason) details.append(element("p", `reason ${REASON_CLASS[entry.verdict] || ""}`, entry.reason));

  const head = element("div", "head");
  head.append(element("span", "dot"), name);
  if (entry.verdict) {
    const chip = element("span", "verdict", entry.verdict);
    chip.dataset.verdict = entry.verdict;
    head.append(chip);
  }
  row.replaceChildren(head, details);
}

const rows = new Map(); // filename -> {row, content}
let rowsMade = 0;

function rowFor(entry) {
  let known = rows.get(entry.filename);
  if (!known) {
    const row = element("li", rows.size ? "row arrived" : "row");
    row.id = `row-${(rowsMade += 1)}`;
    row.dataset.filename = entry.filename;
    row.setAttribute("role", "option");
    row.tabIndex = -1;
    known = { row, content: "" };
    rows.set(entry.filename, known);
  }
  const content = JSON.stringify([entry, server.context]);
  if (content !== known.content) fillRow(known.row, entry);
  known.content = content;
  return known.row;
}

function renderRows() {
  if (!server) return;
  const none = { filename: "", name: "None", description: "The model alone.", usable: true };
  const entries = [none, ...server.entries];
  const filenames = new Set(entries.map((entry) => entry.filename));
  const focused = document.activeElement?.closest?.("#rows > .row");
  const place = focused ? [...rowList.children].indexOf(focused) : -1;
  const first = rows.size === 0;

  for (const [filename, { row }] of rows) {
    if (filenames.has(filename)) continue;
    row.remove();
    rows.delete(filename);
  }
  let next = rowList.firstElementChild;
  for (const entry of entries) {
    const row = rowFor(entry);
    if (first) row.classList.remove("arrived");
    // A row that is where it belongs is not touched: moving it would take the focus away.
    if (row === next) next = row.nextElementSibling;
    else rowList.insertBefore(row, next);

    const active = socket.connected && (server.selection.includes(entry.filename) || isSelected(entry.filename));
    row.classList.toggle("active", active);
    row.classList.toggle("unusable", !entry.usable);
    row.setAttribute("aria-selected", String(active));
    row.setAttribute("aria-disabled", String(!entry.usable || !socket.connected));
    row.setAttribute("aria-busy", String(asked?.filename === entry.filename));
  }
  if (focused && !focused.isConnected) {
    rowList.children[Math.min(place, rowList.children.length - 1)].focus();
  } else if (!focused) {
    giveTabStop(rowList.querySelector("[aria-selected=true]") || rowList.firstElementChild);
  }
}

/** One row of the list is reached by Tab; the arrow keys go on from there. */
function giveTabStop(row) {
  for (const other of rowList.children) other.tabIndex = other === row ? 0 : -1;
}

function render() {
  const connected = socket.connected && server !== null;
  document.body.classList.toggle("disconnected", !connected);
  byId("model").textContent = connected ? server.model || "no model loaded" : "";
  const connection = byId("connection");
  connection.dataset.state = connected ? "on" : "off";
  connection.textContent = connected ? "connected" : waitSeconds ? "not connected, trying again…" : "connecting…";

  const [state, text] = indicator();
  const light = byId("indicator");
  light.dataset.state = state;
  light.textContent = text;
  menuButton.dataset.state = state;
  tell(byId("announcement"), `Soft prompt: ${text}`);

  tell(byId("notice"), connected ? server.notice : "");
  tell(byId("menu-state"), connected ? "" : "Not connected to the server. This list may be out of date.");
  if (server) {
    const usable = server.entries.filter((entry) => entry.usable).length;
    byId("count").textContent = server.entries.length ? `${usable} of ${server.entries.length} usable` : "";
    byId("empty").hidden = server.entries.length > 0;
  }
  byId("refresh").disabled = !connected;
  byId("max-length").max = (connected && server.context) || longest;
  renderRows();
  renderControls();
}

function choose(row) {
  const { filename } = row.dataset;
  if (row.getAttribute("aria-disabled") === "true" || asked?.filename === filename) return;
  if (!asked && isSelected(filename)) return;
  tell(byId("menu-error"), "");
  const question = { filename, answered: false };
  asked = question;
  socket.emit("load_softprompt", filename, () => {
    // Where another client undid the choice at once, nothing has changed and no event comes: ask for one.
    question.answered = true;
    if (asked === question) socket.emit("sp_list_refresh", "");
  });
  render();
}

rowList.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (row) choose(row);
});

rowList.addEventListener("focusin", (event) => giveTabStop(event.target.closest(".row")));

rowList.addEventListener("keydown", (event) => {
  const all = [...rowList.children];
  const at = all.indexOf(event.target.closest(".row"));
  const goal = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (goal !== undefined) all[Math.max(0, Math.min(goal, all.length - 1))].focus();
  else if (event.key === "Enter" || event.key === " ") choose(all[at]);
  else return;
  event.preventDefault();
});

function showMenu(open) {
  menu.hidden = !open;
  menuButton.setAttribute("aria-expanded", String(open));
  document.body.classList.toggle("menu-open", open);
  if (open) (rowList.querySelector("[tabindex='0']") || byId("close")).focus();
  else menuButton.focus();
}

menuButton.addEventListener("click", () => showMenu(menu.hidden));
byId("close").addEventListener("click", () => showMenu(false));
byId("refresh").addEventListener("click", () => socket.emit("sp_list_refresh", ""));
menu.addEventListener("keydown", (event) => {
  if (event.key === "Escape") showMenu(false);
});

socket.on("softprompts", (payload) => {
  server = payload;
  if (asked && (asked.answered || isSelected(asked.filename))) asked = null;
  render();
});

socket.on("softprompt_error", ({ filename, message }) => {
  if (asked && (!filename || asked.filename === filename)) asked = null;
  tell(byId("menu-error"), filename && !message.includes(filename) ? `${filename}: ${message}` : message);
  render();
});

// ---------------------------------------------------------------------------------------------- the story

// What is being written: {id, before: the story until then, state, position: how many come first, arrived: text that
// is not in the story yet}.
let writing = null;
let failure = ""; // why the last one ended early
let fresh = null; // {before, after}: the story before and after the last continuation, while it still ends there
const past = []; // what Undo brings back: the story before each continuation, newest last
const future = []; // what Redo brings back: {text, fresh} that Undo or Retry took, newest last
let saveTimer = 0;

/** Puts the story's text into the mirror, which sizes the box and tints the last continuation. */
function renderStory() {
  const text = story.value;
  if (fresh && !text.startsWith(fresh.after)) fresh = null;
  const start = fresh ? fresh.before.length : text.length;
  const end = fresh ? fresh.after.length : text.length;
  const tinted = element("span", "fresh", text.slice(start, end));
  // The zero-width space gives a last empty line its height.
  mirror.replaceChildren(text.slice(0, start), tinted, `${text.slice(end)}\u200b`);
  clearTimeout(saveTimer);
  saveTimer = setTimeout(() => remember("story", story.value), 400);
}

function setStory(text, last = null) {
  const following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  story.value = text;
  fresh = last;
  renderStory();
  if (following) scroller.scrollTop = scroller.scrollHeight;
}

/** Notes a text that Undo can bring back. */
function keep(text) {
  past.push(text);
  if (past.length > 100) past.shift();
}

function progressText() {
  if (!writing) return failure;
  if (writing.state === "stopping") return "stopping…";
  if (writing.state === "queued" && writing.position) return `waiting, ${writing.position} before you…`;
  return "writing…";
}

function renderControls() {
  const ready = socket.connected && server !== null && Boolean(server.model);
  const focused = document.activeElement;
  byId("submit").hidden = Boolean(writing);
  byId("submit").disabled = !ready;
  byId("stop").hidden = !writing;
  byId("retry").disabled = Boolean(writing) || !ready || !fresh;
  byId("undo").disabled = Boolean(writing) || past.every((text) => text === story.value);
  byId("redo").disabled = Boolean(writing) || !future.length;
  byId("new").disabled = Boolean(writing) || !story.value;
  story.readOnly = Boolean(writing);
  const progress = byId("progress");
  progress.classList.toggle("bad", !writing && Boolean(failure));
  if (progress.textContent !== progressText()) progress.textContent = progressText();
  // The button under the keyboard's focus has just vanished: its place is taken by the other one.
  if (focused === byId("submit") && writing) byId("stop").focus();
  if (focused === byId("stop") && !writing) byId("submit").focus();
}

/** The newest part of the story that fits into one message, in the worst case of six bytes for each character. */
function newestPart(text) {
  return text.slice(-Math.floor(socket.maxPayload / 6) + 1000).replace(/^[\udc00-\udfff]/, "");
}

function submit() {
  if (writing || byId("submit").disabled) return;
  if (!byId("controls").reportValidity()) return;
  // A space at the end is one that the continuation brings itself.
  const before = story.value.replace(/ +$/, "") || DEFAULT_OPENING;
  const id = `${Date.now()}-${Math.random().toString(36).slice(2)}`;
  writing = { id, before, state: "queued", position: 0, arrived: "" };
  failure = "";
  keep(story.value && before);
  future.length = 0;
  setStory(before, { before, after: before });
  socket.emit("generate", {
    id,
    prompt: newestPart(before),
    max_length: byId("max-length").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
  });
  render();
}

/** Puts what has come into the story; once for each frame that is drawn, as a long story takes time to lay out. */
function append() {
  if (!writing?.arrived) return;
  const { before, arrived } = writing;
  const after = story.value + arrived.replace(/\r\n?/g, "\n"); // as a text box keeps its line ends
  writing.arrived = "";
  setStory(after, { before, after });
}

function finish(problem) {
  append();
  const { before } = writing;
  writing = null;
  failure = problem;
  if (story.value === before) {
    past.pop(); // nothing was written, so there is nothing to take back
    fresh = null;
  }
  remember("story", story.value);
  render();
}

function stop() {
  if (!writing || writing.state === "stopping") return;
  writing.state = "stopping";
  socket.emit("stop_generation", { id: writing.id });
  render();
}

/** The story goes back to what it was before the last continuation; Redo has what it was until now. */
function undo() {
  future.push({ text: story.value, fresh });
  while (past.at(-1) === story.value) past.pop();
  setStory(past.pop());
  failure = "";
  render();
}

function redo() {
  const { text, fresh: last } = future.pop();
  keep(story.value);
  setStory(text, last);
  render();
}

function retry() {
  const taken = { text: story.value, fresh };
  setStory(fresh.before);
  past.pop();
  submit();
  future.push(taken);
  render();
}

function newStory() {
  keep(story.value);
  failure = "";
  setStory("");
  render();
  story.focus();
}

socket.on("generation", ({ id, state, text, position, error }) => {
  if (!writing || writing.id !== id) return;
  if (text && !writing.arrived) requestAnimationFrame(append);
  writing.arrived += text || "";
  if (state === "error") return finish(error || "The continuation failed.");
  if (state === "done" || state === "stopped") return finish("");
  if (writing.state !== "stopping") writing.state = state;
  writing.position = position || 0;
  renderControls();
});

byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("stop").addEventListener("click", stop);
byId("retry").addEventListener("click", retry);
byId("undo").addEventListener("click", undo);
byId("redo").addEventListener("click", redo);
byId("new").addEventListener("click", newStory);

story.addEventListener("input", () => {
  renderStory();
  renderControls();
});
story.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  else if (event.key === "Escape") stop();
  else return;
  event.preventDefault();
});

for (const id of ["max-length", "temperature"]) {
  const input = byId(id);
  input.value = recall(id) || input.value;
  input.addEventListener("input", () => {
    if (input.validity.valid) remember(id, input.value);
    byId("temperature-value").value = byId("temperature").value;
  });
}
byId("temperature-value").value = byId("temperature").value;
window.addEventListener("pagehide", () => remember("story", story.value));

// ---------------------------------------------------------------------------------------------- begin

socket.on("connect", () => {
  waitSeconds = 0;
  server = null; // what was true before the line broke need not be true now; the server says at once what is
  render();
});

socket.on("disconnect", (seconds) => {
  waitSeconds = seconds;
  asked = null;
  tell(byId("menu-error"), "");
  if (writing) finish("The connection was lost while writing. The story so far is kept.");
  render();
});

story.placeholder = `Write an opening, then press Submit. Or press it now: the story begins with “${DEFAULT_OPENING}”.`;
setStory(recall("story") || "");
render();
socket.open();
