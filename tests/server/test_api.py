"""KoboldAI's API, the guard in front of it, and the page's events."""

import json
import queue
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
import simple_websocket
import socketio
from models import softprompt
from serving import GREEDY, connected, eventually, hears, slowly

from kobold_sp_plugin.engines import GenerationSettings
from kobold_sp_plugin.server import generation_queue
from kobold_sp_plugin.server.app import Server


@pytest.mark.parametrize("prefix", ["/api/v1", "/api/latest"])
class TestKoboldAPI:
    def test_what_a_client_asks_first(self, ask, prefix):
        assert ask("GET", f"{prefix}/info/version").json == {"result": "1.2.5"}
        assert ask("GET", f"{prefix}/model").json == {"result": "tiny"}
        assert ask("GET", f"{prefix}/config/max_context_length").json == {"value": 512}
        assert ask("GET", f"{prefix}/config/max_length").json == {"value": 80}

    def test_list_select_and_take_off(self, ask, prefix, session):
        listed = [{"value": "noir.zip"}, {"value": "space.zip"}]
        assert ask("GET", f"{prefix}/config/soft_prompts_list").json == {"values": listed}
        assert ask("GET", f"{prefix}/config/soft_prompt").json == {"value": ""}
        assert ask("PUT", f"{prefix}/config/soft_prompt", {"value": "noir.zip"}).json == {}
        assert ask("GET", f"{prefix}/config/soft_prompt").json == {"value": "noir.zip"}
        assert session.selection == ("noir.zip",)
        assert ask("PUT", f"{prefix}/config/soft_prompt", {"value": "  "}).json == {}
        assert ask("GET", f"{prefix}/config/soft_prompt").json == {"value": ""}

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            ({"value": "absent.zip"}, "absent.zip"),
            ({"value": "wide.zip"}, "64 columns"),
            ({"value": "broken.zip"}, "broken.zip"),
            ({"value": "../noir.zip"}, "name of a file"),
            ({"value": ["noir.zip"]}, "string"),
            ({}, "required"),
        ],
    )
    def test_what_cannot_be_selected_is_422_with_the_reason(self, ask, prefix, body, why, session):
        session.select("space.zip")
        answer = ask("PUT", f"{prefix}/config/soft_prompt", body)
        assert answer.status == 422
        assert why in answer.json["detail"]["value"][0]
        assert session.selection == ("space.zip",)

    def test_generate(self, ask, prefix, engine):
        answer = ask("POST", f"{prefix}/generate", {**GREEDY, "quiet": True, "unknown": [1], "tfs": 1, "top_a": 0})
        expected = "".join(engine.generate(GenerationSettings("The door opened and", max_length=20, temperature=0)))
        assert answer.json == {"results": [{"text": expected, "finish_reason": "length"}]}

    def test_a_soft_prompt_for_one_request(self, ask, prefix, session):
        def text(**fields):
            return ask("POST", f"{prefix}/generate", {**GREEDY, **fields}).json["results"][0]["text"]

        plain = text()
        noir = text(soft_prompt="noir.zip")
        assert noir != plain and text() == plain
        session.select("noir.zip")
        assert text() == noir == text(soft_prompt="noir.zip")
        assert text(soft_prompt=" ") == text(soft_prompt="") == plain
        assert session.selection == ("noir.zip",)


