"""The hook in a stand-in host that runs as its own process, and our side of its seams in this one."""

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from flask import Flask
from flask_socketio import SocketIO
from models import tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.errors import HostError
from kobold_sp_plugin.hosts import koboldai
from kobold_sp_plugin.hosts.koboldai import attachment
from kobold_sp_plugin.hosts.koboldai.client import REFUSALS, TPU

REPOSITORY = Path(koboldai.__file__).resolve().parents[3]
HOOK = REPOSITORY / "hooks" / "koboldai"
STANDIN = Path(__file__).resolve().parent / "standin_koboldai" / "aiserver.py"
PROMPT = "The door opened and the rain came in."
START_SECONDS = 50

needs_the_hosts_libraries = pytest.mark.skipif(
    not all(find_spec(name) for name in ("eventlet", "flask_session")),
    reason="KoboldAI's libraries (eventlet, flask_session) are not installed",
)


def softprompt(seed, n_tokens=4, width=32, **metadata):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, width)).astype(np.float32)
    return SoftPrompt(rows, metadata)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model whose loader patches before it binds `generator`, one the other way round, a narrow one."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in {
        "first": tiny_model("gptj"),
        "second": tiny_model("gpt2"),
        "narrow": tiny_model("gpt2", n_embd=16),
    }.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def make_place(place):
    """The folder that a host runs in."""
    (place / "softprompts").mkdir()
    softprompt(1, name="Noir", author="A", description="Rain.").save(place / "softprompts" / "noir.zip")
    softprompt(2, n_tokens=6, name="Space").save(place / "softprompts" / "space.zip")
    softprompt(3, width=64).save(place / "softprompts" / "wide.zip")
    return place


class Host:
    """The stand-in host, running."""

    def __init__(self, place, model, armed=True, **environment):
        self.place = place
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        start = place / "start"
        start.mkdir()
        lines = ["import signal, site, sys", f"signal.alarm({4 * START_SECONDS})"]
        if armed:  # the folder of the hook's files becomes one in which `.pth` files count
            lines.append(f"site.addsitedir({str(HOOK)!r})")
            lines.append("ours = lambda: sys.modules['kobold_sp_koboldai'].waiting.hook")
            lines.append("signal.signal(signal.SIGUSR1, lambda *_: ours().undo())")
        (start / "sitecustomize.py").write_text("\n".join(lines))
        self.log = place / "log.txt"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(STANDIN), str(self.port), str(model)],
                cwd=place,
                env={
                    **os.environ,
                    **environment,
                    "PYTHONPATH": f"{start}{os.pathsep}{REPOSITORY}",
                    "OMP_NUM_THREADS": "1",
                    "EVENTLET_THREADPOOL_SIZE": "1",
                },
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

    def get(self, route):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{route}", timeout=20) as answer:
            return json.loads(answer.read())

    def post(self, route, method="POST", **body):
        url = f"http://127.0.0.1:{self.port}/api/v1/{route}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())


