"""A folder of soft prompts as an immutable tuple of entries; no file can hurt another's entry."""

import logging
import os
import re
import stat
import threading
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

from . import formats
from .compatibility import ModelFacts, Verdict, facts, judge
from .errors import FormatError, NotASoftPromptFile, NoTensor, UnknownSoftPrompt, UnsafeName
from .formats import Header
from .softprompt import SoftPrompt

_LOG = logging.getLogger(__name__)

EXTENSIONS = formats.EXTENSIONS
"""Files that are listed even when they cannot be read: who put one here meant a soft prompt."""

_UNFINISHED = (".tmp", ".part", ".partial", ".crdownload", ".download", "~")
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that a menu must not show: they control, reorder or hide text, or are none."""
_JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need between others."""
_KEPT_MODELS = 4

Stamp = Tuple[int, ...]
"""mtime_ns, ctime_ns, size and inode, of each file that an entry is read from."""


@dataclass(frozen=True)
class Entry:
    """One file of the folder, for a menu: its texts are cut short and free of control characters."""

    filename: str
    """The key: "noir.zip", or "noir" for a folder."""
    name: str
    """The name that the file gives itself, else its filename without the extension."""
    verdict: Verdict
    reason: str
    """Why that verdict, in a sentence for the user."""
    author: str = ""
    description: str = ""
    supported: Tuple[str, ...] = ()
    """Names of the models it says it was made for."""
    n_tokens: Optional[int] = None
    """None where unreadable, like ``width``, ``dtype`` and ``header``."""
    width: Optional[int] = None
    dtype: Optional[str] = None
    header: Optional[Header] = field(default=None, repr=False)


class _Record(NamedTuple):
    """What was read of one file, and how the file looked then."""

    stamp: Stamp
    settled: bool
    """Whether a later change would have to show in the stamp."""
    header: Optional[Header]
    fault: Optional[str]
    """Why it cannot be read, found while listing or loading; both None for a file that is no soft prompt."""


class _View(NamedTuple):
    """The entries as one model sees them, and the records that they were made of."""

    facts: Optional[ModelFacts]
    records: Dict[str, _Record]
    entries: Dict[str, Entry]
    sorted: Tuple[Entry, ...]


