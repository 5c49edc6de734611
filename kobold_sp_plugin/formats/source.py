"""What every format gives its reader: a stream of tensor bytes, and the bytes of the metadata."""

from typing import Callable, NamedTuple, Optional

TENSOR = "tensor.npy"


class Source(NamedTuple):
    """An open soft prompt file: its tensor, not yet read, and its metadata."""

    read: Callable[[int], bytes]
    """The next so many bytes of the tensor's ``.npy``; fewer at its end."""
    size: int
    """How many bytes that ``.npy`` has, as the container declares."""
    finish: Callable[[], None]
    """Check, after the last byte, what the container can check."""
    meta: Optional[bytes]
    """``meta.json``, or None where there is none."""
    label: str
    """What messages call the tensor."""
    checksum: Optional[int]
    """CRC-32 of the ``.npy``, where the container tells it without reading the rows."""
