"""The real KoboldAI United, on its own Python, with the hook and without: its sockets, its HTTP API, both its pages.

Runs where ``KOBOLD_SP_UNITED`` names a checkout and ``KOBOLD_SP_UNITED_PYTHON`` the interpreter that runs it.
``KOBOLD_SP_SCREENSHOT=FOLDER`` keeps pictures of its pages.
"""

import io
import itertools
import json
import os
import threading
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hosts.real_host import CHROMIUM, RealHost, Wire, eventually, make_models

from kobold_sp_plugin import SoftPrompt

CHECKOUT, PYTHON = os.environ.get("KOBOLD_SP_UNITED"), os.environ.get("KOBOLD_SP_UNITED_PYTHON")
if not CHECKOUT or not PYTHON:
    pytest.skip("KOBOLD_SP_UNITED and KOBOLD_SP_UNITED_PYTHON name no KoboldAI United", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)

FAMILIES = {"gptj": 64, "gpt2": 64, "neo": 64, "opt": 32, "llama": 64}
"""Families that United loads, and the columns of their embeddings."""
PROMPT = "The door opened and the rain came in."
HOSTILE = "<img src=x onerror=\"window.hacked='{}'\">"
NEW, OLD = "/?ui=2", "/?ui=1"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(PYTHON, tmp_path_factory.mktemp("models"), FAMILIES)


@pytest.fixture(scope="module")
def make_host(models, tmp_path_factory):
    def make(family="gptj", armed=True, name="host", fill=make_softprompts, start=True, backend="Huggingface", **more):
        place = tmp_path_factory.mktemp(name) / "KoboldAI"
        arguments = ["--cpu", "--quiet", "--no_aria2"]
        if family:
            parameters = {"use_gpu": False} if family == "gpt2" else {"CPU_Layers": 2}
            arguments += ["--model", f"tiny-{family}", "--path", str(models / f"tiny-{family}")]
            arguments += ["--model_parameters", json.dumps(parameters), "--model_backend", backend]
        host = RealHost(CHECKOUT, PYTHON, place, arguments, armed, fill, start, PYTHONNOUSERSITE="1", **more)
        if start and family:
            wait_for_model(host, f"tiny-{family}")
        return host

    return make


def wait_for_model(host, name):
    """United listens before it has loaded; once it has, it is not busy and answers."""
    body = {"prompt": "x", "max_length": 1}
    eventually(lambda: host.ask("GET", "model")[1] == {"result": name}, 120)
    eventually(lambda: host.ask("POST", "generate", body)[0] == 200, 120)
    if host.armed:  # what is shown of it follows
        eventually(lambda: host.ask("GET", "config/soft_prompts_list")[1]["values"], 120)


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


def load(wire, models, family=None, backend="Huggingface", armed=True, **more):
    """Load a model as the new page does; for "Read Only", none."""
    what = {"id": f"tiny-{family}", "path": str(models / f"tiny-{family}"), "CPU_Layers": 2, "use_gpu": False}
    wire.emit("load_model", {"plugin": backend, **(what if family else {}), **more})
    if armed:
        name = f"tiny-{family}" if family else backend
        wire.hears("softprompts", 120, when=lambda status: status["model"] == name)
    else:
        wire.hears("var_changed", 120, when=lambda data: data["name"] == "aibusy" and data["value"] is True)
        wire.hears("var_changed", 120, when=lambda data: data["name"] == "aibusy" and data["value"] is False)
        time.sleep(2)


def selected(host):
    return host.ask("GET", "config/soft_prompt")[1]["value"]


def variable(wire, name, **more):
    return wire.hears("var_changed", when=lambda data: data["name"] == name, **more)["value"]


def variables(host, query=NEW):
    """What a page that connects now is told last of each variable."""
    with Wire(host, query) as wire:
        wire.hears("softprompts")
        time.sleep(1)
        return {each["name"]: each["value"] for event, each in wire.heard if event == "var_changed"}


def submit(wire, text="", event="submit"):
    """Have the story go on; what the page was told meanwhile."""
    wire.emit(event, {"data": text, "theme": ""} if event == "submit" else {})
    wire.hears("var_changed", 60, when=lambda data: data["name"] == "aibusy" and data["value"] is True)
    wire.hears("var_changed", 60, when=lambda data: data["name"] == "aibusy" and data["value"] is False)
    time.sleep(1)
    return wire.heard


