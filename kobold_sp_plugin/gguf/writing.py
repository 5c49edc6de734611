"""Writing GGUF: a header, and tensors whose bytes are handed over piece by piece."""

import struct
from typing import BinaryIO, Dict, Iterable, NamedTuple, Sequence

from .reading import ARRAY, FLOAT32, INT32, MAGIC, STRING, UINT32, Field

VERSION = 3


class Content(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: Sequence[int]
    """As GGUF has it: columns first."""
    kind: int
    length: int
    """Bytes."""
    pieces: Iterable[bytes]
    """The bytes; gone through once."""


def text(value: str) -> Field:
    """A field with a text."""
    data = value.encode("utf-8")
    return Field(STRING, struct.pack("<Q", len(data)) + data)


def unsigned(value: int) -> Field:
    """A field with a whole number."""
    return Field(UINT32, struct.pack("<I", value))


def real(value: float) -> Field:
    """A field with a number."""
    return Field(FLOAT32, struct.pack("<f", value))


def integers(values: Sequence[int]) -> Field:
    """A field with an array of whole numbers."""
    return Field(ARRAY, struct.pack(f"<IQ{len(values)}i", INT32, len(values), *values))


def extended(array: Field, count: int, raw: bytes) -> Field:
    """An array with ``count`` members more, whose bytes are ``raw``."""
    kind, known = struct.unpack_from("<IQ", array.raw)
    return Field(ARRAY, struct.pack("<IQ", kind, known + count) + array.raw[12:] + raw)


def write(file: BinaryIO, fields: Dict[str, Field], tensors: Sequence[Content], alignment: int = 32) -> None:
    """Write a GGUF file: header, then the tensors in their order. Raises :class:`OSError`."""
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields)))
    for key, field in fields.items():
        header += text(key).raw + struct.pack("<I", field.kind) + field.raw
    offset = 0
    for tensor in tensors:
        header += text(tensor.name).raw
        header += struct.pack(f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape, tensor.kind, offset)
        offset += tensor.length + _padding(tensor.length, alignment)
    file.write(header + bytes(_padding(len(header), alignment)))
    for tensor in tensors:
        written = 0
        for piece in tensor.pieces:
            file.write(piece)
            written += len(piece)
        assert written == tensor.length, f"{tensor.name}: {written} bytes of {tensor.length}"
        file.write(bytes(_padding(written, alignment)))


def _padding(length: int, alignment: int) -> int:
    return -length % alignment
