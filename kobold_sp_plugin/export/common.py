"""What all exports share: rows that fit the model, and names for soft tokens."""

import re
from typing import List, NamedTuple, Tuple

import numpy as np

from ..errors import ExportError, WidthMismatch
from ..gguf.families import embedding_scale, looks_up_by_layer
from ..gguf.reading import ModelFile
from ..softprompt import Order, Scale, SoftPrompt

_LONGEST = 24


class Export(NamedTuple):
    """What was written, and how it is used."""

    path: str
    tokens: Tuple[int, ...]
    """Ids that read as the soft prompt, in order."""
    text: str
    """What can be typed in their place, or "" where nothing can."""
    size: int
    """Bytes of the file."""
    notes: Tuple[str, ...]
    """What else a user has to know."""
    usage: Tuple[str, ...]
    """How each front end is made to use it: a line each."""


def check(softprompt: SoftPrompt, model: ModelFile) -> None:
    """Raise :class:`WidthMismatch` or :class:`ExportError` unless the soft prompt can be exported for this model."""
    width = int(model.embedding.shape[0])
    if softprompt.width != width:
        raise WidthMismatch(f"the soft prompt has {softprompt.width} columns, this model has {width}")
    if looks_up_by_layer(model):
        raise ExportError(
            f"{model.architecture} looks each token up again in its layers; what soft tokens have there cannot be told"
        )
    if model.n_parts > 1:
        raise ExportError(
            f"{model.path} is one of {model.n_parts} parts; make one file of them first: llama-gguf-split --merge"
        )


def rows_in_matrix(softprompt: SoftPrompt, model: ModelFile) -> np.ndarray:
    """The rows as they would stand in the embedding matrix, float32 ``[n_tokens, width]``."""
    if softprompt.scale is Scale.MATRIX:
        return softprompt.rows
    return np.asarray(softprompt.rows / np.float32(embedding_scale(model)))


def slug(softprompt: SoftPrompt) -> str:
    """A short name for file and token names: letters, digits and ``_``."""
    return re.sub(r"[^a-z0-9]+", "_", softprompt.name.lower()).strip("_")[:_LONGEST] or "soft"


def with_start(softprompt: SoftPrompt, tokens: List[int], model: ModelFile) -> str:
    """The beginning of an array of ids and text, as llama-server takes it for ``prompt``: the text comes after it."""
    bos = model.number("tokenizer.ggml.bos_token_id")
    parts = [] if bos is None else [bos]
    parts = [*parts, *tokens] if softprompt.order is Order.AFTER_BOS else [*tokens, *parts]
    return ", ".join(map(str, parts))


def order_note(softprompt: SoftPrompt) -> Tuple[str, ...]:
    """What typing soft tokens changes, where the soft prompt stands before the beginning-of-sequence token."""
    if softprompt.order is Order.AFTER_BOS:
        return ()
    return (
        "Typed as text, the soft tokens stand behind the token that a text begins with; this soft prompt was made to "
        "stand before it, as it does when ids are sent.",
    )
