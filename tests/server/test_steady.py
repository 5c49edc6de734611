"""Many clients, failing models, and the end of the server."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import simple_websocket
import torch
from models import softprompt
from serving import GREEDY, asking, eventually, reading, slowly

from kobold_sp_plugin.engines import Ending, GenerationSettings
from kobold_sp_plugin.errors import EngineUnreachable, UnsupportedCall
from kobold_sp_plugin.server import app
from kobold_sp_plugin.server.app import Server
from kobold_sp_plugin.server.generation_queue import GenerationQueue

ROOT = Path(__file__).resolve().parents[2]


class FakeEngine:
    """Says the prompt's words one by one, when it is let."""

    def __init__(self):
        self.gate = threading.Event()
        self.order = []

    def generate(self, settings, softprompts, stop):
        self.order.append(settings.prompt)
        self.gate.wait(10)
        yield settings.prompt
        return Ending("length", 1, 1)


@pytest.fixture
def queue():
    queue = GenerationQueue()
    queue.engine = FakeEngine()
    yield queue
    queue.engine.gate.set()
    queue.close()


def submit(queue, name, heard=None):
    """``name``: the client, and which of its own this is."""

    def tell(state, position=0, **what):
        if heard is not None and state == "queued":
            heard.append((name, position))

    return queue.submit(queue.engine, GenerationSettings(name), (), name[0], tell)


def test_clients_take_turns(queue):
    names = ["a0", "a1", "a2", "a3", "b0", "b1", "c0"]
    generations = [submit(queue, name) for name in names]
    queue.engine.gate.set()
    for generation in generations:
        assert generation.finished.wait(10)
    assert queue.engine.order == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_who_comes_late_does_not_keep_an_old_one_waiting_for_ever(queue):
    first = submit(queue, "a0")
    eventually(lambda: queue.engine.order == ["a0"])
    waiting = [submit(queue, name) for name in ("a1", "a2", "b0", "c0", "b1", "c1", "d0")]
    queue.stop(waiting[2])
    queue.engine.gate.set()
    for generation in (first, *waiting):
        assert generation.finished.wait(10)
    order = queue.engine.order
    assert order.index("a1") < order.index("c1") and order.index("a2") <= 6 and "b0" not in order


def test_all_hear_their_place_when_somebody_comes_between(queue):
    heard = []
    for name in ("a0", "a1", "a2", "b0"):
        submit(queue, name, heard)
        eventually(lambda: queue.engine.order)
    assert heard[-3:] == [("b0", 1), ("a1", 2), ("a2", 3)]


def test_what_is_meant_without_a_key_is_ones_own(queue):
    only = submit(queue, "a0")
    assert queue.meant("", "nobody") == [only] == queue.meant("", "a")
    other = submit(queue, "b0")
    assert queue.meant("", "nobody") == [] and queue.meant("", "b") == [other]


@pytest.mark.timeout(240)
def test_64_clients_at_once_each_get_the_text_they_would_get_alone(server, folder, model):
    names = []
    for number in range(64):
        names.append(f"p{number}.zip")
        softprompt(100 + number, n_tokens=2 + number % 5).save(folder / names[-1])
    fields = [{**GREEDY, "max_length": 12, "soft_prompt": name, "genkey": name} for name in names]
    ask = asking(server)
    alone = [ask("POST", "/api/v1/generate", each).text for each in fields]
    assert len(set(alone)) > 32
    together, errors = [None] * 64, []
    ready = threading.Barrier(64)

    def one(number):
        try:
            ready.wait(20)
            if number % 2:
                together[number] = ask("POST", "/api/v1/generate", fields[number]).text
            else:
                with reading(server, "/api/extra/generate/stream", fields[number]) as response:
                    tokens = re.findall(r'"token":"((?:[^"\\]|\\.)*)"', response.read().decode())
                together[number] = "".join(tokens).replace("\\\\", "\\")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and together == alone


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (MemoryError(), 507, "out_of_memory.unknown.unknown"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 507, "out_of_memory.gpu.cuda"),
        (RuntimeError("HIP out of memory. Tried to allocate 2 GiB"), 507, "out_of_memory.gpu.hip"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            507,
            "out_of_memory.cpu.default_cpu_allocator",
        ),
        (RuntimeError("the size of tensor a must match"), 500, "server_error"),
        (EngineUnreachable("No answer from http://127.0.0.1:8000."), 503, "service_unavailable"),
        (UnsupportedCall("this engine reads no soft prompts inside a text"), 422, "not_supported"),
    ],
)
def test_what_fails_inside_the_model_is_answered_and_the_next_request_works(server, model, error, status, kind, caplog):
    def fail(*_):
        raise error

    ask = asking(server)
    handle = model.register_forward_hook(fail)
    answers = [ask("POST", path, GREEDY) for path in ("/api/v1/generate", "/api/extra/generate/stream")]
    openai = ask("POST", "/v1/completions", {"prompt": "The"})
    handle.remove()
    for answer in answers:
        assert answer.status == status and answer.json["detail"]["type"] == kind
        assert str(error) in answer.json["detail"]["msg"]
    assert openai.status == status and openai.json["error"]["type"] == kind
    assert ask("POST", "/api/v1/generate", GREEDY).status == 200


