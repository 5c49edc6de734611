"""The real KoboldAI Client, on its own Python, with the hook and without: its socket, its HTTP API, its page.

Runs where ``KOBOLD_SP_CLIENT`` names a checkout and ``KOBOLD_SP_CLIENT_PYTHON`` the interpreter that runs it.
``KOBOLD_SP_SCREENSHOT=FOLDER`` keeps pictures of its page.
"""

import difflib
import io
import json
import os
import re
import threading
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hosts.real_host import CHROMIUM, RealHost, Wire, eventually, make_models

from kobold_sp_plugin import SoftPrompt

CHECKOUT, PYTHON = os.environ.get("KOBOLD_SP_CLIENT"), os.environ.get("KOBOLD_SP_CLIENT_PYTHON")
if not CHECKOUT or not PYTHON:
    pytest.skip("KOBOLD_SP_CLIENT and KOBOLD_SP_CLIENT_PYTHON name no KoboldAI Client", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)

FAMILIES = {"gptj": 64, "gpt2": 64, "neo": 64, "opt": 32}
"""Families that the Client loads, and the columns of their embeddings."""
CUSTOM = {"gpt2": "GPT2Custom"}
PROMPT = "The door opened and the rain came in."
HOSTILE = "<img src=x onerror=\"window.hacked='{}'\">"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(PYTHON, tmp_path_factory.mktemp("models"), FAMILIES)


@pytest.fixture(scope="module")
def make_host(models, tmp_path_factory):
    def make(family="gptj", armed=True, name="host", fill=make_softprompts, start=True, **more):
        place = tmp_path_factory.mktemp(name) / "KoboldAI"
        arguments = ["--cpu", "--nobreakmodel", "--quiet", "--no_aria2"]
        if family:
            arguments += ["--model", CUSTOM.get(family, "NeoCustom"), "--path", str(models / f"tiny-{family}")]
        return RealHost(CHECKOUT, PYTHON, place, arguments, armed, fill, start, **more)

    return make


def rows(seed, n_tokens=5, width=64):
    return np.random.RandomState(seed).randn(n_tokens, width).astype(np.float32)


def make_softprompts(place):
    folder = place / "softprompts"
    for width in sorted(set(FAMILIES.values())):
        for seed, name, n_tokens in ((1, "noir", 5), (2, "space", 9)):
            SoftPrompt(rows(seed, n_tokens, width), {"name": name.title(), "author": "A", "description": "Rain."}).save(
                folder / f"{name}{width}.zip"
            )


@pytest.fixture(scope="module")
def native(make_host):
    with make_host(armed=False, name="native") as host:
        yield host


@pytest.fixture(scope="module")
def armed(make_host):
    with make_host(name="armed") as host:
        yield host


@pytest.fixture(autouse=True)
def nothing_selected(request):
    yield
    for name in ("native", "armed"):
        if name in request.fixturenames:
            host = request.getfixturevalue(name)
            host.ask("PUT", "config/soft_prompt", {"value": ""})


def load(wire, models, family):
    """Load a model as the page does: pick it, then press Load."""
    wire.say("selectmodel", CUSTOM.get(family, "NeoCustom"), path=str(models / f"tiny-{family}"))
    wire.hears("selected_model_info", when=lambda data: True)
    press_load(wire)


def press_load(wire):
    more = {"use_gpu": False, "key": "", "gpu_layers": "0", "disk_layers": "0", "url": "", "online_model": ""}
    wire.say("load_model", **more)
    wire.hears("hide_model_name", 60)


def choose(wire, filename):
    wire.say("spselect", filename)
    wire.say("sprequest")


def selected(host):
    return host.ask("GET", "config/soft_prompt")[1]["value"]


