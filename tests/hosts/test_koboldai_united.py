"""The hook in a stand-in United: in this process, and in one of its own under eventlet."""

import contextlib
import importlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from models import tiny_model, tiny_tokenizer
from torch.nn import Embedding

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.errors import HostError
from kobold_sp_plugin.hosts import koboldai
from kobold_sp_plugin.hosts.koboldai.united import BACKEND, REFUSALS, UNITED
from kobold_sp_plugin.softprompt import OWN_KEY

REPOSITORY = Path(koboldai.__file__).resolve().parents[3]
HOOK = REPOSITORY / "hooks" / "koboldai"
STANDIN = Path(__file__).resolve().parent / "standin_united" / "aiserver.py"
PROMPT = "The door opened and the rain came in."
START_SECONDS = 50
EVIL = "<img src=x onerror=alert(1)>"


def softprompt(seed, n_tokens=4, width=32, **metadata):
    rows = 5 * np.random.default_rng(seed).normal(size=(n_tokens, width)).astype(np.float32)
    return SoftPrompt(rows, metadata)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in {
        "first": tiny_model("gptj"),
        "second": tiny_model("gpt2"),
        "narrow": tiny_model("gpt2", n_embd=16),
    }.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that a host runs in."""
    folder = tmp_path / "softprompts"
    folder.mkdir()
    softprompt(1, name="Noir", author="A", description="Rain.").save(folder / "noir.zip")
    softprompt(2, n_tokens=6, name="Space", description="Stars.").save(folder / "space.zip")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Standin(dict):
    """The globals of the stand-in in this process, with Flask-SocketIO in threading mode."""

    def __init__(self, models):
        super().__init__(__name__="standin")
        exec(compile(STANDIN.read_text(), str(STANDIN), "exec"), self)
        self.models = models
        self.variables = self["koboldai_vars"]
        self.system = self.variables._system_settings

    def load(self, backend="Huggingface", name="first"):
        self["model"].unload()
        self["model_backends"][backend].path = str(self.models / name) if name else ""
        self["load_model"](backend)

    def text(self, prompt=PROMPT):
        return self["calcsubmit"](prompt)

    def ask(self, method, route, **body):
        answer = getattr(self["app"].test_client(), method)(f"/api/v1/{route}", json=body or None)
        return answer.status_code, answer.get_json()

    def generate(self, **body):
        status, answer = self.ask("post", "generate", prompt=PROMPT, **body)
        assert status == 200, answer
        return answer["results"][0]["text"]

    @property
    def shown(self):
        return self.system.spfilename, self.system.sp_length

    def snapshot(self):
        """Everything that the hook changes."""
        loaded = "model", "koboldai_vars"
        changes = "model", "tokenizer", "path", "seen"
        return (
            {name: value for name, value in self.items() if name not in loaded},
            dict(self["socketio"].server.handlers["/"]),
            dict(self["app"].view_functions),
            dict(vars(self["fileops"])),
            dict(vars(self["system_settings"])),
            [
                {name: value for name, value in vars(each).items() if name not in changes}
                for each in self["model_backends"].values()
            ],
        )


@pytest.fixture(autouse=True)
def embeddings():
    """The host's own patch of all embeddings is taken back after each test."""
    own = Embedding.__dict__.get("__call__")
    yield own
    if own is None:
        with contextlib.suppress(AttributeError):
            del Embedding.__call__
    else:
        Embedding.__call__ = own


@pytest.fixture
def standin(place, models):
    return Standin(models)


@pytest.fixture
def host(standin):
    """The stand-in, attached, with a model."""
    attachment = koboldai.attach(standin)
    standin.session, standin.menu = attachment.session, attachment.menu
    standin.load()
    yield standin
    attachment.undo()


@pytest.fixture
def texts(models, place):
    """What the host writes by itself with each soft prompt."""
    own = Embedding.__dict__.get("__call__")
    native, texts = Standin(models), {}
    native.load()
    for filename in ("noir.zip", "space.zip", ""):
        native["spRequest"](filename)
        texts[filename] = native.text()
    assert len(set(texts.values())) == 3
    if own is None:
        del Embedding.__call__
    return texts


def write_zip(path, tensor, meta):
    file = io.BytesIO()
    np.save(file, tensor)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tensor.npy", file.getvalue())
        if meta is not None:
            archive.writestr("meta.json", meta if isinstance(meta, str) else json.dumps(meta))


