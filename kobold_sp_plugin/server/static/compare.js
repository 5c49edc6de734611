/* The next words twice, on one seed: without and with the soft prompts. */

import { byId, tell } from "./dom.js";
import { generate, stopGeneration, withPlainLineEnds } from "./generation.js";
import { nameOf, onChange, state } from "./state.js";
import { isReady, request, take } from "./story.js";

const ENDS = { done: "", stopped: "stopped", error: "failed", lost: "The connection was lost." };
const SIDES = ["without", "with"];

// {before, filename: of one soft prompt, or null for the selection, sides: {without, with}: {id, text, state, note}}
let comparison = null;

const isRunning = () => Boolean(comparison) && SIDES.some((side) => !(comparison.sides[side].state in ENDS));

/** Writes both; `filename`: the soft prompt to compare with, in place of the selection. */
export function compare(filename = null) {
  const wanted = isReady() && request();
  if (!wanted) return;
  stopAll();
  const seed = Math.floor(Math.random() * 2 ** 32);
  const names = (filename === null ? state.server.selection : [filename]).map(nameOf).join(" + ");
  comparison = { before: wanted.before, filename, sides: {} };
  byId("with-title").textContent = `With ${names}`;
  for (const side of SIDES) {
    const shown = { text: "", state: "queued", note: "" };
    comparison.sides[side] = shown;
    byId(`${side}-before`).textContent = wanted.before.slice(-120);
    const fields = { ...wanted.fields, sampler_seed: seed };
    if (side === "without") fields.soft_prompt = "";
    else if (filename !== null) fields.soft_prompt = filename;
    shown.id = generate(fields, (event) => hear(shown, event));
  }
  byId("compare").hidden = false;
  draw();
  byId("compare").scrollIntoView({ block: "nearest" });
  byId("compare-title").focus();
}

function hear(shown, { state: now, text, error }) {
  shown.text += withPlainLineEnds(text || "");
  shown.state = now;
  shown.note = now === "error" ? error : (ENDS[now] ?? "");
  if (comparison && Object.values(comparison.sides).includes(shown)) requestAnimationFrame(draw);
}

function draw() {
  const can = isReady() && !isRunning();
  byId("compare-button").disabled = !can || !state.server.selection.length;
  if (!comparison) return;
  for (const side of SIDES) {
    const { text, state: now, note } = comparison.sides[side];
    const node = byId(`${side}-text`);
    if (node.textContent !== text) node.textContent = text;
    tell(byId(`${side}-note`), note || (now === "queued" ? "waiting…" : ""));
    byId(`${side}-note`).classList.toggle("bad", now === "error" || now === "lost");
    byId(`${side}-take`).disabled = !isReady() || isRunning() || !text;
  }
  const [one, other] = SIDES.map((side) => comparison.sides[side]);
  const isSame = !isRunning() && one.state === "done" && other.state === "done" && one.text === other.text;
  const same = "Both are the same: here the soft prompt changes nothing.";
  tell(byId("compare-state"), isRunning() ? "writing…" : isSame ? same : "The same seed for both.");
  byId("compare-stop").hidden = !isRunning();
  byId("compare-again").hidden = isRunning();
  byId("compare-again").disabled = !can;
}

function stopAll() {
  for (const { id, state: now } of Object.values(comparison?.sides ?? {})) if (!(now in ENDS)) stopGeneration(id);
}

function close() {
  stopAll();
  comparison = null;
  byId("compare").hidden = true;
  draw();
  byId("story").focus();
}

for (const side of SIDES) {
  byId(`${side}-take`).addEventListener("click", () => {
    const { before, sides } = comparison;
    close();
    take(before, sides[side].text);
  });
}
byId("compare-button").addEventListener("click", () => compare());
byId("compare-again").addEventListener("click", () => compare(comparison.filename));
byId("compare-stop").addEventListener("click", stopAll);
byId("compare-close").addEventListener("click", close);
byId("compare").addEventListener("keydown", (event) => {
  if (event.key === "Escape") close();
});
onChange(draw);
