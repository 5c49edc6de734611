/* What is in use, in its order, and what it leaves of the model's context. */

import { button, byId, element, number, plural } from "./dom.js";
import { choose, entryOf, isConnected, nameOf, onChange, state, wanted } from "./state.js";

const list = byId("stack");
const items = new Map(); // filename -> its item in the list

function move(filename, by) {
  const order = [...wanted()];
  const from = order.indexOf(filename);
  const to = from + by;
  if (from < 0 || to < 0 || to >= order.length) return;
  order.splice(to, 0, ...order.splice(from, 1));
  choose(order);
}

function takeOff(filename) {
  const next = list.children[[...list.children].indexOf(items.get(filename)) + 1] || list.children[0];
  const hadFocus = items.get(filename)?.contains(document.activeElement);
  choose(wanted().filter((each) => each !== filename));
  if (hadFocus) (next !== items.get(filename) && next?.querySelector(".off") || byId("search")).focus();
}

function itemFor(filename) {
  if (items.has(filename)) return items.get(filename);
  const item = element("li");
  item.dataset.filename = filename;
  item.append(
    element("span", "name"),
    element("span", "tokens"),
    button("↑", "", () => move(filename, -1), "up round"),
    button("↓", "", () => move(filename, 1), "down round"),
    button("✕", "", () => takeOff(filename), "off round"),
  );
  items.set(filename, item);
  return item;
}

function say(node, text) {
  node.title = text;
  node.setAttribute("aria-label", text);
}

function drawItem(item, filename, at, count) {
  const name = nameOf(filename);
  const tokens = entryOf(filename)?.n_tokens;
  item.querySelector(".name").textContent = name;
  item.querySelector(".tokens").textContent = Number.isInteger(tokens) ? plural(tokens, "token") : "";
  const [up, down, off] = item.querySelectorAll("button");
  say(up, `Move ${name} up`);
  say(down, `Move ${name} down`);
  say(off, `Take ${name} off`);
  up.hidden = down.hidden = count < 2;
  up.disabled = !isConnected() || at === 0;
  down.disabled = !isConnected() || at === count - 1;
  off.disabled = !isConnected();
}

/** The bar: soft tokens, what may be written next, and the rest, of the model's context. */
function drawBudget() {
  const { context, n_tokens: soft, selection } = state.server;
  const bar = byId("budget");
  bar.hidden = !context;
  if (!context) {
    byId("budget-text").textContent = `${plural(soft, "soft token")}; nothing tells how many the model takes.`;
    return;
  }
  const writing = Math.min(byId("max-length").valueAsNumber || 0, context - soft);
  const room = context - soft - writing;
  const parts = selection.map((filename) => [entryOf(filename)?.n_tokens ?? 0, "soft"]);
  bar.replaceChildren(
    ...[...parts, [writing, "writing"], [room, "room"]].map(([share, kind]) => {
      const part = element("span", kind);
      part.style.flexGrow = share;
      return part;
    }),
  );
  byId("budget-text").replaceChildren(
    element("span", "soft", plural(soft, "soft token")), ", ",
    element("span", "writing", `${number(writing)} to be written`), ", ",
    element("span", "room", `${number(room)} left for your story`), `, of ${number(context)}`,
  );
  byId("budget-text").classList.toggle("bad", room < context / 8);
}

function draw() {
  const selection = state.server?.selection ?? [];
  byId("tray").hidden = !selection.length;
  if (!selection.length) return;
  byId("tray-title").textContent = selection.length > 1 ? "In use, in this order" : "In use";
  for (const [filename, item] of items) {
    if (selection.includes(filename)) continue;
    item.remove();
    items.delete(filename);
  }
  const focused = document.activeElement;
  selection.forEach((filename, at) => {
    const item = itemFor(filename);
    if (list.children[at] !== item) list.insertBefore(item, list.children[at] ?? null);
    drawItem(item, filename, at, selection.length);
  });
  if (list.contains(focused)) {
    // What is moved loses the focus; a button that can go no further gives it to the one that can go back.
    const able = focused.disabled ? focused.closest("li").querySelector("button:not(:disabled)") : focused;
    if (document.activeElement !== able) able?.focus();
  }
  drawBudget();
}

onChange(draw);
