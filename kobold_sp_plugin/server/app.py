"""The embedded host: the page, the menu's events and KoboldAI's HTTP API, for one session."""

import logging
import mimetypes
import os
import socket
import threading
from typing import Any, Callable, Dict, Optional, Sequence

from flask import Flask, Response, request
from flask_socketio import SocketIO, join_room
from werkzeug.serving import WSGIRequestHandler, make_server

from ..errors import SoftPromptError
from ..menu import OLD_UI, UI2, Menu
from ..session import Session
from .api import add_api
from .characters import Characters
from .fields import LONGEST_BODY, InvalidRequest, read_generation
from .files import add_files
from .generation_queue import Generation, GenerationQueue, describe
from .guard import Guard, is_loopback

log = logging.getLogger(__name__)

_ROOMS = {"1": (OLD_UI,), "2": (UI2,)}
"""KoboldAI's pages say which of them they are (``?ui=``); who does not say it hears both."""
_ENDS = ("done", "stopped", "error")
_LONGEST_ID = 200
_SILENT_SECONDS = 60.0
"""How long a client may neither send the rest of its request nor take one piece that is written to it."""
_LAST_ANSWERS_SECONDS = 2.0
"""How long closing waits for answers that are under way; a client may take one and read no further."""

# A Windows registry may say otherwise, and a browser runs no script of type text/plain.
mimetypes.add_type("text/javascript", ".js")
mimetypes.add_type("text/css", ".css")