class TestText:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_is_the_hosts_own_soft_prompts(self, family, make_host):
        width = FAMILIES[family]
        requests = [
            {"seed": seed, "soft_prompt": name, **more}
            for seed in (1, 2)
            for name in ("", f"noir{width}.zip", f"space{width}.zip")
            for more in ({}, {"n": 2}, {"rep_pen": 3.0}, {"prompt": PROMPT * 9, "max_context_length": 60})
        ]
        requests += [
            {"prompt": "", "seed": 5, "soft_prompt": f"noir{width}.zip", **more} for more in ({}, {"rep_pen": 3.0})
        ]
        texts = []
        for is_armed in (False, True):
            with make_host(family, is_armed, f"{family}-{is_armed}") as host:
                texts.append([host.generate(**request) for request in requests])
        assert texts[1] == texts[0]
        assert len({str(each) for each in texts[0]}) > len(requests) // 2

    def test_a_story_of_the_page(self, native, armed):
        stories = []
        for host in (native, armed):
            for route, value in (("sampler_full_determinism", True), ("sampler_seed", 5), ("max_length", 12)):
                assert host.ask("PUT", f"config/{route}", {"value": value})[0] == 200
            host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
            with Wire(host, NEW) as wire:
                submit(wire, PROMPT)
                submit(wire, "Nobody said a word.")
                heard = submit(wire, event="retry")
                context = [each for event, each in heard if event == "var_changed" and each["name"] == "context"][-1]
            first = context["value"][0]
            assert (first["type"], len(first["tokens"])) == ("soft_prompt", 5), "the context bar counts it"
            stories.append(host.ask("GET", "story")[1])
        assert stories[1] == stories[0] and len(stories[0]["results"]) > 2

    def test_basic_huggingface_and_what_is_generated_beside_the_story(self, make_host, armed, models):
        expected = armed.generate(soft_prompt="noir64.zip")
        without = armed.generate(soft_prompt="")
        with make_host(name="basic", backend="Basic Huggingface") as host:
            assert host.generate(soft_prompt="") == without != expected
            assert host.generate(soft_prompt="noir64.zip") == expected
            assert host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"}) == (200, {})
            assert host.generate() == expected
            assert variables(host)["allowsp"] is True

    def test_the_scratchpad_has_no_soft_prompt(self, armed):
        texts = []
        for name in ("", "noir64.zip", ""):
            armed.ask("PUT", "config/soft_prompt", {"value": name})
            with Wire(armed, NEW) as wire:
                armed.ask("PUT", "config/sampler_seed", {"value": 11})
                wire.emit("scratchpad_prompt", PROMPT)
                texts.append(wire.hears("scratchpad_response", 60))
        assert texts[0] == texts[1] == texts[2]


class TestNothingElseChanges:
    def test_without_a_soft_prompt_the_same_events_texts_and_settings(self, make_host):
        seen = []
        for is_armed in (False, True):
            host = make_host(armed=is_armed, name=f"plain-{is_armed}", fill=no_softprompts, start=False)
            host.start()
            eventually(lambda: host.ask("POST", "generate", {"prompt": "x", "max_length": 1})[0] == 200, 120)  # noqa: B023
            time.sleep(2)
            with host, Wire(host, NEW) as wire:
                wire.hears("var_changed", when=lambda data: data["name"] == "context")
                time.sleep(1)
                events = [wire.heard]
                for route, value in (("sampler_full_determinism", True), ("sampler_seed", 5), ("max_length", 12)):
                    assert host.ask("PUT", f"config/{route}", {"value": value})[0] == 200
                events.append(submit(wire, PROMPT))
                events.append(submit(wire, "Nobody said a word."))
                events.append(submit(wire, event="retry"))
                story = host.ask("GET", "story")[1]
                settings = {
                    path.name: comparable(path.read_text())
                    for path in (host.place / "settings").iterdir()
                    if path.is_file()
                }
            seen.append(({of_the_host(each) for window in events for each in window} - {None}, story, settings))
        assert seen[1][1] == seen[0][1]
        assert seen[1][2] == seen[0][2] and any("spfilename" in each for each in seen[0][2].values())
        assert seen[1][0] == seen[0][0]


