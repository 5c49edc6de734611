"""Where a training's files go: the soft prompt, numbered and never over another, and the folder of its work beside."""

import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NamedTuple

from ..errors import AlreadyRunning
from .checkpoint import FILENAME

LOCK = "lock"
_VERSION = re.compile(r"(.+[\W_]v)(\d{1,9})(\W*)", re.I)
"""Wide enough that a name and the file's name that :func:`filename` makes of it are of one version."""
_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{number}" for kind in ("com", "lpt") for number in range(1, 10))}


class Places(NamedTuple):
    """Of one version of a soft prompt."""

    output: Path
    """The zip, which is not there yet."""
    work: Path
    """Tokens, checkpoint and report."""
    version: int = 1
    """Which of its name, from 1."""

    @property
    def is_begun(self) -> bool:
        """Whether a checkpoint is there to go on from."""
        return (self.work / FILENAME).is_file()


def filename(name: str) -> str:
    """A file's name, without extension, for a soft prompt's: valid everywhere; "" where nothing is left of it."""
    found = re.sub(r"[^\w .()'+,&!-]+", "-", name).strip(" .-")[:100].rstrip(" .-")
    return f"{found}-" if found.lower().split(".")[0] in _DEVICES else found


def places(wanted: Path) -> Places:
    """The first version of ``wanted`` (``NAME.zip``, ``NAME-v2.zip`` ...) that is not finished.

    Its folder is in ``training/``, which stands beside the zip, or beside the folder ``softprompts`` that it is in: a
    folder of soft prompts holds nothing else.
    """
    folder = wanted.parent
    beside = folder.parent if folder.resolve().name == "softprompts" else folder
    number = 1
    while True:
        stem = of_version(wanted.stem, number, "-v")
        output = folder / f"{stem}{wanted.suffix}"
        if not os.path.lexists(output):
            return Places(output, beside / "training" / stem, number)
        number += 1


def of_version(text: str, number: int, mark: str) -> str:
    """``text`` for the ``number``-th version: "Noir", "Noir-v2" ...; of a "Noir v3", "Noir v4" is the second.

    So it is for a ``text`` and for the :func:`filename` of it.
    """
    if number == 1:
        return text
    own = _VERSION.fullmatch(text)
    return f"{own[1]}{int(own[2]) + number - 1}{own[3]}" if own else f"{text}{mark}{number}"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which is made, for this process; the lock goes with the process, however that ends.

    Raises :class:`AlreadyRunning`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+b") as file:
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            else:
                import fcntl

                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AlreadyRunning(f"Another process trains in {folder}. Wait for it, or choose another name.") from error
        yield
