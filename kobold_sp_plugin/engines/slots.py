"""Saved states for llama-server's slots: what a model has made of soft prompts, under ids that stand for them.

The server takes a restored state for the beginning of any prompt that begins with those ids. They are ordinary tokens
in an order that no text has, drawn from the content, so that no two soft prompts share them.
"""

import hashlib
import os
import secrets
from pathlib import Path
from typing import NamedTuple, Sequence, Tuple, Union

import numpy as np

from ..gguf.reading import ModelFile
from ..softprompt import SoftPrompt
from .llama_bindings import Decoder
from .llama_cpp import beginning_of

_NORMAL = 1
_NAME_DIGITS = 16


class Slot(NamedTuple):
    """A state's file name, and the ids that stand for what is in it."""

    filename: str
    ids: Tuple[int, ...]
    takes_bos: bool
    """The beginning-of-sequence token is the first of the ids; the text goes on without it."""


def slot_of(softprompts: Sequence[SoftPrompt], model: ModelFile) -> Slot:
    """The slot of these soft prompts with this model; the same each time."""
    bos = model.number("tokenizer.ggml.bos_token_id")
    beginning, _ = beginning_of(softprompts, [] if bos is None else [bos], model, bos)
    sample = model.rows(model.embedding, np.arange(min(64, int(model.embedding.shape[1]))))
    seed = np.frombuffer(bytes.fromhex(beginning.key), dtype="<u4") ^ np.frombuffer(
        hashlib.sha256(sample.tobytes()).digest(), dtype="<u4"
    )
    types = model.integers("tokenizer.ggml.token_type")
    ordinary = np.flatnonzero(types == _NORMAL)
    ordinary = ordinary if len(ordinary) else np.arange(int(model.embedding.shape[1]))
    drawn = np.random.RandomState(seed).choice(ordinary, sum(each.n_tokens for each in softprompts)).tolist()
    n_before = len(beginning.before)
    first = [] if beginning.bos is None else [beginning.bos]
    ids = (*drawn[:n_before], *first, *drawn[n_before:])
    return Slot(f"{seed.tobytes().hex()[:_NAME_DIGITS]}.slot", ids, bool(first))


def write_slot(
    softprompts: Sequence[SoftPrompt], model: ModelFile, path: Union[str, Path], cache_type: str = "f16"
) -> Slot:
    """Load the model, have it read these soft prompts, and write the state to ``path``, in one step.

    ``cache_type``: as the server has it. Raises :class:`ModelError`, :class:`MissingLibrary` or :class:`OSError`.
    """
    slot = slot_of(softprompts, model)
    bos = model.number("tokenizer.ggml.bos_token_id")
    beginning, _ = beginning_of(softprompts, [] if bos is None else [bos], model, bos)
    decoder = Decoder(model.path, len(slot.ids) + 1, cache_type=cache_type)
    folder, _ = os.path.split(os.path.abspath(path))
    sibling = os.path.join(folder, f".kobold-sp-{secrets.token_hex(8)}.tmp")
    try:
        decoder.read_rows(beginning.before, 0)
        if beginning.bos is not None:
            decoder.read_ids([beginning.bos], len(beginning.before))
            decoder.read_rows(beginning.after, len(beginning.before) + 1)
        decoder.save(sibling, slot.ids)
        os.replace(sibling, path)
    finally:
        decoder.close()
        if os.path.lexists(sibling):
            os.unlink(sibling)
    return slot
