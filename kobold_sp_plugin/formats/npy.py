"""NumPy's ``.npy``: the tensor inside KoboldAI's files, and a soft prompt by itself.

NumPy's own reader evaluates the header as Python, unpickles when told to, and differs from release to
release; a soft prompt needs three fields of it, so they are read here, from at most 10,000 bytes.
"""

import hashlib
import os
import re
import struct
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..errors import (
    BadTensorHeader,
    CorruptMember,
    NoRows,
    NotFinite,
    ObjectDtype,
    TooLarge,
    TooManyRows,
    TrailingBytes,
    TruncatedTensor,
    UnsupportedDtype,
    WrongRank,
)
from ..softprompt import SoftPrompt
from . import metadata
from .source import Candidate, Source
from .writing import write_file

TENSOR = "tensor.npy"
MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000
MAX_ROWS = 2047
MAX_ELEMENTS = 2**25
CHUNK = 2**18
"""Bytes that are read, unpacked and converted at a time."""

DTYPES = ("float32", "float16", "bfloat16")
"""What :func:`write_tensor` writes."""

_EXPECTED_HEADER = "an .npy header of format 1, 2 or 3 with descr, fortran_order and shape"
_ITEM = (
    r"""(?:['"]descr['"]\s*:\s*(?P<descr{0}>'[^'\\]{{0,64}}'|"[^"\\]{{0,64}}")"""
    r"""|['"]fortran_order['"]\s*:\s*(?P<order{0}>True|False)"""
    r"""|['"]shape['"]\s*:\s*\((?P<shape{0}>[0-9L,\s]{{0,200}})\))\s*"""
)
_HEADER = re.compile(r"\{{\s*{},\s*{},\s*{}(?:,\s*)?\}}".format(*map(_ITEM.format, "123")))
_STRUCTURED = re.compile(r"""['"]descr['"]\s*:\s*[\[(]""")
_SHAPE = re.compile(r"\s*(?:[0-9]{1,18}L?\s*,\s*)+(?:[0-9]{1,18}L?\s*)?|\s*")
_DTYPE_NAMES = {2: "float16", 4: "float32", 8: "float64"}


def detect(candidate: Candidate) -> bool:
    """Whether it begins as an ``.npy`` does."""
    return candidate.start.startswith(MAGIC)


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The bare tensor. Raises what :func:`read_tensor_header` and, for the rows, :func:`read_rows` raise."""
    candidate.file.seek(0)
    yield source(candidate.file.read, candidate.size, os.path.basename(candidate.path), {})


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the bare tensor."""
    write_file(path, write_tensor(softprompt.rows, dtype))


def source(
    read: Callable[[int], bytes],
    size: int,
    label: str,
    meta: Dict[str, Any],
    finish: Optional[Callable[[], None]] = None,
    checksum: Optional[int] = None,
) -> Source:
    """The soft prompt in the ``.npy`` that ``read`` gives, of which ``size`` bytes are promised.

    ``finish`` checks, after the last byte, what the container can check. The SHA-256 that the metadata may
    state is taken out of it, and held against the bytes when they are read.
    """
    digest = hashlib.sha256()
    expected = metadata.take_checksum(meta)

    def reading(count: int) -> bytes:
        data = read(count)
        digest.update(data)
        return data

    def rows() -> np.ndarray:
        values = read_rows(reading, header, label)
        if finish is not None:
            finish()
        if expected is not None and expected.lower() != digest.hexdigest():
            found = f"{label} with another SHA-256 than {metadata.LABEL} states"
            raise CorruptMember(found, f"{expected[:64]}, as when it was saved")
        return values

    header = read_tensor_header(reading, size, label)
    return Source((header.n_tokens, header.width), header.dtype, rows, meta, checksum)


def tensor_and_metadata(softprompt: SoftPrompt, dtype: str) -> Tuple[bytes, bytes]:
    """``tensor.npy`` and the ``meta.json`` that states its SHA-256."""
    tensor = write_tensor(softprompt.rows, dtype)
    return tensor, metadata.dump(softprompt, hashlib.sha256(tensor).hexdigest())


class TensorHeader(NamedTuple):
    """What an ``.npy`` header says, checked."""

    n_tokens: int
    width: int
    dtype: str
    """ "float32", "float16", "float64" or "bfloat16"."""
    stored: np.dtype
    """The dtype of the bytes; uint16 where ``dtype`` is "bfloat16"."""
    fortran_order: bool


