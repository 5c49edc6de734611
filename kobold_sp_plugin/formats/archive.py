"""A zip whose members are unpacked piece by piece, whatever its bytes are.

``zipfile`` reads the directory of the archive; the members are unpacked here, because every step has to be
bounded: what a read may ask for, what a decompressor may put out, and the dictionary that it may allocate.
"""

import errno
import io
import lzma
import os
import re
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, Dict, List, Mapping, Optional, Tuple, Union

from ..errors import (
    CorruptMember,
    DuplicateMember,
    EncryptedMember,
    FormatError,
    NotASoftPromptFile,
    TooLarge,
    TruncatedTensor,
    UnsafeName,
    UnsupportedCompression,
)

MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
MAX_MEMBERS = 1000
MAX_READ = 2**18
"""No read of an archive takes more at once; so its directory, which zipfile takes at once, is bounded too."""
MAX_LZMA_DICTIONARY = 2**26

_UNSAFE_NAME = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|\0")
_ENCRYPTED, _DESCRIPTOR_FOLLOWS, _PATCHED, _UTF8_NAME = 0x1, 0x8, 0x20, 0x800
_LZMA_END_MARKER = 0x2
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class BoundedFile(io.FileIO):
    """A file of which no single read takes more than 256 KiB, whatever a forged length asks for."""

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return os.fstat(self.fileno()).st_size

    def read(self, size: Optional[int] = -1) -> bytes:
        if size is None or size > MAX_READ:
            size = _bounded(size)
        return super().read(size) or b""


class BoundedBytes(io.BytesIO):
    """The same of bytes in memory."""

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.getbuffer().nbytes

    def read(self, size: Optional[int] = -1) -> bytes:
        if size is None or size > MAX_READ:
            size = _bounded(size)
        return super().read(size)


Bounded = Union[BoundedFile, BoundedBytes]


def _bounded(size: Optional[int]) -> int:
    if size is not None and size > MAX_READ:
        raise TooLarge(f"a zip with a directory of {size} bytes", f"at most {MAX_READ} bytes")
    return -1 if size is None else size


class Member:
    """The bytes of one zip member, unpacked as they are asked for, and never more than are declared."""

    def __init__(self, file: Bounded, info: zipfile.ZipInfo, label: str):
        self._file, self._info, self._label = file, info, label
        _check_readable(info, label)
        self._position = _start_of_data(file, info, label)
        self._packed_left, self._left = info.compress_size, info.file_size
        self._pending, self._crc = b"", 0
        self._decompressor = self._make_decompressor()

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer only at the end."""
        pieces: List[bytes] = []
        count = min(count, self._left)
        try:
            while count:
                piece = self._next(count)
                if not piece:
                    break
                pieces.append(piece)
                count -= len(piece)
        except (zlib.error, lzma.LZMAError, EOFError) as error:
            raise self._corrupt(f"that does not unpack ({error})") from error
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._left -= len(data)
        self._crc = zlib.crc32(data, self._crc)
        return data

    def finish(self) -> None:
        """Check that nothing is missing, nothing is left over and the checksum is right."""
        if self._left:
            unpacked = self._info.file_size - self._left
            fault = TruncatedTensor if self._label.endswith(".npy") else CorruptMember
            found = f"{self._label} ends after {unpacked} of {self._info.file_size} bytes"
            raise fault(found, f"{self._info.file_size} bytes")
        if self._crc != self._info.CRC:
            raise self._corrupt("with a wrong checksum")
        # An LZMA stream without an end marker does not know where it ends: only the directory does.
        endless = self._info.compress_type == zipfile.ZIP_LZMA and not self._info.flag_bits & _LZMA_END_MARKER
        if self._decompressor is not None and not endless:
            try:
                more = self._next(1)
            except (zlib.error, lzma.LZMAError, EOFError) as error:
                raise self._corrupt(f"that does not unpack ({error})") from error
            if more:
                raise TooLarge(f"{self._label} that unpacks to more than it declares", f"{self._info.file_size} bytes")
            if not self._decompressor.eof:
                raise self._corrupt("whose compressed stream has no end")

    def _next(self, count: int) -> bytes:
        """Between 1 and ``count`` more bytes, or b"" where the stream ends."""
        if self._decompressor is None:
            return self._packed(count)
        while not self._decompressor.eof:
            wants_input = getattr(self._decompressor, "needs_input", not self._pending)
            packed = self._pending or (self._packed(max(count, 4096)) if wants_input else b"")
            piece: bytes = self._decompressor.decompress(packed, count)
            self._pending = getattr(self._decompressor, "unconsumed_tail", b"")
            if piece or not packed:
                return piece
        return b""

    def _packed(self, count: int) -> bytes:
        self._file.seek(self._position)
        data = self._file.read(min(count, self._packed_left, MAX_READ))
        self._position += len(data)
        self._packed_left -= len(data)
        return data

    def _make_decompressor(self) -> Any:
        if self._info.compress_type == zipfile.ZIP_STORED:
            return None
        if self._info.compress_type == zipfile.ZIP_DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS)
        head = self._packed(9)
        if len(head) < 9 or head[2:4] != b"\x05\x00" or head[4] >= 225:
            raise self._corrupt("without LZMA's properties")
        dictionary = int.from_bytes(head[5:9], "little")
        if dictionary > MAX_LZMA_DICTIONARY:
            found = f"{self._label} with an LZMA dictionary of {dictionary} bytes"
            raise TooLarge(found, f"at most {MAX_LZMA_DICTIONARY}")
        rest, lc = divmod(head[4], 9)
        pb, lp = divmod(rest, 5)
        lzma1 = {"id": lzma.FILTER_LZMA1, "dict_size": max(dictionary, 4096), "lc": lc, "lp": lp, "pb": pb}
        try:
            return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[lzma1])
        except (lzma.LZMAError, ValueError) as error:
            raise self._corrupt(f"with LZMA properties that fit no stream ({error})") from error

    def _corrupt(self, what: str) -> CorruptMember:
        return CorruptMember(f"{self._label} {what}", "an undamaged zip member")


def write_members(file: BinaryIO, members: Mapping[str, bytes]) -> None:
    """Write a zip of stored ``members`` into ``file``: the same bytes wherever and whenever it is written."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)  # dated 1980-01-01
            info.create_system = 3  # Unix; the default is the system that writes
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)