class TestGenerations:
    @pytest.mark.parametrize("backend", ["Huggingface", "Basic Huggingface", "A plugin's"])
    def test_the_text_is_the_hosts_own(self, texts, host, backend):
        host.load(backend)
        for filename, text in texts.items():
            host["spRequest"](filename)
            assert host.text() == text == host.generate() == host.generate(soft_prompt=filename)

    def test_the_budget_is_right_to_the_token(self, host, texts):
        host["spRequest"]("space.zip")
        ids = host.variables.calc_ai_text(PROMPT * 20)
        assert len(ids) + 6 + host.variables.genamt == host.variables.max_length
        assert host.text(PROMPT * 20)
        n_text = len(tiny_tokenizer()(PROMPT)["input_ids"])
        for filename, n_soft in (("space.zip", 6), ("", 0)):
            host["spRequest"](filename)
            new = host["model"].raw_generate(PROMPT, 5, is_core=True, forever=True)
            assert n_soft + n_text + len(new) == host.variables.max_length

    def test_the_context_bar_follows_the_selection(self, host):
        host.variables.prompt = PROMPT
        relay = threading.Thread(target=host.menu.relay, args=(time.sleep,))
        relay.start()
        for filename, n_tokens in (("space.zip", 6), ("", 0)):
            host["spRequest"](filename)
            eventually(lambda n=n_tokens: sum(len(e["tokens"]) for e in soft_of(host.variables.context)) == n)
        host.menu.close()
        relay.join(10)

    def test_what_is_generated_beside_the_story_has_none(self, host):
        aside = host["model"].raw_generate(PROMPT, 12)
        host["spRequest"]("noir.zip")
        assert host["model"].raw_generate(PROMPT, 12) == aside
        assert host["model"].raw_generate(PROMPT, 12, is_core=True) != aside

    def test_a_generation_keeps_what_its_budget_was_counted_with(self, host, texts):
        seen = []

        def meanwhile():
            host["spRequest"]("noir.zip")
            seen.append(host.shown)

        host["spRequest"]("space.zip")
        host["meanwhile"] = meanwhile
        assert host.text() == texts["space.zip"]
        assert seen == [("noir.zip", 6)] and host.shown == ("noir.zip", 4)

    def test_a_request_that_fails_leaves_everything_as_it_was(self, host, texts):
        host["spRequest"]("space.zip")
        assert host.ask("post", "generate", prompt=PROMPT, soft_prompt="gone.zip")[0] == 422
        host["meanwhile"] = lambda: 1 / 0
        assert host.ask("post", "generate", prompt=PROMPT, soft_prompt="noir.zip")[0] == 500
        host["meanwhile"] = lambda: None
        assert host.shown == ("space.zip", 6) and host.generate() == texts["space.zip"]


def soft_of(context):
    return [each for each in context if each["type"] == "soft_prompt"]