def read_tensor_header(read: Callable[[int], bytes], size: int, label: str) -> TensorHeader:
    """Read the header of the tensor ``label`` from ``read``, of which ``size`` bytes are promised.

    Nothing past the header is read. Raises a :class:`~kobold_sp_plugin.errors.FormatError`: BadTensorHeader,
    ObjectDtype, UnsupportedDtype, WrongRank, NoRows, TooManyRows, TooLarge, TruncatedTensor or TrailingBytes.
    """
    text, header_size = _header_text(read, size, label)
    descr, fortran_order, shape = _fields(text, label)
    dtype, stored = _stored_dtype(descr, label)
    n_tokens, width = checked_shape(shape, label)
    promised = header_size + n_tokens * width * stored.itemsize
    made_of = f"{promised} bytes ({n_tokens} rows of {width} columns in {dtype})"
    if size < promised:
        raise TruncatedTensor(f"{label} ends after {size} of {promised} bytes", made_of)
    if size > promised:
        raise TrailingBytes(f"{label} goes on for {size - promised} bytes after its rows", made_of)
    return TensorHeader(n_tokens, width, dtype, stored, fortran_order)


def small_header(data: bytes) -> Tuple[str, Tuple[int, ...], int]:
    """descr, shape and size of the header of a whole small ``.npy``. Raises a FormatError."""
    text, size = _header_text(BytesIO(data).read, len(data), "an array")
    descr, _, shape = _fields(text, "an array")
    return descr, shape, size


def checked_shape(shape: Sequence[int], label: str) -> Tuple[int, int]:
    """``(n_tokens, width)`` of a tensor of ``shape``.

    Raises :class:`WrongRank`, :class:`NoRows`, :class:`TooManyRows` or :class:`TooLarge`.
    """
    rows = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(rows) != 2:
        raise WrongRank(f"{label} of shape {str(list(shape[:9]))[:100]}", "[n_tokens, width]")
    n_tokens, width = rows
    if not n_tokens or not width:
        raise NoRows(f"{label} of shape {list(shape)}", "at least one row and one column")
    if n_tokens > MAX_ROWS:
        raise TooManyRows(f"{n_tokens} rows", f"at most {MAX_ROWS}, as KoboldAI allows")
    if n_tokens * width > MAX_ELEMENTS:
        raise TooLarge(f"{n_tokens} rows of {width} columns", f"at most {MAX_ELEMENTS} values")
    return n_tokens, width


def read_rows(read: Callable[[int], bytes], header: TensorHeader, label: str) -> np.ndarray:
    """Read the rows that follow ``header``: float32 ``[n_tokens, width]``, in C order.

    Takes 4 bytes a value and one piece of 256 KiB. Raises :class:`TruncatedTensor`.
    """
    rows = np.empty((header.n_tokens, header.width), dtype=np.float32)
    values = rows.T.flat if header.fortran_order else rows.reshape(-1)
    fill(values, rows.size, read, header.dtype, header.stored, label)
    return rows


def fill(
    values: Any, count: int, read: Callable[[int], bytes], dtype: str, stored: "np.dtype[Any]", label: str
) -> None:
    """Change ``values[:count]`` (float32) to what ``read`` gives in the dtype ``stored``, piece by piece.

    Raises :class:`TruncatedTensor`.
    """
    step = CHUNK // stored.itemsize
    for start in range(0, count, step):
        wanted = min(step, count - start)
        piece = read(wanted * stored.itemsize)
        if len(piece) < wanted * stored.itemsize:
            got = start * stored.itemsize + len(piece)
            promised = count * stored.itemsize
            raise TruncatedTensor(f"{label} ends after {got} of {promised} bytes of rows", "all of them")
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused as such later
            values[start : start + wanted] = as_float32(np.frombuffer(piece, dtype=stored), dtype)