class TestText:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_is_the_hosts_own_soft_prompts(self, family, make_host, armed, models):
        width = FAMILIES[family]
        requests = [
            {"seed": seed, "soft_prompt": name, **more}
            for seed in (100 + list(FAMILIES).index(family), 200 + list(FAMILIES).index(family))  # see test_1
            for name in ("", f"noir{width}.zip", f"space{width}.zip")
            for more in ({}, {"n": 2}, {"rep_pen": 3.0}, {"prompt": PROMPT * 60, "max_context_length": 512})
        ]
        requests += [
            {"prompt": "", "seed": 300 + list(FAMILIES).index(family), "soft_prompt": f"noir{width}.zip", **more}
            for more in ({}, {"rep_pen": 3.0})
        ]
        with make_host(family, armed=False, name="native-" + family) as host:
            expected = [host.generate(**request) for request in requests]
        if family != "gptj":
            with Wire(armed) as wire:
                load(wire, models, family)
        try:
            assert [armed.generate(**request) for request in requests] == expected
            assert len({str(each) for each in expected}) > len(requests) // 2
        finally:
            if family != "gptj":
                with Wire(armed) as wire:
                    load(wire, models, "gptj")

    def test_world_info_that_joins_in_the_middle_of_a_batch(self, native, armed):
        texts = []
        for host in (native, armed):
            with Wire(host) as wire:
                uid = host.ask("POST", "world_info/folders/none", {})[1]["uid"]
                host.ask("PUT", f"world_info/{uid}/key", {"value": "z"})
                host.ask("PUT", f"world_info/{uid}/content", {"value": "The clock had stopped."})
                wire.say("setdynamicscan", True)
                wire.hears("updatedynamicscan")
                request = {"prompt": "The rain", "use_world_info": True, "soft_prompt": "noir64.zip", "max_length": 8}
                texts.append([host.generate(n=n, seed=seed, **request) for n in (1, 2) for seed in (1, 2)])
                wire.say("setdynamicscan", False)
                wire.hears("updatedynamicscan")
                host.ask("DELETE", f"world_info/{uid}")
        assert texts[1] == texts[0]


class TestNothingElseChanges:
    def test_without_a_soft_prompt_the_same_events_texts_and_settings(self, make_host):
        seen = []
        for is_armed in (False, True):
            with make_host(armed=is_armed, name=f"plain-{is_armed}") as host, Wire(host) as wire:
                wire.hears("gamesaved")
                events = [wire.heard]
                for route, value in (("sampler_full_determinism", True), ("sampler_seed", 5), ("max_length", 12)):
                    assert host.ask("PUT", f"config/{route}", {"value": value})[0] == 200
                for command, data, end, more in (
                    ("submit", PROMPT, "ready", {"actionmode": 0, "chatname": "You"}),
                    ("submit", "Nobody said a word.", "ready", {"actionmode": 0, "chatname": "You"}),
                    ("retry", "", "ready", {"chatname": "You"}),
                    ("memory", "", None, {}),
                ):
                    time.sleep(1)  # what is on its way has arrived
                    wire.say(command, data, **more)
                    if end:
                        wire.hears("setgamestate", 60, when=lambda state: state == "wait")
                        wire.hears("setgamestate", 60, when=lambda state, end=end: state == end)
                    time.sleep(1)
                    events.append(wire.heard)
                time.sleep(2.5)  # the host writes its settings then
                story = host.ask("GET", "story")[1]
                settings = {
                    path.name: path.read_text() for path in (host.place / "settings").iterdir() if path.is_file()
                }
            # The host draws a number for each row of its world info.
            told = [[re.sub(r"'uid': -?\d+", "", str(one)) for one in filter(of_the_host, each)] for each in events]
            seen.append((told, story, settings))
        assert seen[1][2] == seen[0][2] and any('"softprompt": ""' in each for each in seen[0][2].values())
        assert seen[1][1] == seen[0][1]
        for with_hook, without in zip(seen[1][0], seen[0][0]):
            assert with_hook == without, "\n".join(difflib.unified_diff(without, with_hook, n=0, lineterm=""))


def of_the_host(heard):
    event, payload = heard
    command = payload.get("cmd") if isinstance(payload, dict) else ""
    # How many tokens travel in one message depends on the clock; the story has them all.
    return event != "softprompts" and command not in ("allowsp", "spstatitems", "usstatitems", "streamtoken")


