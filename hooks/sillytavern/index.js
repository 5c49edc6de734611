/* Soft Prompts in SillyTavern: what `kobold-sp serve` has in its folder, what is in use, and for whom. */

const SETTINGS = "soft_prompts";
const PATH = "/api/extra/softprompts";
const REFRESH_MS = 3000; // while the block is in sight
const PATIENCE_MS = 15000; // for one answer; the server reads a large file when it is chosen

const state = {
  server: null, // what the server said last: the selection, the files and their verdicts
  characters: {}, // name -> file names
  problem: "", // why nothing is known of the server
  refusal: "", // why it did not do what was asked of it last
  who: "", // whose soft prompts the list changes: everyone's, or one character's
};
const parts = {}; // the elements that change
let asked = 0; // requests so far: an answer that a later one has overtaken is dropped
let waiting = 0; // requests without an answer
let shown = ""; // what the list was made of, so that it is not made again while somebody is in it
let speaks = true; // whether the text that is being asked for is the character's

const context = () => globalThis.SillyTavern.getContext();

/** This extension's own settings; SillyTavern keeps them. */
function settings() {
  const all = context().extensionSettings;
  all[SETTINGS] ??= { address: "", key: "" };
  return all[SETTINGS];
}

/** The server's address without a path; "" for what is no address. */
function base(address) {
  try {
    const { origin, pathname } = new URL(address.includes("://") ? address : `http://${address}`);
    return origin + pathname.replace(/\/+$/, "").replace(/\/(api|v1)(\/.*)?$/, "");
  } catch {
    return "";
  }
}

/** Where SillyTavern itself has its text from, as far as it is an address that the user wrote. */
function connectionAddress() {
  const value = (id) => document.getElementById(id)?.value.trim() ?? "";
  const api = value("main_api");
  if (api === "kobold") return base(value("api_url_text"));
  if (api !== "textgenerationwebui") return "";
  const type = value("textgen_type");
  return base(value(type === "ooba" ? "textgenerationwebui_api_url_text" : `${type}_api_url_text`));
}

const address = () => base(settings().address.trim()) || connectionAddress();

/** The characters of the open chat. */
function characters() {
  const { characters: known, characterId, groupId, groups } = context();
  if (groupId) {
    const members = groups.find(({ id }) => id === groupId)?.members ?? [];
    return members.map((avatar) => known.find((each) => each.avatar === avatar)?.name).filter(Boolean);
  }
  return characterId !== undefined && known[characterId] ? [known[characterId].name] : [];
}

