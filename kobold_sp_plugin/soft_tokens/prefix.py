"""Prefix reuse: the keys and values of soft tokens that stand at the front, computed once for all requests.

Where that would not be exact, or cannot be known to be, nothing is reused; a debug line of this module's logger
says why.
"""

import logging
import threading
from collections import OrderedDict
from typing import Any, Dict, Hashable, List, Optional

import torch

from .caches import (
    FAILURES,
    FIRST_ROW,
    NotExact,
    agree,
    begin_behind,
    bytes_of,
    check,
    computed,
    kind_of,
    parted,
    sliced,
    stacked,
    state_of,
    was_emptied,
)
from .rows import Rows

_LOG = logging.getLogger(__name__)

MOST_PREFIXES = 8
MOST_BYTES = 512 * 2**20
"""All prefixes of one model together; one that is larger is not kept."""

_PROBE_POSITIONS = 8


class Prefixes:
    """The prefixes of one model, at most ``MOST_PREFIXES`` and ``MOST_BYTES``; dropped when the model changes.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._state: Hashable = None
        self._proved: Dict[Hashable, bool] = {}

    def shorten(self, model: Any, fronts: List[Rows], inputs: Dict[str, Any], mask: Optional[torch.Tensor]) -> bool:
        """Change ``inputs``, in place, to begin behind the soft tokens; False: they stay as they are.

        ``fronts`` has what all rows begin with, or as much for each of them. ``inputs`` are those of the forward pass
        that reads the whole prompt, with an empty cache; ``mask`` is the prompt's attention mask, None where nothing
        is padding.
        """
        try:
            n_prefix = self._shorten(model, fronts, inputs, mask)
        except NotExact as reason:
            _LOG.debug("no prefix reuse: %s", reason)
            return False
        _LOG.debug("read %d soft tokens from the cache of their prefix", n_prefix)
        return True

    def _shorten(self, model: Any, fronts: List[Rows], inputs: Dict[str, Any], mask: Optional[torch.Tensor]) -> int:
        rows = fronts[0]
        if rows.room < rows.n_tokens:
            raise NotExact("there is no text behind the soft tokens")
        check(model, inputs, mask)
        n_prefix = _length_of_prefix(rows, inputs["input_ids"])
        keys = [(each.softprompts, n_prefix) for each in fronts]
        if len(set(keys)) > MOST_PREFIXES:
            raise NotExact(f"the rows of the batch begin with more than {MOST_PREFIXES} different soft prompts")
        state = state_of(model)
        with self._lock:
            if state != self._state:
                self._kept.clear()
                self._proved.clear()
                self._state = state
            prefixes = [self._kept.get(key) for key in keys]
        if any(each is None or was_emptied(each) for each in prefixes):
            prefixes = self._made(model, inputs, n_prefix, len(fronts))
        for prefix in prefixes:
            if isinstance(prefix, NotExact) and len(prefixes) > 1:
                raise prefix  # of this batch, not of each of its soft prompts
        for key, prefix in zip(keys, prefixes):
            self._keep(key, prefix, state)
        for prefix in prefixes:
            if isinstance(prefix, NotExact):
                raise prefix
        if len(prefixes) > 1:
            prefixes = [stacked(prefixes, len(inputs["input_ids"]) // len(prefixes))]
        begin_behind(inputs, prefixes[0], n_prefix)
        return n_prefix

    def _made(self, model: Any, inputs: Dict[str, Any], n_prefix: int, n_fronts: int) -> List[Any]:
        """New prefixes, or why there are none."""
        try:
            every = slice(0, None, len(inputs["input_ids"]) // n_fronts) if n_fronts > 1 else FIRST_ROW
            prefix = computed(model, inputs, n_prefix, every)
            size = bytes_of(prefix)
            if size > MOST_BYTES:
                raise NotExact(f"{size} bytes of keys and values are more than are kept")
            prefixes = parted(prefix, n_fronts) if n_fronts > 1 else [prefix]
            self._prove(model, inputs, prefixes[0], n_prefix)
        except NotExact as reason:
            return [reason] * n_fronts
        except FAILURES as error:
            # The prompt as a whole is what was asked for: a model that cannot read a part of it may still read that.
            return [NotExact(f"reading it in two parts failed ({type(error).__name__}: {error})")] * n_fronts
        return prefixes

    def _keep(self, key: Hashable, prefix: Any, state: Hashable) -> None:
        with self._lock:
            if state != self._state:
                return
            self._kept[key] = prefix
            self._kept.move_to_end(key)
            while len(self._kept) > MOST_PREFIXES or sum(map(bytes_of, self._kept.values())) > MOST_BYTES:
                self._kept.popitem(last=False)

    def _prove(self, model: Any, inputs: Dict[str, Any], prefix: Any, n_prefix: int) -> None:
        """Once for each kind of cache: the logits behind the prefix have to be those of the whole prompt."""
        kind = kind_of(prefix)
        if kind not in self._proved:
            length = min(inputs["input_ids"].shape[-1], n_prefix + _PROBE_POSITIONS)
            self._proved[kind] = agree(model, sliced(inputs, slice(0, length)), prefix, n_prefix)
        if not self._proved[kind]:
            raise NotExact("a probe with reuse differs from one without")


def _length_of_prefix(rows: Rows, ids: torch.Tensor) -> int:
    """Positions up to the last soft token, which all rows of ``ids`` have to share."""
    if rows.n_before == rows.n_tokens:
        n_prefix = rows.n_tokens
    else:  # behind the beginning-of-sequence token, where there is one
        n_prefix = rows.n_tokens + int(bool((ids[0, rows.n_before] < rows.first).item()))
        if not bool((ids[:, :n_prefix] == ids[:1, :n_prefix]).all()):
            raise NotExact("the rows of the batch begin differently")
    if n_prefix >= ids.shape[1]:
        raise NotExact("there is no text behind the soft tokens")
    return n_prefix
