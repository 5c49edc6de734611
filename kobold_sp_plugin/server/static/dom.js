/* Small helpers. Text is only ever set as text: names and descriptions come out of files from anywhere. */

export const byId = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A button with a label that may be shorter than what it says to those who hear it. */
export function button(label, said, onClick, className = "") {
  const made = element("button", className, label);
  made.type = "button";
  if (said !== label) {
    made.setAttribute("aria-label", said);
    made.title = said;
  }
  made.addEventListener("click", onClick);
  return made;
}

/** Shows `text` in `node`, or hides the node where there is none. A live region speaks only when its text changes. */
export function tell(node, text) {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = !text;
}

export function remember(key, value) {
  try {
    localStorage.setItem(`kobold_sp.${key}`, value);
  } catch {
    // Storage is full or switched off: the page works, and forgets when it is closed.
  }
}

export function recall(key) {
  try {
    return localStorage.getItem(`kobold_sp.${key}`);
  } catch {
    return null;
  }
}

export const number = (value) => value.toLocaleString("en");
export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

export function effectText(effect) {
  const percent = effect * 100;
  if (percent < 0.1) return "no effect on the next token";
  return `moves ${percent < 10 ? percent.toFixed(1) : Math.round(percent)}% of the next-token probability`;
}
