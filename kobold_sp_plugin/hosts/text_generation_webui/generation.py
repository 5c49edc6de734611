"""What travels with a generation, from the host's state to ``model.generate``, and the room that it needs."""

from typing import Any, Dict, Optional, Sequence

from ...softprompt import SoftPrompt
from .host import log

_CARRIED = "kobold_sp_carried"


class Chosen:
    """Soft prompts of one generation: a value that copies of a state share."""

    def __init__(self, softprompts: Sequence[SoftPrompt], n_processors: int = 0):
        self.softprompts = tuple(softprompts)
        self.n_processors = n_processors
        """How many processors the list that carries this had before the host added its own."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the context that they use."""
        return sum(softprompt.n_tokens for softprompt in self.softprompts)

    def __deepcopy__(self, memo: Any) -> "Chosen":
        return self


def carry(state: Dict[str, Any], softprompts: Sequence[SoftPrompt], context: Optional[int]) -> Dict[str, Any]:
    """A copy of ``state`` with these soft prompts in it, and their room reserved of the model's ``context``."""
    from transformers import LogitsProcessorList

    given = state.get("logits_processor")
    processors = LogitsProcessorList([] if given is None else given if isinstance(given, list) else [given])
    chosen = Chosen(softprompts, len(processors))
    setattr(processors, _CARRIED, chosen)
    reserved = reserve(state, chosen.n_tokens, context)
    if reserved.get("max_new_tokens") != state.get("max_new_tokens"):
        log().warning(
            "%d soft tokens leave no room for a prompt beside %s new tokens; %s are generated at most.",
            chosen.n_tokens,
            state.get("max_new_tokens"),
            reserved["max_new_tokens"],
        )
    return {**reserved, "logits_processor": processors}


def is_carrying(state: Dict[str, Any]) -> bool:
    """Whether :func:`carry` made this state."""
    return hasattr(state.get("logits_processor"), _CARRIED)


def unload(kwargs: Dict[str, Any]) -> Optional[Chosen]:
    """What a call of ``generate`` carries, if anything; the host's list in ``kwargs`` becomes a copy of its own."""
    processors: Any = kwargs.get("logits_processor")
    chosen: Optional[Chosen] = getattr(processors, _CARRIED, None)
    if chosen is not None:
        kwargs["logits_processor"] = type(processors)(processors)
        del processors[chosen.n_processors :]  # a state may be used again, and the host adds a grammar each time
    return chosen


def reserve(state: Dict[str, Any], n_tokens: int, context: Optional[int] = None) -> Dict[str, Any]:
    """A copy of ``state`` whose ``truncation_length`` leaves ``n_tokens`` free, of the model's ``context`` at most.

    The host gives a prompt ``truncation_length - max_new_tokens`` tokens, and reads 0 as "all of it" and less
    as an index from the front. Where that would come of it, ``max_new_tokens`` gives way: the prompt keeps what
    it would have had without soft tokens, up to half of what is left.
    """
    copy = dict(state)
    limit, new = state.get("truncation_length"), state.get("max_new_tokens")
    if not n_tokens or not isinstance(limit, int) or not isinstance(new, int):
        return copy
    limit = limit if context is None else min(limit, context)
    left = max(2, limit - n_tokens)
    if left - new < 1:
        room = left // 2 if limit - new < 1 else min(limit - new, left // 2)
        copy["max_new_tokens"] = left - max(1, room)
    copy["truncation_length"] = left
    return copy
