"""The same for the formats beside KoboldAI's: pickles wherever one can hide, lies about sizes, bombs, links."""

import base64
import json
import os
import pickle
import pickletools
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzz import put
from zips import DEFLATED, make_zip, npy, rows_of

from kobold_sp_plugin import Catalogue, SoftPrompt, Verdict, errors
from kobold_sp_plugin.formats import load, read_header, save, torch_file

ROWS = rows_of(6, 8)
RAN = Path(__file__).with_name("it-ran")


class Exploit:
    def __reduce__(self):
        return (os.mkdir, (str(RAN),))


def exploit(protocol=2):
    return pickle.dumps(Exploit(), protocol)


HOSTILE = {
    "by name": exploit(2),
    "by two texts": exploit(4),
    "from a class": b"\x80\x02(iposix\nmkdir\n.",
    "of an object": b"\x80\x02(cposix\nmkdir\nX\x01\0\0\0xo.",
    "new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "by extension code": b"\x80\x02" + b"N" * 20 + b"\x82\x01.",
    "by a persistent name": b"\x80\x02Pstorage\n.",
    "of a persistent thing": b"\x80\x02X\x01\0\0\0xQ.",
    "builtins": b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.",
    "what torch once loaded": b"\x80\x02ctorch.jit\nload\nX\x01\0\0\0x\x85R.",
    "an attribute of torch": b"\x80\x02ctorch\nload\nX\x01\0\0\0x\x85R.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x15FloatStorage.__init__\x93.",
    "a call of what was made": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
    "a storage called": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a sparse tensor": b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.",
    "a quantised tensor": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.",
    "a wrapper of a subclass": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n)R.",
    "NumPy's own array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
    "protocol 0": pickle.dumps({"a": 1}, 0),
}


def members(rows=ROWS, key=None, dtype="float32", shape=(6, 8)):
    return torch_file.write_zip(rows, dtype, shape, key)


def saved(data_pkl=None, method=DEFLATED, **others):
    """A zip of torch's with another pickle, or other members."""
    parts = members()
    if data_pkl is not None:
        parts["archive/data.pkl"] = data_pkl
    parts.update({f"archive/{name}": data for name, data in others.items()})
    return make_zip(*parts.items(), method=method)


def edited(old, new, data=None):
    """The pickle of a tensor with one thing in it changed."""
    data = members()["archive/data.pkl"] if data is None else data
    assert data.count(old) == 1, data.count(old)
    return data.replace(old, new)


def number(value):
    return b"J" + struct.pack("<i", value)


def big(value):
    return b"\x8a\x08" + struct.pack("<q", value)


SHAPE = b"(" + number(6) + number(8) + b"t"
STRIDES = b"(" + number(8) + number(1) + b"t"
START = number(0) + SHAPE


def tensor(start=START, strides=STRIDES, count=48):
    """A zip of torch's whose tensor says this of itself."""
    data = edited(START + STRIDES, start + strides)
    return saved(edited(b"cpu" + number(48), b"cpu" + (number if count < 2**31 else big)(count), data))


def mkultra(pickled, **more):
    return json.dumps({"metadata": {}, "tensor": base64.b64encode(pickled).decode(), **more}).encode()


def whole():
    return torch_file.write_pickle(ROWS, "float32")


def in_the_storage(old, new):
    """mkultra's JSON with one thing changed in the inner file of torch's."""
    outer = whole()
    size_at = outer.index(b"_load_from_bytes\nB") + len(b"_load_from_bytes\nB")
    (size,) = struct.unpack_from("<I", outer, size_at)
    inner = outer[size_at + 4 : size_at + 4 + size]
    assert inner.count(old) == 1, inner.count(old)
    inner = inner.replace(old, new)
    return mkultra(outer[:size_at] + struct.pack("<I", len(inner)) + inner + outer[size_at + 4 + size :])


def with_base64(change):
    """mkultra's JSON whose base64 is changed."""
    text = base64.b64encode(whole()).decode()
    return b'{"tensor": "' + change(text).encode() + b'"}'


