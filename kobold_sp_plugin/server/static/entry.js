/* How an entry of the list is shown, wherever it is. */

import { element, number, plural } from "./dom.js";
import { state } from "./state.js";

const REASON_CLASS = {
  "different embedding matrix": "warn",
  incompatible: "bad",
  unreadable: "bad",
  "not with this backend": "bad",
};

export function verdictChip(entry) {
  const chip = element("span", "verdict", entry.verdict);
  chip.dataset.verdict = entry.verdict;
  return chip;
}

export const reasonLine = (entry) => element("p", `reason ${REASON_CLASS[entry.verdict] || ""}`, entry.reason);

export function tokensText(entry) {
  if (!Number.isInteger(entry.n_tokens)) return "";
  const { context } = state.server;
  return context ? `uses ${number(entry.n_tokens)} of ${number(context)}` : `uses ${plural(entry.n_tokens, "token")}`;
}
