"""text-generation-webui: what is hooked there, as data, and what our side of each seam does.

The host executes the extension's script again at every restart of its interface, and forgets the old one;
what has to stay lives here, in :data:`extension`. A generation's soft prompts travel with it: the host hands
``state["logits_processor"]``, a list, from the state to ``model.generate`` as it is, so that what hangs on the
list arrives there, whichever thread generates. The list itself gets nothing: no sampler sees a soft token.
"""

import contextlib
import importlib
import inspect
import json
import logging
import os
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from ...compatibility import ModelFacts
from ...errors import ContextExceeded, HostError, NoModel, SelectionError, SoftPromptError, UnsupportedModel
from ...patching import patch, when_imported
from ...session import MOST_SELECTED, Session
from ...softprompt import SoftPrompt

OLDEST = "1.2"
"""The first release (July 2023) that hands ``state["logits_processor"]`` to ``generate``."""

REQUEST_FIELD = "soft_prompt"
"""Of a request to the host's API: a file name, or several in order; "" is none; without it, the selection."""

_CARRIED = "kobold_sp_carried"
_LONGEST_WAIT_SECONDS = 60.0
"""Nobody waits longer for a measurement: its turn is a courtesy, and no deadlock may come of it."""
_MAX_REMEMBERED_BYTES = 2**16


class Seam(NamedTuple):
    """A function of the host's that the extension replaces, as a global of the module that calls it."""

    module: str
    name: str
    adapter: str
    """Our method around it."""
    parameters: Tuple[str, ...]
    """How its parameters begin."""
    what: str
    """What we do with it."""


SEAMS: Tuple[Seam, ...] = (
    Seam("modules.chat", "generate_reply", "_reply", (), "Impersonation goes past the state hook: reserves there too."),
    Seam(
        "modules.chat",
        "count_prompt_tokens",
        "_count_chat",
        ("text_input", "state"),
        "Soft tokens count in the Chat tab's token counter.",
    ),
    Seam("modules.chat", "get_encoded_length", "_length_in_chat", ("prompt",), "The same: only while that counts."),
    Seam(
        "modules.prompts", "get_encoded_length", "_length", ("prompt",), "The counter of the Notebook and Default tabs."
    ),
    Seam(
        "modules.logits",
        "_get_next_logits",
        "_next_logits",
        ("prompt", "state", "use_samplers"),
        "The probabilities that it calls the model for are those with the soft prompts.",
    ),
    *(
        seam
        for module in ("modules.api.completions", "extensions.openai.completions")
        for seam in (
            Seam(module, "completions_common", "_completions", ("body",), "Keeps the request's soft prompts at hand."),
            Seam(
                module,
                "_compute_prompt_logprob_entries",
                "_prompt_logprobs",
                ("prompt", "logprobs_count"),
                "The prompt's own probabilities (echo) are those with the soft prompts.",
            ),
        )
    ),
)
"""What is replaced where a release has it, when its module is imported; a release without it does without."""

API_TYPES = ("modules.api.typing", "extensions.openai.typing")
"""Where releases declare what a request may hold, and the requests that lead to a generation."""
API_REQUESTS = ("CompletionRequest", "ChatCompletionRequest", "LogitsRequest", "AnthropicRequest")

BACKENDS: Dict[str, str] = {
    "LlamaServer": "llama.cpp runs as a process of its own, which takes text and token ids only",
    "LlamaCppModel": "llama.cpp takes text and token ids only",
    "LlamacppHF": "llama.cpp takes text and token ids only",
    "Exllamav3Model": "ExLlamav3 reads its own embedding, which the extension does not reach",
    "Exllamav3HF": "ExLlamav3_HF reads token ids only, through an embedding that the extension does not reach",
    "Exllamav2Model": "ExLlamav2 reads its own embedding, which the extension does not reach",
    "Exllamav2HF": "ExLlamav2_HF reads token ids only, through an embedding that the extension does not reach",
    "TensorRTLLMModel": "TensorRT-LLM takes the prompt as text only",
}
"""Model classes of loaders that cannot take soft prompts, and why."""

