/* Files: put in by a button or by drag and drop, deleted and brought back; and what became of each, in a list. */

import { button, byId, element, plural } from "./dom.js";
import { showMenu } from "./panel.js";
import { areSame, choose, nameOf, onChange, state } from "./state.js";

const MOST_BYTES = 134217728; // as the server's LONGEST_FILE: told here, before anything is sent
const BASE = "api/extra/softprompts";

/** What the server answers, as an object. Throws an Error whose message is fit to be shown. */
export async function ask(method, path, body) {
  const options = { method };
  if (body instanceof Blob) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  let reply;
  try {
    reply = await fetch(`${BASE}/${path}`, options);
  } catch {
    throw new Error("the server cannot be reached");
  }
  const answer = await reply.json().catch(() => ({}));
  if (reply.ok) return answer;
  const { detail } = answer;
  const messages = detail?.msg ?? Object.values(detail ?? {}).flat().join(" ");
  throw new Error(messages || `the server answered ${reply.status}`);
}

export const filePath = (filename, part = "") => `files/${encodeURIComponent(filename)}${part}`;
export const downloadLink = (filename) => `${BASE}/${filePath(filename)}`;

/** Adds a message to the list; `actions`: [label, what to do], after which the message is gone. Returns it. */
export function say(text, isBad = false, ...actions) {
  const message = element("li", isBad ? "bad" : "");
  message.append(element("span", "text", text));
  for (const [label, act] of actions) {
    message.append(
      button(label, label, () => {
        dismiss(message);
        act();
      }),
    );
  }
  message.append(button("✕", `Dismiss: ${text}`, () => dismiss(message), "round"));
  byId("messages").append(message);
  return message;
}

function dismiss(message) {
  if (message.contains(document.activeElement)) byId("search").focus();
  message.remove();
}

async function put(file) {
  const message = say(`Adding ${file.name}…`);
  try {
    if (file.size > MOST_BYTES) throw new Error(`it has more than ${MOST_BYTES / 2 ** 20} MiB`);
    const added = await ask("POST", `files?filename=${encodeURIComponent(file.name)}`, file);
    const { entry } = added;
    const parts = [`Added ${added.filename}`];
    if (added.converted_from) parts.push(`converted from ${added.converted_from}`);
    if (added.lost.length) parts.push(`without ${added.lost.join(", ")}`);
    if (entry) parts.push(entry.usable ? entry.verdict : `${entry.verdict}: ${entry.reason}`);
    const actions = entry?.usable ? [["Use it", () => choose([added.filename])]] : [];
    message.replaceWith(say(`${parts.join("; ")}.`, Boolean(entry) && !entry.usable, ...actions));
  } catch (error) {
    message.replaceWith(say(`${file.name} was refused: ${error.message}.`.replace("..", "."), true));
  }
}

/** Puts files in, one after the other. */
async function putAll(files) {
  showMenu(true);
  for (const file of files) await put(file);
}

byId("add-file").addEventListener("click", () => byId("file-input").click());
byId("file-input").addEventListener("change", () => {
  putAll([...byId("file-input").files]);
  byId("file-input").value = ""; // so that the same file can be chosen again
});

// Files may be dropped anywhere; text that is dragged into the story is the browser's affair.
let depth = 0;
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
function showDrop(entered) {
  depth = entered ? depth + entered : 0;
  byId("drop").hidden = depth <= 0;
}
for (const [name, entered] of [["dragenter", 1], ["dragleave", -1], ["dragover", 0], ["drop", 0]]) {
  document.addEventListener(name, (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    if (entered) showDrop(entered);
    if (name !== "drop") return;
    showDrop(0);
    const items = [...event.dataTransfer.items];
    if (items.some((item) => item.webkitGetAsEntry?.()?.isDirectory)) {
      showMenu(true);
      say("A folder cannot be dropped here. Put it into the softprompts folder, or convert it to a zip first.", true);
    } else putAll([...event.dataTransfer.files]);
  });
}

/** Moves a file to the trash, with an offer to bring it back. */
export async function remove(filename) {
  const name = nameOf(filename);
  const before = state.server.selection;
  try {
    const { deletion } = await ask("DELETE", filePath(filename));
    const message = `Deleted ${name} (${filename}); it is in the trash.`;
    const undo = () => restore(deletion, before.includes(filename) ? before : null);
    say(message, false, ["Undo", undo]).querySelector("button").focus();
    listTrash();
  } catch (error) {
    say(`${filename} was not deleted: ${error.message}`, true);
  }
}

/** Brings a file back; `selection`: what was in use before it was deleted, if it was in use itself. */
async function restore(deletion, selection = null) {
  try {
    const { filename } = await ask("POST", `trash/${deletion}`);
    say(`${filename} is back.`);
    const rest = selection?.filter((each) => each !== filename);
    if (rest && areSame(rest, state.server.selection)) choose(selection);
  } catch (error) {
    say(`It could not be brought back: ${error.message}`, true);
  }
  listTrash();
}

async function listTrash() {
  let values = [];
  try {
    ({ values } = await ask("GET", "trash"));
  } catch {
    return; // what was shown before is the better answer
  }
  const trash = byId("trash");
  if (trash.contains(document.activeElement)) byId("trash-title").focus();
  trash.hidden = !values.length;
  byId("trash-title").textContent = `Trash: ${plural(values.length, "file")}`;
  byId("trashed").replaceChildren(
    ...values.map(({ deletion, filename, deleted }) => {
      const item = element("li");
      const when = element("time", "", new Date(deleted).toLocaleString());
      when.dateTime = deleted;
      item.append(element("span", "filename", filename), when);
      item.append(button("Bring back", `Bring back ${filename}`, () => restore(deletion)));
      return item;
    }),
  );
}

let listedFor = "";
onChange(() => {
  // The trash changes with the folder, and other pages change it too.
  const now = JSON.stringify(state.server?.entries.map((entry) => entry.filename));
  if (now && now !== listedFor) listTrash();
  listedFor = now;
});