def no_softprompts(place):
    pass


def comparable(text):
    settings = json.loads(text)
    for name in ("story_loads", "port", "savedir", "seed"):
        settings.pop(name, None)
    return settings


TIMED = ("tqdm_progress", "tqdm_rem_time", "generated_tkns", "seed", "port", "Set Action", "save_paths")
OURS = ("allowsp", "splist", "spfilename", "spname", "spmeta", "sp_length")


def of_the_host(heard):
    """Which event it was; None for those that are ours, or come by the clock."""
    event, payload = heard
    if event in ("softprompts", "log_message", "stream_tokens") or not isinstance(payload, dict):
        return None
    if payload.get("name") in TIMED + OURS or payload.get("cmd") in ("allowsp", "spstatitems"):
        return None
    return event, payload.get("classname"), payload.get("name"), payload.get("cmd")


SEEDS = itertools.count(1000)
"""A seed that was used before a model was loaded fails after it: United keeps states of the generator in tensors, and
empties every tensor of the process."""


def same_text(host, *requests):
    seed = next(SEEDS)
    first, *others = [host.generate(seed=seed, **request) for request in requests]
    return all(each == first for each in others)


class TestBackends:
    def test_every_switch_with_a_prompt_loaded(self, make_host, models):
        """Between all backends that a CPU without a network can load; none crashes, none leaves a stale prompt."""
        last = ""
        with make_host(name="switched") as host, Wire(host, NEW) as wire:
            assert host.ask("PUT", "config/max_length", {"value": 8})[0] == 200
            for family, backend in (
                ("gptj", "Huggingface"),
                ("gpt2", "Huggingface"),
                ("gptj", "Basic Huggingface"),
                ("llama", "Huggingface"),
                (None, "Read Only"),
                ("neo", "Basic Huggingface"),
                ("neo", "Huggingface"),
                ("opt", "Huggingface"),
                ("gptj", "Huggingface"),
            ):
                load(wire, models, family, backend)
                told = variables(host)
                width = FAMILIES.get(family)
                if family is None:
                    assert told["allowsp"] is False and told["spfilename"] == "" and told["sp_length"] == 0
                    assert all(label.endswith("(no model is loaded)") for _, (label, _) in told["splist"])
                    assert host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})[0] == 422
                    continue
                assert told["allowsp"] is True
                usable = [name for name, (label, _) in told["splist"] if not label.endswith(")")]
                assert usable == [f"noir{width}.zip", f"space{width}.zip"]
                shown = last if width == 64 else ""  # what was selected with the last model that could use it
                assert (told["spfilename"], told["sp_length"]) == (shown, 5 if shown else 0)
                assert same_text(host, {}, {"soft_prompt": shown})
                assert not same_text(host, {"soft_prompt": ""}, {"soft_prompt": f"noir{width}.zip"})
                if width == 64:
                    wire.emit("load_softprompt", "noir64.zip")
                    last = "noir64.zip"
                    eventually(lambda: selected(host) == "noir64.zip")

    def test_backends_that_cannot(self, make_host, armed, models):
        with make_host(None, name="front") as host, Wire(host, NEW) as wire:
            wire.hears("softprompts")
            load(wire, models, "gptj")
            assert host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"}) == (200, {})
            (host.place / "tiny-gptj").symlink_to(models / "tiny-gptj")  # it takes the tokenizer by the model's name
            elsewhere = "the model runs in another KoboldAI, which is sent text only; select the soft prompt there"
            for backend, more, reason in (
                ("KoboldAI API", {"base_url": armed.url}, elsewhere),
                ("KoboldCPP", {}, "this model could not be loaded"),
                (
                    "Huggingface",
                    {"id": "absent", "path": "/absent", "use_gpu": False},
                    "this model could not be loaded",
                ),
            ):
                wire.emit("load_model", {"plugin": backend, **more})
                if backend == "KoboldCPP":  # it needs more parameters, and leaves nothing
                    wire.hears("softprompts", 60, when=lambda status: status["model"] == "")
                else:
                    wire.hears("softprompts", 60, when=lambda status: status["model"] and not status["selection"])
                    told = variables(host)
                    assert (told["allowsp"], told["sp_length"], told["spfilename"]) == (False, 0, "")
                    assert {label.rsplit(" (")[-1] for _, (label, _) in told["splist"]} == {reason + ")"}
            load(wire, models, "gptj")
            assert selected(host) == "noir64.zip", "the choice is the user's, and is back with a model that can"
            assert not same_text(host, {}, {"soft_prompt": ""})


