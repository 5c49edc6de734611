"""The JSON that sukima's server takes as an upload: base64 of zlib of float16 rows, always twenty of them.

It says neither how many rows there are nor how wide they are: its server takes 20. Source: hitomi-team/sukima,
``inference/ai/gpthf.py`` and ``app/api/v1/endpoints/soft_prompts.py``.
"""

import base64
import json
import zlib
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

import numpy as np

from ..errors import CorruptMember, NotWritable, TooLarge, WrongRank
from ..softprompt import SoftPrompt, text_of
from . import metadata, npy
from .archive import BoundedBytes
from .source import Candidate, Source
from .writing import write_file

N_TOKENS = 20


def detect(candidate: Candidate) -> bool:
    """Whether it is a JSON object with ``data``, a long text."""
    return candidate.json is not None and candidate.json.key == "data"


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The twenty rows. Raises a :class:`~kobold_sp_plugin.errors.FormatError`."""
    assert candidate.json is not None
    meta = dict(candidate.json.value)
    metadata.check_size(len(json.dumps(meta)), "the file without its rows")
    model = text_of(meta.get("model"))
    if model and "supported" not in meta:
        meta["supported"] = [model]
    data = _inflated(candidate.json.data)
    values, rest = divmod(len(data), 2)
    if rest or values % N_TOKENS:
        raise WrongRank(f"{len(data)} bytes of rows", f"{N_TOKENS} rows of float16, as the server takes them")
    shape = npy.checked_shape((N_TOKENS, values // N_TOKENS), "data")

    def rows() -> np.ndarray:
        result = np.empty(shape, dtype=np.float32)
        npy.fill(result.reshape(-1), values, BoundedBytes(data).read, "float16", np.dtype("<f2"), "data")
        return result

    yield Source(shape, "float16", rows, meta)


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the JSON. Raises :class:`NotWritable` for any other number of rows than twenty."""
    if softprompt.n_tokens != N_TOKENS:
        rows = f"{softprompt.n_tokens} rows; the server that takes these uploads reads {N_TOKENS}"
        raise NotWritable(rows, f"{N_TOKENS} rows")
    found: Dict[str, Any] = metadata.portable(softprompt)
    supported = softprompt.supported
    fields: Dict[str, Any] = {
        "name": found.pop("name", "") or "",
        "description": found.pop("description", "") or "",
        "public": bool(found.pop("public", False)),
        "model": found.pop("model", None) or (supported[0] if supported else ""),
        "loss": found.pop("loss", 0.0),
        "steps": found.pop("steps", found.get("step", 0)),
    }
    data = zlib.compress(npy.stored(softprompt.rows, dtype).tobytes(), 9)
    text = {**fields, **found, "data": base64.b64encode(data).decode("ascii")}
    write_file(path, json.dumps(text).encode("ascii"))


def _inflated(data: bytes) -> bytes:
    limit = npy.MAX_ELEMENTS * 2
    unpacker = zlib.decompressobj()
    pieces: List[bytes] = []
    try:
        left = limit + 1
        while left > 0 and not unpacker.eof:
            piece = unpacker.decompress(data, min(left, npy.CHUNK))
            data = unpacker.unconsumed_tail
            if not piece and not data:
                break
            pieces.append(piece)
            left -= len(piece)
    except zlib.error as error:
        raise CorruptMember(f"data that does not unpack ({error})", "rows packed by zlib") from error
    if left <= 0:
        raise TooLarge(f"data that unpacks to more than {limit} bytes", f"at most {limit}")
    if not unpacker.eof:
        raise CorruptMember("data whose compressed stream has no end", "a whole stream")
    return b"".join(pieces)