class TestGenerate:
    def test_several_texts(self, ask):
        fields = {**GREEDY, "top_k": 0, "temperature": 1.5, "sampler_seed": 2**64 - 1, "n": 3}
        results = ask("POST", "/api/v1/generate", fields).json["results"]
        assert len({each["text"] for each in results}) == 3
        assert ask("POST", "/api/v1/generate", fields).json["results"] == results

    def test_memory_stands_before_the_prompt(self, ask):
        apart = ask("POST", "/api/v1/generate", {**GREEDY, "memory": "The door ", "prompt": "opened and"}).json
        assert apart == ask("POST", "/api/v1/generate", GREEDY).json

    @pytest.mark.parametrize(
        "fields",
        [
            {"prompt": None},
            {"prompt": 5},
            {"max_length": 0},
            {"max_length": 65537},
            {"max_length": 10**400},
            {"temperature": 10**400},
            {"max_context_length": -(10**400)},
            {"max_length": 2.5},
            {"max_length": True},
            {"max_length": "80"},
            {"max_context_length": 0},
            {"temperature": 0},
            {"top_p": 1.5},
            {"top_k": -1},
            {"typical": -0.1},
            {"tfs": 2},
            {"rep_pen": 0.9},
            {"rep_pen_slope": -1},
            {"n": 6},
            {"sampler_seed": 2**64},
            {"sampler_order": [0, 1, 2]},
            {"sampler_order": [0, 1, 2, 3, 4, 4]},
            {"sampler_order": ["a"] * 6},
            {"stop_sequence": "You:"},
            {"stop_sequence": [5]},
            {"soft_prompt": 5},
            {"soft_prompt": "wide.zip"},
            {"soft_prompt": "absent.zip"},
        ],
    )
    def test_a_field_that_is_wrong_is_named(self, ask, fields):
        answer = ask("POST", "/api/v1/generate", {**GREEDY, **fields})
        assert answer.status == 422
        ((field, messages),) = answer.json["detail"].items()
        assert field in fields and all(isinstance(message, str) for message in messages)

    def test_half_a_character_is_taken_for_an_unknown_one(self, ask):
        halves = {"prompt": "The \ud800 door", "memory": "\udc00", "stop_sequence": ["\ud800", "never\ud800"]}
        marks = {"prompt": "The \ufffd door", "memory": "\ufffd", "stop_sequence": ["\ufffd", "never\ufffd"]}
        answer = ask("POST", "/api/v1/generate", {**GREEDY, **halves})
        assert answer.status == 200
        assert answer.json == ask("POST", "/api/v1/generate", {**GREEDY, **marks}).json

    def test_a_byte_order_mark_before_the_body_is_no_matter(self, ask):
        body = b"\xef\xbb\xbf" + json.dumps(GREEDY).encode()
        assert ask("POST", "/api/v1/generate", body).json == ask("POST", "/api/v1/generate", GREEDY).json

    def test_null_is_as_good_as_none(self, ask):
        fields = {"temperature": None, "soft_prompt": None, "stop_sequence": None, "sampler_order": list(range(7))}
        assert ask("POST", "/api/v1/generate", {**GREEDY, **fields}).status == 200

    @pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b""])
    def test_a_body_that_is_no_object_is_422(self, ask, body):
        answer = ask("POST", "/api/v1/generate", body)
        assert answer.status == 422 and answer.json["detail"]

    def test_a_body_that_is_too_large_is_413(self, ask):
        answer = ask("POST", "/api/v1/generate", b'{"prompt": "' + b"a" * (5 << 20) + b'"}')
        assert answer.status == 413 and answer.json["detail"]["type"] == "request_entity_too_large"

    def test_what_cannot_fit_is_422_with_the_numbers(self, ask):
        answer = ask("POST", "/api/v1/generate", {**GREEDY, "memory": "The clock. " * 200, "soft_prompt": "noir.zip"})
        assert answer.status == 422
        assert answer.json["detail"]["type"] == "context_exceeded" and "512" in answer.json["detail"]["msg"]

    def test_a_failure_is_json_and_the_next_request_works(self, ask, model, caplog):
        handle = model.register_forward_hook(lambda *_: 1 / 0)
        answer = ask("POST", "/api/v1/generate", GREEDY)
        handle.remove()
        assert answer.status == 500
        assert answer.json["detail"] == {"msg": "ZeroDivisionError: division by zero", "type": "server_error"}
        assert ask("POST", "/api/v1/generate", GREEDY).status == 200

    def test_without_a_model_it_is_501(self, ask, session):
        session.use(None)
        answer = ask("POST", "/api/v1/generate", GREEDY)
        assert answer.status == 501 and answer.json["detail"]["type"] == "not_implemented"
        assert ask("GET", "/api/v1/model").json == {"result": "ReadOnly"}

    def test_a_queued_request_keeps_the_soft_prompts_of_its_moment(self, ask, server, session, model):
        plain = ask("POST", "/api/v1/generate", GREEDY).json
        session.select("noir.zip")
        noir = ask("POST", "/api/v1/generate", GREEDY).json
        assert noir != plain
        answers = []
        with slowly(model, 0.01):
            threads = []
            for count in (1, 2):
                threads.append(threading.Thread(target=lambda: answers.append(ask("POST", "/api/v1/generate", GREEDY))))
                threads[-1].start()
                eventually(lambda count=count: len(server.queue) == count)
            session.clear()
            for thread in threads:
                thread.join()
        assert [answer.json for answer in answers] == [noir, noir]

    def test_a_full_queue_is_503(self, ask, server, model, monkeypatch):
        monkeypatch.setattr(generation_queue, "LONGEST", 1)
        threads = []
        with slowly(model):
            for count in (1, 2):
                threads.append(threading.Thread(target=ask, args=("POST", "/api/v1/generate", GREEDY)))
                threads[-1].start()
                eventually(lambda count=count: len(server.queue) == count)
            answer = ask("POST", "/api/v1/generate", GREEDY)
            assert answer.status == 503 and answer.json["detail"]["type"] == "service_unavailable"
            for thread in threads:
                thread.join()

    def test_what_a_closing_server_stops_is_503(self, ask, server, model):
        answers = []
        threads = []
        fields = {**GREEDY, "max_length": 400}
        with slowly(model):
            for count in (1, 2):
                threads.append(threading.Thread(target=lambda: answers.append(ask("POST", "/api/v1/generate", fields))))
                threads[-1].start()
                eventually(lambda count=count: len(server.queue) == count)
            server.queue.close()
            for thread in threads:
                thread.join()
        answers.append(ask("POST", "/api/v1/generate", GREEDY))
        assert [answer.status for answer in answers] == [503, 503, 503]
        detail = {"msg": "The server is closing.", "type": "service_unavailable"}
        assert [answer.json["detail"] for answer in answers] == [detail] * 3

    def test_who_is_told_of_the_end_finds_it_finished(self, server, engine):
        told = queue.Queue()
        submitted = threading.Event()

        def tell(state, **what):
            if state == "done" and submitted.wait(10):
                told.put(generation.finished.is_set())

        generation = server.queue.submit(engine, GenerationSettings("The door", max_length=2), (), tell=tell)
        submitted.set()
        assert told.get(timeout=10)

    def test_a_client_that_hangs_up_ends_its_generation(self, server, model, ask):
        with slowly(model):
            body = json.dumps({**GREEDY, "max_length": 400}).encode()
            line = socket.create_connection(("127.0.0.1", server.port))
            head = f"POST /api/v1/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            line.sendall(head.encode() + body)
            eventually(lambda: len(server.queue) == 1)
            line.close()
            eventually(lambda: len(server.queue) == 0, seconds=3)
        assert ask("POST", "/api/v1/generate", GREEDY).status == 200


