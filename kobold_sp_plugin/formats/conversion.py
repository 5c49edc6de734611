"""One format into another: what is kept, what is not, and whether the rows are the same."""

import os
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Tuple, Union

import numpy as np

from ..errors import UnknownScale
from ..softprompt import OWN_KEY, Scale, SoftPrompt
from . import Format, format_named, load, read_header, save
from .peft import KEPT

_PARTS = (OWN_KEY, KEPT)
"""Objects in the metadata of which each member is kept or lost by itself."""


class Conversion(NamedTuple):
    """What became of a soft prompt."""

    format: str
    """The format that was read, by its name in the table."""
    to: str
    shape: Tuple[int, int]
    dtype: str
    """What the rows are stored as now, and ``dtype_before``."""
    dtype_before: str
    scale: Scale
    """The space that the rows are in now."""
    factor: float
    """What the rows were multiplied by."""
    difference: float
    """The largest between a value that was to be stored and the one that is; 0: they are the same."""
    lost: List[str]
    """The metadata that the new file has no place for, and what else the old one held."""
    notes: List[str]
    """What else a user has to know."""


def convert(
    path: Union[str, Path],
    out: Union[str, Path],
    to: str,
    embed_scale: Optional[float] = None,
    part: Optional[str] = None,
) -> Conversion:
    """Write the soft prompt at ``path`` to ``out`` as the format named ``to``, and read it back to compare.

    The rows keep their dtype where the format has it. ``embed_scale``: what the model's embedding module
    multiplies its rows by; needed where the two formats have their rows in different spaces.

    Raises a :class:`~kobold_sp_plugin.errors.FormatError`, :class:`UnknownScale` among them, or :class:`OSError`.
    """
    kind = format_named(to)
    kind.writer()
    header = read_header(path, part)
    softprompt = load(path, part)
    notes: List[str] = []
    factor = _factor(softprompt, kind, embed_scale, notes, os.fspath(path))
    rows, scale = softprompt.rows, softprompt.scale
    if factor is not None:
        scale = kind.scale
        rows = rows if factor == 1 else rows * np.float32(factor)
    converted = SoftPrompt(rows, softprompt.metadata, scale, softprompt.order)
    dtype = header.dtype if factor in (None, 1) else "float32"
    if dtype not in kind.dtypes:
        dtype = "float32" if "float32" in kind.dtypes else kind.dtypes[0]
    save(converted, out, dtype, to)
    back = load(out)
    return Conversion(
        format=header.format,
        to=to,
        shape=(header.n_tokens, header.width),
        dtype=dtype,
        dtype_before=header.dtype,
        scale=back.scale,
        factor=1.0 if factor is None else factor,
        difference=float(np.abs(back.rows - converted.rows).max()),
        lost=sorted([*_lost(converted, back), *header.others]),
        notes=notes,
    )


def _factor(
    softprompt: SoftPrompt, kind: Format, embed_scale: Optional[float], notes: List[str], path: str
) -> Optional[float]:
    """What brings the rows into the format's space; None where they stay in theirs."""
    if softprompt.scale is kind.scale:
        return None
    spaces = {Scale.MATRIX: "as stored in the embedding matrix", Scale.MODULE: "as they leave the embedding module"}
    if embed_scale is not None:
        return embed_scale if kind.scale is Scale.MODULE else 1 / embed_scale
    if not kind.declares_scale:
        raise UnknownScale(
            f"rows {spaces[softprompt.scale]}, where this format has them {spaces[kind.scale]}",
            "the model to be named, whose configuration tells by how much the two differ, if at all",
            path,
        )
    notes.append(
        f"The rows are {spaces[softprompt.scale]}, and the file says so; other programs expect them "
        f"{spaces[kind.scale]}. For most models that is the same; name the model to be sure."
    )
    return None


def _lost(before: SoftPrompt, after: SoftPrompt) -> List[str]:
    lost = [] if before.order is after.order else [f"order ({before.order})"]
    for key, value in before.metadata.items():
        kept = after.metadata.get(key)
        if key in _PARTS and isinstance(value, Mapping):
            inside: Any = kept if isinstance(kept, Mapping) else {}
            names = [name for name in value if name not in ("scale", "order")]
            gone = [name for name in names if value[name] != inside.get(name)]
            lost.extend([key] if gone and not inside else (f"{key}.{name}" for name in gone))
        elif value not in ("", None, [], {}) and value != kept and [value] != kept:
            lost.append(key)
    return lost