class Catalogue:
    """The soft prompts in ``folder``, which may be missing and may change at any time. Thread-safe.

    Hidden and unfinished files are left out, and so is a file that is no soft prompt unless its extension
    (:data:`EXTENSIONS`) says that it is meant as one. Of folders only those that a format knows are entries.
    """

    def __init__(self, folder: Union[str, Path]):
        self._folder = Path(folder)
        self._lock = threading.RLock()
        self._records: Dict[str, _Record] = {}
        self._views: List[_View] = []

    @property
    def folder(self) -> Path:
        """The folder that is listed."""
        return self._folder

    def entries(self, model: Any = None) -> Tuple[Entry, ...]:
        """Every soft prompt, sorted by filename without regard to case, judged for ``model``.

        ``model`` is whatever :func:`~kobold_sp_plugin.compatibility.facts` takes, or None; taking the facts
        of a torch model reads some of its rows, so who lists often should take them once. Reads what changed
        since the last call, headers only; where nothing did, the same tuple is returned.
        """
        known = None if model is None else facts(model)
        with self._lock:
            self._rescan()
            return self._viewed(known).sorted

    def entry(self, filename: str, model: Any = None) -> Entry:
        """The entry of one file. Raises :class:`UnsafeName` or :class:`UnknownSoftPrompt`."""
        self._path(filename)
        for entry in self.entries(model):
            if entry.filename == filename:
                return entry
        raise _unknown(filename)

    def load(self, filename: str) -> SoftPrompt:
        """Read a soft prompt, rows and all.

        What only this finds (NaN, a wrong checksum) is remembered: the entry is unreadable until the file
        changes. Raises :class:`UnsafeName`, :class:`UnknownSoftPrompt`, a
        :class:`~kobold_sp_plugin.errors.FormatError` or :class:`OSError`.
        """
        path = self._path(filename)
        stamp = _stamp_of(path)
        if stamp is None:
            raise _unknown(filename)
        try:
            softprompt = formats.load(path)
        except FileNotFoundError as error:
            raise _unknown(filename) from error
        except FormatError as error:
            self._remember(filename, path, stamp, error.sentence)
            error.path = filename  # what a client is told must not name the server's folders
            raise
        self._remember(filename, path, stamp, None)
        return softprompt

    def named(self, name: str) -> Optional[SoftPrompt]:
        """Read the soft prompt of this file name, with or without its extension, or of this name; None: there is none.

        Raises :class:`UnknownSoftPrompt` where several have it, or what :meth:`load` raises.
        """
        filename = self.filename_of(name)
        return None if filename is None else self.load(filename)

    def filename_of(self, name: str) -> Optional[str]:
        """The file that :meth:`named` means. Raises :class:`UnknownSoftPrompt` where several may be meant."""
        entries = self.entries()
        for found in (
            [entry.filename for entry in entries if entry.filename == name],
            [entry.filename for entry in entries if os.path.splitext(entry.filename)[0] == name],
            [entry.filename for entry in entries if entry.name == name],
        ):
            if len(found) > 1:
                raise UnknownSoftPrompt(f"{name[:200]!r} may be any of {', '.join(found[:20])}; write the file's name")
            if found:
                return found[0]
        return None

    def _path(self, filename: str) -> str:
        """The path of a listed name; a name that leads out of the folder or is never listed has none."""
        if filename in ("", ".", "..") or re.search(r"[/\\\0]", filename) or os.path.splitdrive(filename)[0]:
            raise UnsafeName(f"{filename[:100]!r} leads out of the folder", "the name of a file in it")
        if not _may_be_listed(filename):
            raise _unknown(filename)
        return os.path.join(self._folder, filename)

    def _remember(self, filename: str, path: str, stamp: Stamp, fault: Optional[str]) -> None:
        """Keep what loading found, if the file is still the one that was loaded."""
        with self._lock:
            record = self._refreshed(filename, path, stamp, time.time_ns())
            if _stamp_of(path) == stamp and record.header is not None:
                self._records = {**self._records, filename: record._replace(fault=fault)}

    def _rescan(self) -> None:
        """Bring ``_records`` up to date with the folder."""
        now = time.time_ns()
        try:
            found = stamps(self._folder)
        except OSError as error:  # a drive that is away for a moment: what was known is the better answer
            _LOG.warning("cannot list %s: %s", self._folder, error)
            return
        old, records = self._records, {}
        for filename, stamp in found.items():
            record = old.get(filename)
            if record is None or record.stamp != stamp or not record.settled:
                record = self._refreshed(filename, os.path.join(self._folder, filename), stamp, now)
            records[filename] = record
        self._records = records

    def _refreshed(self, filename: str, path: str, stamp: Stamp, now: int) -> _Record:
        """The record of a file that looks like ``stamp``; it is read unless the known record still holds."""
        known = self._records.get(filename)
        if known is None or known.stamp != stamp:
            return _read(path, stamp, _is_settled(stamp, now))
        if known.settled:
            return known
        record = _read(path, stamp, _is_settled(stamp, now))
        if record.header is not None and record.header == known.header:
            return known._replace(settled=record.settled)  # with what loading has found
        return record

    def _viewed(self, known: Optional[ModelFacts]) -> _View:
        """The view for ``known``; an entry whose record shows the same is kept, and the tuple if all are."""
        old = next((view for view in self._views if view.facts == known), _View(known, {}, {}, ()))
        entries, all_kept = {}, True
        for filename, record in self._records.items():
            before = old.records.get(filename)
            if before is record or (before and before.header is record.header and before.fault == record.fault):
                if filename in old.entries:
                    entries[filename] = old.entries[filename]
            elif record.header is not None or record.fault is not None:
                entries[filename] = _entry(filename, record, known)
                all_kept = False
        ordered = old.sorted
        if entries.keys() != old.entries.keys():
            ordered = tuple(sorted(entries.values(), key=_place))
        elif not all_kept:
            ordered = tuple(entries[entry.filename] for entry in ordered)
        view = _View(known, self._records, entries, ordered)
        self._views = [view, *(other for other in self._views if other is not old)][:_KEPT_MODELS]
        return view