class TestTags:
    """A soft prompt that stands in the text of a request."""

    def text(self, ask, **fields):
        return ask("POST", "/api/v1/generate", {**GREEDY, **fields}).text

    @pytest.mark.parametrize("name", ["noir", "noir.zip", "Noir"])
    def test_one_that_stands_first_is_as_one_that_is_selected(self, ask, session, name):
        tagged = self.text(ask, prompt=f"<softprompt:{name}>{GREEDY['prompt']}")
        in_memory = self.text(ask, memory=f"<softprompt:{name}>")
        plain = self.text(ask)
        session.select("noir.zip")
        assert tagged == in_memory == self.text(ask) != plain

    def test_it_stands_where_it_is_put(self, ask, session, engine):
        noir = session.softprompt("noir.zip")
        prompt = "The door " + noir + "opened and"
        expected = "".join(engine.generate(GenerationSettings(prompt, max_length=20, temperature=0)))
        tagged = "The door <softprompt:noir>opened and"
        assert self.text(ask, prompt=tagged) == expected
        assert self.text(ask, prompt="<softprompt:noir>The door opened and") != expected
        chat = ask("POST", "/v1/completions", {"prompt": tagged, "max_tokens": 20, "top_k": 1})
        assert chat.json["choices"][0]["text"] == expected

    def test_it_counts_when_room_is_made(self, ask, engine):
        story, memory = "The rain came in. " * 40, "The clock. " * 7 + "<softprompt:noir>"
        room = len(engine.token_ids("The clock. " * 7)) + 4
        fields = {**GREEDY, "prompt": story, "memory": memory, "max_length": 4}
        assert ask("POST", "/api/v1/generate", {**fields, "max_context_length": room + 5}).status == 200
        answer = ask("POST", "/api/v1/generate", {**fields, "max_context_length": room + 4})
        assert answer.status == 422 and "4 of soft prompts" in answer.json["detail"]["msg"]

    @pytest.mark.parametrize(("name", "why"), [("absent", "absent"), ("wide", "64 columns"), ("broken", "broken.zip")])
    def test_what_nobody_can_read_there_is_422_with_the_reason(self, ask, server, name, why):
        for field in ("prompt", "memory"):
            answer = ask("POST", "/api/v1/generate", {**GREEDY, field: f"The door <softprompt:{name}>"})
            assert answer.status == 422 and why in answer.json["detail"][field][0]
        with connected(server) as client:
            client.emit("generate", {"id": "a", "prompt": f"<softprompt:{name}>"})
            assert why in hears(client, "generation", state="error")["error"]

    def test_on_the_page_too(self, server, ask):
        expected = self.text(ask, soft_prompt="noir.zip")
        with connected(server) as client:
            client.emit("generate", {"id": "a", **GREEDY, "prompt": f"<softprompt:noir>{GREEDY['prompt']}"})
            text, state = "", ""
            while state != "done":
                heard = hears(client, "generation", id="a")
                state, text = heard["state"], text + heard["text"]
        assert text == expected


