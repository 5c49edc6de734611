"""The extension in the page of a real text-generation-webui, in a headless browser.

Run where ``KOBOLD_SP_TEXTGEN`` and ``KOBOLD_SP_TEXTGEN_PYTHON`` name an installation whose page works.
``KOBOLD_SP_SCREENSHOTS`` names a folder for pictures of what is looked at.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from hosts.real_text_generation_webui import MISSING, Host, Truth, has, make_checkpoints, user_data, wait_for

from kobold_sp_plugin import SoftPrompt

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(300)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # without which it does not start as root, as in most containers
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTS_OWN = (
    # While its server restarts, and when it is left.
    "Failed to load resource",
    "Failed to fetch",
    "errored out",
    "Server stopped unexpectedly",
    "Blocked attempt to show",
    "reading 'parentNode'",  # of a chat that "Reloading..." has taken the place of
    # On a busy machine: it draws the last of a reply's updates alone, in a chat that the first one was to begin.
    "reading 'childNodes'",
)
"""What the host's page says of itself, with or without the extension."""
PROMPT = "The door opened and the rain came in. Nobody said a word"
HOSTILE = "<img src=x onerror=\"window.hacked = 'yes'\">"
SETTINGS = "do_sample: false\nmax_new_tokens: 16\nauto_max_new_tokens: false\n"


def softprompt(seed, n_tokens=5, width=32, **metadata):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, width)).astype(np.float32)
    return SoftPrompt(rows=rows, metadata={"name": f"Test {seed}", **metadata})


RAIN, NOIR = softprompt(1, name="Rain"), softprompt(2, n_tokens=3, name="Noir")
STORM = SoftPrompt(rows=2 * softprompt(6, n_tokens=60).rows, metadata={"name": "Storm"})  # moves a long prompt too


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    playwright = pytest.importorskip("playwright.sync_api")
    if executable is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    data = user_data(tmp_path_factory.mktemp("textgen") / "user_data")
    make_checkpoints(data / "models", ("llama", "wide"))
    gguf_files.write(gguf_files.tiny("llama"), data / "models" / "story.gguf")
    (data / "settings.yaml").write_text(SETTINGS)
    with Host(data, webui=True) as host:
        yield host


@pytest.fixture(scope="module")
def truths(host):
    llama = host.data / "models" / "llama"
    return {(): Truth(llama), (RAIN,): Truth(llama, RAIN), (NOIR, RAIN): Truth(llama, NOIR, RAIN)}


