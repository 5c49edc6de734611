"""KoboldAI's Client: what is hooked there, as data, and what our side of each seam does."""

import contextlib
import io
import logging
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from ...errors import SoftPromptError
from ...menu import OLD_UI, UI2, described
from ...patching import patch
from .attachment import Attachment, Elsewhere, Seam, events_of, shown

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
    Seam(
        "function",
        "fileops.getspfiles",
        "Lists what the session lists and can use; for the HTTP API.",
        "_list",
        ("model_dimension",),
    ),
    Seam(
        "function",
        "fileops.checksp",
        "Checks as selecting would, and answers with our reason; for the HTTP API's validator.",
        "_check",
        ("filename", "model_dimension"),
    ),
    Seam(
        "function",
        "_generate_text",
        "Has a request of the HTTP API read its own soft prompt, which nobody's selection changes, nor it theirs.",
        "_answer_request",
        ("body",),
    ),
    Seam(
        "function",
        "calcsubmit",
        "Fixes what a generation reads before its budget is counted, until it ends.",
        "_submit",
        ("txt",),
    ),
    Seam("function", "_generate", "Gives what was fixed to the thread that generates, in its turn.", "_run_model"),
    Seam("function", "emit", "Escapes file names in the host's own status line; its page does not.", "_host_emit"),
    Seam("function", "settingschanged", "Called after a choice, so that the host remembers it."),
    Seam("function", "getmodelname", "Called for the model's name in the menu."),
    Seam("function", "ValidationError", "Raised with our reason where the host's API answers 422 for it."),
    Seam("value", "socketio", "Emits, and runs the menu's relay in a green thread."),
    Seam("value", "vars", "Holds the variables below."),
    Seam("value", "vars.model", "Tells the kind of backend."),
    Seam("value", "vars.aibusy", "Tells that a request of the HTTP API will be refused."),
    Seam("value", "vars.genseqs", "The same, while the user has to choose between several texts."),
    Seam("value", "vars.sp", "Stays None: the host prepends nothing by itself."),
    Seam("value", "vars.sp_length", "Set to the tokens in use: every budget of the host subtracts it."),
    Seam("value", "vars.spfilename", "Set to the selected file, the first of several."),
    Seam("value", "vars.spmeta", "Set to what the old page's status line shows of it."),
    Seam("value", "vars.allowsp", "Set to whether the model takes soft prompts; the host never takes it back."),
    Seam("event", "connect", "Sends a new client the menu's state, after the host's own greeting.", "_connect"),
    Seam("event", "message", "Answers the menu's three commands; all others are the host's.", "_message"),
    Seam("view", "index", "Adds a script to the page: an open menu follows the folder.", "_page"),
)

REFUSALS = {
    "ReadOnly": "no model is loaded",
    "InferKit": "InferKit's service takes text only",
    "Colab": "the model runs in a notebook, which takes text only",
    "API": "the model runs in another KoboldAI, which is sent text only; select the soft prompt there",
    "CLUSTER": "the Horde's workers take text only",
    "OAI": "the service takes text only",
    "GooseAI": "the service takes text only",
}
"""Why a backend takes no soft prompts, by its name in ``vars.model``."""

TPU = ("TPUMeshTransformerGPTJ", "TPUMeshTransformerGPTNeoX")
"""Backends that the host gives soft prompts by itself, with code of its own that stays as it is."""

_COMMANDS = ("splistrequest", "spselect", "sprequest")
_SCRIPT = Path(__file__).with_name("client.js")


