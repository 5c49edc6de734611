"""What can generate with a soft prompt: one file per engine, and what all engines have in common.

Importing this module imports no engine's own libraries.
"""

import threading
from dataclasses import dataclass
from typing import Any, Dict, Generator, List, NamedTuple, Optional, Protocol, Sequence, Tuple, runtime_checkable

from ..compatibility import ModelFacts
from ..softprompt import SoftPrompt

GREEDY_BELOW = 1e-4
"""A temperature or ``top_p`` below this means the likeliest token; samplers overflow there, or keep none."""

PROBES = (
    "The door opened and",
    "It was",
    "She looked at him and said,",
    "Nobody in the room had expected that",
    "In the morning they",
    "He put it on the table.",
    "What happened next was",
    "Once",
)
"""Beginnings that leave open what follows; the effect is measured on them."""


@dataclass(frozen=True)
class GenerationSettings:
    """One request for text: what stands before it, how long it may get, how its tokens are drawn.

    Soft prompts may stand in ``prompt`` and ``memory`` (:class:`~kobold_sp_plugin.softprompt.TaggedText`).
    ``max_length``: new tokens. ``max_context_length``: tokens in all, where the client wants fewer than
    the model has. ``temperature`` near zero: always the likeliest token. ``top_k`` 0, ``top_a`` 0, ``top_p`` 1,
    ``min_p`` 0, ``tfs`` 1, ``typical`` 1, ``rep_pen`` 1 and penalties of 0 switch their sampler off; what they mean
    is told in :mod:`.samplers`. ``sampler_order``: KoboldAI's numbers of its samplers. ``logit_bias``: what is
    added to the score of a token, by its id. ``bad_words``: what the new text may not hold. ``ban_eos``: no token
    ends the text. The text ends before the first of ``stop_sequence``, or behind it with ``keep_stop``. ``seed``:
    the same seed gives the same text; None draws one.
    """

    prompt: str
    memory: str = ""
    max_length: int = 80
    max_context_length: Optional[int] = None
    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 0
    top_a: float = 0.0
    min_p: float = 0.0
    tfs: float = 1.0
    typical: float = 1.0
    rep_pen: float = 1.0
    rep_pen_range: int = 0
    rep_pen_slope: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    sampler_order: Tuple[int, ...] = (6, 0, 1, 2, 3, 4, 5)
    logit_bias: Tuple[Tuple[int, float], ...] = ()
    bad_words: Tuple[str, ...] = ()
    ban_eos: bool = False
    stop_sequence: Tuple[str, ...] = ()
    keep_stop: bool = False
    seed: Optional[int] = None


class Ending(NamedTuple):
    """How a generation ended; the iterator of its text returns it."""

    reason: str
    """"length": as many tokens as were asked for. "stop": an end of the text, a stop sequence, or somebody."""
    n_prompt: int
    """Tokens of text that were read; soft tokens are not counted."""
    n_new: int
    """Tokens that were generated."""


class Effect(float):
    """How far soft prompts move the next-token distribution: its mean total variation over some probes, 0 to 1.

    A number, so that who shows it needs to know no more; with it comes what tells sense from nonsense.
    ``entropy``: mean of the distributions with the soft prompts, in nats, and ``entropy_without``. ``spread``: mean
    total variation between the distributions that any two of the probes lead to, and ``spread_without``.
    """

    entropy: float
    entropy_without: float
    spread: float
    spread_without: float

    def __new__(
        cls,
        distance: float,
        entropy: float = 0.0,
        entropy_without: float = 0.0,
        spread: float = 0.0,
        spread_without: float = 0.0,
    ) -> "Effect":
        made = super().__new__(cls, distance)
        made.entropy, made.entropy_without = entropy, entropy_without
        made.spread, made.spread_without = spread, spread_without
        return made

    @property
    def remark(self) -> str:
        """What a user has to know besides the number, as a sentence, or ""."""
        if self < LEAST_EFFECT:
            return "The soft prompt changes next to nothing: text will be as without it."
        if self.spread < 0.3 * self.spread_without:
            return "The soft prompt drowns the text out: whatever stands there, much the same token follows."
        if self.entropy < 0.2 * self.entropy_without and self.entropy_without > 0.5:
            return "The soft prompt leaves the model next to no choice of words: expect it to repeat itself."
        if self.entropy > self.entropy_without + 2:
            return "The soft prompt leaves the model guessing: expect garbled text."
        return ""


LEAST_EFFECT = 0.01
"""An effect below this cannot be seen in a text; a single row of noise has more."""


class Engine(Protocol):
    """What a session needs of an engine."""

    name: str

    @property
    def alive(self) -> bool:
        """Whether the model still exists; the engine does not keep it."""

    @property
    def context(self) -> Optional[int]:
        """Tokens that the model can attend to, or None where nothing tells."""

    def facts(self) -> ModelFacts:
        """What a soft prompt is judged against; computed once."""

    def select(self, softprompts: Sequence[SoftPrompt]) -> None:
        """Make these, in order, the soft prompts of generations that begin from now on; raises, or all are taken."""

    def effect(self, softprompts: Sequence[SoftPrompt]) -> float:
        """How far these soft prompts move the next-token distribution, 0 (not at all) to 1; an :class:`Effect`
        where the engine can tell more.
        """

    def generate(
        self,
        settings: GenerationSettings,
        softprompts: Optional[Sequence[SoftPrompt]] = None,
        stop: Optional[threading.Event] = None,
    ) -> Generator[str, None, Ending]:
        """Text, piece by piece, with these soft prompts instead of the selection unless None.

        Closing the iterator, or setting ``stop``, ends the generation within one token.
        """


@runtime_checkable
class Tokenizing(Protocol):
    """What a server needs besides: an engine that knows its model's tokens."""

    def token_ids(self, text: str) -> List[int]:
        """The ids that the model would read for a text."""

    def chat_prompt(self, messages: Sequence[Dict[str, Any]]) -> Optional[str]:
        """A conversation as the model's own template writes it, up to the answer's beginning; None: it has none.

        ``messages``: ``{"role", "content"}``, both text.
        """


@runtime_checkable
class Lacking(Protocol):
    """An engine that does not do everything that :class:`GenerationSettings` can ask for."""

    def lacking(self, settings: GenerationSettings) -> Tuple[str, ...]:
        """What of these settings it leaves out, or does in its own way: a sentence each."""