class TestDefects:
    """Before: the host's own. After: with the hook. By their numbers in the project's reference."""

    @pytest.mark.parametrize("backend", ["Huggingface", "Basic Huggingface"])
    def test_1_and_2_another_model_or_backend_with_a_prompt_loaded(self, make_host, models, backend):
        status = {}
        for is_armed in (False, True):
            with make_host(armed=is_armed, name=f"switching-{is_armed}") as host:
                host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
                with Wire(host, NEW) as wire:
                    load(wire, models, "gpt2", backend, is_armed)
                status[is_armed] = host.ask("POST", "generate", {"prompt": PROMPT, "max_length": 5})[0]
                if is_armed:
                    assert selected(host) == "noir64.zip" and not same_text(host, {}, {"soft_prompt": ""})
        assert status == {False: 500, True: 200}

    def test_3_and_16_a_bad_file_takes_the_name_but_not_the_tensor(self, native, armed):
        for host in (native, armed):
            write_zip(
                host.softprompts / "nan.zip", np.full((3, 64), np.nan, np.float32), {"name": "N", "description": ""}
            )
            host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
        text = {host: host.generate() for host in (native, armed)}
        assert native.ask("PUT", "config/soft_prompt", {"value": "nan.zip"})[0] == 500
        assert selected(native) == "" and native.generate() == text[native], "it says none, and uses noir"
        status, answer = armed.ask("PUT", "config/soft_prompt", {"value": "nan.zip"})
        assert status == 422 and "nan in row 0" in str(answer)
        assert selected(armed) == "noir64.zip" and armed.generate() == text[armed]
        for host in (native, armed):
            (host.softprompts / "nan.zip").unlink()

    def test_7_a_choice_during_a_request_with_its_own_is_not_lost(self, native, armed):
        texts = {}
        for host in (native, armed):
            expected = host.generate(soft_prompt="space64.zip", max_length=60)
            with Wire(host, NEW) as wire:
                answers = []
                request = {"soft_prompt": "space64.zip", "max_length": 60}
                thread = threading.Thread(target=lambda: answers.append(host.generate(**request)))  # noqa: B023
                thread.start()
                time.sleep(0.2)
                wire.emit("load_softprompt", "noir64.zip")
                thread.join(60)
            texts[host] = answers == [expected], selected(host)
        assert texts[armed] == (True, "noir64.zip")
        assert texts[native][1] == "", "the request's end takes the user's choice back"

    def test_7_a_request_that_fails_leaves_the_host_free(self, armed):
        armed.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
        body = {"prompt": PROMPT, "soft_prompt": "space64.zip", "max_length": 40, "max_context_length": 16}
        assert armed.ask("POST", "generate", body)[0] in (422, 500)
        assert selected(armed) == "noir64.zip" and armed.generate()
        assert armed.ask("POST", "generate", {"prompt": "x", "soft_prompt": "absent.zip"})[0] == 422
        assert armed.generate()

    def test_9_the_selection_is_not_there_after_a_restart(self, make_host):
        after = {}
        for is_armed in (False, True):
            with make_host(armed=is_armed, name=f"restart-{is_armed}") as host:
                host.ask("PUT", "config/soft_prompt", {"value": "noir64.zip"})
                text = host.generate()
                time.sleep(3)  # the host writes its settings two seconds after a change
                host.restart()
                wait_for_model(host, "tiny-gptj")
                after[is_armed] = host.generate() == text, selected(host)
                if is_armed:
                    settings = json.loads((host.place / "settings" / "system_settings.v2_settings").read_text())
                    assert settings["spfilename"] == "noir64.zip"
                    (host.softprompts / "noir64.zip").rename(host.place / "away.zip")
                    host.restart()
                    wait_for_model(host, "tiny-gptj")
                    assert selected(host) == "" and "noir64.zip" in host.text_of_log()
                    (host.place / "away.zip").rename(host.softprompts / "noir64.zip")
                    host.armed = False
                    host.restart()
                    wait_for_model(host, "tiny-gptj")
                    assert host.ask("GET", "config/soft_prompts_list")[0] == 200, "readable without us"
        assert after[True] == (True, "noir64.zip")
        assert after[False][0] is False

    @pytest.mark.parametrize("meta", [None, {}, b"[1, 2]", b'"text"', b"null"], ids=str)
    def test_10_and_11_metadata_that_is_missing_or_of_the_wrong_type(self, native, armed, meta):
        for host in (native, armed):
            write_zip(host.softprompts / "odd.zip", rows(3), meta)
        assert armed.ask("GET", "config/soft_prompts_list")[0] == 200
        assert armed.ask("PUT", "config/soft_prompt", {"value": "odd.zip"})[0] in (200, 422)
        assert native.ask("PUT", "config/soft_prompt", {"value": "odd.zip"})[0] == 500
        for host in (native, armed):
            with Wire(host, NEW) as wire:
                wire.emit("sp_list_refresh", "")
                if host is armed:
                    names = [label for _, (label, _) in variable(wire, "splist")]
                    assert all(isinstance(name, str) for name in names) and "Noir" in names
            (host.softprompts / "odd.zip").unlink()

    def test_12_a_bomb_fills_the_memory_and_the_list(self, native, armed):
        bomb = json.dumps({"name": "Bomb", "description": "x" * 50_000_000}).encode()
        grown = {}
        for host in (native, armed):
            before = peak_of(host)
            write_zip(host.softprompts / "bomb.zip", rows(3), bomb)
            with Wire(host, NEW) as wire:
                wire.emit("sp_list_refresh", "")
                if host is armed:
                    listed = dict(variable(wire, "splist"))
                else:
                    time.sleep(3)
            grown[host] = peak_of(host) - before
            (host.softprompts / "bomb.zip").unlink()
        assert "meta.json" in listed["bomb.zip"][1]
        assert grown[native] > 50_000 and grown[armed] < 20_000, "KiB"

    def test_13_a_name_leads_out_of_the_folder(self, native, armed):
        for host in (native, armed):
            SoftPrompt(rows(4), {"name": "Evil", "description": ""}).save(host.place / "evil.zip")
            with Wire(host, NEW) as wire:
                wire.emit("load_softprompt", "../evil.zip")
                if host is armed:
                    assert "leads out of the folder" in wire.hears("error")
                else:
                    eventually(lambda: selected(native) != "")
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

    def open_(host, route="/"):
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        pages.append(page)
        page.goto(host.url + route)
        page.add_style_tag(content="#message-popup { display: none }")  # the host's own news, over the whole page
        if route == "/":
            page.wait_for_function("document.querySelectorAll('#sp option').length > 0", timeout=60_000)
        else:
            page.wait_for_selector("#btn_softprompt:not(.hidden)", state="attached", timeout=60_000)
        return page

    yield open_
    for page in pages:
        page.close()


