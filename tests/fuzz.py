"""Damaged soft prompt files of every format, by the thousand: ``python tests/fuzz.py --count 100000 --seed 1``.

Whatever the damage, a reader answers with a soft prompt or one of our errors, within a second and 256 MB. The
damage knows the formats: what stands in a zip, in base64, in JSON, in a pickle is damaged inside, and what
encloses it (lengths, checksums, encodings) is made right again, so that the damage arrives at its reader.
What breaks the rule is kept in ``--keep`` and makes the exit status 1. Deterministic by seed.
"""

import argparse
import base64
import collections
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from zips import DEFLATED, LZMA, STORED, bfloat16, make_zip, npy, rows_of

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.errors import FormatError
from kobold_sp_plugin.formats import FORMATS, load, read_header, save

ROWS = rows_of(6, 8)
TWENTY = rows_of(20, 4)
BYTES = [0, 1, 2, 0x20, 0x27, 0x28, 0x2C, 0x30, 0x39, 0x50, 0x7F, 0x80, 0xFE, 0xFF]
PICKLE = [
    bytes([code])
    for code in b"\x80\x95(N\x88\x89KMJ\x8a\x8bG\x8cX\x8dUTCB\x8e]})\x85\x86\x87tlaesuqr\x94hjc\x93QRb.0oi"
]
JSON_VALUES = [None, True, -1, 0, 1, 20, 2**31, 2**63, 10**30, 1.5, "", "x", "F64", [], [[]], {}, {"a": 1}, [6, 8]]
META = {"name": "Noir", "supported": ["a"], "description": "d", "epoch": 1, "kobold_sp_plugin": {"order": "after_bos"}}


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


def damaged_pickle(data, rng):
    """A pickle with its instructions or the numbers behind them changed."""
    if rng.random() < 0.3:
        return damaged(data, rng)
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        kind = rng.random()
        if kind < 0.35:
            at = data.find(b"J", place)
            if at >= 0:
                data[at + 1 : at + 5] = struct.pack("<i", rng.choice([-1, 0, 1, 2, 6, 7, 8, 47, 48, 49, 2**31 - 1]))
        elif kind < 0.5:
            at = data.find(b"torch", place)
            if at >= 0:
                data[at + 6 : at + 11] = rng.choice([b"Long", b"Half", b"Int", b"Double", b"BFloat16", b"", b"_util"])
        elif kind < 0.75:
            data[place:place] = b"".join(rng.choice(PICKLE) for _ in range(rng.randint(1, 4)))
        else:
            data[place : place + rng.randint(0, 3)] = rng.choice(PICKLE)
    return bytes(data)


def damaged_json(text, rng):
    """JSON with one of its values, at any depth, replaced; or its text damaged."""
    if rng.random() < 0.3:
        return damaged(text, rng)
    value = json.loads(text)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        kind = rng.random()
        if kind < 0.15:
            del place[key]
        elif kind < 0.3 and isinstance(place, dict):
            place[rng.choice(["x", "tensor", "data", "dtype", "peft_type", "__metadata__"])] = place[key]
        elif kind < 0.4:
            return json.dumps(value).replace("1", rng.choice(["[" * 50, "9" * 500, "1e999", "NaN"]), 1).encode()
        else:
            place[key] = rng.choice(JSON_VALUES)
        break
    return json.dumps(value).encode()


def once(rng, parts, rezip=True):
    """One of the ``parts`` (name → bytes) damaged; as a zip with right checksums, or as a folder."""
    parts = dict(parts)
    name = rng.choice([name for name in parts for _ in range(3 if name.endswith((".pkl", ".npy", ".bin")) else 1)])
    kind = rng.random()
    if kind < 0.08:
        del parts[name]
    elif kind < 0.12:
        parts[rng.choice(["x", "../x", "archive/data/1", name + "x"])] = parts.pop(name)
    elif name.endswith(".json"):
        parts[name] = damaged_json(parts[name], rng)
    else:
        parts[name] = (damaged_pickle if name.endswith(".pkl") else damaged)(parts[name], rng)
    if not rezip:
        return parts
    data = make_zip(*parts.items(), method=rng.choice([STORED, STORED, DEFLATED]))
    return repaired(damaged(data, rng)) if rng.random() < 0.1 else data


