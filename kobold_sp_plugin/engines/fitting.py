"""How a text is made to fit the context that there is for it."""

from dataclasses import replace
from itertools import takewhile
from typing import List, Optional, Protocol, Sequence, Tuple

from ..errors import ContextExceeded
from ..soft_tokens.text import without_oldest_text, without_soft_tokens
from ..softprompt import SoftPrompt, TaggedText, parts_of
from . import GenerationSettings


class Reader(Protocol):
    """What makes ids of texts to be continued."""

    def ids(self, text: str) -> List[int]:
        """Ids of ``text`` behind what every text begins with; never none."""

    def prefix(self) -> List[int]:
        """What every text begins with."""


def in_front(
    settings: GenerationSettings, softprompts: Sequence[SoftPrompt]
) -> Tuple[GenerationSettings, Tuple[SoftPrompt, ...]]:
    """``settings`` without the soft prompts that the text begins with, and these behind ``softprompts``.

    They are read the same either way; in front they are kept from one text to the next.
    """
    found, memory = _split(settings.memory)
    more, prompt = _split(settings.prompt) if not memory else ((), settings.prompt)
    if not found and not more:
        return settings, tuple(softprompts)
    return replace(settings, memory=memory, prompt=prompt), (*softprompts, *found, *more)


def _split(text: str) -> Tuple[Tuple[SoftPrompt, ...], str]:
    """The soft prompts that a text begins with, and what follows."""
    parts = parts_of(text)
    front = tuple(takewhile(lambda part: isinstance(part, SoftPrompt), parts))
    rest = TaggedText(parts[len(front) :])
    return front, rest if rest.softprompts else str(rest)  # type: ignore[return-value]


def softprompts_inside(settings: GenerationSettings) -> Tuple[SoftPrompt, ...]:
    """The soft prompts that stand in the text."""
    return TaggedText((settings.memory, settings.prompt)).softprompts


def fit(settings: GenerationSettings, n_soft: int, context: Optional[int], reader: Reader) -> List[int]:
    """The ids to continue: all of the text, or as much of the story's end as the context has room for.

    The beginning of a story that is too long goes by the eighth of its room: the next turns then begin like
    this one, until the story has grown by an eighth, and what they have in common need not be read again.
    ``n_soft``: soft tokens beside those that stand in the text. Raises :class:`ContextExceeded`.
    """
    ids = reader.ids(settings.memory + settings.prompt)
    limits = [limit for limit in (context, settings.max_context_length) if limit is not None]
    if not limits:
        return ids
    room = min(limits) - n_soft - settings.max_length
    if len(ids) <= room:
        return ids
    head = reader.ids(settings.memory) if settings.memory else reader.prefix()
    n_inside = len(ids) - len(without_soft_tokens(ids))
    n_kept = len(without_soft_tokens(head))
    if n_kept + n_inside >= room:
        n_soft += n_inside
        soft = f"{n_soft} of soft prompts, " if n_soft else ""
        memory = f"{n_kept} of memory, " if settings.memory else ""
        raise ContextExceeded(
            f"A context of {min(limits)} tokens has no room for the story beside {soft}{memory}"
            f"{settings.max_length} of new text."
        )
    step = max(1, (room - n_kept - n_inside) // 8)
    n_going = -(-(len(ids) - room) // step) * step
    if n_inside:
        return without_oldest_text(ids, n_going, n_kept)
    return head + ids[len(head) + n_going :]
