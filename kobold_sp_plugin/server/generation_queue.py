"""One generation at a time: the rest wait in the order they came."""

import logging
import threading
from collections import deque
from contextlib import closing
from typing import Any, Callable, Deque, List, Optional, Sequence

from ..engines import Engine, GenerationSettings
from ..errors import SoftPromptError
from ..softprompt import SoftPrompt

log = logging.getLogger(__name__)

LONGEST = 64
"""Generations that may wait; one more is refused."""

Tell = Callable[..., Any]
"""``tell(state, text=..., position=..., error=...)``, from any thread; it must not wait for anything."""


class QueueFull(SoftPromptError):
    """As many generations wait as the queue holds."""


class QueueClosed(SoftPromptError):
    """The queue was closed before the generation's end."""

    def __init__(self) -> None:
        super().__init__("The server is closing.")


class Generation:
    """One request for text. Its engine and its soft prompts are those of the moment it was accepted."""

    def __init__(
        self,
        engine: Engine,
        settings: GenerationSettings,
        softprompts: Sequence[SoftPrompt],
        client: Optional[str],
        tell: Tell,
    ):
        self.engine = engine
        self.settings = settings
        self.softprompts = tuple(softprompts)
        self.client = client
        self.tell = tell
        self.text = ""
        self.error: Optional[BaseException] = None
        self.stopped = threading.Event()
        self.finished = threading.Event()


class GenerationQueue:
    """Runs generations one after the other, in a thread of its own; closing it stops the one that runs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: Deque[Generation] = deque()
        self._running: Optional[Generation] = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="generation-queue", daemon=True)
        self._thread.start()

    def submit(
        self,
        engine: Engine,
        settings: GenerationSettings,
        softprompts: Sequence[SoftPrompt],
        client: Optional[str] = None,
        tell: Tell = lambda state, **what: None,
    ) -> Generation:
        """Put a generation at the end of the queue; ``tell`` hears what becomes of it.

        Raises :class:`QueueFull` or :class:`QueueClosed`.
        """
        generation = Generation(engine, settings, softprompts, client, tell)
        with self._changed:
            if self._closed:
                raise QueueClosed
            if len(self._waiting) >= LONGEST:
                raise QueueFull(f"{len(self._waiting)} generations are waiting already; try again later.")
            position = len(self._waiting) + (self._running is not None)
            self._tell(generation, "queued", position=position)
            self._waiting.append(generation)
            self._changed.notify_all()
        return generation

    def stop(self, generation: Generation) -> None:
        """End a generation within one token, or take it out of the queue."""
        self._end([generation])

    def drop(self, client: str) -> None:
        """Stop everything that this client asked for."""
        with self._changed:
            theirs = [each for each in (self._running, *self._waiting) if each is not None and each.client == client]
        self._end(theirs)

    def close(self) -> None:
        """Stop everything, with :class:`QueueClosed` as its error, and end the queue's thread."""
        with self._changed:
            self._closed = True
            everything = [each for each in (self._running, *self._waiting) if each is not None]
            self._changed.notify_all()
        self._end(everything)
        self._thread.join()

    def _end(self, generations: List[Generation]) -> None:
        with self._changed:
            for generation in generations:
                generation.stopped.set()
            waiting = [each for each in generations if each in self._waiting]
            for generation in waiting:
                self._waiting.remove(generation)
                self._finish(generation, "stopped")
            if waiting:
                self._tell_positions()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                generation = self._running = self._waiting.popleft()
                self._tell(generation, "started")
                self._tell_positions()
            self._run(generation)

    def _run(self, generation: Generation) -> None:
        try:
            pieces = generation.engine.generate(generation.settings, generation.softprompts, generation.stopped)
            with closing(pieces):
                for piece in pieces:
                    generation.text += piece
                    self._tell(generation, "text", text=piece)
        except Exception as error:  # the model's fault: whoever waits next must not suffer from it
            if not isinstance(error, SoftPromptError):
                log.exception("A generation failed")
            generation.error = error
            self._finish(generation, "error", error=describe(error))
        else:
            self._finish(generation, "stopped" if generation.stopped.is_set() else "done")

    def _tell_positions(self) -> None:
        """Tell all that wait how many come before them; under the lock, so that none hears of it too late."""
        for position, generation in enumerate(self._waiting, start=int(self._running is not None)):
            self._tell(generation, "queued", position=position)

    def _finish(self, generation: Generation, state: str, **what: Any) -> None:
        """End a generation; who is told so finds it finished."""
        if state == "stopped" and self._closed:
            generation.error = QueueClosed()
        generation.finished.set()
        self._tell(generation, state, **what)

    def _tell(self, generation: Generation, state: str, **what: Any) -> None:
        try:
            generation.tell(state, **what)
        except Exception:  # a client's fault must not stop the queue
            log.exception("A client could not be told")


def describe(error: BaseException) -> str:
    """An error as a sentence for a user: our own as they are, any other with its type."""
    return str(error) if isinstance(error, SoftPromptError) else f"{type(error).__name__}: {error}"
