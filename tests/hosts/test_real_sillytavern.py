"""Our extension in a real SillyTavern, and a real SillyTavern on our server, in a headless browser.

Run where ``KOBOLD_SP_SILLYTAVERN`` names a checkout of SillyTavern with its ``node_modules``.
``KOBOLD_SP_SCREENSHOTS`` names a folder for pictures of what is looked at.
"""

import os
import re
import shutil
import socket
import subprocess
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hosts.noting_host import hosting
from serving import eventually, slowly

from kobold_sp_plugin import SoftPrompt

CHECKOUT = os.environ.get("KOBOLD_SP_SILLYTAVERN", "")
pytestmark = [
    pytest.mark.skipif(
        not (Path(CHECKOUT) / "node_modules").is_dir() or not CHECKOUT,
        reason="KOBOLD_SP_SILLYTAVERN names no checkout of SillyTavern with its node_modules",
    ),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).resolve().parents[2]
EXTENSION = ROOT / "hooks" / "sillytavern"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # without which it does not start as root, as in most containers
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_SECONDS = 300
HOSTILE = "<img src=x onerror=\"window.hacked = 'name'\">"


@pytest.fixture(scope="module")
def page():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    playwright = pytest.importorskip("playwright.sync_api")
    if executable is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=ARGUMENTS)
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60000)
        page.on("dialog", lambda dialog: dialog.accept())
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(error.stack or str(error)))
        yield page
        chromium.close()


