"""Files made to fool, crash or exhaust a reader. Each is refused by its own error, soon and in little memory."""

import io
import json
import lzma
import os
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from zips import DEFLATED, LZMA, forged_zip, kobold_zip, make_zip, npy, npy_header, rows_of

from kobold_sp_plugin import Catalogue, SoftPrompt, Verdict, errors
from kobold_sp_plugin.formats import load, read_header

ROWS = rows_of(8, 16)
TENSOR = npy(ROWS)
META = ("meta.json", b'{"name": "Bad"}')
FOUND_BY_LOADING = {"ran": False}


def deflated(data, end=zlib.Z_FINISH):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush(end)


def lzma_packed(data, dictionary=None, properties=None):
    """LZMA as it stands in a zip: version, size of the properties, properties, stream with an end marker."""
    lzma1 = {"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16}
    stream = lzma.compress(data, lzma.FORMAT_RAW, filters=[lzma1])
    head = properties or struct.pack("<BI", 93, 1 << 16 if dictionary is None else dictionary)
    return struct.pack("<BBH", 9, 4, len(head)) + head + stream


def header(shape="(8, 16)", descr="'<f4'", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def tensor(*arguments, size=512, **fields):
    """A zip whose tensor has a header of these fields and ``size`` bytes of zeros for rows."""
    return make_zip(("tensor.npy", npy_header(header(*arguments, **fields)) + bytes(size)), META)


def headed(text):
    """A zip whose tensor has ``text`` where its header should be."""
    return make_zip(("tensor.npy", npy_header(text) + bytes(512)), META)


def forged_tensor(data=TENSOR, **fields):
    """A zip whose tensor.npy is forged."""
    return forged_zip({"name": b"tensor.npy", "data": data, **fields})


def named(name):
    """A zip with a member of that name beside a whole soft prompt."""
    return forged_zip({"name": b"tensor.npy", "data": TENSOR}, {"name": name, "data": b"x"})


def described(meta, method=zipfile.ZIP_STORED):
    return make_zip(("tensor.npy", TENSOR), ("meta.json", meta, method))


def not_a_number(value, dtype="<f4"):
    rows = ROWS.astype(dtype)
    rows[3, 5] = value
    return make_zip(("tensor.npy", npy(rows)), META)


class Exploit:
    def __reduce__(self):
        return (FOUND_BY_LOADING.__setitem__, ("ran", True))


def pickled():
    file = io.BytesIO()
    file.write(npy_header(header("(1,)", "'|O'")))
    pickle.dump([Exploit()], file)
    return make_zip(("tensor.npy", file.getvalue()), META)


def huge_directory():
    """An end record that declares nearly the whole file, 300 kB, to be the directory; 4 GB are as easily made."""
    filler = bytes(300_000)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(filler), 4, 0)
    return b"PK\x03\x04" + filler + end


def edited(data, old, new):
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


WHOLE = kobold_zip(ROWS)
PACKED = make_zip(("tensor.npy", TENSOR, DEFLATED), META)
TOO_MUCH = TENSOR + bytes(50_000_000)

LISTED = {
    # neither a zip nor a tensor
    "empty": (b"", "NotASoftPromptFile"),
    "noise": (bytes(range(256)) * 4, "NotASoftPromptFile"),
    "a pickle": (pickle.dumps({"a": 1}), "NotASoftPromptFile"),
    "zip cut in half": (WHOLE[: len(WHOLE) // 2], "NotASoftPromptFile"),
    "zip without its last byte": (WHOLE[:-1], "NotASoftPromptFile"),
    "zip behind an image": (b"GIF89a" + WHOLE, "NotASoftPromptFile"),
    "only a zip's first bytes": (b"PK\x03\x04", "NotASoftPromptFile"),
    "directory before the file's start": (
        edited(WHOLE, WHOLE[-10:-6], b"\xff\xff\xff\x7f"),
        "NotASoftPromptFile",
    ),
    "directory that is none": (
        WHOLE[:-22] + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 60, 0, 0),
        "NotASoftPromptFile",
    ),
    "name that is not the UTF-8 it claims": (
        forged_zip({"name": b"\xff\xfe", "data": b"", "flags": 0x800}),
        "NotASoftPromptFile",
    ),
    # no tensor
    "empty zip": (make_zip(), "NoTensor"),
    "zip of other things": (make_zip(("readme.txt", b"hello"), META), "NoTensor"),
    "tensor two folders down": (make_zip(("a/b/tensor.npy", TENSOR)), "NoTensor"),
    "two soft prompts in one zip": (make_zip(("a/tensor.npy", TENSOR), ("b/tensor.npy", TENSOR)), "NoTensor"),
    # members
    "encrypted tensor": (forged_tensor(flags=1), "EncryptedMember"),
    "encrypted metadata": (
        forged_zip({"name": b"tensor.npy", "data": TENSOR}, {"name": b"meta.json", "data": b"{}", "flags": 1}),
        "EncryptedMember",
    ),
    "bzip2": (make_zip(("tensor.npy", TENSOR), method=zipfile.ZIP_BZIP2), "UnsupportedCompression"),
    "deflate64": (forged_tensor(method=9), "UnsupportedCompression"),
    "zstandard": (forged_tensor(method=93), "UnsupportedCompression"),
    "patch data": (forged_tensor(flags=0x20), "UnsupportedCompression"),
    "twice tensor.npy": (
        forged_zip({"name": b"tensor.npy", "data": TENSOR}, {"name": b"tensor.npy", "data": TENSOR}),
        "DuplicateMember",
    ),
    "twice a folder's file": (
        forged_zip({"name": b"a/tensor.npy", "data": TENSOR}, {"name": b"a\\tensor.npy", "data": TENSOR}),
        "DuplicateMember",
    ),
    "parent folder": (named(b"../evil.py"), "UnsafeName"),
    "parent folder in the middle": (named(b"a/../../evil.py"), "UnsafeName"),
    "parent folder at the end": (named(b"a/.."), "UnsafeName"),
    "parent folder by backslash": (named(b"..\\evil.py"), "UnsafeName"),
    "absolute": (named(b"/etc/passwd"), "UnsafeName"),
    "absolute by backslash": (named(b"\\windows\\evil.dll"), "UnsafeName"),
    "drive": (named(b"C:\\evil.dll"), "UnsafeName"),
    "name with an end inside": (named(b"tensor.npy\0.txt"), "UnsafeName"),
    "no name": (named(b""), "UnsafeName"),
    "header of another method": (forged_tensor(local={"method": 8}), "CorruptMember"),
    "header of another name": (forged_tensor(local={"name": b"tensor.npz"}), "CorruptMember"),
    "header of another size": (forged_tensor(local={"unpacked": 1}), "CorruptMember"),
    "header of another checksum": (forged_tensor(local={"crc": 1}), "CorruptMember"),
    "header elsewhere": (forged_tensor(offset=7), "CorruptMember"),
    "header past the end": (forged_tensor(offset=2**31), "CorruptMember"),
    "stored in another size": (forged_tensor(unpacked=100), "CorruptMember"),
    "reaches past the end": (forged_tensor(packed=10**6, unpacked=10**6), "CorruptMember"),
    "noise for deflate": (forged_tensor(b"\xff" * 100, method=8, unpacked=len(TENSOR)), "CorruptMember"),
    "noise for LZMA": (
        forged_tensor(lzma_packed(b"")[:9] + b"\xff" * 99, method=14, unpacked=len(TENSOR)),
        "CorruptMember",
    ),
    "LZMA without properties": (forged_tensor(b"\x09\x04", method=14, unpacked=640), "CorruptMember"),
    "LZMA properties of another size": (
        forged_tensor(lzma_packed(TENSOR, properties=bytes(40)), method=14, unpacked=len(TENSOR)),
        "CorruptMember",
    ),
    "LZMA properties out of range": (
        forged_tensor(
            lzma_packed(TENSOR, properties=b"\xff\0\0\1\0"), method=14, unpacked=len(TENSOR)
        ),
        "CorruptMember",
    ),
    "LZMA properties that no stream has": (
        forged_tensor(
            lzma_packed(TENSOR, properties=bytes([8 + 9 * 4]) + b"\0\0\1\0"), method=14, unpacked=len(TENSOR)
        ),
        "CorruptMember",
    ),
    "metadata with a wrong checksum": (
        forged_zip({"name": b"tensor.npy", "data": TENSOR}, {"name": b"meta.json", "data": b"{}", "crc": 5}),
        "CorruptMember",
    ),
    # bombs
    "LZMA dictionary of 4 GB": (
        forged_tensor(lzma_packed(TENSOR, 2**32 - 1), method=14, unpacked=len(TENSOR)),
        "TooLarge",
    ),
    "metadata that unpacks to more": (
        forged_zip(
            {"name": b"tensor.npy", "data": TENSOR},
            {"name": b"meta.json", "data": deflated(b" " * 10**7), "method": 8, "unpacked": 2,
             "crc": zlib.crc32(b"  ")},
        ),
        "TooLarge",
    ),
    "metadata by LZMA that unpacks to more": (
        forged_zip(
            {"name": b"tensor.npy", "data": TENSOR},
            {"name": b"meta.json", "data": lzma_packed(b" " * 10**7), "method": 14, "flags": 2, "unpacked": 2,
             "crc": zlib.crc32(b"  ")},
        ),
        "TooLarge",
    ),
    "1001 members": (make_zip(("tensor.npy", TENSOR), *((str(i), b"") for i in range(1000))), "TooLarge"),
    "huge directory": (huge_directory(), "TooLarge"),
    "a thousand billion columns": (tensor("(8, 1000000000000)"), "TooLarge"),
    "one column too many": (tensor(f"(2047, {2**25 // 2047 + 1})"), "TooLarge"),
    # headers
    "no magic": (make_zip(("tensor.npy", b"\x93NUMPX" + TENSOR[6:])), "BadTensorHeader"),
    "format 4": (make_zip(("tensor.npy", TENSOR[:6] + b"\x04\x00" + TENSOR[8:])), "BadTensorHeader"),
    "header of 60,000 bytes": (headed(header() + " " * 60_000), "BadTensorHeader"),
    "header of 4 GB": (make_zip(("tensor.npy", b"\x93NUMPY\x02\x00" + b"\xff" * 600)), "BadTensorHeader"),
    "code for a header": (headed("__import__('os').system('echo')"), "BadTensorHeader"),
    "brackets for a header": (headed("(" * 9000), "BadTensorHeader"),
    "minus signs for a header": (headed("-" * 9000 + "1"), "BadTensorHeader"),
    "spaces for a header": (headed("{" + " " * 9000), "BadTensorHeader"),
    "commas for a shape": (headed(header("(" + "1, " * 3000 + ")")), "BadTensorHeader"),
    "bytes past ASCII": (headed("{'descr': 'é" + "\xff" * 500), "BadTensorHeader"),
    "a key twice": (headed("{'descr': '<f4', 'descr': '<f4', 'shape': (8, 16)}"), "BadTensorHeader"),
    "a key more": (headed(header()[:-1] + "'x': 1}"), "BadTensorHeader"),
    "a key less": (headed("{'descr': '<f4', 'shape': (8, 16)}"), "BadTensorHeader"),
    "negative shape": (tensor("(-8, 16)"), "BadTensorHeader"),
    "true for a length": (tensor("(True, 16)"), "BadTensorHeader"),
    "a fraction for a length": (tensor("(8.0, 16)"), "BadTensorHeader"),
    "a length of 100 digits": (tensor(f"(8, 1{'0' * 100})"), "BadTensorHeader"),
    "a number in two words": (tensor("(8, 1 6)"), "BadTensorHeader"),
    "a list for a shape": (tensor("[8, 16]"), "BadTensorHeader"),
    "a number for a shape": (tensor("(128)"), "BadTensorHeader"),
    "a number for an order": (tensor(order="0"), "BadTensorHeader"),
    "ends in its magic": (make_zip(("tensor.npy", b"\x93NU")), "TruncatedTensor"),
    "ends before its length": (make_zip(("tensor.npy", b"\x93NUMPY\x01\x00v")), "TruncatedTensor"),
    "ends in its header": (make_zip(("tensor.npy", TENSOR[:40])), "TruncatedTensor"),
    # dtypes
    "Python objects": (pickled(), "ObjectDtype"),
    "Python objects in two dimensions": (tensor(descr="'|O8'"), "ObjectDtype"),
    "structured": (tensor(descr="[('a', '<f4'), ('b', '|O')]"), "UnsupportedDtype"),
    "big-endian bfloat16": (tensor(descr="'>V2'"), "UnsupportedDtype"),
    "four bytes of anything": (tensor(descr="'|V4'"), "UnsupportedDtype"),
    "whole numbers": (tensor(descr="'<i4'"), "UnsupportedDtype"),
    "booleans": (tensor(descr="'|b1'"), "UnsupportedDtype"),
    "complex": (tensor(descr="'<c8'"), "UnsupportedDtype"),
    "text": (tensor(descr="'<U4'"), "UnsupportedDtype"),
    "16 bytes a float": (tensor(descr="'<f16'"), "UnsupportedDtype"),
    "nonsense for a dtype": (tensor(descr="'whatever'"), "UnsupportedDtype"),
    # shapes
    "a number": (tensor("()"), "WrongRank"),
    "one dimension": (tensor("(128,)"), "WrongRank"),
    "three dimensions": (tensor("(2, 4, 16)"), "WrongRank"),
    "four dimensions": (tensor("(1, 1, 8, 16)"), "WrongRank"),
    "no rows": (tensor("(0, 16)"), "NoRows"),
    "no columns": (tensor("(8, 0)"), "NoRows"),
    "2048 rows": (tensor("(2048, 1)"), "TooManyRows"),
    "rows cut off": (make_zip(("tensor.npy", TENSOR[:-1])), "TruncatedTensor"),
    "a byte more": (make_zip(("tensor.npy", TENSOR + b"\0")), "TrailingBytes"),
    "a tensor with a zip behind": (TENSOR + WHOLE, "TrailingBytes"),
    "a bare tensor cut off": (TENSOR[:-1], "TruncatedTensor"),
    # metadata
    "metadata of 64 KiB and one": (described(b'{"a": "' + b"x" * 65528 + b'"}'), "MetadataTooLarge"),
    "metadata bomb": (described(b" " * 10**7, DEFLATED), "MetadataTooLarge"),
    "metadata bomb by LZMA": (described(b" " * 10**7, LZMA), "MetadataTooLarge"),
    "UTF-16": (described('{"name": "Noir"}'.encode("utf-16")), "MetadataNotUTF8"),
    "Latin-1": (described('{"name": "Café"}'.encode("latin-1")), "MetadataNotUTF8"),
    "half a JSON": (described(b'{"name": "Noi'), "MetadataNotJSON"),
    "nothing for JSON": (described(b""), "MetadataNotJSON"),
    "objects in lists in objects": (described(b'{"a": [' * 20 + b"]}" * 20), "MetadataNotJSON"),
    "brackets for JSON": (described(b"[" * 60_000), "MetadataNotJSON"),
    "lists in lists": (described(b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"), "MetadataNotJSON"),
}  # fmt: skip

LOADED = {
    "NaN": (not_a_number(np.nan), "NotFinite"),
    "infinity": (not_a_number(np.inf, "<f2"), "NotFinite"),
    "float64 past float32": (not_a_number(1e300, "<f8"), "NotFinite"),
    "tensor with a wrong checksum": (forged_tensor(crc=1), "CorruptMember"),
    "another SHA-256": (kobold_zip(ROWS, kobold_sp_plugin={"sha256": "0" * 64}), "CorruptMember"),
    "a word for a SHA-256": (kobold_zip(ROWS, kobold_sp_plugin={"sha256": "x"}), "CorruptMember"),
    "deflate that ends early": (
        forged_tensor(deflated(TENSOR[:400]), method=8, unpacked=len(TENSOR), crc=zlib.crc32(TENSOR)),
        "TruncatedTensor",
    ),
    "LZMA that ends early": (
        forged_tensor(lzma_packed(TENSOR[:400]), method=14, flags=2, unpacked=len(TENSOR)),
        "TruncatedTensor",
    ),
    "deflate without an end": (
        forged_tensor(deflated(TENSOR, zlib.Z_SYNC_FLUSH), method=8, unpacked=len(TENSOR), crc=zlib.crc32(TENSOR)),
        "CorruptMember",
    ),
    "deflate that goes on": (
        forged_tensor(deflated(TOO_MUCH), method=8, unpacked=len(TENSOR), crc=zlib.crc32(TENSOR)),
        "TooLarge",
    ),
    "LZMA that goes on": (
        forged_tensor(lzma_packed(TOO_MUCH), method=14, flags=2, unpacked=len(TENSOR), crc=zlib.crc32(TENSOR)),
        "TooLarge",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", [*LISTED, *LOADED])
def test_refused_by_its_own_error(tmp_path, attack):
    content, error = {**LISTED, **LOADED}[attack]
    path = tmp_path / "attack.zip"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if attack in LISTED:
                with pytest.raises(errors.FormatError) as listed:
                    read_header(path)
                assert type(listed.value).__name__ == error
            else:
                read_header(path)
            with pytest.raises(errors.FormatError) as loaded:
                load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(loaded.value).__name__ == error, loaded.value
    assert loaded.value.found
    assert loaded.value.expected
    assert loaded.value.path == str(path)
    assert len(str(loaded.value)) < len(str(path)) + 600
    assert time.process_time() - start < 2
    assert peak < 3e6
    assert FOUND_BY_LOADING == {"ran": False}
    assert os.listdir(tmp_path) == ["attack.zip"]


def test_no_attack_hurts_another_entry(tmp_path):
    """All of them in one folder: each has its reason, and the good one is as good as ever."""
    for number, (content, _) in enumerate([*LISTED.values(), *LOADED.values()]):
        (tmp_path / f"attack{number:03}.zip").write_bytes(content)
    SoftPrompt(ROWS, {"name": "Good"}).save(tmp_path / "good.zip")
    catalogue = Catalogue(tmp_path)
    entries = catalogue.entries()
    assert len(entries) == len(LISTED) + len(LOADED) + 1
    unreadable = [entry for entry in entries if entry.verdict is Verdict.UNREADABLE]
    assert [entry.filename for entry in unreadable] == [f"attack{n:03}.zip" for n in range(len(LISTED))]
    assert all("; expected " in entry.reason for entry in unreadable)
    assert json.dumps([entry.reason for entry in unreadable])
    assert catalogue.entry("good.zip").name == "Good"
    assert catalogue.load("good.zip").name == "Good"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "tensor.npy")
    (tmp_path / "described").mkdir()
    (tmp_path / "described" / "tensor.npy").write_bytes(TENSOR)
    os.mkfifo(tmp_path / "described" / "meta.json")
    for name in ("pipe.zip", "folder", "described"):
        with pytest.raises(errors.NotASoftPromptFile):
            load(tmp_path / name)
    assert [entry.verdict for entry in Catalogue(tmp_path).entries()] == [Verdict.UNREADABLE] * 3


def test_metadata_at_the_limit_is_read(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(described(b'{"a": "' + b"x" * 65527 + b'"}'))
    assert len(load(path).metadata["a"]) == 65527


def test_lzma_without_an_end_marker_is_read(tmp_path):
    """Other archivers leave the marker out: then the directory alone says where the stream ends."""
    data = rows_of(200, 64)
    stream = lzma.compress(npy(data), lzma.FORMAT_ALONE)
    packed = struct.pack("<BBH", 9, 4, 5) + stream[:5] + stream[13:]
    unpacked = len(npy(data))
    path = tmp_path / "a.zip"
    member = {"data": packed, "method": 14, "unpacked": unpacked, "crc": zlib.crc32(npy(data))}
    path.write_bytes(forged_zip({"name": b"tensor.npy", **member}))
    assert np.array_equal(load(path).rows, data)
