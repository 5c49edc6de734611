"""JSON that carries a soft prompt as one long base64 text: read without a parser ever seeing that text."""

import binascii
import re
import secrets
from typing import Any, Dict, NamedTuple, Optional

from ..errors import CorruptMember, MetadataNotJSON, NotASoftPromptFile, TooLarge
from . import metadata

MAX_BYTES = 2**26
"""Bytes of a JSON file; its rows may take three quarters of that."""
MAX_REST = 2**17
"""Bytes of the file without its long text: a parser makes of each byte up to thirty."""
_LONG_TEXT = re.compile(rb'"(tensor|data)"\s*:\s*"([A-Za-z0-9+/=\\]{16,})"')
_WHITESPACE = b" \t\r\n"


class JsonText(NamedTuple):
    """A JSON object, and the text that was too long for it."""

    value: Dict[str, Any]
    key: str
    """Which of its members the text was: "tensor" or "data"."""
    data: bytes
    """The bytes that the text was base64 of."""


def looks_like_object(start: bytes) -> bool:
    """Whether a file that begins with ``start`` may be a JSON object."""
    return start[3 if start.startswith(b"\xef\xbb\xbf") else 0 :].lstrip(_WHITESPACE).startswith(b"{")


def read(path: str, size: int) -> Optional[JsonText]:
    """The JSON object in the file at ``path``; None where no long text is in it.

    Raises :class:`TooLarge`, :class:`NotASoftPromptFile`, :class:`MetadataNotJSON` or :class:`CorruptMember`.
    """
    if size > MAX_BYTES:
        raise TooLarge(f"a JSON file of {size} bytes", f"at most {MAX_BYTES}")
    with open(path, "rb") as file:
        raw = file.read(size)
    found = max(_LONG_TEXT.finditer(raw), key=lambda match: match.end() - match.start(), default=None)
    if found is None:
        return None
    key, (start, end) = found.group(1).decode(), found.span(2)
    mark = secrets.token_hex(16)
    rest = raw[:start] + mark.encode() + raw[end:]
    if len(rest) > MAX_REST:
        raise TooLarge(f"{len(rest)} bytes of JSON besides its {key}", f"at most {MAX_REST}")
    value = metadata.parse_json(rest, "the file")
    if not isinstance(value, dict):
        raise MetadataNotJSON("JSON that is not an object", "an object")
    if value.get(key) != mark:
        raise NotASoftPromptFile(f"JSON whose {key} is not where a soft prompt has it", "it in the outermost object")
    del value[key]
    return JsonText(value, key, decode_base64(memoryview(raw)[start:end], key))


def decode_base64(text: memoryview, label: str) -> bytes:
    """The bytes that ``text`` is base64 of, escapes and line ends left out. Raises :class:`CorruptMember`."""
    encoded: Any = text
    escaped = bytes(text)
    if b"\\" in escaped or b"\n" in escaped or b"\r" in escaped:
        for escape, character in ((b"\\/", b"/"), (b"\\n", b""), (b"\\r", b""), (b"\n", b""), (b"\r", b"")):
            escaped = escaped.replace(escape, character)
        encoded = escaped
    padding = len(encoded) - len(bytes(encoded[-3:]).rstrip(b"=")) - len(encoded[:-3])
    del escaped
    try:
        data = binascii.a2b_base64(encoded)
    except binascii.Error as error:
        raise CorruptMember(f"{label} that is not base64 ({error})", "base64") from error
    if len(encoded) % 4 or len(data) != len(encoded) // 4 * 3 - padding:  # it skips what is none of its characters
        raise CorruptMember(f"{label} that is not base64", "base64")
    return data
