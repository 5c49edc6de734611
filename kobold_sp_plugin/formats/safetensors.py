"""Plain ``.safetensors``: the rows as its one tensor, or the one named as soft prompts are.

The file is eight bytes of length, a JSON header and the values. It is read and written here, not by the
library of that name: the lowest release of transformers that we support comes without it, a listing needs the
header only, and the header has to be checked against the file before memory is taken.
"""

import json
import os
import struct
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np

from ..errors import BadTensorHeader, TooLarge, TrailingBytes, TruncatedTensor, UnsupportedDtype
from ..softprompt import SoftPrompt
from . import metadata, npy, torch_file
from .archive import BoundedFile
from .source import Candidate, Source
from .writing import write_file

MAX_HEADER = 2**20
META = "meta.json"
"""The key under which our files carry the metadata, as the text that KoboldAI's zip has."""
_DTYPES = {"F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2"), "F32": ("float32", "<f4"), "F64": ("float64", "<f8")}
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}


def detect(candidate: Candidate) -> bool:
    """Whether it begins with a length and, behind it, a JSON object."""
    start = candidate.start
    return (
        len(start) > 8 and start[8:9] == b"{" and struct.unpack_from("<Q", start)[0] <= max(candidate.size, MAX_HEADER)
    )


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The rows and the metadata. Raises a FormatError."""
    label = os.path.basename(candidate.path)
    yield source(candidate.file, label, candidate.part)


def source(file: BoundedFile, label: str, part: Optional[str] = None) -> Source:
    """The soft prompt in the open ``file``. Raises a FormatError."""
    header, start = _header(file, label)
    meta = header.pop("__metadata__", None)
    names = sorted(header)
    places = {name: _place(header[name], name) for name in names}
    end = 0
    for name in sorted(names, key=lambda each: places[each][2]):
        if places[name][2] != end:
            raise BadTensorHeader(f"{label} with {name[:100]!r} not next to its neighbour", "no gap and no overlap")
        end = places[name][3]
    if start + end > file.size:
        raise TruncatedTensor(f"{label} ends after {file.size} of {start + end} bytes", "all of them")
    if start + end < file.size:
        raise TrailingBytes(f"{label} goes on for {file.size - start - end} bytes", "nothing after the last tensor")
    name = torch_file.choose(names, [places[each][1] for each in names], part, label)
    dtype, shape, begin, _ = places[name]
    n_tokens, width = npy.checked_shape(shape, name[:100])
    if dtype not in _DTYPES:
        raise UnsupportedDtype(f"{name[:100]} of dtype {dtype[:20]!r}", "F16, BF16, F32 or F64")
    known, stored = _DTYPES[dtype]
    if places[name][3] - begin != n_tokens * width * np.dtype(stored).itemsize:
        raise BadTensorHeader(f"{name[:100]} of another size than its shape and dtype say", "a true header")

    def rows() -> np.ndarray:
        file.seek(start + begin)
        result = np.empty((n_tokens, width), dtype=np.float32)
        npy.fill(result.reshape(-1), result.size, file.read, known, np.dtype(stored), name[:100])
        return result

    others = tuple(each[:100] for each in names if each != name)
    return Source((n_tokens, width), known, rows, _metadata_of(meta), others=others)


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the file; metadata goes where the format has a place for texts."""
    write_file(path, content(softprompt, dtype))


def content(softprompt: SoftPrompt, dtype: str) -> bytes:
    """The bytes of the file."""
    data = npy.stored(softprompt.rows, dtype).tobytes()
    text = json.dumps(metadata.portable(softprompt), ensure_ascii=True)
    tensor = {"dtype": _NAMES[dtype], "shape": list(softprompt.rows.shape), "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {"format": "pt", META: text}, "prompt_embeddings": tensor}).encode("ascii")
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def _header(file: BoundedFile, label: str) -> Tuple[Dict[str, Any], int]:
    """The header and where the values begin."""
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
    if length > MAX_HEADER:
        raise TooLarge(f"{label} with a header of {length} bytes", f"at most {MAX_HEADER}")
    pieces: List[bytes] = []
    while sum(map(len, pieces)) < length:
        piece = file.read(min(length - sum(map(len, pieces)), npy.CHUNK))
        if not piece:
            raise TruncatedTensor(f"{label} ends inside its header", f"{length} bytes of it")
        pieces.append(piece)
    value = metadata.parse_json(b"".join(pieces), label)
    if not isinstance(value, dict):
        raise BadTensorHeader(f"{label} whose header is no object", "an object")
    return value, 8 + length


def _place(entry: Any, name: str) -> Tuple[str, List[int], int, int]:
    """dtype, shape and the place of the values, in bytes behind the header."""
    parts = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = parts.get("dtype"), _whole(parts.get("shape")), _whole(parts.get("data_offsets"))
    if isinstance(dtype, str) and shape is not None and offsets is not None and len(offsets) == 2:
        begin, end = offsets
        if begin <= end and len(shape) <= 8:
            return dtype, shape, begin, end
    raise BadTensorHeader(f"{name[:100]!r} without dtype, shape and data_offsets", "all three, in order")


def _whole(values: Any) -> Optional[List[int]]:
    """``values`` where they are a list of whole numbers."""
    whole = isinstance(values, list) and all(type(value) is int and 0 <= value <= 2**62 for value in values)
    return values if whole else None


def _metadata_of(texts: Any) -> Dict[str, Any]:
    """The metadata: ours, or what texts another writer left."""
    if not isinstance(texts, dict):
        return {}
    if isinstance(texts.get(META), str):
        return metadata.parse(texts[META].encode("utf-8", "surrogatepass"), META)
    found = {key: value for key, value in texts.items() if isinstance(value, str) and key != "format"}
    metadata.check_size(len(json.dumps(found)), "metadata")
    return found
