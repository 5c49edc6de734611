"""What the two ways to vLLM share: the model's facts, its tokenizer, the text that fits, rows as vLLM takes them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np

from ..compatibility import ModelFacts, facts
from ..errors import ContextExceeded, ModelError, SoftPromptError, UnknownScale, WidthMismatch
from ..softprompt import Scale, SoftPrompt
from . import PROBES, Effect, GenerationSettings

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
        known = facts(path if Path(path).is_dir() else config, self.name)
        if known.width is None:
            raise ModelError(f"{path} does not tell how wide its embedding is.")
        self._width = known.width
        limits = [each for each in (context, known.context) if isinstance(each, int)]
        self._facts = replace(known, context=min(limits) if limits else None)
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
        having = [self._next_tokens(probe, softprompts) for probe in PROBES]
        return Effect(
            min(1.0, _mean(_distance(one, other) for one, other in zip(having, without))),
            _mean(map(_entropy, having)),
            _mean(map(_entropy, without)),
            _mean(_distance(one, other) for one in having for other in having),
            _mean(_distance(one, other) for one in without for other in without),
        )

    def _next_tokens(self, probe: str, softprompts: Sequence[SoftPrompt]) -> Dict[str, float]:
        """Probabilities of the likeliest next tokens."""
        raise NotImplementedError

    def _fit(self, settings: GenerationSettings, n_soft: int) -> Tuple[str, str, List[int]]:
        """What a text begins with, the text, as much of the story's end as there is room for, and the ids of both."""
        beginning = list(self._tokenizer("")["input_ids"])
        bos = self._tokenizer.bos_token_id
        beginning = beginning[:1] if bos is not None and beginning[:1] == [bos] else []
        start = self._tokenizer.bos_token if beginning else ""

        def ids_of(text: str) -> List[int]:
            return beginning + list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

        story = settings.prompt
        ids = ids_of(settings.memory + story)
        limits = [limit for limit in (self.context, settings.max_context_length) if limit is not None]
        if limits:
            room = min(limits) - n_soft - settings.max_length
            if len(ids_of(settings.memory)) >= room:
                soft = f"{n_soft} of soft prompts and " if n_soft else ""
                raise ContextExceeded(
                    f"A context of {min(limits)} tokens has no room for the story beside {soft}{settings.max_length} "
                    "of new text."
                )
            while len(ids) > room:  # the end of a text, alone, may have a token more than it had in the whole
                places = self._tokenizer(story, add_special_tokens=False, return_offsets_mapping=True)
                begins = [start for start, _ in places["offset_mapping"]]
                story = story[begins[min(len(ids) - room, len(begins) - 1)] or 1 :]
                ids = ids_of(settings.memory + story)
        if not ids:
            raise ModelError(f"{self.name} has no token that a text can begin with; the prompt must not be empty.")
        return start, settings.memory + story, ids

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


def _distance(one: Dict[str, float], other: Dict[str, float]) -> float:
    """Total variation, with all tokens that are not named in either as one."""
    named = {*one, *other}
    rest = abs(sum(one.values()) - sum(other.values()))
    return (sum(abs(one.get(each, 0.0) - other.get(each, 0.0)) for each in named) + rest) / 2


def _entropy(distribution: Dict[str, float]) -> float:
    rest = max(0.0, 1.0 - sum(distribution.values()))
    return -sum(each * math.log(each) for each in (*distribution.values(), rest) if each > 0)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
