"""The way from a request for text to its answer: into the queue, and out again, whole or as it comes."""

import json
import selectors
import socket
from queue import Empty, SimpleQueue
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

from flask import Response, request

from ..errors import NoModel, SoftPromptError
from ..session import Session
from .characters import Characters
from .fields import GenerationRequest, InvalidRequest, fitted
from .generation_queue import Generation, GenerationQueue
from .refusals import NO_MODEL

_GONE_SECONDS = 0.1
"""How often a request that waits for its text looks whether its client is still there; else with each token."""

_FIRST_SECONDS = 10.0
"""How long a stream waits for its first text, which may turn out to be an error, before it says that all is well."""

_ENDS = ("done", "stopped", "error")


class Said(NamedTuple):
    """What is new of one text of a request: a piece of it, or its end."""

    generation: Generation
    number: int
    text: str
    ended: bool


class Texts:
    """The texts that one HTTP request asked for; closing it, or the client's going away, stops what goes on."""

    def __init__(self, queue: GenerationQueue):
        self._queue = queue
        self._line = request.environ.get("werkzeug.socket")
        self._heard: SimpleQueue[Tuple[int, str, str]] = SimpleQueue()
        self._early: List[Said] = []
        self.generations: List[Generation] = []

    @property
    def error(self) -> Optional[BaseException]:
        """What went wrong first, if anything."""
        return next((each.error for each in self.generations if each.error is not None), None)

    def begin(self, wanted: GenerationRequest, session: Session, characters: Characters, user: str = "") -> None:
        """Queue what is wanted. Raises :class:`InvalidRequest`, :class:`NoModel`, and the queue's errors."""
        engine = session.engine
        if engine is None:
            raise NoModel(NO_MODEL)
        try:
            softprompts = wanted.softprompts(session, characters)
        except SoftPromptError as error:
            raise InvalidRequest({"soft_prompt": [str(error)]}) from error
        client = client_name(user)
        for number, each in enumerate(wanted.with_softprompts(session)):
            settings = fitted(each, engine, softprompts)
            tell = self._teller(number)
            self.generations.append(self._queue.submit(engine, settings, softprompts, client, tell, wanted.key))

    def wait_for_first(self) -> None:
        """Wait a while for the first text or end, so that an error can still be the answer's status."""
        for said in self._events(_FIRST_SECONDS):
            self._early.append(said)
            return

    def events(self) -> Iterator[Said]:
        """What is new, until all texts have ended or the client has gone; in order, nothing is left out."""
        early, self._early = self._early, []
        yield from early
        yield from self._events()

    def close(self) -> None:
        """Stop what has not ended."""
        for generation in self.generations:
            self._queue.stop(generation)

    def _events(self, seconds: float = float("inf")) -> Iterator[Said]:
        left = len(self.generations) - sum(each.ended for each in self._early)
        while left and seconds > 0:
            try:
                number, state, text = self._heard.get(timeout=_GONE_SECONDS)
            except Empty:
                state = ""
                seconds -= _GONE_SECONDS
            if self._line is not None and _is_gone(self._line):
                self.close()
                return
            if state == "text" or state in _ENDS:
                left -= state in _ENDS
                yield Said(self.generations[number], number, text, state in _ENDS)

    def _teller(self, number: int) -> Callable[..., None]:
        def tell(state: str, text: str = "", **what: Any) -> None:
            self._heard.put((number, state, text))

        return tell


def client_name(user: str = "") -> str:
    """Who asks, so that clients take turns: the same program on the same machine, or the same ``user`` of it."""
    return "\n".join((request.remote_addr or "", request.headers.get("User-Agent", ""), user))


def stream(texts: Texts, write: Callable[[], Iterator[str]]) -> Response:
    """A response of server-sent events; whatever becomes of it, nothing that was asked for goes on without it."""
    response = Response(write(), mimetype="text/event-stream")
    response.headers["X-Accel-Buffering"] = "no"  # what stands between must not hold pieces back
    response.call_on_close(texts.close)
    return response


def as_json(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, separators=(",", ":"))


def _is_gone(client: Any) -> bool:
    """Whether the other side has closed the connection: there is something to read, and it is the end."""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            return bool(selector.select(0)) and client.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):  # closed on our side
        return True