/** Ask the server. Throws an error whose message is for the user. */
async function ask(method, path, body) {
  const server = address();
  if (!server) throw new Error("Connect SillyTavern to kobold-sp serve, or write its address below.");
  const headers = { "Content-Type": "application/json" };
  if (settings().key) headers.Authorization = `Bearer ${settings().key}`;
  let response;
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    response = await fetch(server + path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch {
    throw new Error(await whyNot(server));
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer) return answer;
  if (response.status === 401) throw new Error(`${server} asks for its key: write it below.`);
  if (response.status === 404 || !answer) throw new Error(`${server} has no soft prompts: it is not kobold-sp serve.`);
  const { detail } = answer;
  throw new Error(detail?.msg ?? Object.values(detail ?? {}).flat().join(" "));
}

/** Why the browser got no answer: nobody is there, or this page may not read it. */
async function whyNot(server) {
  try {
    await fetch(`${server}/api/extra/version`, { mode: "no-cors", signal: AbortSignal.timeout(PATIENCE_MS) });
  } catch {
    return `Nothing answers at ${server}.`;
  }
  return `${server} does not let this page in. Start it with: kobold-sp serve --cors ${location.origin}`;
}

/** Have the server say or do something, and show what it answers; the newest answer counts. */
async function update(talk, failed) {
  const number = ++asked;
  waiting += 1;
  let news;
  try {
    news = await talk();
  } catch (error) {
    news = failed(error.message);
  }
  waiting -= 1;
  if (number !== asked) return;
  Object.assign(state, news);
  render();
}

const refresh = () =>
  update(
    async () => {
      const [server, kept] = await Promise.all([ask("GET", PATH), ask("GET", `${PATH}/characters`)]);
      return { server, characters: kept.characters, problem: "" };
    },
    (problem) => ({ server: null, characters: {}, problem }),
  );

const choose = (filenames) =>
  update(
    async () => {
      if (!state.who) return { server: await ask("PUT", PATH, { selection: filenames }), refusal: "" };
      const kept = await ask("PUT", `${PATH}/characters`, { character: state.who, soft_prompt: filenames });
      return { characters: kept.characters, refusal: "" };
    },
    (refusal) => ({ refusal }),
  );

const own = (name) => (Object.hasOwn(state.characters, name.trim()) ? state.characters[name.trim()] : null);
const chosen = () => (state.who ? own(state.who) ?? [] : state.server.selection);
const entryOf = (filename) => state.server.entries.find((each) => each.filename === filename);
const nameOf = (filename) => entryOf(filename)?.name || filename;
const tokens = (count) => `${count.toLocaleString()} token${count === 1 ? "" : "s"}`;

/** [light, text] of the indicator. */
function indicator() {
  const { server } = state;
  if (!server) return ["off", state.problem ? "not available" : "…"];
  if (!server.model) return ["off", "no model"];
  const present = characters();
  const theirs = present.filter(own);
  const text = (filenames, count) => `${filenames.map(nameOf).join(" + ")} · ${tokens(count)}`;
  if (theirs.length && present.length === 1) {
    const filenames = own(theirs[0]);
    const missing = filenames.filter((each) => !entryOf(each)?.usable);
    if (missing.length) return ["off", `${theirs[0]}: ${missing.join(", ")} cannot be used`];
    const count = filenames.reduce((sum, each) => sum + entryOf(each).n_tokens, 0);
    return ["on", `${theirs[0]}: ${text(filenames, count)}`];
  }
  const also = theirs.length ? `; of their own: ${theirs.join(", ")}` : "";
  if (!server.selection.length) return [also ? "on" : "none", `none${also}`];
  const percent = server.effect === null ? null : server.effect * 100;
  const effect = percent === null ? "" : ` · moves ${percent < 10 ? percent.toFixed(1) : Math.round(percent)}%`;
  return ["on", text(server.selection, server.n_tokens) + effect + also];
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function row(entry) {
  const now = chosen();
  const place = now.indexOf(entry.filename);
  const about = [entry.n_tokens && tokens(entry.n_tokens), entry.author && `by ${entry.author}`, entry.filename];
  const name = entry.name || entry.filename;
  const made = element("li", { className: "soft_prompts_row" });
  const only = element(
    "button",
    { type: "button", className: "soft_prompts_name", title: "Use this one alone", disabled: !entry.usable },
    element("b", { textContent: (now.length > 1 && place >= 0 ? `${place + 1}. ` : "") + name }),
    element("small", { textContent: about.filter(Boolean).join(" · ") }),
  );
  only.setAttribute("aria-pressed", place >= 0);
  only.addEventListener("click", () => choose([entry.filename]));
  const more = element("button", {
    type: "button",
    className: "soft_prompts_more menu_button",
    textContent: place >= 0 ? "−" : "+",
    title: place >= 0 ? "Take it off" : "Use it too, after the others",
    disabled: !entry.usable && place < 0,
  });
  more.setAttribute("aria-label", `${more.title}: ${name}`);
  more.addEventListener("click", () =>
    choose(place >= 0 ? now.filter((each) => each !== entry.filename) : [...now, entry.filename]),
  );
  only.dataset.key = `only ${entry.filename}`;
  more.dataset.key = `more ${entry.filename}`;
  made.dataset.usable = entry.usable;
  const reason = entry.reason ? `: ${entry.reason}` : "";
  made.append(only, more, element("p", {}, element("em", { textContent: entry.verdict }), reason));
  if (entry.description) made.append(element("p", { textContent: entry.description }));
  return made;
}

/** What somebody has who is not in the folder any more. */
function lost(filename) {
  const entry = { filename, name: "", author: "", n_tokens: null, usable: false, description: "" };
  const reason = "Nothing is written for this character until it is taken off, or there again.";
  return { ...entry, verdict: "not in the folder", reason };
}

function render() {
  const [light, text] = indicator();
  for (const each of [parts.indicator, parts.menuEntry]) each.dataset.state = light;
  parts.indicator.textContent = text;
  parts.menuText.textContent = `Soft prompt: ${text}`;
  parts.problem.textContent = state.problem || state.refusal || state.server?.notice || "";
  parts.address.placeholder = connectionAddress() || "http://127.0.0.1:5000";

  const names = characters();
  if (!names.includes(state.who)) state.who = "";
  const now = JSON.stringify([state.server?.entries, state.server && chosen(), state.who, names]);
  if (now === shown) return;
  shown = now;
  const focused = document.activeElement?.dataset.key;
  parts.who.replaceChildren(
    element("option", { value: "", textContent: "everyone" }),
    ...names.map((name) => element("option", { value: name, textContent: `${name} alone` })),
  );
  parts.who.value = state.who;
  parts.none.textContent = state.who ? "Same as everyone" : "None";
  const missing = state.server ? chosen().filter((each) => !entryOf(each)) : [];
  const known = [...(state.server?.entries ?? [])].sort((one, other) => other.usable - one.usable);
  const entries = [...missing.map(lost), ...known]; // what does not fit stands below what does
  parts.list.replaceChildren(...entries.map(row));
  parts.empty.hidden = !state.server || entries.length > 0;
  [...parts.list.querySelectorAll("button")].find((each) => focused && each.dataset.key === focused)?.focus();
}

function labelled(text, input) {
  return element("label", {}, element("span", { textContent: text }), input);
}

/** A field whose text SillyTavern keeps. */
function field(key, properties) {
  const value = settings()[key];
  const input = element("input", { className: "text_pole", autocomplete: "off", value, ...properties });
  input.addEventListener("change", () => {
    settings()[key] = input.value.trim();
    context().saveSettingsDebounced();
    refresh();
  });
  return input;
}

function build() {
  const button = (textContent, action) => {
    const made = element("button", { type: "button", className: "menu_button", textContent });
    made.addEventListener("click", action);
    return made;
  };
  parts.indicator = element("span", { className: "soft_prompts_light" });
  parts.indicator.setAttribute("role", "status");
  parts.problem = element("p", { className: "soft_prompts_problem" });
  parts.problem.setAttribute("role", "status");
  parts.who = element("select", { className: "text_pole" });
  parts.who.addEventListener("change", () => {
    state.who = parts.who.value;
    render();
  });
  parts.none = button("None", () => choose([]));
  parts.list = element("ul", { className: "soft_prompts_list" });
  parts.empty = element("p", { textContent: "The server's softprompts folder is empty.", hidden: true });
  parts.address = field("address", { type: "url" });
  const key = field("key", { type: "password" });
  const again = button("Refresh", refresh);
  parts.content = element(
    "div",
    { className: "inline-drawer-content" },
    parts.problem,
    element("div", { className: "soft_prompts_tools" }, labelled("For", parts.who), parts.none, again),
    parts.list,
    parts.empty,
    labelled("Address, where it is not that of the connection", parts.address),
    labelled("Key, where the server asks for one", key),
  );
  const toggle = element(
    "div",
    { className: "inline-drawer-toggle inline-drawer-header" },
    element("b", { textContent: "Soft Prompts" }),
    parts.indicator,
    element("div", { className: "inline-drawer-icon fa-solid fa-circle-chevron-down down" }),
  );
  toggle.addEventListener("click", refresh);
  const block = element("div", { id: "soft_prompts", className: "inline-drawer" }, toggle, parts.content);
  (document.getElementById("extensions_settings2") ?? document.getElementById("extensions_settings")).append(block);

  parts.menuText = element("span");
  parts.menuEntry = element(
    "div",
    { id: "soft_prompts_menu", className: "list-group-item flex-container flexGap5 interactable", tabIndex: 0 },
    element("div", { className: "fa-solid fa-feather extensionsMenuExtensionButton" }),
    parts.menuText,
  );
  parts.menuEntry.addEventListener("click", () => {
    if (!block.offsetParent) document.querySelector("#extensions-settings-button .drawer-toggle")?.click();
    if (!parts.content.offsetParent) toggle.click();
    block.scrollIntoView({ block: "nearest" });
  });
  document.getElementById("extensionsMenu")?.append(parts.menuEntry);
}

/** Tell the server who speaks next: a prompt's last line does not always say so. */
function nameTheSpeaker(request) {
  const { name2 } = context();
  if (speaks && name2 && state.server && connectionAddress() === address()) request.character = name2;
}

build();
const { eventSource, eventTypes } = context();
eventSource.on(eventTypes.GENERATION_STARTED, (type) => {
  speaks = type !== "impersonate" && type !== "quiet";
});
eventSource.on(eventTypes.TEXT_COMPLETION_SETTINGS_READY, nameTheSpeaker);
for (const event of ["CHAT_CHANGED", "ONLINE_STATUS_CHANGED", "GROUP_UPDATED"]) {
  eventSource.on(eventTypes[event], refresh);
}
setInterval(() => {
  if (!waiting && document.visibilityState === "visible" && parts.content.offsetParent) refresh();
}, REFRESH_MS);
refresh();
