"""A real KoboldAI Lite on our server, in a headless browser.

Run where ``KOBOLD_SP_LITE`` names a folder with Lite's ``index.html``.
``KOBOLD_SP_SCREENSHOTS`` names a folder for pictures of what is looked at.
"""

import functools
import http.server
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts.noting_host import hosting
from serving import eventually, slowly

FOLDER = os.environ.get("KOBOLD_SP_LITE", "")
pytestmark = [
    pytest.mark.skipif(
        not FOLDER or not (Path(FOLDER) / "index.html").is_file(),
        reason="KOBOLD_SP_LITE names no folder with KoboldAI Lite's index.html",
    ),
    pytest.mark.timeout(180),
]
ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # without which it does not start as root, as in most containers
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STREAM = "/api/extra/generate/stream"


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    """Lite's address: another origin than our server's, as for those who use the hosted one."""
    handler = functools.partial(_Files, directory=FOLDER)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def host(site):
    with hosting(ROOT / "softprompts", site) as host:
        yield host


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


@contextmanager
def lite(chromium, site, host):
    """Lite in a browser that has never seen it, connected, with greedy settings and short answers."""
    context = chromium.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.set_default_timeout(20000)
    page.goto(f"{site}/index.html?local=1&host=127.0.0.1&port={host.server.port}")
    page.locator("#connectstatus", has_text="KoboldCpp").wait_for()
    page.locator("#welcomecontainer button:visible").first.click()
    page.evaluate("Object.assign(localsettings, { top_k: 1, rep_pen: 1, max_length: 60 })")
    yield page
    context.close()


def send(page, text):
    page.fill("#input_text", text)
    page.click("#btnsend")


def story(page, host):
    """The text when it has ended."""
    eventually(lambda: len(host.server.queue) == 0, 30)
    page.wait_for_timeout(700)  # it is drawn once more when it has come whole
    return page.locator("#gametext").inner_text()


def picture(page, name):
    folder = os.environ.get("KOBOLD_SP_SCREENSHOTS")
    if folder:
        Path(folder, f"{name}.png").write_bytes(page.screenshot())  # given a path, it would keep a thread


def test_a_story_streams_and_is_aborted(chromium, site, host):
    with lite(chromium, site, host) as page, slowly(host.model, 0.15):
        picture(page, "lite-connected")
        send(page, "The door opened and")
        eventually(lambda: len(host.server.queue) == 1)
        page.wait_for_timeout(3000)
        early = page.locator("#gametext").inner_text()
        assert len(early) > len("The door opened and") + 5, "text is shown while it is written"
        assert len(host.server.queue) == 1
        picture(page, "lite-streaming")
        page.locator("#abortgen").click()
        eventually(lambda: len(host.server.queue) == 0, 3)
    fields, _ = host.asked(STREAM)
    aborted, _ = host.asked("/api/extra/abort")
    assert aborted == {"genkey": fields["genkey"]}


def test_what_is_selected_holds_for_the_next_text(chromium, site, host):
    texts = []
    for selection in ("", "pirate.zip", ""):
        host.session.select(selection)
        with lite(chromium, site, host) as page:
            before = host.n_texts
            send(page, "The door opened and")
            eventually(lambda before=before: host.n_texts > before)
            texts.append(story(page, host))
            picture(page, f"lite-{selection or 'none'}")
    assert texts[0] == texts[2] != texts[1]
