/* All about one soft prompt, and what can be done with its file. */

import { compare } from "./compare.js";
import { byId, effectText, element, plural } from "./dom.js";
import { reasonLine, verdictChip } from "./entry.js";
import { ask, downloadLink, filePath, remove, say } from "./files.js";
import { showMenu } from "./panel.js";
import { choose, entryOf, isConnected, onChange, state, toggle, wanted } from "./state.js";
import { isReady } from "./story.js";

const MOST_ROWS = 300;

let filename = null; // whose details are shown
let found = null; // what the server told of it
let renaming = false; // the server was asked to, and may tell of the new name before it answers, or after that
let renamedTo = false; // what the server has answered, and not yet told of
let shownFor = ""; // the entry that it told it for: another one, and it is asked again

export function showDetails(of) {
  filename = of;
  renaming = renamedTo = false;
  shownFor = "";
  byId("rename-form").hidden = true;
  byId("list").hidden = true;
  byId("details").hidden = false;
  draw();
  byId("softprompts").scrollTop = 0;
  byId("details-title").focus();
}

function back() {
  const row = [...document.querySelectorAll("#rows > .row")].find((each) => each.dataset.filename === filename);
  const hadFocus = byId("details").contains(document.activeElement);
  filename = found = null;
  renaming = renamedTo = false;
  byId("details").hidden = true;
  byId("list").hidden = false;
  if (hadFocus) (row || byId("search")).focus();
}

async function load(entry) {
  const of = filename;
  found = null;
  byId("facts").replaceChildren();
  byId("row-table").hidden = true;
  byId("lengths").textContent = entry.n_tokens ? "reading…" : "";
  byId("effect").textContent = "";
  if (!entry.n_tokens) return;
  try {
    const answer = await ask("GET", filePath(of, "/details"));
    if (filename !== of) return;
    found = answer;
    drawFound();
  } catch (error) {
    if (filename === of) byId("lengths").textContent = `More cannot be told: ${error.message}`;
    return;
  }
  if (!found.usable) return;
  byId("effect").textContent = "Measuring how much it changes…";
  try {
    const { effect, remark } = await ask("GET", filePath(of, "/effect"));
    if (filename === of) byId("effect").textContent = `It ${effectText(effect).replace(/^no/, "has no")}. ${remark}`;
  } catch (error) {
    if (filename === of) byId("effect").textContent = `Its effect cannot be measured: ${error.message}`;
  }
}

