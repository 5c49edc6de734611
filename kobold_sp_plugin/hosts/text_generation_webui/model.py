"""The host's model: what is hooked there, and what is said of one that takes no soft prompts."""

import weakref
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Sequence

from ...compatibility import ModelFacts
from ...errors import ContextExceeded, NoModel, SelectionError, SoftPromptError, UnsupportedModel
from ...patching import patch
from ...softprompt import SoftPrompt

if TYPE_CHECKING:  # the two import each other
    from .attachment import Attachment

LONGEST_WAIT_SECONDS = 60.0
"""Nobody waits longer for a measurement: its turn is a courtesy, and no deadlock may come of it."""

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


class HookedModel:
    """One model of the host's with our part in it: soft tokens, and what chooses them per call."""

    def __init__(self, attachment: "Attachment", model: Any, tokenizer: Any, name: str):
        kind = type(model).__name__
        if kind in BACKENDS:
            raise UnsupportedModel(BACKENDS[kind] + _INSTEAD)
        if not callable(getattr(model, "get_input_embeddings", None)) or not hasattr(model, "config"):
            raise UnsupportedModel(f"{kind} is no model of the transformers library{_INSTEAD}")
        from ...engines.transformers import TransformersEngine
        from ...soft_tokens import attach

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not callable(getattr(base, "generate", None)):
            raise UnsupportedModel(f"{kind} cannot generate{_INSTEAD}")
        self.engine = TransformersEngine(model, tokenizer, name)
        self._attachment = attachment
        self._base = weakref.ref(base)
        self._handle = attach(base)
        self._patches = [patch(base, "generate", self._generate), patch(base, "forward", self._forward)]

    def undo(self) -> None:
        """Leave the model as it was."""
        self.engine.close()
        for each in reversed(self._patches):
            each.undo()
        self._handle.detach()

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        chosen = self._attachment.carried(kwargs)
        has_turn = self.engine.lock.acquire(timeout=LONGEST_WAIT_SECONDS)
        try:
            with self._handle.override(chosen.softprompts):
                result = original(*args, **kwargs)
            self._attachment.generated()
            return result
        except SoftPromptError as error:
            self._attachment.generated(f"The last generation failed: {error}")
            raise
        finally:
            if has_turn:
                self.engine.lock.release()

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        softprompts = self._attachment.adapters.scored_with
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


class RefusingEngine:
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
