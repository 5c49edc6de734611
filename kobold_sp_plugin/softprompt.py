"""A soft prompt as a value: rows, metadata, scale and order; and text that soft prompts stand in."""

import hashlib
import json
import re
import threading
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

import numpy as np

from .errors import MetadataNotJSON, NoRows, NotFinite, UnknownSoftPrompt, UnsupportedDtype, WrongRank

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

    ``"Once " + softprompt + " upon a time"`` is a :class:`TaggedText`: the soft prompt is read where it stands.

    Raises :class:`UnsupportedDtype`, :class:`WrongRank`, :class:`NoRows`, :class:`NotFinite`,
    :class:`MetadataNotJSON`, or :class:`ValueError` for a scale or order that is none.
    """

    __slots__ = ("__weakref__", "_metadata", "_order", "_rows", "_scale")

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

    from_file = load
    """The Soft Prompt Tuner's name for it."""

    def save(self, path: Union[str, Path], dtype: str = "float32") -> None:
        """Write a zip that KoboldAI reads, in one step: the file is whole or it is not there.

        ``dtype``: "float32", "float16" or "bfloat16". The same content gives the same bytes.
        Raises :class:`TooManyRows`, :class:`NotFinite` (a value too large for ``dtype``) or
        :class:`OSError`.
        """
        from .formats import save

        save(self, path, dtype)

    def __add__(self, other: "Union[str, SoftPrompt]") -> "TaggedText":
        return TaggedText((self, other)) if isinstance(other, (str, SoftPrompt)) else NotImplemented

    def __radd__(self, other: str) -> "TaggedText":
        return TaggedText((other, self)) if isinstance(other, str) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SoftPrompt):
            return NotImplemented
        return self is other or (
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


Part = Union[str, SoftPrompt]

_TAG = re.compile(r"<softprompt:([^<>\x00-\x1f]{1,300})>")
_LONGEST_NAME = 80
"""Characters of a name that a tag shows."""

_HOLDERS: "WeakValueDictionary[str, SoftPrompt]" = WeakValueDictionary()
"""Each tag's soft prompt, while it is in use; a second one of the name gets a tag with a digest."""
_TAGGING = threading.Lock()


class TaggedText(str):
    """Text that soft prompts stand in, each printed as a tag: ``Once <softprompt:noir> upon a time``.

    Made by ``+``, from text, soft prompts and other such texts. ``parts`` are what it consists of; the tags
    are only how it prints. No two soft prompts in use have one tag: of several by one name, only the first
    has it bare, and the others with a digest of their content (``<softprompt:noir#5f0c31a9be27>``).

    Whatever else makes a string of it (an f-string, a slice, ``strip``) gives a plain one, whose tags are
    ordinary text; :func:`read_tags` makes soft prompts of them again. Raises :class:`TypeError`.
    """

    __slots__ = ("_parts",)
    _parts: Tuple[Part, ...]

    def __new__(cls, parts: Iterable[Part]) -> "TaggedText":
        kept: List[Part] = []
        shown: List[str] = []
        for part in (each for given in parts for each in parts_of(given)):
            if isinstance(part, SoftPrompt):
                part, tag = _tagged(part)
                kept.append(part)
                shown.append(tag)
            elif kept and isinstance(kept[-1], str):
                kept[-1] += part
                shown.append(part)
            else:
                kept.append(part)
                shown.append(part)
        made = super().__new__(cls, "".join(shown))
        made._parts = tuple(kept)
        return made

    @property
    def parts(self) -> Tuple[Part, ...]:
        """Text and soft prompts in turn; no text among them is empty, and no two stand side by side."""
        return self._parts

    @property
    def softprompts(self) -> Tuple[SoftPrompt, ...]:
        """The soft prompts in it, in order, as often as they stand there."""
        return tuple(part for part in self._parts if isinstance(part, SoftPrompt))

    def __add__(self, other: Part) -> "TaggedText":  # type: ignore[override]
        return TaggedText((self, other)) if isinstance(other, (str, SoftPrompt)) else NotImplemented

    def __radd__(self, other: Part) -> "TaggedText":
        return TaggedText((other, self)) if isinstance(other, (str, SoftPrompt)) else NotImplemented

    def __reduce__(self) -> Tuple[Any, ...]:
        return (TaggedText, (self._parts,))


def parts_of(text: Part) -> Tuple[Part, ...]:
    """What ``text`` consists of: text, none of it empty, and soft prompts. A plain string is one text, tags or not."""
    if isinstance(text, TaggedText):
        return text.parts
    if isinstance(text, SoftPrompt):
        return (text,)
    if isinstance(text, str):
        return (str(text),) if text else ()
    raise TypeError(f"expected text or a SoftPrompt, got {text!r}")


def count_tokens(text: Part, count: Callable[[str], int]) -> int:
    """How many tokens of the context ``text`` uses; ``count`` says it of a plain string, with any tokenizer."""
    return sum(part.n_tokens if isinstance(part, SoftPrompt) else count(part) for part in parts_of(text))


def read_tags(
    text: str, softprompts: Union[Mapping[str, SoftPrompt], Callable[[str], Optional[SoftPrompt]]]
) -> Union[str, TaggedText]:
    """``text`` with a soft prompt for each tag ``<softprompt:NAME>`` that is written in it; safe on any text.

    ``softprompts`` has them by name, or is asked for each name once, such as ``Catalogue(folder).named``. Only
    what is written here is read: tags in what a model writes, or made by joining two texts, stay text until
    somebody reads them. Text without a tag comes back as it is. Raises :class:`UnknownSoftPrompt` for a name that
    nobody has.
    """
    names = softprompts
    found: Dict[str, SoftPrompt] = {}
    parts: List[Part] = []
    for part in parts_of(text):
        if isinstance(part, SoftPrompt):
            parts.append(part)
            continue
        end = 0
        for tag in _TAG.finditer(part):
            name = unquote(tag.group(1))
            if name not in found:
                one = names.get(name) if isinstance(names, Mapping) else names(name)
                if one is None:
                    known = ", ".join(sorted(names)[:20]) if isinstance(names, Mapping) else ""
                    known = f"; there are: {known}" if known else ""
                    raise UnknownSoftPrompt(f"there is no soft prompt named {name[:200]!r}{known}")
                found[name] = one
            parts += (part[end : tag.start()], found[name])
            end = tag.end()
        parts.append(part[end:])
    return TaggedText(parts) if found else text


def has_tags(text: str) -> bool:
    """Whether tags are written in ``text`` as ordinary text, for :func:`read_tags` to read."""
    return any(isinstance(part, str) and _TAG.search(part) is not None for part in parts_of(text))


def _tagged(softprompt: SoftPrompt) -> Tuple[SoftPrompt, str]:
    """The soft prompt of this content that all texts share, and its tag."""
    name = softprompt.name or "unnamed"
    name = name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…"
    shown = (c if c.isprintable() and c not in "%<>#" else quote(c, safe="", errors="replace") for c in name)
    bare = "<softprompt:" + "".join(shown)
    with _TAGGING:
        holder = _HOLDERS.setdefault(bare + ">", softprompt)
        if holder == softprompt:
            return holder, bare + ">"
        content = json.dumps([dict(softprompt.metadata), str(softprompt.scale), str(softprompt.order)], sort_keys=True)
        digest = hashlib.sha256(content.encode() + softprompt.rows.tobytes()).hexdigest()[:12]
        tag = f"{bare}#{digest}>"
        return _HOLDERS.setdefault(tag, softprompt), tag


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