@pytest.fixture
def folder(host):
    """Rain, Noir, one that does not fit and one that is broken; nothing selected and llama loaded."""
    folder = host.data / "softprompts"
    for path in folder.iterdir():
        path.unlink()
    RAIN.save(folder / "rain.zip")
    NOIR.save(folder / "noir.zip")
    softprompt(3, width=64, name=HOSTILE).save(folder / "wide.zip")
    (folder / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    if host.get("/v1/internal/model/info")["model_name"] != "llama":
        host.load("llama")
    return folder


@pytest.fixture
def page(browser, host, folder):
    """The host's page with nothing selected; in the end it may have met no error."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(45000)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto(host.page)
    expect(page.locator("#soft-prompts-page tr.fit")).to_have_count(2)
    page.wait_for_timeout(1500)
    page.locator("#soft-prompts-none").click()
    expect(light(page)).not_to_have_class("soft-prompts-light on")
    yield page
    hacked = page.evaluate("window.hacked")
    context.close()
    assert hacked is None
    assert [each for each in problems if not any(known in each for known in HOSTS_OWN)] == []


def expect(locator):
    from playwright.sync_api import expect

    expect.set_options(timeout=45000)
    return expect(locator)


def light(page):
    return page.locator("#soft-prompts-page .soft-prompts-light")


def shown(page):
    return page.locator("#soft-prompts-page")


def row(page, filename):
    return page.locator("#soft-prompts-page tr", has_text=filename)


def options(page):
    """What the menu offers, opened and closed again."""
    menu = page.locator("#soft-prompts-menu input").first
    menu.click()
    texts = page.locator("#soft-prompts-menu [role=option]").all_inner_texts()
    menu.press("Escape")
    menu.blur()
    return [text.replace("✓", "").strip() for text in texts]


def pick(page, *labels):
    """Choose these in the menu, in order, and press Load."""
    for label in labels:
        page.locator("#soft-prompts-menu input").first.click()
        page.locator("#soft-prompts-menu [role=option]", has_text=label).click()
    page.keyboard.press("Escape")
    page.locator("#soft-prompts-load").click()


def picture(page, name):
    target = os.environ.get("KOBOLD_SP_SCREENSHOTS")
    if target:
        (Path(target) / name).write_bytes(page.screenshot(full_page=True))


def notebook(page, text=PROMPT):
    """What the Notebook tab adds to ``text``."""
    page.get_by_role("tab", name="Notebook").click()
    box = page.locator("#textbox-notebook textarea")
    box.fill(text)
    button = page.get_by_role("button", name="Generate", exact=True).locator("visible=true")
    button.click()
    expect(box).not_to_have_value(text)
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").wait_for(state="detached")
    return box.input_value()[len(text) :]


def reply(page):
    """The last reply that the Chat tab shows."""
    return page.locator("#chat .assistant-message .message-body, #chat .bot .message-body").last


def test_every_file_is_listed_with_its_verdict(page):
    assert "No soft prompt in use" in shown(page).inner_text()
    assert options(page) == ["Noir (3 tokens)", "Rain (5 tokens)"]
    assert "made for 64 columns, this model has 32" in row(page, "wide.zip").inner_text()
    assert HOSTILE in row(page, "wide.zip").inner_text()
    assert "unreadable" in row(page, "broken.zip").inner_text()
    picture(page, "list.png")


def test_what_is_loaded_is_used_by_every_tab_and_by_the_api(page, host, truths):
    bare, rain = truths[()], truths[RAIN,]
    assert notebook(page) == bare.text(PROMPT, 16)
    pick(page, "Rain")
    expect(light(page)).to_have_class("soft-prompts-light on")
    expect(shown(page)).to_contain_text("In use: Rain (5 tokens")
    assert notebook(page) == rain.text(PROMPT, 16)
    picture(page, "notebook.png")
    assert host.complete(PROMPT) == rain.text(PROMPT, 16)
    assert host.complete(PROMPT, soft_prompt="") == bare.text(PROMPT, 16)
    page.locator("#soft-prompts-none").click()
    expect(shown(page)).to_contain_text("No soft prompt in use")
    assert notebook(page) == bare.text(PROMPT, 16)
    assert host.complete(PROMPT) == bare.text(PROMPT, 16)


def test_several_are_read_in_the_order_in_which_they_were_picked(page, host, truths):
    pick(page, "Noir", "Rain")
    expect(shown(page)).to_contain_text("In use: Noir + Rain (8 tokens")
    assert host.complete(PROMPT) == truths[NOIR, RAIN].text(PROMPT, 16)
    assert notebook(page) == truths[NOIR, RAIN].text(PROMPT, 16)


def test_the_chat_uses_it_and_regenerates_and_continues_with_it(page, host, folder, truths):
    STORM.save(folder / "storm.zip")
    storm = Truth(host.data / "models" / "llama", STORM)
    expect(row(page, "storm.zip")).to_have_count(1)
    pick(page, "Storm")
    expect(light(page)).to_have_class("soft-prompts-light on")
    messages = [{"role": "user", "content": "The door opened"}]
    prompt = host.post("/v1/internal/chat-prompt", {"messages": messages})["prompt"]
    first = storm.text(prompt, 16).strip()
    assert first != truths[()].text(prompt, 16).strip()
    messages.append({"role": "assistant", "content": first})
    longer = host.post("/v1/internal/chat-prompt", {"messages": messages, "continue_": True})["prompt"]

    page.get_by_role("tab", name="Chat", exact=True).click()
    box = page.locator("#chat-input textarea")
    box.fill("The door opened")
    box.press("Enter")
    try:
        expect(reply(page)).to_have_count(1)
    except AssertionError:  # see HOSTS_OWN; the chat itself is there
        page.reload()
        page.get_by_role("tab", name="Chat", exact=True).click()
    expect(reply(page)).to_have_text(first)
    picture(page, "chat.png")
    page.locator("#soft-prompts-none").click()
    expect(shown(page)).to_contain_text("No soft prompt in use")
    box.press("Control+Enter")
    expect(reply(page)).to_have_text(truths[()].text(prompt, 16).strip())
    page.locator("#stop").locator("visible=true").wait_for(state="detached")
    pick(page, "Storm")
    expect(light(page)).to_have_class("soft-prompts-light on")
    box.press("Control+Enter")
    expect(reply(page)).to_have_text(first)
    page.locator("#stop").locator("visible=true").wait_for(state="detached")
    box.press("Alt+Enter")
    expect(reply(page)).to_have_text(first + storm.text(longer, 16))


def test_token_counters_count_the_soft_tokens(page, truths):
    page.get_by_role("tab", name="Notebook").click()
    box, counter = page.locator("#textbox-notebook textarea"), page.locator("#notebook-token-counter")
    box.fill("The door opened")
    expect(counter).to_have_text(str(len(truths[()].encode("The door opened"))))
    pick(page, "Rain")
    expect(light(page)).to_have_class("soft-prompts-light on")
    box.fill("The rain")
    expect(counter).to_have_text(str(len(truths[()].encode("The rain")) + 5))
    page.get_by_role("tab", name="Chat", exact=True).click()
    page.locator("#chat-input textarea").fill("The door opened")
    display, counts = page.locator(".token-display").first, []

    def counted():
        found = re.search(r"([\d,]+) /", display.text_content())
        return int(found.group(1).replace(",", "")) if found else None

    for button in ("#soft-prompts-load", "#soft-prompts-none"):
        page.locator(button).click()
        expect(light(page)).to_have_class(
            "soft-prompts-light on" if button.endswith("load") else re.compile("light *$")
        )
        page.get_by_role("button", name="Count tokens").dispatch_event("click")
        wait_for(lambda: counted() not in (None, *counts), 45, display.text_content)
        counts.append(counted())
    assert counts[0] == counts[1] + 5


def test_files_that_come_and_go_are_seen(page, folder):
    softprompt(5, n_tokens=2, name="Dropped").save(folder / "dropped.zip")
    expect(row(page, "dropped.zip")).to_have_count(1)
    assert "Dropped (2 tokens)" in options(page)
    pick(page, "Dropped")
    expect(shown(page)).to_contain_text("In use: Dropped (2 tokens")
    (folder / "dropped.zip").unlink()
    expect(shown(page)).to_contain_text("No soft prompt in use")
    expect(shown(page)).to_contain_text("no longer in the folder")


def test_refresh_shows_what_came_since(page, folder):
    page.evaluate("clearInterval(window.softPromptsPoll)")
    softprompt(7, n_tokens=2, name="Late").save(folder / "late.zip")
    page.wait_for_timeout(2500)
    expect(row(page, "late.zip")).to_have_count(0)
    page.locator("#soft-prompts-refresh").click()
    expect(row(page, "late.zip")).to_have_count(1)
    assert "Late (2 tokens)" in options(page)


def test_an_upload_is_stored_only_if_it_is_a_soft_prompt(page, folder, tmp_path):
    def upload(name, data):
        chooser = page.locator("#soft-prompts-upload").locator("xpath=..").locator("input[type=file]").first
        chooser.set_input_files({"name": name, "mimeType": "application/zip", "buffer": data})

    before = {path.name for path in folder.iterdir()}
    upload("bad.zip", b"no soft prompt")
    expect(shown(page)).to_contain_text("bad.zip was not taken")
    picture(page, "upload_refused.png")
    assert {path.name for path in folder.iterdir()} == before
    sent = softprompt(6, n_tokens=4, name="Sent")
    sent.save(tmp_path / "sent.zip")
    upload("good one.zip", (tmp_path / "sent.zip").read_bytes())
    expect(shown(page)).to_contain_text("good one.zip is in the folder now")
    expect(row(page, "good one.zip")).to_have_class("fit")
    assert {path.name for path in folder.iterdir()} == before | {"good one.zip"}
    assert np.array_equal(SoftPrompt.load(folder / "good one.zip").rows, sent.rows)
    assert options(page) == ["Sent (4 tokens)", "Noir (3 tokens)", "Rain (5 tokens)"]


def test_a_model_that_is_changed_by_the_api_changes_what_the_page_says(page, host, truths):
    pick(page, "Rain")
    expect(light(page)).to_have_class("soft-prompts-light on")
    host.load("wide")
    expect(row(page, "rain.zip")).to_contain_text("made for 32 columns, this model has 64")
    expect(row(page, "wide.zip")).to_have_class("fit")
    expect(light(page)).not_to_have_class("soft-prompts-light on")
    picture(page, "other_model.png")
    host.unload()
    expect(row(page, "wide.zip")).to_contain_text("no model")
    host.load("llama")
    expect(light(page)).to_have_class("soft-prompts-light on")
    assert host.complete(PROMPT) == truths[RAIN,].text(PROMPT, 16)


def test_a_loader_that_takes_none_says_why_and_a_transformers_model_has_the_selection_again(page, host, truths):
    if not has("llama_cpp_binaries"):
        pytest.skip("the host's Python has no llama_cpp_binaries")
    pick(page, "Rain")
    expect(light(page)).to_have_class("soft-prompts-light on")
    host.load("story.gguf", loader="llama.cpp", ctx_size=512, gpu_layers=0)
    expect(shown(page)).to_contain_text("model: story.gguf")
    for name in ("rain.zip", "noir.zip", "wide.zip"):
        expect(row(page, name)).to_contain_text("not with this backend")
        expect(row(page, name)).to_contain_text("llama.cpp runs as a process of its own")
        expect(row(page, name)).to_contain_text("load the original model with the Transformers loader")
    expect(shown(page)).to_contain_text("No soft prompt in use")
    expect(light(page)).not_to_have_class("soft-prompts-light on")
    assert options(page) == []
    picture(page, "llama_cpp.png")
    assert notebook(page)
    host.load("llama")
    expect(light(page)).to_have_class("soft-prompts-light on")
    expect(shown(page)).to_contain_text("In use: Rain (5 tokens")
    assert notebook(page) == truths[RAIN,].text(PROMPT, 16)


def test_reloading_the_page_shows_the_same(page, host):
    pick(page, "Rain")
    expect(light(page)).to_have_class("soft-prompts-light on")
    page.reload()
    expect(shown(page)).to_contain_text("In use: Rain (5 tokens")
    expect(page.locator("#soft-prompts-menu")).to_contain_text("Rain (5 tokens)")


def test_the_default_tab_uses_it(page, truths):
    pick(page, "Rain")
    expect(light(page)).to_have_class("soft-prompts-light on")
    page.get_by_role("tab", name="Session").click()
    columns = page.get_by_label("Show two columns in the Notebook tab")
    columns.check()
    try:
        page.get_by_role("tab", name="Notebook").click()
        page.locator(".textbox_default textarea").fill(PROMPT)
        page.get_by_role("button", name="Generate", exact=True).locator("visible=true").click()
        output = page.locator("#textbox-default textarea")
        expect(output).to_have_value(PROMPT + truths[RAIN,].text(PROMPT, 16))
        picture(page, "default.png")
    finally:
        page.get_by_role("tab", name="Session").click()
        columns.uncheck()


def restart_interface(page, host):
    """Press "Apply flags/extensions and restart", which executes the script again in the same process."""
    opened = host.announced
    page.get_by_role("button", name="Apply flags/extensions and restart").click()
    wait_for(lambda: host.failed or host.announced > opened, 90, host.tail, every=0.5)
    time.sleep(8)
    if host.failed:
        host.restart()
        pytest.skip("Gradio did not get its own page within three seconds: the machine is too busy to restart it")
    page.goto(host.page)
    page.get_by_role("tab", name="Notebook").wait_for()


def test_a_restart_of_the_interface_keeps_everything(page, host, truths):
    pick(page, "Rain")
    expect(light(page)).to_have_class("soft-prompts-light on")
    for _ in range(2):
        page.get_by_role("tab", name="Session").click()
        restart_interface(page, host)
        expect(shown(page)).to_contain_text("In use: Rain (5 tokens")
        assert host.complete(PROMPT) == truths[RAIN,].text(PROMPT, 16)
    assert notebook(page) == truths[RAIN,].text(PROMPT, 16)
    page.locator("#soft-prompts-none").click()
    expect(shown(page)).to_contain_text("No soft prompt in use")
    assert host.complete(PROMPT) == truths[()].text(PROMPT, 16)


def test_turned_off_it_is_gone(page, host, truths):
    pick(page, "Rain")
    expect(light(page)).to_have_class("soft-prompts-light on")
    page.get_by_role("tab", name="Session").click()
    page.get_by_label("gallery").check()  # of no extension at all, the host keeps those that it had
    page.get_by_label("soft_prompts").uncheck()
    restart_interface(page, host)
    expect(shown(page)).to_have_count(0)
    try:
        assert host.complete(PROMPT) == truths[()].text(PROMPT, 16)
        assert notebook(page) == truths[()].text(PROMPT, 16)
    finally:
        host.restart()  # with its command line's extensions
    assert host.complete(PROMPT) == truths[RAIN,].text(PROMPT, 16)


def test_nothing_is_written_into_the_hosts_settings(host):
    """The page saves what its own controls say as soon as one changes; none of it is ours."""
    text = (host.data / "settings.yaml").read_text()
    assert "soft_prompts-" not in text and "soft-prompts" not in text
    assert json.loads((host.data / "softprompts.json").read_text())
