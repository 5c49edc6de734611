"""The verdict: whether a soft prompt goes with a model, and the sentence that says why."""

from enum import Enum
from typing import Any, List, Mapping, NamedTuple, Optional, Protocol, Sequence

from ..softprompt import own_metadata
from .claims import Claim, claims, same_size, written
from .fingerprints import CLOSE, RELATED, SAME, similarity
from .model_facts import ModelFacts


class Verdict(str, Enum):
    """Whether a soft prompt can be used with a model; its text is what a menu shows."""

    COMPATIBLE = "compatible"
    UNPROVEN = "unproven"
    """Same width, but nothing tells which model it was made for."""
    DIFFERENT = "different embedding matrix"
    """Same width, and its fingerprint says another model: a warning."""
    INCOMPATIBLE = "incompatible"
    UNREADABLE = "unreadable"
    NO_MODEL = "no model"
    NOT_WITH_BACKEND = "not with this backend"

    def __str__(self) -> str:
        return self.value

    @property
    def usable(self) -> bool:
        """Whether it may be selected."""
        return self in (Verdict.COMPATIBLE, Verdict.UNPROVEN, Verdict.DIFFERENT)


class Described(Protocol):
    """What is judged: a soft prompt, or what its file says of it."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def supported(self) -> Sequence[str]: ...


class Judgement(NamedTuple):
    """A verdict and the sentence that explains it to a user."""

    verdict: Verdict
    reason: str


def judge(softprompt: Described, facts: Optional[ModelFacts]) -> Judgement:
    """Whether ``softprompt`` goes with the model that ``facts`` describe; None where no model is loaded."""
    if facts is None:
        return Judgement(Verdict.NO_MODEL, "no model is loaded")
    if facts.refusal is not None:
        return Judgement(Verdict.NOT_WITH_BACKEND, facts.refusal)
    if facts.width is not None and softprompt.width != facts.width:
        reason = f"made for {softprompt.width} columns, this model has {facts.width}"
        return Judgement(Verdict.INCOMPATIBLE, reason)
    if facts.context is not None and softprompt.n_tokens >= facts.context:
        reason = f"uses {softprompt.n_tokens} tokens of a context of {facts.context}: no room for text"
        return Judgement(Verdict.INCOMPATIBLE, reason)
    if facts.width is None:
        return Judgement(Verdict.UNPROVEN, "this model does not tell its width: try whether it works")
    mark = own_metadata(softprompt.metadata).get("fingerprint")
    alike = similarity(mark, facts.fingerprint)
    if alike is None:
        nothing = "" if facts.fingerprint or not mark else "; it has a fingerprint, but none is known of this model"
        return Judgement(Verdict.UNPROVEN, f"same width; {_claimed(claims(softprompt.supported), facts)}{nothing}")
    if alike >= SAME:
        return Judgement(Verdict.COMPATIBLE, "made for this model: its fingerprint matches")
    percent = f"their embeddings are {alike:.0%} alike" if alike < 0.995 else "their embeddings are nearly the same"
    if alike >= CLOSE:
        relative = "made for a close relative of this model, such as its base, a fine-tune or a 4-bit copy"
        return Judgement(Verdict.COMPATIBLE, f"{relative} ({percent}): expect it to work")
    if alike >= RELATED:
        relative = f"made for a distant relative of this model ({percent})"
        return Judgement(Verdict.COMPATIBLE, f"{relative}: it may have lost its effect; compare with and without it")
    reason = "same width, but its fingerprint says that it was made for another model: expect garbled text"
    if _is_fairseq_for_opt(claims(softprompt.supported), facts):
        reason = f"same width, but its fingerprint says that it was made for another model; {_FAIRSEQ_FOR_OPT}"
    return Judgement(Verdict.DIFFERENT, reason)


_FAIRSEQ_FOR_OPT = (
    "it says fairseq dense, and of those it is reported that they work somewhat on OPT of the same size: "
    "try it, and expect less than on its own model"
)
"""The one known case of a soft prompt that is of use on another base type."""


def _claimed(claimed: List[Claim], facts: ModelFacts) -> str:
    """What can be said where there is no fingerprint to compare."""
    if not claimed:
        return "nothing tells which model it was made for"
    says = f"it says that it was made for {', '.join(map(str, claimed))[:200]}"
    model = written(facts.base, facts.size)
    known = [claim for claim in claimed if claim.base is not None]
    if facts.base is None or not known:
        return f"{says}, which is no proof"
    if any(claim.base == facts.base and same_size(claim.size, facts.size) for claim in known):
        return f"{says}, which this model ({model}) may be; that is no proof"
    if _is_fairseq_for_opt(claimed, facts):
        return _FAIRSEQ_FOR_OPT
    return f"{says}, and this model is {model}: expect garbled text"


def _is_fairseq_for_opt(claimed: Sequence[Claim], facts: ModelFacts) -> bool:
    fairseq = [claim for claim in claimed if claim.base == "fairseq dense"]
    return facts.base == "OPT" and any(same_size(claim.size, facts.size) for claim in fairseq)
