"""What the Client and United have in common: the table of seams, the check, and what serves an attached host."""

import contextlib
import html
import inspect
import logging
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ...menu import Menu
from ...patching import patch
from ...session import Session

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.05
_ABSENT = object()


class Seam(NamedTuple):
    """One thing of the host's that the hook needs; a host that lacks one is left alone."""

    kind: str
    """"function" and "value": a global, or an attribute of one, by its dotted path. "event": the handler of a
    socket event."""
    name: str
    what: str
    """What we do with it."""
    adapter: str = ""
    """Our method around it; none where it is only used."""
    parameters: Optional[Tuple[str, ...]] = None
    """The names that its parameters must have, where they count."""


class Attachment:
    """What ``attach`` has changed in a host, and the way back; ``session`` and ``menu`` serve it.

    A host's class names its ``SEAMS`` and has the adapters. What it may need to say otherwise: :meth:`_emit` and
    :meth:`_show`, :meth:`_show_none`.
    """

    SEAMS: ClassVar[Tuple[Seam, ...]]

    def __init__(self, host: Dict[str, Any]):
        self._host = host
        self._socketio = host["socketio"]
        self._loading: Optional[contextlib.ExitStack] = None
        """While the host loads: locks that are held until it is done, so that nothing is measured meanwhile."""
        self._undo = contextlib.ExitStack()
        self.session = Session(Path("softprompts").absolute())
        self._undo.callback(self.session.close)
        try:
            self.menu = Menu(self.session, self._emit)
            self._undo.callback(self.menu.close)
            self.session.subscribe(self._show)
            self.session.watch()
            self._hook()
            self._socketio.start_background_task(self.menu.relay, self._socketio.sleep)
        except BaseException:
            self._undo.close()
            raise

    def undo(self) -> None:
        """Leave the host: every seam is its own again."""
        self._undo.close()

    @property
    def _serves(self) -> bool:
        """Whether the model in use is ours; other backends keep the host's own code."""
        return self.session.engine is not None

    def _hook(self) -> None:
        events = events_of(self._host)
        for seam in self.SEAMS:
            if seam.adapter:
                owner, name = (events, seam.name) if seam.kind == "event" else _owner(self._host, seam.name)
                self._undo.callback(patch(owner, name, getattr(self, seam.adapter)).undo)

    def _let_go(self, loading: contextlib.ExitStack) -> None:
        """Let the engine go before the host loads; a measurement has ended, and none begins before ``loading`` ends."""
        engine: Any = self.session.engine
        if engine is None:
            return
        self.session.use(None)
        self._show_none()
        while not engine.lock.acquire(blocking=False):
            self._socketio.sleep(_WAIT_SECONDS)
        loading.callback(engine.lock.release)

    def _emit(self, event: str, payload: Any, to: Optional[str]) -> None:
        """Emit to a client, to one of KoboldAI's rooms, or to everyone."""
        self._socketio.emit(event, payload, to=to)

    def _show(self, status: Dict[str, Any]) -> None:
        """Set the host's variables to the selection. Any thread may call this."""
        raise NotImplementedError

    def _show_none(self) -> None:
        """Set the host's variables to no soft prompt, whatever is selected."""
        raise NotImplementedError


def shown(status: Dict[str, Any]) -> Dict[str, Any]:
    """The first selected file's metadata, as the host's own ``spmeta`` has it; its page inserts the name as HTML."""
    filename = status["selection"][0]
    entry = next((each for each in status["entries"] if each["filename"] == filename), {"name": filename})
    meta = {key: entry.get(key, "") for key in ("author", "supported", "description")}
    meta.update(name=html.escape(entry["name"]), n_tokens=status["n_tokens"])
    return meta


def faults(host: Dict[str, Any], seams: Sequence[Seam]) -> Iterator[str]:
    """What keeps these globals from being those of a host with these seams."""
    events = events_of(host)
    for seam in seams:
        if seam.kind == "event":
            if seam.name not in events:
                yield f"nothing handles the event {seam.name!r}"
            continue
        found = _found(host, seam.name)
        if found is _ABSENT:
            first = seam.name.split(".")[0]
            if "." not in seam.name:
                yield f"there is no global named {seam.name!r}"
            elif first in host:
                yield f"there is no {seam.name}"
        elif seam.kind == "function":
            yield from _faults_of_function(seam, found)


def _faults_of_function(seam: Seam, found: Any) -> List[str]:
    if not callable(found):
        return [f"{seam.name} is no function"]
    parameters = tuple(inspect.signature(found).parameters)
    if seam.parameters is not None and parameters != seam.parameters:
        return [f"{seam.name} takes ({', '.join(parameters)}), not ({', '.join(seam.parameters)})"]
    return []


def _owner(host: Dict[str, Any], path: str) -> Tuple[Any, str]:
    """What holds the dotted path's last name: the globals, a module or a class."""
    *before, name = path.split(".")
    return (_found(host, ".".join(before)), name) if before else (host, name)


def _found(host: Dict[str, Any], path: str) -> Any:
    first, *rest = path.split(".")
    found = host.get(first, _ABSENT)
    for name in rest:
        found = getattr(found, name, _ABSENT)
    return found


def events_of(host: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The handlers of the host's socket events, by name; the dictionary that its server looks them up in."""
    handlers = getattr(getattr(host.get("socketio"), "server", None), "handlers", None) or {}
    events: Dict[str, Callable[..., Any]] = handlers.get("/", {})
    return events