class TestOtherAnswers:
    def test_every_entry_with_verdict_reason_and_tokens(self, ask, session, folder):
        softprompt(7).save(folder / "new.zip")
        ask("PUT", "/api/v1/config/soft_prompt", {"value": "noir.zip"})
        eventually(lambda: session.effect is not None)
        answer = ask("GET", "/api/extra/softprompts").json
        assert answer == session.status()
        assert 0 < answer["effect"] <= 1 and answer["n_tokens"] == 4
        verdicts = {each["filename"]: each["verdict"] for each in answer["entries"]}
        assert verdicts == {
            "broken.zip": "unreadable",
            "new.zip": "unproven",
            "noir.zip": "unproven",
            "space.zip": "unproven",
            "wide.zip": "incompatible",
        }
        assert all(each["reason"] for each in answer["entries"])

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [("GET", "/api/v1/nothing", 404), ("GET", "/api/", 404), ("DELETE", "/api/v1/config/soft_prompt", 405)],
    )
    def test_every_error_below_api_is_json(self, ask, method, path, status):
        answer = ask(method, path)
        assert answer.status == status
        assert set(answer.json["detail"]) == {"msg", "type"}
        if status == 405:
            assert "PUT" in answer.headers["Allow"]

    def test_an_unexpected_failure_is_json(self, ask, session, monkeypatch, caplog):
        monkeypatch.setattr(session, "entries", lambda: 1 / 0)
        answer = ask("GET", "/api/v1/config/soft_prompts_list")
        assert answer.status == 500 and answer.json["detail"]["type"] == "server_error"

    def test_the_page_and_its_files_are_served_from_here(self, ask):
        page = ask("GET", "/")
        assert page.status == 200 and page.headers["Content-Type"].startswith("text/html")
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        for line in page.body.decode().split('"'):
            if line.endswith((".js", ".css")):
                assert ask("GET", f"/{line}").status == 200
        assert ask("GET", "/nothing").status == 404


