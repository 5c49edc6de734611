"""What the model writes with a soft prompt and without it, from the same openings and the same seeds."""

from typing import Any, List, NamedTuple, Sequence

from ..engines import GenerationSettings
from ..engines.transformers import TransformersEngine
from ..soft_tokens import attach
from ..softprompt import SoftPrompt
from .dataset import Dataset

_OPENING_TOKENS = 8


class Sample(NamedTuple):
    """One opening and how it goes on."""

    opening: str
    without: str
    having: str
    """With the soft prompt."""


def openings(dataset: Dataset, pieces: Sequence[int], tokenizer: Any, count: int = 3) -> List[str]:
    """The first words of some of these pieces, those first that begin a document."""
    found: List[str] = []
    for piece in sorted(pieces, key=lambda piece: not dataset.is_beginning(piece)):
        ids = dataset.batch([piece]).ids[0, len(dataset.prefix) :][:_OPENING_TOKENS]
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
        text = text.rsplit(" ", 1)[0] if " " in text else text  # the last word may be half of one
        if text and text not in found:
            found.append(text)
        if len(found) == count:
            break
    return found


def written(
    model: Any, tokenizer: Any, softprompts: Sequence[SoftPrompt], opening: str, seed: int, n_tokens: int = 80
) -> str:
    """How ``model`` goes on after ``opening``; it gets soft tokens, and has none when this ends."""
    engine = TransformersEngine(model, tokenizer, "")
    try:
        settings = GenerationSettings(opening, max_length=n_tokens, seed=seed)
        return "".join(engine.generate(settings, softprompts))
    finally:
        attach(model).detach()


def samples(model: Any, tokenizer: Any, softprompt: SoftPrompt, beginnings: Sequence[str], seed: int) -> List[Sample]:
    """Each of ``beginnings``, gone on with, with and without the soft prompt."""
    return [
        Sample(
            opening,
            written(model, tokenizer, [], opening, seed + number),
            written(model, tokenizer, [softprompt], opening, seed + number),
        )
        for number, opening in enumerate(beginnings)
    ]
