"""The NumPy checkpoints of Google's prompt-tuning: ``numpy_checkpoints/checkpoint_<step>/<parameter>``.

Each parameter is an ``.npy`` without that suffix, its path's slashes turned into dots. Source:
``prompt_tuning/train/utils.py``. Its trainer starts from a plain ``.npy``, which is the way back.
"""

import os
import re
from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional, Tuple

from ..errors import NoTensor, SeveralSoftPrompts
from . import npy
from .source import MAX_FOLDER, Candidate, Source, inside

FOLDER = "numpy_checkpoints"
_CHECKPOINT = re.compile(r"checkpoint_([0-9]{1,15})")


def detect(candidate: Candidate) -> bool:
    """Whether it is a folder with ``numpy_checkpoints``, or one of the folders inside that."""
    return candidate.is_folder and newest(candidate.path) is not None


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The prompt of the last checkpoint. Raises a FormatError."""
    found = newest(candidate.path)
    assert found is not None
    folder, step = os.path.relpath(found[0], candidate.path), found[1]
    names = _parameters(candidate.path, folder)
    chosen = [name for name in names if candidate.part in (None, name)]
    if len(chosen) > 1:
        chosen = [name for name in names if "prompt" in name.lower()]
    if not chosen:
        raise NoTensor(f"a checkpoint without a prompt (it holds {', '.join(names[:5])[:200] or 'nothing'})", "one")
    if len(chosen) > 1:
        listed = ", ".join(chosen[:5])[:200]
        raise SeveralSoftPrompts(
            f"a checkpoint of {len(chosen)} prompts ({listed})",
            "one; `kobold-sp convert` with `--part NAME` takes one out",
        )
    with open(inside(candidate.path, folder, chosen[0]), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield npy.source(file.read, size, chosen[0][:100], {"parameter": chosen[0], "step": step})


def parts_of(folder: str) -> Tuple[str, ...]:
    """The files of the last checkpoint in ``folder``, relative to it. Raises :class:`OSError`."""
    found = newest(folder)
    return (
        ()
        if found is None
        else tuple(os.path.relpath(os.path.join(found[0], name), folder) for name in _listed(found[0]))
    )


def newest(path: str) -> Optional[Tuple[str, int]]:
    """The folder of the last checkpoint in or at ``path``, and its step; None where there is none."""
    name = os.path.basename(os.path.abspath(path))
    at = _CHECKPOINT.fullmatch(name)
    if at is not None and os.path.basename(os.path.dirname(os.path.abspath(path))) == FOLDER:
        return path, int(at.group(1))
    inner = path if name == FOLDER else os.path.join(path, FOLDER)
    steps: Dict[int, str] = {}
    if os.path.isdir(inner):
        for each in _listed(inner):
            match = _CHECKPOINT.fullmatch(each)
            if match:
                steps[int(match.group(1))] = each
    return (os.path.join(inner, steps[max(steps)]), max(steps)) if steps else None


def _parameters(root: str, folder: str) -> List[str]:
    """The names in a checkpoint, the ``folder`` in ``root``, that begin as an ``.npy`` does."""
    found = []
    for name in sorted(_listed(os.path.join(root, folder))):
        if os.path.isfile(os.path.join(root, folder, name)):
            with open(inside(root, folder, name), "rb") as file:
                if file.read(len(npy.MAGIC)) == npy.MAGIC:
                    found.append(name)
    return found


def _listed(folder: str) -> List[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry, _ in zip(entries, range(MAX_FOLDER))]
