"""What the extension has changed in its host, the model and the selection, and the way back."""

import contextlib
import importlib
import inspect
import os
import threading
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List, Optional, Sequence

from ...errors import ContextExceeded, HostError, SelectionError, SoftPromptError
from ...patching import patch, when_imported
from ...session import MOST_SELECTED, Session
from . import selection_file
from .api import REQUEST_FIELD, TYPES, extend
from .generation import Chosen, carry, unload
from .host import OLDEST, faults, log
from .model import LONGEST_WAIT_SECONDS, HookedModel, RefusingEngine
from .seams import Adapters


class Attachment:
    """What the extension has changed in its host, and the way back. Raises :class:`HostError`, changing nothing."""

    def __init__(self, state_modifier: Callable[..., Any]) -> None:
        found = list(faults())
        if found:
            raise HostError(
                f"this is not a text-generation-webui that the extension knows ({OLDEST} or later): {'; '.join(found)}"
            )
        self._state_modifier = state_modifier
        self.shared: Any = importlib.import_module("modules.shared")
        self._extensions: Any = importlib.import_module("modules.extensions")
        data = getattr(self.shared, "user_data_dir", None) or ("user_data" if os.path.isdir("user_data") else "")
        self.folder = Path(data).absolute() / "softprompts"
        self.failure = ""
        """Why the last generation failed, where soft prompts are the reason."""
        self._recalled = ""
        """Why what was chosen last cannot be chosen again."""
        self.revision = 0
        """Grows with every change of what the block shows."""
        self._syncing = threading.RLock()
        self._seen: Callable[[], Any] = _nothing
        self.model: Optional[HookedModel] = None
        self._turn: Any = threading.Lock()
        """The last model's: held while it generates or is measured."""
        self.adapters = Adapters(self)
        self._undo = contextlib.ExitStack()
        self._left = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(f"the folder {self.folder} cannot be made: {error.strerror or error}") from error
        self._remembered = selection_file.read(self._selection_file)
        self.session = Session(self.folder)
        self._undo.callback(self.session.close)
        try:
            self.session.subscribe(lambda status: self.changed())
            self._hook()
            self.session.watch()
            self.sync()
        except BaseException:
            self._undo.close()
            raise

    def undo(self) -> None:
        """Leave the host: every function is its own again, and so is the model."""
        with self._syncing:
            self._left = True  # a page that is still open, and a request under way, go on asking
            self._undo.close()
            self._release()

    @property
    def enabled(self) -> bool:
        """Whether the extension is still among those that the host runs: a restart of its interface may end that."""
        return not self._left and any(
            getattr(each, "state_modifier", None) == self._state_modifier for each, _ in self._extensions.iterator()
        )

    # The model

    def sync(self) -> None:
        """Take notice of the model that the host has now; cheap where it is the one known."""
        with self._syncing:
            if self._left:
                return
            model = self.shared.model
            if model is self._seen() and (model is not None or self._seen is _nothing):
                return
            if model is not None and self.shared.tokenizer is None:
                return  # the host assigns the model first, and then its tokenizer
            self._release()
            if model is None:
                return
            self._seen = weakref.ref(model)
            name = " + ".join([str(self.shared.model_name), *map(str, getattr(self.shared, "lora_names", []))])
            try:
                self.model = HookedModel(self, model, self.shared.tokenizer, name)
                self._turn = self.model.engine.lock
                self.session.use(self.model.engine)
            except Exception as error:
                if not isinstance(error, SoftPromptError):
                    log().exception("Soft prompts cannot be used with %s", name)
                self._release()
                self._seen = weakref.ref(model)
                self.session.use(RefusingEngine(model, name, str(error)))
            self._recall()

    def _release(self) -> None:
        self._seen = _nothing
        self.session.use(None)  # before the model is let go: an engine that is told of it attaches again
        model, self.model = self.model, None
        if model is not None:
            model.undo()

    def _recall(self) -> None:
        """Select again what was chosen last, where a model took it off or there was none."""
        self._recalled = self.failure = ""
        if self._remembered and not self.session.selection and self.session.takes_softprompts:
            try:
                self.session.select(self._remembered)
            except SoftPromptError as error:
                self._recalled = f"What was chosen last cannot be used now: {error}"
                self.changed()

    def _load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A loader: no measurement may keep the old model in memory while the new one is read."""
        with self._syncing:
            if self.shared.model is None:
                self._release()
        if self._turn.acquire(timeout=LONGEST_WAIT_SECONDS):
            self._turn.release()
        return original(*args, **kwargs)

    # The selection

    def select(self, filenames: Sequence[str]) -> None:
        """Select these files, in order, and remember them; none clears. Raises what ``Session.select`` raises."""
        with self._syncing:  # what is remembered is what is selected, whoever else chooses at this moment
            self.sync()
            self.session.select(list(filenames))
            self._remembered = list(filenames)
            self._recalled = self.failure = ""
            self.changed()
            selection_file.write(self._selection_file, self._remembered)

    @property
    def notices(self) -> List[str]:
        """What a user has to know; of a choice that a model took off, once."""
        return [each for each in (self.session.status()["notice"] or self._recalled, self.failure) if each]

    def generated(self, failure: str = "") -> None:
        """Take notice that a generation has ended, and why it failed if soft prompts are the reason."""
        if failure != self.failure:
            self.failure = failure
            self.changed()

    @property
    def _selection_file(self) -> Path:
        return self.folder.with_name("softprompts.json")

    def asked(self, value: Any) -> Chosen:
        """The soft prompts that a request's field asks for. Raises :class:`SoftPromptError`."""
        if isinstance(value, Chosen):
            return value
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise SelectionError(f"{REQUEST_FIELD} is a file name, or a list of file names")
        names = [name.strip() for name in names if name.strip()]
        if len(names) > MOST_SELECTED:
            raise SelectionError(f"{len(names)} soft prompts at once; at most {MOST_SELECTED} can be asked for")
        self.sync()
        engine = self.session.engine
        if engine is None and names:  # idle: the host loads the model again when it generates
            try:
                return Chosen([self.session.catalogue.load(name) for name in names])
            except OSError as error:
                raise SelectionError(f"it cannot be read: {error.strerror or error}") from error
        chosen = Chosen([self.session.softprompt(name) for name in names])
        if engine is not None and engine.context is not None and chosen.n_tokens >= engine.context:
            raise ContextExceeded(f"{chosen.n_tokens} soft tokens leave no room in the model's {engine.context}")
        return chosen

    def chosen(self, state: Any) -> Chosen:
        """The soft prompts of a generation that begins now with ``state``."""
        asked = state.get(REQUEST_FIELD) if isinstance(state, dict) else None
        return Chosen(self.session.softprompts) if asked is None else self.asked(asked)

    @property
    def n_tokens(self) -> int:
        """Soft tokens that a generation with the selection reads now."""
        return self.session.n_tokens if self.model is not None and self.enabled else 0

    def changed(self) -> None:
        """What the block shows is another."""
        self.revision += 1

    # A generation

    def carrying(self, state: Dict[str, Any]) -> Dict[str, Any]:
        """``state`` itself where the model takes no soft prompts, else a copy with its soft prompts and their room."""
        self.sync()
        if self._left:
            return state
        model = self.model
        if model is not None:
            return carry(state, self.chosen(state).softprompts, model.engine.context)
        if self.session.engine is None and self.session.selection:
            return carry(state, self.chosen(state).softprompts, None)  # idle: the host loads the model again
        return state

    def carried(self, kwargs: Dict[str, Any]) -> Chosen:
        """The soft prompts of a call of ``generate``; the host's list in ``kwargs`` becomes a copy of its own."""
        chosen = unload(kwargs)
        if chosen is None and self.session.selection and self.enabled:
            log().warning(
                "A generation runs without the selected soft prompt: it was begun past the extensions, or "
                "another one has replaced state['logits_processor']."
            )
        return chosen or Chosen(())

    # Hooking

    def _hook(self) -> None:
        models = importlib.import_module("modules.models")
        for name, value in list(vars(models).items()):
            if name.endswith("_loader") and inspect.isfunction(value):
                self._undo.callback(patch(models, name, self._load).undo)
        self.adapters.hook(self._undo)
        for module in TYPES:
            self._undo.callback(when_imported(module, self._extend_requests).cancel)

    def _extend_requests(self, module: ModuleType) -> None:
        extend(module, self._resolved, self._undo)

    def _resolved(self, value: Any) -> Optional[Chosen]:
        return None if value is None or not self.enabled else self.asked(value)


def _nothing() -> None:
    return None