def members_of(file: Bounded) -> Dict[str, zipfile.ZipInfo]:
    """Name → member, for an archive in which every name is safe and there once."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except FormatError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # a forged offset makes zipfile seek to before the file's beginning
            raise
        raise _damaged(error) from error
    except Exception as error:  # a forged directory can make zipfile raise almost anything
        raise _damaged(error) from error
    if len(infos) > MAX_MEMBERS:
        raise TooLarge(f"a zip of {len(infos)} members", f"at most {MAX_MEMBERS}")
    members: Dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename.replace("\\", "/")
        if not name or _UNSAFE_NAME.search(name):
            raise UnsafeName(f"a zip member named {name[:100]!r}", "names inside the zip's own folder")
        if name in members:
            raise DuplicateMember(f"two zip members named {name[:100]!r}", "one of each name")
        members[name] = info
    return members


def _damaged(error: Exception) -> NotASoftPromptFile:
    found = f"a zip that is cut off, still being copied or damaged ({error})"
    return NotASoftPromptFile(found, "a whole zip")


def _check_readable(info: zipfile.ZipInfo, label: str) -> None:
    if info.flag_bits & _ENCRYPTED:
        raise EncryptedMember(f"{label} protected by a password", "a zip without a password")
    if info.compress_type not in _METHODS or info.flag_bits & _PATCHED:
        found = f"{label} compressed by method {info.compress_type}"
        raise UnsupportedCompression(found, "stored (0), deflate (8) or LZMA (14)")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise CorruptMember(f"{label} stored in {info.compress_size} bytes", f"{info.file_size} bytes")


def _start_of_data(file: Bounded, info: zipfile.ZipInfo, label: str) -> int:
    """Where the member's packed bytes begin; its local header has to tell what the directory told."""
    size = file.size
    raw = b""
    if 0 <= info.header_offset < size:
        file.seek(info.header_offset)
        raw = file.read(_LOCAL_HEADER.size)
    if len(raw) < _LOCAL_HEADER.size:
        raise CorruptMember(f"{label} whose header is not in the zip", "a header where the directory says")
    magic, _, flags, method, _, _, crc, packed, unpacked, name_size, extra_size = _LOCAL_HEADER.unpack(raw)
    name = file.read(name_size).decode("utf-8" if flags & _UTF8_NAME else "cp437", "replace")
    says: Tuple[Any, ...] = (magic, flags & _ENCRYPTED, method, name)
    expected: Tuple[Any, ...] = (b"PK\x03\x04", 0, info.compress_type, info.orig_filename)
    # With a descriptor after the data, or in the long form, the local header leaves these to the directory.
    if not flags & _DESCRIPTOR_FOLLOWS and 0xFFFFFFFF not in (packed, unpacked):
        says += (crc, packed, unpacked)
        expected += (info.CRC, info.compress_size, info.file_size)
    if says != expected:
        raise CorruptMember(f"{label} whose header contradicts the zip's directory", "both to say the same")
    start = int(info.header_offset) + _LOCAL_HEADER.size + int(name_size) + int(extra_size)
    if start + info.compress_size > size:
        raise CorruptMember(f"{label} that reaches past the end of the zip", "a whole zip")
    return start
