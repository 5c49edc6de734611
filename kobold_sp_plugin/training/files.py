"""Writing so that a file is whole or not there, whatever interrupts."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Callable


def write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Write what ``fill`` writes to ``path``, through a sibling that takes its name when it is on the disk."""
    descriptor, sibling = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except BaseException:
        os.unlink(sibling)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON."""
    write(path, lambda file: file.write(json.dumps(content, ensure_ascii=False).encode("utf-8")))
