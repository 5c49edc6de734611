/* Asks the server for text; what comes is told to whoever asked. */

import { socket } from "./state.js";

const running = new Map(); // id -> who asked

/**
 * Begins a generation with the API's `fields`. `heard({state, text, position, error})` is called with what becomes of
 * it, the last time with state "done", "stopped", "error" or "lost". Returns its id.
 */
export function generate(fields, heard) {
  const id = `${Date.now()}-${Math.random().toString(36).slice(2)}`;
  running.set(id, heard);
  socket.emit("generate", { ...fields, id });
  return id;
}

export const stopGeneration = (id) => socket.emit("stop_generation", { id });

/** Tells all who wait that nothing will come any more. */
export function loseAll() {
  const all = [...running.values()];
  running.clear();
  for (const heard of all) heard({ state: "lost" });
}

/** The newest part of a story that fits into one message, in the worst case of six bytes for each character. */
export function newestPart(text) {
  return text.slice(-Math.floor(socket.maxPayload / 6) + 1000).replace(/^[\udc00-\udfff]/, "");
}

/** A piece of text with the line ends that a text box keeps. */
export const withPlainLineEnds = (text) => text.replace(/\r\n?/g, "\n");

socket.on("generation", (event) => {
  const heard = running.get(event.id);
  if (["done", "stopped", "error"].includes(event.state)) running.delete(event.id);
  heard?.(event);
});
