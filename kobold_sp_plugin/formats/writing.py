"""Writing in one step: what is written is whole, or it is not there."""

import errno
import os
import secrets
import shutil
from contextlib import contextmanager
from typing import BinaryIO, Iterator, Mapping

_PREFIX, _SUFFIX = ".kobold-sp-", ".tmp"


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write into, beside ``path``, which takes its place at the end of the ``with`` block.

    A file that is replaced keeps its permissions, and a link to it stays a link. Raises :class:`OSError`, also
    where a folder, a pipe or a device has that name.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EEXIST, "it is no ordinary file", path)
    sibling = _sibling(path)
    try:
        with open(sibling, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            shutil.copymode(path, sibling)
        os.replace(sibling, path)
    except BaseException:
        if os.path.lexists(sibling):
            os.unlink(sibling)
        raise


def write_file(path: str, data: bytes) -> None:
    """Write ``data`` to ``path`` in one step. Raises :class:`OSError`."""
    with replacing(path) as file:
        file.write(data)


def write_folder(path: str, files: Mapping[str, bytes]) -> None:
    """Write a folder of ``files``: a new one in one step; one that is there keeps what else it holds.

    The files of a folder that is there are replaced one by one, in their order. Raises :class:`OSError`.
    """
    if os.path.isdir(path):
        for name, data in files.items():
            write_file(os.path.join(path, name), data)
        return
    sibling = _sibling(os.path.abspath(path))
    os.mkdir(sibling)
    try:
        for name, data in files.items():
            write_file(os.path.join(sibling, name), data)
        os.rename(sibling, path)
    except BaseException:
        shutil.rmtree(sibling, ignore_errors=True)
        raise


def remove_unfinished(folder: str) -> None:
    """Remove what writers that were killed left in ``folder``; for a folder in which nobody else writes now."""
    for name in os.listdir(folder):
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            os.unlink(os.path.join(folder, name))


def _sibling(path: str) -> str:
    return os.path.join(os.path.dirname(path), f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
