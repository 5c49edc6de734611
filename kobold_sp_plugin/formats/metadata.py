"""``meta.json``: read whatever it holds, and written as KoboldAI's readers need it."""

import json
import math
from typing import Any, Dict, Iterable, List, Optional

from ..errors import MetadataNotJSON, MetadataNotUTF8, MetadataTooLarge
from ..softprompt import OWN_KEY, SoftPrompt, own_metadata

LABEL = "meta.json"
MAX_BYTES = 2**16
MAX_DEPTH = 32
"""Lists in lists in lists: deeper ones would overflow the stack of whoever compares or copies them."""
ORIGINAL = "original"
"""The key of our own part that keeps what the file held where KoboldAI needs an object, or text."""
MAX_DIGITS = 400
"""Longer whole numbers take longer to read than they are worth."""


def check_size(size: int, label: str = LABEL) -> None:
    """Raise :class:`MetadataTooLarge` where ``meta.json`` has more than 64 KiB."""
    if size > MAX_BYTES:
        raise MetadataTooLarge(f"{label} of {size} bytes", f"at most {MAX_BYTES} bytes")


def parse(data: Optional[bytes], label: str = LABEL) -> Dict[str, Any]:
    """The metadata in ``data``; {} where there is none.

    JSON that is not an object is kept, in our own part. NaN and infinities, which Python writes although JSON
    has none, become null. Raises :class:`MetadataTooLarge`, :class:`MetadataNotUTF8` or :class:`MetadataNotJSON`.
    """
    if data is None:
        return {}
    check_size(len(data), label)
    value = parse_json(data, label)
    return value if isinstance(value, dict) else {OWN_KEY: {ORIGINAL: value}}


def parse_json(data: bytes, label: str) -> Any:
    """What the JSON ``data`` says. Raises :class:`MetadataNotUTF8` or :class:`MetadataNotJSON`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"{label} with byte 0x{data[error.start]:02x} at position {error.start}"
        raise MetadataNotUTF8(found, "UTF-8") from error
    try:
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite_or_none, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise MetadataNotJSON(f"{label} that does not parse ({str(error)[:200]})", "a JSON object") from error
    level: List[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise MetadataNotJSON(f"{label} with lists in lists", f"at most {MAX_DEPTH} levels")
    return value


def take_checksum(metadata: Dict[str, Any]) -> Optional[str]:
    """Remove the tensor's SHA-256 from ``metadata`` and return it: a fact of the file, not of the value."""
    own = own_metadata(metadata)
    if "sha256" not in own:
        return None
    checksum = own.pop("sha256")
    metadata[OWN_KEY] = own
    return checksum if isinstance(checksum, str) else None


def portable(softprompt: SoftPrompt) -> Dict[str, Any]:
    """The metadata with scale and order stated, for a file that has a place for all of it.

    Raises :class:`MetadataTooLarge`.
    """
    found = dict(softprompt.metadata)
    own = own_metadata(found)
    own.update(scale=softprompt.scale.value, order=softprompt.order.value)
    found[OWN_KEY] = own
    check_size(len(json.dumps(found)), "metadata")
    return found


def dump(softprompt: SoftPrompt, checksum: str) -> bytes:
    """``meta.json`` for ``softprompt``, whose tensor has the SHA-256 ``checksum``.

    KoboldAI's keys first, and always those that its loaders require: ``name`` and ``description``, as text.
    Raises :class:`MetadataTooLarge`.
    """
    metadata = dict(softprompt.metadata)
    first: Dict[str, Any] = {"name": softprompt.name}
    if metadata.get("author") not in (None, "", []):
        first["author"] = metadata["author"]
    supported = metadata.get("supported")
    first["supported"] = [supported] if isinstance(supported, str) else supported or []
    first["description"] = softprompt.description
    own = own_metadata(metadata)
    no_text = {key: metadata[key] for key in ("name", "description") if isinstance(metadata.get(key), (list, dict))}
    if no_text and ORIGINAL not in own:
        own[ORIGINAL] = no_text
    own.update(scale=softprompt.scale.value, order=softprompt.order.value, sha256=checksum)
    for key in ("name", "author", "supported", "description", OWN_KEY):
        metadata.pop(key, None)
    everything = {**first, **metadata, OWN_KEY: own}
    # A lone surrogate has no UTF-8 form; its backslash escape is JSON's own, and reads back as what it was.
    data = json.dumps(everything, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(data) > MAX_BYTES:  # what was read in a compact form can be written in one
        compact = json.dumps(everything, separators=(",", ":"), ensure_ascii=False)
        data = compact.encode("utf-8", "backslashreplace")
    check_size(len(data))
    return data


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _finite_or_none(text: str) -> Optional[float]:
    _check_digits(text)
    value = float(text)
    return value if math.isfinite(value) else None


def _whole(text: str) -> int:
    _check_digits(text)
    return int(text)


def _check_digits(text: str) -> None:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
