"""Changes of a folder, each reported once, when it has settled.

The folder itself is the truth: its stamps (:func:`~kobold_sp_plugin.catalogue.stamps`) are compared with
those of the last report. What watchdog tells only says when to look, and which files are still being written.
"""

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Optional, Set, Tuple, Union

from .catalogue import Stamp, stamps

_LOG = logging.getLogger(__name__)

_QUIET = 0.05
"""Seconds without an event after which a burst of changes is over."""
_LONGEST_BURST = 1.0
"""Seconds after which a burst is looked at even if it goes on."""
_SETTLED = 0.15
"""Seconds for which a file has to look the same, where nothing tells that its writer is done."""
_ABANDONED = 2.0
"""Seconds for which a file has to look the same that its writer has not closed."""
_IDLE = 2.0
"""Seconds between two looks that no event asked for: events get lost, and folders get replaced."""
_MISSING = 0.5
"""Seconds between two looks for a folder that is not there."""
_POLLING = 0.3
"""Seconds between two looks at a folder where nothing tells of changes."""
_SLOW_POLLING = 1.0
"""The same where a look is slow: a network drive, or very many files."""
_SHARE = 0.02
"""Of the time, what looking may take unless the next look is due after ``_SLOW_POLLING``."""

_MOUNTS = "/proc/self/mounts"
_NETWORK_FILE_SYSTEMS = {
    "9p", "afs", "cifs", "drvfs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "prl_fs", "smb3", "smbfs",
    "vboxsf", "virtiofs",
}  # fmt: skip


class Watcher:
    """Watches one folder from a thread of its own until closed; made by :func:`watch`."""

    def __init__(self, folder: Path, on_change: Callable[[], Any], poll: bool, interval: float, longest: float):
        self._folder, self._on_change = folder, on_change
        self._interval, self._longest = interval, longest
        self._events: Optional[_Events] = None if poll else _Events(folder)
        self._reported = _stamps_or_none(folder) or {}
        self._pending: Dict[str, Tuple[Optional[Stamp], float]] = {}
        self._closed = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kobold-sp-watch", daemon=True)
        self._thread.start()
        self._ready.wait(1.0)  # so that what changes from now on is seen as it happens

    @property
    def polls(self) -> bool:
        """Whether the folder is looked at in intervals, because nothing tells of changes."""
        return self._events is None

    def close(self) -> None:
        """Stop watching; returns when the thread has ended, except where the callback itself calls this."""
        self._closed.set()
        events = self._events
        if events is not None:
            events.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while True:
                if self._events is not None and not self._events.arm():
                    self._events = None
                wait = self._look()
                self._ready.set()
                if self._events is None:
                    self._closed.wait(wait)
                else:
                    self._events.wait(wait, self._closed)
                if self._closed.is_set():
                    return
        finally:
            self._ready.set()
            if self._events is not None:
                self._events.disarm()

    def _look(self) -> float:
        """Report what has changed and settled; the seconds until the next look is due."""
        writing, done = self._events.noted() if self._events is not None else (set(), set())
        began = time.monotonic()
        seen = _stamps_or_none(self._folder)
        now = time.monotonic()
        polling = max(self._interval, min((now - began) / _SHARE, self._longest))  # a look that is cheap is often
        if seen is None:
            return polling
        changed = [name for name in {**self._reported, **seen} if self._reported.get(name) != seen.get(name)]
        names_writing, names_done = set(map(_first_part, writing)), set(map(_first_part, done))
        before, self._pending, due = self._pending, {}, []
        settled = []
        for name in changed:
            stamp, since = before.get(name, (None, now))
            if stamp != seen.get(name):
                since = now
            left = since + self._needed(name, seen.get(name), names_writing, names_done) - now
            if left <= 0:
                settled.append(name)
            else:
                self._pending[name] = seen.get(name), since
                due.append(left)
        for name in settled:
            if name in seen:
                self._reported[name] = seen[name]
            else:
                del self._reported[name]
        if self._events is not None:
            self._events.forget(path for path in writing | done if _first_part(path) not in self._pending)
        if settled:
            self._call()
        if self._events is None:
            return self._interval if due else polling  # soon, to see whether it stays so
        return min([*due, _IDLE if os.path.isdir(self._folder) else _MISSING])

    def _needed(self, name: str, stamp: Optional[Stamp], writing: Set[str], done: Set[str]) -> float:
        """Seconds for which a changed file has to look as it does before it is reported."""
        if self._events is None:
            return self._interval * 0.9  # the same at two looks
        if name in writing:
            return _ABANDONED
        if name in done:
            return 0
        if stamp is not None and self._events.tell_of_closing and 0 in stamp[2::4]:
            return _ABANDONED  # just made: what is written to it comes next
        return _SETTLED

    def _call(self) -> None:
        try:
            self._on_change()
        except Exception:
            _LOG.exception("a callback failed that was told of a change of %s", self._folder)


def watch(
    folder: Union[str, Path], on_change: Callable[[], Any], poll: bool = False, interval: Optional[float] = None
) -> Watcher:
    """Start a thread that calls ``on_change()`` after every change of the soft prompts in ``folder``.

    One call for each settled change, or for several that settle together: a file has appeared, been replaced,
    renamed or deleted, a copy has finished, the folder has been removed or made (it may be missing now).
    ``poll``: look in intervals instead of waiting for the system to tell, which is also what happens without
    watchdog, on network drives, and where the system refuses. ``interval``: that many seconds each; unless
    given, as few as cost next to nothing, and at most one.
    """
    folder = Path(folder)
    is_on_network = _is_on_network(folder)
    if interval is None:
        interval = _SLOW_POLLING if is_on_network else _POLLING
    return Watcher(folder, on_change, poll or is_on_network, interval, max(interval, _SLOW_POLLING))


