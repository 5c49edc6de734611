"""A real KoboldAI, copied, started with the hook in or without, and driven as its users do."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HOOK = REPOSITORY / "hooks" / "koboldai"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_SECONDS = 120


def make_models(python, folder, families):
    """Write ``tiny-FAMILY`` folders with the host's own libraries."""
    script = Path(__file__).with_name("real_models.py")
    subprocess.run([python, str(script), str(folder), *families], check=True, timeout=300, env=environment())
    return folder


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "BROWSER": "true", "TRANSFORMERS_OFFLINE": "1", **more}


class RealHost:
    """``aiserver.py`` of a copy of ``checkout`` in ``place``, as a process of its own."""

    def __init__(self, checkout, python, place, arguments, armed=True, fill=None, start=True, **more):
        self.place, self.python, self.arguments, self.armed, self.more = place, python, arguments, armed, more
        if not place.exists():
            shutil.copytree(checkout, place, symlinks=True, ignore=shutil.ignore_patterns(".git"))
            (place / "softprompts").mkdir(exist_ok=True)
        if fill is not None:
            fill(place)
        self.log = place.with_suffix(".log")
        self.process = None
        if start:
            self.start()

    def start(self, until_it_listens=True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        path = []
        if self.armed:  # the folder of the hook's files becomes one in which `.pth` files count
            start = self.place / "start of Python"
            start.mkdir(exist_ok=True)
            (start / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(HOOK)!r})\n")
            path = [str(start), str(REPOSITORY)]
        began = time.monotonic()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [self.python, "aiserver.py", "--port", str(self.port), *self.arguments],
                cwd=self.place,
                env=environment(PYTHONPATH=os.pathsep.join(path), **self.more),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if until_it_listens:
            while not self._listens():
                assert self.process.poll() is None, self.text_of_log()[-4000:]
                assert time.monotonic() < began + START_SECONDS, self.text_of_log()[-4000:]
                time.sleep(0.02)
            self.start_seconds = time.monotonic() - began

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)

    def restart(self):
        self.stop()
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def _listens(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def text_of_log(self):
        return self.log.read_text(errors="replace")

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def softprompts(self):
        return self.place / "softprompts"

    def ask(self, method, route, body=None):
        """The status and the answer of a route of the HTTP API."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/api/v1/{route}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            return error.code, json.loads(text) if text[:1] in "{[" else text

    def generate(self, prompt="The door opened and", seed=7, **settings):
        """The texts that the HTTP API writes."""
        body = {"prompt": prompt, "max_length": 12, "sampler_seed": seed, "top_k": 20, "temperature": 1.0, **settings}
        status, answer = self.ask("POST", "generate", body)
        assert status == 200, (status, answer)
        texts = [each["text"] for each in answer["results"]]
        return texts[0] if len(texts) == 1 else texts


class Wire:
    """A page's socket, without the page; ``query`` as KoboldAI's pages send it."""

    def __init__(self, host, query=""):
        import socketio

        self._heard = []
        self._news = threading.Condition()
        self._socket = socketio.Client(reconnection=False, handle_sigint=False)
        self._socket.on("*", self._hear)
        self._socket.connect(host.url + query, transports=["websocket"], wait_timeout=30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.eio.disconnect()  # the one that waits for its threads

    def _hear(self, event, payload=None):
        with self._news:
            self._heard.append((event, payload))
            self._news.notify_all()

    @property
    def heard(self):
        with self._news:
            return list(self._heard)

    def forget(self):
        with self._news:
            self._heard.clear()

    def emit(self, event, payload):
        """Send an event; what was heard before it is forgotten."""
        self.forget()
        self._socket.emit(event, payload)

    def say(self, command, data="", **more):
        """Send a command of the old page."""
        self.emit("message", {"cmd": command, "data": data, **more})

    def hears(self, what, seconds=30, when=lambda data: True):
        """The data of the first such event, or ``from_server`` of such a command, since something was sent."""

        def found():
            for event, payload in self._heard:
                is_command = event == "from_server" and isinstance(payload, dict)
                name, data = (payload.get("cmd"), payload.get("data")) if is_command else (event, payload)
                if name == what and when(data):
                    return [data]
            return []

        with self._news:
            assert self._news.wait_for(found, seconds), f"no {what}, but {str(self._heard)[:3000]}"
            return found()[0]


def eventually(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
