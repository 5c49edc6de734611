"""A soft prompt that is not packed: a folder with ``tensor.npy`` and ``meta.json``, or the ``.npy`` alone."""

import os
import stat
from contextlib import contextmanager
from typing import Iterator, Optional

from ..errors import NotASoftPromptFile, NoTensor
from . import metadata
from .source import TENSOR, Source


@contextmanager
def opened(path: str) -> Iterator[Source]:
    """The tensor and the metadata in the folder at ``path``, or the bare tensor that ``path`` is.

    Raises :class:`NoTensor`, :class:`NotASoftPromptFile`, :class:`MetadataTooLarge` or :class:`OSError`.
    """
    if not os.path.isdir(path):
        with _opened_tensor(path, os.path.basename(path), None) as source:
            yield source
        return
    meta = None
    meta_path = os.path.join(path, metadata.LABEL)
    if os.path.exists(meta_path):
        metadata.check_size(check_regular(meta_path).st_size)
        with open(meta_path, "rb") as file:
            meta = file.read(metadata.MAX_BYTES + 1)
    tensor_path = os.path.join(path, TENSOR)
    if not os.path.exists(tensor_path):
        raise NoTensor(f"a folder without {TENSOR}", f"{TENSOR} in it")
    with _opened_tensor(tensor_path, TENSOR, meta) as source:
        yield source


def check_regular(path: str) -> os.stat_result:
    """The stat of the file at ``path``; a pipe or a device is refused: opening one may wait for ever."""
    result = os.stat(path)
    if not stat.S_ISREG(result.st_mode):
        raise NotASoftPromptFile(f"{os.path.basename(path)} is no ordinary file", "an ordinary file")
    return result


@contextmanager
def _opened_tensor(path: str, label: str, meta: Optional[bytes]) -> Iterator[Source]:
    check_regular(path)
    with open(path, "rb") as file:
        yield Source(file.read, os.fstat(file.fileno()).st_size, lambda: None, meta, label, None)