class Client:
    """A browser with the host's old page, as far as its socket goes."""

    def __init__(self, host):
        import socketio

        self._heard = []
        self._news = threading.Condition()
        self._socket = socketio.Client(reconnection=False, handle_sigint=False)
        self._socket.on("*", self._hear)
        self._socket.connect(f"http://127.0.0.1:{host.port}", transports=["websocket"], wait_timeout=20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.eio.disconnect()  # the one that waits for its threads

    def _hear(self, event, payload):
        with self._news:
            self._heard.append((event, payload))
            self._news.notify_all()

    def say(self, command, data=""):
        """Send a command; what was heard before it is forgotten."""
        with self._news:
            self._heard.clear()
        self._socket.emit("message", {"cmd": command, "data": data})

    def hears(self, command, seconds=20, when=lambda data: True):
        """The data of the first ``from_server`` of that command, or of our own event of that name."""

        def found():
            for event, payload in self._heard:
                name, data = (payload["cmd"], payload.get("data")) if event == "from_server" else (event, payload)
                if name == command and when(data):
                    return [data]
            return []

        with self._news:
            assert self._news.wait_for(found, seconds), f"no {command}, but {self._heard}"
            return found()[0]

    def choose(self, filename):
        """Pick a row of the menu and press its button."""
        self.say("spselect", filename)
        self.say("sprequest")

    def select(self, filename):
        """Choose what can be chosen, and wait until the status line shows it."""
        self.choose(filename)
        return self.hears("spstatitems", when=lambda data: list(data) == [filename] * bool(filename))

    def text(self, prompt=PROMPT):
        self.say("submit", prompt)
        return self.hears("updatescreen")


@pytest.fixture(scope="module")
def native(models, tmp_path_factory):
    """What the host writes when nobody has armed it: without a soft prompt, and with its own way of using one."""
    with Host(make_place(tmp_path_factory.mktemp("native")), models / "first", armed=False) as host, Client(
        host
    ) as client:
        texts = {"": client.text()}
        for filename in ("noir.zip", "space.zip"):
            client.choose(filename)
            texts[filename] = client.text()
    assert len(set(texts.values())) == 3
    return texts


@pytest.fixture(scope="module")
def host(models, tmp_path_factory):
    with Host(make_place(tmp_path_factory.mktemp("armed")), models / "first") as host:
        yield host


@pytest.fixture
def client(host):
    """Of a host with nothing selected."""
    with Client(host) as client:
        yield client
        client.choose("")
        client.text()


@needs_the_hosts_libraries
class TestArmedHost:
    def test_the_menu_lists_loads_and_unloads_and_the_text_changes(self, client, native):
        assert client.hears("allowsp") is True
        client.say("splistrequest")
        rows = client.hears("buildsp")
        assert [(row["filename"], row["name"], row["n_tokens"]) for row in rows] == [
            ("noir.zip", "Noir", 4),
            ("space.zip", "Space", 6),
            ("wide.zip", "wide", 4),
        ]
        assert rows[2]["description"] == "Cannot be used: made for 64 columns, this model has 32"
        assert client.text() == native[""]
        assert client.select("noir.zip")["noir.zip"]["n_tokens"] == 4
        assert client.text() == native["noir.zip"]
        client.select("space.zip")
        assert client.text() == native["space.zip"]
        client.select("")
        assert client.text() == native[""]

    def test_a_file_that_does_not_fit_is_refused_with_the_reason(self, client, native):
        client.select("noir.zip")
        client.choose("wide.zip")
        assert client.hears("errmsg") == "wide.zip: made for 64 columns, this model has 32"
        assert client.text() == native["noir.zip"]

    def test_a_new_client_sees_what_is_selected(self, client, host):
        client.select("noir.zip")
        with Client(host) as other:
            assert other.hears("softprompts")["selection"] == ["noir.zip"]
            assert list(other.hears("spstatitems")) == ["noir.zip"]

    def test_a_dropped_file_reaches_the_client(self, client, host):
        folder = host.place / "softprompts"
        client.say("show_nothing_in_particular")
        softprompt(4, name="Dropped").save(folder / "dropped.zip")
        (folder / "broken.zip").write_bytes(b"not a zip")
        started = time.monotonic()

        def has(status, *filenames):
            return {each["filename"] for each in status["entries"]} >= set(filenames)

        client.hears("softprompts", when=lambda status: has(status, "dropped.zip", "broken.zip"))
        assert time.monotonic() - started < 2
        client.say("splistrequest")
        rows = [row["filename"] for row in client.hears("buildsp")]
        assert rows == ["dropped.zip", "noir.zip", "space.zip", "broken.zip", "wide.zip"]
        client.select("dropped.zip")
        (folder / "dropped.zip").unlink()
        (folder / "broken.zip").unlink()
        assert client.hears("spstatitems", when=lambda data: data == {}) == {}

    def test_soft_tokens_count_in_the_hosts_own_budget(self, client):
        client.select("space.zip")
        assert client.text(PROMPT * 20)

    def test_the_hosts_own_callers_select_through_the_session(self, client, host, native):
        client.select("space.zip")
        answer = host.post("generate", prompt=PROMPT, soft_prompt="noir.zip")
        assert answer["results"][0]["text"] == native["noir.zip"]
        assert client.text() == native["space.zip"]
        assert json.loads((host.place / "settings.json").read_text()) == {"softprompt": "space.zip"}

    def test_its_http_api_lists_and_validates_as_the_menu_does(self, client, host):
        names = [each["value"] for each in host.get("config/soft_prompts_list")["values"]]
        assert names == ["noir.zip", "space.zip"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            host.post("config/soft_prompt", "PUT", value="wide.zip")
        assert refused.value.code == 422 and "made for 64 columns" in refused.value.read().decode()
        host.post("config/soft_prompt", "PUT", value="noir.zip")
        client.hears("spstatitems", when=lambda data: list(data) == ["noir.zip"])
        host.post("config/soft_prompt", "PUT", value="  ")
        client.hears("spstatitems", when=lambda data: data == {})

    def test_another_model_keeps_what_fits_it(self, client, host, models, native):
        client.say("load_model", str(models / "second"))
        client.hears("show_model_name")
        plain = client.text()
        client.select("noir.zip")
        changed = client.text()
        assert changed != plain
        client.say("load_model", str(models / "first"))
        client.hears("show_model_name")
        assert client.text() == native["noir.zip"], "it survives the host's emptying of every tensor"
        client.say("load_model", str(models / "second"))
        client.hears("show_model_name")
        assert client.text() == changed
        client.say("load_model", str(models / "narrow"))
        status = client.hears("softprompts", when=lambda status: status["model"] == "narrow")
        assert status["selection"] == [] and "noir.zip" in status["notice"]
        assert client.text()
        client.say("load_model", "ReadOnly")
        client.hears("softprompts", when=lambda status: status["model"] == "ReadOnly")
        client.say("splistrequest")
        assert {row["description"] for row in client.hears("buildsp")} == {"Cannot be used: no model is loaded"}
        client.say("load_model", str(models / "first"))
        client.hears("show_model_name")
        assert client.text() == native["noir.zip"], "the host's settings still name it"


@needs_the_hosts_libraries
def test_the_host_is_its_own_again_when_the_hook_is_undone(models, native, tmp_path):
    place = make_place(tmp_path)
    (place / "settings.json").write_text('{"softprompt": "noir.zip"}')
    with Host(place, models / "first") as host, Client(host) as client:
        assert client.text() == native["noir.zip"], "the host's settings name it"
        host.process.send_signal(signal.SIGUSR1)
        assert client.text() == native[""]
        client.say("splistrequest")
        rows = client.hears("buildsp")
        assert {row["filename"] for row in rows} == {"noir.zip", "space.zip"}
        assert rows[0].keys() == rows[1].keys() | {"author", "description"}, "as the host sends it"
        client.choose("noir.zip")
        assert client.text() == native["noir.zip"]
        assert "Traceback" not in host.log.read_text()


@needs_the_hosts_libraries
def test_a_host_that_lacks_a_seam_starts_untouched(models, native, tmp_path):
    with Host(make_place(tmp_path), models / "first", STANDIN_LACKS="spRequest") as host, Client(host) as client:
        assert client.text() == native[""]
        client.say("splistrequest")
        assert "Noir" in [row.get("name") for row in client.hears("buildsp")]
        lines = [line for line in host.log.read_text().splitlines() if "kobold_sp_plugin" in line]
    assert len(lines) == 1 and "there is no global named 'spRequest'" in lines[0]


class ValidationError(ValueError):
    """As marshmallow's."""


class Globals(dict):
    """The globals of a host in this process, with Flask-SocketIO in threading mode."""

    def __init__(self):
        app = Flask("host")
        app.add_url_rule("/", "index", lambda: "<html><body>the page</body></html>")
        socketio = SocketIO(app, async_mode="threading")
        socketio.on_event("connect", lambda: None)
        socketio.on_event("message", lambda message: None)
        self.saved, self.emitted = [], []

        class Variables:
            allowsp, sp, sp_length, spfilename, spmeta = False, None, 0, "", None
            model, aibusy, genseqs = "", False, ()

        def spRequest(filename):
            raise RuntimeError(filename)

        def patch_causallm(model):
            self.patched = model
            return model

        def load_model(model, then=lambda: None):
            self.update(model=model, generator=None, tokenizer=tiny_tokenizer())
            if model is None:
                return
            Variables.allowsp = True
            self["patch_causallm"](model)
            self["generator"] = model.generate
            then()

        def calcsubmit(txt):
            ids = tiny_tokenizer()(txt, return_tensors="pt")["input_ids"]
            self.meanwhile()
            return self["_generate"](ids).tolist()

        self.meanwhile = lambda: None
        fileops = types.ModuleType("fileops")
        fileops.getspfiles = lambda model_dimension: ["the host's own"]
        fileops.checksp = lambda filename, model_dimension: (1, None, None, None, None)
        super().__init__(
            app=app,
            fileops=fileops,
            emit=lambda *payload, **to: self.emitted.append(payload),
            calcsubmit=calcsubmit,
            _generate_text=lambda body: self["calcsubmit"](body.prompt),
            ValidationError=ValidationError,
            socketio=socketio,
            vars=Variables,
            spRequest=spRequest,
            patch_causallm=patch_causallm,
            load_model=load_model,
            _generate=lambda ids: self["generator"](ids, attention_mask=ids * 0 + 1, max_new_tokens=2, pad_token_id=0),
            settingschanged=lambda: self.saved.append(Variables.spfilename),
            getmodelname=lambda: "tiny",
        )

    def snapshot(self):
        kept = {name: value for name, value in self.items() if name not in ("model", "generator", "tokenizer")}
        handlers, views = self["socketio"].server.handlers["/"], self["app"].view_functions
        return kept, dict(handlers), dict(views), dict(vars(self["fileops"]))


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    monkeypatch.chdir(make_place(tmp_path))
    return Globals()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda host: host.pop("spRequest"), "there is no global named 'spRequest'"),
        (lambda host: host.pop("vars"), "there is no global named 'vars'"),
        (lambda host: host.pop("socketio"), "nothing handles the event 'message'"),
        (lambda host: delattr(host["vars"], "sp_length"), r"there is no vars\.sp_length"),
        (lambda host: host.update(load_model=None), "load_model is no function"),
        (lambda host: host.update(spRequest=lambda name, kind: None), r"spRequest takes \(name, kind\), not \(file"),
        (lambda host: host["socketio"].server.handlers["/"].pop("connect"), "nothing handles the event 'connect'"),
    ],
)
def test_what_a_host_lacks_is_named_and_nothing_is_changed(in_process, spoil, reason):
    spoil(in_process)
    before = dict(in_process)
    with pytest.raises(HostError, match=reason):
        koboldai.attach(in_process)
    assert in_process == before


