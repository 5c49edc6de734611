"""Conversation reuse: the keys and values of the last texts, for the next one that begins like one of them.

A story grows by a paragraph a turn. What the model kept of the last turn, soft tokens, text and what it wrote, is
where the next begins; only what is new is forwarded. Any common beginning serves: a retry, an edit in the middle,
a branch. A text whose tokens differ from some point on has that much less in common, and is never wrong.

Keys and values are as large as they are while the model generates. One text that is continued takes no more
memory than that, since it is handed on and not copied; a second one does.
"""

import itertools
import logging
import threading
from collections import deque
from typing import Any, Callable, Deque, Dict, Hashable, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from ..softprompt import SoftPrompt
from .caches import (
    FAILURES,
    NotExact,
    agree,
    begin_behind,
    bytes_of,
    check,
    compact,
    computed,
    cut,
    held_by,
    kind_of,
    sliced,
    state_of,
    was_emptied,
)
from .rows import Rows

_LOG = logging.getLogger(__name__)

MOST_CONVERSATIONS = 4
MOST_BYTES = 4 * 2**30
"""All conversations of one model together; one that is larger is not kept."""

_PROBE_POSITIONS = 24
_PROBE_BEHIND = 4


class _Kept(NamedTuple):
    """The keys and values of a text that was read."""

    tokens: np.ndarray
    """``[length]``: ids of text; a soft token has a negative number of its own."""
    held: Any
    size: int


