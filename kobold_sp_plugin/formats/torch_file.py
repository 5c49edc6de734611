"""Files that ``torch.save`` writes, in its zip and in its older form: read and written without torch."""

import struct
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..errors import (
    BadTensorHeader,
    CorruptMember,
    NoTensor,
    SeveralSoftPrompts,
    TooLarge,
    TruncatedTensor,
    UnsafePickle,
    UnsupportedDtype,
)
from . import npy
from .archive import MAGIC, Bounded, Member, members_of
from .source import Candidate, Source
from .torch_pickle import DTYPES, Storage, Tensor, integer, scan

LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
MAX_PICKLE = 2**20
MAX_STORAGE = 2**28
"""Bytes of a tensor's memory: a soft prompt saved as a view of an embedding matrix carries all of that."""

NAMES = ("prompt_embeddings", "tensor", "soft_prompt", "soft_embeddings", "prompt_embeds", "learned_embedding")
"""What the rows are called where a file holds several tensors, the likeliest first."""

_ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_OTHER_SIZES = {"Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "ComplexFloat": 8}
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


class TorchFile(NamedTuple):
    """What was saved, and the way to the memory of its tensors."""

    value: Any
    opened: Callable[[Storage], "Stored"]


class Stored(NamedTuple):
    """The bytes of one storage."""

    read: Callable[[int], bytes]
    size: int
    finish: Callable[[], None]
    checksum: Optional[int]
    order: str
    """ "<" or ">"."""


def of(candidate: Candidate) -> TorchFile:
    """What the candidate holds; read once. Raises a :class:`~kobold_sp_plugin.errors.FormatError`."""
    if "torch" not in candidate.read:
        candidate.read["torch"] = read(candidate.file)
    found: TorchFile = candidate.read["torch"]
    return found


def read(file: Bounded) -> TorchFile:
    """What ``torch.save`` wrote into ``file``. Raises a :class:`~kobold_sp_plugin.errors.FormatError`."""
    file.seek(0)
    return read_zip(file) if file.read(4).startswith(MAGIC) else read_legacy(file)


def is_zip(members: Any) -> bool:
    """Whether a zip of these members is one that torch writes."""
    if npy.TENSOR in members:
        return False
    return any(name.endswith("/data.pkl") and name.count("/") == 1 for name in members)


def read_zip(file: Bounded) -> TorchFile:
    """What ``torch.save`` wrote as a zip. Raises a :class:`~kobold_sp_plugin.errors.FormatError`."""
    members = members_of(file)
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise NoTensor(f"a zip with {len(pickles)} data.pkl", "one, as torch writes it")
    folder = pickles[0][: -len("data.pkl")]

    def whole(name: str, limit: int) -> bytes:
        if members[name].file_size > limit:
            raise TooLarge(f"{name[:100]} of {members[name].file_size} bytes", f"at most {limit}")
        member = Member(file, members[name], name[:100])
        data = b"".join(iter(lambda: member.read(npy.CHUNK), b""))
        member.finish()
        return data

    order = "<"
    if folder + "byteorder" in members:
        order = {b"little": "<", b"big": ">"}.get(whole(folder + "byteorder", 16), "")
        if not order:
            raise BadTensorHeader("numbers in an unknown byte order", "little or big")

    def opened(storage: Storage) -> Stored:
        name = f"{folder}data/{storage.key}"
        if name not in members:
            raise NoTensor(f"a zip without {name[:100]!r}", "the values of each tensor")
        member = Member(file, members[name], name[:100])
        return Stored(member.read, members[name].file_size, member.finish, members[name].CRC, order)

    return TorchFile(scan(memoryview(whole(pickles[0], MAX_PICKLE))).value, opened)


def read_legacy(file: Bounded) -> TorchFile:
    """What ``torch.save`` wrote before torch 1.6. Raises a :class:`~kobold_sp_plugin.errors.FormatError`."""
    file.seek(0)
    data = memoryview(b"".join(iter(lambda: file.read(npy.CHUNK) if file.tell() < MAX_PICKLE else b"", b"")))
    if bytes(data[: len(LEGACY_MAGIC)]) != LEGACY_MAGIC:
        raise BadTensorHeader("bytes that torch.save did not write", "its magic number")
    version, end, _ = scan(data, len(LEGACY_MAGIC))
    system, end, _ = scan(data, end)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise BadTensorHeader("a file of torch's of an unknown version or byte order", "version 1001, little-endian")
    value, end, storages = scan(data, end)
    keys, end, _ = scan(data, end)
    places: Dict[str, Tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        file.seek(end)
        head = file.read(8)
        if storage is None or len(head) < 8:
            raise CorruptMember("a list of storages that contradicts the file", "each storage once")
        if struct.unpack("<q", head)[0] != storage.length:
            raise CorruptMember("a storage of two sizes", f"{storage.length} values")
        size = storage.length * _item_size(storage.kind)
        places[storage.key] = end + 8, size
        end += 8 + size
        if end > file.size:
            raise TruncatedTensor(f"a file that ends after {file.size} of {end} bytes", "a whole file")

    def opened(storage: Storage) -> Stored:
        if storage.key not in places:
            raise NoTensor("a tensor whose values are not in the file", "the values of each tensor")
        start, size = places[storage.key]
        file.seek(start)
        return Stored(file.read, size, lambda: None, None, "<")

    return TorchFile(value, opened)


def chosen(value: Any, part: Optional[str], label: str) -> Tuple[str, Tensor]:
    """The tensor of rows among what was saved: the only one, the one named as soft prompts are, or ``part``.

    Raises :class:`NoTensor` or :class:`SeveralSoftPrompts`.
    """
    if isinstance(value, Tensor):
        return label, value
    tensors = {}
    if isinstance(value, dict):
        tensors = {name: each for name, each in value.items() if isinstance(name, str) and isinstance(each, Tensor)}
    name = choose(list(tensors), [each.shape for each in tensors.values()], part, label)
    return name, tensors[name]


def choose(names: Sequence[str], shapes: Sequence[Any], part: Optional[str], label: str) -> str:
    """Which of the tensors ``names`` holds the rows. Raises :class:`NoTensor` or :class:`SeveralSoftPrompts`."""
    listed = ", ".join(names[:5])[:200]
    if part is not None:
        if part not in names:
            raise NoTensor(
                f"{label} without a tensor {part[:100]!r} (it holds {listed or 'none'})", "one that it holds"
            )
        return part
    if len(names) == 1:
        return names[0]
    for known in NAMES:
        found = [name for name in names if name == known or name.endswith("." + known)]
        if len(found) == 1:
            return found[0]
    flat = [
        name
        for name, shape in zip(names, shapes)
        if isinstance(shape, (tuple, list)) and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1))
    ]
    if len(flat) == 1:
        return flat[0]
    if not flat:
        raise NoTensor(f"{label} without a tensor of rows", "a tensor [n_tokens, width]")
    raise SeveralSoftPrompts(
        f"{label} with {len(flat)} tensors ({listed})", "one; `kobold-sp convert` with `--part NAME` takes one out"
    )