def torch_zip(key=None, dtype="float32", shape=(6, 8)):
    from kobold_sp_plugin.formats import torch_file

    return torch_file.write_zip(ROWS, dtype, shape, key)


def legacy():
    from kobold_sp_plugin.formats import torch_file

    whole = torch_file.write_pickle(ROWS, "float16")
    start = whole.index(torch_file.LEGACY_MAGIC)
    return whole, whole[start : whole.index(b"\x85RJ")]


def legacy_tensor():
    """A whole file of ``torch.save`` before 1.6, made of the pickle of a tensor."""
    outer, inner = legacy()
    marker = b"\x80\x02(X"
    at = inner.index(marker)
    end = inner.index(b".\x80\x02]", at)
    tail = outer[outer.index(b"\x85RJ") + 2 :]
    return inner[: at + 2] + b"ctorch._utils\n_rebuild_tensor_v2\n(" + inner[at + 2 : end] + tail[:-1] + inner[end:]


def kobold_zip(rng):
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


def npz(rng):
    scalar = npy(np.array(rng.choice([3, 0, 2**31]), dtype="u4"))
    loss = npy(np.array(rng.choice([0.5, np.nan]), dtype="f4"))
    parts = {
        "tensor.npy": npy(ROWS),
        "opt_state.npy": npy(np.zeros(3, "u1"), "|O"),
        "step.npy": scalar,
        "loss.npy": loss,
    }
    return once(rng, parts)


def mkusp(rng):
    parts = torch_zip("tensor", rng.choice(["float32", "float16"]))
    more = b"(X\x09\0\0\0opt_state}X\x04\0\0\0lossG?\xe0\0\0\0\0\0\0X\x04\0\0\0stepK\x03u."
    parts["archive/data.pkl"] = parts["archive/data.pkl"][:-1] + more
    return once(rng, parts)


def torch_saved(rng):
    if rng.random() < 0.3:
        return damaged_pickle(legacy_tensor(), rng)
    return once(rng, torch_zip(rng.choice([None, "prompt_embeddings"]), rng.choice(["float32", "bfloat16"])))


def mkultra(rng):
    pickled = legacy()[0]
    if rng.random() < 0.6:
        pickled = damaged_pickle(pickled, rng)
    text = json.dumps({"metadata": META, "tensor": base64.b64encode(pickled).decode()}).encode()
    return damaged_json(text, rng) if rng.random() < 0.5 else text


def upload(rng):
    data = zlib.compress(TWENTY.astype("f2").tobytes()[: rng.choice([160, 160, 158, 0, 40])], rng.randint(0, 9))
    if rng.random() < 0.5:
        data = damaged(data, rng)
    text = json.dumps({**META, "model": "m", "steps": 3, "data": base64.b64encode(data).decode()}).encode()
    return damaged_json(text, rng) if rng.random() < 0.5 else text


def vllm(rng):
    data = base64.b64encode(torch_saved(rng))
    return damaged(data, rng) if rng.random() < 0.4 else data


def tensors(rng):
    parts = {"prompt_embeddings": {"dtype": "F32", "shape": [6, 8], "data_offsets": [0, 192]}}
    if rng.random() < 0.5:
        parts["bias"] = {"dtype": "F16", "shape": [4], "data_offsets": [192, 200]}
    parts["__metadata__"] = {"format": "pt", "meta.json": json.dumps(META)}
    header = json.dumps(parts).encode()
    if rng.random() < 0.8:
        header = damaged_json(header, rng)
    data = struct.pack("<Q", len(header)) + header + ROWS.tobytes() + (bytes(8) if "bias" in parts else b"")
    return damaged(data, rng) if rng.random() < 0.3 else data


def peft(rng):
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "m", "num_transformer_submodules": 1}
    parts = {"adapter_config.json": json.dumps(config).encode()}
    if rng.random() < 0.5:
        parts["adapter_model.safetensors"] = tensors(rng)
    else:
        parts["adapter_model.bin"] = make_zip(*torch_zip("prompt_embeddings").items())
    return once(rng, parts, rezip=False)


