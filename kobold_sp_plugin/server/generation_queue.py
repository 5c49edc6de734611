"""One generation at a time: the rest wait, and clients take turns."""

import logging
import threading
import time
import traceback
from collections import OrderedDict
from contextlib import closing
from typing import Any, Callable, List, Optional, Sequence, Set, Tuple

from ..engines import Ending, Engine, GenerationSettings, Lacking
from ..errors import SoftPromptError
from ..softprompt import SoftPrompt

log = logging.getLogger(__name__)

LONGEST = 64
"""Generations that may wait; one more is refused."""

_REMEMBERED = 64
"""Texts that can still be asked for by their key when they have ended."""

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
        key: str,
    ):
        self.engine = engine
        self.settings = settings
        self.softprompts = tuple(softprompts)
        self.client = client
        self.tell = tell
        self.key = key
        self.notices = engine.lacking(settings) if isinstance(engine, Lacking) else ()
        """What the engine does not do of what is asked for, a sentence each."""
        self.turn = 0
        """Its client's place among clients: the lowest is next, and of these the first that came."""
        self.text = ""
        self.began: Optional[float] = None
        self.first_text: Optional[float] = None
        self.ended: Optional[float] = None
        self.ending: Optional[Ending] = None
        """How it ended, where the engine tells."""
        self.reason = "stop"
        """Why it ended, in the clients' words: this, or "length"."""
        self.error: Optional[BaseException] = None
        self.stopped = threading.Event()
        self.finished = threading.Event()


class GenerationQueue:
    """Runs generations one after the other, in a thread of its own; closing it stops the one that runs.

    Clients take turns: who has many waiting has one of them run between those of the others.
    """

    def __init__(self) -> None:
        self.n_ended = 0
        """Generations that have ended, all counted."""
        self.last: Optional[Tuple[GenerationSettings, Optional[Ending], Tuple[float, float]]] = None
        """Of the one that ended last: its settings, how it ended, seconds before and after its first text."""
        self._changed = threading.Condition()
        self._waiting: List[Generation] = []
        self._remembered: OrderedDict[str, str] = OrderedDict()
        self._running: Optional[Generation] = None
        self._closed = False
        self._noticed: Set[str] = set()
        self._thread = threading.Thread(target=self._work, name="generation-queue", daemon=True)
        self._thread.start()

    def submit(
        self,
        engine: Engine,
        settings: GenerationSettings,
        softprompts: Sequence[SoftPrompt],
        client: Optional[str] = None,
        tell: Tell = lambda state, **what: None,
        key: str = "",
    ) -> Generation:
        """Put a generation into the queue; ``tell`` hears what becomes of it, ``key`` is how others ask for it.

        Raises :class:`QueueFull` or :class:`QueueClosed`.
        """
        generation = Generation(engine, settings, softprompts, client, tell, key)
        for notice in generation.notices:
            if notice not in self._noticed:  # front ends send the same settings each time
                self._noticed.add(notice)
                log.warning("%s", notice)
        with self._changed:
            if self._closed:
                raise QueueClosed
            if len(self._waiting) >= LONGEST:
                raise QueueFull(f"{len(self._waiting)} generations are waiting already; try again later.")
            turns = [each.turn for each in self._all() if each.client == client]
            now = self._running.turn if self._running is not None else min((e.turn for e in self._waiting), default=0)
            generation.turn = max(turns) + 1 if turns else now
            place = sum(each.turn <= generation.turn for each in self._waiting)
            self._waiting.insert(place, generation)
            self._tell_positions(place)
            self._changed.notify_all()
        return generation

    def meant(self, key: str, client: Optional[str]) -> List[Generation]:
        """What a client means that says a key; without one: its own, else the only one there is."""
        with self._changed:
            everything = self._all()
        if key:
            return [each for each in everything if each.key == key]
        theirs = [each for each in everything if each.client == client]
        return everything if not theirs and len(everything) == 1 else theirs

    def text_so_far(self, key: str, client: Optional[str]) -> str:
        """The text of what :meth:`meant` finds, as far as it is; by its key, also for a while after its end."""
        found = self.meant(key, client)
        return found[0].text if found else self._remembered.get(key, "") if key else ""

    def __len__(self) -> int:
        """Generations that run or wait."""
        return len(self._all())

    def stop(self, generation: Generation) -> None:
        """End a generation within one token, or take it out of the queue."""
        self._end([generation])

    def drop(self, client: str) -> None:
        """Stop everything that this client asked for."""
        with self._changed:
            theirs = [each for each in self._all() if each.client == client]
        self._end(theirs)

    def close(self) -> None:
        """Stop everything, with :class:`QueueClosed` as its error, and end the queue's thread."""
        with self._changed:
            self._closed = True
            everything = self._all()
            self._changed.notify_all()
        self._end(everything)
        self._thread.join()

    def _all(self) -> List[Generation]:
        return [each for each in (self._running, *self._waiting) if each is not None]

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
                generation = self._running = self._waiting.pop(0)
                self._tell(generation, "started")
                self._tell_positions()
            self._run(generation)

    def _run(self, generation: Generation) -> None:
        generation.began = time.monotonic()
        try:
            pieces = generation.engine.generate(generation.settings, generation.softprompts, generation.stopped)
            with closing(pieces):
                while True:
                    try:
                        piece = next(pieces)
                    except StopIteration as end:
                        generation.ending = end.value
                        break
                    if generation.first_text is None:
                        generation.first_text = time.monotonic()
                    generation.text += piece
                    self._tell(generation, "text", text=piece)
        except Exception as error:  # the model's fault: whoever waits next must not suffer from it
            if not isinstance(error, SoftPromptError):
                log.exception("A generation failed")
            traceback.clear_frames(error.__traceback__)  # which hold the model's tensors, perhaps all that fit
            generation.error = error.with_traceback(None)
            self._finish(generation, "error", error=describe(error))
        else:
            self._finish(generation, "stopped" if generation.stopped.is_set() else "done")

    def _tell_positions(self, since: int = 0) -> None:
        """Tell those that wait, from this place on, how many come before them; under the lock, so none hears late."""
        ahead = int(self._running is not None)
        for place in range(since, len(self._waiting)):
            self._tell(self._waiting[place], "queued", position=place + ahead)

    def _finish(self, generation: Generation, state: str, **what: Any) -> None:
        """End a generation; who is told so finds it finished."""
        if state == "stopped" and self._closed:
            generation.error = QueueClosed()
        generation.ended = time.monotonic()
        if state == "done" and generation.ending is not None:
            generation.reason = generation.ending.reason
        began = generation.began or generation.ended
        first = generation.first_text or generation.ended
        self.n_ended += 1
        self.last = (generation.settings, generation.ending, (first - began, generation.ended - first))
        if generation.key:
            self._remembered[generation.key] = generation.text
            self._remembered.move_to_end(generation.key)
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
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
