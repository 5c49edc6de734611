"""KoboldAI: what is hooked in the Client, as data, and what our side of each seam does.

KoboldAI runs ``aiserver.py`` as ``__main__``, under eventlet's monkey patching. :func:`arm` is called at the
start of Python, long before that: it waits for ``flask_session``, and then for ``Session(app)``, which the host
calls when everything is defined and no model is loaded. Until then only the standard library is imported.
"""

import contextlib
import html
import inspect
import logging
import os
import sys
import weakref
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from .. import patching
from ..errors import HostError, SoftPromptError
from ..patching import Patch, patch, when_imported

log = logging.getLogger(__name__)

SCRIPT = "aiserver.py"


class Seam(NamedTuple):
    """One thing of the host's that the hook needs; a host that lacks one is left alone."""

    kind: str
    """"function" and "object": globals. "variable": an attribute of the global ``vars``. "event": its handler."""
    name: str
    what: str
    """What we do with it."""
    adapter: str = ""
    """Our method around it; none where it is only used."""
    parameters: Optional[Tuple[str, ...]] = None
    """The names that its parameters must have, where they count."""


CLIENT: Tuple[Seam, ...] = (
    Seam("function", "load_model", "Lets the old model go before, and shows what the new one can do.", "_load_model"),
    Seam(
        "function",
        "patch_causallm",
        "Attaches soft tokens to the model instead of patching every embedding of the process for good, and binds "
        "the global `generator` to the model's own `generate` again, which some branches of the loader did before.",
        "_patch_causallm",
        ("model",),
    ),
    Seam(
        "function",
        "spRequest",
        "Selects in the session, which checks before it changes anything; the HTTP API, scripts and the settings "
        "call it.",
        "_select",
        ("filename",),
    ),
    Seam("function", "_generate", "Waits for a measurement of the effect, or has it wait.", "_generate"),
    Seam("function", "settingschanged", "Called after a choice from the menu, so that the host remembers it."),
    Seam("function", "getmodelname", "Called for the model's name in the menu."),
    Seam("object", "socketio", "Emits, and runs the menu's relay in a green thread."),
    Seam("object", "vars", "Holds the variables below."),
    Seam("variable", "sp", "Stays None: the host prepends nothing by itself."),
    Seam("variable", "sp_length", "Set to the selection's tokens: every budget of the host subtracts it."),
    Seam("variable", "spfilename", "Set to the selected file, the first of several."),
    Seam("variable", "spmeta", "Set to what the old page's status line shows of it."),
    Seam("variable", "allowsp", "Set to whether the model takes soft prompts; the host never takes it back."),
    Seam("event", "connect", "Sends a new client the menu's state, after the host's own greeting.", "_connect"),
    Seam("event", "message", "Answers the menu's three commands; all others are the host's.", "_message"),
)

_COMMANDS = ("splistrequest", "spselect", "sprequest")
_WAIT_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 60.0
"""A generation does not wait longer for a measurement: its turn is a courtesy, and no deadlock may come of it."""


def arm() -> "Hook":
    """Wait for KoboldAI in this process, and attach to it when it is there; whatever fails, the host starts."""
    return Hook()


def attach(host: Dict[str, Any]) -> "Attachment":
    """Hook KoboldAI's Client, in place, by its globals ``host``; its folder is ``softprompts`` where it runs.

    Raises :class:`HostError`, which names what is missing; then nothing was changed.
    """
    faults = list(_faults(host))
    if faults:
        raise HostError(f"this is not a KoboldAI that the hook knows: {'; '.join(faults)}")
    return Attachment(host)