def picture(page, name):
    folder = os.environ.get("KOBOLD_SP_SCREENSHOT")
    if folder:
        Path(folder, name).write_bytes(page.screenshot())


def options(page):
    return page.eval_on_selector_all("#sp option", "all => all.map(each => [each.value, each.textContent])")


def pick(page, filename):
    """As a user does: the page sends what is shown when its list is clicked."""
    page.evaluate("name => { const list = document.getElementById('sp'); list.value = name; list.click(); }", filename)


class TestNewPage:
    def test_list_load_error_unload_and_the_context_bar(self, armed, open_page):
        page = open_page(armed)
        page.wait_for_function("document.querySelectorAll('#sp option').length === 5")
        assert options(page) == [
            ["", "Not in Use"],
            ["noir64.zip", "Noir"],
            ["space64.zip", "Space"],
            ["noir32.zip", "Noir (made for 32 columns, this model has 64)"],
            ["space32.zip", "Space (made for 32 columns, this model has 64)"],
        ]
        pick(page, "noir64.zip")
        page.wait_for_function("document.querySelectorAll('.context-sp .context-token').length === 5")
        assert selected(armed) == "noir64.zip"
        page.evaluate("selectTab(document.getElementById('settings_flyout_tab_settings'))")
        page.evaluate("document.getElementById('sp').scrollIntoView({block: 'center'})")
        picture(page, "united-new-page.png")
        pick(page, "space32.zip")
        page.wait_for_function("document.getElementById('error-popup').innerText.includes('made for 32 columns')")
        page.wait_for_function("document.getElementById('sp').value === 'noir64.zip'")
        picture(page, "united-new-error.png")
        again = open_page(armed)
        again.wait_for_function("document.getElementById('sp').value === 'noir64.zip'")
        pick(page, "")
        page.wait_for_function("document.querySelectorAll('.context-sp .context-token').length === 0")
        assert selected(armed) == ""

    def test_a_dropped_file_appears_and_the_choice_stays_shown(self, armed, open_page):
        page = open_page(armed)
        pick(page, "space64.zip")
        eventually(lambda: selected(armed) == "space64.zip")
        began = time.monotonic()
        SoftPrompt(rows(9), {"name": "Dropped"}).save(armed.softprompts / "dropped.zip")
        page.wait_for_selector("#sp option[value='dropped.zip']", state="attached", timeout=10_000)
        print(f"a dropped file was in the new page's list after {time.monotonic() - began:.2f} s")
        page.wait_for_function("document.getElementById('sp').value === 'space64.zip'")
        (armed.softprompts / "dropped.zip").unlink()
        page.wait_for_selector("#sp option[value='dropped.zip']", state="detached", timeout=10_000)

    def test_17_text_of_a_file_never_becomes_html(self, armed, open_page):
        filename = "<img src=x onerror=window.hacked=1>.zip"
        texts = {key: HOSTILE.format(key) for key in ("name", "author", "description")}
        write_zip(armed.softprompts / filename, rows(3), {**texts, "supported": []})
        write_zip(armed.softprompts / f"wide{filename}", rows(3, width=32), {**texts, "supported": []})
        page = open_page(armed)
        page.wait_for_function("document.getElementById('sp').textContent.includes('onerror')")
        pick(page, filename)
        eventually(lambda: selected(armed) == filename)
        pick(page, f"wide{filename}")
        page.wait_for_function("document.getElementById('error-popup').innerText.includes('made for 32 columns')")
        (armed.softprompts / filename).unlink()
        page.wait_for_function("document.getElementById('notification-container').innerText.includes('no longer')")
        assert page.evaluate("window.hacked") is None
        (armed.softprompts / f"wide{filename}").unlink()


