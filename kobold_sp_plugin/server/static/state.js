/*
 * What the server said last, and what it was asked since.
 *
 * What the page says about soft prompts comes from the server's last `softprompts` event and from nothing else: a
 * click asks, the event that follows answers, and "loading" stands between the two.
 */

import { SocketClient } from "./socket.js";

export const socket = new SocketClient(
  `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/socket.io/?EIO=4&transport=websocket`,
);

export const state = {
  server: null, // the server's last `softprompts` payload
  asked: null, // {filenames, answered}: what was chosen, until an event tells what became of it
  refused: "", // why the last choice was not carried out
};

const views = [];

/** Has `draw` called whenever the state has changed. */
export const onChange = (draw) => views.push(draw);

export function render() {
  for (const draw of views) draw();
}

export const isConnected = () => socket.connected && state.server !== null;
export const entryOf = (filename) => state.server?.entries.find((entry) => entry.filename === filename);
export const nameOf = (filename) => entryOf(filename)?.name || filename;
export const areSame = (some, others) => some.length === others.length && some.every((each, i) => each === others[i]);

/** The selection as it will be, if the server does what it was asked. */
export const wanted = () => state.asked?.filenames ?? state.server?.selection ?? [];

/** Asks for these soft prompts, in order, to be the selection. */
export function choose(filenames) {
  if (!isConnected() || areSame(filenames, wanted())) return;
  state.refused = "";
  const question = { filenames, answered: false };
  state.asked = question;
  socket.emit("load_softprompt", filenames.length > 1 ? filenames : (filenames[0] ?? ""), () => {
    // Where another client undid the choice at once, nothing has changed and no event comes: ask for one.
    question.answered = true;
    if (state.asked === question) refresh();
  });
  render();
}

/** Puts a soft prompt behind those in use, or takes it away. */
export function toggle(filename) {
  const now = wanted();
  choose(now.includes(filename) ? now.filter((each) => each !== filename) : [...now, filename]);
}

export const refresh = () => socket.emit("sp_list_refresh", "");

socket.on("softprompts", (payload) => {
  state.server = payload;
  const { asked } = state;
  if (asked && (asked.answered || areSame(asked.filenames, payload.selection))) state.asked = null;
  render();
});

socket.on("softprompt_error", ({ filename, message }) => {
  const filenames = [filename].flat().filter(Boolean);
  if (state.asked && (!filenames.length || areSame(filenames, state.asked.filenames))) state.asked = null;
  const named = filenames.length !== 1 || message.includes(filenames[0]);
  state.refused = named ? message : `${filenames[0]}: ${message}`;
  render();
});

/** Forgets what was true of a connection that is no more. */
export function forget() {
  state.asked = null;
  state.refused = "";
}