def as_float32(stored: np.ndarray, dtype: str) -> np.ndarray:
    """``stored`` as numbers: the bits of a bfloat16, which NumPy lacks, widened; anything else as it is."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored


def write_tensor(rows: np.ndarray, dtype: str) -> bytes:
    """``rows`` (float32 ``[n_tokens, width]``) as little-endian ``.npy`` 1.0; raises what :func:`stored` does."""
    data = stored(rows, dtype)
    descr = "<V2" if dtype == "bfloat16" else data.dtype.str
    # <V2 is what JAX's writer prints; NumPy alone would print |V2, and KoboldAI reads both.
    file = BytesIO()
    shape = tuple(int(length) for length in rows.shape)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    file.write(data.tobytes())
    return file.getvalue()


def stored(rows: np.ndarray, dtype: str) -> np.ndarray:
    """``rows`` (float32 ``[n_tokens, width]``) in ``dtype``, little-endian, rounded to nearest even.

    bfloat16 comes as its bits, uint16. Raises :class:`UnsupportedDtype`, :class:`TooManyRows`,
    :class:`TooLarge`, or :class:`NotFinite` for a value that ``dtype`` cannot hold.
    """
    if dtype not in DTYPES:
        raise UnsupportedDtype(f"dtype {dtype!r}", " or ".join(DTYPES))
    checked_shape(rows.shape, "the rows")
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(rows).view(np.uint32)
        nearest_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        data = ((bits + nearest_even) >> np.uint32(16)).astype("<u2")
        finite = (data & 0x7F80) != 0x7F80
    else:
        with np.errstate(over="ignore"):
            data = rows.astype("<f2" if dtype == "float16" else "<f4")
        finite = np.isfinite(data)
    if not finite.all():
        row, column = (int(index) for index in np.argwhere(~finite)[0])
        found = f"{rows[row, column]} in row {row}, column {column}, which {dtype} cannot hold"
        raise NotFinite(found, f"values that fit {dtype}")
    return data


def _header_text(read: Callable[[int], bytes], size: int, label: str) -> Tuple[str, int]:
    """The dictionary that the header prints, and the number of bytes up to the rows."""
    start = read(len(MAGIC) + 2)
    if len(start) == len(MAGIC) + 2 and start[: len(MAGIC)] != MAGIC:
        raise BadTensorHeader(f"{label} begins with {start!r}", _EXPECTED_HEADER)
    if len(start) < len(MAGIC) + 2:
        raise TruncatedTensor(f"{label} ends after {len(start)} bytes", _EXPECTED_HEADER)
    version = (start[-2], start[-1])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise BadTensorHeader(f"{label} of .npy format {version[0]}.{version[1]}", _EXPECTED_HEADER)
    length_format = "<H" if version == (1, 0) else "<I"
    length_bytes = read(struct.calcsize(length_format))
    if len(length_bytes) < struct.calcsize(length_format):
        raise TruncatedTensor(f"{label} ends inside its header", _EXPECTED_HEADER)
    (length,) = struct.unpack(length_format, length_bytes)
    if length > MAX_HEADER:
        raise BadTensorHeader(f"{label} with a header of {length} bytes", f"at most {MAX_HEADER}")
    text = read(length)
    if len(text) < length:
        found = f"{label} ends after {len(text)} of {length} bytes of its header"
        raise TruncatedTensor(found, _EXPECTED_HEADER)
    return text.decode("latin-1"), len(start) + len(length_bytes) + length


def _fields(text: str, label: str) -> Tuple[str, bool, Tuple[int, ...]]:
    """descr, fortran_order and shape of the printed dictionary."""
    if _STRUCTURED.search(text):
        raise UnsupportedDtype(f"{label} of a structured dtype", "float16, bfloat16, float32 or float64")
    match = _HEADER.fullmatch(text.strip())
    groups = match.groupdict() if match else {}
    found = {name[:-1]: value for name, value in groups.items() if value is not None}
    if len(found) != 3:  # two of one name would leave fewer
        raise BadTensorHeader(f"{label} with the header {text.strip()[:100]!r}", _EXPECTED_HEADER)
    if not _SHAPE.fullmatch(found["shape"]):
        raise BadTensorHeader(f"{label} with the shape ({found['shape'][:100]})", _EXPECTED_HEADER)
    lengths = tuple(map(int, re.findall("[0-9]+", found["shape"])))
    return found["descr"][1:-1], found["order"] == "True", lengths


def _stored_dtype(descr: str, label: str) -> Tuple[str, "np.dtype[Any]"]:
    """The name of the dtype, and the dtype that its bytes are read with."""
    if descr.lstrip("<>|=").startswith("O"):
        raise ObjectDtype(f"{label} of dtype {descr!r}, Python objects", "numbers; no pickle is read")
    if re.fullmatch(r"[<|]?V2", descr):
        return "bfloat16", np.dtype("<u2")
    if re.fullmatch(r"[<>|=]?f[248]", descr):
        stored = np.dtype(descr)
        return _DTYPE_NAMES[stored.itemsize], stored
    raise UnsupportedDtype(f"{label} of dtype {descr!r}", "float16, bfloat16 (V2), float32 or float64")
