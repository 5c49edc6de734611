"""The page of the embedded host in a real browser, on the real server, demonstration model and samples.

``KOBOLD_SP_REQUIRE_BROWSER=1`` makes a missing browser a failure instead of a skip;
``KOBOLD_SP_SCREENSHOT=page.png`` saves the page with its menu open and a noir story.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kobold_sp_plugin import SoftPrompt, formats
from kobold_sp_plugin.server.folder import LONGEST_FILE

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "kobold_sp_plugin" / "server" / "static"
REQUIRED = os.environ.get("KOBOLD_SP_REQUIRE_BROWSER", "0") not in ("", "0")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # without which it does not start as root, as in most containers
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SLOWLY = """
import time
from kobold_sp_plugin.engines import transformers as engine
add = engine.Detokenizer.add
def slowly(self, ids):
    time.sleep(0.01)
    return add(self, ids)
engine.Detokenizer.add = slowly
from kobold_sp_plugin.cli import main
main()
"""
"""``kobold-sp`` at the speed of a real model: the demonstration's story can be over before a page has been clicked."""
HOSTILE = "<img src=x onerror=\"window.hacked = 'name'\">"


class Server:
    """``kobold-sp serve`` as a process of its own, over a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder.parent / "server.log"

    def start(self):
        command = [sys.executable, "-c", SLOWLY, "serve", "--softprompts", str(self.folder), "--port", str(self.port)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
        wait_for(self.answers, 45, lambda: self.log.read_text(errors="replace"))

    def answers(self):
        assert self.process.poll() is None, self.log.read_text(errors="replace")
        try:
            return bool(self.get("/api/v1/model"))
        except OSError:
            return False

    def stop(self, signal_number=signal.SIGTERM):
        self.process.send_signal(signal_number)
        self.process.wait(20)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=20) as reply:
            return json.load(reply)

    def put(self, path, value):
        body = json.dumps(value).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers, method="PUT")
        with urllib.request.urlopen(request, timeout=20) as reply:
            return json.load(reply)

    @property
    def selected(self):
        """The file name that the server says is selected."""
        return self.get("/api/v1/config/soft_prompt")["value"]


def wait_for(condition, seconds, explanation=lambda: ""):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain\n{explanation()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if executable is None or sync_playwright is None:
        found = "playwright is not installed" if executable else f"none of {', '.join(BROWSERS)} is installed"
        (pytest.fail if REQUIRED else pytest.skip)(found)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host") / "softprompts"
    shutil.copytree(ROOT / "softprompts", folder)
    server = Server(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running):
    """The server with nothing selected and the samples alone in its folder; both again afterwards."""
    samples = {path.name for path in running.folder.iterdir()}
    yield running
    running.put("/api/v1/config/soft_prompt", {"value": ""})
    for path in running.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in samples:
            path.unlink()


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a profile of its own; in the end none may have met an error or gone elsewhere."""
    contexts, problems = [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(15000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("request", lambda request: is_ours(request.url) or problems.append(request.url))
        page.goto(server.url)
        page.wait_for_selector("#connection[data-state=on]")
        return page

    def is_ours(url):
        return url.startswith((server.url + "/", "data:"))

    open_page.problems = problems
    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(open_page):
    return open_page()


def expect(locator):
    from playwright.sync_api import expect

    expect.set_options(timeout=15000)
    return expect(locator)


def row(page, filename):
    return page.locator(f'#rows > [data-filename="{filename}"]')


def pick(page, filename):
    """Opens the menu where it is closed, clicks the row, and waits until the page shows it as active."""
    if not page.locator("#softprompts").is_visible():
        page.click("#softprompts-button")
    row(page, filename).click()
    expect(row(page, filename)).to_have_attribute("aria-selected", "true")


def write(page, tokens=60):
    """Presses Submit and returns the story when it has been written."""
    page.fill("#max-length", str(tokens))
    page.click("#submit")
    expect(page.locator("#submit")).to_be_visible()
    return page.input_value("#story")


def grown(page, length):
    """Waits until the story is longer than that, and says how long it is."""
    wait_for(lambda: len(page.input_value("#story")) > length, 15)
    return len(page.input_value("#story"))


def like_noir(server, **metadata):
    """A soft prompt with the rows of noir and this metadata."""
    noir = SoftPrompt.load(server.folder / "noir.zip")
    return SoftPrompt(noir.rows, {**noir.metadata, **metadata})


def test_a_story_turns_with_the_soft_prompt_that_is_picked(page, server):
    from kobold_sp_plugin.demonstration.classifier import Classifier

    expect(page.locator("#indicator")).to_have_text("none active")
    page.fill("#story", "The door opened and")
    plain = write(page)
    assert plain.startswith("The door opened and")
    assert len(plain) > 100

    pick(page, "noir.zip")
    assert server.selected == "noir.zip"
    n_tokens = SoftPrompt.load(server.folder / "noir.zip").n_tokens
    expect(page.locator("#softprompts-button")).to_have_attribute("data-state", "active")
    effect = r"moves [\d.]+% of the next-token probability"
    expect(page.locator("#indicator")).to_have_text(
        re.compile(rf"^noir · {n_tokens} tokens · {effect}$", re.IGNORECASE)
    )
    red, green, blue = map(int, re.findall(r"\d+", style(page, "#softprompts-button svg", "stroke"))[:3])
    assert green > red and green > blue

    page.fill("#temperature", "0.3")
    classifier, noir = Classifier.fitted(), 0
    for _ in range(5):
        page.click("#new")
        story = write(page)
        assert story.startswith("The door opened and")
        assert story != plain
        noir += classifier.genre(story) == "noir"
    assert noir >= 3

    pick(page, "")
    assert server.selected == ""
    expect(page.locator("#indicator")).to_have_text("none active")


def style(page, selector, name):
    return page.locator(selector).first.evaluate(f"node => getComputedStyle(node).{name}")


def test_the_story_streams_and_can_be_stopped_taken_back_and_written_again(page):
    opening = "It was late, and  \n\nthe captain"
    page.fill("#story", opening + "  ")
    page.fill("#max-length", "400")
    page.press("#story", "Control+Enter")
    expect(page.locator("#stop")).to_be_visible()
    early = grown(page, len(opening))
    # At one moment, in the page: the text grows, and the button is still there; so it came in pieces.
    stopped = page.wait_for_function(
        """length => {
            const [story, stop, undo] = ["story", "stop", "undo"].map((id) => document.getElementById(id));
            if (story.value.length <= length || stop.offsetParent === null) return null;
            stop.click();
            return { undo: undo.disabled };
        }""",
        arg=early,
    )
    assert stopped.json_value() == {"undo": True}
    expect(page.locator("#submit")).to_be_visible()
    first = page.input_value("#story")
    assert first.startswith(opening + " ")
    assert page.locator(".fresh").text_content() == first[len(opening) :]
    time.sleep(0.3)
    assert page.input_value("#story") == first  # nothing comes after the stop

    page.fill("#max-length", "30")
    page.click("#retry")
    expect(page.locator("#submit")).to_be_visible()
    second = page.input_value("#story")
    assert second.startswith(opening) and len(second) > len(opening)
    page.click("#undo")
    assert page.input_value("#story") == opening
    page.click("#redo")
    assert page.input_value("#story") == second
    page.click("#new")
    assert page.input_value("#story") == ""
    page.click("#undo")
    assert page.input_value("#story") == second
    page.reload()
    expect(page.locator("#story")).to_have_value(second)


def test_a_file_that_is_dropped_into_the_folder_appears(page, server):
    page.click("#softprompts-button")
    expect(row(page, "noir.zip")).to_contain_text("noir")
    expect(row(page, "dropped.zip")).to_have_count(0)

    described = like_noir(server, name="Dropped in", author="A. Nonymous", description="Rain on a tin roof.")
    described.save(server.folder / "dropped.zip")
    dropped = row(page, "dropped.zip")
    context = server.get("/api/v1/config/max_context_length")["value"]
    for text in ("Dropped in", "dropped.zip", "by A. Nonymous", "Rain on a tin roof.", "compatible"):
        expect(dropped).to_contain_text(text)
    expect(dropped).to_contain_text(f"uses {described.n_tokens} of {context:,}")

    pick(page, "dropped.zip")
    like_noir(server, name="Replaced").save(server.folder / "dropped.zip")
    expect(dropped).to_contain_text("Replaced")
    expect(page.locator("#indicator")).to_contain_text("Replaced · ")

    (server.folder / "dropped.zip").unlink()
    expect(dropped).to_have_count(0)
    expect(page.locator("#indicator")).to_have_text("none active")
    expect(page.locator("#notice")).to_contain_text("dropped.zip")
    assert server.selected == ""


def test_a_file_that_cannot_be_used_says_why_and_cannot_be_picked(page, server):
    pick(page, "noir.zip")
    whole = (server.folder / "noir.zip").read_bytes()
    (server.folder / "torn.zip").write_bytes(whole[: len(whole) // 2])
    SoftPrompt(np.zeros((4, 4096), np.float32), {"name": "Too wide"}).save(server.folder / "wide.zip")

    width = SoftPrompt.load(server.folder / "noir.zip").width
    expect(row(page, "torn.zip").locator(".verdict")).to_have_text("unreadable")
    expect(row(page, "wide.zip").locator(".verdict")).to_have_text("incompatible")
    entries = server.get("/api/extra/softprompts")["entries"]
    reasons = {entry["filename"]: entry["reason"] for entry in entries}
    for filename in ("torn.zip", "wide.zip"):
        expect(row(page, filename).locator(".reason")).to_have_text(reasons[filename])
        expect(row(page, filename).locator(".reason")).to_be_visible()
        expect(row(page, filename)).to_have_attribute("aria-disabled", "true")
        row(page, filename).click(force=True)
    assert "4096" in reasons["wide.zip"] and str(width) in reasons["wide.zip"]
    expect(row(page, "noir.zip")).to_have_attribute("aria-selected", "true")
    assert server.selected == "noir.zip"

    # What only loading finds: the values of the tensor are read when the file is picked.
    tensor = io.BytesIO()
    np.save(tensor, np.full((4, width), np.nan, np.float32))
    with zipfile.ZipFile(server.folder / "nan.zip", "w") as archive:
        archive.writestr("tensor.npy", tensor.getvalue())
    row(page, "nan.zip").click()
    expect(page.locator("#menu-error")).to_contain_text("nan.zip")
    expect(row(page, "nan.zip").locator(".verdict")).to_have_text("unreadable")
    expect(page.locator("#indicator")).to_contain_text(re.compile("^noir · ", re.IGNORECASE))
    expect(row(page, "noir.zip")).to_have_attribute("aria-selected", "true")


def test_text_from_a_file_is_text(open_page, server):
    page = open_page()
    page.click("#softprompts-button")
    script = "<script>window.hacked = 'author'</script>"
    markup = "<b>bold</b> &amp; plain"
    own = {"training": {"documents": 3, "model": HOSTILE}, "made_of": "<b>nothing</b>"}
    more = {HOSTILE: HOSTILE, "kobold_sp_plugin": {**like_noir(server).metadata["kobold_sp_plugin"], **own}}
    hostile = like_noir(server, name=HOSTILE, author=script, description=markup, supported=[HOSTILE], **more)
    filename = "<img src=x onerror=alert(1)>.zip"
    hostile.save(server.folder / filename)
    evil = row(page, filename)
    expect(evil.locator(".name")).to_have_text(HOSTILE)
    expect(evil.locator(".author")).to_have_text(f"by {script}")
    expect(evil.locator(".description")).to_have_text(markup)
    pick(page, filename)
    expect(page.locator("#indicator")).to_contain_text(f"{HOSTILE} · ")
    expect(page.locator("#stack .name")).to_have_text(HOSTILE)
    page.fill("#story", HOSTILE)
    assert write(page, 5).startswith(HOSTILE)

    evil.locator(".info").click()
    expect(page.locator("#details-title")).to_have_text(HOSTILE)
    expect(page.locator("#facts")).to_contain_text(f"3 texts, with {HOSTILE}")
    page.click("#delete")
    expect(page.locator("#messages")).to_contain_text(HOSTILE)
    expect(page.locator("#trashed .filename")).to_have_text(filename)
    assert page.locator(":is(#softprompts, main, header) :is(img, script), #rows b, #details b").count() == 0
    assert page.evaluate("window.hacked") is None
    with pytest.raises(Exception, match="TrustedHTML"):  # what the policy would do about a mistake of ours
        page.evaluate("document.body.innerHTML = '<p>'")
    open_page.problems[:] = [each for each in open_page.problems if "TrustedHTML" not in each]


def test_every_page_and_every_client_sees_one_selection(open_page, server):
    one, other = open_page(), open_page()
    other.click("#softprompts-button")
    pick(one, "noir.zip")
    expect(row(other, "noir.zip")).to_have_attribute("aria-selected", "true")
    expect(other.locator("#indicator")).to_contain_text("tokens")
    server.put("/api/v1/config/soft_prompt", {"value": ""})
    for page in (one, other):
        expect(page.locator("#softprompts-button")).to_have_attribute("data-state", "none")


def test_stories_wait_for_one_another(open_page):
    one, other = open_page(), open_page()
    one.fill("#max-length", "400")
    one.click("#submit")
    grown(one, 30)
    other.fill("#max-length", "10")
    other.click("#submit")
    expect(other.locator("#progress")).to_have_text("waiting, 1 before you…")
    one.click("#stop")
    expect(other.locator("#submit")).to_be_visible()
    grown(other, len("The door opened and"))


def test_the_page_shows_what_the_server_does_and_not_what_was_clicked(page, server):
    other = next(path.name for path in sorted(server.folder.glob("*.zip")) if path.name != "noir.zip")
    for filename in (other, "noir.zip"):
        pick(page, filename)
        expect(page.locator("#indicator")).to_contain_text("moves")  # the effect is known from here on
    button = page.locator("#softprompts-button")
    server.process.send_signal(signal.SIGSTOP)  # a server that takes its time
    try:
        row(page, other).click()
        expect(button).to_have_attribute("data-state", "loading")
        expect(row(page, other)).to_have_attribute("aria-busy", "true")
        expect(row(page, other)).to_have_attribute("aria-selected", "false")
        expect(row(page, "noir.zip")).to_have_attribute("aria-selected", "true")
        row(page, "noir.zip").click()  # a change of mind: perhaps nothing will have changed, and no event come
    finally:
        server.process.send_signal(signal.SIGCONT)
    expect(button).to_have_attribute("data-state", "active")
    expect(page.locator("#rows [aria-busy=true]")).to_have_count(0)
    wait_for(lambda: page.locator("#rows .active").get_attribute("data-filename") == server.selected, 5)
    time.sleep(0.3)
    assert page.locator("#rows [aria-selected=true]").get_attribute("data-filename") == server.selected


def test_the_menu_works_from_the_keyboard(page, server):
    page.focus("#softprompts-button")
    page.keyboard.press("Enter")
    expect(page.locator("#softprompts")).to_be_visible()
    expect(row(page, "")).to_be_focused()
    filenames = [each.get_attribute("data-filename") for each in page.locator("#rows > *").all()]
    for _ in range(filenames.index("noir.zip")):
        page.keyboard.press("ArrowDown")
    expect(row(page, "noir.zip")).to_be_focused()
    page.keyboard.press(" ")
    expect(row(page, "noir.zip")).to_have_attribute("aria-selected", "true")
    like_noir(server, name="First of all").save(server.folder / "000.zip")
    expect(row(page, "000.zip")).to_be_visible()
    expect(row(page, "noir.zip")).to_be_focused()  # a new row does not take the focus away
    page.keyboard.press("Escape")
    expect(page.locator("#softprompts")).to_be_hidden()
    expect(page.locator("#softprompts-button")).to_be_focused()


def drop(page, **files):
    """Drops files on the page, as from a file manager."""
    page.evaluate(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of Object.entries(files)) {
                transfer.items.add(new File([new Uint8Array(bytes)], name));
            }
            for (const kind of ["dragenter", "dragover", "drop"]) {
                const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
                document.getElementById("story").dispatchEvent(new DragEvent(kind, options));
            }
        }""",
        {name: list(content) for name, content in files.items()},
    )


def test_files_are_added_renamed_deleted_and_brought_back(open_page, server, tmp_path):
    page = open_page()
    formats.save(like_noir(server), tmp_path / "rows.npy", "float32", "npy")
    drop(page, **{"rows.npy": (tmp_path / "rows.npy").read_bytes(), "<b>holiday.jpg": b"no soft prompt"})
    messages = page.locator("#messages")
    expect(messages).to_contain_text("Added rows.zip; converted from plain NumPy array")
    expect(messages.locator(".bad")).to_contain_text("<b>holiday.jpg was refused: it is no soft prompt")
    expect(page.locator("#drop")).to_be_hidden()
    messages.get_by_role("button", name="Use it").click()
    expect(row(page, "rows.zip")).to_have_attribute("aria-selected", "true")
    assert page.input_value("#story") == ""

    row(page, "rows.zip").locator(".info").click()
    expect(page.locator("#details-title")).to_have_text("rows")
    page.click("#rename")
    page.fill("#new-name", "Black rain")
    page.fill("#new-filename", "noir")
    page.keyboard.press("Enter")
    expect(page.locator("#rename-error")).to_contain_text("already")
    page.fill("#new-filename", "black rain")
    page.keyboard.press("Enter")
    expect(page.locator("#details-title")).to_have_text("Black rain")
    expect(page.locator("#indicator")).to_contain_text("Black rain · ")
    assert server.selected == "black rain.zip"
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).read_bytes() == (server.folder / "black rain.zip").read_bytes()

    page.click("#delete")
    expect(row(page, "black rain.zip")).to_have_count(0)
    expect(page.get_by_role("button", name="Undo").last).to_be_focused()
    expect(page.locator("#trash-title")).to_have_text("Trash: 1 file")
    page.keyboard.press("Enter")
    expect(row(page, "black rain.zip")).to_have_attribute("aria-selected", "true")  # as it was before
    expect(page.locator("#trash")).to_be_hidden()
    open_page.problems[:] = [each for each in open_page.problems if "status of 4" not in each]  # what was refused


def test_several_are_put_in_order_from_the_keyboard(page, server):
    pick(page, "noir.zip")
    row(page, "noir.zip").focus()
    for filename in ("pirate.zip", "space.zip"):
        row(page, filename).focus()
        page.keyboard.press("+")
        expect(row(page, filename)).to_have_attribute("aria-selected", "true")
    items = page.locator("#stack > li")
    expect(items.locator(".name")).to_have_text(["Noir", "Pirate", "Space"])
    up = page.get_by_role("button", name="Move Space up")
    up.focus()
    page.keyboard.press("Enter")
    expect(items.locator(".name")).to_have_text(["Noir", "Space", "Pirate"])
    expect(up).to_be_focused()
    page.keyboard.press("Enter")
    expect(items.locator(".name")).to_have_text(["Space", "Noir", "Pirate"])
    expect(page.get_by_role("button", name="Move Space down")).to_be_focused()
    status = server.get("/api/extra/softprompts")
    assert status["selection"] == ["space.zip", "noir.zip", "pirate.zip"]
    soft, context = status["n_tokens"], status["context"]
    page.fill("#max-length", "100")
    text = f"{soft} soft tokens, 100 to be written, {context - soft - 100} left for your story, of {context:,}"
    expect(page.locator("#budget-text")).to_have_text(text)
    shares = page.locator("#budget > *").evaluate_all("parts => parts.map((part) => Number(part.style.flexGrow))")
    assert sum(shares) == context and sum(shares[:3]) == soft

    page.get_by_role("button", name="Take Noir off").first.click()
    expect(items.locator(".name")).to_have_text(["Space", "Pirate"])
    row(page, "noir.zip").click()
    expect(items.locator(".name")).to_have_text(["Noir"])
    page.get_by_role("button", name="Put back").click()
    expect(items.locator(".name")).to_have_text(["Space", "Pirate"])


def test_with_and_without_on_one_seed(page, server):
    sent = []
    page.on("websocket", lambda line: line.on("framesent", lambda frame: sent.append(frame)))
    # A seed on which the model alone does not turn noir by chance; ids are drawn, too, and have to differ.
    page.add_init_script("{ let drawn = 0; Math.random = () => 0.25 + 1e-15 * drawn++; }")
    page.reload()
    page.wait_for_selector("#connection[data-state=on]")
    opening = "The door opened and"
    page.fill("#story", opening)
    page.fill("#max-length", "30")
    expect(page.locator("#compare-button")).to_be_disabled()
    pick(page, "noir.zip")
    page.click("#compare-button")
    expect(page.locator("#with-title")).to_have_text("With Noir")
    expect(page.locator("#with-take")).to_be_enabled()
    without, with_noir = (page.text_content(f"#{side}-text") for side in ("without", "with"))
    assert without and with_noir and without != with_noir
    asked = [json.loads(frame[2:])[1] for frame in sent if '"generate"' in frame]
    assert [fields.pop("id") and fields.pop("soft_prompt", None) for fields in asked] == ["", None]
    assert asked[0] == asked[1] and isinstance(asked[0]["sampler_seed"], int)
    page.click("#with-take")
    expect(page.locator("#compare")).to_be_hidden()
    assert page.input_value("#story") == opening + with_noir
    page.click("#undo")
    assert page.input_value("#story") == opening

    # Of one that is not in use.
    pick(page, "")
    row(page, "space.zip").locator(".info").click()
    page.click("#try")
    expect(page.locator("#with-title")).to_have_text("With Space")
    expect(page.locator("#with-take")).to_be_enabled()
    assert server.selected == ""


def test_the_list_is_searched_sorted_and_filtered(page, server):
    SoftPrompt(np.zeros((4, 4096), np.float32), {"name": "Áccent wide", "author": "Zoë"}).save(server.folder / "a.zip")
    like_noir(server, name="Zebra", author="Zoe").save(server.folder / "z.zip")
    page.click("#softprompts-button")
    names = page.locator("#rows .name")
    expect(names.last).to_have_text("Áccent wide")  # it cannot be used
    page.select_option("#sort", "name")
    expect(names.nth(1)).to_have_text("Áccent wide")
    page.fill("#search", "zoe")
    expect(names).to_have_text(["Áccent wide", "Zebra"])
    page.check("#usable-only")
    expect(names).to_have_text(["Zebra"])
    expect(page.locator("#found")).to_contain_text("1 soft prompt of 7 shown")
    page.press("#search", "ArrowDown")
    expect(row(page, "z.zip")).to_be_focused()
    page.fill("#search", "nothing at all")
    expect(page.locator("#nothing-found")).to_be_visible()
    page.press("#search", "Escape")
    expect(page.locator("#softprompts")).to_be_visible()
    expect(names.first).to_have_text("None")
    page.reload()
    page.click("#softprompts-button")
    expect(page.locator("#usable-only")).to_be_checked()
    expect(page.locator("#sort")).to_have_value("name")


def test_the_details_say_what_it_is(page, server):
    page.click("#softprompts-button")
    row(page, "noir.zip").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#details-title")).to_be_focused()
    noir = SoftPrompt.load(server.folder / "noir.zip")
    expect(page.locator("#facts")).to_contain_text(f"{noir.n_tokens} tokens, each of {noir.width} numbers")
    expect(page.locator("#row-body tr")).to_have_count(noir.n_tokens)
    expect(page.locator("#row-body q")).to_have_count(3 * noir.n_tokens)
    length = float(np.linalg.norm(noir.rows[0]))
    assert float(page.text_content("#row-body td")) == pytest.approx(length, rel=0.01)
    expect(page.locator("#effect")).to_contain_text(re.compile(r"It moves [\d.]+% of the next-token probability"))
    page.keyboard.press("Escape")
    expect(row(page, "noir.zip")).to_be_focused()


def test_a_character_has_soft_prompts_of_its_own(page, server):
    pick(page, "noir.zip")
    page.click("#characters-title")
    page.fill("#character-name", "Rita")
    page.keyboard.press("Enter")
    expect(page.locator("#character-list")).to_contain_text("RitaNoir")
    assert server.get("/api/extra/softprompts/characters") == {"characters": {"Rita": ["noir.zip"]}}
    page.get_by_role("button", name="Forget Rita").click()
    expect(page.locator("#character-list > *")).to_have_count(0)
    assert server.get("/api/extra/softprompts/characters") == {"characters": {}}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_no_violation(open_page, server, scheme, width):
    files = importlib.util.find_spec("axe_playwright_python")
    if files is None:
        pytest.skip("axe-playwright-python, which brings axe, is not installed")
    axe = (Path(files.origin).parent / "axe.min.js").read_text("utf-8")
    page = open_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
    page.evaluate(axe)

    def check():
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 15
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]] == []
        assert page.evaluate("document.documentElement.scrollWidth") == width

    SoftPrompt(np.zeros((4, 4096), np.float32), {"name": "Wide"}).save(server.folder / "wide.zip")
    pick(page, "noir.zip")
    row(page, "space.zip").locator(".add").click()
    expect(page.locator("#stack > li")).to_have_count(2)
    drop(page, **{"holiday.jpg": b"no soft prompt"})
    expect(page.locator("#messages .bad")).to_be_visible()
    expect(row(page, "wide.zip")).to_be_visible()
    page.click("#help summary")
    page.click("#characters-title")
    check()
    row(page, "noir.zip").locator(".info").click()
    expect(page.locator("#effect")).to_contain_text("It moves")
    page.click("#rename")
    check()
    page.click("#close")
    page.fill("#max-length", "5")
    page.click("#compare-button")
    expect(page.locator("#with-take")).to_be_enabled()
    check()
    open_page.problems[:] = [each for each in open_page.problems if "status of 4" not in each]  # what was refused


def test_no_more_can_be_asked_for_than_the_model_has_context(page, server):
    context = server.get("/api/v1/config/max_context_length")["value"]
    expect(page.locator("#max-length")).to_have_attribute("max", str(context))
    page.fill("#max-length", str(context + 1))
    page.click("#submit")
    expect(page.locator("#stop")).to_be_hidden()
    assert page.input_value("#story") == ""


def test_a_small_screen_shows_everything(open_page):
    page = open_page(viewport={"width": 380, "height": 700}, color_scheme="dark")
    pick(page, "noir.zip")
    page.click("#close")
    write(page, 20)
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    for selector in ("#submit", "#temperature", "#softprompts-button", "#indicator"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 380 and box["y"] + box["height"] <= 700


def test_without_a_server_the_page_says_so_and_with_it_again_goes_on(open_page, server):
    page = open_page()
    pick(page, "noir.zip")
    page.fill("#story", "The door opened and")
    page.fill("#max-length", "400")
    page.click("#submit")
    grown(page, 40)
    server.stop(signal.SIGKILL)
    expect(page.locator("#connection")).to_contain_text("not connected")
    expect(page.locator("#indicator")).to_have_text("not connected")
    expect(page.locator("#menu-state")).to_contain_text("Not connected")
    expect(page.locator("#submit")).to_be_disabled()
    expect(page.locator("#progress")).to_contain_text("connection was lost")
    expect(row(page, "noir.zip")).to_have_attribute("aria-disabled", "true")
    kept = page.input_value("#story")
    assert len(kept) > 40

    server.start()
    expect(page.locator("#connection")).to_have_text("connected")
    expect(page.locator("#submit")).to_be_enabled()
    assert server.selected == ""
    expect(page.locator("#indicator")).to_have_text("none active")
    assert write(page, 10).startswith(kept.rstrip(" "))
    open_page.problems[:] = [each for each in open_page.problems if "WebSocket connection" not in each]


def test_the_page_is_small_plain_and_refers_to_nothing_elsewhere():
    files = {path.name: path.read_text("utf-8") for path in STATIC.iterdir()}
    assert {"index.html", "page.css", "page.js"} <= set(files)
    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 200_000
    everything = "\n".join(files.values()).replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?://|@import|url\(", everything)
    assert not re.search(r"(inner|outer|Adjacent)HTML|\.write\(|\beval\(|new Function", everything)
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", files["index.html"])
    assert "script-src 'self';" in files["index.html"] and "unsafe" not in files["index.html"]
    assert f"MOST_BYTES = {LONGEST_FILE};" in files["files.js"]
    assert "connect-src 'self';" in files["index.html"]


@pytest.mark.skipif("KOBOLD_SP_SCREENSHOT" not in os.environ, reason="KOBOLD_SP_SCREENSHOT names no file")
def test_screenshot(page, server):
    metadata = {"name": "Adventure", "author": "somebody", "supported": ["GPT-J-6B"]}
    SoftPrompt(np.zeros((80, 4096), np.float32), metadata).save(server.folder / "adventure-6b.zip")
    pick(page, "noir.zip")
    expect(row(page, "adventure-6b.zip")).to_be_visible()
    expect(page.locator("#indicator")).to_contain_text("moves")
    page.fill("#temperature", "0.5")
    write(page, 130)
    page.mouse.move(640, 400)
    Path(os.environ["KOBOLD_SP_SCREENSHOT"]).write_bytes(page.screenshot())
