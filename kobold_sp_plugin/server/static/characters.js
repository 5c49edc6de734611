/* Which soft prompts belong to which character of a front end. */

import { button, byId, element, plural } from "./dom.js";
import { ask } from "./files.js";
import { nameOf, onChange, state } from "./state.js";

const section = byId("characters");

async function put(character, filenames) {
  try {
    draw((await ask("PUT", "characters", { character, soft_prompt: filenames })).characters);
    byId("character-error").textContent = "";
    return true;
  } catch (error) {
    byId("character-error").textContent = error.message;
    return false;
  }
}

function draw(characters) {
  const all = Object.entries(characters).sort(([one], [other]) => one.localeCompare(other));
  byId("characters-title").textContent = all.length ? `Characters: ${plural(all.length, "name")}` : "Characters";
  byId("character-list").replaceChildren(
    ...all.map(([name, filenames]) => {
      const item = element("li");
      item.append(element("b", "", name), element("span", "filename", filenames.map(nameOf).join(" + ")));
      const forget = async () => (await put(name, [])) && byId("character-name").focus();
      item.append(button("Forget", `Forget ${name}`, forget));
      return item;
    }),
  );
}

async function list() {
  try {
    draw((await ask("GET", "characters")).characters);
  } catch (error) {
    byId("character-error").textContent = error.message;
  }
}

section.addEventListener("toggle", () => section.open && list());
byId("character-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await put(byId("character-name").value, state.server.selection)) byId("character-name").value = "";
});
onChange(() => {
  const { selection } = state.server ?? { selection: [] };
  byId("character-add").disabled = !selection.length;
  byId("character-add").title = selection.length ? selection.map(nameOf).join(" + ") : "Choose a soft prompt first";
});
