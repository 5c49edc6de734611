import html
import threading
import time

import pytest
from models import FAMILY, softprompt, tiny_model, tiny_tokenizer

from kobold_sp_plugin.engines.transformers import TransformersEngine
from kobold_sp_plugin.menu import EVENTS, OLD_UI, UI2, Menu, events_table
from kobold_sp_plugin.session import Session

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_model(FAMILY)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "softprompts"
    folder.mkdir()
    softprompt(1, name="Noir", author=["A", "B"], description="Rain.").save(folder / "noir.zip")
    softprompt(2, n_tokens=6, name=EVIL, author=EVIL, description=EVIL).save(folder / "evil.zip")
    softprompt(3, width=64).save(folder / "wide.zip")
    (folder / "broken.zip").write_bytes(b"not a zip")
    return folder


class Host:
    """A menu in a host that writes down what is emitted, and runs the relay."""

    def __init__(self, session):
        self.session = session
        self.sent = []
        self.threads = set()
        self.menu = Menu(session, self.emit)
        self.thread = threading.Thread(target=self.menu.relay, args=(time.sleep,))
        self.thread.start()

    def emit(self, event, payload, to):
        self.threads.add(threading.current_thread())
        self.sent.append((event, payload, to))

    def said(self, event, to=..., **payload):
        """Payloads of this event so far, to this client or room, that hold these values."""
        return [
            each
            for name, each, receiver in self.sent
            if name == event and to in (..., receiver) and all(each.get(key) == value for key, value in payload.items())
        ]

    def hears(self, event, to=..., seconds=5, **payload):
        """The newest of them, as soon as there is one."""
        end = time.monotonic() + seconds
        while not self.said(event, to, **payload):
            assert time.monotonic() < end, f"{event} {payload} was not sent, but {self.sent}"
            time.sleep(0.005)
        return self.said(event, to, **payload)[-1]

    def settled(self):
        """Wait until the effect is measured and everything is sent."""
        end = time.monotonic() + 5
        while self.session.selection and self.session.effect is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(0.12)

    def close(self):
        self.menu.close()
        self.thread.join()


@pytest.fixture
def session(folder, model, tokenizer):
    session = Session(folder, TransformersEngine(model, tokenizer, "tiny"))
    yield session
    session.close()


@pytest.fixture
def host(session):
    host = Host(session)
    yield host
    host.close()


class TestTable:
    def test_the_table_has_every_event_that_is_sent_and_every_one_that_is_understood(self, host):
        host.menu.connected("a")
        for name, handler in host.menu.handlers.items():
            commands = {"cmd": "splistrequest"}, {"cmd": "spselect", "data": "x"}
            for payload in ("", "noir.zip", "absent.zip", 7, *commands):
                handler("a", payload)
            handler("a", {"cmd": "sprequest", "data": ""})
            assert name in {event.name for event in EVENTS if event.direction == "in"}
        host.settled()
        known = {event.name for event in EVENTS if event.direction == "out"}
        assert {name for name, _, _ in host.sent} == known - {"generation"}
        commands = {payload["cmd"] for name, payload, _ in host.sent if name == "from_server"}
        documented = "".join(event.payload for event in EVENTS if event.name == "from_server")
        assert commands and all(f'"cmd": "{command}"' in documented for command in commands)

    def test_incoming_events_are_the_menus_and_the_embedded_hosts(self, host):
        incoming = {event.name for event in EVENTS if event.direction == "in"}
        assert incoming == {*host.menu.handlers, "generate", "stop_generation"}

    def test_the_readmes_table_has_a_row_for_each(self):
        rows = events_table().splitlines()
        assert len(rows) == len(EVENTS) + 2
        assert all(row.replace(r"\|", "").count("|") == 6 for row in rows)
        assert all(event.direction in ("in", "out") and event.sentence.endswith(".") for event in EVENTS)


