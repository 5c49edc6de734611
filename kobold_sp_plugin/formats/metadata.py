"""``meta.json``: read whatever it holds, and written as KoboldAI's readers need it."""

import json
import math
from typing import Any, Dict, Iterable, Optional

from ..errors import MetadataNotJSON, MetadataNotUTF8, MetadataTooLarge
from ..softprompt import OWN_KEY, SoftPrompt, own_metadata

LABEL = "meta.json"
MAX_BYTES = 2**16
MAX_DEPTH = 32
"""Lists in lists in lists: deeper ones would overflow the stack of whoever compares or copies them."""


def check_size(size: int) -> None:
    """Raise :class:`MetadataTooLarge` where ``meta.json`` has more than 64 KiB."""
    if size > MAX_BYTES:
        raise MetadataTooLarge(f"{LABEL} of {size} bytes", f"at most {MAX_BYTES} bytes")


def parse(data: Optional[bytes]) -> Dict[str, Any]:
    """The metadata in ``data``; {} where there is none, or JSON that is not an object.

    NaN and infinities, which Python writes although JSON has none, become null.
    Raises :class:`MetadataTooLarge`, :class:`MetadataNotUTF8` or :class:`MetadataNotJSON`.
    """
    if data is None:
        return {}
    check_size(len(data))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"{LABEL} with byte 0x{data[error.start]:02x} at position {error.start}"
        raise MetadataNotUTF8(found, "UTF-8") from error
    try:
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite_or_none)
    except (ValueError, RecursionError) as error:
        raise MetadataNotJSON(f"{LABEL} that does not parse ({error})", "a JSON object") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for whole in level for part in _parts(whole)]
    if level:
        raise MetadataNotJSON(f"{LABEL} with lists in lists", f"at most {MAX_DEPTH} levels")
    return value if isinstance(value, dict) else {}


def take_checksum(metadata: Dict[str, Any]) -> Optional[str]:
    """Remove the tensor's SHA-256 from ``metadata`` and return it: a fact of the file, not of the value."""
    own = own_metadata(metadata)
    if "sha256" not in own:
        return None
    checksum = own.pop("sha256")
    metadata[OWN_KEY] = own
    return checksum if isinstance(checksum, str) else None


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
    value = float(text)
    return value if math.isfinite(value) else None
