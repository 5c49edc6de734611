"""What all exports share: rows that fit the model, and names for soft tokens."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import List, NamedTuple, Sequence, Tuple, Union

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


def shell(path: Union[str, Path]) -> str:
    """A path as a command line of this machine has it."""
    return shlex.quote(str(path)) if os.name == "posix" else subprocess.list2cmdline([str(path)])


def request(softprompt: SoftPrompt, tokens: Sequence[int], model: ModelFile) -> str:
    """The body of a request that llama-server takes: ids, and the text after them."""
    ids = ", ".join(map(str, _with_start(softprompt, tokens, model)))
    return f'{{"prompt": [{ids}, "your text"]}}'


def program(
    softprompt: SoftPrompt, tokens: Sequence[int], model: ModelFile, banned: Sequence[int] = (), **options: str
) -> str:
    """A line of Python for llama-cpp-python.

    ``banned``: ids in a row that it must be kept from drawing. ``options``: the names of files, by what ``Llama``
    calls them.
    """
    ids = ", ".join(map(str, _with_start(softprompt, tokens, model)))
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    bias = f", logit_bias=dict.fromkeys(range({banned[0]}, {banned[-1] + 1}), -1e9)" if banned else ""
    return (
        f"from llama_cpp import Llama; llm = Llama({given}, n_ctx=0); "
        f'llm.create_completion([{ids}, *llm.tokenize(b"your text", add_bos=False)]{bias})'
    )


def _with_start(softprompt: SoftPrompt, tokens: Sequence[int], model: ModelFile) -> List[int]:
    """What stands before a text: soft tokens, and what every text begins with."""
    bos = model.number("tokenizer.ggml.bos_token_id")
    parts = [] if bos is None else [bos]
    return [*parts, *tokens] if softprompt.order is Order.AFTER_BOS else [*tokens, *parts]


def order_note(softprompt: SoftPrompt) -> Tuple[str, ...]:
    """What typing soft tokens changes, where the soft prompt stands before the beginning-of-sequence token."""
    if softprompt.order is Order.AFTER_BOS:
        return ()
    return (
        "Typed as text, the soft tokens stand behind the token that a text begins with; this soft prompt was made to "
        "stand before it, as it does when ids are sent.",
    )
