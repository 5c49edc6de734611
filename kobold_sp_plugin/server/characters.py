"""Which soft prompts belong to which character: a file beside the softprompts folder."""

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

from ..errors import SelectionError
from ..session import MOST_SELECTED

LONGEST_NAME = 200
"""Characters of a character's name."""

MOST_CHARACTERS = 10000
_LARGEST_FILE = 4 * 1024 * 1024


class Characters:
    """Names of characters, each with the file names of its soft prompts; kept in ``<folder>.characters.json``.

    The file is ``{"characters": {name: [filename, ...]}}``. It is read again when somebody else has changed it, and
    written in one step. Safe to use from several threads.
    """

    def __init__(self, folder: Path):
        self.path = folder.parent / f"{folder.name}.characters.json"
        self._lock = threading.Lock()
        self._state: Optional[Tuple[int, int]] = None
        self._known: Dict[str, Tuple[str, ...]] = {}

    def all(self) -> Dict[str, Tuple[str, ...]]:
        """Every character that has soft prompts. Raises :class:`SelectionError` where the file cannot be read."""
        with self._lock:
            return dict(self._read())

    def keep(self, name: str, filenames: Sequence[str]) -> None:
        """Change a character's soft prompts; none of them: forget the character. Raises :class:`SelectionError`."""
        name = name.strip()
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            raise SelectionError(f"A character's name has 1 to {LONGEST_NAME} characters, and stands on one line.")
        if len(filenames) > MOST_SELECTED:
            raise SelectionError(f"{len(filenames)} soft prompts for one character; at most {MOST_SELECTED}.")
        with self._lock:
            known = dict(self._read())
            known.pop(name, None)
            if filenames:
                known[name] = tuple(filenames)
            if len(known) > MOST_CHARACTERS:
                raise SelectionError(f"There are soft prompts for {MOST_CHARACTERS} characters already.")
            self._write(known)

    def speaking(self, name: str, prompt: str) -> Optional[Tuple[str, ...]]:
        """The soft prompts of the character who speaks next, or None.

        Where no name is given, the prompt tells: SillyTavern and other front ends end it with ``Name:``.
        """
        known = self.all()
        if not known:
            return None
        name = name.strip()
        if not name:
            last_line = prompt.rstrip().rpartition("\n")[2].strip()
            name = last_line[:-1].strip() if last_line.endswith(":") else ""
        return known.get(name)

    def _read(self) -> Dict[str, Tuple[str, ...]]:
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                state = (status.st_mtime_ns, status.st_size)
                if state == self._state:
                    return self._known
                content = file.read(_LARGEST_FILE + 1)
            if len(content) > _LARGEST_FILE:
                raise ValueError("it is too large")
            self._known = _checked(json.loads(content.decode("utf-8")))
            self._state = state
        except FileNotFoundError:
            self._state, self._known = None, {}
        except (OSError, ValueError, RecursionError) as error:
            raise SelectionError(f"{self.path.name} cannot be read: {error}. Repair it, or delete it.") from error
        return self._known

    def _write(self, known: Dict[str, Tuple[str, ...]]) -> None:
        text = json.dumps({"characters": dict(sorted(known.items()))}, indent=1, ensure_ascii=False) + "\n"
        try:
            number, written = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(text.encode("utf-8", "replace"))
                os.replace(written, self.path)
            except BaseException:
                os.unlink(written)
                raise
        except OSError as error:
            raise SelectionError(f"{self.path.name} cannot be written: {error.strerror or error}") from error


def _checked(value: object) -> Dict[str, Tuple[str, ...]]:
    """What the file holds. Raises :class:`ValueError`."""
    characters = value.get("characters") if isinstance(value, dict) else None
    if not isinstance(characters, dict):
        raise ValueError('it is not {"characters": {...}}')
    for filenames in characters.values():
        if not isinstance(filenames, list) or not all(isinstance(each, str) for each in filenames):
            raise ValueError("each character needs a list of file names")
    return {name: tuple(filenames) for name, filenames in characters.items()}
