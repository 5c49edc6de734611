/* The panel that holds the Soft Prompts menu, and the button that opens it. */

import { byId } from "./dom.js";

const panel = byId("softprompts");
const opener = byId("softprompts-button");

export function showMenu(open) {
  if (panel.hidden !== open) return;
  panel.hidden = !open;
  opener.setAttribute("aria-expanded", String(open));
  document.body.classList.toggle("menu-open", open);
  const first = byId("details").hidden ? document.querySelector("#rows > [tabindex='0']") : byId("details-title");
  if (open) (first || byId("close")).focus();
  else opener.focus();
}

opener.addEventListener("click", () => showMenu(panel.hidden));
byId("close").addEventListener("click", () => showMenu(false));
panel.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented) showMenu(false);
});
