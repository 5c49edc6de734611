"""What a format is asked about, a :class:`Candidate`, and what it answers with, a :class:`Source`."""

import os
import stat
import zipfile
from functools import cached_property
from types import TracebackType
from typing import Any, Callable, Dict, FrozenSet, NamedTuple, Optional, Tuple, Type

import numpy as np

from ..errors import NotASoftPromptFile, NoTensor, TooLarge, UnsafeName
from . import archive, json_text

MAX_FOLDER = 10_000
"""Names in a folder that is looked at; a soft prompt has a handful."""


class Source(NamedTuple):
    """An open soft prompt: what it says of itself, and its rows, not yet read."""

    shape: Tuple[int, int]
    """``(n_tokens, width)``, checked."""
    dtype: str
    """ "float32", "float16", "float64" or "bfloat16"."""
    rows: Callable[[], np.ndarray]
    """Read the rows, float32 ``[n_tokens, width]``, and check all that the container can check; once."""
    metadata: Dict[str, Any]
    """As :class:`~kobold_sp_plugin.SoftPrompt` has it; {} where there is none."""
    checksum: Optional[int] = None
    """CRC-32 of the stored rows, where the container tells it without reading them."""
    others: Tuple[str, ...] = ()
    """What else is in the file, by name, of a format that can be written: whoever writes it anew loses that."""


class Candidate:
    """A file or folder whose format is to be found by its content; looked at as little as that takes.

    ``part`` names one of several soft prompts in it. A context manager: it keeps the file open.
    Raises :class:`NotASoftPromptFile` for a pipe or a device, which opening might wait for, or :class:`OSError`.
    """

    def __init__(self, path: str, part: Optional[str] = None):
        self.path, self.part = path, part
        found = os.stat(path)
        self.is_folder = stat.S_ISDIR(found.st_mode)
        self.read: Dict[str, Any] = {}
        """What a format has read of it, for the next one to use."""
        self._file: Optional[archive.BoundedFile] = None
        if self.is_folder:
            self.start, self.size = b"", 0
        else:
            if not stat.S_ISREG(found.st_mode):
                raise _no_file(path)
            self._file = archive.BoundedFile(path)
            self.start, self.size = self._file.read(64), self._file.size

    def __enter__(self) -> "Candidate":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def file(self) -> archive.BoundedFile:
        """The open file; a folder has none."""
        assert self._file is not None
        return self._file

    @property
    def is_zip(self) -> bool:
        """Whether it begins as a zip does."""
        return self.start.startswith(archive.MAGIC)

    @cached_property
    def members(self) -> Dict[str, zipfile.ZipInfo]:
        """The members of the zip that it is. Raises a FormatError for one that cannot be read."""
        return archive.members_of(self.file)

    @cached_property
    def json(self) -> Optional[json_text.JsonText]:
        """The JSON object that it is, or None. Raises a FormatError for one that does not parse."""
        if not json_text.looks_like_object(self.start):
            return None
        return json_text.read(self.path, self.size)

    @cached_property
    def names(self) -> FrozenSet[str]:
        """The names in the folder that it is; of a file, none."""
        found = []
        if self.is_folder:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    found.append(entry.name)
                    if len(found) > MAX_FOLDER:
                        raise TooLarge(f"a folder of more than {MAX_FOLDER} names", "a soft prompt's folder")
        return frozenset(found)

    def part_path(self, *names: str) -> str:
        """The path of a file in the folder; see :func:`inside`."""
        return inside(self.path, *names)


def check_regular(path: str) -> os.stat_result:
    """The stat of the file at ``path``; a pipe or a device is refused: opening one may wait for ever."""
    result = os.stat(path)
    if not stat.S_ISREG(result.st_mode):
        raise _no_file(path)
    return result


def inside(folder: str, *names: str) -> str:
    """The path of the ordinary file ``names`` in ``folder``.

    A link that leads elsewhere is refused: a folder may come from an archive that somebody else made. The
    links of a Hugging Face cache (``snapshots/…/file`` → ``blobs/…``) stay within its repository's folder.
    Raises :class:`NoTensor` where there is none, or :class:`UnsafeName`.
    """
    path = os.path.join(folder, *names)
    root = os.path.realpath(folder)
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        root = os.path.dirname(os.path.dirname(root))
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise UnsafeName(f"{names[-1]} is a link out of its folder", "a file in the folder")
    if not os.path.exists(path):
        raise NoTensor(f"a folder without {names[-1]}", f"{names[-1]} in it")
    check_regular(path)
    return path


def _no_file(path: str) -> NotASoftPromptFile:
    return NotASoftPromptFile(f"{os.path.basename(path)} is no ordinary file", "an ordinary file")


def read_part(path: str, limit: int) -> bytes:
    """At most ``limit`` bytes of the file at ``path``, and one more where it is longer."""
    with open(path, "rb") as file:
        return file.read(limit + 1)