def source(
    file: TorchFile, tensor: Tensor, label: str, metadata: Dict[str, Any], prompt: Optional[int] = None
) -> Source:
    """The soft prompt in ``tensor``; of ``[n_prompts, n_tokens, width]`` the one of the number ``prompt``.

    Everything that the file says of it is checked before memory is taken. Raises a
    :class:`~kobold_sp_plugin.errors.FormatError`.
    """
    storage, shape, strides = tensor.storage, _lengths(tensor.shape), _lengths(tensor.strides)
    offset = integer(tensor.offset)
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise BadTensorHeader(f"{label} whose shape and memory do not fit together", "a tensor of torch's")
    if prompt is not None and len(shape) == 3:
        if not 0 <= prompt < shape[0]:
            raise NoTensor(f"no soft prompt {prompt} among {shape[0]}", f"0 to {shape[0] - 1}")
        offset += prompt * strides[0]
        shape, strides = shape[1:], strides[1:]
    n_tokens, width = npy.checked_shape(shape, label)
    down, across = strides[-2:]
    dtype = DTYPES.get(storage.kind)
    if dtype is None:
        raise UnsupportedDtype(f"{label} in a {storage.kind}", "float16, bfloat16, float32 or float64")
    span = (n_tokens - 1) * down + (width - 1) * across + 1
    if offset + span > storage.length:
        found = f"{label} that reaches to value {offset + span} of {storage.length}"
        raise TruncatedTensor(found, "values inside its memory")
    whole = (down == width or n_tokens == 1) and across == 1
    if not whole and span + n_tokens * width > npy.MAX_ELEMENTS:  # both are in memory at once
        raise TooLarge(f"{label} spread over {span} values", f"at most {npy.MAX_ELEMENTS} together with the rows")
    item = _ITEM_SIZES[dtype]
    opened = file.opened(storage)
    if opened.size != storage.length * item:
        raise TruncatedTensor(f"{label} with {opened.size} bytes", f"{storage.length * item} ({storage.length} values)")
    if opened.size > MAX_STORAGE:
        raise TooLarge(f"{label} in a memory of {opened.size} bytes", f"at most {MAX_STORAGE}")
    stored = np.dtype(opened.order + {"bfloat16": "u2"}.get(dtype, f"f{item}"))

    def rows() -> np.ndarray:
        rest = opened.size - (offset + span) * item
        _skip(opened.read, offset * item)
        values = np.empty((n_tokens, width) if whole else span, dtype=np.float32)
        npy.fill(values.reshape(-1), span, opened.read, dtype, stored, label)
        _skip(opened.read, rest)
        opened.finish()
        if values.ndim == 2:
            return values
        result = np.empty((n_tokens, width), dtype=np.float32)
        for row in range(n_tokens):
            start = row * down
            result[row] = values[start : start + (width - 1) * across + 1 : across] if across else values[start]
        return result

    return Source((n_tokens, width), dtype, rows, metadata, opened.checksum)