def eventually(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


class TestDefects:
    """The seventeen of the project's reference, as far as they are United's; by their numbers."""

    def test_1_another_model_does_not_empty_the_prompt(self, host, texts):
        host["spRequest"]("noir.zip")
        host.load(name="second")
        assert host.shown == ("noir.zip", 4) and host.text()
        host.load(name="first")
        assert host.text() == texts["noir.zip"]

    def test_2_another_backend_neither_fails_nor_keeps_what_it_cannot_use(self, host, texts):
        host["spRequest"]("noir.zip")
        host.load("Basic Huggingface")
        assert host.system.allowsp is True and host.text() == texts["noir.zip"]
        for backend in ("KoboldCPP", "Read Only"):
            host.load(backend, None)
            assert host.shown == ("", 0) and host.system.allowsp is False
            assert host.ask("put", "config/soft_prompt", value="noir.zip")[0] == 422
            assert host.ask("put", "config/soft_prompt", value=" ")[0] == 200
            host["spRequest"]("")
        host.load(name="narrow")
        assert host.shown == ("", 0) and host.text()

    @pytest.mark.parametrize(
        "rows", [np.full((3, 32), np.nan, np.float32), np.zeros((3, 32), "S1")], ids=["nan", "text"]
    )
    def test_3_and_16_a_bad_file_changes_nothing(self, host, texts, place, rows):
        write_zip(place / "softprompts" / "bad.zip", rows, {"name": "Bad", "description": ""})
        host["spRequest"]("noir.zip")
        status, answer = host.ask("put", "config/soft_prompt", value="bad.zip")
        assert status == 422 and "bad.zip" in answer["detail"]
        assert host.shown == ("noir.zip", 4) and host.text() == texts["noir.zip"]
        host["spRequest"]("")
        assert host.shown == ("", 0)

    def test_4_a_second_backend_of_the_kind_reads_its_own_model(self, host, texts):
        host["spRequest"]("noir.zip")
        host.load("A plugin's")
        assert host.text() == texts["noir.zip"]

    def test_5_and_6_nobody_sees_a_soft_token_and_no_embedding_of_the_process_is_patched(self, host, embeddings):
        host["spRequest"]("noir.zip")
        host["model"].seen.clear()
        text = tiny_tokenizer()(PROMPT)["input_ids"]
        host.text()
        assert all(rows[0][: len(text)] == text for rows in host["model"].seen)
        assert Embedding.__dict__.get("__call__") is embeddings and host.system.sp is None

    def test_7_a_request_reads_its_own_soft_prompt_and_touches_nobodys(self, host, texts):
        host["spRequest"]("space.zip")
        host["meanwhile"] = lambda: host["spRequest"]("noir.zip")
        assert host.generate(soft_prompt="") == texts[""]
        assert host.shown == ("noir.zip", 4), "the user's choice outlives the request"
        host["meanwhile"] = lambda: None
        host.variables.aibusy = True
        assert host.ask("post", "generate", prompt=PROMPT, soft_prompt="space.zip")[0] == 503
        assert host.shown == ("noir.zip", 4)

    def test_9_the_settings_keep_the_choice_and_nothing_that_is_not_there(self, host, texts, place, models):
        settings = place / "settings" / "system_settings.v2_settings"
        host["spRequest"]("noir.zip")
        assert json.loads(settings.read_text())["spfilename"] == "noir.zip"
        host.load("Read Only", None)
        host["settingschanged"]()
        assert host.shown == ("", 0) and json.loads(settings.read_text())["spfilename"] == "noir.zip"
        again = Standin(models)
        again.system.spfilename, again.system.spname = "noir.zip", "Noir"
        attachment = koboldai.attach(again)
        try:
            shown = again.system.spfilename, again.system.spname, again.system.sp_length
            assert shown == ("", "Not in Use", 0), "no model is loaded"
            again.load()
            assert again.shown == ("noir.zip", 4) and again.text() == texts["noir.zip"]
            again["spRequest"]("")
            again.load(name="second")
            assert again.shown == ("", 0), "the user chose none"
        finally:
            attachment.undo()

    def test_9_a_saved_name_that_is_gone_stays_saved(self, standin, place, caplog):
        standin.system.spfilename = "gone.zip"
        attachment = koboldai.attach(standin)
        standin.load()
        assert standin.shown == ("", 0) and "gone.zip" in caplog.text
        assert "gone.zip" in attachment.session.status()["notice"]
        assert json.loads(standin.system.to_json())["spfilename"] == "gone.zip"
        attachment.undo()
        assert json.loads(standin.system.to_json())["spfilename"] == ""

    @pytest.mark.parametrize("meta", [None, {}, "[1, 2]", '"text"', "null", '{"name": [1]}'], ids=str)
    def test_10_and_11_metadata_missing_or_of_the_wrong_type(self, host, place, meta):
        write_zip(place / "softprompts" / "odd.zip", np.zeros((3, 32), np.float32), meta)
        host.session.refresh()
        host["refresh"]()
        host.load()
        assert "noir.zip" in [name for name, _ in host.system.splist]
        assert all(isinstance(text, str) for _, texts in host.system.splist for text in texts)
        status, answer = host.ask("get", "config/soft_prompts_list")
        assert status == 200 and {"value": "noir.zip"} in answer["values"]
        assert host.ask("put", "config/soft_prompt", value="odd.zip")[0] in (200, 422)

    def test_12_a_bomb_is_listed_with_the_reason_and_never_opened(self, host, place):
        bomb = json.dumps({"name": "Bomb", "description": "x" * 30_000_000})
        write_zip(place / "softprompts" / "bomb.zip", np.zeros((3, 32), np.float32), bomb)
        host.session.refresh()
        label, why = dict(host.system.splist)["bomb.zip"]
        assert "meta.json" in why and len(label) + len(why) < 1000
        assert host["valid_softprompt"]("./softprompts/bomb.zip") is False

    def test_13_no_name_leads_out_of_the_folder(self, host, place):
        softprompt(9, name="Evil", description="").save(place / "evil.zip")
        for name in ("../evil.zip", str(place / "evil.zip"), "..\\evil.zip"):
            assert host.ask("put", "config/soft_prompt", value=name)[0] == 422
            with pytest.raises(ValueError, match="folder"):
                host["spRequest"](name)
        assert host["valid_softprompt"]("./softprompts/../evil.zip") is False
        assert host["get_softprompt_desc"](str(place / "evil.zip"), None, True) == [None, None]
        assert host.shown == ("", 0)

    def test_14_nothing_private_of_numpy_is_used(self, host, monkeypatch):
        monkeypatch.delattr(np.lib.format, "_read_array_header", raising=False)
        host.session.refresh()
        assert host.ask("put", "config/soft_prompt", value="noir.zip")[0] == 200
        assert len(host.ask("get", "config/soft_prompts_list")[1]["values"]) == 2

    def test_15_a_blank_name_unloads(self, host):
        host["spRequest"]("noir.zip")
        assert host.ask("put", "config/soft_prompt", value="  ")[0] == 200
        assert host.shown == ("", 0)

    def test_17_text_of_a_file_is_escaped_where_the_old_page_inserts_it_as_html(self, host, place):
        softprompt(5, name=EVIL, author=EVIL, description=EVIL).save(place / "softprompts" / "<i>.zip")
        host["spRequest"]("<i>.zip")
        assert "<" not in host.system.spmeta["name"]
        while not host["queue"].empty():
            host["queue"].get()
        shown = {host.system.spfilename: host.system.spmeta}
        host["emit"]("from_server", {"cmd": "spstatitems", "data": shown}, room="UI_1")  # the host's greeting
        (filename, meta) = next(iter(host["queue"].get()[1]["data"].items()))
        assert "<" not in filename + meta["name"]


class TestBackends:
    @pytest.mark.parametrize("backend", ["Read Only", "KoboldCPP"])
    def test_one_that_takes_none_says_why(self, host, backend):
        host.load(backend, None)
        assert {entry.reason for entry in host.session.entries()} == {REFUSALS[backend]}
        assert host.ask("get", "config/soft_prompts_list")[1] == {"values": []}
        assert all(label.endswith(f"({REFUSALS[backend]})") for _, (label, _) in host.system.splist)
        with pytest.raises(ValueError, match=REFUSALS[backend]):
            host["spRequest"]("noir.zip")

    def test_one_that_cannot_be_loaded_says_so(self, host):
        host["spRequest"]("noir.zip")
        with pytest.raises(OSError):
            host.load(name="absent")
        assert host.shown == ("", 0) and host.system.allowsp is False
        assert {entry.reason for entry in host.session.entries()} == {"this model could not be loaded"}
        host.load()
        assert host.shown == ("noir.zip", 4)

    def test_a_load_that_ends_in_the_middle_of_another_tells_nothing(self, host, monkeypatch):
        """The host begins its first load by itself, and a user who is quick loads another model meanwhile."""
        host.session.use(None)  # nothing is loaded yet
        first_may_end, told = threading.Event(), []
        monkeypatch.setattr(host["model_backends"]["Read Only"], "_load", lambda: first_may_end.wait(20))
        first = threading.Thread(target=host["load_model"], args=("Read Only",))
        second = host["model_backends"]["Huggingface"]
        its_own = second._load

        def load_meanwhile():
            first_may_end.set()
            first.join(20)
            told.append(host.session.status()["model"])
            its_own()

        monkeypatch.setattr(second, "_load", load_meanwhile)
        first.start()
        host.load()
        assert told == [""], "the first one's end is no news: what is loaded is not there yet"
        assert host.system.allowsp is True
        assert host.ask("put", "config/soft_prompt", value="noir.zip")[0] == 200

    def test_a_page_that_is_told_of_a_model_may_select_at_once(self, host):
        """The host's variables are set before any page hears of the change."""
        told = []
        changed = host.menu._changed.set
        host.menu._changed.set = lambda: (told.append((host.session.takes_softprompts, host.system.allowsp)), changed())
        host.load("Read Only", None)
        host.load()
        assert told and all(takes == allowed for takes, allowed in told)

    def test_one_that_the_host_serves_itself_stays_the_hosts(self, host):
        host.load("Huggingface MTJ", None)
        assert host.system.allowsp is True and host.session.engine is None
        host["spRequest"]("noir.zip")
        assert len(host.system.sp) == 4 and host.shown == ("noir.zip", 4)
        assert host["valid_softprompt"]("./softprompts/noir.zip"), "the host's own looks into the file"
        host.load()
        assert host.system.sp is None

    def test_everything_is_let_go_again(self, standin):
        before = standin.snapshot()
        attachment = koboldai.attach(standin)
        after = standin.snapshot()
        assert after != before
        attachment.undo()
        assert standin.snapshot() == before

    def test_undo_gives_the_model_to_the_host(self, standin, texts):
        attachment = koboldai.attach(standin)
        standin.load()
        standin["spRequest"]("noir.zip")
        model = standin["model"].model
        attachment.undo()
        assert standin.shown == ("", 0) and "generate" not in vars(model)
        standin["spRequest"]("noir.zip")
        assert standin.text() == texts["noir.zip"]


class TestTraining:
    """The page's own "Create New Soft Prompt", which the host itself cannot serve."""

    @pytest.fixture
    def page(self, host, monkeypatch):
        """One page's socket, in the room of the new page: ``ask`` and ``hears``."""
        monkeypatch.setattr("kobold_sp_plugin.hosts.koboldai.training._NICENESS", 0)
        return TrainingPage(host)

    @pytest.fixture
    def form(self, place):
        """What the page sends, on a folder of texts."""
        words = ["door", "rain", "clock", "wall", "word", "stopped", "opened"]
        written = [f"The {a} {b} and the {c}; nobody said a {a}." for a in words for b in words for c in words[:1]]
        (place / "texts").mkdir()
        (place / "texts" / "a.txt").write_text("<|endoftext|>".join(written), encoding="utf-8")
        form = {"sp_title": "Rain <b>", "sp_prompt": "@The door opened", "sp_dataset": "texts"}
        return {**form, "sp_author": "Ada", "sp_description": "Wet."}

    @pytest.mark.timeout(300)  # another Python starts, and imports all that training needs
    def test_it_ends_in_the_menu(self, host, page, place, texts, form):
        page.ask(form)
        assert page.hears("running")["name"] == "Rain <b>"
        assert host.text() == texts[""], "the host's model goes on serving"
        page.ask(form)
        assert "only one at a time" in page.notice()
        assert TrainingPage(host).told()["state"] == "running", "a page that is loaded anew is told"
        assert "helps" in page.hears("done", seconds=240)["message"]
        assert page.told()["step"] == page.told()["steps"] > 5 and page.told()["held_out"] < 6
        entry = next(each for each in host.session.status()["entries"] if each["name"] == "Rain <b>")
        assert (entry["author"], entry["description"], entry["usable"]) == ("Ada", "Wet.", True)
        assert "fingerprint matches" in entry["reason"]
        made = SoftPrompt.load(place / "softprompts" / entry["filename"])
        settings = made.metadata[OWN_KEY]["training"]["settings"]
        assert settings["initial_text"] == "@The door opened", "a text, whatever it begins with"
        assert (place / "training" / "Rain -b" / "report.html").is_file()
        host["spRequest"](entry["filename"])
        assert host.text() != texts[""]

    @pytest.mark.slow
    @pytest.mark.timeout(400)
    def test_it_can_be_cancelled_and_gone_on_with(self, host, page, place, form):
        file = place / "texts" / "a.txt"
        file.write_text("<|endoftext|>".join([file.read_text(encoding="utf-8")] * 40), encoding="utf-8")
        page.ask(form)
        page.hears("running", lambda status: status.get("step", 0) >= 1 and "loss" in status, seconds=120)
        page.emit("softprompt_training_cancel")
        assert "Saved at step" in page.hears("cancelled", seconds=60)["message"]
        assert not list(place.glob("softprompts/Rain*"))
        page.ask(form)
        page.hears("running", lambda status: "Going on from step" in status["message"], seconds=180)
        page.emit("softprompt_training_cancel")
        page.hears("cancelled", seconds=60)

    @pytest.mark.parametrize(
        "form, reason",
        [
            ({"sp_title": "", "sp_dataset": "texts"}, "title is missing"),
            ({"sp_title": "Rain", "sp_dataset": " "}, "dataset is missing"),
            (None, "title is missing"),
            ({"sp_title": "Rain", "sp_dataset": "absent"}, "There is no file or folder"),
        ],
        ids=["title", "dataset", "no form", "no folder"],
    )
    @pytest.mark.timeout(120)
    def test_what_is_wrong_is_said_in_the_page(self, host, page, form, reason):
        page.ask(form)
        assert reason in page.hears("failed", seconds=100)["message"]

    def test_without_a_model_that_learns_it_says_why(self, host, page):
        host.load("KoboldCPP", None)
        page.ask({"sp_title": "Rain", "sp_dataset": "texts"})
        assert REFUSALS["KoboldCPP"] in page.hears("failed")["message"]

    def test_a_process_that_dies_says_so(self, host, page, monkeypatch):
        from kobold_sp_plugin.hosts.koboldai import training

        monkeypatch.setattr(training.sys, "executable", "/bin/false")
        page.ask({"sp_title": "Rain", "sp_dataset": "texts"})
        assert "ended by itself (exit status 1)" in page.hears("failed")["message"]
        page.ask({"sp_title": "", "sp_dataset": "texts"})  # and another may begin
        page.hears("failed", lambda status: "title" in status["message"])


class TrainingPage:
    def __init__(self, host):
        self._client = host["socketio"].test_client(host["app"], query_string="?ui=2")
        self._heard = []

    def emit(self, event, payload=""):
        self._client.emit(event, payload)

    def ask(self, form):
        self._hear()
        self._heard.clear()
        self.emit("create_new_softprompt", form)

    def _hear(self):
        self._heard += [
            (each["name"], each["args"][0] if each["args"] else None) for each in self._client.get_received()
        ]
        return self._heard

    def told(self):
        return [payload for name, payload in self._hear() if name == "softprompt_training"][-1]

    def notice(self):
        return next(payload["text"] for name, payload in self._hear() if name == "show_error_notification")

    def hears(self, state, when=lambda status: True, seconds=30):
        def found():
            told = [payload for name, payload in self._hear() if name == "softprompt_training"]
            return [status for status in told if status["state"] == state and when(status)]

        eventually(found, seconds)
        return found()[-1]


@pytest.mark.parametrize("seam", [seam.name for seam in UNITED if "." not in seam.name and seam.kind == "function"])
def test_what_a_host_lacks_is_named_and_nothing_is_changed(standin, seam):
    del standin[seam]
    before = standin.snapshot()
    with pytest.raises(HostError, match=seam):
        koboldai.attach(standin)
    assert standin.snapshot() == before


def absent(module):
    """A module of ours cannot be imported; the hook's are imported anew, as at a start."""

    def inject(monkeypatch, host):
        for name in ("attachment", "client", "united"):
            known = importlib.import_module(f"kobold_sp_plugin.hosts.koboldai.{name}")
            monkeypatch.delitem(sys.modules, known.__name__)
            monkeypatch.setattr(koboldai, name, known)
        monkeypatch.setitem(sys.modules, module, None)

    return inject


def failing(path):
    """A function of ours raises what nobody expects."""

    def inject(monkeypatch, host):
        def fail(*args, **kwargs):
            raise RuntimeError("injected")

        monkeypatch.setattr(path, fail)

    return inject


UNITED_CLASS = "kobold_sp_plugin.hosts.koboldai.united.United"
FAULTS = {
    # The host is another: it is left alone.
    "no settingschanged": lambda monkeypatch, host: host.pop("settingschanged"),
    "another calcsubmit": lambda monkeypatch, host: host.update(calcsubmit=lambda txt, gen_mode=0, x=0: "text"),
    "no spmeta": lambda monkeypatch, host: delattr(host.system, "spmeta"),
    "no event load_softprompt": lambda monkeypatch, host: host["socketio"].server.handlers["/"].pop("load_softprompt"),
    "no backends": lambda monkeypatch, host: host.update(model_backends={}),
    # Ours cannot start.
    "our session is gone": absent("kobold_sp_plugin.session"),
    "our menu is gone": absent("kobold_sp_plugin.menu"),
    "our united is gone": absent("kobold_sp_plugin.hosts.koboldai.united"),
    "no watcher can be started": failing("kobold_sp_plugin.session.Session.watch"),
    "no relay can be started": failing("flask_socketio.SocketIO.start_background_task"),
    "a seam cannot be patched": failing("kobold_sp_plugin.hosts.koboldai.attachment.patch"),
    "a backend cannot be patched": failing("kobold_sp_plugin.hosts.koboldai.united.patch"),
    # An adapter fails while the host runs.
    "the old model is not let go": failing(f"{UNITED_CLASS}._let_go"),
    "the new model is not taken in": failing(f"{UNITED_CLASS}._loaded"),
    "our engine is gone": absent("kobold_sp_plugin.engines.transformers"),
    "the model is not attached": failing("kobold_sp_plugin.engines.transformers.attach"),
    "nothing can be selected": failing("kobold_sp_plugin.session.Session.select"),
    "nothing can be listed": failing("kobold_sp_plugin.session.Session.refresh"),
    "no status": failing(f"{UNITED_CLASS}._entry"),
    "no budget can be shown": failing(f"{UNITED_CLASS}._generation"),
    "no turn can be had": failing("kobold_sp_plugin.engines.transformers.TransformersEngine.override"),
    "nothing can be sent": failing(f"{UNITED_CLASS}._send_all"),
    "no client is greeted": failing("kobold_sp_plugin.menu.Menu.connected"),
    "no message is understood": failing("kobold_sp_plugin.menu.Menu.message"),
    "no list can be asked for": failing("kobold_sp_plugin.menu.Menu.sp_list_refresh"),
    "the status line fails": failing("kobold_sp_plugin.menu.Menu.status_line"),
    "no script for the page": failing("pathlib.Path.read_text"),
    "no training can be asked for": failing(f"{UNITED_CLASS}._model_to_train"),
}


def use(host):
    """All that the hook takes part in, as the host does it; what it writes with nothing selected."""
    host.load()
    handlers = host["socketio"].server.handlers["/"]
    client = host["socketio"].test_client(host["app"], query_string="?ui=2")
    client.disconnect()
    for event, payload in (
        ("load_softprompt", ""),
        ("sp_list_refresh", ""),
        ("load_softprompt_list", ""),
        ("message", {"cmd": "splistrequest", "data": ""}),
        ("message", {"cmd": "spselect", "data": ""}),
        ("message", {"cmd": "sprequest", "data": ""}),
        ("create_new_softprompt", {"sp_title": "Rain", "sp_dataset": ""}),
    ):
        if event in handlers:
            with host["app"].test_request_context(), contextlib.suppress(Exception):
                handlers[event]("a client", payload)
    host["spRequest"]("")
    host["fileops"].getspfiles(32)
    host["refresh"]()
    host["loadJSON"]({"prompt": ""})
    host.system.to_json()
    host["emit"]("from_server", {"cmd": "spstatitems", "data": {}}, room="UI_1")
    assert "the old page" in host["app"].view_functions["index"]()
    assert "the new page" in host["app"].view_functions["new_ui_index"]()
    return host.text(), host["model"].raw_generate(PROMPT, 3), host["calcsubmit"](PROMPT)


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_of_ours_fails_the_host_works_and_one_line_says_why(fault, models, place, monkeypatch, caplog):
    own = Embedding.__dict__.get("__call__")
    expected = use(Standin(models))
    if own is None:
        del Embedding.__call__
    host = Standin(models)
    FAULTS[fault](monkeypatch, host)
    if fault == "another calcsubmit":
        expected = ("text", expected[1], "text")
    if fault == "no backends":
        host["model_backends"] = {}
    before = host.snapshot()
    caplog.set_level(logging.INFO)
    attachment = koboldai.attach_or_say_why_not(host)
    try:
        if fault == "no backends":
            host["model_backends"] = Standin(models)["model_backends"]
            assert attachment is None
        elif fault == "no spmeta":
            assert attachment is None
        else:
            assert use(host) == expected
            assert host.snapshot() == before, "it has left the host"
    finally:
        if attachment is not None:
            attachment.undo()
    why = [line for line in caplog.messages if "of this host: " in line or "leaves this host: " in line]
    assert len(why) == 1, caplog.messages


def test_each_method_of_the_second_table_is_one_of_a_backends():
    base = {name for each in BACKEND for name in [each.name]}
    assert base == {"unload", "core_generate", "raw_generate", "_raw_generate", "patch_embedding"}


class Host:
    """The stand-in as a process of its own, under eventlet, as KoboldAI runs."""

    def __init__(self, place, models, backend="Huggingface", armed=True, **environment):
        self.place, self.models = place, models
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        start = place / "start"
        start.mkdir(exist_ok=True)
        lines = ["import signal, site", f"signal.alarm({4 * START_SECONDS})"]
        if armed:  # the folder of the hook's files becomes one in which `.pth` files count
            lines.append(f"site.addsitedir({str(HOOK)!r})")
        (start / "sitecustomize.py").write_text("\n".join(lines))
        self.log = place / "log.txt"
        more = {
            "PYTHONPATH": f"{start}{os.pathsep}{REPOSITORY}",
            "OMP_NUM_THREADS": "1",
            "EVENTLET_THREADPOOL_SIZE": "1",
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(STANDIN), str(self.port), backend, str(models / "first")],
                cwd=place,
                env={**os.environ, **environment, **more},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + START_SECONDS
        while not self._listens():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def _listens(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(10)

    def ask(self, method, route, **body):
        url, headers = f"http://127.0.0.1:{self.port}/api/v1/{route}", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


class Page:
    """The socket of one of the host's two pages."""

    def __init__(self, host, ui):
        import socketio

        self.heard = []
        self._news = threading.Condition()
        self._socket = socketio.Client(reconnection=False, handle_sigint=False)
        self._socket.on("*", self._hear)
        self._socket.connect(f"http://127.0.0.1:{host.port}?ui={ui}", transports=["websocket"], wait_timeout=20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.eio.disconnect()  # the one that waits for its threads

    def _hear(self, event, payload):
        with self._news:
            self.heard.append((event, payload))
            self._news.notify_all()

    def emit(self, event, payload=""):
        """Send; what was heard before it is forgotten."""
        with self._news:
            self.heard.clear()
        self._socket.emit(event, payload)

    def hears(self, event, seconds=20, when=lambda payload: True):
        def found():
            return [payload for name, payload in self.heard if name == event and when(payload)]

        with self._news:
            assert self._news.wait_for(found, seconds), f"no {event}, but {self.heard}"
            return found()[0]

    def variable(self, name, when=lambda value: True):
        return self.hears("var_changed", when=lambda each: each["name"] == name and when(each["value"]))["value"]

    def command(self, name, when=lambda data: True):
        return self.hears("from_server", when=lambda each: each["cmd"] == name and when(each["data"]))["data"]


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("eventlet", "flask_session")),
    reason="KoboldAI's libraries (eventlet, flask_session) are not installed",
)
class TestUnderEventlet:
    @pytest.fixture(scope="class")
    def running(self, models, tmp_path_factory):
        place = tmp_path_factory.mktemp("armed")
        (place / "softprompts").mkdir()
        for seed, name, n_tokens in ((1, "noir", 4), (2, "space", 6)):
            softprompt(seed, n_tokens, name=name.title(), author="A", description="Rain.").save(
                place / "softprompts" / f"{name}.zip"
            )
        softprompt(3, width=64).save(place / "softprompts" / "wide.zip")
        with Host(place, models) as host:
            yield host

    @pytest.fixture
    def pages(self, running):
        with Page(running, 2) as new, Page(running, 1) as old:
            yield new, old
            running.ask("PUT", "config/soft_prompt", value="")

    def test_a_new_page_is_told_everything_in_an_order_that_it_can_show(self, running, pages):
        running.ask("PUT", "config/soft_prompt", value="noir.zip")
        with Page(running, 2) as page:
            assert page.hears("softprompts")["selection"] == ["noir.zip"]
            page.variable("sp_length", when=lambda value: value == 4)
            names = [payload["name"] for event, payload in page.heard if event == "var_changed"]
            assert names[-6:] == ["allowsp", "splist", "spfilename", "spname", "spmeta", "sp_length"]
        with Page(running, 1) as page:
            assert list(page.command("spstatitems", when=bool)) == ["noir.zip"] and page.command("allowsp") is True
            assert not any(event == "var_changed" for event, _ in page.heard)

    def test_the_new_pages_events(self, running, pages):
        new, old = pages
        new.emit("load_softprompt", "noir.zip")
        assert new.variable("spfilename") == "noir.zip" and new.variable("spname") == "Noir"
        assert new.variable("sp_length") == 4
        assert old.command("spstatitems", when=bool)["noir.zip"]["n_tokens"] == 4
        assert soft_of(new.variable("context", when=soft_of))[0]["tokens"] == [[-1, ""]] * 4
        new.emit("load_softprompt", "wide.zip")
        assert "made for 64 columns, this model has 32" in new.hears("error")
        assert new.variable("spfilename") == "noir.zip", "its list goes back"
        new.emit("sp_list_refresh")
        listed = new.variable("splist")
        assert [name for name, _ in listed] == ["noir.zip", "space.zip", "wide.zip"]
        assert listed[2][1][0] == "wide (made for 64 columns, this model has 32)"
        new.emit("load_softprompt_list")
        assert [row[1] for row in new.hears("popup_items")["items"]] == ["noir.zip", "space.zip"]
        new.emit("load_softprompt", "")
        assert new.variable("spfilename") == "" and new.variable("spname") == "Not in Use"

    def test_the_old_pages_commands(self, running, pages):
        _, old = pages
        old.emit("message", {"cmd": "splistrequest", "data": ""})
        rows = old.command("buildsp")
        assert [row["filename"] for row in rows] == ["noir.zip", "space.zip", "wide.zip"]
        assert rows[2]["description"].startswith("Cannot be used: made for 64 columns")
        old.emit("message", {"cmd": "submit", "data": PROMPT})
        without = old.command("updatescreen")
        old.emit("message", {"cmd": "spselect", "data": "space.zip"})
        old.emit("message", {"cmd": "sprequest", "data": ""})
        old.command("spstatitems", when=bool)
        old.emit("message", {"cmd": "submit", "data": PROMPT})
        assert old.command("updatescreen") != without
        old.emit("message", {"cmd": "spselect", "data": "wide.zip"})
        old.emit("message", {"cmd": "sprequest", "data": ""})
        assert "made for 64 columns" in old.command("errmsg")

    def test_a_dropped_file_reaches_both_pages(self, running, pages):
        new, old = pages
        new.emit("nothing in particular")
        old.emit("nothing in particular")
        file = running.place / "softprompts" / "dropped.zip"
        softprompt(4, name="Dropped").save(file)
        assert "dropped.zip" in dict(new.variable("splist"))
        old.hears("softprompts", when=lambda status: "dropped.zip" in str(status["entries"]))
        new.emit("load_softprompt", "dropped.zip")
        new.variable("spfilename", when=lambda name: name == "dropped.zip")
        file.unlink()
        assert new.variable("spfilename", when=lambda name: name == "") == ""
        assert "dropped.zip" in new.hears("show_error_notification")["text"]

    def test_another_model_or_backend_is_told_without_a_reload(self, running, pages):
        new, old = pages
        new.emit("load_softprompt", "noir.zip")
        new.variable("sp_length")
        for backend, name, usable in (
            ("Read Only", "", 0),
            ("Huggingface", "second", 2),
            ("KoboldCPP", "", 0),
            ("Basic Huggingface", "narrow", 0),
            ("Huggingface", "first", 2),
        ):
            old.emit("nothing in particular")
            new.emit("load_model", {"plugin": backend, "path": str(running.models / name) if name else ""})
            new.hears("loaded")
            told = {each["name"]: each["value"] for event, each in new.heard if event == "var_changed"}
            assert told["allowsp"] is bool(name)
            assert [label.endswith(")") for _, (label, _) in told["splist"]] == [False] * usable + [True] * (3 - usable)
            assert old.command("allowsp", when=bool), "the list says why"
            new.emit("load_story", {"prompt": PROMPT})
            new.variable("splist")
        assert running.ask("GET", "config/soft_prompt") == (200, {"value": "noir.zip"})

    def test_a_start_restores_the_choice_and_without_us_the_host_reads_its_settings(self, models, place):
        with Host(place, models) as host:
            assert host.ask("PUT", "config/soft_prompt", value="noir.zip")[0] == 200
            text = host.ask("POST", "generate", prompt=PROMPT)
        with Host(place, models) as host:
            assert host.ask("GET", "config/soft_prompt") == (200, {"value": "noir.zip"})
            assert host.ask("POST", "generate", prompt=PROMPT) == text
        with Host(place, models, armed=False) as host:
            assert host.ask("GET", "config/soft_prompts_list")[0] == 200
            assert host.ask("POST", "generate", prompt=PROMPT)[0] == 200

    def test_a_host_that_lacks_a_seam_starts_untouched(self, models, place):
        with Host(place, models, STANDIN_LACKS="calcsubmit") as host:
            assert host.ask("GET", "config/soft_prompts_list")[0] == 200
            lines = [line for line in host.log.read_text().splitlines() if "kobold_sp_plugin" in line]
        assert len(lines) == 1 and "there is no global named 'calcsubmit'" in lines[0]