class TestOwn:
    def test_a_client_hears_the_state_when_it_connects_and_whenever_it_changes(self, host, session):
        host.menu.connected("a")
        first = host.said("softprompts", to="a")[0]
        assert first == session.status() and len(first["entries"]) == 4
        host.menu.load_softprompt("a", "noir.zip")
        host.hears("softprompts", to=None, selection=["noir.zip"], n_tokens=4)
        host.settled()
        assert host.said("softprompts", to=None)[-1]["effect"] == session.effect
        assert [each["effect"] for each in host.said("softprompts", to=None)].count(None) <= 1

    def test_several_in_order(self, host):
        host.menu.load_softprompt("a", ["evil.zip", "noir.zip"])
        host.hears("softprompts", selection=["evil.zip", "noir.zip"], n_tokens=10)

    @pytest.mark.parametrize(
        ("wrong", "why"),
        [
            ("wide.zip", "made for 64 columns"),
            ("broken.zip", "broken.zip"),
            ("absent.zip", "absent.zip"),
            ("/etc/passwd", "leads out of the folder"),
            (5, "file name"),
            (None, "file name"),
            ([["noir.zip"]], "file name"),
        ],
    )
    def test_the_client_that_chose_wrongly_is_told_why(self, host, session, wrong, why):
        session.select("noir.zip")
        host.settled()
        host.sent.clear()
        host.menu.load_softprompt("a", wrong)
        error = host.said("softprompt_error", to="a")[0]
        assert error["filename"] == wrong and why in error["message"]
        assert session.selection == ("noir.zip",)
        host.settled()
        assert host.said("softprompts") == [] and {to for _, _, to in host.sent} == {"a"}

    def test_text_from_files_is_sent_as_it_is(self, host, session):
        entry = next(each for each in session.status()["entries"] if each["filename"] == "evil.zip")
        assert entry["name"] == entry["author"] == entry["description"] == EVIL

    def test_a_changed_file_reaches_the_clients_from_the_relay_alone(self, host, session, folder):
        session.watch()
        softprompt(5, name="New").save(folder / "new.zip")
        end = time.monotonic() + 5
        while not host.said("softprompts", to=None):
            assert time.monotonic() < end
            time.sleep(0.005)
        assert "new.zip" in [each["filename"] for each in host.said("softprompts")[-1]["entries"]]
        assert host.threads == {host.thread}

    def test_many_changes_at_once_are_one_message(self, host, session):
        for _ in range(20):
            session.select("noir.zip")
            session.select("evil.zip")
        host.hears("softprompts", selection=["evil.zip"])
        assert len(host.said("softprompts")) < 10

    def test_a_refresh_answers_the_client_that_asked(self, host):
        host.menu.sp_list_refresh("a", "")
        assert host.said("softprompts", to="a")
        names = [payload["name"] for event, payload, _ in host.sent if event == "var_changed"]
        assert names == ["splist", "spfilename"], "a page that builds its list anew marks nothing in it"

    def test_a_new_list_is_followed_by_what_is_marked_in_it(self, host, session, folder):
        session.select("noir.zip")
        host.hears("var_changed", to=UI2, name="spfilename", value="noir.zip")
        host.sent.clear()
        (folder / "more.zip").write_bytes((folder / "noir.zip").read_bytes())
        session.refresh()
        host.hears("var_changed", to=UI2, name="spfilename", value="noir.zip")
        names = [payload["name"] for event, payload, to in host.sent if event == "var_changed"]
        assert names == ["splist", "spfilename"]


class TestUI2:
    def variables(self, host, to):
        return {each["name"]: each["value"] for each in host.said("var_changed", to=to)}

    def test_every_variable_when_a_client_connects(self, host):
        host.menu.connected("a", (UI2,))
        variables = self.variables(host, "a")
        (broken, (name, why)), (wide, (label, _)) = variables["splist"][2:]
        assert (broken, wide) == ("broken.zip", "wide.zip")
        assert why.startswith("Cannot be used: ") and name == f"broken ({why[len('Cannot be used: ') :]})"
        assert label == "wide (made for 64 columns, this model has 32)"
        del variables["splist"][2:]
        assert variables == {
            "allowsp": True,
            "splist": [["evil.zip", [EVIL, EVIL]], ["noir.zip", ["Noir", "Rain."]]],
            "spfilename": "",
            "spname": "Not in Use",
            "spmeta": None,
            "sp_length": 0,
        }
        assert {each["classname"] for each in host.said("var_changed")} == {"system"}
        assert host.said("from_server") == []

    def test_what_changes_with_a_choice(self, host):
        host.menu.load_softprompt("a", "noir.zip")
        changed = host.hears("var_changed", to=UI2, name="sp_length")
        assert (changed["old_value"], changed["value"]) == (0, 4)
        assert time.strptime(changed["transmit_time"][:19], "%Y-%m-%d %H:%M:%S")
        meta = {"name": "Noir", "author": "A, B", "supported": [], "description": "Rain.", "n_tokens": 4}
        expected = {"spfilename": "noir.zip", "spname": "Noir", "spmeta": meta, "sp_length": 4}
        assert self.variables(host, UI2) == expected
        host.menu.load_softprompt("a", "")
        host.hears("var_changed", to=UI2, name="spfilename", value="")

    def test_several_are_told_as_the_first_with_all_their_tokens(self, host):
        host.menu.load_softprompt("a", ["noir.zip", "evil.zip"])
        host.hears("var_changed", to=UI2, name="spfilename", value="noir.zip")
        assert host.hears("var_changed", to=UI2, name="sp_length")["value"] == 10

    def test_a_wrong_choice_is_an_error_and_the_clients_list_goes_back(self, host, session):
        session.select("noir.zip")
        host.menu.load_softprompt("a", f"{EVIL}.zip")
        (text,) = (payload for name, payload, to in host.sent if name == "error" and to == "a")
        assert EVIL not in text and "&lt;" in text
        assert self.variables(host, "a") == {"spfilename": "noir.zip"}

    def test_the_popups_rows_can_be_loaded(self, host, session):
        host.menu.load_softprompt_list("a")
        assert host.said("load_popup", to="a")[0]["call_back"] == "load_softprompt"
        items = host.said("popup_items", to="a")[0]["items"]
        assert items[1] == [False, "noir.zip", "noir", True, ["Noir", "Rain."]]
        host.menu.load_softprompt("a", items[1][1])
        assert session.selection == ("noir.zip",)

    def test_without_a_model_the_popup_is_an_error(self, host, session):
        session.use(None)
        host.menu.load_softprompt_list("a")
        assert not host.said("load_popup")
        assert any(name == "error" for name, _, _ in host.sent)
        host.hears("var_changed", to=UI2, name="allowsp", value=False)
        listed = host.hears("var_changed", to=UI2, name="splist")["value"]
        assert all(name.endswith(")") for filename, (name, _) in listed), "each with the reason"