class TestGuard:
    """A page of another site, open in a browser on this machine, must not reach the server."""

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", "", "10.0.0.7"])
    @pytest.mark.parametrize("path", ["/", "/api/v1/model", "/socket.io/?EIO=4&transport=polling"])
    def test_other_names_are_refused(self, ask, host, path):
        answer = ask("GET", path, headers={"Host": host})
        assert answer.status == 403 and answer.json["detail"]["type"] == "forbidden"

    @pytest.mark.parametrize("host", ["localhost:80", "LOCALHOST", "127.0.0.1", "[::1]:5000"])
    def test_this_machines_names_are_not(self, ask, host):
        assert ask("GET", "/api/v1/model", headers={"Host": host}).status == 200

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://["])
    def test_other_origins_may_not_change_anything(self, ask, session, origin):
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        assert ask("PUT", "/api/v1/config/soft_prompt", {"value": "noir.zip"}, headers).status == 403
        assert ask("POST", "/api/v1/generate", GREEDY, headers).status == 403
        assert ask("GET", "/socket.io/?EIO=4&transport=polling", headers=headers).status == 403
        assert session.selection == ()

    def test_the_pages_own_origin_may(self, ask, server):
        own = {"Origin": server.url.rstrip("/")}
        assert ask("PUT", "/api/v1/config/soft_prompt", {"value": "noir.zip"}, own).status == 200
        assert ask("GET", "/socket.io/?EIO=4&transport=polling", headers=own).status == 200

    def test_a_web_socket_of_another_origin_is_refused(self, server):
        client = socketio.Client(reconnection=False)
        with pytest.raises(socketio.exceptions.ConnectionError):
            client.connect(server.url, headers={"Origin": "http://evil.example"}, transports=["websocket"])


class TestSockets:
    def test_the_state_comes_with_the_connection(self, server, session):
        with connected(server) as client:
            assert client.transport() == "websocket"
            assert hears(client, "softprompts") == session.status()

    @pytest.mark.parametrize(
        ("query", "said"),
        [
            ("?ui=1", {"softprompts", "from_server"}),
            ("?ui=2", {"softprompts", "var_changed"}),
            ("", {"softprompts", "from_server", "var_changed"}),
        ],
    )
    def test_koboldais_pages_hear_their_own_words(self, server, session, query, said):
        with connected(server, query) as client:
            hears(client, "softprompts")
            session.select("noir.zip")
            hears(client, "softprompts", selection=["noir.zip"])
            eventually(lambda: session.effect is not None)
            time.sleep(0.2)
            rest = {name for name, _ in list(client.heard.queue)}
            assert rest - {"softprompts"} == said - {"softprompts"}

    def test_a_choice_reaches_every_client_and_its_effect_follows(self, server):
        with connected(server) as one, connected(server) as other:
            one.emit("load_softprompt", "noir.zip")
            heard = hears(other, "softprompts", selection=["noir.zip"], n_tokens=4)
            while heard["effect"] is None:  # it may have been measured before the relay looked
                heard = hears(other, "softprompts")
            assert 0 < heard["effect"] <= 1

    def test_a_wrong_choice_is_told_to_its_client_alone(self, server):
        with connected(server) as one, connected(server) as other:
            one.emit("load_softprompt", "wide.zip")
            assert "64 columns" in hears(one, "softprompt_error", filename="wide.zip")["message"]
            assert "softprompt_error" not in {name for name, _ in list(other.heard.queue)}

    def test_a_changed_folder_reaches_the_client(self, server, session, folder):
        session.watch()
        with connected(server) as client:
            hears(client, "softprompts")
            softprompt(9).save(folder / "new.zip")
            heard = hears(client, "softprompts", seconds=3)
            assert "new.zip" in [each["filename"] for each in heard["entries"]]

    def test_events_without_or_with_odd_payloads_hurt_nobody(self, server):
        with connected(server) as client:
            for name in ("load_softprompt", "message", "generate", "stop_generation", "sp_list_refresh", "unheard_of"):
                for payload in ((), (None,), (5,), ([],), ({},), ("x", "y"), ({"id": {}},)):
                    client.emit(name, payload)
            client.emit("load_softprompt", "noir.zip")
            hears(client, "softprompts", selection=["noir.zip"])


