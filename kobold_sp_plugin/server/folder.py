"""The softprompts folder, changed from outside: files put in, renamed, taken out and brought back.

The name of a file is made here, whatever a client asks for, and no file is ever overwritten. What is deleted goes to
``.trash`` in the folder, which no catalogue lists and nothing here empties.
"""

import os
import re
import secrets
import threading
import time
import unicodedata
from itertools import count
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

from .. import formats
from ..editing import edit
from ..errors import NameTaken, NotASoftPromptFile, TooLarge, UnknownSoftPrompt
from ..formats.conversion import Conversion, convert

LONGEST_FILE = 2**27
"""Bytes of a file that is put in: as many as the largest soft prompt that KoboldAI takes has, at a width of 16,384."""

TRASH = ".trash"
_MOST_IN_TRASH = 200
"""Deleted files that are listed, the newest first; the others are there all the same."""
_DELETION = re.compile(r"(\d{8}-\d{6})-[0-9a-f]{8}")

_PIECE = 2**20
_LONGEST_STEM = 120
"""Bytes of a file's name without its ending; file systems take 255 in all."""
_MARKS = " -_.()'+&,"
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that are devices on Windows."""


class Added(NamedTuple):
    """A file that was put in."""

    filename: str
    conversion: Optional[Conversion]
    """What became of it on the way in; None where it was KoboldAI's zip already and was kept as it was."""


class Folder:
    """The folder at ``path``; its methods take turns."""

    def __init__(self, path: Union[str, Path]):
        self.path = os.fspath(path)
        self._lock = threading.Lock()

    def add(self, read: Callable[[int], bytes], size: int, name: str) -> Added:
        """Put in a file of ``size`` bytes, which ``read`` gives in pieces; ``name``: what its sender calls it.

        It is read to its end and checked before it appears. Any format that is known becomes KoboldAI's zip, with
        its rows' dtype. Raises a :class:`~kobold_sp_plugin.errors.FormatError` or :class:`OSError`.
        """
        if size > LONGEST_FILE:
            raise TooLarge(f"a file of {size:,} bytes", f"at most {LONGEST_FILE:,} bytes")
        received, converted = self.sibling(), self.sibling()
        try:
            _receive(read, size, received)
            header = _checked(received)
            stem = stem_of(name) or stem_of(header.name) or "softprompt"
            conversion = None if header.format == "zip" else convert(received, converted, "zip")
            with self._lock:
                return Added(self._place(received if conversion is None else converted, stem, ".zip"), conversion)
        finally:
            for each in (received, converted):
                if os.path.lexists(each):
                    os.unlink(each)

    def rename(self, filename: str, to: Optional[str] = None, name: Optional[str] = None) -> str:
        """Change the file name to ``to``, keeping its ending, and the name in its metadata to ``name``.

        Returns the file name that it has then. Raises :class:`NameTaken`, :class:`EditError` where its format has no
        place for a name, another :class:`~kobold_sp_plugin.errors.SoftPromptError`, or :class:`OSError`.
        """
        with self._lock:
            path = self._existing(filename)
            stem, ending = _split(path)
            wanted = filename if to is None else (stem_of(to, ending) or stem) + ending
            is_new = wanted.casefold() != filename.casefold()
            if is_new and wanted.casefold() in self._taken():
                raise NameTaken(f"There is a file named {wanted} already; nothing was changed.")
            if name is not None:
                edit(path, {"name": name.strip()})
            if is_new:
                _move(path, os.path.join(self.path, wanted))
            elif wanted != filename:  # another case of the same letters: some file systems have it there already
                os.rename(path, os.path.join(self.path, wanted))
            return wanted

    def delete(self, filename: str) -> str:
        """Move a file to the trash; returns what :meth:`restore` takes. Raises :class:`OSError`."""
        with self._lock:
            path = self._existing(filename)
            deletion = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"
            place = os.path.join(self.path, TRASH, deletion)
            os.makedirs(place)
            try:
                os.rename(path, os.path.join(place, filename))
            except OSError:
                os.rmdir(place)
                raise
            return deletion

    def restore(self, deletion: str) -> str:
        """Bring a file back from the trash; its name gets a number where another file has it by now.

        Returns its file name. Raises :class:`UnknownSoftPrompt` or :class:`OSError`.
        """
        with self._lock:
            filename = next((name for each, name in self._deletions() if each == deletion), None)
            if filename is None:
                raise UnknownSoftPrompt("There is no such file in the trash.")
            place = os.path.join(self.path, TRASH, deletion)
            path = os.path.join(place, filename)
            filename = self._place(path, *_split(path))
            os.rmdir(place)
            return filename

    def deleted(self) -> List[Dict[str, Any]]:
        """What is in the trash, the newest first: ``deletion``, ``filename``, and ``deleted`` in UTC."""
        found = sorted(self._deletions(), reverse=True)[:_MOST_IN_TRASH]
        return [
            {"deletion": deletion, "filename": filename, "deleted": _time_of(deletion)} for deletion, filename in found
        ]

    def _deletions(self) -> Iterator[Tuple[str, str]]:
        """(deletion, file name) of each file in the trash."""
        trash = os.path.join(self.path, TRASH)
        if not os.path.isdir(trash):
            return
        for deletion in os.listdir(trash):
            place = os.path.join(trash, deletion)
            if _DELETION.fullmatch(deletion) and os.path.isdir(place) and not os.path.islink(place):
                yield from ((deletion, filename) for filename in os.listdir(place)[:1])

    def _existing(self, filename: str) -> str:
        path = os.path.join(self.path, filename)
        if not os.path.lexists(path):
            raise UnknownSoftPrompt(f"There is no soft prompt named {filename} any more.")
        return path

    def _place(self, path: str, stem: str, ending: str) -> str:
        """Move what lies at ``path`` into the folder, under a name that is free; returns that name."""
        taken = self._taken()
        for number in count(1):
            filename = f"{stem}{f'-{number}' if number > 1 else ''}{ending}"
            if filename.casefold() in taken:
                continue
            try:
                _move(path, os.path.join(self.path, filename))
                return filename
            except FileExistsError:  # it came in this moment, from elsewhere
                continue
        raise AssertionError("numbers do not end")

    def _taken(self) -> List[str]:
        """The names that are taken, as file systems compare them that do not tell cases apart."""
        return [each.casefold() for each in os.listdir(self.path)]

    def sibling(self) -> str:
        """A path in the folder that is never listed, for a file that is not whole yet."""
        return os.path.join(self.path, f".kobold-sp-{secrets.token_hex(8)}.tmp")