def dictionaries(items, calls):
    """A pickle that asks again and again for a dictionary of one long list."""
    pairs = b"".join(b"M" + struct.pack("<H", key) + b"N\x86" for key in range(items))
    call = b"h\x00h\x01R"
    return b"\x80\x02](" + pairs + b"e\x85q\x01ccollections\nOrderedDict\nq\x00(" + call * calls + b"t."


def upload(data, **more):
    text = {"name": "n", "data": base64.b64encode(data).decode(), **more}
    return json.dumps(text).encode()


VALUES = ROWS.tobytes()


def tensors(data=VALUES, length=None, text=None, **entries):
    """A safetensors file with this header."""
    entries = entries or {"rows": ["F32", [6, 8], [0, 192]]}
    header = {name: dict(zip(("dtype", "shape", "data_offsets"), entry)) for name, entry in entries.items()}
    text = json.dumps(header).encode() if text is None else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def adapter(weights=None, name="adapter_model.bin", **config):
    config = {"peft_type": "PROMPT_TUNING", **config}
    return {"adapter_config.json": json.dumps(config).encode(), name: weights or b""}


def npz(**arrays):
    arrays = {"tensor": npy(ROWS), "opt_state": b"", "step": npy(np.array(1, "u4")), **arrays}
    return make_zip(*((f"{name}.npy", data) for name, data in arrays.items()), method=DEFLATED)


def nested(code, depth):
    return b"\x80\x02" + b")" + code * depth + b"."


def laughs():
    """Thirty lists of ten times the one before: ten to the thirtieth when walked, thirty when not."""
    return (
        b"\x80\x02]" + b"".join(b"q" + bytes([n]) + b"](" + (b"h" + bytes([n])) * 10 + b"e" for n in range(30)) + b"."
    )