class TestDefects:
    """Before: the host's own. After: with the hook. By their numbers in the project's reference."""

    def test_1_another_model_empties_the_prompt(self, make_host, armed, models):
        def text_after_switching(host):
            host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
            time.sleep(2.5)  # then the host has saved its settings for this model
            with Wire(host) as wire:
                load(wire, models, "gpt2")
                # Without a seed: the host keeps a tensor for each, and its loader empties that too.
                switched = host.ask("POST", "generate", {"prompt": PROMPT, "max_length": 5})
                load(wire, models, "gptj")
                back = host.ask("POST", "generate", {"prompt": PROMPT, "max_length": 5})
            return switched, back

        switched, back = text_after_switching(armed)
        assert switched[0] == back[0] == 200, (switched, armed.text_of_log()[-3000:])
        assert selected(armed) == "noir64.zip"
        with make_host(armed=False, name="switching") as host:
            assert text_after_switching(host)[0][0] == 500

    def test_3_and_16_a_bad_file_takes_the_name_but_not_the_tensor(self, native, armed):
        for host in (native, armed):
            write_zip(host.softprompts / "nan.zip", np.full((3, 64), np.nan, np.float32), {"name": "NaN"})
            host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
        text = {host: host.generate() for host in (native, armed)}
        assert native.ask("PUT", "config/soft_prompt", {"value": "nan.zip"})[0] == 500
        assert selected(native) == "" and native.generate() == text[native], "it says none, and uses noir"
        status, answer = armed.ask("PUT", "config/soft_prompt", {"value": "nan.zip"})
        assert (status, answer) == (
            422,
            {"detail": {"value": ["nan.zip: nan in row 0, column 0; expected finite values"]}},
        )
        assert selected(armed) == "noir64.zip" and armed.generate() == text[armed]
        for host in (native, armed):
            (host.softprompts / "nan.zip").unlink()

    def test_7_a_choice_during_a_request_with_its_own_is_not_lost(self, native, armed):
        texts = {}
        for host in (native, armed):
            expected = host.generate(soft_prompt="space64.zip", max_length=60)
            with Wire(host) as wire:
                answers = []
                request = {"soft_prompt": "space64.zip", "max_length": 60}
                thread = threading.Thread(target=lambda: answers.append(host.generate(**request)))  # noqa: B023
                thread.start()
                time.sleep(0.1)
                choose(wire, "noir64.zip")
                thread.join(60)
            texts[host] = answers == [expected], selected(host)
        assert texts[armed] == (True, "noir64.zip")
        assert texts[native][1] == "", "the request's end takes the user's choice back"

    def test_7_a_request_that_fails_leaves_the_host_free(self, native, armed):
        for host in (native, armed):
            host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
            body = {"prompt": PROMPT, "soft_prompt": "space64.zip", "max_length": 512, "max_context_length": 512}
            assert host.ask("POST", "generate", body)[0] == 500, "there is no room for the text"
            assert selected(host) == "noir64.zip"
            assert host.generate()
        os.replace(armed.softprompts / "noir64.zip", armed.softprompts / "away")
        body = {"prompt": PROMPT, "soft_prompt": "noir64.zip", "max_length": 4}
        assert armed.ask("POST", "generate", body)[0] == 422
        os.replace(armed.softprompts / "away", armed.softprompts / "noir64.zip")
        assert armed.generate()

    def test_8_a_missing_saved_prompt_ends_the_start(self, make_host):
        def with_settings(place):
            make_softprompts(place)
            (place / "settings").mkdir(exist_ok=True)
            (place / "settings" / "tiny-gptj.settings").write_text('{"softprompt": "gone.zip"}')

        with make_host(armed=False, name="missing", fill=with_settings, start=False) as host:
            host.start(until_it_listens=False)
            assert host.process.wait(120) == 1
        with make_host(name="missing-armed", fill=with_settings) as host:
            assert "gone.zip" in host.text_of_log() and selected(host) == ""
            assert host.generate()
            SoftPrompt(rows(7), {"name": "Back"}).save(host.softprompts / "gone.zip")
            host.restart()
            assert selected(host) == "gone.zip", "it is there again, and the settings still name it"
            host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
            with Wire(host) as wire:
                choose(wire, "space64.zip")
                eventually(lambda: selected(host) == "space64.zip")
            path = host.place / "settings" / "tiny-gptj.settings"
            eventually(lambda: '"softprompt": "space64.zip"' in path.read_text())  # the host may be in the midst of it
            host.restart()
            assert selected(host) == "space64.zip"

    @pytest.mark.parametrize("meta", [b"[1, 2]", b'"text"', b"null"])
    def test_11_metadata_of_the_wrong_type_breaks_the_list(self, native, armed, meta):
        for host in (native, armed):
            write_zip(host.softprompts / "odd.zip", rows(3), meta)
        assert native.ask("GET", "config/soft_prompts_list")[0] == 500
        status, answer = armed.ask("GET", "config/soft_prompts_list")
        assert status == 200 and {"value": "noir64.zip"} in answer["values"]
        for host in (native, armed):
            (host.softprompts / "odd.zip").unlink()

    def test_10_a_file_without_metadata_cannot_be_loaded(self, native, armed):
        for host in (native, armed):
            write_zip(host.softprompts / "bare.zip", rows(3), None)
        assert native.ask("PUT", "config/soft_prompt", {"value": "bare.zip"})[0] == 500
        assert armed.ask("PUT", "config/soft_prompt", {"value": "bare.zip"})[0] == 200
        assert selected(armed) == "bare.zip"
        for host in (native, armed):
            (host.softprompts / "bare.zip").unlink()

    def test_12_a_bomb_fills_the_memory_and_the_list(self, native, armed):
        bomb = json.dumps({"name": "Bomb", "description": "x" * 50_000_000}).encode()
        for host in (native, armed):
            write_zip(host.softprompts / "bomb.zip", rows(3), bomb)
        grown = {}
        for host in (native, armed):
            before = peak_of(host)
            with Wire(host) as wire:
                wire.say("splistrequest")
                if host is armed:
                    listed = wire.hears("buildsp")
                else:
                    time.sleep(2)
            grown[host] = peak_of(host) - before
        assert "meta.json" in next(row["description"] for row in listed if row["filename"] == "bomb.zip")
        assert armed.ask("PUT", "config/soft_prompt", {"value": "bomb.zip"})[0] == 422
        assert grown[native] > 50_000 and grown[armed] < 20_000, "KiB"
        for host in (native, armed):
            (host.softprompts / "bomb.zip").unlink()

    def test_13_a_name_leads_out_of_the_folder(self, native, armed):
        for host in (native, armed):
            SoftPrompt(rows(4), {"name": "Evil"}).save(host.place / "evil.zip")
            with Wire(host) as wire:
                choose(wire, "../evil.zip")
                if host is armed:
                    assert "leads out of the folder" in wire.hears("errmsg")
                else:
                    wire.hears("spstatitems")
        assert (selected(native), selected(armed)) == ("../evil.zip", "")
        assert armed.ask("PUT", "config/soft_prompt", {"value": "../evil.zip"})[0] == 422

    def test_15_a_blank_name_unloads(self, native, armed):
        for host in (native, armed):
            host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
        assert native.ask("PUT", "config/soft_prompt", {"value": "  "})[0] == 500
        assert armed.ask("PUT", "config/soft_prompt", {"value": "  "}) == (200, {})
        assert selected(armed) == ""
        assert armed.generate(soft_prompt="  ") == armed.generate(soft_prompt="")