def stem_of(text: str, ending: str = "") -> str:
    """A file name without its ending, made of what a client calls a file; "" where nothing of it can be used.

    Letters and digits of any script and a few marks are kept; what leads out of the folder, hides the file or is a
    device on Windows is not. An ending is taken off that is ``ending`` or a soft prompt's.
    """
    text = unicodedata.normalize("NFC", re.split(r"[/\\]", text)[-1])
    root, last = os.path.splitext(text)
    text = root if last.lower() in (ending.lower(), *formats.EXTENSIONS) else text
    text = "".join(c if unicodedata.category(c)[0] in "LNM" or c in _MARKS else " " for c in text)
    text = " ".join(text.split()).encode()[:_LONGEST_STEM].decode(errors="ignore").strip(" .-_,")
    return f"{text}-softprompt" if _RESERVED.fullmatch(text) else text


def _split(path: str) -> Tuple[str, str]:
    """The name of a file without its ending, and that; a folder has none."""
    name = os.path.basename(path)
    return (name, "") if os.path.isdir(path) else os.path.splitext(name)


def _time_of(deletion: str) -> str:
    moment = time.strptime(deletion[:15], "%Y%m%d-%H%M%S")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)


def _receive(read: Callable[[int], bytes], size: int, path: str) -> None:
    """Write what a client sends to a new file."""
    with open(path, "xb") as file:
        left = size
        while left:
            piece = read(min(left, _PIECE))
            if not piece:
                raise ConnectionAbortedError(f"only {size - left:,} of {size:,} bytes came")
            file.write(piece)
            left -= len(piece)
        file.flush()
        os.fsync(file.fileno())


def _checked(path: str) -> formats.Header:
    """The header of a file that can be read to its last value. Raises a FormatError."""
    try:
        header = formats.read_header(path)
        formats.load(path)
    except NotASoftPromptFile as error:
        raise NotASoftPromptFile("it is no soft prompt", "KoboldAI's zip, or another format that is known") from error
    return header


def _move(source: str, target: str) -> None:
    """Rename, and never overwrite. Raises :class:`FileExistsError` or another :class:`OSError`."""
    if os.path.isfile(source) and not os.path.islink(source):
        try:
            os.link(source, target)
            os.unlink(source)
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
    if os.path.lexists(target):
        raise FileExistsError(target)
    os.rename(source, target)