def write_zip(rows: np.ndarray, dtype: str, shape: Tuple[int, ...], name: Optional[str] = None) -> Dict[str, bytes]:
    """The members of the zip that ``torch.save`` would write for a tensor, or for ``{name: tensor}``."""
    data = npy.stored(rows, dtype)
    storage = _storage(dtype, rows.size, ())
    value = _tensor(storage, shape)
    if name is not None:
        value = b"}" + _text(name) + value + b"s"
    return {
        "archive/data.pkl": b"\x80\x02" + value + b".",
        "archive/byteorder": b"little",
        "archive/data/0": data.tobytes(),
        "archive/version": b"3\n",
    }


def write_pickle(rows: np.ndarray, dtype: str) -> bytes:
    """What ``pickle.dumps(tensor, protocol=4)`` gives for a tensor of torch's."""
    data = npy.stored(rows, dtype)
    legacy = b"".join(
        (
            LEGACY_MAGIC,
            b"\x80\x02M\xe9\x03.",
            b"\x80\x02}(" + _text("protocol_version") + b"M\xe9\x03" + _text("little_endian") + b"\x88",
            _text("type_sizes") + b"}(" + _text("short") + b"K\x02" + _text("int") + b"K\x04" + _text("long"),
            b"K\x04uu.",
            b"\x80\x02" + _storage(dtype, rows.size, (b"N",)) + b".",
            b"\x80\x02]" + _text("0") + b"a.",
            struct.pack("<q", rows.size) + data.tobytes(),
        )
    )
    storage = _global("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(legacy)) + legacy + b"\x85R"
    return b"\x80\x04" + _tensor(storage, rows.shape) + b"."


def _tensor(storage: bytes, shape: Tuple[int, ...]) -> bytes:
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    arguments = [storage, _integer(0), _tuple(shape), _tuple(strides), b"\x89", _global("collections", "OrderedDict")]
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + b"".join(arguments) + b")RtR"


def _storage(dtype: str, count: int, more: Sequence[bytes]) -> bytes:
    parts = [_text("storage"), _global("torch", _KINDS[dtype]), _text("0"), _text("cpu"), _integer(count), *more]
    return b"(" + b"".join(parts) + b"tQ"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _tuple(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(_integer(int(number)) for number in numbers) + b"t"


def _lengths(value: Any) -> List[int]:
    if not isinstance(value, tuple) or len(value) > 8:
        raise BadTensorHeader("a tensor whose shape is no list of lengths", "[n_tokens, width]")
    return [integer(length) for length in value]


def _item_size(kind: str) -> int:
    size = _ITEM_SIZES.get(DTYPES.get(kind, ""), _OTHER_SIZES.get(kind[: -len("Storage")]))
    if size is None:
        raise UnsafePickle(f"a {kind[:100]}", "the storages that torch had then")
    return size


def _skip(read: Callable[[int], bytes], count: int) -> None:
    while count > 0:
        piece = read(min(count, npy.CHUNK))
        if not piece:
            return
        count -= len(piece)