def write_zip(path, tensor, meta):
    """As KoboldAI's tuner writes one; ``meta``: an object, its bytes, or None for no file."""
    file = io.BytesIO()
    np.save(file, tensor)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tensor.npy", file.getvalue())
        if meta is not None:
            archive.writestr("meta.json", meta if isinstance(meta, bytes) else json.dumps(meta))


def peak_of(host):
    """The most memory that the host has used so far, in KiB."""
    status = Path(f"/proc/{host.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or not find_spec("playwright"):
        pytest.skip("chromium or playwright is not installed")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    pages = []

    def open_(host):
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        pages.append(page)
        page.goto(host.url)
        page.wait_for_selector("#connectstatus.color_green, #connectstatus:has-text('Connected')", timeout=30_000)
        return page

    yield open_
    for page in pages:
        page.close()


def picture(page, name):
    folder = os.environ.get("KOBOLD_SP_SCREENSHOT")
    if folder:
        Path(folder, name).write_bytes(page.screenshot())


class TestPage:
    def open_menu(self, page):
        page.click("#btn_softprompt")
        page.wait_for_selector("#spcontainer.flex")

    def names(self, page):
        return page.locator("#splistcontent .splistitem").evaluate_all("rows => rows.map(row => $(row).attr('name'))")

    def pick(self, page, filename):
        self.open_menu(page)
        page.locator("#splistcontent .splistitem").filter(has_text=filename).first.click()
        page.click("#btn_spaccept")

    def bulb(self, page):
        return page.locator(".statusicon:has(#stat-sp)")

    def test_list_load_bulb_error_unload(self, armed, open_page):
        page = open_page(armed)
        self.open_menu(page)
        assert self.names(page) == ["noir64.zip", "space64.zip", "noir32.zip", "space32.zip", ""]
        assert "Cannot be used: made for 32 columns, this model has 64" in page.inner_text("#splistcontent")
        picture(page, "client-menu.png")
        page.click("#btn_spclose")
        self.pick(page, "noir64.zip")
        page.wait_for_function("$('#stat-sp').closest('.statusicon').hasClass('active')")
        assert page.text_content("#stat-sp") == "Active soft prompt (5 tokens):"
        assert page.text_content("#stat-spactive") == "Noir <noir64.zip>"
        self.pick(page, "space32.zip")
        page.wait_for_function("document.body.innerText.includes('made for 32 columns')")
        picture(page, "client-error.png")
        assert selected(armed) == "noir64.zip"
        self.pick(page, "[None]")
        page.wait_for_function("!$('#stat-sp').closest('.statusicon').hasClass('active')")
        assert selected(armed) == ""

    def test_a_dropped_file_appears_in_the_open_menu_and_the_mark_stays(self, armed, open_page):
        page = open_page(armed)
        self.open_menu(page)
        page.locator("#splistcontent .splistitem").filter(has_text="space64.zip").click()
        began = time.monotonic()
        SoftPrompt(rows(9), {"name": "Dropped"}).save(armed.softprompts / "dropped.zip")
        page.wait_for_selector("#splistcontent .splistitem[name='dropped.zip']", timeout=5000)
        print(f"a dropped file was in the open menu after {time.monotonic() - began:.2f} s")
        assert page.locator("#splistcontent .popuplistselected").get_attribute("name") == "space64.zip"
        page.click("#btn_spaccept")
        eventually(lambda: selected(armed) == "space64.zip")
        (armed.softprompts / "dropped.zip").unlink()
        time.sleep(0.5)
        assert page.locator("#spcontainer.hidden").count() == 1, "a menu that is closed stays closed"

    def test_the_folder_popup_still_opens(self, armed, open_page):
        page = open_page(armed)
        self.open_menu(page)
        page.locator("#spcontainer .popuptitlebar ~ * button, #spcontainer button:has(.oi)").first.click()
        page.wait_for_function("document.getElementById('popup_list').innerText.includes('noir64.zip')")

    def test_the_button_and_the_reason_follow_the_model_without_a_reload(self, make_host, models, open_page):
        with make_host(None, name="no-model") as host:
            page = open_page(host)
            self.open_menu(page)
            assert page.inner_text("#splistcontent").count("Cannot be used: no model is loaded") == 4
            picture(page, "client-no-model.png")
            page.click("#btn_spclose")
            with Wire(host) as wire:
                load(wire, models, "gptj")
            self.pick(page, "noir64.zip")
            page.wait_for_function("$('#stat-sp').closest('.statusicon').hasClass('active')")
            with Wire(host) as wire:
                wire.say("selectmodel", "ReadOnly")
                wire.hears("selected_model_info")
                press_load(wire)
            page.wait_for_function("window.$ && !$('#stat-sp').closest('.statusicon').hasClass('active')")

    def test_17_text_of_a_file_never_becomes_html(self, native, armed, open_page):
        texts = {key: HOSTILE.format(key) for key in ("name", "author", "description")}
        filename = "<img src=x onerror=window.hacked=1>.zip"
        hacked = {}
        for host in (native, armed):
            write_zip(host.softprompts / filename, rows(3), {**texts, "supported": []})
            page = open_page(host)
            page.click("#btn_softprompt")
            page.wait_for_selector("#spcontainer.flex")
            page.wait_for_timeout(500)
            page.click("#btn_spclose")
            host.ask("PUT", "config/soft_prompt", {"value": filename})
            page.wait_for_function("$('#stat-sp').closest('.statusicon').hasClass('active')")
            shown = page.text_content("#stat-spactive")
            again = open_page(host)  # which the host greets with what is selected
            again.wait_for_function("$('#stat-sp').closest('.statusicon').hasClass('active')")
            again.wait_for_timeout(500)
            hacked[host] = [page.evaluate("window.hacked"), again.evaluate("window.hacked")]
            if host is armed:
                assert shown == f"{texts['name']} <{filename}>"
                picture(again, "client-hostile.png")
                page.click("#btn_softprompt")
                page.wait_for_selector("#spcontainer.flex")
                page.locator("#splistcontent .splistitem").first.click()
                page.click("#btn_spaccept")
                (host.softprompts / filename).write_bytes(b"not a zip any more")
                page.wait_for_timeout(1500)
                assert page.evaluate("window.hacked") is None
            host.ask("PUT", "config/soft_prompt", {"value": ""})
            (host.softprompts / filename).unlink()
        assert all(hacked[native]) and hacked[armed] == [None, None]
