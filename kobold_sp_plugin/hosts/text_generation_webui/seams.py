"""The functions of the host's that the extension replaces, as data, and our method around each."""

import contextlib
import inspect
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ...errors import SoftPromptError
from ...patching import patch, when_imported
from ...softprompt import SoftPrompt
from .api import refusal
from .generation import Chosen, is_carrying
from .host import parameters

if TYPE_CHECKING:  # the two import each other
    from .attachment import Attachment


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
    Seam(
        "modules.text_generation",
        "generate_reply_HF",
        "generation",
        (),
        "The model may be another by now than when the state was made.",
    ),
    Seam("modules.chat", "generate_reply", "reply", (), "Impersonation goes past the state hook: reserves there too."),
    Seam(
        "modules.chat",
        "count_prompt_tokens",
        "count_chat",
        ("text_input", "state"),
        "Soft tokens count in the Chat tab's token counter.",
    ),
    Seam("modules.chat", "get_encoded_length", "length_in_chat", ("prompt",), "The same: only while that counts."),
    Seam(
        "modules.prompts", "get_encoded_length", "length", ("prompt",), "The counter of the Notebook and Default tabs."
    ),
    Seam(
        "modules.logits",
        "_get_next_logits",
        "next_logits",
        ("prompt", "state", "use_samplers"),
        "The probabilities that it calls the model for are those with the soft prompts.",
    ),
    *(
        seam
        for module in ("modules.api.completions", "extensions.openai.completions")
        for seam in (
            Seam(module, "completions_common", "completions", ("body",), "Keeps the request's soft prompts at hand."),
            Seam(
                module,
                "_compute_prompt_logprob_entries",
                "prompt_logprobs",
                ("prompt", "logprobs_count"),
                "The prompt's own probabilities (echo) are those with the soft prompts.",
            ),
        )
    ),
)
"""What is replaced where a release has it, when its module is imported; a release without it does without."""


class Adapters:
    """Our methods around the seams."""

    def __init__(self, attachment: "Attachment"):
        self._attachment = attachment
        self._thread = threading.local()

    def hook(self, undo: contextlib.ExitStack) -> None:
        """Replace every seam as soon as its module is imported, until ``undo``."""
        by_module: Dict[str, List[Seam]] = {}
        for seam in SEAMS:
            by_module.setdefault(seam.module, []).append(seam)
        for module, seams in by_module.items():
            undo.callback(when_imported(module, self._replacing(seams, undo)).cancel)

    def _replacing(self, seams: Sequence[Seam], undo: contextlib.ExitStack) -> Callable[[ModuleType], None]:
        def replace(module: ModuleType) -> None:
            for seam in seams:
                function = getattr(module, seam.name, None)
                if inspect.isfunction(function) and parameters(function)[: len(seam.parameters)] == seam.parameters:
                    undo.callback(patch(module, seam.name, getattr(self, seam.adapter)).undo)

        return replace

    def reply(self, original: Callable[..., Any], question: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        if self._attachment.enabled and not is_carrying(state):
            state = self._attachment.carrying(state)
        return original(question, state, *args, **kwargs)

    def generation(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._attachment.sync()
        return original(*args, **kwargs)

    # Probabilities

    @property
    def scored_with(self) -> Tuple[SoftPrompt, ...]:
        """The soft prompts of a bare call of the model that this thread makes now."""
        chosen: Optional[Chosen] = getattr(self._thread, "scoring", None)
        return () if chosen is None else chosen.softprompts

    @contextlib.contextmanager
    def _scoring(self, state: Any) -> Iterator[None]:
        self._attachment.sync()
        self._thread.scoring = self._attachment.chosen(state) if self._attachment.enabled else None
        try:
            yield
        finally:
            self._thread.scoring = None

    def next_logits(
        self, original: Callable[..., Any], prompt: Any, state: Any, use_samplers: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if use_samplers:  # a generation like any other
            return original(prompt, state, use_samplers, *args, **kwargs)
        with self._scoring(state):
            return original(prompt, state, use_samplers, *args, **kwargs)

    def prompt_logprobs(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            with self._scoring(getattr(self._thread, "request", None)):
                return original(*args, **kwargs)
        except SoftPromptError as error:
            raise refusal(original.__module__, str(error)) from error

    def completions(self, original: Callable[..., Any], body: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
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

    def count_chat(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._thread.counting = True
        try:
            return original(*args, **kwargs)
        finally:
            self._thread.counting = False

    def length_in_chat(self, original: Callable[..., int], prompt: Any) -> int:
        # A generation's prompt is measured against a budget that is reduced already; the counter's is not.
        counting = getattr(self._thread, "counting", False)
        return self.length(original, prompt) if counting else original(prompt)

    def length(self, original: Callable[..., int], prompt: Any) -> int:
        return original(prompt) + self._attachment.n_tokens