class Hook:
    """Waits for the host; made by :func:`arm`."""

    def __init__(self) -> None:
        self.attached: Optional[Attachment] = None
        self._session: Optional[Patch] = None
        self._import = when_imported("flask_session", self._imported)

    def undo(self) -> None:
        """Take everything back: stop waiting, or leave the host."""
        self._import.cancel()
        if self._session is not None:
            self._session.undo()
        if self.attached is not None:
            self.attached.undo()
            self.attached = None

    def _imported(self, flask_session: ModuleType) -> None:
        self._session = patch(flask_session.Session, "__init__", self._made)

    def _made(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        try:
            caller = _caller()
            if not _is_aiserver(caller):
                return
            assert self._session is not None
            self._session.undo()
            self.attached = attach(caller.f_globals)
            log.info("kobold_sp_plugin is attached to KoboldAI")
        except HostError as error:
            log.warning("kobold_sp_plugin stays out of this host: %s", error)
        except Exception:
            log.exception("kobold_sp_plugin stays out of this host: it could not attach")


class Attachment:
    """What :func:`attach` has changed in a host, and the way back; ``session`` and ``menu`` serve it."""

    def __init__(self, host: Dict[str, Any]):
        from ..menu import Menu
        from ..session import Session

        self._host = host
        self._variables = host["vars"]
        self._socketio = host["socketio"]
        self._model: Callable[[], Any] = lambda: None
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
        """Leave the host: every seam is its own again, and so is the model, which gets the host's own patch."""
        from ..soft_tokens import attach as attach_soft_tokens

        is_ours = self._serves
        self._undo.close()
        model = self._model()
        if model is not None:
            attach_soft_tokens(model).detach()
            self._host["generator"] = model.generate
            self._host["patch_causallm"](model)
        if is_ours:
            self._show_none()

    def _hook(self) -> None:
        events = _events(self._host)
        if "disconnect" not in events:  # the Client has no handler of its own
            events["disconnect"] = lambda *_: None
            self._undo.callback(events.pop, "disconnect", None)
        self._undo.callback(patch(events, "disconnect", self._disconnect).undo)
        for seam in CLIENT:
            if seam.adapter:
                owner = events if seam.kind == "event" else self._host
                self._undo.callback(patch(owner, seam.name, getattr(self, seam.adapter)).undo)

    @property
    def _serves(self) -> bool:
        """Whether the model in use is ours; other backends (TPU, online services) keep the host's own code."""
        return self.session.engine is not None

    # The loader

    def _load_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The host empties every tensor of the process when it loads: no measurement may be running then.
        with contextlib.ExitStack() as self._loading:
            try:
                self._let_go(self._loading)
                self._variables.allowsp = False
                return original(*args, **kwargs)
            finally:
                self._loading = None
                if self._serves:
                    self._variables.allowsp = self.session.takes_softprompts
                    self._show(self.session.status())

    def _let_go(self, loading: contextlib.ExitStack) -> None:
        engine: Any = self.session.engine
        if engine is None:
            return
        self.session.use(None)
        self._show_none()
        while not engine.lock.acquire(blocking=False):
            self._socketio.sleep(_WAIT_SECONDS)
        loading.callback(engine.lock.release)

    def _patch_causallm(self, original: Callable[..., Any], model: Any) -> Any:
        try:
            from ..engines.transformers import TransformersEngine

            engine = TransformersEngine(model, self._host["tokenizer"], str(self._host["getmodelname"]()))
            self._model = weakref.ref(model)
            if self._loading is not None:
                self._loading.enter_context(engine.lock)
            self._show_none()  # what another backend of the host's had selected is nothing to this model
            self.session.use(engine)
            self._host["generator"] = model.generate
        except Exception as error:
            known = isinstance(error, SoftPromptError)
            log.warning("This model gets no soft prompts: %s", error, exc_info=not known)
            self._variables.allowsp = False
        return model

    # The selection

    def _select(self, original: Callable[[str], Any], filename: str) -> Any:
        if not self._serves:
            return original(filename)
        try:
            self.session.select(filename.strip())
        except SoftPromptError as error:
            if self._loading is None:
                raise
            log.warning("The soft prompt of the host's settings cannot be used: %s", error)
            return None
        self._host["settingschanged"]()
        return None

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        engine: Any = self.session.engine
        if engine is None:
            return original(*args, **kwargs)
        has_turn = engine.lock.acquire(timeout=_LONGEST_WAIT_SECONDS)
        try:
            return original(*args, **kwargs)
        finally:
            if has_turn:
                engine.lock.release()

    def _show(self, status: Dict[str, Any]) -> None:
        """Set the host's variables to the selection. Plain attributes: any thread may call this."""
        if not self._serves:
            return
        if not status["selection"]:
            self._show_none()
            return
        filename = status["selection"][0]
        entry = next((each for each in status["entries"] if each["filename"] == filename), {"name": filename})
        # The host's page inserts the name as HTML.
        meta = {key: entry.get(key, "") for key in ("author", "supported", "description")}
        meta.update(name=html.escape(entry["name"]), n_tokens=status["n_tokens"])
        self._variables.sp_length = status["n_tokens"]
        self._variables.spmeta = meta
        self._variables.spfilename = filename

    def _show_none(self) -> None:
        self._variables.spfilename = ""
        self._variables.spmeta = None
        self._variables.sp_length = 0
        self._variables.sp = None

    # The menu

    def _emit(self, event: str, payload: Any, to: Optional[str]) -> None:
        """Emit in the Client, whose clients are all of the old page and in no room."""
        from ..menu import OLD_UI, UI2

        if to != UI2:
            self._socketio.emit(event, payload, to=None if to == OLD_UI else to)

    def _connect(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        from ..menu import OLD_UI

        answer = original(client, *args)
        if answer is not False and self._serves:
            self.menu.connected(client, (OLD_UI,))
        return answer

    def _disconnect(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        self.menu.disconnected(client)
        return original(client, *args)

    def _message(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        payload = args[0] if args else None
        command = payload.get("cmd") if isinstance(payload, dict) else None
        if command not in _COMMANDS or not self._serves:
            return original(client, *args)
        self.menu.message(client, payload)
        if command == "sprequest":
            self._host["settingschanged"]()
        return None


def _faults(host: Dict[str, Any]) -> Iterator[str]:
    """What keeps these globals from being those of a host that is known."""
    events = _events(host)
    for seam in CLIENT:
        if seam.kind == "variable":
            if "vars" in host and not hasattr(host["vars"], seam.name):
                yield f"there is no vars.{seam.name}"
        elif seam.kind == "event":
            if seam.name not in events:
                yield f"nothing handles the event {seam.name!r}"
        elif seam.name not in host:
            yield f"there is no global named {seam.name!r}"
        elif seam.kind == "function":
            yield from _faults_of_function(seam, host[seam.name])


def _faults_of_function(seam: Seam, found: Any) -> List[str]:
    if not callable(found):
        return [f"{seam.name} is no function"]
    parameters = tuple(inspect.signature(found).parameters)
    if seam.parameters is not None and parameters != seam.parameters:
        return [f"{seam.name} takes ({', '.join(parameters)}), not ({', '.join(seam.parameters)})"]
    return []


def _events(host: Dict[str, Any]) -> Dict[str, Callable[..., Any]]:
    """The handlers of the host's socket events, by name; the dictionary that its server looks them up in."""
    handlers = getattr(getattr(host.get("socketio"), "server", None), "handlers", None) or {}
    events: Dict[str, Callable[..., Any]] = handlers.get("/", {})
    return events


def _caller() -> FrameType:
    """The innermost frame that is neither ours nor the patch's."""
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, patching.__name__):
        frame = frame.f_back
    assert frame is not None
    return frame


def _is_aiserver(frame: FrameType) -> bool:
    # By the code's file name: the Client sets its global ``__file__`` to its folder.
    return frame.f_globals.get("__name__") == "__main__" and os.path.basename(frame.f_code.co_filename) == SCRIPT