class TestStreaming:
    def generate(self, client, own_id, **fields):
        client.emit("generate", {"id": own_id, **GREEDY, **fields})

    def test_text_streams_to_the_client_that_asked(self, server, ask):
        expected = ask("POST", "/api/v1/generate", GREEDY).json["results"][0]["text"]
        with connected(server) as client, connected(server) as other:
            self.generate(client, "mine")
            assert hears(client, "generation", id="mine", state="queued")["position"] == 0
            hears(client, "generation", id="mine", state="started")
            states, text = [], ""
            while not states or states[-1] == "text":
                heard = hears(client, "generation", id="mine")
                states.append(heard["state"])
                text += heard["text"]
            assert states[-1] == "done" and len(states) > 5
            assert text == expected
            assert "generation" not in {name for name, _ in list(other.heard.queue)}

    def test_it_uses_what_was_selected_when_it_was_asked_for(self, server, session, ask):
        noir = ask("POST", "/api/v1/generate", {**GREEDY, "soft_prompt": "noir.zip"}).json["results"][0]["text"]
        session.select("noir.zip")
        with connected(server) as client:
            self.generate(client, "1")
            hears(client, "generation", state="queued")
            session.clear()
            text, state = "", ""
            while state != "done":
                heard = hears(client, "generation", id="1")
                state, text = heard["state"], text + heard["text"]
            assert text == noir

    def test_a_clients_events_are_handled_in_the_order_it_sent_them(self, server, ask):
        noir = ask("POST", "/api/v1/generate", {**GREEDY, "soft_prompt": "noir.zip"}).json["results"][0]["text"]
        with connected(server) as client:
            client.emit("load_softprompt", "noir.zip")
            self.generate(client, "1")
            client.emit("load_softprompt", "")
            self.generate(client, "2", max_length=400)
            client.emit("stop_generation", {"id": "2"})
            text, states = "", {}
            while states != {"1": "done", "2": "stopped"}:
                heard = hears(client, "generation")
                states[heard["id"]] = heard["state"]
                text += heard["text"] if heard["id"] == "1" else ""
            assert text == noir

    def test_the_rest_queue_in_order_and_hear_their_place(self, server, model):
        with slowly(model, 0.005), connected(server) as one, connected(server) as other:
            self.generate(one, "a")
            hears(one, "generation", id="a", state="started")
            self.generate(other, "b")
            assert hears(other, "generation", id="b", state="queued")["position"] == 1
            self.generate(one, "c")
            assert hears(one, "generation", id="c", state="queued")["position"] == 2
            hears(one, "generation", id="a", state="done")
            hears(other, "generation", id="b", state="started")
            assert hears(one, "generation", id="c", state="queued")["position"] == 1
            hears(other, "generation", id="b", state="done")
            hears(one, "generation", id="c", state="done")

    def test_stop_ends_one_within_a_token(self, server, model):
        with slowly(model), connected(server) as client:
            self.generate(client, "a", max_length=400)
            self.generate(client, "b", max_length=400)
            hears(client, "generation", id="a", state="text")
            client.emit("stop_generation", {"id": "b"})
            hears(client, "generation", id="b", state="stopped")
            began = time.monotonic()
            client.emit("stop_generation", {"id": "a"})
            hears(client, "generation", id="a", state="stopped")
            assert time.monotonic() - began < 1
            self.generate(client, "a")
            hears(client, "generation", id="a", state="done")

    def test_nobody_stops_another_clients(self, server, model):
        with slowly(model, 0.005), connected(server) as one, connected(server) as other:
            self.generate(one, "a")
            hears(one, "generation", state="started")
            other.emit("stop_generation", {"id": "a"})
            hears(one, "generation", id="a", state="done")

    def test_a_client_that_leaves_takes_its_generations_with_it(self, server, model):
        with slowly(model), connected(server) as client:
            for own_id in "abc":
                self.generate(client, own_id, max_length=400)
            hears(client, "generation", state="text")
            assert len(server.queue) == 3
            client.disconnect()
            eventually(lambda: len(server.queue) == 0, seconds=3)

    def test_a_failure_is_told_and_the_next_one_runs(self, server, model, caplog):
        with connected(server) as client:
            handle = model.register_forward_hook(lambda *_: 1 / 0)
            self.generate(client, "a")
            assert "division" in hears(client, "generation", id="a", state="error")["error"]
            handle.remove()
            self.generate(client, "a")
            hears(client, "generation", id="a", state="done")

    @pytest.mark.parametrize(
        ("payload", "why"),
        [
            ({"prompt": "x"}, "id"),
            ({"id": 5, "prompt": "x"}, "id"),
            ({"id": "a"}, "prompt"),
            ({"id": "a", "prompt": "x", "top_p": 3}, "top_p"),
            ({"id": "a", "prompt": "x", "soft_prompt": "wide.zip"}, "64 columns"),
            ({"id": "a", "prompt": "x", "max_length": 600}, "600"),
        ],
    )
    def test_what_cannot_be_generated_is_told(self, server, payload, why):
        with connected(server) as client:
            client.emit("generate", payload)
            assert why in hears(client, "generation", state="error")["error"]

    def test_without_a_model_it_is_told(self, server, session):
        session.use(None)
        with connected(server) as client:
            self.generate(client, "a")
            assert "No model" in hears(client, "generation", state="error")["error"]


