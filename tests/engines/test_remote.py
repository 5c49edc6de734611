"""Engines in other processes, by HTTP: what they answer, and what they fail with."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kobold_sp_plugin.engines.remote import Remote
from kobold_sp_plugin.errors import EngineRefused, EngineUnreachable


@contextmanager
def answering(status, *pieces, pause=0.0):
    """A server that answers everything with these pieces, and its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            try:
                for piece in pieces:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    time.sleep(pause)
            except OSError:  # the client has gone
                pass

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Remote(f"127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def events(remote, stop=None):
    return list(remote.stream("/completion", {}, stop or threading.Event()))


def test_events_until_the_server_says_that_it_is_done():
    with answering(200, b": a comment\n\n", b'data: {"a": 1}\n\ndata:{"a"', b": 2}\n\n", b"data: [DONE]\n\n") as remote:
        assert events(remote) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("status", "said", "error", "why"),
    [
        (200, b'data: {"a": 1}\n\n', EngineUnreachable, "within its answer"),
        (200, b'data: {"error": {"message": "too long"}}\n\n', EngineRefused, "too long"),
        (200, b'error: {"code": 500, "message": "too long"}\n\n', EngineRefused, "too long"),
        (200, b"data: {\n\n", EngineRefused, "no JSON"),
        (400, b'{"error": {"message": "no such model"}}', EngineRefused, "no such model"),
        (302, b"", EngineRefused, "an error without a text"),
        (503, b'{"error": {"message": "Loading model"}}', EngineUnreachable, "not ready: Loading model"),
    ],
)
def test_what_goes_wrong_is_said(status, said, error, why):
    with answering(status, said) as remote, pytest.raises(error, match=why):
        events(remote)


def test_stopping_wakes_who_waits_for_the_next_event():
    stop = threading.Event()
    with answering(200, b'data: {"a": 1}\n\n', b'data: {"a": 2}\n\n', pause=1.0) as remote:
        stream = remote.stream("/completion", {}, stop)
        assert next(stream) == {"a": 1}
        stop.set()
        assert list(stream) == []


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://", "http://127.0.0.1:no"])
def test_what_is_no_address(url):
    with pytest.raises(EngineUnreachable, match="no address"):
        Remote(url)