_INSTEAD = "; load the original model with the Transformers loader, which takes soft prompts (also in 4 and 8 bits)"


class Extension:
    """The extension in this process, as the script sees it; does nothing in a host that it does not know."""

    def __init__(self) -> None:
        self.attached: Optional[Attachment] = None
        self.fault = ""
        """Why it stays out, where it does."""

    def setup(self) -> None:
        """Attach to the host, once; whatever fails, the host goes on and one log line says why."""
        if self.attached is not None:
            self.attached.sync()
            return
        try:
            self.attached = Attachment()
            self.fault = ""
        except HostError as error:
            self.fault = str(error)
            _log().warning("The soft prompts extension stays out of this host: %s", error)
        except Exception as error:
            self.fault = f"it could not attach: {type(error).__name__}: {error}"
            _log().exception("The soft prompts extension stays out of this host")

    def undo(self) -> None:
        """Leave the host; its models, modules and API are its own again."""
        if self.attached is not None:
            self.attached.undo()
            self.attached = None

    def state_modifier(self, state: Dict[str, Any]) -> Dict[str, Any]:
        """A copy of ``state`` with the budget reserved and its soft prompts in it; ``state`` stays as it is."""
        return state if self.attached is None else self.attached.carrying(state)

    def ui(self) -> None:
        """Build the block, inside the host's interface; whatever fails, the rest of that is built."""
        from . import panel

        try:
            panel.build(self.attached, self.fault)
        except Exception:
            _log().exception("The soft prompts block could not be built")

    def custom_css(self) -> str:
        """What the block's looks need."""
        from . import panel

        return panel.CSS

    def custom_js(self) -> str:
        """What keeps the block up to date, for the page's load event."""
        from . import panel

        return panel.JS


class Chosen:
    """Soft prompts of one generation: a value that copies of a state share."""

    def __init__(self, softprompts: Sequence[SoftPrompt], n_processors: int = 0):
        self.softprompts = tuple(softprompts)
        self.n_processors = n_processors
        """How many processors the list that carries this had before the host added its own."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the context that they use."""
        return sum(softprompt.n_tokens for softprompt in self.softprompts)

    def __deepcopy__(self, memo: Any) -> "Chosen":
        return self


