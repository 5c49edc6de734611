"""What is written: a zip that KoboldAI reads, whole or not at all, the same bytes for the same content."""

import hashlib
import json
import os
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from zips import bfloat16, kobold_accepts, rows_of

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.errors import MetadataTooLarge, NotFinite, TooLarge, TooManyRows, UnsupportedDtype
from kobold_sp_plugin.formats import load, read_header

DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kobold_reads_it(tmp_path, dtype):
    rows = rows_of(20, 16)
    path = tmp_path / "noir.zip"
    SoftPrompt(rows, {"name": "Noir", "author": "A"}).save(path, dtype)
    read, meta = kobold_accepts(path, width=16)
    assert np.array_equal(read, rows)
    assert list(meta) == ["name", "author", "supported", "description", "kobold_sp_plugin"]
    assert read_header(path).dtype == dtype
    assert np.array_equal(load(path).rows, rows)


def test_what_kobold_needs_is_always_there(tmp_path):
    path = tmp_path / "a.zip"
    SoftPrompt(rows_of(), {"author": "", "supported": "GPT-J", "mood": {"dark": [1]}}).save(path)
    _, meta = kobold_accepts(path, width=4)
    assert meta["name"] == ""
    assert meta["supported"] == ["GPT-J"]
    assert meta["description"] == ""
    assert "author" not in meta
    assert list(meta)[3:] == ["mood", "kobold_sp_plugin"]


def test_the_bytes_are_these(tmp_path):
    """Golden: whoever changes what is written changes this, on purpose."""
    path = tmp_path / "noir.zip"
    rows = np.array([[1.0, -2.0], [0.5, 3.0]], dtype=np.float32)
    SoftPrompt(rows, {"name": "Noir", "more": 1}).save(path, "bfloat16")
    with zipfile.ZipFile(path) as archive:
        tensor, meta = archive.read("tensor.npy"), archive.read("meta.json")
        assert [info.compress_type for info in archive.infolist()] == [zipfile.ZIP_STORED] * 2
        assert [info.date_time for info in archive.infolist()] == [(1980, 1, 1, 0, 0, 0)] * 2
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<V2', 'fortran_order': False, 'shape': (2, 2), }"
    assert tensor == header.ljust(127) + b"\n" + b"\x80\x3f\x00\xc0\x00\x3f\x40\x40"
    assert meta == (
        b'{\n  "name": "Noir",\n  "supported": [],\n  "description": "",\n  "more": 1,\n'
        b'  "kobold_sp_plugin": {\n    "scale": "matrix",\n    "order": "before_bos",\n'
        b'    "sha256": "' + hashlib.sha256(tensor).hexdigest().encode() + b'"\n  }\n}'
    )
    written = hashlib.sha256(path.read_bytes()).hexdigest()
    assert written == "b6f0f9a9a958c0e13219018f0d8508eecd81f83c09ce5e8ac0ba3ee4acf17f3e"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_content_gives_the_same_bytes(tmp_path, dtype):
    softprompt = SoftPrompt(rows_of(7, 5), {"name": "Noir", "z": 1, "a": 2})
    softprompt.save(tmp_path / "a.zip", dtype)
    softprompt.save(tmp_path / "b.zip", dtype)
    load(tmp_path / "a.zip").save(tmp_path / "c.zip", dtype)
    first = (tmp_path / "a.zip").read_bytes()
    assert first == (tmp_path / "b.zip").read_bytes() == (tmp_path / "c.zip").read_bytes()


def test_bfloat16_is_rounded_to_nearest_even(tmp_path):
    bits = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x00000001]], np.uint32)
    path = tmp_path / "a.zip"
    SoftPrompt(bits.view(np.float32)).save(path, "bfloat16")
    assert bfloat16(load(path).rows).tolist() == [[0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82, 0x0000]]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    metadata=st.dictionaries(st.text(max_size=12), JSON, max_size=4),
    name=st.text(max_size=30),
    scale=st.sampled_from(["matrix", "module"]),
    order=st.sampled_from(["before_bos", "after_bos"]),
)
def test_what_is_written_is_read_again(tmp_path, rows, metadata, name, scale, order):
    softprompt = SoftPrompt(rows, {**metadata, "name": name}, scale=scale, order=order)
    path = tmp_path / "a.zip"
    softprompt.save(path)
    read = load(path)
    assert np.array_equal(read.rows.view(np.uint32), softprompt.rows.view(np.uint32))
    assert (read.scale, read.order) == (softprompt.scale, softprompt.order)
    assert read.name == name
    for key in set(metadata) - {"name", "author", "supported", "description", "kobold_sp_plugin"}:
        assert read.metadata[key] == softprompt.metadata[key]
    read.save(path)
    assert load(path) == read
    header = read_header(path)
    assert header.metadata == read.metadata
    assert (header.scale, header.order) == (read.scale, read.order)


