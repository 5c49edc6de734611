"""The file that a choice of soft prompts is kept in from one run of the host to the next."""

import json
import os
from pathlib import Path
from typing import List, Sequence

from .host import log

_MOST_BYTES = 2**16


def read(path: Path) -> List[str]:
    """What was chosen when the host ran last; nothing where that cannot be read."""
    try:
        with open(path, "rb") as file:
            known = json.loads(file.read(_MOST_BYTES))["selection"]
        if not isinstance(known, list):
            raise TypeError("its selection is no list")
        return [name for name in known if isinstance(name, str)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log().warning("The soft prompts that were chosen last are not known: %s cannot be read (%s)", path, error)
        return []


def write(path: Path, selection: Sequence[str]) -> None:
    """Keep this choice; where that fails, the log says so and nothing else happens."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps({"selection": list(selection)}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        log().warning("The choice of soft prompts will not outlast this run: %s", error)
