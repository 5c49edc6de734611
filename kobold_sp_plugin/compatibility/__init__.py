"""Does this soft prompt go with this model: facts of a model, its fingerprint, and the verdict."""

from .model_facts import ModelFacts, context_of, facts, fingerprint, width_of
from .verdict import Judgement, Verdict, judge

__all__ = [
    "Judgement",
    "ModelFacts",
    "Verdict",
    "context_of",
    "facts",
    "fingerprint",
    "judge",
    "width_of",
]
