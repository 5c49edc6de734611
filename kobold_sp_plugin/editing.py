"""New soft prompts from old ones: other metadata, or several as one."""

import os
from itertools import combinations
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import numpy as np

from . import formats
from .compatibility.fingerprints import CLOSE, similarity
from .errors import EditError
from .softprompt import OWN_KEY, SoftPrompt, own_metadata, texts_of


def edit(path: Union[str, Path], changes: Mapping[str, Any]) -> SoftPrompt:
    """Change metadata of the file at ``path`` in place, in one step; rows, dtype and all other metadata stay.

    ``changes``: new values by key; one that is empty takes its key away. Returns what is in the file now. Raises
    :class:`EditError` for a format that has no place for metadata or is only read, another
    :class:`~kobold_sp_plugin.errors.SoftPromptError`, or :class:`OSError`.
    """
    header = formats.read_header(path)
    kind = formats.format_named(header.format)
    if kind.write is None or kind.holds != formats.ALL:
        raise EditError(
            f"{os.path.basename(path)} is in a format that cannot be given metadata ({kind.sentence}). Convert it "
            "first: kobold-sp convert IN OUT.zip"
        )
    if header.others:
        raise EditError(
            f"{os.path.basename(path)} holds more than a soft prompt, which would be lost: {', '.join(header.others)}. "
            "Convert it first: kobold-sp convert IN OUT.zip"
        )
    if header.dtype not in kind.dtypes:
        raise EditError(
            f"{os.path.basename(path)} holds {header.dtype}, which is not written. Convert it first: kobold-sp "
            "convert IN OUT.zip"
        )
    softprompt = formats.load(path)
    metadata = {**softprompt.metadata, **changes}
    metadata = {key: value for key, value in metadata.items() if key not in changes or value not in ("", [], None)}
    changed = SoftPrompt(softprompt.rows, metadata, softprompt.scale, softprompt.order)
    formats.save(changed, path, header.dtype, header.format)
    return changed


def combine(softprompts: Sequence[SoftPrompt], n_tokens: Optional[int] = None, name: str = "") -> SoftPrompt:
    """One soft prompt of the rows of all, in order, cut to the first ``n_tokens``.

    Its metadata say what it is made of. Its fingerprint is the first's, where all have one that can be compared with
    it, else it has none. Raises :class:`EditError` for soft prompts that differ in width, scale or order, or that were
    made for different models; or where there are fewer rows than ``n_tokens``.
    """
    if not softprompts:
        raise EditError("there is nothing to combine")
    first = softprompts[0]
    marks = [own_metadata(each.metadata).get("fingerprint") for each in softprompts]
    for each in softprompts[1:]:
        _check_alike(first, each)
    for (one, mark), (other, their_mark) in combinations(zip(softprompts, marks), 2):
        alike = similarity(mark, their_mark)
        if alike is not None and alike < CLOSE:
            raise EditError(f"{_called(one)} and {_called(other)} were made for different models")
    rows = np.concatenate([each.rows for each in softprompts])
    if n_tokens is not None and not 0 < n_tokens <= len(rows):
        raise EditError(f"{n_tokens} rows of {len(rows)}: at least 1, and not more than there are")
    rows = rows[:n_tokens]
    own: Dict[str, Any] = {"made_of": _parts(softprompts, len(rows))}
    if marks[0] and all(mark == marks[0] or similarity(marks[0], mark) is not None for mark in marks):
        own["fingerprint"] = marks[0]
    metadata: Dict[str, Any] = {"name": name or " + ".join(part["name"] for part in own["made_of"])}
    for key in ("author", "supported"):
        texts = (text for each in softprompts for text in texts_of(each.metadata.get(key)))
        metadata[key] = list(dict.fromkeys(texts))
    metadata["description"] = "Made of " + " and ".join(
        f"{part['name']} ({part['n_tokens']} rows)" for part in own["made_of"]
    )
    return SoftPrompt(rows, {**metadata, OWN_KEY: own}, first.scale, first.order)


def _check_alike(first: SoftPrompt, other: SoftPrompt) -> None:
    for what, ours, theirs in (
        ("width", first.width, other.width),
        ("scale", first.scale, other.scale),
        ("order", first.order, other.order),
    ):
        if ours != theirs:
            raise EditError(f"{_called(first)} has {what} {ours}, and {_called(other)} {theirs}: they cannot be one")


def _parts(softprompts: Sequence[SoftPrompt], n_tokens: int) -> List[Dict[str, Any]]:
    """Name and number of rows of each soft prompt of which a row is left."""
    parts = []
    for each in softprompts:
        kept = min(each.n_tokens, n_tokens)
        n_tokens -= kept
        if kept:
            parts.append({"name": _called(each), "n_tokens": kept})
    return parts


def _called(softprompt: SoftPrompt) -> str:
    return softprompt.name[:100] or "unnamed"