LISTED = {
    **{f"pickle in .pt: {name}": (saved(data), "UnsafePickle") for name, data in HOSTILE.items()},
    **{f"pickle in JSON: {name}": (mkultra(data), "UnsafePickle") for name, data in HOSTILE.items()},
    # pickles elsewhere
    "pickle in vLLM's base64": (base64.b64encode(saved(exploit())), "UnsafePickle"),
    "pickle in an old .pt": (torch_file.LEGACY_MAGIC + b"\x80\x02M\xe9\x03." + exploit(), "UnsafePickle"),
    "pickle for a version": (torch_file.LEGACY_MAGIC + exploit(), "UnsafePickle"),
    "pickle in the storage of JSON": (
        in_the_storage(b"\x80\x02]", b"\x80\x02ccprofile\nrun\n]"), "UnsafePickle",
    ),
    "pickle in PEFT's old weights": (adapter(saved(exploit())), "UnsafePickle"),
    "pickle in exelents' weights": ({"pytorch_weights.bin": saved(exploit())}, "UnsafePickle"),
    "pickle for a tensor in .mtjsp": (npz(tensor=npy(np.zeros(1, "u1"), "|O")), "ObjectDtype"),
    "pickle in Google's checkpoint": (
        {"numpy_checkpoints/checkpoint_1/prompt": npy(np.zeros((2, 2), "u1"), "|O")}, "ObjectDtype",
    ),
    "pickle alone": (exploit(), "NotASoftPromptFile"),
    "pickle of protocol 4 alone": (exploit(4), "NotASoftPromptFile"),
    # pickles that crash or exhaust
    "no pickle": (saved(b""), "CorruptMember"),
    "pickle cut off": (saved(members()["archive/data.pkl"][:-9]), "CorruptMember"),
    "nothing on the stack": (saved(b"\x80\x02R."), "CorruptMember"),
    "a mark for a value": (saved(b"\x80\x02(."), "CorruptMember"),
    "no mark": (saved(b"\x80\x02Nt."), "CorruptMember"),
    "memory that is not there": (saved(b"\x80\x02h\x07."), "CorruptMember"),
    "items of a number": (saved(b"\x80\x02K\x01(NNu."), "CorruptMember"),
    "bytes of 2**63": (saved(b"\x80\x04\x8e" + b"\xff" * 8 + b"."), "CorruptMember"),
    "a whole number of 2 GB": (saved(b"\x80\x02\x8b\xff\xff\xff\x7f."), "CorruptMember"),
    "a name without end": (saved(b"\x80\x02c" + b"a" * 5000), "CorruptMember"),
    "a text of 4 GB": (saved(b"\x80\x02X\xff\xff\xff\xff."), "TooLarge"),
    "a text of 100 kB": (saved(b"\x80\x02X\xa0\x86\x01\0" + b"a" * 100_000 + b"."), "TooLarge"),
    "a million instructions": (saved(b"\x80\x02" + b"N" * 1_000_000 + b"."), "TooLarge"),
    "a pickle of 2 MB": (saved(b"\x80\x02" + b"N" * 2_000_000 + b"."), "TooLarge"),
    "90,000 tuples in tuples": (saved(nested(b"\x85", 90_000)), "NoTensor"),
    "50,000 lists in lists": (saved(b"\x80\x02" + b"]" * 50_000 + b"a" * 40_000 + b"."), "NoTensor"),
    "tuples for a key": (saved(b"\x80\x02}" + nested(b"\x85", 90_000)[2:-1] + b"Ns."), "NoTensor"),
    "a billion laughs": (saved(laughs()), "NoTensor"),
    "a list that holds itself": (saved(b"\x80\x02]q\0h\0a."), "NoTensor"),
    # tensors that lie
    "a storage of more values than it has": (tensor(count=2**20), "TruncatedTensor"),
    "a storage of fewer values than it has": (tensor(count=47), "TruncatedTensor"),
    "a storage of 2**61 values": (tensor(count=2**61), "TruncatedTensor"),
    "a tensor past its storage": (tensor(start=number(1) + SHAPE), "TruncatedTensor"),
    "a stride of 2**61": (tensor(strides=b"(" + big(2**61) + number(1) + b"t"), "TruncatedTensor"),
    "two strides whose product overflows": (tensor(strides=b"(" + big(2**62) + big(2**62) + b"t"), "TruncatedTensor"),
    "a stride of -1": (tensor(strides=b"(" + number(-1) + number(1) + b"t"), "CorruptMember"),
    "an offset of -1": (tensor(start=number(-1) + SHAPE), "CorruptMember"),
    "an offset of 2**63 - 1": (tensor(start=big(2**63 - 1) + SHAPE), "CorruptMember"),
    "a shape of texts": (tensor(start=number(0) + b"(X\x01\0\0\x006" + number(8) + b"t"), "CorruptMember"),
    "a shape of truths": (tensor(start=number(0) + b"(\x88" + number(8) + b"t"), "CorruptMember"),
    "a shape of fractions": (tensor(start=number(0) + b"(G?\xf0\0\0\0\0\0\0" + number(8) + b"t"), "CorruptMember"),
    "a shape that is a number": (tensor(start=number(0) + number(8)), "BadTensorHeader"),
    "a shape of a thousand lengths": (tensor(start=number(0) + b"(" + number(1) * 1000 + b"t"), "BadTensorHeader"),
    "fewer strides than lengths": (tensor(strides=b"(" + number(1) + b"t"), "BadTensorHeader"),
    "2048 rows": (tensor(start=number(0) + b"(" + number(2048) + number(1) + b"t"), "TooManyRows"),
    "no rows": (tensor(start=number(0) + b"(" + number(0) + number(8) + b"t"), "NoRows"),
    "one dimension": (tensor(number(0) + b"(" + number(48) + b"t", b"(" + number(1) + b"t"), "WrongRank"),
    "a billion columns of one value": (
        tensor(number(0) + b"(" + number(1) + number(10**9) + b"t", b"(" + number(0) + number(0) + b"t"), "TooLarge",
    ),
    "whole numbers": (saved(edited(b"FloatStorage", b"LongStorage")), "UnsupportedDtype"),
    "a storage that is none": (saved(edited(b"FloatStorage", b"float32")), "UnsupportedDtype"),
    "a tensor of nothing": (saved(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\0)))tR."), "BadTensorHeader"),
    "too few arguments": (saved(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."), "CorruptMember"),
    "a storage of two sizes": (
        saved(b"\x80\x02](" + b"".join(
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(n) + b"tQ" for n in (4, 5)
        ) + b"e."), "CorruptMember",
    ),
    "a storage named out of the zip": (saved(edited(b"X\1\0\0\x000", b"X\x10\0\0\0../../etc/passwd")), "NoTensor"),
    "values under no name": (make_zip(*list(members().items())[:2]), "NoTensor"),
    "an unknown byte order": (saved(byteorder=b"middle"), "BadTensorHeader"),
    "a byte order of 100 kB": (saved(byteorder=b"little" * 20_000), "TooLarge"),
    "a view of 300 MB": (
        lambda: saved(edited(b"cpu" + number(48), b"cpu" + number(75_000_000)), **{"data/0": bytes(300_000_000)}),
        "TooLarge",
    ),
    "a view spread over 200 MB": (
        lambda: saved(
            edited(
                b"cpu" + number(48),
                b"cpu" + number(50_000_000),
                edited(STRIDES, b"(" + number(9_999_990) + number(1) + b"t"),
            ),
            **{"data/0": bytes(200_000_000)},
        ),
        "TooLarge",
    ),
    "two data.pkl": (make_zip(*members().items(), ("other/data.pkl", b"")), "NoTensor"),
    "a tensor that is no tensor in .mtjsp": (
        saved(b"\x80\x02}(X\x06\0\0\0tensorNX\x09\0\0\0opt_stateNX\x04\0\0\0stepK\x01u."), "WrongRank",
    ),
    # the older file of torch's
    "another byte order": (in_the_storage(b"little_endian\x88", b"little_endian\x89"), "BadTensorHeader"),
    "another version": (in_the_storage(b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe8\x03."), "BadTensorHeader"),
    "a storage twice": (in_the_storage(b"]X\1\0\0\x000a", b"](X\1\0\0\x000X\1\0\0\x000e"), "CorruptMember"),
    "storages of other names": (in_the_storage(b"]X\1\0\0\x000a", b"]X\1\0\0\x001a"), "CorruptMember"),
    "no storages": (in_the_storage(b"]X\1\0\0\x000a", b"]"), "NoTensor"),
    "another count": (in_the_storage(struct.pack("<q", 48), struct.pack("<q", -1)), "CorruptMember"),
    "a storage cut off": (in_the_storage(ROWS.tobytes(), ROWS.tobytes()[:-1]), "TruncatedTensor"),
    "a view of a storage": (in_the_storage(b"NtQ", b"(X\1\0\0\x000K\0K\1ttQ"), "UnsafePickle"),
    "nothing behind the magic": (torch_file.LEGACY_MAGIC, "CorruptMember"),
    "only the magic's first bytes": (torch_file.LEGACY_MAGIC[:-1], "NotASoftPromptFile"),
    # JSON
    "a tensor that is a number": (mkultra(b"\x80\x02" + number(1) * 20 + b"."), "CorruptMember"),
    "a tensor without its values": (mkultra(members()["archive/data.pkl"]), "CorruptMember"),
    "metadata that is a list": (mkultra(whole(), metadata=[1]), "MetadataNotJSON"),
    "metadata of 70 kB": (mkultra(whole(), metadata={"a": "x" * 70_000}), "MetadataTooLarge"),
    "200 kB beside the tensor": (mkultra(whole(), metadata={"a": "x" * 200_000}), "TooLarge"),
    "a million empty lists": (mkultra(whole())[:-1] + b',"x":[' + b"[]," * 1_000_000 + b"[]]}", "TooLarge"),
    "a tensor inside the metadata": (b'{"metadata": ' + mkultra(whole()) + b"}", "NotASoftPromptFile"),
    "lists in lists in lists": (
        mkultra(whole())[:-1] + b',"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "MetadataNotJSON",
    ),
    "forty levels": (mkultra(whole())[:-1] + b',"x":' + b"[" * 40 + b"]" * 40 + b"}", "MetadataNotJSON"),
    "a number of 100,000 digits": (mkultra(whole())[:-1] + b',"x":' + b"9" * 100_000 + b"}", "MetadataNotJSON"),
    "a fraction of 100,000 digits": (mkultra(whole())[:-1] + b',"x":0.' + b"9" * 100_000 + b"}", "MetadataNotJSON"),
    "JSON cut off": (mkultra(whole())[:-1], "MetadataNotJSON"),
    "JSON behind a list": (b"{[" + mkultra(whole())[1:], "MetadataNotJSON"),
    "JSON that is not UTF-8": (mkultra(whole())[:-1] + b',"x":"\xff"}', "MetadataNotUTF8"),
    "JSON of a story": (b'{"actions": ["You enter."], "memory": ""}', "NotASoftPromptFile"),
    "base64 of the wrong length": (with_base64(lambda text: text[:-1]), "CorruptMember"),
    "base64 with its end in the middle": (with_base64(lambda text: text[:6] + "==" + text[8:]), "CorruptMember"),
    "base64 with an escape that is none": (with_base64(lambda text: text.replace("A", "\\u0041", 1)), "CorruptMember"),
    # uploads
    "an upload that is not packed": (upload(ROWS.tobytes()), "CorruptMember"),
    "an upload cut off": (upload(zlib.compress(bytes(3200))[:-6]), "CorruptMember"),
    "an upload of 19 rows": (upload(zlib.compress(bytes(38))), "WrongRank"),
    "an upload of half a number": (upload(zlib.compress(bytes(41))), "WrongRank"),
    "an upload of nothing": (upload(zlib.compress(b"") * 4), "NoRows"),
    "an upload that unpacks to 300 MB": (lambda: upload(zlib.compress(bytes(300_000_000), 9)), "TooLarge"),
    # vLLM
    "base64 that ends": (base64.b64encode(saved())[:-3], "CorruptMember"),
    "base64 of half a zip": (base64.b64encode(saved()[:600]), "NotASoftPromptFile"),
    "base64 with a word in it": (base64.b64encode(saved())[:-8] + b"!!!!!!!!", "CorruptMember"),
    # safetensors
    "a header of 2**63 bytes": (tensors(length=2**63), "NotASoftPromptFile"),
    "a header of 2 MB": (tensors(text=b'{"rows":' + b" " * 2_000_000), "TooLarge"),
    "a header longer than the file": (tensors(length=100_000), "TruncatedTensor"),
    "a header that is no JSON": (tensors(text=b'{"rows":'), "MetadataNotJSON"),
    "a header of braces": (tensors(text=b'{"a":' * 20_000), "MetadataNotJSON"),
    "a header of texts": (tensors(rows=["F32", "[6, 8]", [0, 192]]), "BadTensorHeader"),
    "a header without offsets": (tensors(rows=["F32", [6, 8]]), "BadTensorHeader"),
    "a length of -1": (tensors(rows=["F32", [-6, 8], [0, 192]]), "BadTensorHeader"),
    "a length of 1.5": (tensors(rows=["F32", [6.0, 8], [0, 192]]), "BadTensorHeader"),
    "a length of true": (tensors(rows=["F32", [True, 8], [0, 192]]), "BadTensorHeader"),
    "a length of 2**63": (tensors(rows=["F32", [2**63, 8], [0, 192]]), "BadTensorHeader"),
    "a length of 2**61": (tensors(rows=["F32", [1, 2**61], [0, 192]]), "TooLarge"),
    "offsets in reverse": (tensors(rows=["F32", [6, 8], [192, 0]]), "BadTensorHeader"),
    "offsets past the end": (tensors(rows=["F32", [6, 8], [0, 200]]), "TruncatedTensor"),
    "offsets of another size": (tensors(rows=["F16", [6, 8], [0, 192]]), "BadTensorHeader"),
    "a gap": (tensors(rows=["F32", [5, 8], [32, 192]]), "BadTensorHeader"),
    "two tensors in one place": (
        tensors(a=["F32", [6, 8], [0, 192]], b=["F32", [6, 8], [0, 192]]), "BadTensorHeader",
    ),
    "bytes behind the last tensor": (tensors(data=ROWS.tobytes() + b"PK"), "TrailingBytes"),
    "no tensors": (tensors(text=b"{}", data=b""), "NoTensor"),
    "whole numbers in safetensors": (tensors(rows=["I32", [6, 8], [0, 192]]), "UnsupportedDtype"),
    "metadata of 70 kB in safetensors": (
        tensors(text=json.dumps({
            "__metadata__": {"x": "y" * 70_000}, "rows": {"dtype": "F32", "shape": [6, 8], "data_offsets": [0, 192]},
        }).encode()), "MetadataTooLarge",
    ),
    # folders
    "an adapter's configuration of 70 kB": (adapter(saved(), x="y" * 70_000), "MetadataTooLarge"),
    "an adapter's configuration that is a list": (
        {"adapter_config.json": b"[]", "adapter_model.bin": saved()}, "UnsupportedMethod",
    ),
    "an adapter without weights": ({"adapter_config.json": b'{"peft_type": "P_TUNING"}'}, "NoTensor"),
    "an adapter of p-tuning's encoder": (
        adapter(tensors(**{"mlp_head.0.weight": ["F32", [6, 8], [0, 192]]}), "adapter_model.safetensors"), "NoTensor",
    ),
    "exelents' weights without the tensor": ({"pytorch_weights.bin": saved()}, "NoTensor"),
    "a checkpoint of nothing": ({"numpy_checkpoints/checkpoint_1/readme": b"hello"}, "NoTensor"),
    "a folder in place of the weights": (
        {"adapter_config.json": b'{"peft_type": "P_TUNING"}', "adapter_model.bin/x": b""}, "NotASoftPromptFile",
    ),
    "NovelAI": (None, "UnsupportedMethod"),
    "many dictionaries of one list": (saved(dictionaries(11_000, 10)), "TooLarge"),
    "columns side by side that take as much memory again": (
        tensor(number(0) + b"(" + number(2047) + number(8200) + b"t", b"(" + number(1) + number(2047) + b"t",
               2047 * 8200),
        "TooLarge",
    ),
}  # fmt: skip

LOADED = {
    "not a number in torch's file": (saved(**{"data/0": np.full(48, np.nan, "f4").tobytes()}), "NotFinite"),
    "infinity in safetensors": (tensors(data=np.full(48, np.inf, "f4").tobytes()), "NotFinite"),
    "half an infinity in an upload": (upload(zlib.compress(np.full(80, np.inf, "f2").tobytes())), "NotFinite"),
}


@pytest.mark.parametrize("attack", [*LISTED, *LOADED])
def test_attack(tmp_path, attack):
    content, error = {**LISTED, **LOADED}[attack]
    content = content() if callable(content) else content
    path = tmp_path / ("attack.module" if content is None else "attack")
    put(str(path), content or b"x")
    tracemalloc.start(1)
    try:
        if attack in LISTED:
            with pytest.raises(errors.FormatError) as listed:
                read_header(path)
            assert type(listed.value).__name__ == error, listed.value
        else:
            read_header(path)
        with pytest.raises(errors.FormatError) as loaded:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(loaded.value).__name__ == error, loaded.value
    assert loaded.value.path == str(path)
    assert len(str(loaded.value)) < len(str(path)) + 600
    assert str(loaded.value).isprintable()
    assert peak < 150e6
    assert not RAN.exists()
    assert os.listdir(tmp_path) == [path.name]


def test_the_hostile_pickles_are_pickles():
    """The reader refuses them for what they ask, not for being no pickles: Python's own tools read them."""
    for data in HOSTILE.values():
        assert list(pickletools.genops(data))[-1][0].name == "STOP"


def test_the_optimizers_state_is_never_read(tmp_path):
    """mtj-softtuner's checkpoint has a pickle beside the tensor; whatever it is, it stays closed."""
    with open(tmp_path / "a.mtjsp", "wb") as file:
        np.savez_compressed(file, tensor=ROWS, opt_state=np.array([Exploit()], dtype=object), step=np.uint32(1))
    assert np.array_equal(load(tmp_path / "a.mtjsp").rows, ROWS)
    (tmp_path / "b.mtjsp").write_bytes(npz(opt_state=b"no array at all", step=npy(np.zeros(1, "u1"), "|O"), loss=b"x"))
    assert dict(load(tmp_path / "b.mtjsp").metadata) == {}
    assert not RAN.exists()


def test_a_link_out_of_a_folder_is_not_followed(tmp_path):
    save(SoftPrompt(ROWS, scale="module"), tmp_path / "secret.safetensors", format="safetensors")
    np.save(tmp_path / "secret.npy", ROWS)
    folders = {
        "peft": ("adapter_model.safetensors", tmp_path / "secret.safetensors"),
        "folder": ("tensor.npy", tmp_path / "secret.npy"),
        "meta": ("meta.json", tmp_path / "peft" / "adapter_config.json"),
        "google": ("numpy_checkpoints/checkpoint_1/prompt", tmp_path / "secret.npy"),
    }
    for name, (file, target) in folders.items():
        link = tmp_path / name / file
        link.parent.mkdir(parents=True)
        link.symlink_to(target)
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "P_TUNING"}')
    (tmp_path / "meta" / "tensor.npy").write_bytes(npy(ROWS))
    checkpoints = tmp_path / "around" / "numpy_checkpoints"
    checkpoints.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    np.save(tmp_path / "outside" / "prompt", ROWS)
    (checkpoints / "checkpoint_1").symlink_to(tmp_path / "outside")
    for name in (*folders, "around"):
        with pytest.raises(errors.UnsafeName, match="a link out of its folder"):
            load(tmp_path / name)
    entries = Catalogue(tmp_path).entries()
    assert {entry.filename for entry in entries if entry.verdict is Verdict.UNREADABLE} >= {*folders, "around"}


def test_no_attack_hurts_another_entry(tmp_path):
    for index, (content, _) in enumerate(LISTED.values()):
        if callable(content):
            continue
        put(str(tmp_path / f"attack{index:03}.pt"), content or b"x")
    SoftPrompt(ROWS, {"name": "Good"}).save(tmp_path / "good.zip")
    catalogue = Catalogue(tmp_path)
    assert catalogue.entry("good.zip").name == "Good"
    listed = {entry.filename: entry for entry in catalogue.entries()}
    assert {entry.verdict for entry in listed.values() if entry.name != "Good"} == {Verdict.UNREADABLE}
    assert json.dumps([entry.reason for entry in listed.values()])
    assert not RAN.exists()


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    for start in (b'{"tensor": "', base64.b64encode(b"PK\x03\x04\0\0")):
        with open(tmp_path / "a", "wb") as file:
            file.write(start)
            file.truncate(2**26 + 1)
        tracemalloc.start(1)
        try:
            with pytest.raises(errors.TooLarge):
                read_header(tmp_path / "a")
            assert tracemalloc.get_traced_memory()[1] < 1e6
        finally:
            tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["mkultra", "vllm"])
def test_the_largest_files_of_text_stay_in_bounds(tmp_path, format):
    rows = np.zeros((2000, 11_000), np.float32)
    save(SoftPrompt(rows, scale="matrix" if format == "mkultra" else "module"), tmp_path / "a", "float16", format)
    assert 55e6 < os.path.getsize(tmp_path / "a") < 2**26
    tracemalloc.start(1)
    try:
        assert load(tmp_path / "a").rows.shape == rows.shape
        assert tracemalloc.get_traced_memory()[1] < 256e6
    finally:
        tracemalloc.stop()
