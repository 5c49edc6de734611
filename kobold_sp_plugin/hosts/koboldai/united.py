"""KoboldAI United: what is hooked there, as data, and what our side of each seam does.

United's variables emit when they are set, each from the thread that sets it. Ours are therefore set without a
sound, and sent by the menu's relay alone, as in every host.
"""

import contextlib
import html
import logging
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple
from urllib.parse import parse_qs

from ...errors import HostError, NoModel, SoftPromptError
from ...menu import OLD_UI, UI2
from ...patching import patch
from .attachment import Attachment, Elsewhere, Seam, events_of, shown
from .training import Trainings, arguments

log = logging.getLogger(__name__)

UNITED: Tuple[Seam, ...] = (
    Seam("function", "load_model", "Lets the old model go before, and takes the new one in after.", "_load_model"),
    Seam(
        "function",
        "spRequest",
        "Selects in the session, which checks before it changes anything; the HTTP API and scripts call it.",
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
    Seam("function", "valid_softprompt", "Asks the session instead of opening the file.", "_is_usable", ("file",)),
    Seam(
        "function",
        "get_softprompt_desc",
        "Takes the name and the description from the session's entry; the host's own fails where a file has none.",
        "_describe",
        ("item_full_path", "item", "valid_selection"),
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
        ("txt", "gen_mode"),
    ),
    Seam("function", "loadJSON", "Reads the folder again with a story, and sends the menu again.", "_load_story"),
    Seam("function", "emit", "Escapes file names in the host's own status line; its page does not.", "_host_emit"),
    Seam(
        "function",
        "koboldai_settings.system_settings.to_json",
        "Writes the choice that the user made last as `spfilename`: the host reads it back at the next start, and "
        "then forgets it.",
        "_save",
        ("self",),
    ),
    Seam("function", "settingschanged", "Called after a choice, so that the host remembers it."),
    Seam("function", "ValidationError", "Raised with our reason where the host's API answers 422 for it."),
    Seam("function", "koboldai_vars.calc_ai_text", "Called where the selection changes: the page's context bar."),
    Seam(
        "value", "koboldai_settings.multi_story", "Where stories have rooms of their own, the bar waits for the host."
    ),
    Seam("value", "model_backends", "The backends by name, each with the methods of the table below."),
    Seam("value", "socketio", "Emits, and runs the menu's relay in a green thread."),
    Seam("value", "koboldai_vars.model", "The model's name in the menu."),
    Seam("value", "koboldai_vars.max_length", "The context that a generation without an end of its own is held to."),
    Seam("value", "koboldai_vars.aibusy", "Tells that a request of the HTTP API will be refused."),
    Seam("value", "koboldai_vars.genseqs", "The same, while the user has to choose between several texts."),
    Seam("value", "koboldai_vars._system_settings", "Holds the variables below."),
    Seam("value", "koboldai_vars._system_settings.sp", "Stays None: the host prepends nothing by itself."),
    Seam("value", "koboldai_vars._system_settings.sp_length", "Set to the tokens in use: every budget subtracts it."),
    Seam("value", "koboldai_vars._system_settings.spfilename", "Set to the selected file, the first of several."),
    Seam("value", "koboldai_vars._system_settings.spname", "Set to its name."),
    Seam("value", "koboldai_vars._system_settings.spmeta", "Set to what the old page's status line shows of it."),
    Seam("value", "koboldai_vars._system_settings.splist", "Set to all files; those that cannot be used say why."),
    Seam("value", "koboldai_vars._system_settings.allowsp", "Set to whether the model takes soft prompts."),
    Seam("event", "connect", "Sends a new client the menu's state, after the host's own greeting.", "_connect"),
    Seam("event", "message", "Answers the old page's three commands; all others are the host's.", "_message"),
    Seam("event", "load_softprompt", "Selects, and answers the client that asked.", "_load_softprompt"),
    Seam("event", "sp_list_refresh", "Reads the folder again and answers the client that asked.", "_refresh"),
    Seam("event", "load_softprompt_list", "Sends the popup, with names where the host sends paths.", "_popup"),
    Seam(
        "event",
        "create_new_softprompt",
        "Trains with our trainer, in a process of its own; the host's own fails at its first line.",
        "_train",
    ),
    Seam("view", "index", "Adds a script to the old page: an open menu follows the folder.", "_page"),
    Seam(
        "view", "new_ui_index", "Adds a script to the new page: how a training goes, and a way to end it.", "_new_page"
    ),
)

BACKEND: Tuple[Seam, ...] = (
    Seam(
        "function",
        "unload",
        "Lets the model go before the host empties every tensor of the process; and its stopping rules, which the host "
        "would ask of the next model too.",
        "_unload",
    ),
    Seam(
        "function",
        "core_generate",
        "Gives what was fixed to the thread that generates, in its turn.",
        "_run_model",
    ),
    Seam(
        "function",
        "raw_generate",
        "Keeps soft prompts out of what is generated beside the story, as the host does.",
        "_generate_aside",
    ),
    Seam(
        "function",
        "_raw_generate",
        "Holds soft tokens, text and what is generated to the context, where the host asks for more.",
        "_generate_in_context",
    ),
    Seam(
        "function",
        "patch_embedding",
        "Left out: it would patch every embedding of the process for good. Only some backends have it.",
        "_patch_embedding",
    ),
)
"""Methods of every backend, by their bare names; hooked on the instances, of which the host has one each."""

REFUSALS = {
    "Read Only": "no model is loaded",
    "KoboldAI API": "the model runs in another KoboldAI, which is sent text only; select the soft prompt there",
    "KoboldAI Old Colab Method": "the model runs in a notebook, which takes text only",
    "Horde": "the Horde's workers take text only",
    "OpenAI": "the service takes text only",
    "GooseAI": "the service takes text only",
    "KoboldCPP": "koboldcpp, which runs GGUF files, takes text only",
    "ExLlama": "ExLlama embeds token ids in code of its own",
    "ExLlama V2": "ExLlamaV2 embeds token ids in code of its own",
}
"""Why a backend takes no soft prompts, by its name."""

_OPTIONAL = ("patch_embedding",)
_PAGES = {"1": (OLD_UI,), "2": (UI2,)}
_CANCEL = "softprompt_training_cancel"
_NEW_SCRIPT = Path(__file__).with_name("united.js")


class United(Attachment):
    """United, attached."""

    SEAMS = UNITED
    VARIABLES = "koboldai_vars"

    def __init__(self, host: Dict[str, Any]):
        self._system = vars(host[self.VARIABLES]._system_settings)
        self._loads = 0
        """Loads under way: the host begins one by itself at its start, and a user may not wait for it."""
        self._hosts_own = False
        """Whether the backend is a TPU's, which the host gives soft prompts with code of its own."""
        saved = self._system["spfilename"]
        self._remembered: Tuple[str, ...] = (saved,) if isinstance(saved, str) and saved.strip() else ()
        """What the user chose last, whether or not the model in use can take it."""
        missing = [
            f"the backend {name!r} has no {seam.name}"
            for name, backend in host["model_backends"].items()
            for seam in BACKEND
            if seam.name not in _OPTIONAL and not callable(getattr(backend, seam.name, None))
        ]
        if missing or not host["model_backends"]:
            raise HostError(f"this is not a KoboldAI that the hook knows: {'; '.join(missing) or 'no backends'}")
        self._new_script = f"<script>\n{_NEW_SCRIPT.read_text(encoding='utf-8')}</script>\n"
        self.trainings = Trainings(self._tell_of_training)
        super().__init__(host)
        self._show_none()
        self._system["allowsp"] = False

    def undo(self) -> None:
        """Leave the host: every seam is its own again, and so is the model, which gets the host's own patch."""
        from ...soft_tokens import attach as attach_soft_tokens

        backend: Any = self._host.get("model")
        is_ours, engine = self._serves, self._engine
        self.trainings.cancel()
        super().undo()
        model = _model_of(backend)
        if engine is not None and model is not None:
            attach_soft_tokens(model).detach()
        if is_ours:
            self._show_none()
            takes_it = model is not None and hasattr(backend, "patch_embedding")
            self._system["allowsp"] = takes_it
            if takes_it:
                backend.patch_embedding()

    def _hook(self) -> None:
        for backend in self._host["model_backends"].values():
            for seam in BACKEND:
                if hasattr(backend, seam.name):
                    self._undo.callback(patch(backend, seam.name, self._guarded(seam)).undo)
        events = events_of(self._host)
        events[_CANCEL] = lambda *_: self.trainings.cancel()
        self._undo.callback(events.pop, _CANCEL, None)
        super()._hook()

    @property
    def _serves(self) -> bool:
        return not self._has_left and not self._hosts_own

    # The loader

    def _unload(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as unloading:
            self._let_go(unloading)
            result = original(*args, **kwargs)
        core = getattr(sys.modules.get("modeling.inference_model"), "use_core_manipulations", None)
        if core is not None:
            core.get_stopping_criteria = None  # "Basic Huggingface" sets none, and fails with another backend's
        return result

    def _load_model(self, original: Callable[..., Any], model_backend: str, *args: Any, **kwargs: Any) -> Any:
        refusal = "this model could not be loaded"
        self._loads += 1
        with contextlib.ExitStack() as loading:
            try:
                self._let_go(loading)
                result = original(model_backend, *args, **kwargs)
                refusal = ""
                return result
            finally:
                self._loads -= 1
                # The host's first load may end in the middle of a user's, and would tell of a model half loaded.
                if not self._loads:
                    self._loaded(refusal)

    def _loaded(self, refusal: str) -> None:
        """Take in what the host has loaded; where nothing is selected, select what the user chose last."""
        if self._has_left:
            return
        backend: Any = self._host.get("model")
        backends = self._host["model_backends"]
        backend_name = next((name for name, each in backends.items() if each is backend), "")
        self._hosts_own = not refusal and bool(backend.capabilties.uses_tpu)
        if self._hosts_own:
            self.session.use(None)
            return
        self.session.use(self._engine_of(backend, backend_name, refusal))
        if self.session.takes_softprompts and self._remembered and not self.session.selection:
            try:
                self.session.select(self._remembered)
            except SoftPromptError as error:
                self.session.clear(f"What was selected before cannot be used: {error}")
                log.warning("What was selected before cannot be used: %s", error)
        self._show(self.session.status())
        self._send_all()

    def _engine_of(self, backend: Any, backend_name: str, refusal: str) -> Any:
        name, model = str(self._variables.model), _model_of(backend)
        if not refusal and model is not None:
            from ...engines.transformers import TransformersEngine

            try:
                return TransformersEngine(model, backend.tokenizer, name)
            except SoftPromptError as error:
                refusal = str(error)
                log.warning("This model gets no soft prompts: %s", error)
        return Elsewhere(name, refusal or REFUSALS.get(backend_name, f"the backend {backend_name} takes text only"))

    def _patch_embedding(self, original: Callable[..., Any]) -> None:
        """Nothing: soft tokens are attached when the model is loaded."""

    def _load_story(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.session.refresh()
        self._send_all()
        return result

    # The selection

    def _select(self, original: Callable[[str], Any], filename: str) -> Any:
        if not self._serves:
            return original(filename)
        if self._loads:
            return None  # from settings of another release; what was chosen last is selected afterwards
        try:
            self.session.select(filename.strip())
        except SoftPromptError as error:
            raise self._host["ValidationError"](str(error)) from error
        self._remember()
        return None

    def _remember(self) -> None:
        """Have the host's settings hold what is selected now, which the user chose."""
        if self.session.selection != self._remembered:
            self._remembered = self.session.selection
            self._host["settingschanged"]()

    def _save(self, original: Callable[[Any], str], settings: Any) -> str:
        if not self._serves:
            return original(settings)
        saved = object.__new__(type(settings))  # a copy: the host saves from a thread of its own
        vars(saved).update(vars(settings), spfilename=self._remembered[0] if self._remembered else "")
        return original(saved)

    def _is_usable(self, original: Callable[[str], bool], file: str) -> bool:
        if not self._serves:
            return original(file)
        entry = self._entry(file)
        return entry is not None and entry["usable"]

    def _describe(self, original: Callable[..., Any], item_full_path: str, item: Any, valid_selection: bool) -> Any:
        if not self._serves:
            return original(item_full_path, item, valid_selection)
        entry = self._entry(item_full_path) if valid_selection else None
        return [entry["name"], entry["description"]] if entry is not None else [None, None]

    def _entry(self, path: str) -> Optional[Dict[str, Any]]:
        """The session's entry of a file of the folder."""
        if Path(path).absolute().parent != self.session.catalogue.folder.absolute():
            return None
        return next((each for each in self.session.status()["entries"] if each["filename"] == Path(path).name), None)

    # Generations

    def _generate_aside(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        engine = self._engine
        if engine is None or kwargs.get("is_core"):
            return original(*args, **kwargs)
        with engine.override(()):
            return original(*args, **kwargs)

    def _generate_in_context(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._engine is not None and self._n_tokens and self._variables.inference_config.do_core:
            room = self._variables.max_length - self._n_tokens - len(kwargs["prompt_tokens"])
            kwargs["max_new"] = max(1, min(kwargs["max_new"], room))
        return original(*args, **kwargs)

    # The host's variables

    def _show(self, status: Dict[str, Any]) -> None:
        if not self._serves:
            return
        variables = self.menu.variables()
        variables["spmeta"] = shown(status) if status["selection"] else None
        self._system.update(variables, sp=None)
        self._show_length()

    def _show_none(self) -> None:
        self._system.update(spfilename="", spname="Not in Use", spmeta=None, sp=None, sp_length=0)

    def _show_length(self) -> None:
        self._system["sp_length"] = self._n_tokens

    def _send_all(self) -> None:
        """Send every client the menu's state: the host's own loader has sent some of it as it is no longer."""
        for room in (OLD_UI, UI2):
            self.menu.connected(room, (room,))

    # The menu

    def _emit(self, event: str, payload: Any, to: Optional[str]) -> None:
        """Emit; where the soft prompts' length changes, have the host count the context for its bar again."""
        if not self._serves and event != "softprompts":
            return
        super()._emit(event, payload, to)
        if event == "from_server" and payload["cmd"] == "warnmsg":  # which the new page does not know
            notice = {"title": "Soft prompts", "text": html.unescape(payload["data"])}  # and it inserts text as text
            super()._emit("show_error_notification", notice, UI2)
        is_length = event == "var_changed" and payload["name"] == "sp_length" and to == UI2
        if is_length and not self._variables.aibusy and not self._host["koboldai_settings"].multi_story:
            self._variables.calc_ai_text()

    def _connect(self, original: Callable[..., Any], client: str, environ: Any, *args: Any) -> Any:
        answer = original(client, environ, *args)
        query = parse_qs(environ.get("QUERY_STRING", ""))
        if answer is not False and "rely" not in query:
            rooms = _PAGES.get(query.get("ui", [""])[0], ())
            self.menu.connected(client, rooms)
            if UI2 in rooms and self.trainings.status["state"] != "none":
                self._socketio.emit("softprompt_training", self.trainings.status, to=client)
        return answer

    def _message(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        if not self._is_ours(args):
            return original(client, *args)
        return self._choose(self.menu.message, client, args[0])

    def _load_softprompt(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        if not self._serves:
            return original(client, *args)
        return self._choose(self.menu.load_softprompt, client, *args[:1])

    def _refresh(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        return self.menu.sp_list_refresh(client) if self._serves else original(client, *args)

    def _popup(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        return self.menu.load_softprompt_list(client) if self._serves else original(client, *args)

    def _new_page(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        page = original(*args, **kwargs)
        return page.replace("</body>", f"{self._new_script}</body>", 1) if isinstance(page, str) else page

    # Training

    def _train(self, original: Callable[..., Any], client: str, *args: Any) -> Any:
        request = args[0] if args else None
        name = str(request.get("sp_title") or "") if isinstance(request, dict) else ""
        try:
            model, precision = self._model_to_train()
            folder = self.session.catalogue.folder.absolute()
            follow = self.trainings.start(
                name, lambda place: arguments(request, model, precision, folder, place / "initial.txt")
            )
        except SoftPromptError as error:
            told = {"state": "failed", "name": name, "message": str(error)}
            if self.trainings.is_running:  # whose progress stays shown
                self._socketio.emit("show_error_notification", {"title": "Not trained", "text": str(error)}, to=client)
            else:
                self._socketio.emit("softprompt_training", told, to=client)
            return None
        self._socketio.start_background_task(follow, self._socketio.sleep)
        return None

    def _model_to_train(self) -> Tuple[str, str]:
        """The folder, or the name on the hub, of the model in use, and the precision to load it in."""
        backend: Any = self._host.get("model")
        model = _model_of(backend)
        if self._engine is None or model is None:
            why = getattr(self.session.engine, "refusal", "no model is loaded")
            raise NoModel(f"A soft prompt is trained for the model in use, and that cannot be: {why}.")
        is_packed = [name for name in ("8bit", "4bit") if getattr(model, f"is_loaded_in_{name}", False)]
        precision = is_packed[0] if is_packed else "auto"
        local: Any = getattr(backend, "get_local_model_path", lambda: None)()
        for path in (local, model.name_or_path):
            if path and Path(path).is_dir():
                return str(Path(path).absolute()), precision
        return str(model.name_or_path), precision

    def _tell_of_training(self, status: Dict[str, Any]) -> None:
        if not self._has_left:
            self._socketio.emit("softprompt_training", status, to=UI2)
        if status["state"] == "done":
            self.session.refresh()

    def _choose(self, handler: Callable[..., None], *args: Any) -> None:
        before = self.session.selection
        handler(*args)
        if self.session.selection != before:
            self._remember()


def _model_of(backend: Any) -> Any:
    """The transformers model of a backend, without what PEFT has put around it; None where there is none."""
    import torch

    model: Any = getattr(backend, "model", None)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    can_generate = hasattr(model, "generate") and hasattr(model, "get_input_embeddings")
    return model if isinstance(model, torch.nn.Module) and can_generate else None
