"""What tests of the server share: clients of it, and ways to wait."""

import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import socketio

ROOT = Path(__file__).resolve().parents[1]

GREEDY = {"prompt": "The door opened and", "max_length": 20, "top_k": 1}

LITE = re.compile(r"^event: (.*)\ndata: (.*)(\r?\n){2}", re.MULTILINE)
"""The expression that KoboldAI Lite takes a stream apart with."""


class Answer:
    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self):
        assert self.headers["Content-Type"] == "application/json"
        return json.loads(self.body)

    @property
    def text(self):
        """Of KoboldAI's answer with one text."""
        ((result,),) = self.json.values()
        return result["text"]


def asking(server):
    """A function that asks the server and returns its :class:`Answer`."""

    def ask(method, path, body=None, headers=None):
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    return ask


def as_lite_reads(body):
    """(event, data) of each event; nothing may be left over."""
    text, events = body.decode(), []
    while match := LITE.search(text):
        assert match.start() == 0, "Lite would drop what stands before"
        events.append((match.group(1), json.loads(match.group(2))))
        text = text[match.end() :]
    assert text == ""
    return events


@contextmanager
def reading(server, path, body):
    """A response that has begun; its client hangs up in the end, whether it has read everything or not."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", path, json.dumps(body).encode())
    response = connection.getresponse()
    try:
        yield response
    finally:
        response.close()
        connection.close()


@contextmanager
def connected(server, query=""):
    """A client of the page: what it hears goes into ``client.heard``."""
    client = socketio.Client(reconnection=False)
    client.heard = queue.Queue()
    client.on("*", lambda event, payload=None: client.heard.put((event, payload)))
    client.connect(server.url + query, transports=["websocket"])
    try:
        yield client
    finally:
        client.disconnect()


def hears(client, event, seconds=10, **payload):
    """The next of these events that holds these values."""
    end = time.monotonic() + seconds
    while True:
        name, heard = client.heard.get(timeout=max(0.01, end - time.monotonic()))
        if name == event and all(heard.get(key) == value for key, value in payload.items()):
            return heard


def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def slowly(model, seconds=0.02):
    """Every forward takes at least this long."""
    handle = model.register_forward_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counting(model):
    """A list that grows by one with every forward."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def outlives(server, kill, long_text):
    """A server of ours goes on when the engine behind it is ended in the middle of a text, and says what is wrong.

    Two soft prompts, ``noir.zip`` and ``sea.zip``, are in its folder. ``kill`` ends the engine; ``long_text``: fields
    of a request that takes a while.
    """
    ask = asking(server)
    assert ask("PUT", "/api/extra/softprompts", {"selection": ["noir.zip"]}).status == 200
    with reading(server, "/api/extra/generate/stream", long_text) as response:
        assert response.status == 200
        begun = response.readline()
        kill()
        events = as_lite_reads(begun + response.read())
    assert [event for event, _ in events].count("error") == 1 and events[-1][0] == "error"
    assert "closed the connection" in events[-1][1]["msg"] or "No answer" in events[-1][1]["msg"]
    answer = ask("POST", "/api/v1/generate", GREEDY)
    assert answer.status == 503 and "No answer from" in answer.json["detail"]["msg"]
    assert ask("POST", "/v1/completions", {"prompt": "The"}).status == 503
    with connected(server) as client:
        client.emit("generate", {"id": "1", **GREEDY})
        assert "No answer from" in hears(client, "generation", 30, id="1", state="error")["error"]
        client.emit("load_softprompt", "sea.zip")  # which is taken; that its effect cannot be measured is told
        while "No answer from" not in hears(client, "softprompts", 30, selection=["sea.zip"])["notice"]:
            pass


@contextmanager
def serving(*arguments, cwd=None):
    """``kobold-sp serve`` in a process of its own, and the address that it says it has."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from kobold_sp_plugin.cli import main; main()", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
        # Where the tests themselves run in the background, a shell has them ignore interrupts, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        said = ""
        while "Open " not in said:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said += line
        yield re.search(r"Open (http://127\.0\.0\.1:\d+/)", said).group(1), said, process
    finally:
        process.kill()
        process.communicate()