class TestTrainingPage:
    @pytest.mark.timeout(1200)  # three processes that import all that training needs, each after the host's stories
    def test_the_form_trains_and_the_soft_prompt_is_in_the_list(self, make_host, open_page):
        words = ["door", "rain", "clock", "wall", "word", "street", "night"]
        texts = [f"The {a} and the {b} were gone, and {c} was all." for a in words for b in words for c in words[:3]]
        with make_host(name="training") as host:
            (host.place / "my texts").mkdir()
            (host.place / "my texts" / "a.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
            page = open_page(host)

            def fill(**form):
                page.evaluate("openPopup('sp-trainer-popup')")
                for name, text in form.items():
                    page.fill(f"#sp_{name}", text)
                picture(page, "united-training-form.png")
                page.click("#sp-trainer-popup button:has-text('Ok')")

            panel = page.locator("#softprompt-training")
            fill(title="", dataset="my texts")
            page.wait_for_function("document.getElementById('softprompt-training').innerText.includes('title')")
            panel.locator("button").click()
            fill(title="Gone", dataset="nowhere", author="Ada", description="<i>Rain</i>", prompt="All was gone")
            page.wait_for_function(
                "document.getElementById('softprompt-training').innerText.includes('no file or folder')",
                timeout=120_000,
            )
            picture(page, "united-training-error.png")
            fill(title="Gone", dataset="my texts")
            page.wait_for_function(
                "document.getElementById('softprompt-training').innerText.includes('loss')", timeout=180_000
            )
            assert host.generate()
            picture(page, "united-training.png")
            page.reload()
            page.wait_for_function(
                "document.getElementById('softprompt-training').innerText.includes('step')", timeout=60_000
            )
            page.click("#softprompt-training button")
            page.wait_for_function(
                "document.getElementById('softprompt-training').innerText.includes('Saved at step')", timeout=120_000
            )
            page.click("#softprompt-training button")
            form = {"title": "Gone", "dataset": "my texts", "author": "Ada", "description": "<i>Rain</i>"}
            fill(**form, prompt="All was gone")
            page.wait_for_function(
                "document.getElementById('softprompt-training').innerText.includes('Going on')", timeout=180_000
            )
            page.wait_for_selector("#sp option[value='Gone.zip']", state="attached", timeout=400_000)
            page.wait_for_function(
                "document.getElementById('softprompt-training').innerText.startsWith('Trained Gone')", timeout=60_000
            )
            page.add_style_tag(content="#message-popup { display: none }")
            picture(page, "united-trained.png")
            assert host.generate() != host.generate(soft_prompt="Gone.zip")
            assert (host.place / "training" / "Gone" / "report.html").is_file()


class TestOldPage:
    def open_menu(self, page):
        page.evaluate("$('#btn_softprompt').click()")
        page.wait_for_selector("#spcontainer.flex")

    def names(self, page):
        return page.locator("#splistcontent .splistitem").evaluate_all("rows => rows.map(row => $(row).attr('name'))")

    def pick(self, page, filename):
        self.open_menu(page)
        page.wait_for_function("$('#splistcontent .splistitem').length > 0")
        page.locator("#splistcontent .splistitem").filter(has_text=filename).first.click()
        page.click("#btn_spaccept")

    def test_list_load_bulb_error_unload(self, armed, open_page):
        page = open_page(armed, "/classic")
        self.open_menu(page)
        assert self.names(page) == ["noir64.zip", "space64.zip", "noir32.zip", "space32.zip", ""]
        assert "Cannot be used: made for 32 columns, this model has 64" in page.inner_text("#splistcontent")
        began = time.monotonic()
        SoftPrompt(rows(9), {"name": "Dropped"}).save(armed.softprompts / "dropped.zip")
        page.wait_for_selector("#splistcontent .splistitem[name='dropped.zip']", timeout=10_000)
        print(f"a dropped file was in the old page's open menu after {time.monotonic() - began:.2f} s")
        picture(page, "united-classic-menu.png")
        (armed.softprompts / "dropped.zip").unlink()
        page.click("#btn_spclose")
        self.pick(page, "noir64.zip")
        page.wait_for_function("$('#stat-sp').closest('.statusicon').hasClass('active')")
        assert page.text_content("#stat-sp") == "Active soft prompt (5 tokens):"
        assert page.text_content("#stat-spactive") == "Noir <noir64.zip>"
        self.pick(page, "space32.zip")
        page.wait_for_function("document.body.innerText.includes('made for 32 columns')")
        assert selected(armed) == "noir64.zip"
        self.pick(page, "[None]")
        page.wait_for_function("!$('#stat-sp').closest('.statusicon').hasClass('active')")
        assert selected(armed) == ""

    def test_17_text_of_a_file_never_becomes_html(self, armed, open_page):
        filename = "<img src=x onerror=window.hacked=1>.zip"
        texts = {key: HOSTILE.format(key) for key in ("name", "author", "description")}
        write_zip(armed.softprompts / filename, rows(3), {**texts, "supported": []})
        page = open_page(armed, "/classic")
        self.open_menu(page)
        page.wait_for_timeout(500)
        armed.ask("PUT", "config/soft_prompt", {"value": filename})
        page.wait_for_function("$('#stat-sp').closest('.statusicon').hasClass('active')")
        again = open_page(armed, "/classic")  # which the host greets with what is selected
        again.wait_for_function("$('#stat-sp').closest('.statusicon').hasClass('active')")
        again.wait_for_timeout(500)
        assert again.text_content("#stat-spactive") == f"{texts['name']} <{filename}>"
        assert page.evaluate("window.hacked") is None and again.evaluate("window.hacked") is None
        (armed.softprompts / filename).unlink()

    def test_the_button_is_there_as_soon_as_a_model_that_can_is(self, make_host, models, browser):
        with make_host(None, name="no-model") as host:
            page = browser.new_page()
            page.goto(host.url + "/classic")
            with Wire(host, NEW) as wire:
                load(wire, models, "gptj")
            page.wait_for_selector("#btn_softprompt:not(.hidden)", state="attached", timeout=60_000)
            self.pick(page, "noir64.zip")
            page.wait_for_function("$('#stat-sp').closest('.statusicon').hasClass('active')")
            page.close()
