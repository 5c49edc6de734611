"""Soft prompt files: read safely whatever their bytes are, written so that KoboldAI reads them.

A file is known by its content, never by its extension. Nothing is unpickled, evaluated or extracted.
"""

import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterator, Mapping, Optional, Union

from ..errors import CorruptMember, FormatError, NotASoftPromptFile
from ..softprompt import Order, Scale, SoftPrompt, WithMetadata, declared, own_metadata
from . import folder, kobold_zip, metadata, npy
from .source import Source

__all__ = ["Header", "load", "read_header", "save"]


@dataclass(frozen=True)
class Header(WithMetadata):
    """What a soft prompt file says of itself, read without its rows."""

    n_tokens: int
    width: int
    dtype: str
    """What the rows are stored as: "float32", "float16", "bfloat16" or "float64"."""
    metadata: Mapping[str, Any] = field(hash=False)
    scale: Scale
    order: Order
    checksum: Optional[int] = field(default=None, repr=False)
    """CRC-32 of the tensor, where the file tells it without the rows being read."""


def load(path: Union[str, Path]) -> SoftPrompt:
    """Read a soft prompt from a zip, a folder or a bare ``.npy``.

    Raises a :class:`~kobold_sp_plugin.errors.FormatError` or :class:`OSError`.
    """
    with _opened(path) as source:
        digest = hashlib.sha256()

        def read(count: int) -> bytes:
            data = source.read(count)
            digest.update(data)
            return data

        meta = metadata.parse(source.meta)
        checksum = metadata.take_checksum(meta)
        header = npy.read_tensor_header(read, source.size, source.label)
        rows = npy.read_rows(read, header, source.label)
        source.finish()
        if checksum is not None and checksum.lower() != digest.hexdigest():
            found = f"{source.label} with another SHA-256 than {metadata.LABEL} states"
            raise CorruptMember(found, f"{checksum[:64]}, as when it was saved")
        return SoftPrompt(rows, meta)


def read_header(path: Union[str, Path]) -> Header:
    """Read what a soft prompt file says of itself: its ``meta.json`` and the header of its tensor, no rows.

    Raises a :class:`~kobold_sp_plugin.errors.FormatError` or :class:`OSError`. What only the rows tell
    (a wrong checksum, NaN, a compressed stream that ends early) is found by :func:`load`.
    """
    with _opened(path) as source:
        meta = metadata.parse(source.meta)
        metadata.take_checksum(meta)
        tensor = npy.read_tensor_header(source.read, source.size, source.label)
        own = own_metadata(meta)
        return Header(
            n_tokens=tensor.n_tokens,
            width=tensor.width,
            dtype=tensor.dtype,
            metadata=MappingProxyType(meta),
            scale=declared(Scale, own.get("scale")),
            order=declared(Order, own.get("order")),
            checksum=source.checksum,
        )


def save(softprompt: SoftPrompt, path: Union[str, Path], dtype: str = "float32") -> None:
    """Write a KoboldAI zip to ``path``, whatever its extension; see :meth:`SoftPrompt.save`.

    Raises :class:`UnsupportedDtype`, :class:`TooManyRows`, :class:`TooLarge`, :class:`NotFinite`,
    :class:`MetadataTooLarge` or :class:`OSError`.
    """
    path = os.fspath(path)
    try:
        tensor = npy.write_tensor(softprompt.rows, dtype)
        meta = metadata.dump(softprompt, hashlib.sha256(tensor).hexdigest())
    except FormatError as error:
        error.path = path
        raise
    kobold_zip.write(path, tensor, meta)


@contextmanager
def _opened(path: Union[str, Path]) -> Iterator[Source]:
    """The file at ``path`` in the format that its content is of; errors raised inside carry the path."""
    path = os.fspath(path)
    try:
        with _format_of(path)(path) as source:
            yield source
    except FormatError as error:
        error.path = path
        raise


def _format_of(path: str) -> Any:
    if os.path.isdir(path):
        return folder.opened
    folder.check_regular(path)
    with open(path, "rb", buffering=0) as file:
        start = file.read(8)
    if start.startswith(kobold_zip.MAGIC):
        return kobold_zip.opened
    if start.startswith(npy.MAGIC):
        return folder.opened
    found = "a file of another kind" if start else "an empty file"
    raise NotASoftPromptFile(found, "a zip with tensor.npy, or an .npy file")