def stamps(folder: Union[str, Path]) -> Dict[str, Stamp]:
    """How everything in ``folder`` that may be a soft prompt looks: filename → stamp.

    Opens no file. A missing folder is empty. Raises :class:`OSError` for one that cannot be listed.
    """
    found = {}
    try:
        with os.scandir(folder) as files:
            for file in files:
                if _may_be_listed(file.name):
                    stamp = _stamp_of(file.path)
                    if stamp is not None:
                        found[file.name] = stamp
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return found


def _may_be_listed(filename: str) -> bool:
    return not filename.startswith(".") and not filename.lower().endswith(_UNFINISHED)


def _stamp_of(path: str) -> Optional[Stamp]:
    """How a file looks, or a folder with a soft prompt in it; None for anything that is neither."""
    try:
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
        stamps = [_stamp_of(os.path.join(path, part)) or () for part in formats.parts_of(path)]
        return tuple(number for stamp in stamps for number in stamp) if stamps else None
    except FileNotFoundError:
        return None
    except OSError:
        return ()  # it is there, and reading it will tell what is wrong with it


def _is_settled(stamp: Stamp, now: int) -> bool:
    """Whether files that looked like ``stamp`` at the time ``now`` (ns) cannot change and look the same.

    A change within the clock tick of the last one leaves the times as they are. File systems that count in
    whole seconds are known by their round times; the others tick at least every 16 ms. A time that lies in
    the future is no reason to read the file again and again.
    """
    for mtime, ctime in zip(stamp[0::4], stamp[1::4]):
        tick = 2_500_000_000 if mtime % 1_000_000_000 == 0 else 100_000_000
        if abs(now - mtime) < tick or abs(now - ctime) < tick:
            return False
    return bool(stamp)


def _read(path: str, stamp: Stamp, settled: bool) -> _Record:
    """Read one header. Whatever goes wrong is this file's fault, and no other's."""
    try:
        return _Record(stamp, settled, formats.read_header(path), None)
    except (NotASoftPromptFile, NoTensor) as error:
        meant = path.lower().endswith(EXTENSIONS) or os.path.isdir(path)
        return _Record(stamp, settled, None, error.sentence if meant else None)
    except FormatError as error:
        return _Record(stamp, settled, None, error.sentence)
    except OSError as error:
        return _Record(stamp, False, None, f"it cannot be opened: {error.strerror or error}")
    except Exception as error:
        _LOG.exception("unexpected failure to read %s", path)
        return _Record(stamp, settled, None, f"it cannot be read ({type(error).__name__}: {error})")


def _place(entry: Entry) -> Tuple[str, str]:
    return entry.filename.casefold(), entry.filename


def _entry(filename: str, record: _Record, known: Optional[ModelFacts]) -> Entry:
    stem = _shown(os.path.splitext(filename)[0], 200)
    header = record.header
    if record.fault is not None or header is None:
        name = _shown(header.name, 200) if header is not None else ""
        return Entry(filename, name or stem, Verdict.UNREADABLE, _shown(record.fault or "", 500))
    try:
        verdict, reason = judge(header, known)
    except Exception as error:
        _LOG.exception("unexpected failure to judge %s", filename)
        return Entry(filename, stem, Verdict.UNREADABLE, f"it cannot be judged ({type(error).__name__})")
    return Entry(
        filename=filename,
        name=_shown(header.name, 200) or stem,
        verdict=verdict,
        reason=_shown(reason, 500),
        author=_shown(header.author, 200),
        description=_shown(header.description, 2000),
        supported=tuple(_shown(model, 200) for model in header.supported[:50]),
        n_tokens=header.n_tokens,
        width=header.width,
        dtype=header.dtype,
        header=header,
    )


def _shown(text: str, limit: int) -> str:
    """``text`` on one line, of at most ``limit`` characters, with nothing that reorders or hides text."""
    text = text[: limit * 2]
    if not (text.isascii() and text.isprintable()):
        text = "".join(" " if unicodedata.category(c) in _HIDDEN and c not in _JOINERS else c for c in text)
        text = text if text.strip(_JOINERS + " ") else ""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _unknown(filename: str) -> UnknownSoftPrompt:
    return UnknownSoftPrompt(f"there is no soft prompt named {filename[:200]!r} in the folder")