class Attachment:
    """What the extension has changed in its host, and the way back. Raises :class:`HostError`, changing nothing."""

    def __init__(self) -> None:
        faults = list(_faults())
        if faults:
            raise HostError(
                f"this is not a text-generation-webui that the extension knows ({OLDEST} or later): {'; '.join(faults)}"
            )
        self.shared: Any = importlib.import_module("modules.shared")
        self._extensions: Any = importlib.import_module("modules.extensions")
        data = getattr(self.shared, "user_data_dir", None) or ("user_data" if os.path.isdir("user_data") else "")
        self.folder = Path(data).absolute() / "softprompts"
        self.notice = ""
        """What a user has to know beside the session's own notice."""
        self.revision = 0
        """Grows with every change of what the block shows."""
        self._syncing = threading.RLock()
        self._seen: Callable[[], Any] = _nothing
        self._model: Optional[_Model] = None
        self._turn = threading.Lock()
        """The last model's: held while it generates or is measured."""
        self._thread = threading.local()
        self._undo = contextlib.ExitStack()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remembered = _read_selection(self._selection_file)
        self.session = Session(self.folder)
        self._undo.callback(self.session.close)
        try:
            self.session.subscribe(lambda status: self._changed())
            self._hook()
            self.session.watch()
            self.sync()
        except BaseException:
            self._undo.close()
            raise

    def undo(self) -> None:
        """Leave the host: every function is its own again, and so is the model."""
        with self._syncing:
            self._undo.close()
            self._release()

    @property
    def enabled(self) -> bool:
        """Whether the extension is still among those that the host runs: a restart of its interface may end that."""
        return any(
            getattr(getattr(each, "state_modifier", None), "__func__", None) is Extension.state_modifier
            for each, _ in self._extensions.iterator()
        )

    # The model

    def sync(self) -> None:
        """Take notice of the model that the host has now; cheap where it is the one known."""
        with self._syncing:
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
                self._model = _Model(self, model, self.shared.tokenizer, name)
                self._turn = self._model.engine.lock
                self.session.use(self._model.engine)
            except Exception as error:
                if not isinstance(error, SoftPromptError):
                    _log().exception("Soft prompts cannot be used with %s", name)
                self._release()
                self._seen = weakref.ref(model)
                self.session.use(_Refusing(model, name, str(error)))
            self._recall()

    def _release(self) -> None:
        self._seen = _nothing
        self.session.use(None)  # before the model is let go: an engine that is told of it attaches again
        model, self._model = self._model, None
        if model is not None:
            model.undo()

    def _recall(self) -> None:
        """Select again what was chosen last, where a model took it off or there was none."""
        self.notice = ""
        if self._remembered and not self.session.selection and self.session.takes_softprompts:
            try:
                self.session.select(self._remembered)
            except SoftPromptError as error:
                self.notice = f"What was chosen last cannot be used now: {error}"
                self._changed()

    def _load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A loader: no measurement may keep the old model in memory while the new one is read."""
        with self._syncing:
            if self.shared.model is None:
                self._release()
        if self._turn.acquire(timeout=_LONGEST_WAIT_SECONDS):
            self._turn.release()
        return original(*args, **kwargs)

    # The selection

    def select(self, filenames: Sequence[str]) -> None:
        """Select these files, in order, and remember them; none clears. Raises what ``Session.select`` raises."""
        self.sync()
        self.session.select(list(filenames))
        self._remembered = list(filenames)
        self.notice = ""
        self._changed()
        _write_selection(self._selection_file, self._remembered)

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

    def _chosen(self, state: Any) -> Chosen:
        """The soft prompts of a generation that begins now with ``state``."""
        asked = state.get(REQUEST_FIELD) if isinstance(state, dict) else None
        return Chosen(self.session.softprompts) if asked is None else self.asked(asked)

    def _changed(self) -> None:
        self.revision += 1

    # A generation

    def carrying(self, state: Dict[str, Any]) -> Dict[str, Any]:
        """``state`` itself where the model takes no soft prompts, else a copy with its soft prompts and their room."""
        self.sync()
        model = self._model
        if model is None:
            return state
        from transformers import LogitsProcessorList

        given = state.get("logits_processor")
        processors = LogitsProcessorList([] if given is None else given if isinstance(given, list) else [given])
        chosen = Chosen(self._chosen(state).softprompts, len(processors))
        setattr(processors, _CARRIED, chosen)
        reserved = reserve(state, chosen.n_tokens, model.engine.context)
        if reserved.get("max_new_tokens") != state.get("max_new_tokens"):
            _log().warning(
                "%d soft tokens leave no room for a prompt beside %s new tokens; %s are generated at most.",
                chosen.n_tokens,
                state.get("max_new_tokens"),
                reserved["max_new_tokens"],
            )
        return {**reserved, "logits_processor": processors}

    def carried(self, kwargs: Dict[str, Any]) -> Chosen:
        """The soft prompts of a call of ``generate``; the host's list in ``kwargs`` becomes a copy of its own."""
        processors = kwargs.get("logits_processor")
        chosen: Optional[Chosen] = getattr(processors, _CARRIED, None)
        if chosen is None:
            if self.session.selection and self.enabled:
                _log().warning(
                    "A generation runs without the selected soft prompt: it was begun past the extensions, or "
                    "another one has replaced state['logits_processor']."
                )
            return Chosen(())
        assert processors is not None
        kwargs["logits_processor"] = type(processors)(processors)
        del processors[chosen.n_processors :]  # a state may be used again, and the host adds a grammar each time
        return chosen

    def _reply(self, original: Callable[..., Any], question: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        if self.enabled and not hasattr(state.get("logits_processor"), _CARRIED):
            state = self.carrying(state)
        return original(question, state, *args, **kwargs)

    # Probabilities

    @property
    def scored_with(self) -> Tuple[SoftPrompt, ...]:
        """The soft prompts of a bare call of the model that this thread makes now."""
        chosen: Optional[Chosen] = getattr(self._thread, "scoring", None)
        return () if chosen is None else chosen.softprompts

    @contextlib.contextmanager
    def _scoring(self, state: Any) -> Iterator[None]:
        self.sync()
        self._thread.scoring = self._chosen(state) if self.enabled else None
        try:
            yield
        finally:
            self._thread.scoring = None

    def _next_logits(
        self, original: Callable[..., Any], prompt: Any, state: Any, use_samplers: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if use_samplers:  # a generation like any other
            return original(prompt, state, use_samplers, *args, **kwargs)
        with self._scoring(state):
            return original(prompt, state, use_samplers, *args, **kwargs)

    def _prompt_logprobs(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            with self._scoring(getattr(self._thread, "request", None)):
                return original(*args, **kwargs)
        except SoftPromptError as error:
            raise _refusal(original.__module__, str(error)) from error

    def _completions(self, original: Callable[..., Any], body: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The answers to a request; each may be asked for by another thread."""
        answers = original(body, *args, **kwargs)
        try:
            while True:
                self._thread.request = body
                try:
                    answer = next(answers)
                except StopIteration:
                    return
                finally:
                    self._thread.request = None
                yield answer
        finally:
            answers.close()

    # Token counters

    def _count_chat(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._thread.counting = True
        try:
            return original(*args, **kwargs)
        finally:
            self._thread.counting = False

    def _length_in_chat(self, original: Callable[..., int], prompt: Any) -> int:
        # A generation's prompt is measured against a budget that is reduced already; the counter's is not.
        counting = getattr(self._thread, "counting", False)
        return self._length(original, prompt) if counting else original(prompt)

    def _length(self, original: Callable[..., int], prompt: Any) -> int:
        length = original(prompt)
        return length + self.session.n_tokens if self._model is not None and self.enabled else length

    # Hooking

    def _hook(self) -> None:
        models = importlib.import_module("modules.models")
        for name, value in list(vars(models).items()):
            if name.endswith("_loader") and inspect.isfunction(value):
                self._undo.callback(patch(models, name, self._load).undo)
        by_module: Dict[str, List[Seam]] = {}
        for seam in SEAMS:
            by_module.setdefault(seam.module, []).append(seam)
        for module, seams in by_module.items():
            self._undo.callback(when_imported(module, self._replacing(seams)).cancel)
        for module in API_TYPES:
            self._undo.callback(when_imported(module, self._extend_requests).cancel)

    def _replacing(self, seams: Sequence[Seam]) -> Callable[[ModuleType], None]:
        def replace(module: ModuleType) -> None:
            for seam in seams:
                function = getattr(module, seam.name, None)
                if inspect.isfunction(function) and _parameters(function)[: len(seam.parameters)] == seam.parameters:
                    self._undo.callback(patch(module, seam.name, getattr(self, seam.adapter)).undo)

        return replace

    def _extend_requests(self, module: ModuleType) -> None:
        """Give the API's requests the field, before its routes are built from them."""
        pydantic: Any = importlib.import_module("pydantic")
        package = module.__name__.rpartition(".")[0]
        if not hasattr(pydantic, "field_validator"):
            _log().warning("Requests to the API cannot name a %s: that takes pydantic 2.", REQUEST_FIELD)
            return
        if hasattr(sys.modules.get(f"{package}.script"), "app"):
            _log().warning("Requests to the API can name a %s once the program is started anew.", REQUEST_FIELD)

        def resolved(cls: Any, value: Any) -> Any:
            if value is None or not self.enabled:
                return None
            try:
                return self.asked(value)
            except SoftPromptError as error:
                raise _refusal(module.__name__, str(error)) from error

        field = pydantic.Field(
            default=None,
            description="The file name of a soft prompt, or several in order, for this request alone; empty for none.",
        )
        for name in API_REQUESTS:
            before = getattr(module, name, None)
            if before is None:
                continue
            extended = pydantic.create_model(
                name,
                __base__=before,
                __module__=module.__name__,
                __validators__={"resolve_soft_prompt": pydantic.field_validator(REQUEST_FIELD)(resolved)},
                **{REQUEST_FIELD: (Union[str, List[str], None], field)},
            )
            setattr(module, name, extended)
            self._undo.callback(setattr, module, name, before)


class _Model:
    """One model of the host's with our part in it: soft tokens, and what chooses them per call."""

    def __init__(self, attachment: Attachment, model: Any, tokenizer: Any, name: str):
        kind = type(model).__name__
        if kind in BACKENDS:
            raise UnsupportedModel(BACKENDS[kind] + _INSTEAD)
        if not callable(getattr(model, "get_input_embeddings", None)) or not hasattr(model, "config"):
            raise UnsupportedModel(f"{kind} is no model of the transformers library{_INSTEAD}")
        from ...engines.transformers import TransformersEngine
        from ...soft_tokens import attach

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.engine = TransformersEngine(model, tokenizer, name)
        self._attachment = attachment
        self._base = weakref.ref(base)
        self._handle = attach(base)
        self._patches = [patch(base, "generate", self._generate), patch(base, "forward", self._forward)]

    def undo(self) -> None:
        for each in reversed(self._patches):
            each.undo()
        self._handle.detach()

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        chosen = self._attachment.carried(kwargs)
        has_turn = self.engine.lock.acquire(timeout=_LONGEST_WAIT_SECONDS)
        try:
            with self._handle.override(chosen.softprompts):
                return original(*args, **kwargs)
        except SoftPromptError as error:
            self._attachment.notice = f"The last generation failed: {error}"
            self._attachment._changed()
            raise
        finally:
            if has_turn:
                self.engine.lock.release()

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        softprompts = self._attachment.scored_with
        ids = kwargs.get("input_ids")
        if not softprompts or ids is None:
            return original(*args, **kwargs)
        n_tokens = sum(softprompt.n_tokens for softprompt in softprompts)
        context = self.engine.context
        if context is not None and n_tokens + ids.shape[-1] > context:
            raise ContextExceeded(f"{n_tokens} soft tokens and {ids.shape[-1]} of text exceed a context of {context}")
        with self._handle.override(softprompts):
            widened = self._handle.prepend(ids, kwargs.get("attention_mask"))
            output = original(*args, **{**kwargs, **widened})
        output["logits"] = output["logits"][:, n_tokens:]
        return output


class _Refusing:
    """The engine of a model that takes no soft prompts: every file's verdict says why."""

    def __init__(self, model: Any, name: str, reason: str):
        self.name = name
        self._model = weakref.ref(model)
        self._reason = reason

    @property
    def alive(self) -> bool:
        return self._model() is not None

    @property
    def context(self) -> Optional[int]:
        return None

    def facts(self) -> ModelFacts:
        return ModelFacts(self.name, refusal=self._reason)

    def select(self, softprompts: Sequence[SoftPrompt]) -> None:
        if softprompts:
            raise SelectionError(self._reason)

    def effect(self, softprompts: Sequence[SoftPrompt]) -> float:
        raise NoModel(self._reason)

    def generate(self, settings: Any, softprompts: Any = None, stop: Any = None) -> Any:
        raise NoModel(self._reason)


def reserve(state: Dict[str, Any], n_tokens: int, context: Optional[int] = None) -> Dict[str, Any]:
    """A copy of ``state`` whose ``truncation_length`` leaves ``n_tokens`` free, of the model's ``context`` at most.

    The host gives a prompt ``truncation_length - max_new_tokens`` tokens, and reads 0 as "all of it" and less
    as an index from the front. Where that would come of it, ``max_new_tokens`` gives way: the prompt keeps what
    it would have had without soft tokens, up to half of what is left.
    """
    copy = dict(state)
    limit, new = state.get("truncation_length"), state.get("max_new_tokens")
    if not n_tokens or not isinstance(limit, int) or not isinstance(new, int):
        return copy
    limit = limit if context is None else min(limit, context)
    left = max(2, limit - n_tokens)
    if left - new < 1:
        room = left // 2 if limit - new < 1 else min(limit - new, left // 2)
        copy["max_new_tokens"] = left - max(1, room)
    copy["truncation_length"] = left
    return copy


def _faults() -> Iterator[str]:
    """What keeps this host from being one that is known; looking changes nothing."""
    modules = {}
    for name in ("shared", "extensions", "models", "text_generation"):
        try:
            modules[name] = importlib.import_module(f"modules.{name}")
        except ImportError as error:
            yield f"modules.{name} cannot be imported ({error})"
    if len(modules) < 4:
        return
    for name in ("model", "tokenizer", "model_name", "args", "gradio"):
        if not hasattr(modules["shared"], name):
            yield f"there is no shared.{name}"
    if not callable(getattr(modules["extensions"], "iterator", None)):
        yield "there is no extensions.iterator"
    if "state" not in getattr(modules["extensions"], "EXTENSION_MAP", {}):
        yield "it has no hook for the state (state_modifier)"
    loaders = [getattr(modules["models"], name, None) for name in ("transformers_loader", "huggingface_loader")]
    if not any(_parameters(loader) == ("model_name",) for loader in loaders if loader is not None):
        yield "there is no transformers_loader(model_name) in modules.models"
    generate = getattr(modules["text_generation"], "generate_reply_HF", None)
    if "state" not in _parameters(generate):
        yield "generate_reply_HF takes no state"
    elif "logits_processor" not in _constants(generate):
        yield "generate_reply_HF does not hand state['logits_processor'] on"


def _parameters(function: Any) -> Tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _constants(function: Any) -> Tuple[Any, ...]:
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_consts", ("logits_processor",))


def _refusal(module: str, message: str) -> Exception:
    """The error for a request that cannot be served, of the API that ``module`` belongs to.

    Releases before 4.1 do not answer their own error; a wrong value they do.
    """
    package = module.rpartition(".")[0]
    error: Any = importlib.import_module(f"{package}.errors").InvalidRequestError
    app = getattr(sys.modules.get(f"{package}.script"), "app", None)
    if any(isinstance(kind, type) and issubclass(error, kind) for kind in getattr(app, "exception_handlers", [error])):
        refusal: Exception = error(message=message, param=REQUEST_FIELD)
        return refusal
    return ValueError(message)


def _nothing() -> None:
    return None


def _log() -> logging.Logger:
    """The host's logger: it sends everybody else's records nowhere."""
    try:
        logger: logging.Logger = importlib.import_module("modules.logging_colors").logger
        return logger
    except (ImportError, AttributeError):
        return logging.getLogger(__name__)


def _read_selection(path: Path) -> List[str]:
    """What was chosen when the host ran last; nothing where that cannot be read."""
    try:
        with open(path, "rb") as file:
            known = json.loads(file.read(_MAX_REMEMBERED_BYTES))["selection"]
        return [name for name in known if isinstance(name, str)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log().warning("The soft prompts that were chosen last are not known: %s cannot be read (%s)", path, error)
        return []


def _write_selection(path: Path, selection: Sequence[str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps({"selection": list(selection)}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        _log().warning("The choice of soft prompts will not outlast this run: %s", error)


extension = Extension()
"""The one of this process."""