def test_undo_leaves_globals_handlers_and_model_as_they_were(in_process):
    before = in_process.snapshot()
    model = tiny_model("gptj")
    attributes = set(vars(model)), set(vars(model.get_input_embeddings()))
    attachment = koboldai.attach(in_process)
    in_process["load_model"](model)
    in_process["spRequest"]("noir.zip")
    assert (in_process["vars"].spfilename, in_process["vars"].sp_length, in_process["vars"].sp) == ("noir.zip", 4, None)
    assert not hasattr(in_process, "patched")
    attachment.undo()
    assert in_process.snapshot() == before
    assert (set(vars(model)), set(vars(model.get_input_embeddings()))) == attributes
    assert in_process.patched is model and in_process["generator"] == model.generate
    assert (in_process["vars"].spfilename, in_process["vars"].sp_length) == ("", 0)


@pytest.fixture
def attached(in_process):
    attachment = koboldai.attach(in_process)
    in_process.session = attachment.session
    yield in_process
    attachment.undo()


def test_a_setting_that_names_a_missing_file_does_not_stop_the_loader(attached, caplog):
    attached["load_model"](tiny_model("gptj"), then=lambda: attached["spRequest"]("gone.zip"))
    assert "gone.zip" in caplog.text and attached["vars"].allowsp and attached.saved == []
    with pytest.raises(ValidationError, match=r"gone\.zip"):
        attached["spRequest"]("gone.zip")


