"""A tokenizer of transformers, as engines read texts with it."""

import logging
from typing import Any, Dict, List, Optional, Sequence

from ..errors import ModelError
from ..soft_tokens import with_softprompts
from ..softprompt import TaggedText

log = logging.getLogger(__name__)


class Tokenizer:
    """Makes ids of texts to be continued; soft prompts in them become ids of their soft tokens.

    ``name``: the model's, for messages.
    """

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer = tokenizer
        self._name = name

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
