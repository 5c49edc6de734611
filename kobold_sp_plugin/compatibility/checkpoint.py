"""The embedding matrix of a model that is not loaded: single rows of a safetensors checkpoint, by their offsets."""

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import numpy as np

from ..errors import NoEmbedding

_MAX_HEADER = 2**26
_MAX_FILES = 2000
_NAMES = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings|token_embedding|embedding)\.weight$"
)
"""What families call their input embedding; positions, output heads and per-layer tables are called otherwise."""
_FORMATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_STORED: Dict[str, Any] = {name: np.dtype(text) for name, text in _FORMATS.items()}


class Tensor(NamedTuple):
    """Where a matrix lies in a safetensors file."""

    path: str
    offset: int
    """Bytes from the beginning of the file."""
    shape: List[int]
    dtype: str

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows ``ids`` as float32 ``[len(ids), width]``; nothing else of the file is read."""
        shape = (self.shape[0], self.shape[1])
        stored = np.memmap(self.path, dtype=_STORED[self.dtype], mode="r", offset=self.offset, shape=shape)[ids]
        if self.dtype == "BF16":
            return np.asarray((stored.astype(np.uint32) << np.uint32(16)).view(np.float32))
        with np.errstate(over="ignore"):
            return np.asarray(stored.astype(np.float32))


def embedding(folder: Path, width: Optional[int], vocabulary: Optional[int] = None) -> Tensor:
    """The input embedding in the checkpoint in ``folder``: of ``width`` columns, by one of its usual names.

    Of several, the one with ``vocabulary`` rows, else the longest. Raises :class:`NoEmbedding`, whose text says
    what is there instead, or :class:`OSError`.
    """
    files = sorted(folder.glob("*.safetensors"))[:_MAX_FILES]
    if not files:
        others = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.gguf"))
        raise NoEmbedding("its weights are not in safetensors files" if others else "there are no weights beside it")
    found = [tensor for path in _likely(folder, files) for tensor in _matrices(path)]
    if width is not None:
        found = [tensor for tensor in found if tensor.shape[1] == width]
    if not found:
        raise NoEmbedding("its weights hold no embedding matrix that can be read by rows")
    return max(found, key=lambda tensor: (tensor.shape[0] == vocabulary, tensor.shape[0]))


def _likely(folder: Path, files: List[Path]) -> List[Path]:
    """The files that the index says hold an embedding; all of them where there is no index."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes()[:_MAX_HEADER])
        places = {where for name, where in index["weight_map"].items() if _NAMES.search(name)}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return files
    return [path for path in files if path.name in places] or files


def _matrices(path: Path) -> List[Tensor]:
    """The matrices in ``path`` whose names are an embedding's, as far as they lie inside the file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            return []
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return []
    tensors = header.items() if isinstance(header, dict) else ()
    found = (_tensor(path, 8 + length, size, entry) for name, entry in tensors if _NAMES.search(name))
    return [tensor for tensor in found if tensor is not None]


def _tensor(path: Path, base: int, size: int, entry: Any) -> Optional[Tensor]:
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    numbers: Dict[str, Any] = {"shape": shape, "offsets": offsets}
    for value in numbers.values():
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n >= 0 for n in value):
            return None
    if not isinstance(dtype, str) or dtype not in _STORED or not isinstance(shape, list) or 0 in shape:
        return None
    begin, end = numbers["offsets"]
    if end - begin != math.prod(shape) * _STORED[dtype].itemsize or base + end > size:
        return None
    return Tensor(os.fspath(path), base + begin, shape, dtype)