def test_a_model_without_embedding_is_loaded_without_soft_prompts(attached, caplog):
    model = tiny_model("gptj")
    model.set_input_embeddings(None)
    attached["load_model"](model)
    assert attached["model"] is model and attached["vars"].allowsp is False
    assert "gets no soft prompts" in caplog.text


def test_without_a_model_of_ours_the_hosts_own_code_runs(attached):
    with pytest.raises(RuntimeError, match="noir"):
        attached["spRequest"]("noir.zip")


def test_what_the_host_had_selected_for_another_backend_is_let_go(attached):
    attached["vars"].sp, attached["vars"].sp_length, attached["vars"].spfilename = object(), 9, "other.zip"
    attached["load_model"](tiny_model("gptj"))
    assert (attached["vars"].sp, attached["vars"].sp_length, attached["vars"].spfilename) == (None, 0, "")


def test_nothing_is_measured_while_the_host_loads(attached):
    first, second = tiny_model("gptj"), tiny_model("gpt2")
    attached["load_model"](first)
    attached["spRequest"]("noir.zip")
    effects = []

    def while_it_loads():
        time.sleep(0.3)
        effects.append(attached.session.effect)

    attached["load_model"](second, then=while_it_loads)
    assert attached.session.selection == ("noir.zip",) and effects == [None]
    end = time.monotonic() + 10
    while attached.session.effect is None:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_generation_waits_while_the_effect_is_measured(attached):
    model = tiny_model("gptj")
    attached["load_model"](model)
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    generation = threading.Thread(target=attached["_generate"], args=(ids,))
    with attached.session.engine.lock:  # as a measurement holds it
        generation.start()
        generation.join(0.2)
        assert generation.is_alive()
    generation.join(20)
    assert not generation.is_alive()


