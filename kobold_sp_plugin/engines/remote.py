"""A server that answers JSON, and streams it as server-sent events: what engines in other processes have in common."""

import http.client
import json
import socket
import threading
from contextlib import closing, contextmanager, suppress
from typing import Any, Dict, Generator, Iterator, Optional
from urllib.parse import urlsplit

from ..errors import EngineRefused, EngineUnreachable

_SECONDS = 10
"""How long an answer that takes no model may take."""
_GENERATION_SECONDS = 600
"""How long a token may take to come: a busy server makes requests wait."""
_LONGEST_ANSWER = 2**26
_LONGEST_EVENT = 2**22


class Remote:
    """One server, by its URL; every request has a connection of its own, so that any thread may make one.

    Nothing but the given URL is ever asked: redirections and proxies are not followed.
    """

    def __init__(self, url: str, api_key: Optional[str] = None):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise EngineUnreachable(f"{url} is no address of a server: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EngineUnreachable(f"{url} is no address of a server; expected one like http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/")
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def ask(self, route: str, body: Optional[Dict[str, Any]] = None, seconds: float = _SECONDS) -> Any:
        """The answer of ``route``: GET, or POST where there is a ``body``.

        Raises :class:`EngineUnreachable`, or :class:`EngineRefused` with what the server says.
        """
        with self._asked(route, body, seconds) as response:
            try:
                return json.loads(response.read(_LONGEST_ANSWER))
            except (ValueError, RecursionError) as error:
                raise EngineRefused(f"{self.url}{route} did not answer in JSON; is another program there?") from error

    def stream(
        self, route: str, body: Dict[str, Any], stop: threading.Event, seconds: float = _GENERATION_SECONDS
    ) -> Generator[Any, None, None]:
        """The events of an answer, as they come; ends at once when ``stop`` is set, and then closes the connection.

        Raises what :meth:`ask` raises; also where the stream ends before the server says that it does.
        """
        with self._asked(route, body, seconds, stop) as response:
            try:
                while not stop.is_set():
                    line = response.readline(_LONGEST_EVENT)
                    if not line:
                        raise EngineUnreachable(f"{self.url} closed the connection within its answer.")
                    name, _, data = line.strip().partition(b":")
                    if name not in (b"data", b"error"):
                        continue
                    if data.strip() == b"[DONE]":
                        return
                    event = json.loads(data)
                    if name == b"error" or (isinstance(event, dict) and "error" in event):
                        raise EngineRefused(f"{self.url}: {_message(event)}")
                    yield event
            except (ValueError, RecursionError) as error:
                if not stop.is_set():
                    raise EngineRefused(f"{self.url} streamed what is no JSON: {error}") from error

    @contextmanager
    def _asked(
        self, route: str, body: Optional[Dict[str, Any]], seconds: float, stop: Optional[threading.Event] = None
    ) -> Iterator[Any]:
        """The response; ``stop``, once it is set, closes the connection under whoever reads."""
        with closing(self._connection(self._host, self._port, timeout=seconds)) as connection:
            done = threading.Event()
            try:
                data = None if body is None else json.dumps(body).encode()
                connection.connect()
                if stop is not None:
                    watcher = threading.Thread(
                        target=_close_when_stopped, args=(connection.sock, stop, done), name="engine-stop", daemon=True
                    )
                    watcher.start()
                connection.request("GET" if body is None else "POST", self._path + route, data, self._headers)
                response = connection.getresponse()
                if response.status == 503:
                    said = _message(_json_or_text(response.read(_LONGEST_ANSWER)))
                    raise EngineUnreachable(f"{self.url} is not ready: {said}")
                if response.status >= 300:
                    raise EngineRefused(f"{self.url}: {_message(_json_or_text(response.read(_LONGEST_ANSWER)))}")
                yield response
            except (OSError, http.client.HTTPException) as error:
                if stop is None or not stop.is_set():
                    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    raise EngineUnreachable(f"No answer from {self.url}: {reason}.") from error
            finally:
                done.set()


def _close_when_stopped(sock: socket.socket, stop: threading.Event, done: threading.Event) -> None:
    """Wake whoever reads from ``sock`` as soon as ``stop`` is set: a read waits for the next token at least."""
    while not done.wait(0.05):
        if stop.is_set():
            with suppress(OSError):  # it is closed already
                sock.shutdown(socket.SHUT_RDWR)
            return


def _json_or_text(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data[:300].decode(errors="replace")


def _message(answer: Any) -> str:
    """What an answer says is wrong: OpenAI's shape, FastAPI's, or whatever there is."""
    if isinstance(answer, dict):
        for key in ("error", "detail", "message"):
            if key in answer:
                return _message(answer[key])
    return str(answer)[:500] or "an error without a text"