class Server:
    """An HTTP and WebSocket server for one session, bound when it is made; the session stays its maker's.

    ``port`` 0 takes a free one. ``origins`` and ``key``: who else may use it, and with what (:class:`.guard.Guard`).
    Raises :class:`OSError` where host and port cannot be bound.
    """

    def __init__(
        self,
        session: Session,
        host: str = "127.0.0.1",
        port: int = 5000,
        origins: Sequence[str] = (),
        key: Optional[str] = None,
    ):
        self._session = session
        bound = _bound(host, port)
        self.port: int = bound.getsockname()[1]
        self.url = f"http://{_shown(host)}:{self.port}/"
        self.queue = GenerationQueue()
        self._characters = Characters(session.catalogue.folder)
        self.app = Flask(__name__)
        self.app.config["MAX_CONTENT_LENGTH"] = LONGEST_BODY
        self.app.add_url_rule("/", view_func=self._page)
        self.app.after_request(_harden)
        add_api(self.app, session, self.queue, self._characters, protected=key is not None)
        add_files(self.app, session, self._characters)
        self.socketio = SocketIO(
            self.app,
            async_mode="threading",
            always_connect=True,  # a client hears that it is connected before it hears anything else
            async_handlers=False,  # a client's events are handled in the order it sent them
            max_http_buffer_size=LONGEST_BODY,
            cors_allowed_origins=[],  # which is: not its business; the guard has seen to it
        )
        self._closing = threading.Event()
        # Engine.IO's threads sleep up to half a minute before they look whether their client is still there
        self.socketio.server.eio.sleep = self._closing.wait
        self._guard = Guard(self.app.wsgi_app, is_loopback(host), origins, key)
        self.app.wsgi_app = self._guard  # type: ignore[method-assign]
        self.menu = Menu(session, self._emit)
        self._generations: Dict[str, Dict[str, Generation]] = {}
        """Of each client, by the client's own ids, what has not ended."""
        self._add_events()
        with bound:
            self._http = make_server(host, 0, self.app, threaded=True, request_handler=_Quiet, fd=bound.fileno())
        self._relay = self.socketio.start_background_task(self.menu.relay, self.socketio.sleep)
        self._thread: Optional[threading.Thread] = None
        self._serving = False

    def serve(self) -> None:
        """Answer requests, until :meth:`close` is called from another thread, or on an interrupt."""
        self._serving = True
        self._http.serve_forever(poll_interval=0.05)

    def start(self) -> None:
        """Answer requests, in a thread of its own."""
        self._serving = True
        self._thread = threading.Thread(target=self.serve, name="server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop every generation, tell who waits for it, let every client go and stop listening."""
        self._closing.set()
        self.queue.close()
        self._guard.wait(_LAST_ANSWERS_SECONDS)
        self.menu.close()
        self._relay.join()
        if self._serving:
            self._http.shutdown()
        if self._thread is not None:
            self._thread.join()
        self._http.server_close()
        for each in list(self.socketio.server.eio.sockets.values()):
            each.close(wait=False)  # one that polls may never come back
        self.socketio.server.eio.shutdown()

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _page(self) -> Response:
        return self.app.send_static_file("index.html")

    def _emit(self, event: str, payload: Any, to: Optional[str]) -> None:
        self.socketio.emit(event, payload, to=to)

    def _add_events(self) -> None:
        @self.socketio.on("connect")
        def connect(*_: Any) -> None:
            rooms = _ROOMS.get(request.args.get("ui", ""), (OLD_UI, UI2))
            for room in rooms:
                join_room(room)
            self._generations[_client()] = {}
            self.menu.connected(_client(), rooms)

        @self.socketio.on("disconnect")
        def disconnect(*_: Any) -> None:
            self.menu.disconnected(_client())
            self._generations.pop(_client(), None)
            self.queue.drop(_client())

        @self.socketio.on_error_default
        def failed(error: Exception) -> None:
            log.exception("An event failed")

        handlers = dict(self.menu.handlers)
        handlers["generate"] = self._generate
        handlers["stop_generation"] = self._stop_generation
        for name, handler in handlers.items():
            self.socketio.on_event(name, _with_client(handler))

    def _generate(self, client: str, payload: Any) -> None:
        """Queue a generation for a client; whatever becomes of it, the client is told by its own id."""
        fields = payload if isinstance(payload, dict) else {}
        own_id: Any = fields.get("id")
        theirs = self._generations.get(client, {})

        def say(state: str, text: str = "", position: int = 0, error: str = "") -> None:
            what = {"id": own_id, "state": state, "text": text, "position": position, "error": error}
            self._emit("generation", what, client)

        def tell(state: str, **what: Any) -> None:
            if state in _ENDS:
                theirs.pop(own_id, None)
            say(state, **what)

        try:
            if not isinstance(own_id, str) or not 0 < len(own_id) <= _LONGEST_ID or own_id in theirs:
                raise InvalidRequest({"id": [f"Expected a text of its own, up to {_LONGEST_ID} characters long."]})
            wanted = read_generation(fields)
            engine = self._session.engine
            if engine is None:
                raise InvalidRequest({"model": ["No model is loaded."]})
            softprompts = wanted.softprompts(self._session, self._characters)
            settings = wanted.with_softprompts(self._session)[0]
            generation = self.queue.submit(engine, settings, softprompts, client, tell, wanted.key)
        except SoftPromptError as error:
            say("error", error=describe(error))  # not tell: the id may be that of one that goes on
            return
        theirs[own_id] = generation
        if generation.finished.is_set():  # it ended before it was noted
            theirs.pop(own_id, None)

    def _stop_generation(self, client: str, payload: Any) -> None:
        own_id = payload.get("id") if isinstance(payload, dict) else None
        generation = self._generations.get(client, {}).get(own_id) if isinstance(own_id, str) else None
        if generation is not None:
            self.queue.stop(generation)


class _Quiet(WSGIRequestHandler):
    """Writes errors to the log, and not every request; sends each piece of a text when it is written."""

    disable_nagle_algorithm = True
    timeout = _SILENT_SECONDS  # else whoever stops in the middle of a request keeps a thread for ever

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        pass

    def log_error(self, format: str, *args: Any) -> None:
        if not format.startswith("Request timed out"):  # browsers open connections that they then have no use for
            super().log_error(format, *args)

    def run_wsgi(self) -> None:
        is_socket = "Upgrade" in self.headers
        if is_socket:  # Engine.IO sees to it that its clients are there
            self.connection.settimeout(None)
        super().run_wsgi()
        if is_socket:  # what may still come is no request
            self.close_connection = True


def _client() -> str:
    """The client whose event is being handled."""
    return request.sid  # type: ignore[attr-defined]


def _with_client(handler: Callable[[str, Any], None]) -> Callable[..., None]:
    def handle(*payload: Any) -> None:
        handler(_client(), payload[0] if payload else "")

    return handle


def _harden(response: Response) -> Response:
    """Add what keeps a browser from guessing types, framing the page elsewhere, or keeping an old one."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Content-Security-Policy"] = "frame-ancestors 'self'"
    response.headers["Cache-Control"] = "no-cache"
    return response


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket. Werkzeug would end the process where the port is taken; this raises :class:`OSError`."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except OSError:
        bound.close()
        raise
    return bound


def _shown(host: str) -> str:
    """``host`` as a browser on this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