def exelents(rng):
    weights = make_zip(*torch_zip("s_wte.learned_embedding", shape=rng.choice([(1, 6, 8), (2, 3, 8), (6, 8)])).items())
    config = json.dumps({"model_type": "gptj", "_name_or_path": "m", "soft_emb_n_prompts": 1}).encode()
    return once(rng, {"pytorch_weights.bin": weights, "config.json": config}, rezip=False)


def google(rng):
    names = ["target.encoder.prompt.prompt.prompt", "target.decoder.bias"]
    step = rng.choice(["checkpoint_5", "checkpoint_40", "checkpoint_x", "checkpoint_5.tmp-1"])
    parts = {f"numpy_checkpoints/{step}/{name}": npy(ROWS) for name in names[: rng.randint(1, 2)]}
    parts["numpy_checkpoints/checkpoint_1/prompt"] = npy(ROWS)
    return once(rng, parts, rezip=False)


def folder(rng):
    return once(rng, {"tensor.npy": npy(ROWS), "meta.json": json.dumps(META).encode()}, rezip=False)


def plain(rng):
    return damaged(rng.choice([npy(ROWS), b"{}", json.dumps(META).encode(), b"hello there", b""]), rng)


KINDS = (
    kobold_zip, npz, mkusp, torch_saved, mkultra, upload, vllm, tensors, peft, exelents, google, folder, plain,
)  # fmt: skip


def case(rng):
    """One damaged file, as bytes, or one damaged folder, as a dictionary of bytes."""
    return rng.choice(KINDS)(rng)


def put(path, content):
    """Write ``content`` to ``path``, in place of what is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    if isinstance(content, bytes):
        with open(path, "wb") as file:
            file.write(content)
        return
    if os.path.exists(path):
        os.unlink(path)
    os.mkdir(path)
    for name, data in content.items():
        if ".." not in name:
            inner = os.path.join(path, name)
            os.makedirs(os.path.dirname(inner), exist_ok=True)
            with open(inner, "wb") as file:
                file.write(data)


def check(path, content):
    """Read ``content`` both ways: the name of its format, or of the error. Fails for any exception but ours."""
    put(path, content)
    header = None
    try:
        header = read_header(path)
        repr(header), header.name, header.author, header.supported, header.description
    except FormatError as error:
        assert len(str(error)) < 2000
    try:
        softprompt = load(path)
    except FormatError as error:
        assert len(str(error)) < 2000
        return type(error).__name__
    assert header is not None, "loaded, but not listed"
    assert softprompt.rows.shape == (header.n_tokens, header.width)
    assert np.isfinite(softprompt.rows).all()
    assert softprompt.metadata == header.metadata
    return header.format


def bound_memory(megabytes):
    """Change this process so that it cannot take more than ``megabytes`` beyond what it has."""
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20,) * 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"))
    options = parser.parse_args()
    counts, slowest, failures = collections.Counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        path = os.path.join(name, "damaged")
        save(SoftPrompt(ROWS), path)
        load(path)  # what is imported late is imported now
        if sys.platform.startswith("linux"):
            bound_memory(256)
        start = time.monotonic()
        for number in range(options.count):
            content = case(random.Random(f"{options.seed} {number}"))
            began = time.process_time()
            try:
                counts[check(path, content)] += 1
                took = time.process_time() - began
                slowest = max(slowest, took)
                assert took < 1, f"{took:.2f} seconds"
                assert os.listdir(name) == ["damaged"], "a file beside the one that was read"
            except Exception as error:
                failures += 1
                print(f"{number}: {type(error).__name__}: {error}", flush=True)
                options.keep.mkdir(parents=True, exist_ok=True)
                if failures <= 100:
                    put(str(options.keep / f"{options.seed}-{number}"), content)
            if (number + 1) % 50_000 == 0:
                rate = (number + 1) / (time.monotonic() - start)
                print(
                    f"{number + 1} files, {rate:.0f} a second, slowest {slowest:.3f} s, {failures} failures", flush=True
                )
    print(f"{options.count} files, slowest {slowest:.3f} s, {failures} failures")
    read = {each.name for each in FORMATS}
    for what, count in sorted(counts.items(), key=lambda item: (item[0] not in read, -item[1])):
        print(f"{count:9d}  {'read as ' if what in read else ''}{what}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