class _Events:
    """watchdog's events of one folder: when to look, and which files are still open for writing."""

    def __init__(self, folder: Path):
        self._folder = os.path.abspath(folder)
        self._changed = threading.Condition()
        self._happened = False
        self._writing: Set[str] = set()
        self._done: Set[str] = set()
        self._observer: Any = None
        self._watched: Optional[Tuple[int, int]] = None
        self.tell_of_closing = sys.platform.startswith("linux")

    def arm(self) -> bool:
        """Watch the folder that is there now; False where that cannot work."""
        try:
            found = os.stat(self._folder)
        except OSError:
            self.disarm()
            return True
        identity = (found.st_dev, found.st_ino)
        with self._changed:
            if self._watched == identity and all(emitter.is_alive() for emitter in self._observer.emitters):
                return True
        self.disarm()
        try:
            self._observer = self._started_observer()
        except FileNotFoundError:
            return True
        except Exception as error:  # missing, refusing, out of watches: looking in intervals works
            _LOG.info("%s is looked at in intervals (%s: %s)", self._folder, type(error).__name__, error)
            return False
        with self._changed:
            self._watched = identity
        return True

    def disarm(self) -> None:
        """Stop watching, with watchdog's threads."""
        observer, self._observer = self._observer, None
        with self._changed:
            self._watched = None
            self._writing.clear()
            self._done.clear()
        if observer is not None:
            observer.stop()
            observer.join()

    def wait(self, seconds: float, closed: threading.Event) -> None:
        """Until ``seconds`` are over, or a burst of events is, or ``closed``."""
        with self._changed:
            if not self._happened and not closed.is_set():
                self._changed.wait(seconds)
            end = time.monotonic() + _LONGEST_BURST
            while self._happened and not closed.is_set() and time.monotonic() < end:
                self._happened = False
                self._changed.wait(_QUIET)
            self._happened = False

    def wake(self) -> None:
        """End a wait."""
        with self._changed:
            self._happened = True
            self._changed.notify_all()

    def noted(self) -> Tuple[Set[str], Set[str]]:
        """Paths being written to, and paths closed, renamed or deleted, since they were forgotten."""
        with self._changed:
            return set(self._writing), set(self._done)

    def forget(self, paths: Iterable[str]) -> None:
        """Forget what was noted of ``paths``: a look has seen what came of it."""
        paths = set(paths)
        with self._changed:
            self._writing -= paths
            self._done -= paths

    def _started_observer(self) -> Any:
        from watchdog.events import FileSystemEventHandler
        from watchdog.observers import Observer
        from watchdog.observers.polling import PollingObserver

        if Observer is PollingObserver:
            raise NotImplementedError("watchdog knows no events of this system")
        handler = FileSystemEventHandler()
        handler.dispatch = self._on_event  # type: ignore[method-assign]
        observer = Observer()
        try:
            observer.schedule(handler, self._folder, recursive=True)
            observer.start()
        except BaseException:
            observer.stop()  # one that never started can have a thread too
            raise
        return observer

    def _on_event(self, event: Any) -> None:
        """Called in watchdog's thread. Opening and reading a file changes nothing, nor does a folder's time."""
        kind = event.event_type
        if kind not in ("created", "modified", "attrib", "closed", "moved", "deleted"):
            return
        if event.is_directory and kind in ("modified", "attrib"):
            return
        with self._changed:
            for path in filter(None, (event.src_path, getattr(event, "dest_path", ""))):
                self._note(os.path.relpath(os.fsdecode(path), self._folder), kind, event.is_directory)
            self._happened = True
            self._changed.notify_all()

    def _note(self, path: str, kind: str, is_directory: bool) -> None:
        if path == os.curdir:  # the folder itself is gone, or another one is there
            self._watched = None
        elif is_directory:
            return
        elif kind in ("closed", "moved", "deleted"):
            self._writing.discard(path)
            self._done.add(path)
        elif kind == "modified" and self.tell_of_closing and path not in self._done:
            self._writing.add(path)


def _first_part(path: str) -> str:
    return path.split(os.sep, 1)[0]


def _stamps_or_none(folder: Path) -> Optional[Dict[str, Stamp]]:
    """The folder's stamps, or None while it cannot be listed."""
    try:
        return stamps(folder)
    except OSError as error:
        _LOG.debug("cannot look at %s: %s", folder, error)
        return None


def _is_on_network(folder: Path) -> bool:
    """Whether the folder is on a file system of another machine, of whose changes Linux tells nothing."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
            fields = [line.split(" ") for line in file]
    except OSError:
        return False
    place = os.path.join(os.path.realpath(folder), "")
    mounts = [(_unescaped(field[1]), field[2]) for field in fields if len(field) > 2]
    covering = [mount for mount in mounts if place.startswith(os.path.join(mount[0], ""))]
    kind = max(covering, key=lambda mount: len(mount[0]))[1] if covering else ""
    return kind in _NETWORK_FILE_SYSTEMS or kind.startswith("fuse.")


def _unescaped(mount_point: str) -> str:
    for escaped, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        mount_point = mount_point.replace(escaped, character)
    return mount_point
