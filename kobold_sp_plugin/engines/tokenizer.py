"""A tokenizer of transformers, as engines read texts with it."""

import logging
from typing import Any, Dict, List, Optional, Sequence, Union

from ..errors import ModelError
from ..soft_tokens import with_softprompts
from ..soft_tokens.text import WORD_STARTS, without_oldest_text, without_soft_tokens
from ..softprompt import SoftPrompt, TaggedText
from . import GenerationSettings

log = logging.getLogger(__name__)

_LONGEST_WORD = 32
"""Tokens; a text without spaces is cut anywhere."""


class Tokenizer:
    """Makes ids of texts to be continued; soft prompts in them become ids of their soft tokens.

    ``name``: the model's, for messages.
    """

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer = tokenizer
        self._name = name
        self._texts: List[str] = []

    def ids(self, text: str) -> List[int]:
        """Ids of ``text`` behind what the tokenizer begins a text with; never none. Raises :class:`ModelError`."""
        if text:
            tokenizer = with_softprompts(self._tokenizer) if isinstance(text, TaggedText) else self._tokenizer
            ids = list(tokenizer(text)["input_ids"])
            end = self._tokenizer.eos_token_id
            if len(ids) > 1 and ids[-1] == end and not text.endswith(str(self._tokenizer.eos_token)):
                ids.pop()  # some tokenizers close every text; what follows then would be a new one
        else:
            ids = self.prefix()
        if ids:
            return ids
        start = self._tokenizer.bos_token_id
        start = self._tokenizer.eos_token_id if start is None else start
        if start is None:
            raise ModelError(f"{self._name} has no token that a text can begin with; the prompt must not be empty.")
        return [start]

    def prefix(self) -> List[int]:
        """What the tokenizer puts in front of every text: mostly the beginning-of-sequence token, or nothing."""
        ids = list(self._tokenizer("")["input_ids"])
        end = self._tokenizer.eos_token_id
        return ids[:-1] if ids and ids[-1] == end != self._tokenizer.bos_token_id else ids

    def texts(self) -> List[str]:
        """What each token adds to a text, in lower case, by its id; made once."""
        if not self._texts:
            anchor = self.ids("x")[-1:]
            before = self._tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
            sequences = [[*anchor, each] for each in range(len(self._tokenizer))]
            decoded = self._tokenizer.batch_decode(sequences, clean_up_tokenization_spaces=False)
            self._texts = [text[len(before) :].lower() for text in decoded]
        return self._texts

    def written(self, settings: GenerationSettings, ids: Sequence[int], is_first: bool) -> List[Union[str, SoftPrompt]]:
        """What ``settings`` were fitted to as ``ids``, behind the beginning token, for who tokenises text by itself.

        Each text will stand behind a special token, but for one that ``is_first``. A story that was cut within a word
        begins with the next one.
        """
        whole = TaggedText((settings.memory, settings.prompt))
        parts = self._cut(settings, ids)
        first = self.prefix() if whole else list(ids)
        more = "".join(self._tokenizer.convert_ids_to_tokens(first[self.begins(first) :]))
        found: List[Union[str, SoftPrompt]] = [more] if more else []
        for number, part in enumerate(parts):
            if isinstance(part, str):
                part = self._stripped(part) if number else part
                part = part if is_first and not found else self._behind_special(part)
            found.append(part)
        return found

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether the first of ``ids`` is the beginning-of-sequence token."""
        return self._tokenizer.bos_token_id is not None and list(ids[:1]) == [self._tokenizer.bos_token_id]

    def _cut(self, settings: GenerationSettings, ids: Sequence[int]) -> List[Union[str, SoftPrompt]]:
        """The parts of a text that was fitted as ``ids``, from where the rest of it has the tokens that it had."""
        everything = self.ids(TaggedText((settings.memory, settings.prompt)))
        n_head = len(without_soft_tokens(self.ids(settings.memory) if settings.memory else self.prefix()))
        n_going = len(everything) - len(ids)
        parts = self._without_oldest(settings, n_going)
        for later in range(_LONGEST_WORD if n_going else 0):
            tried = self._without_oldest(settings, n_going + later)
            found = self.ids(TaggedText(tried))
            if found == without_oldest_text(everything, n_going + later, n_head):
                return tried
            if len(self.ids(TaggedText(parts))) > len(ids):
                parts = tried
        return parts

    def _without_oldest(self, settings: GenerationSettings, n_going: int) -> List[Union[str, SoftPrompt]]:
        """The parts of a text without the ``n_going`` oldest tokens of the story."""
        n_kept = len(without_soft_tokens(self.ids(settings.memory))) - len(self.prefix()) if settings.memory else 0
        parts: List[Union[str, SoftPrompt]] = []
        for number, part in enumerate(TaggedText((settings.memory, settings.prompt)).parts):
            if isinstance(part, str) and n_going > 0:
                part = self._stripped(part) if number else part
                places = self._tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
                starts = [*(start for start, _ in places), len(part)]
                begin = min(n_kept, len(places))
                end = min(begin + n_going, len(places))
                n_kept, n_going = n_kept - begin, n_going - (end - begin)
                part = part[: starts[begin]] + part[starts[end] :]
            parts.append(part)
        return parts

    def _stripped(self, part: str) -> str:
        """A text behind a soft prompt without the space that the tokenizer adds, as :func:`tokenised` takes it."""
        adds_space = self._tokenizer.convert_ids_to_tokens(self._bare("a"))[0].startswith(WORD_STARTS)
        return part[1:] if adds_space and part.startswith(" ") else part

    def _bare(self, text: str) -> List[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _behind_special(self, text: str) -> str:
        """``text``, or with a space before it, so that it becomes behind a special token what it becomes alone."""
        special = str(self._tokenizer.bos_token or self._tokenizer.eos_token)
        return next((each for each in (text, " " + text) if self._bare(special + each)[1:] == self._bare(text)), text)

    def chat_prompt(self, messages: Sequence[Dict[str, Any]]) -> Optional[str]:
        """A conversation as the tokenizer's template writes it; None where it has none, or not for these messages."""
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates refuse what they do not know, each in its own way
            log.warning("The template for conversations of %s cannot be used: %s", self._name, error)
            return None
        start = str(self._tokenizer.bos_token or "")
        # Where the tokenizer begins every text with it, a second one would stand there.
        return text[len(start) :] if start and self.prefix() and text.startswith(start) else text
