"""The SillyTavern extension on a page that has what it needs of SillyTavern's, with the real server."""

import functools
import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from models import softprompt
from serving import asking

from kobold_sp_plugin.server.app import Server

EXTENSION = Path(__file__).resolve().parents[2] / "hooks" / "sillytavern"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
HOSTILE = "<img src=x onerror=\"window.hacked = 'name'\">"
STANDIN = """<!doctype html><meta charset="utf-8"><title>Stand-in</title>
<select id="main_api"><option value="kobold">KoboldAI</option><option value="textgenerationwebui">Text</option></select>
<select id="textgen_type"><option>koboldcpp</option></select>
<input id="api_url_text"><input id="koboldcpp_api_url_text">
<div id="extensions_settings2"></div><div id="extensionsMenu"></div>
<script>
const heard = {};
const current = {
  characters: [{ name: "Rita", avatar: "rita.png" }, { name: "__proto__", avatar: "proto.png" }],
  groups: [{ id: "7", members: ["rita.png", "proto.png", "gone.png"] }],
  characterId: "0", groupId: null, name2: "Rita", extensionSettings: {}, saveSettingsDebounced() {},
  eventTypes: {
    GENERATION_STARTED: "started", TEXT_COMPLETION_SETTINGS_READY: "ready", CHAT_CHANGED: "chat",
    ONLINE_STATUS_CHANGED: "online", GROUP_UPDATED: "group",
  },
  eventSource: { on: (event, listener) => (heard[event] ??= []).push(listener) },
};
const emit = (event, ...values) => heard[event].forEach((each) => each(...values));
window.SillyTavern = { getContext: () => current };
</script>
<script type="module" src="index.js"></script>"""


class _Files(http.server.SimpleHTTPRequestHandler):
    """The extension's files, and the page."""

    def do_GET(self):
        if self.path != "/":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(STANDIN.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    handler = functools.partial(_Files, directory=str(EXTENSION))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def server(session, folder, site):
    softprompt(4, width=64, name=HOSTILE, description=HOSTILE).save(folder / "hostile.zip")
    session.refresh()
    with Server(session, port=0, origins=[site]) as server:
        yield server


@pytest.fixture
def page(chromium, site, server):
    page = chromium.new_page()
    page.set_default_timeout(10000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(site)
    connect(page, server.url + "api")
    yield page
    page.close()
    assert faults == []


def connect(page, address):
    page.fill("#api_url_text", address)
    page.evaluate("emit('online')")


def light(page, text):
    page.locator(".soft_prompts_light", has_text=text).wait_for()


def row(page, name):
    return page.locator(".soft_prompts_row", has_text=name)


def test_several_are_chosen_in_order_or_none(page, session):
    light(page, "none")
    row(page, "Space").get_by_role("button").first.click()
    light(page, "Space · 6 tokens")
    row(page, "Noir").get_by_role("button").last.click()
    light(page, "Space + Noir")
    assert session.selection == ("space.zip", "noir.zip")
    assert row(page, "Space").get_by_role("button").first.get_attribute("aria-pressed") == "true"
    assert row(page, "Noir").inner_text().startswith("2. Noir")
    row(page, "Noir").get_by_role("button").first.click()
    light(page, re.compile("^Noir ·"))
    assert session.selection == ("noir.zip",)
    page.get_by_role("button", name="None").click()
    light(page, "none")
    assert session.selection == ()


def test_what_does_not_fit_is_shown_with_its_reason_and_cannot_be_chosen(page):
    light(page, "none")
    for name, reason in (("broken", "unreadable"), ("hostile.zip", "64"), ("wide.zip", "64")):
        found = row(page, name)
        assert found.get_attribute("data-usable") == "false" and reason in found.inner_text()
        assert all(button.is_disabled() for button in found.get_by_role("button").all())
    assert HOSTILE in row(page, "hostile.zip").inner_text()
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0


def test_a_character_has_its_own(page, server, session):
    light(page, "none")
    page.locator("#soft_prompts select").select_option("Rita")
    row(page, "Space").get_by_role("button").first.click()
    light(page, "Rita: Space · 6 tokens")
    assert session.selection == ()
    kept = asking(server)("GET", "/api/extra/softprompts/characters").json
    assert kept == {"characters": {"Rita": ["space.zip"]}}

    page.evaluate("current.groupId = '7'; current.characterId = undefined; emit('chat')")
    light(page, "none; of their own: Rita")
    assert page.locator("#soft_prompts select").locator("option").all_inner_texts() == [
        "everyone",
        "Rita alone",
        "__proto__ alone",
    ]

    page.evaluate("current.groupId = null; current.characterId = '0'; emit('chat')")
    (session.catalogue.folder / "space.zip").unlink()
    page.get_by_role("button", name="Refresh").click()
    light(page, "Rita: space.zip cannot be used")
    page.locator("#soft_prompts select").select_option("Rita")
    assert "not in the folder" in row(page, "space.zip").inner_text()
    page.get_by_role("button", name="Same as everyone").click()
    light(page, "none")


def test_a_text_completion_says_who_speaks_unless_it_is_the_user(page, server):
    light(page, "none")
    asked = "(() => { const request = { prompt: 'x' }; emit('ready', request); return request.character })()"
    assert page.evaluate(asked) == "Rita"
    page.evaluate("emit('started', 'impersonate')")
    assert page.evaluate(asked) is None
    page.evaluate("emit('started', 'continue')")
    assert page.evaluate(asked) == "Rita"
    page.select_option("#main_api", "textgenerationwebui")
    page.fill("#koboldcpp_api_url_text", "http://127.0.0.1:9/v1")
    page.get_by_label("Address").fill(server.url)
    page.get_by_label("Address").press("Tab")
    assert page.evaluate(asked) is None, "another server than the one that knows the characters"


def test_why_there_is_no_list(page, session, site, server):
    light(page, "none")
    with Server(session, port=0) as closed:
        connect(page, closed.url)
        page.get_by_text(f"does not let this page in. Start it with: kobold-sp serve --cors {site}").wait_for()
        light(page, "not available")
        assert row(page, "Noir").count() == 0
    connect(page, closed.url)
    page.get_by_text("Nothing answers at").wait_for()
    connect(page, "")
    page.get_by_text("Connect SillyTavern to kobold-sp serve").wait_for()
    with Server(session, port=0, origins=[site], key="secret") as locked:
        connect(page, locked.url)
        page.get_by_text("asks for its key").wait_for()
        page.get_by_label("Key").fill("secret")
        page.get_by_label("Key").press("Tab")
        light(page, "none")
    connect(page, server.url)
    light(page, "none")


def test_the_manifest_names_what_is_there():
    manifest = json.loads((EXTENSION / "manifest.json").read_text())
    assert {manifest["js"], manifest["css"]} <= {each.name for each in EXTENSION.iterdir()}
    assert manifest["display_name"] == "Soft Prompts"