class TestOldPage:
    def send(self, host, command, data="", client="a"):
        host.menu.handlers["message"](client, {"cmd": command, "data": data})

    def test_its_indicator_when_a_client_connects(self, host, session):
        session.select("noir.zip")
        host.menu.connected("a", (OLD_UI,))
        assert host.said("from_server", to="a", cmd="allowsp")[0]["data"] is True
        meta = {"name": "Noir", "author": "A, B", "supported": [], "description": "Rain.", "n_tokens": 4}
        assert host.said("from_server", to="a", cmd="spstatitems")[0]["data"] == {"noir.zip": meta}
        assert host.said("var_changed") == []

    def test_list_mark_and_select(self, host, session):
        self.send(host, "splistrequest")
        (answer,) = host.said("from_server", cmd="buildsp")
        assert [each["filename"] for each in answer["data"]] == ["evil.zip", "noir.zip", "broken.zip", "wide.zip"]
        assert answer["data"][3]["description"].startswith("Cannot be used: made for 64 columns, this model has 32")
        assert set(answer["data"][1]) == {"name", "author", "supported", "description", "filename", "n_tokens"}
        self.send(host, "spselect", "noir.zip")
        assert session.selection == ()
        self.send(host, "sprequest")
        assert session.selection == ("noir.zip",)
        host.hears("from_server", to=OLD_UI, cmd="spstatitems")
        self.send(host, "spselect", "")
        self.send(host, "sprequest")
        assert session.selection == ()
        host.hears("from_server", to=OLD_UI, cmd="spstatitems", data={})

    def test_two_clients_do_not_select_for_each_other(self, host, session):
        self.send(host, "spselect", "noir.zip", "a")
        self.send(host, "sprequest", client="b")
        assert session.selection == ()
        host.menu.disconnected("a")
        self.send(host, "sprequest", client="a")
        assert session.selection == ()

    def test_a_wrong_choice_keeps_the_indicator_and_says_why(self, host, session):
        session.select("noir.zip")
        self.send(host, "spselect", "wide.zip")
        self.send(host, "sprequest")
        assert "64 columns" in host.said("from_server", to="a", cmd="errmsg")[0]["data"]
        assert session.selection == ("noir.zip",)

    def test_what_its_page_inserts_as_html_is_escaped_and_nothing_else(self, host, session):
        self.send(host, "splistrequest")
        evil = host.said("from_server", cmd="buildsp")[0]["data"][0]
        assert evil["author"] == html.escape(EVIL)
        assert evil["name"] == evil["description"] == EVIL, "these the page escapes itself"
        session.select("evil.zip")
        shown = host.hears("from_server", to=OLD_UI, cmd="spstatitems")
        assert shown["data"]["evil.zip"]["name"] == html.escape(EVIL)

    def test_its_button_follows_the_model(self, host, session):
        session.use(None)
        host.hears("from_server", to=OLD_UI, cmd="allowsp", data=False)

    @pytest.mark.parametrize("payload", ["", None, [], {"cmd": "submit", "data": "text"}, {}])
    def test_other_messages_are_the_hosts(self, host, payload):
        host.menu.message("a", payload)
        assert host.sent == []