def test_closing_with_clients_and_generations_under_way_leaves_nothing(session, model):
    with slowly(model), Server(session, port=0) as server:
        # framed by hand, as the page does it
        client = simple_websocket.Client(f"ws://127.0.0.1:{server.port}/socket.io/?EIO=4&transport=websocket")
        assert client.receive(timeout=5).startswith("0{")
        client.send("40")
        assert client.receive(timeout=5).startswith("40{"), "connected, before anything else is said"
        assert client.receive(timeout=5).startswith('42["softprompts",')
        client.send("42" + json.dumps(["generate", {"id": "a", **GREEDY, "max_length": 400}]))
        eventually(lambda: len(server.queue) == 1)
    with pytest.raises(simple_websocket.ConnectionClosed):
        while client.receive(timeout=5):
            pass
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_a_port_that_is_taken_is_an_error(session, server):
    with pytest.raises(OSError):
        Server(session, port=server.port)
    assert urlsplit(server.url).port == server.port


def test_what_the_engine_does_not_do_is_told(ask, engine, monkeypatch):
    def lacking(settings):
        return ("It has no tfs; it was left out.",) if settings.tfs < 1 else ()

    monkeypatch.setattr(engine, "lacking", lacking, raising=False)
    (result,) = ask("POST", "/api/v1/generate", {**GREEDY, "tfs": 0.9}).json["results"]
    assert result["notices"] == ["It has no tfs; it was left out."]
    (result,) = ask("POST", "/api/v1/generate", GREEDY).json["results"]
    assert "notices" not in result
