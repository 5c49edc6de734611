"""Soft prompt files made byte by byte, whole or forged, and KoboldAI's rules for the files that it accepts."""

import io
import json
import struct
import zipfile
import zlib

import numpy as np

STORED, DEFLATED, LZMA = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA


def rows_of(n_tokens=3, width=4, seed=0):
    """float32 rows whose values float16 and bfloat16 hold exactly."""
    return (np.random.RandomState(seed).randint(-64, 64, (n_tokens, width)) / 8).astype(np.float32)


def npy(rows, descr=None, fortran=False, version=1):
    """An ``.npy`` file of ``rows`` under the dtype that ``descr`` states."""
    data = rows.tobytes(order="F" if fortran else "C")
    header = f"{{'descr': '{descr or rows.dtype.str}', 'fortran_order': {fortran}, 'shape': {rows.shape}, }}"
    return npy_header(header, version) + data


def npy_header(text, version=1):
    """The header that states ``text``, of .npy format 1, 2 or 3, padded as NumPy pads."""
    text = text.encode("latin-1") + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text


def bfloat16(rows):
    """The bits of ``rows`` cut to bfloat16, as uint16."""
    return (np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def make_zip(*members, method=STORED):
    """A zip of (name, bytes) pairs; a third item is the member's own method."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data, *own in members:
            archive.writestr(zipfile.ZipInfo(name), data, own[0] if own else method)
    return file.getvalue()


def kobold_zip(rows, method=STORED, **meta):
    """A whole soft prompt zip with float32 ``rows``."""
    return make_zip(("tensor.npy", npy(rows), method), ("meta.json", json.dumps({"name": "Test", **meta}).encode()))


def forged_zip(*members):
    """A zip written field by field.

    A member is a dictionary: ``name`` and ``data`` (bytes, as they lie in the file), and whatever of
    ``method``, ``flags``, ``crc``, ``packed``, ``unpacked``, ``offset`` shall not be what follows from them.
    What stands in ``local`` is stated so in the local header alone.
    """
    body, directory = b"", b""
    for member in members:
        data = member["data"]
        fields = {
            "flags": 0,
            "method": STORED,
            "crc": zlib.crc32(data),
            "packed": len(data),
            "unpacked": len(data),
            "name": member["name"],
            "offset": len(body),
        }
        fields.update({key: value for key, value in member.items() if key not in ("data", "local")})
        local = {**fields, **member.get("local", {})}
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, fields["flags"], fields["method"], 0, 33, fields["crc"],
            fields["packed"], fields["unpacked"], len(fields["name"]), 0, 0, 0, 0, 0, fields["offset"],
        ) + fields["name"]  # fmt: skip
        body += struct.pack(
            "<4s5H3L2H", b"PK\x03\x04", 20, local["flags"], local["method"], 0, 33, local["crc"],
            local["packed"], local["unpacked"], len(local["name"]), 0,
        ) + local["name"] + data  # fmt: skip
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + end


def kobold_accepts(path, width):
    """Assert what KoboldAI's readers ask of a file, and return rows and metadata as they understand them."""
    with zipfile.ZipFile(path) as archive:
        with archive.open("tensor.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            data = member.read()
        with archive.open("meta.json") as member:
            meta = json.load(member)
    assert len(shape) == 2
    assert shape[1] == width
    assert shape[0] < 2048
    assert dtype == np.dtype("V2") or dtype in (np.dtype("<f2"), np.dtype("<f4"))
    if dtype == np.dtype("V2"):
        rows = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        rows = np.frombuffer(data, dtype).astype(np.float32)
    rows = rows.reshape(shape, order="F" if fortran else "C")
    assert np.isfinite(rows).all()
    assert isinstance(meta["name"], str)
    assert isinstance(meta["description"], str)
    assert isinstance(meta["supported"], list)
    return rows, meta