def test_text_of_a_file_is_escaped_for_the_hosts_page(attached, tmp_path):
    softprompt(5, name="<b>").save(tmp_path / "softprompts" / "<i>.zip")
    attached["load_model"](tiny_model("gptj"))
    attached["spRequest"]("<i>.zip ")
    assert attached["vars"].spmeta["name"] == "&lt;b&gt;"
    assert attached.saved == ["<i>.zip"]
    shown = {attached["vars"].spfilename: attached["vars"].spmeta}
    attached["emit"]("from_server", {"cmd": "spstatitems", "data": shown})  # the host's greeting
    assert list(attached.emitted[-1][1]["data"]) == ["&lt;i&gt;.zip"]


def test_the_hosts_list_and_validator_say_what_the_menu_says(attached, tmp_path):
    fileops = attached["fileops"]
    assert fileops.getspfiles(32) == ["the host's own"], "no model of ours"
    attached["load_model"](tiny_model("gptj"))
    rows = np.full((3, 32), 1e39)  # more than float32 can hold
    np.save(tmp_path / "softprompts" / "large.npy", rows)
    assert [(each["filename"], each["n_tokens"]) for each in fileops.getspfiles(32)][:2] == [
        ("large.npy", 3),
        ("noir.zip", 4),
    ]
    file, *_, shape, _, _ = fileops.checksp("noir.zip", 32)
    file.close()
    assert shape == (4, 32)
    for filename, why in {
        "wide.zip": "made for 64 columns",
        "gone.zip": "no soft prompt named",
        "../noir.zip": "leads out of the folder",
        "large.npy": "finite",
    }.items():
        with pytest.raises(ValidationError, match=why):
            fileops.checksp(filename, 32)


@pytest.fixture
def texts(attached):
    """What the attached host writes with each soft prompt selected."""
    attached["load_model"](tiny_model("gptj"))
    texts = {}
    for filename in ("noir.zip", "space.zip", ""):
        attached["spRequest"](filename)
        texts[filename] = attached["calcsubmit"](PROMPT)
    return texts


def test_a_generation_keeps_what_its_budget_was_counted_with(attached, texts):
    seen = []

    def meanwhile():
        attached["spRequest"]("noir.zip")
        seen.append((attached["vars"].spfilename, attached["vars"].sp_length))

    attached["spRequest"]("space.zip")
    attached.meanwhile = meanwhile
    assert attached["calcsubmit"](PROMPT) == texts["space.zip"]
    assert seen == [("noir.zip", 6)] and attached["vars"].sp_length == 4