def test_the_name_of_the_file_is_no_part_of_it(tmp_path):
    for name in ("one.zip", "other.zip"):
        SoftPrompt(rows_of()).save(tmp_path / name)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "other.zip").read_bytes()


def test_compact_metadata_that_was_read_can_be_written(tmp_path):
    softprompt = SoftPrompt(rows_of(), {"ids": list(range(9000)), "supported": {"GPT-J": "6B"}})
    softprompt.save(tmp_path / "a.zip")
    assert load(tmp_path / "a.zip").metadata["ids"] == list(range(9000))
    assert load(tmp_path / "a.zip").metadata["supported"] == {"GPT-J": "6B"}


def test_a_replaced_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path):
    path, link = tmp_path / "a.zip", tmp_path / "link.zip"
    SoftPrompt(rows_of()).save(path)
    path.chmod(0o600)
    link.symlink_to(path)
    SoftPrompt(rows_of(), {"name": "New"}).save(link)
    assert link.is_symlink() and load(path).name == "New"
    assert path.stat().st_mode & 0o777 == 0o600


def test_our_own_part_keeps_what_it_does_not_know(tmp_path):
    path = tmp_path / "a.zip"
    own = {"fingerprint": {"version": 9}, "of tomorrow": 1, "scale": "matrix"}
    SoftPrompt(rows_of(), {"kobold_sp_plugin": own}, scale="module").save(path)
    read = load(path).metadata["kobold_sp_plugin"]
    assert read == {"fingerprint": {"version": 9}, "of tomorrow": 1, "scale": "module", "order": "before_bos"}


def test_text_that_utf8_cannot_hold_survives(tmp_path):
    path = tmp_path / "a.zip"
    SoftPrompt(rows_of(), {"name": "broken \ud800 é", "\udfff": 1}).save(path)
    assert load(path).name == "broken \ud800 é"
    assert load(path).metadata["\udfff"] == 1


@pytest.mark.parametrize(
    "rows, metadata, dtype, error",
    [
        (np.zeros((2048, 1), np.float32), {}, "float32", TooManyRows),
        (np.zeros((2047, 16400), np.float32), {}, "float32", TooLarge),
        (np.array([[1.0, 70000.0]], np.float32), {}, "float16", NotFinite),
        (np.array([[1.0, -3.4e38]], np.float32), {}, "bfloat16", NotFinite),
        (rows_of(), {}, "float64", UnsupportedDtype),
        (rows_of(), {"description": "x" * 70000}, "float32", MetadataTooLarge),
    ],
)
def test_what_no_reader_would_take_is_not_written(tmp_path, rows, metadata, dtype, error):
    path = tmp_path / "a.zip"
    SoftPrompt(rows_of(), {"name": "Old"}).save(path)
    before = path.read_bytes()
    with pytest.raises(error) as caught:
        SoftPrompt(rows, metadata).save(path, dtype)
    assert caught.value.path == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.zip"]


def test_2047_rows_are_written_and_accepted(tmp_path):
    SoftPrompt(np.zeros((2047, 2), np.float32)).save(tmp_path / "a.zip")
    assert kobold_accepts(tmp_path / "a.zip", width=2)[0].shape == (2047, 2)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    SoftPrompt(rows_of(), {"name": "Old"}).save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        SoftPrompt(rows_of(), {"name": "New"}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.zip"]


def test_a_folder_in_the_way_is_an_os_error_and_leaves_nothing(tmp_path):
    (tmp_path / "a.zip").mkdir()
    with pytest.raises(OSError):
        SoftPrompt(rows_of()).save(tmp_path / "a.zip")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_the_file_has_ordinary_permissions(tmp_path):
    SoftPrompt(rows_of()).save(tmp_path / "a.zip")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a.zip").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_metadata_is_utf8_for_people(tmp_path):
    SoftPrompt(rows_of(), {"name": "Élan 夜"}).save(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert "Élan 夜" in archive.read("meta.json").decode("utf-8")
        assert json.loads(archive.read("meta.json"))["name"] == "Élan 夜"
