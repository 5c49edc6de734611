"""KoboldAI's Client: what is hooked there, as data, and what our side of each seam does."""

import contextlib
import logging
import weakref
from typing import Any, Callable, Dict, Optional, Tuple

from ...errors import SoftPromptError
from ...menu import OLD_UI, UI2
from ...patching import patch
from .attachment import Attachment, Seam, events_of, shown

log = logging.getLogger(__name__)

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
    Seam("value", "socketio", "Emits, and runs the menu's relay in a green thread."),
    Seam("value", "vars", "Holds the variables below."),
    Seam("value", "vars.sp", "Stays None: the host prepends nothing by itself."),
    Seam("value", "vars.sp_length", "Set to the selection's tokens: every budget of the host subtracts it."),
    Seam("value", "vars.spfilename", "Set to the selected file, the first of several."),
    Seam("value", "vars.spmeta", "Set to what the old page's status line shows of it."),
    Seam("value", "vars.allowsp", "Set to whether the model takes soft prompts; the host never takes it back."),
    Seam("event", "connect", "Sends a new client the menu's state, after the host's own greeting.", "_connect"),
    Seam("event", "message", "Answers the menu's three commands; all others are the host's.", "_message"),
)

_COMMANDS = ("splistrequest", "spselect", "sprequest")
_LONGEST_WAIT_SECONDS = 60.0
"""A generation does not wait longer for a measurement: its turn is a courtesy, and no deadlock may come of it."""


class Client(Attachment):
    """The Client, attached."""

    SEAMS = CLIENT

    def __init__(self, host: Dict[str, Any]):
        self._variables = host["vars"]
        self._model: Callable[[], Any] = lambda: None
        super().__init__(host)

    def undo(self) -> None:
        """Leave the host: every seam is its own again, and so is the model, which gets the host's own patch."""
        from ...soft_tokens import attach as attach_soft_tokens

        is_ours = self._serves
        super().undo()
        model = self._model()
        if model is not None:
            attach_soft_tokens(model).detach()
            self._host["generator"] = model.generate
            self._host["patch_causallm"](model)
        if is_ours:
            self._show_none()

    def _hook(self) -> None:
        events = events_of(self._host)
        if "disconnect" not in events:  # the Client has no handler of its own
            events["disconnect"] = lambda *_: None
            self._undo.callback(events.pop, "disconnect", None)
        self._undo.callback(patch(events, "disconnect", self._disconnect).undo)
        super()._hook()

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

    def _patch_causallm(self, original: Callable[..., Any], model: Any) -> Any:
        try:
            from ...engines.transformers import TransformersEngine

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
        if not self._serves:
            return
        if not status["selection"]:
            self._show_none()
            return
        self._variables.sp_length = status["n_tokens"]
        self._variables.spmeta = shown(status)
        self._variables.spfilename = status["selection"][0]

    def _show_none(self) -> None:
        self._variables.spfilename = ""
        self._variables.spmeta = None
        self._variables.sp_length = 0
        self._variables.sp = None

    # The menu

    def _emit(self, event: str, payload: Any, to: Optional[str]) -> None:
        """Emit in the Client, whose clients are all of the old page and in no room."""
        if to != UI2:
            super()._emit(event, payload, None if to == OLD_UI else to)

    def _connect(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
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