def test_a_request_reads_its_own_soft_prompt_and_touches_nobodys(attached, texts):
    attached["spRequest"]("space.zip")
    saved = list(attached.saved)
    lengths = []
    attached.meanwhile = lambda: lengths.append(attached["vars"].sp_length)
    for filename, text in (("noir.zip", texts["noir.zip"]), (" ", texts[""]), (None, texts["space.zip"])):
        body = types.SimpleNamespace(prompt=PROMPT, soft_prompt=filename)
        assert attached["_generate_text"](body) == text
    assert lengths == [4, 0, 6]
    assert attached.session.selection == ("space.zip",) and attached.saved == saved
    attached.meanwhile = lambda: attached["spRequest"]("noir.zip")
    assert attached["_generate_text"](types.SimpleNamespace(prompt=PROMPT, soft_prompt="")) == texts[""]
    assert attached.session.selection == ("noir.zip",), "the user's choice outlives the request"


def test_a_request_that_fails_leaves_everything_as_it_was(attached, texts):
    attached["spRequest"]("space.zip")
    with pytest.raises(ValidationError, match="no soft prompt named"):
        attached["_generate_text"](types.SimpleNamespace(prompt=PROMPT, soft_prompt="gone.zip"))
    attached.meanwhile = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        attached["_generate_text"](types.SimpleNamespace(prompt=PROMPT, soft_prompt="noir.zip"))
    assert (attached["vars"].spfilename, attached["vars"].sp_length) == ("space.zip", 6)
    attached.meanwhile = lambda: None
    assert attached["calcsubmit"](PROMPT) == texts["space.zip"], "the host's own error is no reason to leave it"


def test_a_request_that_the_host_will_refuse_changes_nothing_for_the_one_under_way(attached, texts):
    body = types.SimpleNamespace(prompt=PROMPT, soft_prompt="noir.zip")
    attached["vars"].aibusy = True
    attached["_generate_text"](body)
    assert body.soft_prompt == "noir.zip"


@pytest.mark.parametrize("backend", sorted(REFUSALS))
def test_a_backend_that_takes_none_says_why(attached, backend):
    attached["vars"].model = backend
    attached["load_model"](None)
    assert {entry.reason for entry in attached.session.entries()} == {REFUSALS[backend]}
    assert attached["vars"].allowsp is False and attached["fileops"].getspfiles(-1) == []
    with pytest.raises(ValidationError, match=REFUSALS[backend]):
        attached["spRequest"]("noir.zip")
    attached["spRequest"](" ")


def test_a_backend_of_the_hosts_own_kind_stays_the_hosts(attached):
    attached["vars"].model = TPU[0]
    attached["load_model"](None)
    assert attached.session.engine is None and attached["fileops"].getspfiles(32) == ["the host's own"]
    attached["vars"].sp_length = 9  # the host has selected
    attached.meanwhile = lambda: lengths.append(attached["vars"].sp_length)
    attached["generator"], lengths = lambda ids, **settings: ids, []
    attached["calcsubmit"](PROMPT)
    attached["_generate_text"](types.SimpleNamespace(prompt=PROMPT, soft_prompt="x.zip"))
    assert lengths == [9, 9] and attached["vars"].sp_length == 9


def test_soft_prompts_on_a_google_drive_are_found(tmp_path, monkeypatch):
    drive, own = tmp_path / "drive", tmp_path / "softprompts"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attachment, "DRIVE", drive)
    assert attachment.softprompts_folder() == own
    drive.mkdir()
    assert attachment.softprompts_folder() == drive
    own.symlink_to(drive)  # as the notebooks do it
    assert attachment.softprompts_folder() == drive
    softprompt(1).save(drive / "noir.zip")
    assert attachment.softprompts_folder() == own
    own.unlink()
    own.mkdir()
    softprompt(2).save(own / "mine.zip")
    assert attachment.softprompts_folder() == own


def absent(module):
    """A module of ours cannot be imported; the hook's are imported anew, as at a start."""

    def inject(monkeypatch, host):
        for name in ("attachment", "client", "united"):
            known = importlib.import_module(f"kobold_sp_plugin.hosts.koboldai.{name}")
            monkeypatch.delitem(sys.modules, known.__name__)
            monkeypatch.setattr(koboldai, name, known)  # which importing it anew would leave another
        monkeypatch.setitem(sys.modules, module, None)

    return inject


