/* The page of the embedded host: the header, and what begins it all. */

import "./characters.js";
import "./compare.js";
import { byId, effectText, plural, tell } from "./dom.js";
import { loseAll } from "./generation.js";
import "./menu.js";
import "./stack.js";
import { forget, isConnected, nameOf, onChange, render, socket, state } from "./state.js";

let waitSeconds = 0; // until the next attempt to connect

/** [state, text] of the indicator, from what the server said last. */
function indicator() {
  if (!isConnected()) return ["off", "not connected"];
  const { asked, server } = state;
  if (asked) return ["loading", asked.filenames.length ? `loading ${asked.filenames.map(nameOf).join(" + ")}…` : "clearing…"];
  if (!server.selection.length) return ["none", "none active"];
  const parts = [server.selection.map(nameOf).join(" + "), plural(server.n_tokens, "token")];
  if (server.effect !== null && server.effect !== undefined) parts.push(effectText(server.effect));
  return ["active", parts.join(" · ")];
}

onChange(() => {
  const connected = isConnected();
  document.body.classList.toggle("disconnected", !connected);
  byId("model").textContent = connected ? state.server.model || "no model loaded" : "";
  const connection = byId("connection");
  connection.dataset.state = connected ? "on" : "off";
  connection.textContent = connected ? "connected" : waitSeconds ? "not connected, trying again…" : "connecting…";

  const [now, text] = indicator();
  const light = byId("indicator");
  light.dataset.state = now;
  light.textContent = text;
  byId("softprompts-button").dataset.state = now;
  tell(byId("announcement"), `Soft prompt: ${text}`);
  tell(byId("notice"), connected ? state.server.notice : "");
});

socket.on("connect", () => {
  waitSeconds = 0;
  state.server = null; // what was true before the line broke need not be true now; the server says at once what is
  render();
});

socket.on("disconnect", (seconds) => {
  waitSeconds = seconds;
  forget();
  loseAll();
  render();
});

render();
socket.open();
