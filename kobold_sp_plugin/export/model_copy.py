"""A copy of a GGUF model whose vocabulary has the soft prompt's rows as tokens more.

All tensors stay as they are, byte for byte, but the two that have a row for each token. The output head gets rows of
a token that is never trained to come, and the file lists the new tokens as ones to suppress: newer engines never
draw them. A quantised embedding becomes F16: rows of a soft prompt lose too much in blocks made for a text's.
"""

import os
from pathlib import Path
from typing import BinaryIO, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import CorruptModelFile, ExportError
from ..formats.writing import replacing
from ..gguf import writing
from ..gguf.families import may_untie
from ..gguf.reading import BF16, EMBEDDING, F16, F32, OUTPUT, Field, ModelFile, Tensor, kind_name, read, row_bytes
from ..softprompt import SoftPrompt
from .common import Export, check, order_note, program, request, rows_in_matrix, shell, slug

_AT_ONCE = 2**22
_ROWS_AT_ONCE = 1024
_TOKENS, _SCORES, _TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
_SUPPRESS = "tokenizer.ggml.suppress_tokens"
_CONTROL, _UNKNOWN, _UNUSED = 3, 2, 5
_BIAS = "output.bias"
_NEVER = -1e4
"""A bias that no other part of a logit makes up for."""
_WIDEST_F16 = 65504.0


def export(softprompt: SoftPrompt, model: Union[str, Path], path: Union[str, Path]) -> Export:
    """Write the copy to ``path``, in one step and never more than some megabytes of it in memory at a time.

    Raises an :class:`ExportError`, :class:`WidthMismatch`, :class:`ModelError`, :class:`MissingLibrary` or
    :class:`OSError`.
    """
    found = read(model)
    check(softprompt, found)
    if os.path.exists(path) and os.path.samefile(model, path):
        raise ExportError(f"{path} is the model itself; a copy needs another name")
    rows = rows_in_matrix(softprompt, found)
    vocabulary = int(found.embedding.shape[1])
    tokens = list(range(vocabulary, vocabulary + len(rows)))
    names, fields = _fields(found, softprompt, tokens)
    notes: List[str] = []
    with open(found.path, "rb") as source, replacing(os.fspath(path)) as file:
        tensors = _tensors(found, rows, source, notes)
        writing.write(file, fields, tensors, found.alignment)
    text = "".join(names)
    notes.append(
        "Soft tokens are listed as ones to suppress, which llama.cpp 0.5.0 and later obeys. Where an engine draws them "
        f"nevertheless, which shows as nothing, ban the ids {tokens[0]} to {tokens[-1]}."
    )
    usage = (
        f"koboldcpp, LM Studio and others: open {Path(path).name} in place of the model, and put the soft tokens "
        "(below) at the beginning of Memory or of the system prompt; without them the model is as it was.",
        f"llama-server: `llama-server -m {shell(path)}`, and POST to /completion "
        f"`{request(softprompt, tokens, found)}`, or the soft tokens and your text as one text.",
        f"llama-cpp-python: `{program(softprompt, tokens, found, tokens, model_path=os.fspath(path))}`.",
    )
    return Export(str(path), tuple(tokens), text, os.path.getsize(path), (*notes, *order_note(softprompt)), usage)


def _fields(model: ModelFile, softprompt: SoftPrompt, tokens: Sequence[int]) -> Tuple[List[str], Dict[str, Field]]:
    """The names of the new tokens, and the metadata with them in the vocabulary."""
    known = set(model.strings(_TOKENS))
    vocabulary = int(model.embedding.shape[1])
    if len(model.strings(_TOKENS)) != vocabulary:
        raise CorruptModelFile(f"{model.path} has {len(known)} tokens and {vocabulary} rows of its embedding.")
    stem, number = slug(softprompt), 1
    while f"<|{stem}_0|>".encode() in known:
        number += 1
        stem = f"{slug(softprompt)}{number}"
    names = [f"<|{stem}_{each}|>" for each in range(len(tokens))]
    count = len(names)
    fields = dict(model.fields)
    fields[_TOKENS] = writing.extended(fields[_TOKENS], count, b"".join(writing.text(name).raw for name in names))
    if _SCORES in fields:
        fields[_SCORES] = writing.extended(fields[_SCORES], count, bytes(4 * count))
    types = model.integers(_TYPES)
    types = types if len(types) == vocabulary else np.ones(vocabulary, dtype=np.int32)
    fields[_TYPES] = writing.integers([*types.tolist(), *[_CONTROL] * count])
    fields[_SUPPRESS] = writing.integers([*model.integers(_SUPPRESS).tolist(), *tokens])
    size_key = f"{model.architecture}.vocab_size"
    if size_key in fields:
        fields[size_key] = writing.unsigned(vocabulary + count)
    return names, fields


