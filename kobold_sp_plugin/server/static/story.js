/* The story: a text box that a continuation streams into, and what takes back and brings back. */

import { byId, element, recall, remember } from "./dom.js";
import { generate, newestPart, stopGeneration, withPlainLineEnds } from "./generation.js";
import { isConnected, onChange, render, state } from "./state.js";

const DEFAULT_OPENING = "The door opened and";

const story = byId("story");
const mirror = byId("mirror");
const scroller = byId("scroller");
const longest = byId("max-length").max; // where the server knows no context

// What is being written: {id, before: the story until then, state, position: how many come first, arrived: text that
// is not in the story yet}.
let writing = null;
let failure = ""; // why the last one ended early
let fresh = null; // {before, after}: the story before and after the last continuation, while it still ends there
const past = []; // what Undo brings back: the story before each continuation, newest last
const future = []; // what Redo brings back: {text, fresh} that Undo or Retry took, newest last
let saveTimer = 0;

/** What a continuation would be asked for now: the story, and the settings below it; null where one is wrong. */
export function request() {
  if (!byId("controls").reportValidity()) return null;
  // A space at the end is one that the continuation brings itself.
  const before = story.value.replace(/ +$/, "") || DEFAULT_OPENING;
  const maxLength = byId("max-length").valueAsNumber;
  const temperature = byId("temperature").valueAsNumber;
  return { before, fields: { prompt: newestPart(before), max_length: maxLength, temperature } };
}

export const isReady = () => isConnected() && Boolean(state.server.model) && !writing;

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

/** Puts a continuation that was written elsewhere behind the text that it continues. */
export function take(before, text) {
  keep(story.value);
  future.length = 0;
  failure = "";
  setStory(before + text, { before, after: before + text });
  render();
  story.focus();
}

function progressText() {
  if (!writing) return failure;
  if (writing.state === "stopping") return "stopping…";
  if (writing.state === "queued" && writing.position) return `waiting, ${writing.position} before you…`;
  return "writing…";
}

function renderControls() {
  const focused = document.activeElement;
  byId("submit").hidden = Boolean(writing);
  byId("submit").disabled = !isReady();
  byId("stop").hidden = !writing;
  byId("retry").disabled = !isReady() || !fresh;
  byId("undo").disabled = Boolean(writing) || past.every((text) => text === story.value);
  byId("redo").disabled = Boolean(writing) || !future.length;
  byId("new").disabled = Boolean(writing) || !story.value;
  byId("max-length").max = (isConnected() && state.server.context) || longest;
  story.readOnly = Boolean(writing);
  const progress = byId("progress");
  progress.classList.toggle("bad", !writing && Boolean(failure));
  if (progress.textContent !== progressText()) progress.textContent = progressText();
  // The button under the keyboard's focus has just vanished: its place is taken by the other one.
  if (focused === byId("submit") && writing) byId("stop").focus();
  if (focused === byId("stop") && !writing) byId("submit").focus();
}

function submit() {
  const wanted = isReady() && request();
  if (!wanted) return;
  const { before, fields } = wanted;
  writing = { before, state: "queued", position: 0, arrived: "" };
  failure = "";
  keep(story.value && before);
  future.length = 0;
  setStory(before, { before, after: before });
  writing.id = generate(fields, hear);
  render();
}

/** Puts what has come into the story; once for each frame that is drawn, as a long story takes time to lay out. */
function append() {
  if (!writing?.arrived) return;
  const { before, arrived } = writing;
  const after = story.value + withPlainLineEnds(arrived);
  writing.arrived = "";
  setStory(after, { before, after });
}

function hear({ state: now, text, position, error }) {
  if (text && !writing.arrived) requestAnimationFrame(append);
  writing.arrived += text || "";
  if (now === "lost") finish("The connection was lost while writing. The story so far is kept.");
  else if (now === "error") finish(error || "The continuation failed.");
  else if (now === "done" || now === "stopped") finish("");
  else {
    if (writing.state !== "stopping") writing.state = now;
    writing.position = position || 0;
    renderControls();
  }
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
  stopGeneration(writing.id);
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
    render();
  });
}
byId("temperature-value").value = byId("temperature").value;
window.addEventListener("pagehide", () => remember("story", story.value));

onChange(renderControls);
story.placeholder = `Write an opening, then press Submit. Or press it now: the story begins with “${DEFAULT_OPENING}”.`;
setStory(recall("story") || "");