@pytest.fixture(scope="module")
def tavern(tmp_path_factory):
    """SillyTavern's address; it has our extension and nothing else of ours."""
    place = tmp_path_factory.mktemp("sillytavern")
    shutil.copytree(EXTENSION, place / "data" / "default-user" / "extensions" / "soft-prompts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["node", "server.js", "--port", str(port), "--autorun", "false", "--dataRoot", str(place / "data")]
    with open(place / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def answers():
        assert process.poll() is None, (place / "log").read_text()
        try:
            return urllib.request.urlopen(address, timeout=5).status == 200
        except OSError:
            return False

    try:
        eventually(answers, START_SECONDS)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def host(tavern, tmp_path_factory):
    folder = tmp_path_factory.mktemp("host") / "softprompts"
    shutil.copytree(ROOT / "softprompts", folder)
    rows = np.random.default_rng(1).normal(size=(20, 4096)).astype(np.float32)
    SoftPrompt(rows, {"name": HOSTILE, "description": HOSTILE}).save(folder / "wide.zip")
    (folder / "broken.zip").write_bytes(b"PK")
    with hosting(folder, tavern) as host:
        yield host


class Tavern:
    """What a user does in SillyTavern."""

    def __init__(self, page, address, host):
        self.page, self.host = page, host
        page.goto(address, timeout=1000 * START_SECONDS)
        page.wait_for_selector("#soft_prompts", state="attached", timeout=1000 * START_SECONDS)
        page.locator(".popup-button-ok:visible").first.click()
        page.wait_for_selector("dialog[open]", state="hidden")

    @contextmanager
    def drawer(self, name):
        """A panel of the top bar, open for as long as it is needed."""
        opener = self.page.locator(f"#{name} .drawer-toggle").first
        opener.click()
        self.page.wait_for_timeout(700)  # it slides
        yield
        opener.click()
        self.page.wait_for_timeout(700)

    def connect(self, api, kind, field, address, button, model):
        with self.drawer("sys-settings-button"):
            self.page.select_option("#main_api", api)
            if kind:
                self.page.select_option("#textgen_type", kind)
            self.page.fill(field, address)
            self.page.press(field, "Tab")  # closes the list of earlier addresses
            self.page.click(button)
            self.page.locator(".online_status_text:visible", has_text=model).wait_for()
            self.picture(f"connected-{api}")

    def set(self, **values):
        """Settings of the panel on the left, by their ids."""
        with self.drawer("ai-config-button"):
            for name, value in values.items():
                if isinstance(value, bool):
                    self.page.set_checked(f"#{name}", value)
                else:
                    self.page.fill(f"#{name}", str(value))
                    self.page.press(f"#{name}", "Enter")

    def make_character(self, name, first_message):
        """And open the chat with it."""
        with self.drawer("rightNavHolder"):
            self.page.click("#rm_button_create")
            self.page.fill("#character_name_pole", name)
            self.page.fill("#firstmessage_textarea", first_message)
            self.page.click("#create_button_label")
            self.page.locator(".character_select", has_text=name).click()
            self.page.locator("#chat .mes", has_text=first_message).first.wait_for()

    def send(self, text):
        self.page.fill("#send_textarea", text)
        self.page.click("#send_but")

    def regenerate(self):
        """The character's last text once more, from when it is asked for."""
        before = self.host.n_texts
        self.page.click("#options_button")
        self.page.click("#option_regenerate")
        eventually(lambda: self.host.n_texts > before)

    def answer(self):
        """The character's last text, when it has ended."""
        eventually(lambda: len(self.host.server.queue) == 0, 90)
        self.page.wait_for_selector("#mes_stop", state="hidden")
        self.page.wait_for_timeout(500)  # it is drawn once more when it has come whole
        return self.text()

    def begun(self):
        """Wait until some of the answer is there."""
        self.page.locator("#chat .last_mes[is_user=false] .mes_text", has_text=re.compile(r"\w+ \w+")).wait_for()

    def text(self):
        return self.page.locator("#chat .last_mes .mes_text").inner_text()

    def open_block(self):
        self.page.click("#extensionsMenuButton")
        self.page.click("#soft_prompts_menu")
        self.page.wait_for_selector("#soft_prompts .soft_prompts_list")

    def row(self, name):
        return self.page.locator(".soft_prompts_row", has_text=name)

    def light(self, pattern):
        self.page.locator(".soft_prompts_light", has_text=re.compile(pattern)).wait_for(state="attached")
        return self.page.locator(".soft_prompts_light").get_attribute("data-state")

    def picture(self, name):
        folder = os.environ.get("KOBOLD_SP_SCREENSHOTS")
        if folder:
            Path(folder, f"{name}.png").write_bytes(self.page.screenshot())  # given a path, it would keep a thread


@pytest.fixture(scope="module")
def user(page, tavern, host):
    user = Tavern(page, tavern, host)
    user.make_character("Ann", "The door opened and somebody came in.")
    return user


@pytest.fixture(scope="module")
def classic(user, host):
    user.connect("kobold", "", "#api_url_text", f"{host.url}/api", "#api_button", "demonstration")
    user.set(streaming_kobold=True, amount_gen_counter=40, top_k_counter=1, rep_pen_counter=1)
    return user


def choose(user, action):
    with user.drawer("extensions-settings-button"):
        if not user.page.locator("#soft_prompts .inline-drawer-content").is_visible():
            user.page.click("#soft_prompts .inline-drawer-toggle")
        action()


def test_connected_as_kobold_classic_a_story_streams(classic, host):
    with slowly(host.model, 0.05):
        classic.send("Who is there?")
        eventually(lambda: host.asked("/api/extra/generate/stream"))
        classic.begun()
        assert classic.page.locator("#mes_stop").is_visible(), "text is shown while it is written"
        early = classic.text()
        classic.picture("streaming")
        whole = classic.answer()
    assert len(whole) > len(early)
    fields, _ = host.asked("/api/extra/generate/stream")
    assert fields["prompt"].endswith("Ann:") and fields["max_length"] == 40


def test_the_extension_lists_every_file_and_changes_what_is_written(classic, host):
    without = classic.answer()

    def look():
        page = classic.page
        assert classic.row("wide.zip").get_attribute("data-usable") == "false"
        assert "4096" in classic.row("wide.zip").inner_text() and HOSTILE in classic.row("wide.zip").inner_text()
        assert classic.row("wide.zip").get_by_role("button").first.is_disabled()
        assert "unreadable" in classic.row("broken.zip").inner_text()
        assert page.evaluate("window.hacked") is None
        classic.row("noir.zip").get_by_role("button").first.click()
        assert classic.light(r"^Noir · 20 tokens · moves [\d.]+%$") == "on"
        assert host.session.selection == ("noir.zip",)
        classic.picture("noir-selected")

    choose(classic, look)
    classic.regenerate()
    noir = classic.answer()
    classic.picture("noir-written")

    def more():
        classic.row("space.zip").get_by_role("button").last.click()
        classic.light(r"^Noir \+ Space · 40 tokens")
        assert host.session.selection == ("noir.zip", "space.zip")
        assert "2. Space" in classic.row("space.zip").inner_text()
        classic.row("noir.zip").get_by_role("button").last.click()
        classic.light(r"^Space · 20 tokens")
        classic.page.locator("#soft_prompts").get_by_role("button", name="None").click()
        assert classic.light("^none$") == "none"

    choose(classic, more)
    assert host.session.selection == ()
    classic.regenerate()
    assert classic.answer() == without != noir


def test_the_menu_by_the_text_field_opens_the_block(classic):
    classic.open_block()
    assert classic.page.locator("#soft_prompts .soft_prompts_list").is_visible()
    assert "Soft prompt: none" in classic.page.locator("#soft_prompts_menu").text_content()
    classic.page.locator("#extensions-settings-button .drawer-toggle").click()
    classic.page.wait_for_timeout(700)


def test_aborting_ends_it_at_the_server(classic, host):
    with slowly(host.model, 0.2):
        classic.regenerate()
        eventually(lambda: len(host.server.queue) == 1)
        classic.begun()
        classic.page.click("#mes_stop")
        eventually(lambda: len(host.server.queue) == 0, 3)
    fields, headers = host.asked("/api/extra/abort")
    assert fields is None and "Content-Type" not in headers
    classic.answer()


def test_as_text_completion_with_a_soft_prompt_for_one_character(classic, host):
    user = classic
    button = "#api_button_textgenerationwebui"
    user.connect("textgenerationwebui", "koboldcpp", "#koboldcpp_api_url_text", host.url, button, "demonstration")
    user.set(
        streaming_textgenerationwebui=True,
        amount_gen_counter=40,
        top_k_counter_textgenerationwebui=1,
        rep_pen_counter_textgenerationwebui=1,
    )
    user.regenerate()
    without = user.answer()
    fields, _ = host.asked("/v1/completions")
    assert fields["character"] == "Ann" and fields["stream"] is True

    def bind():
        user.page.locator("#soft_prompts select").select_option("Ann")
        user.row("pirate.zip").get_by_role("button").first.click()
        assert user.light("^Ann: Pirate · 20 tokens$") == "on"
        user.picture("pirate-for-ann")

    choose(user, bind)
    assert host.session.selection == ()
    user.regenerate()
    pirate = user.answer()
    user.picture("pirate-written")

    def forget():
        user.page.locator("#soft_prompts").get_by_role("button", name="Same as everyone").click()
        user.light("^none$")

    choose(user, forget)
    user.regenerate()
    assert user.answer() == without != pirate

    with slowly(host.model, 0.2):
        user.regenerate()
        eventually(lambda: len(host.server.queue) == 1)
        user.begun()
        user.page.click("#mes_stop")
        eventually(lambda: len(host.server.queue) == 0, 3)


def test_a_tag_in_a_message_goes_through_as_it_is_written(classic, host):
    before = host.n_texts
    classic.send("<softprompt:space>And then?")
    eventually(lambda: host.n_texts > before)
    text = classic.answer()
    fields, _ = host.asked("/v1/completions")
    assert "User: <softprompt:space>And then?" in fields["prompt"]
    assert len(text) > 5


def test_a_server_that_does_not_let_the_page_in_says_what_to_start_it_with(classic, tavern, host, tmp_path):
    with hosting(tmp_path, None) as closed:

        def look():
            address = classic.page.get_by_label("Address, where it is not")
            address.fill(closed.url)
            address.press("Tab")
            problem = classic.page.locator(".soft_prompts_problem", has_text=f"kobold-sp serve --cors {tavern}")
            problem.wait_for()
            assert classic.light("not available") == "off"
            classic.picture("not-let-in")
            address.fill("")
            address.press("Tab")
            classic.light("^none$")

        choose(classic, look)
    assert [each for each in classic.page.faults if "soft-prompts" in each] == []