def _tensors(model: ModelFile, rows: np.ndarray, source: BinaryIO, notes: List[str]) -> List[writing.Content]:
    """The tensors of the copy, those that have a row for each token with rows more."""
    found: List[writing.Content] = []
    vocabulary, count = int(model.embedding.shape[1]), len(rows)
    for name, tensor in model.tensors.items():
        if name == EMBEDDING:
            found.append(_embedding(model, rows, source, notes))
        elif name == OUTPUT:
            found.append(_head(model, tensor, count, source))
        elif name == _BIAS and tensor.kind == F32:
            more = np.full(count, _NEVER, dtype="<f4").tobytes()
            pieces = _copied(source, tensor.offset, 4 * vocabulary, more)
            found.append(writing.Content(name, (vocabulary + count,), F32, 4 * vocabulary + len(more), pieces))
        elif vocabulary in tensor.shape[1:]:
            raise ExportError(f"{name} has a row for each token, too, and it is not known what soft tokens have there")
        else:
            pieces = _copied(source, tensor.offset, tensor.length)
            found.append(writing.Content(name, tensor.shape, tensor.kind, tensor.length, pieces))
    if model.tied and may_untie(model):
        found.append(_head(model, model.embedding, count, source))
        notes.append(
            "The model's head was its embedding; the copy has it twice, so that no soft token is ever likely to come."
        )
    elif model.tied:
        notes.append(
            "The model's head is its embedding: an engine that does not obey that list (llama-cpp-python by itself "
            "does not) draws soft tokens soon."
        )
    return found


def _embedding(model: ModelFile, rows: np.ndarray, source: BinaryIO, notes: List[str]) -> writing.Content:
    tensor = model.embedding
    width, vocabulary = (int(size) for size in tensor.shape)
    kind = tensor.kind if tensor.kind in (F32, F16, BF16) else F16
    if kind == F16 and float(np.abs(rows).max()) > _WIDEST_F16:
        kind = F32
    more = _stored(rows, kind)
    size = vocabulary * width * (4 if kind == F32 else 2)
    if kind == tensor.kind:
        pieces = _copied(source, tensor.offset, size, more)
    else:
        notes.append(
            f"The embedding was {kind_name(tensor.kind)} and is {kind_name(kind)}: "
            f"{(size - row_bytes(tensor) * vocabulary) / 2**20:.0f} MB more. All else is quantised as it was."
        )
        pieces = _unpacked(model, kind, more)
    return writing.Content(EMBEDDING, (width, vocabulary + len(rows)), kind, size + len(more), pieces)


def _head(model: ModelFile, tensor: Tensor, count: int, source: BinaryIO) -> writing.Content:
    """An output matrix: ``tensor``, and for each new token the row of one that was never trained to come."""
    size = row_bytes(tensor)
    vocabulary = int(tensor.shape[1])
    if vocabulary != model.embedding.shape[1] or size * vocabulary > tensor.length:
        raise CorruptModelFile(f"{model.path}: {tensor.name} is no matrix with a row for each token.")
    never = _never_trained(model)
    row = bytes(size) if never is None else _bytes_at(source, tensor.offset + never * size, size)
    pieces = _copied(source, tensor.offset, size * vocabulary, row * count)
    return writing.Content(
        OUTPUT, (tensor.shape[0], vocabulary + count), tensor.kind, size * (vocabulary + count), pieces
    )


def _never_trained(model: ModelFile) -> Optional[int]:
    """A token that no text has: one that is unused, the one for what is unknown, or the one that texts begin with."""
    types = model.integers(_TYPES)
    for kind in (_UNUSED, _UNKNOWN):
        ids = np.flatnonzero(types == kind)
        if len(ids):
            return int(ids[0])
    bos = model.number("tokenizer.ggml.bos_token_id")
    ends = {model.number(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    return bos if bos is not None and bos not in ends and bos < model.embedding.shape[1] else None


def _stored(rows: np.ndarray, kind: int) -> bytes:
    if kind == F32:
        return rows.astype("<f4").tobytes()
    if kind == F16:
        return rows.astype("<f2").tobytes()
    bits = np.ascontiguousarray(rows, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()  # to the nearest, ties to even


def _unpacked(model: ModelFile, kind: int, more: bytes) -> Iterator[bytes]:
    tensor = model.embedding
    for start in range(0, int(tensor.shape[1]), _ROWS_AT_ONCE):
        ids = np.arange(start, min(start + _ROWS_AT_ONCE, int(tensor.shape[1])))
        yield _stored(model.rows(tensor, ids), kind)
    yield more


def _copied(source: BinaryIO, offset: int, length: int, more: bytes = b"") -> Iterator[bytes]:
    for start in range(0, length, _AT_ONCE):
        yield _bytes_at(source, offset + start, min(_AT_ONCE, length - start))
    yield more


def _bytes_at(source: BinaryIO, offset: int, count: int) -> bytes:
    source.seek(offset)
    return source.read(count)
