"""What the two ways to vLLM share: the model's facts, its tokenizer, the text that fits, rows as vLLM takes them."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from ..compatibility import ModelFacts, facts
from ..errors import ModelError, SoftPromptError, UnknownScale, WidthMismatch
from ..softprompt import Scale, SoftPrompt
from . import PROBES, Effect, GenerationSettings
from .effects import effect_of_likeliest
from .fitting import fit, in_front, softprompts_inside
from .tokenizer import Tokenizer

TOP = 20
"""Likeliest tokens that vLLM tells of where nothing else was configured."""


class VllmModel:
    """A model that vLLM runs, as far as it has to be known to write its requests.

    ``path``: a folder or a name on the hub, of which the configuration and, for the fingerprint, some rows of the
    embedding matrix are read. ``context``: tokens that vLLM was started for.
    """

    def __init__(self, path: str, config: Any, tokenizer: Any, context: Optional[int]):
        self.name = Path(path).resolve().name if Path(path).is_dir() else path
        self._path = path
        self._tokenizer = tokenizer
        self._reader = Tokenizer(tokenizer, self.name)
        known = facts(path if Path(path).is_dir() else config, self.name)
        if known.width is None:
            raise ModelError(f"{path} does not tell how wide its embedding is.")
        self._width = known.width
        limits = [each for each in (context, known.context) if isinstance(each, int)]
        self._facts = replace(known, context=min(limits) if limits else None)
        self._ends = _ends(path, config)
        self._selected: Tuple[SoftPrompt, ...] = ()

    @property
    def alive(self) -> bool:
        """True: a server that is down may come back; until then each request says so."""
        return True

    @property
    def context(self) -> Optional[int]:
        """Tokens that the model can attend to, or as many as the server was started for."""
        return self._facts.context

    def facts(self) -> ModelFacts:
        """What is known of the model from here, with the server's context."""
        return self._facts

    def select(self, softprompts: Sequence[SoftPrompt]) -> None:
        """Make these, in order, the soft prompts of generations that begin from now on.

        Raises :class:`WidthMismatch` or :class:`UnknownScale`; the selection is then what it was.
        """
        for each in softprompts:
            self._rows_of(each)
        self._selected = tuple(softprompts)

    def effect(self, softprompts: Sequence[SoftPrompt]) -> Effect:
        """Mean total variation of the next-token distribution with and without, over ``PROBES``: 0 to 1.

        A server tells of the likeliest tokens only: what the others have is counted as one token, so that the true
        figure is at least this.
        """
        without = [self._next_tokens(probe, ()) for probe in PROBES]
        return effect_of_likeliest(without, [self._next_tokens(probe, softprompts) for probe in PROBES])

    def token_ids(self, text: str) -> List[int]:
        """The ids that the model would read for a text."""
        return self._reader.ids(text)

    def chat_prompt(self, messages: Sequence[Dict[str, Any]]) -> Optional[str]:
        """A conversation as the tokenizer's template writes it; None where it has none, or not for these messages."""
        return self._reader.chat_prompt(messages)

    def _banned(self, settings: GenerationSettings) -> List[int]:
        """The tokens that must not come: those that end a text, and those that hold a banned word."""
        words = [word.lower() for word in settings.bad_words if word]
        texts = self._reader.texts() if words else []
        holding = [token for token, text in enumerate(texts) if any(word in text for word in words)]
        return [*(self._ends if settings.ban_eos else ()), *holding]

    def _next_tokens(self, probe: str, softprompts: Sequence[SoftPrompt]) -> Dict[str, float]:
        """Probabilities of the likeliest next tokens."""
        raise NotImplementedError

    def _fitted(
        self, settings: GenerationSettings, softprompts: Sequence[SoftPrompt]
    ) -> Tuple[GenerationSettings, Tuple[SoftPrompt, ...], List[int]]:
        """The settings and soft prompts with those of the text's beginning among the latter, and the ids that fit.

        Raises :class:`ContextExceeded`, or what is wrong with a soft prompt.
        """
        settings, chosen = in_front(settings, softprompts)
        for each in (*chosen, *softprompts_inside(settings)):
            self._rows_of(each)  # a width that is wrong ends the engine: it is found out here
        return settings, chosen, fit(settings, sum(each.n_tokens for each in chosen), self.context, self._reader)

    def _rows_of(self, softprompt: SoftPrompt) -> np.ndarray:
        """Its rows as they leave the embedding module, which is what the server takes."""
        if softprompt.width != self._width:  # checked here: one of another width can end the server
            raise WidthMismatch(
                f"{softprompt.name or 'the soft prompt'} was made for {softprompt.width} columns, "
                f"{self.name} has {self._width}"
            )
        if softprompt.scale is Scale.MODULE:
            return softprompt.rows
        return softprompt.rows * np.float32(self._scale())

    def _scale(self) -> float:
        from .embed_scale import embed_scale

        try:
            return embed_scale(self._path, self._width)
        except SoftPromptError as error:
            raise UnknownScale(
                f"rows as they stand in the matrix, and {self.name}'s scale is not known ({error})",
                "rows as they leave the embedding module",
            ) from error


def _ends(path: str, config: Any) -> Tuple[int, ...]:
    """The tokens that end a text, as the model's configurations tell."""
    from transformers import GenerationConfig

    found = None
    with suppress(Exception):  # there is none; the library says so in many ways
        found = GenerationConfig.from_pretrained(path).eos_token_id
    if found is None:
        found = getattr(config, "eos_token_id", None)
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)