def failing(path):
    """A function of ours raises what nobody expects."""

    def inject(monkeypatch, host):
        def fail(*args, **kwargs):
            raise RuntimeError("injected")

        monkeypatch.setattr(path, fail)

    return inject


def without(name):
    return lambda monkeypatch, host: host.pop(name)


def another(function):
    """The same with one more parameter."""
    return lambda body, kind="": function(body)


FAULTS = {
    # The host is another: it is left alone.
    "no getmodelname": without("getmodelname"),
    "no settingschanged": without("settingschanged"),
    "no ValidationError": without("ValidationError"),
    "another _generate_text": lambda monkeypatch, host: host.update(_generate_text=another(host["_generate_text"])),
    "no genseqs": lambda monkeypatch, host: delattr(host["vars"], "genseqs"),
    # Ours cannot start.
    "our session is gone": absent("kobold_sp_plugin.session"),
    "our menu is gone": absent("kobold_sp_plugin.menu"),
    "our client is gone": absent("kobold_sp_plugin.hosts.koboldai.client"),
    "no watcher can be started": failing("kobold_sp_plugin.session.Session.watch"),
    "no relay can be started": failing("flask_socketio.SocketIO.start_background_task"),
    "a seam cannot be patched": failing("kobold_sp_plugin.hosts.koboldai.attachment.patch"),
    # An adapter fails while the host runs.
    "the old model is not let go": failing("kobold_sp_plugin.hosts.koboldai.client.Client._let_go"),
    "the new model is not shown": failing("kobold_sp_plugin.hosts.koboldai.client.Client._loaded"),
    "our engine is gone": absent("kobold_sp_plugin.engines.transformers"),
    "the model is not attached": failing("kobold_sp_plugin.engines.transformers.attach"),
    "nothing can be selected": failing("kobold_sp_plugin.session.Session.select"),
    "nothing can be listed": failing("kobold_sp_plugin.session.Session.refresh"),
    "nothing can be checked": failing("kobold_sp_plugin.session.Session.softprompt"),
    "no budget can be shown": failing("kobold_sp_plugin.hosts.koboldai.client.Client._show_length"),
    "no turn can be had": failing("kobold_sp_plugin.engines.transformers.TransformersEngine.override"),
    "no client is greeted": failing("kobold_sp_plugin.menu.Menu.connected"),
    "no message is understood": failing("kobold_sp_plugin.menu.Menu.message"),
    "the status line fails": failing("kobold_sp_plugin.menu.Menu.status_line"),
    "no script for the page": failing("pathlib.Path.read_text"),
}


def use(host):
    """All that the hook takes part in, as the host does it; what it writes with nothing selected."""
    model = tiny_model("gptj")
    host["load_model"](model, then=lambda: host["spRequest"](""))
    handlers = host["socketio"].server.handlers["/"]
    handlers["connect"]("a client")
    for command in ("splistrequest", "spselect", "sprequest", "submit"):
        handlers["message"]("a client", {"cmd": command, "data": ""})
    host["fileops"].getspfiles(32)
    with contextlib.suppress(ValidationError):
        host["fileops"].checksp("noir.zip", 32)
    host["emit"]("from_server", {"cmd": "spstatitems", "data": {}})
    assert "the page" in host["app"].view_functions["index"]()
    return [host["calcsubmit"](PROMPT), host["_generate_text"](types.SimpleNamespace(prompt=PROMPT, soft_prompt=""))]


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_of_ours_fails_the_host_works_and_one_line_says_why(fault, in_process, monkeypatch, caplog):
    host = in_process
    host["spRequest"] = lambda filename: None
    expected = use(host)
    FAULTS[fault](monkeypatch, host)
    before = host.snapshot()
    caplog.set_level(logging.INFO)
    attachment = koboldai.attach_or_say_why_not(host)
    try:
        assert str(use(host)) == str(expected)
        assert host.snapshot() == before, "it has left the host"
    finally:
        if attachment is not None:
            attachment.undo()
    why = [line for line in caplog.messages if "of this host: " in line or "leaves this host: " in line]
    assert len(why) == 1, caplog.messages