class Conversations:
    """The last texts of one model, at most ``MOST_CONVERSATIONS`` and ``MOST_BYTES``; dropped when the model changes.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Deque[_Kept] = deque()
        """The one that was used last stands last."""
        self._numbers: Dict[SoftPrompt, int] = {}
        """By content: what stands for each in the texts that are kept. A number is given once."""
        self._next_number = itertools.count()
        self._state: Hashable = None
        self._proved: Dict[Hashable, bool] = {}

    def forget(self) -> bool:
        """Drop all that is kept; False: there was nothing."""
        with self._lock:
            had = bool(self._kept)
            self._kept.clear()
            return had

    def tokens_of(self, rows: Rows, ids: List[int]) -> np.ndarray:
        """``[len(ids)]``: what a row of ids says, the same for the same content whatever ids its soft tokens have."""
        tokens = np.array(ids, dtype=np.int64)
        soft = tokens >= rows.first
        if soft.any():
            with self._lock:
                for softprompt, _ in rows.contents():
                    if softprompt not in self._numbers:
                        self._numbers[softprompt] = next(self._next_number)
                numbers = [-1 - row - (self._numbers[softprompt] << 32) for softprompt, row in rows.contents()]
            tokens[soft] = np.array(numbers, dtype=np.int64)[tokens[soft] - rows.first]
        return tokens

    def take(self, tokens: np.ndarray, state: Hashable) -> Tuple[int, Any]:
        """How many tokens of a text are known, all but its last at most, and what is held of them.

        A text that goes on where a kept one ends, or nearly, takes its place.
        """
        least = max(1, int(np.flatnonzero(tokens < 0)[-1]) + 1 if (tokens < 0).any() else 1)
        with self._lock:
            if state != self._state:
                self._kept.clear()
                self._proved.clear()
                self._state = state
            if any(was_emptied(kept.held) for kept in self._kept):
                self._kept.clear()
            common = [(_common(kept.tokens, tokens[:-1]), at) for at, kept in enumerate(self._kept)]
            for n, at in sorted(common, reverse=True):
                if n < least:
                    break
                kept = self._kept[at]
                try:
                    held = cut(kept.held, len(kept.tokens), n)
                except NotExact as reason:
                    _LOG.debug("a text with %d tokens in common is of no use: %s", n, reason)
                    continue
                del self._kept[at]
                if 2 * n < len(kept.tokens):
                    self._kept.append(kept)
                return n, held
        raise NotExact("no text that is kept begins like this one")

    def keep(self, tokens: np.ndarray, held: Any, state: Hashable) -> None:
        """Keep a text that was read, in place of what was used the longest time ago."""
        kept = _Kept(tokens, held, bytes_of(held))
        if kept.size > MOST_BYTES:
            raise NotExact(f"{kept.size} bytes of keys and values are more than are kept")
        with self._lock:
            self._check(state)
            self._kept.append(kept)
            while len(self._kept) > MOST_CONVERSATIONS or sum(each.size for each in self._kept) > MOST_BYTES:
                self._kept.popleft()
            used = {int(number) for each in self._kept for number in np.unique(-1 - each.tokens >> 32)}
            self._numbers = {softprompt: number for softprompt, number in self._numbers.items() if number in used}

    def prove(self, model: Any, held: Any, probe: Dict[str, Any], state: Hashable) -> None:
        """Once for each kind of cache: the logits behind a part of ``probe`` have to be those of the whole."""
        kind = kind_of(held)
        with self._lock:
            self._check(state)
            proved = self._proved.get(kind)
        if proved is None:
            length = probe["input_ids"].shape[-1]
            n = length - _PROBE_BEHIND
            if n < 1:
                raise NotExact(f"{length} tokens are too few for a probe")
            other = sliced(probe, slice(0, None))
            other["input_ids"][:, n:] = other["input_ids"][:, :1]  # what follows must not be seen by what stands before
            try:
                part = cut(computed(model, other, length), length, n)
            except NotExact:  # a window smaller than the probe
                part = computed(model, probe, n)
            proved = agree(model, probe, part, n)
            with self._lock:
                self._check(state)
                self._proved[kind] = proved
        if not proved:
            raise NotExact("a probe with reuse differs from one without")

    def _check(self, state: Hashable) -> None:
        if state != self._state:
            raise NotExact("the model has changed")


class Conversation:
    """One generation's part in it: it begins with what is kept, and is kept at its end."""

    def __init__(self, conversations: Conversations, rows: Rows):
        self._conversations = conversations
        self._rows = rows
        self._state: Hashable = None
        self._probe: Optional[Dict[str, Any]] = None
        self._cache: Any = None
        self._ids: Optional[torch.Tensor] = None

    def begin(self, model: Any, inputs: Dict[str, Any], mask: Optional[torch.Tensor]) -> int:
        """Change ``inputs``, in place, to begin behind what is known of them; 0: they stay as they are.

        ``inputs`` are those of the forward pass that reads the whole prompt, with an empty cache; ``mask`` is the
        prompt's attention mask, None where nothing is padding. Returns how many positions are known; all soft tokens
        are among them.
        """
        try:
            check(model, inputs, mask)
            ids = inputs["input_ids"]
            if len(ids) > 1:
                raise NotExact("it has several rows")
            for name in ("token_type_ids", "mm_token_type_ids"):
                if inputs.get(name) is not None and bool(inputs[name].any()):
                    raise NotExact(f"the model is called with {name}")
            state = state_of(model)
            self._probe = sliced(inputs, slice(0, _PROBE_POSITIONS))
            self._state = state
            tokens = self._conversations.tokens_of(self._rows, ids[0].tolist())
            n, held = self._conversations.take(tokens, state)
            begin_behind(inputs, held, n)
        except NotExact as reason:
            _LOG.debug("read as a whole: %s", reason)
            return 0
        _LOG.debug("read %d of %d positions before", n, len(tokens))
        return n

    def step(self, text: torch.Tensor, cache: Any) -> None:
        """Remember what the forward pass that follows will have read: ``text [1, length]``, into this cache."""
        self._ids, self._cache = text, cache

    def end(self, model: Any, insert: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Keep what the generation has read; ``insert`` puts its soft tokens into ids of text."""
        if self._state is None or self._ids is None or self._probe is None:
            return
        try:
            if isinstance(self._cache, tuple):
                raise NotExact("a cache of tuples, which older releases have, ends before the last token")
            tokens = self._conversations.tokens_of(self._rows, insert(self._ids)[0].tolist())
            held = cut(held_by(self._cache), len(tokens), len(tokens))
            self._conversations.prove(model, held, self._probe, self._state)
            if state_of(model) != self._state:
                raise NotExact("the model has changed")
            self._conversations.keep(tokens, compact(held), self._state)
        except NotExact as reason:
            _LOG.debug("not kept: %s", reason)
        except FAILURES as error:  # the text is there; what fails is only what the next one would gain by
            _LOG.debug("not kept: reading it in two parts failed (%s: %s)", type(error).__name__, error)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differ[0]) if len(differ) else shorter