def test_a_failed_generation_lets_go_of_what_it_held(queue):
    held = []

    def generate(settings, softprompts, stop):
        tensor = torch.zeros(1000)
        held.append(weakref.ref(tensor))
        if tensor is not None:
            raise RuntimeError("out of memory")
        yield ""

    generation = queue.submit(SimpleNamespace(generate=generate), GenerationSettings(""), ())
    assert generation.finished.wait(10)
    assert generation.error is not None and held[0]() is None


def test_who_stops_in_the_middle_of_a_request_is_let_go(session, monkeypatch):
    assert 10 <= app._Quiet.timeout <= 300, "not for ever, and long enough for a slow line"
    monkeypatch.setattr(app._Quiet, "timeout", 0.5)
    before = sorted(session.catalogue.folder.iterdir())

    def answer(port, sent):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
            line.sendall(sent)
            return line.makefile("rb").read()

    with Server(session, port=0) as server:
        quiet = simple_websocket.Client(f"ws://127.0.0.1:{server.port}/socket.io/?EIO=4&transport=websocket")
        quiet.send("40")
        assert answer(server.port, b"POST /api/v1/gen") == b""
        for path in (b"/api/v1/generate", b"/api/extra/softprompts/files?filename=half.zip"):
            head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n" % path
            assert b" 400 " in answer(server.port, head + b'{"prompt": "The').splitlines()[0]
        assert sorted(session.catalogue.folder.iterdir()) == before
        session.select("noir.zip")
        heard = ""
        while "noir.zip" not in heard.partition('"selection"')[2]:
            heard = quiet.receive(timeout=10) or pytest.fail("the WebSocket was let go too")
        quiet.close()


def test_closing_tells_those_whose_text_is_not_whole(session, model):
    answers = []
    with slowly(model), Server(session, port=0) as server:
        fields = {**GREEDY, "max_length": 400}

        def one():
            answers.append(asking(server)("POST", "/api/v1/generate", fields))

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(server.queue) == 2)
    for thread in threads:
        thread.join()
    assert [each.status for each in answers] == [503, 503]
    assert answers[0].json["detail"]["msg"] == "The server is closing."


@pytest.mark.timeout(240)  # it waits for a process of its own, on whatever else the machine does
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_answers_who_waits_and_ends_the_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "from kobold_sp_plugin.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "serve", "--port", str(port), "--softprompts", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line.decode())
            if "KoboldAI Lite" in said[-1]:
                break
        assert f"http://127.0.0.1:{port}/" in "".join(said) and "--cors https://lite.koboldai.net" in said[-1]
        ask, answers = asking(SimpleNamespace(port=port)), []
        fields = {"prompt": "The door", "max_length": 900, "ban_eos_token": True}
        waiting = [
            threading.Thread(target=lambda: answers.append(ask("POST", "/api/v1/generate", fields))) for _ in range(3)
        ]
        for thread in waiting:
            thread.start()
        eventually(lambda: ask("GET", "/api/extra/perf").json["queue"] == 3, 20)
        process.send_signal(signal.SIGTERM)
        for thread in waiting:
            thread.join()
        rest = process.stdout.read().decode()
        assert process.wait(20) == 0, rest
        assert [each.status for each in answers] == [503] * 3
        assert "Traceback" not in rest and "Ended." in rest
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
