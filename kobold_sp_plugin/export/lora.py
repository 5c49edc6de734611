"""A LoRA adapter on the input embedding, which gives tokens that stand for nothing the rows of a soft prompt.

llama.cpp adds ``A[id] @ B`` to what it reads for a token. ``A`` has a 1 for each reserved token, ``B`` what its row
lacks. Source: ``build_inp_embd`` in ``src/llama-graph.cpp`` and ``src/llama-adapter.cpp`` of llama.cpp 0.5.0.
"""

import os
import re
import struct
from pathlib import Path
from typing import Iterator, List, Union

import numpy as np

from ..errors import NoReservedTokens, TiedEmbedding
from ..formats.writing import replacing
from ..gguf import writing
from ..gguf.reading import EMBEDDING, F32, Q4_0, ModelFile, read
from ..softprompt import SoftPrompt
from .common import Export, check, order_note, program, request, rows_in_matrix, shell

_RESERVED = re.compile(
    rb"<\|?(reserved|unused|extra|dummy|placeholder|special_?\d|pad_?\d)[^>]*>|\[(control|unused|pad)_?\d+\]", re.I
)
"""What vocabularies call tokens that were never trained."""
_UNUSED = 5
_TYPED = (3, 4)
"""Types of tokens that are found in a text by their name: control, user-defined."""
_BLOCK = 32
_BLOCK_BYTES = 18
_ONE = struct.pack("<e", -0.125)
"""The scale of a block of Q4_0 whose quant 0 then means exactly 1, and quant 8 exactly 0."""


def export(softprompt: SoftPrompt, model: Union[str, Path], path: Union[str, Path]) -> Export:
    """Write the adapter to ``path``, in one step.

    Raises :class:`TiedEmbedding`, :class:`NoReservedTokens`, another :class:`ExportError`, :class:`WidthMismatch`,
    :class:`ModelError` or :class:`OSError`.
    """
    found = read(model)
    check(softprompt, found)
    if found.tied:
        raise TiedEmbedding(
            f"{found.path} has no output matrix of its own: its head is its embedding, and llama.cpp would end itself "
            "at an adapter for that. Export it with --to gguf."
        )
    tokens = reserved(found, softprompt.n_tokens)
    base = found.rows(found.embedding, np.array(tokens))
    difference = rows_in_matrix(softprompt, found) - base
    rank = -(-softprompt.n_tokens // _BLOCK) * _BLOCK
    up = np.zeros((softprompt.width, rank), dtype="<f4")
    up[:, : len(tokens)] = difference.T
    vocabulary = int(found.embedding.shape[1])
    length = vocabulary * rank // _BLOCK * _BLOCK_BYTES
    fields = {
        "general.type": writing.text("adapter"),
        "general.architecture": writing.text(found.architecture),
        "general.name": writing.text(softprompt.name or "soft prompt"),
        "adapter.type": writing.text("lora"),
        "adapter.lora.alpha": writing.real(rank),
    }
    tensors = [
        writing.Content(f"{EMBEDDING}.lora_a", (rank, vocabulary), Q4_0, length, _selecting(tokens, vocabulary, rank)),
        writing.Content(f"{EMBEDDING}.lora_b", (rank, softprompt.width), F32, up.nbytes, [up.tobytes()]),
    ]
    with replacing(os.fspath(path)) as file:
        writing.write(file, fields, tensors)
    names = found.strings("tokenizer.ggml.tokens")
    types = found.integers("tokenizer.ggml.token_type")
    typed = all(types[each] in _TYPED for each in tokens)
    text = b"".join(names[each] for each in tokens).decode("utf-8", "replace") if typed else ""
    place = (
        "put the soft tokens (below) at the beginning of Memory"
        if typed
        else "but not with this model: its tokens have no text"
    )
    usage = (
        f"llama-server: `llama-server -m {shell(model)} --lora {shell(path)}`, and POST to /completion "
        f'`{request(softprompt, tokens, found)}`; with `"lora": [{{"id": 0, "scale": 0.0}}]` in it, the soft prompt is '
        "left out.",
        f"koboldcpp: `koboldcpp --model {shell(model)} --lora {shell(path)}`, and {place}.",
        "llama-cpp-python: "
        f"`{program(softprompt, tokens, found, model_path=os.fspath(model), lora_path=os.fspath(path))}`.",
    )
    return Export(str(path), tuple(tokens), text, os.path.getsize(path), order_note(softprompt) if typed else (), usage)


def reserved(model: ModelFile, count: int) -> List[int]:
    """Ids of ``count`` tokens that stand for nothing; those that can be typed first.

    Raises :class:`NoReservedTokens`.
    """
    names = model.strings("tokenizer.ggml.tokens")
    types = model.integers("tokenizer.ggml.token_type")
    if len(types) != len(names):
        types = np.zeros(len(names), dtype=np.int32)
    named = [number for number, name in enumerate(names) if _RESERVED.match(name)]
    typed = [number for number in named if types[number] in _TYPED]
    found = typed if len(typed) >= count else sorted({*named, *np.flatnonzero(types == _UNUSED).tolist()})
    if len(found) < count:
        raise NoReservedTokens(
            f"{model.path} has {len(found)} tokens that stand for nothing, and the soft prompt needs {count}. "
            "Export it with --to gguf, which adds tokens."
        )
    return found[:count]


def _selecting(tokens: List[int], vocabulary: int, rank: int) -> Iterator[bytes]:
    """The rows of ``A`` in Q4_0: zeros, and a 1 in column i for the i-th of ``tokens``, which ascend."""
    row = rank // _BLOCK * _BLOCK_BYTES
    at = 0
    for column, token in enumerate(tokens):
        for start in range(at, token, 4096):
            yield bytes(row * (min(start + 4096, token) - start))
        quants = np.full(_BLOCK, 8, dtype=np.uint8)
        quants[column % _BLOCK] = 0
        half = _BLOCK // 2
        block = _ONE + (quants[:half] | quants[half:] << 4).tobytes()
        before = column // _BLOCK * _BLOCK_BYTES
        yield bytes(before) + block + bytes(row - before - _BLOCK_BYTES)
        at = token + 1
    for start in range(at, vocabulary, 4096):
        yield bytes(row * (min(start + 4096, vocabulary) - start))
