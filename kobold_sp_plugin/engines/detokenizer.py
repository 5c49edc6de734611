"""Text of ids that come one by one."""

from typing import Any, Sequence

UNFINISHED = "\ufffd"
"""What a decoder writes for the first bytes of a character whose last ones are in the next token."""
_TAIL = 6
"""Tokens of the prompt that new ones are decoded after: a tokenizer may write a word's space only in context."""


class Detokenizer:
    """Makes text of ids that come one by one, and ends it before the first stop sequence.

    ``tokenizer``: one of transformers, or what decodes as they do. ``prompt_ids``: what stands before the text.
    With ``keep_stop`` the text ends behind the stop sequence.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], stop_sequences: Sequence[str], keep_stop: bool = False
    ):
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_TAIL:])
        self._start = 0
        """From here on ids are decoded; what comes before can change nothing any more."""
        self._done = len(self._ids)
        """Ids before this one are text already."""
        self._held = ""
        """Text that may turn out to be the beginning of a stop sequence."""
        self._stop_sequences = [stop for stop in stop_sequences if stop]
        self._keep_stop = keep_stop
        self.ended = False

    def add(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` settle; "" while a character or a possible stop sequence is unfinished."""
        self._ids.extend(ids)
        return self._take(final=False)

    def rest(self) -> str:
        """The text that was still open at the end."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        if self.ended:
            return ""
        known = self._decode(self._ids[self._start : self._done])
        all_of_it = self._decode(self._ids[self._start :])
        if len(all_of_it) > len(known) and (final or not all_of_it.endswith(UNFINISHED)):
            self._held += all_of_it[len(known) :]
            self._start, self._done = self._done, len(self._ids)
        return self._settled(final)

    def _settled(self, final: bool) -> str:
        found = [(self._held.find(stop), stop) for stop in self._stop_sequences if stop in self._held]
        if found:
            self.ended = True
            at, stop = min(found)
            return self._held[: at + len(stop)] if self._keep_stop else self._held[:at]
        keep = 0
        if not final:
            longest = max((len(stop) for stop in self._stop_sequences), default=1) - 1
            sizes = range(min(longest, len(self._held)), 0, -1)
            keep = next((n for n in sizes if any(s.startswith(self._held[-n:]) for s in self._stop_sequences)), 0)
        settled, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return settled

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