/** A value out of a file, as text that is not too long. */
function written(value) {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text.length > 300 ? `${text.slice(0, 300)}…` : text;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** What the file says of its training, in words. */
function trainedOn({ training, made_of: parts }) {
  if (Array.isArray(parts) && parts.length) return `made of ${parts.map((part) => written(part?.name ?? "")).join(" and ")}`;
  if (!training || typeof training !== "object") return "the file does not say";
  const words = [];
  if (isNumber(training.documents)) words.push(plural(training.documents, "text"));
  if (isNumber(training.tokens)) words.push(plural(training.tokens, "token"));
  if (isNumber(training.steps)) words.push(plural(training.steps, "step"));
  if (training.model) words.push(`with ${written(training.model)}`);
  const { held_out_without: without, held_out_after: after } = training;
  if (isNumber(without) && isNumber(after)) {
    const better = after < without ? "it helps with" : "it does not help with";
    words.push(`${better} texts it has not seen (loss ${after.toFixed(3)}, without it ${without.toFixed(3)})`);
  }
  return words.join(", ") || "the file does not say";
}

function drawFound() {
  const order = found.order === "after_bos" ? "after the beginning-of-text mark" : "before everything else";
  const facts = [
    ["Rows", `${plural(found.n_tokens, "token")}, each of ${plural(found.width, "number")} (${found.dtype})`],
    ["Trained on", trainedOn(found)],
    ["Made for", found.supported.join(", ") || "the file does not say"],
    ["Fingerprint", found.fingerprint ? "yes: it can be told which model it was made for" : "none"],
    ["Stands", order],
    ["Format", found.format],
    ...Object.entries(found.metadata)
      .filter(([key]) => !["name", "author", "description", "supported"].includes(key))
      .slice(0, 30)
      .map(([key, value]) => [key.slice(0, 60), written(value)]),
  ];
  byId("facts").replaceChildren(
    ...facts.flatMap(([term, text]) => [element("dt", "", term), element("dd", "", text)]),
  );
  const lengths = found.rows.map((row) => row.length);
  const most = Math.max(...lengths, found.usual_lengths?.[1] ?? 0);
  const range = (low, high) => `${low.toPrecision(3)} to ${high.toPrecision(3)}`;
  const usual = found.usual_lengths ? `; most of this model's own tokens: ${range(...found.usual_lengths)}` : "";
  const hint = found.hint ? ` There is ${found.hint.sentence}.` : "";
  byId("lengths").textContent = `Lengths ${range(Math.min(...lengths), Math.max(...lengths))}${usual}.${hint}`;
  byId("row-table").hidden = false;
  byId("nearest-title").hidden = !found.usual_lengths;
  byId("row-body").replaceChildren(
    ...found.rows.slice(0, MOST_ROWS).map((row, at) => {
      const line = element("tr");
      const length = element("td", "length", row.length.toPrecision(3));
      const bar = element("span", "bar");
      bar.style.width = `${(100 * row.length) / most}%`;
      length.append(bar);
      line.append(element("th", "", String(at + 1)), length);
      line.firstElementChild.scope = "row";
      if (found.usual_lengths) {
        const near = element("td", "near");
        for (const [token, cosine] of row.nearest) {
          near.append(element("q", "", token), ` ${cosine.toFixed(2)} `);
        }
        line.append(near);
      }
      return line;
    }),
  );
  const left = found.rows.length - MOST_ROWS;
  byId("more-rows").textContent = left > 0 ? `and ${plural(left, "row")} more` : "";
}

function draw() {
  if (filename === null || !state.server) return;
  const entry = entryOf(filename);
  if (!entry) return renaming || back(); // it is gone, and the list says so
  if (entry.filename === renamedTo) renaming = renamedTo = false;
  const inUse = wanted().includes(filename);
  byId("details-title").textContent = entry.name;
  const tokens = entry.n_tokens ? plural(entry.n_tokens, "token") : "";
  const line = [filename, entry.author && `by ${entry.author}`, tokens].filter(Boolean).join(" · ");
  byId("details-line").textContent = line;
  byId("details-verdict").replaceChildren(verdictChip(entry), reasonLine(entry));
  byId("details-description").textContent = entry.description;
  byId("use").textContent = inUse ? "Take off" : "Use";
  byId("use").disabled = !isConnected() || (!entry.usable && !inUse);
  byId("add").hidden = inUse || !wanted().length;
  byId("add").disabled = !isConnected() || !entry.usable;
  byId("try").disabled = !isReady() || !entry.usable;
  byId("download").href = downloadLink(filename);
  byId("download").hidden = !entry.n_tokens;
  for (const id of ["rename", "delete"]) byId(id).disabled = !isConnected();
  const now = JSON.stringify([entry, state.server.model]);
  if (now !== shownFor) load(entry);
  shownFor = now;
}

byId("back").addEventListener("click", back);
byId("details").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  event.preventDefault();
  if (byId("rename-form").hidden) back();
  else endRename();
});
byId("use").addEventListener("click", () => {
  if (wanted().includes(filename)) toggle(filename);
  else choose([filename]);
});
byId("add").addEventListener("click", () => toggle(filename));
byId("try").addEventListener("click", () => {
  const of = filename;
  if (matchMedia("(max-width: 860px)").matches) showMenu(false); // there the menu lies over the story
  compare(of);
});
byId("delete").addEventListener("click", () => remove(filename));

byId("rename").addEventListener("click", () => {
  byId("new-name").value = entryOf(filename).name;
  byId("new-filename").value = filename;
  byId("rename-error").hidden = true;
  byId("rename-form").hidden = false;
  byId("new-name").focus();
});

function endRename() {
  byId("rename-form").hidden = true;
  byId("rename").focus();
}

byId("rename-cancel").addEventListener("click", endRename);
byId("rename-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const changes = {};
  const [name, to] = [byId("new-name").value.trim(), byId("new-filename").value.trim()];
  if (name !== entryOf(filename).name) changes.name = name;
  if (to !== filename) changes.filename = to;
  if (Object.keys(changes).length) {
    renaming = true;
    try {
      const renamed = await ask("PATCH", filePath(filename), changes);
      filename = renamedTo = renamed.filename;
      if (renamed.filename !== to) say(`The file is named ${renamed.filename}.`);
    } catch (error) {
      renaming = false;
      byId("rename-error").textContent = error.message;
      byId("rename-error").hidden = false;
      return;
    }
  }
  endRename();
  draw();
});
onChange(draw);