class Client(Attachment):
    """The Client, attached."""

    SEAMS = CLIENT

    def __init__(self, host: Dict[str, Any]):
        self._variables = host["vars"]
        self._model: Callable[[], Any] = lambda: None
        self._script = f"<script>\n{_SCRIPT.read_text(encoding='utf-8')}</script>\n"
        super().__init__(host)
        self.answers += (host["ValidationError"],)

    def undo(self) -> None:
        """Leave the host: every seam is its own again, and so is the model, which gets the host's own patch."""
        from ...soft_tokens import attach as attach_soft_tokens

        is_ours = self._serves
        super().undo()
        model, self._model = self._model(), lambda: None
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
                self._loaded()

    def _loaded(self) -> None:
        """Show what the backend that is there now can do."""
        if self._has_left:
            return
        backend = self._variables.model
        uses_tpu = backend in TPU or getattr(self._variables, "use_colab_tpu", False)
        if self.session.engine is None and not uses_tpu:
            name = backend if backend in REFUSALS else str(self._host["getmodelname"]())
            self.session.use(Elsewhere(name, REFUSALS.get(backend, "this model could not be loaded")))
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
        except SoftPromptError as error:
            log.warning("This model gets no soft prompts: %s", error)
            self.session.use(Elsewhere(str(self._host["getmodelname"]()), str(error)))
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
                raise self._host["ValidationError"](str(error)) from error
            # The settings keep the name: the file may be back at the next start.
            self.session.clear(f"The soft prompt of the settings cannot be used: {error}")
            log.warning("The soft prompt of the settings cannot be used: %s", error)
            return None
        self._host["settingschanged"]()
        return None

    def _list(self, original: Callable[..., List[Dict[str, Any]]], model_dimension: int) -> List[Dict[str, Any]]:
        if not self._serves:
            return original(model_dimension)
        self.session.refresh()
        keys = ("filename", "name", "author", "supported", "n_tokens")
        usable = [entry for entry in self.session.status()["entries"] if entry["usable"]]
        return [{**{key: entry[key] for key in keys}, "description": described(entry)} for entry in usable]

    def _check(self, original: Callable[..., Any], filename: str, model_dimension: int) -> Any:
        if not self._serves:
            return original(filename, model_dimension)
        try:
            softprompt = self.session.softprompt(filename)
        except SoftPromptError as error:
            raise self._host["ValidationError"](str(error)) from error
        # As the host answers: an open file, the version of its tensor's header, shape, order and dtype.
        return io.BytesIO(), (1, 0), softprompt.rows.shape, False, softprompt.rows.dtype

    # Generations

    def _submit(self, original: Callable[..., Any], txt: str) -> Any:
        if self._engine is None:
            return original(txt)
        with self._generation(self.session.softprompts):
            return original(txt)

    def _answer_request(self, original: Callable[..., Any], body: Any) -> Any:
        filename = getattr(body, "soft_prompt", None)
        if self._engine is None or self._variables.aibusy or self._variables.genseqs:  # then it is refused
            return original(body)
        softprompts = self.session.softprompts
        if filename is not None:
            try:
                softprompts = (self.session.softprompt(filename.strip()),) if filename.strip() else ()
            except SoftPromptError as error:
                raise self._host["ValidationError"]({"soft_prompt": [str(error)]}) from error
            body.soft_prompt = None  # the host would select it, and select the user's again at the end
        with self._generation(softprompts):
            return original(body)

    # The host's variables

    def _show(self, status: Dict[str, Any]) -> None:
        if not self._serves:
            return
        if status["selection"]:
            self._variables.spmeta = shown(status)
            self._variables.spfilename = status["selection"][0]
        else:
            self._show_none()
        self._show_length()

    def _show_none(self) -> None:
        self._variables.spfilename = ""
        self._variables.spmeta = None
        self._variables.sp_length = 0
        self._variables.sp = None

    def _show_length(self) -> None:
        self._variables.sp_length = self._n_tokens

    # The menu

    def _emit(self, event: str, payload: Any, to: Optional[str]) -> None:
        """Emit in the Client, whose clients are all of the old page and in no room."""
        if to != UI2:
            super()._emit(event, payload, None if to == OLD_UI else to)

    def _host_emit(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        payload = args[1] if len(args) > 1 else None
        if isinstance(payload, dict) and payload.get("cmd") == "spstatitems" and self._serves:
            args = (args[0], {**payload, "data": self.menu.status_line()}, *args[2:])
        return original(*args, **kwargs)

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
        before = self._variables.spfilename
        self.menu.message(client, payload)
        if self._variables.spfilename != before:
            self._host["settingschanged"]()
        return None

    def _page(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        page = original(*args, **kwargs)
        return page.replace("</body>", f"{self._script}</body>", 1) if isinstance(page, str) else page
