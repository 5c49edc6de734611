"""A soft prompt as a value: rows, metadata, scale and order."""

import json
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from .errors import MetadataNotJSON, NoRows, NotFinite, UnsupportedDtype, WrongRank

OWN_KEY = "kobold_sp_plugin"
"""The one key of ``meta.json`` that is ours: an object with scale, order, fingerprint and checksum."""


class Scale(str, Enum):
    """Which space the rows are in; models that scale embeddings tell the two apart."""

    MATRIX = "matrix"
    """As stored in the embedding matrix (KoboldAI, mtj-softtuner)."""
    MODULE = "module"
    """As they leave the embedding module (PEFT, vLLM)."""

    def __str__(self) -> str:
        return self.value


class Order(str, Enum):
    """Where the soft tokens stand."""

    BEFORE_BOS = "before_bos"
    """Before the beginning-of-sequence token and the text (KoboldAI's way)."""
    AFTER_BOS = "after_bos"
    """Between the beginning-of-sequence token and the text."""

    def __str__(self) -> str:
        return self.value


class WithMetadata:
    """What a soft prompt, or its file, says of itself in its metadata, as text for a menu."""

    __slots__ = ()
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name that the file gives itself, or ""."""
        return text_of(self.metadata.get("name"))

    @property
    def author(self) -> str:
        """Author or authors, joined by commas, or ""."""
        return ", ".join(texts_of(self.metadata.get("author")))

    @property
    def supported(self) -> List[str]:
        """Names of the models it was made for, as the file gives them."""
        return texts_of(self.metadata.get("supported"))

    @property
    def description(self) -> str:
        """The description that the file gives, or ""."""
        return text_of(self.metadata.get("description"))


class SoftPrompt(WithMetadata):
    """A matrix of rows that a language model reads as its first embedded tokens, and what is known of it.

    ``rows``: float32 ``[n_tokens, width]``, read-only, finite; copied, unless the array is that already and owns
    its memory. ``metadata``: what the file carries,
    read-only (``name``, ``author``, ``supported``, ``description`` and anything else). ``scale`` and
    ``order``: see :class:`Scale` and :class:`Order`; what the metadata declares, unless given.

    Raises :class:`UnsupportedDtype`, :class:`WrongRank`, :class:`NoRows`, :class:`NotFinite`,
    :class:`MetadataNotJSON`, or :class:`ValueError` for a scale or order that is none.
    """

    __slots__ = ("_metadata", "_order", "_rows", "_scale")

    def __init__(
        self,
        rows: Any,
        metadata: Optional[Mapping[str, Any]] = None,
        scale: Union[Scale, str, None] = None,
        order: Union[Order, str, None] = None,
    ):
        own = own_metadata(metadata or {})
        self._rows = _checked_rows(rows)
        self._scale = declared(Scale, own.get("scale")) if scale is None else Scale(scale)
        self._order = declared(Order, own.get("order")) if order is None else Order(order)
        self._metadata = MappingProxyType(_json_copy(metadata or {}))

    @property
    def rows(self) -> np.ndarray:
        """float32 ``[n_tokens, width]``, read-only."""
        return self._rows

    @property
    def metadata(self) -> Mapping[str, Any]:  # type: ignore[override]
        """What the file carries; read-only, except what lists and objects in it hold."""
        return self._metadata

    @property
    def scale(self) -> Scale:
        """The space that the rows are in."""
        return self._scale

    @property
    def order(self) -> Order:
        """Where the soft tokens stand."""
        return self._order

    @property
    def n_tokens(self) -> int:
        """How many tokens of the context the soft prompt uses."""
        return int(self._rows.shape[0])

    @property
    def width(self) -> int:
        """Columns; has to equal the width of the model's embedding module."""
        return int(self._rows.shape[1])

    @classmethod
    def load(cls, path: Union[str, Path]) -> "SoftPrompt":
        """Read a soft prompt from a file or folder of any known format; nothing is executed or extracted.

        Raises a :class:`~kobold_sp_plugin.errors.FormatError` that says what was found and what was
        expected, or :class:`OSError`.
        """
        from .formats import load

        return load(path)

    def save(self, path: Union[str, Path], dtype: str = "float32") -> None:
        """Write a zip that KoboldAI reads, in one step: the file is whole or it is not there.

        ``dtype``: "float32", "float16" or "bfloat16". The same content gives the same bytes.
        Raises :class:`TooManyRows`, :class:`NotFinite` (a value too large for ``dtype``) or
        :class:`OSError`.
        """
        from .formats import save

        save(self, path, dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SoftPrompt):
            return NotImplemented
        return (
            self._scale == other._scale
            and self._order == other._order
            and self._metadata == other._metadata
            and np.array_equal(self._rows, other._rows)
        )

    def __hash__(self) -> int:
        return hash((self._rows.shape, float(self._rows.sum()), self._scale, self._order))

    def __reduce__(self) -> Tuple[Any, ...]:
        return (SoftPrompt, (self._rows, dict(self._metadata), self._scale.value, self._order.value))

    def __repr__(self) -> str:
        return f"<SoftPrompt {self.name or 'unnamed'!r}: {self.n_tokens} tokens of width {self.width}>"


def own_metadata(metadata: Mapping[str, Any]) -> Dict[str, Any]:
    """Our own part of the metadata, or {} where there is none or it is not an object."""
    own = metadata.get(OWN_KEY)
    return dict(own) if isinstance(own, Mapping) else {}


def text_of(value: Any) -> str:
    """``value`` as text for a menu: strings as they are, numbers printed, anything else ""."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return ""


def texts_of(value: Any) -> List[str]:
    """``value`` as a list of texts: a list member by member, a string as its one member."""
    values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in map(text_of, values) if text]


def declared(kind: Any, value: Any) -> Any:
    """``value`` as a member of the enumeration ``kind``; KoboldAI's convention, its first, if it is none."""
    return next((member for member in kind if member.value == value), next(iter(kind)))


def _checked_rows(rows: Any) -> np.ndarray:
    if hasattr(rows, "detach"):  # a torch tensor, perhaps with a gradient, perhaps bfloat16, perhaps on a GPU
        rows = rows.detach().float().cpu().numpy() if rows.is_floating_point() else rows.detach().cpu().numpy()
    array = np.asarray(rows)
    if array.dtype.kind != "f":
        raise UnsupportedDtype(f"rows of dtype {array.dtype}", "a floating-point dtype")
    if array.ndim != 2:
        raise WrongRank(f"rows of shape {list(array.shape)}", "[n_tokens, width]")
    if 0 in array.shape:
        raise NoRows(f"rows of shape {list(array.shape)}", "at least one row and one column")
    checked = array
    if array.dtype != np.float32 or array.flags.writeable or array.base is not None or not array.flags.c_contiguous:
        with np.errstate(over="ignore"):  # a float64 past float32's range becomes infinite, and is refused as such
            checked = np.array(array, dtype=np.float32, order="C")
    for number, row in enumerate(checked):  # row by row: a mask of them all would take a quarter of their memory
        if not np.isfinite(row).all():
            column = int(np.argmin(np.isfinite(row)))
            raise NotFinite(f"{row[column]} in row {number}, column {column}", "finite values")
    checked.setflags(write=False)
    return checked


def _json_copy(metadata: Mapping[str, Any]) -> Dict[str, Any]:
    try:
        copy = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise MetadataNotJSON(f"metadata that JSON cannot hold ({error})", "text, numbers, lists, objects") from error
    assert isinstance(copy, dict)
    return copy
