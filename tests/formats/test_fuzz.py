"""Damaged files, many of them: whatever the damage, a FormatError or a soft prompt, soon and in little memory."""

import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
from zips import DEFLATED, LZMA, STORED, bfloat16, make_zip, npy, rows_of

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.errors import FormatError
from kobold_sp_plugin.formats import load, read_header

ROWS = rows_of(6, 8)
BYTES = [0, 1, 2, 0x20, 0x27, 0x28, 0x2C, 0x30, 0x39, 0x50, 0x7F, 0x80, 0xFE, 0xFF]


def damaged(data, rng, at_most=4):
    """``data`` with a few bytes flipped, cut out, repeated or put in."""
    data = bytearray(data)
    for _ in range(rng.randint(1, at_most)):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 150) + 1)
        kind = rng.random()
        if kind < 0.6 and place < len(data):
            data[place] = rng.choice([*BYTES, rng.randrange(256), data[place] ^ (1 << rng.randrange(8))])
        elif kind < 0.7:
            del data[place : place + rng.choice([1, 2, 4, 60])]
        elif kind < 0.8:
            data[place:place] = data[place : place + rng.choice([1, 4, 30])]
        elif kind < 0.9:
            data[place:place] = bytes(rng.choice(BYTES) for _ in range(rng.choice([1, 2, 8])))
        else:
            data[place : place + 4] = struct.pack("<I", rng.choice([0, 1, 2**16 - 1, 2**31, 2**32 - 1]))
    return bytes(data)


def repaired(data):
    """``data`` with each stored member's checksum made right again, in both places, as far as it still parses."""
    data = bytearray(data)
    place = 0
    while True:
        place = data.find(b"PK\x01\x02", place)
        if place < 0 or place + 46 > len(data):
            return bytes(data)
        packed, _, name = struct.unpack_from("<2LH", data, place + 20)
        (offset,) = struct.unpack_from("<L", data, place + 42)
        start = offset + 30 + name
        if start + packed <= len(data) and offset + 30 <= len(data):
            checksum = struct.pack("<L", zlib.crc32(data[start : start + packed]))
            data[place + 16 : place + 20] = data[offset + 14 : offset + 18] = checksum
        place += 46


def case(rng):
    """One damaged file."""
    method = rng.choice([STORED, DEFLATED, LZMA])
    tensor = rng.choice(
        [npy(ROWS), npy(ROWS.astype("f2"), fortran=True), npy(bfloat16(ROWS), "|V2"), npy(ROWS[None].astype(">f8"))]
    )
    meta = b'{"name": "Noir", "supported": ["a"], "kobold_sp_plugin": {"scale": "module"}}'
    members = [["tensor.npy", tensor, method], ["meta.json", meta, rng.choice([STORED, method])], ["x.txt", b"hello"]]
    rng.shuffle(members)
    kind = rng.random()
    if kind < 0.25:  # damage inside a member, under a right checksum
        member = rng.choice(members)
        member[1] = damaged(member[1], rng)
        return make_zip(*members)
    if kind < 0.35:
        return damaged(tensor, rng)
    data = make_zip(*members[: rng.randint(1, 3)])
    if kind < 0.45:
        return data[: rng.randrange(len(data))]
    data = damaged(data, rng)
    return repaired(data) if kind < 0.8 else data


def check(path, content):
    """Read ``content`` both ways; whether it is a soft prompt. Fails for any other exception than FormatError."""
    path.write_bytes(content)
    header = None
    try:
        header = read_header(path)
        repr(header), header.name, header.author, header.supported, header.description
    except FormatError as error:
        str(error)
    try:
        softprompt = load(path)
    except FormatError as error:
        str(error)
        return False
    assert header is not None, "loaded, but not listed"
    assert softprompt.rows.shape == (header.n_tokens, header.width)
    assert np.isfinite(softprompt.rows).all()
    assert softprompt.metadata == header.metadata
    return True


def test_damaged_files(tmp_path):
    rng = random.Random(20241121)
    path = tmp_path / "damaged.zip"
    readable = 0
    for _ in range(1500):
        content = case(rng)
        tracemalloc.start()
        start = time.process_time()
        try:
            readable += check(path, content)
            assert time.process_time() - start < 1
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()
    assert 50 < readable < 1450  # the damage is neither nothing nor everything


def test_what_survives_damage_can_be_saved_again(tmp_path):
    rng = random.Random(5)
    path = tmp_path / "damaged.zip"
    saved = 0
    for _ in range(300):
        if check(path, case(rng)):
            softprompt = load(path)
            softprompt.save(tmp_path / "again.zip")
            assert np.array_equal(SoftPrompt.load(tmp_path / "again.zip").rows, softprompt.rows)
            saved += 1
    assert saved
