"""Who may use a model now."""

import threading
from contextlib import contextmanager
from typing import Callable, Iterator

_LOOK_SECONDS = 0.05
"""How often a generation that waits for its turn looks whether it was stopped."""


class Turns:
    """A lock on one model, which a measurement gets only while nobody who generates wants it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._wanted = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the model to generate, like :class:`threading.Lock`."""
        with self._changed:
            self._wanted += 1
            seconds = (None if timeout < 0 else timeout) if blocking else 0
            has_turn = self._changed.wait_for(lambda: not self._taken, seconds)
            self._wanted -= 1
            self._taken = self._taken or has_turn
            self._changed.notify_all()
            return has_turn

    def acquire_unless(self, stopped: Callable[[], bool]) -> bool:
        """Take the model to generate, and return True; False as soon as ``stopped()`` says that nobody wants it."""
        while not self.acquire(timeout=_LOOK_SECONDS):
            if stopped():
                return False
        return True

    def release(self) -> None:
        """Give the model back."""
        with self._changed:
            self._taken = False
            self._changed.notify_all()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    @contextmanager
    def in_between(self) -> Iterator[None]:
        """Take the model for a moment, as soon as nobody has it or waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and not self._wanted)
            self._taken = True
        try:
            yield
        finally:
            self.release()
