"""What is read: all that the hosts read, and what they wrongly refuse."""

import json
import tracemalloc

import numpy as np
import pytest
from zips import DEFLATED, LZMA, STORED, bfloat16, forged_zip, kobold_zip, make_zip, npy, npy_header, rows_of

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.formats import load, read_header
from kobold_sp_plugin.softprompt import Order, Scale

ROWS = rows_of(5, 8)


def tensors():
    """Name → an ``.npy`` that holds ROWS, and the dtype it is in."""
    half, double = ROWS.astype("f2"), ROWS.astype("f8")
    return {
        "f4": (npy(ROWS), "float32"),
        "f2": (npy(half), "float16"),
        "f8": (npy(double), "float64"),
        "big-endian f2": (npy(half.astype(">f2")), "float16"),
        "big-endian f4": (npy(ROWS.astype(">f4")), "float32"),
        "big-endian f8": (npy(double.astype(">f8")), "float64"),
        "<V2": (npy(bfloat16(ROWS), "<V2"), "bfloat16"),
        "|V2": (npy(bfloat16(ROWS), "|V2"), "bfloat16"),
        "Fortran f4": (npy(ROWS, fortran=True), "float32"),
        "Fortran V2": (npy(bfloat16(ROWS), "|V2", fortran=True), "bfloat16"),
        "[1, n, d]": (npy(ROWS[None]), "float32"),
        "[1, n, d] Fortran": (npy(ROWS[None], fortran=True), "float32"),
        "format 2": (npy(ROWS, version=2), "float32"),
        "format 3": (npy(ROWS, version=3), "float32"),
        "Python 2's": (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (5L, 8L), }") + ROWS.tobytes(),
            "float32",
        ),
        "another writer's": (
            npy_header('{"shape":(5,8),"descr":"<f4","fortran_order":False}') + ROWS.tobytes(),
            "float32",
        ),
    }


@pytest.mark.parametrize("method", [STORED, DEFLATED, LZMA])
@pytest.mark.parametrize("kind", tensors())
def test_every_tensor_in_every_compression(tmp_path, kind, method):
    tensor, dtype = tensors()[kind]
    path = tmp_path / "noir.zip"
    path.write_bytes(make_zip(("tensor.npy", tensor, method), ("meta.json", b'{"name": "Noir"}', STORED)))
    header, softprompt = read_header(path), load(path)
    assert (header.n_tokens, header.width, header.dtype, header.name) == (5, 8, dtype, "Noir")
    assert np.array_equal(softprompt.rows, ROWS)
    assert softprompt.rows.dtype == np.float32
    assert softprompt.rows.flags.c_contiguous
    assert softprompt.metadata == header.metadata


def test_a_bare_tensor(tmp_path):
    path = tmp_path / "noir.npy"
    np.save(path, ROWS)
    assert np.array_equal(load(path).rows, ROWS)
    assert (read_header(path).n_tokens, dict(read_header(path).metadata)) == (5, {})


def test_a_folder(tmp_path):
    folder = tmp_path / "noir"
    folder.mkdir()
    (folder / "tensor.npy").write_bytes(npy(ROWS))
    assert dict(load(folder).metadata) == {}
    (folder / "meta.json").write_text('{"name": "Noir"}', encoding="utf-8")
    assert np.array_equal(load(folder).rows, ROWS)
    assert load(folder).name == read_header(folder).name == "Noir"


def test_content_counts_not_the_extension(tmp_path):
    path = tmp_path / "noir.txt"
    path.write_bytes(kobold_zip(ROWS))
    assert load(path).name == "Test"
    path.write_bytes(npy(ROWS))
    assert np.array_equal(load(path).rows, ROWS)


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_a_folder_inside_the_zip(tmp_path, separator):
    path = tmp_path / "noir.zip"
    members = [
        {"name": f"noir{separator}".encode(), "data": b""},
        {"name": f"noir{separator}tensor.npy".encode(), "data": npy(ROWS)},
        {"name": f"noir{separator}meta.json".encode(), "data": b'{"name": "Noir"}'},
        {"name": b"__MACOSX/noir/._tensor.npy", "data": b"x"},
        {"name": b"__MACOSX/tensor.npy", "data": b"x"},
    ]
    path.write_bytes(forged_zip(*members))
    assert load(path).name == read_header(path).name == "Noir"


def test_further_members_and_any_order(tmp_path):
    path = tmp_path / "noir.zip"
    path.write_bytes(make_zip(("readme.txt", b"hi"), ("meta.json", b'{"name": "Noir"}'), ("tensor.npy", npy(ROWS))))
    assert load(path).name == "Noir"


def test_sizes_left_to_a_descriptor(tmp_path):
    """A streaming writer leaves the local header's sizes empty."""
    path = tmp_path / "noir.zip"
    tensor = npy(ROWS)
    local = {"crc": 0, "packed": 0, "unpacked": 0}
    path.write_bytes(forged_zip({"name": b"tensor.npy", "data": tensor, "flags": 8, "local": local}))
    assert np.array_equal(load(path).rows, ROWS)


@pytest.mark.parametrize(
    "meta, name, author, supported, description",
    [
        (None, "", "", [], ""),
        ({}, "", "", [], ""),
        ([1, 2], "", "", [], ""),
        ("text", "", "", [], ""),
        (None.__class__, "", "", [], ""),
        ({"name": "Noir"}, "Noir", "", [], ""),
        ({"name": 7, "author": ["A", "B"], "supported": "GPT-J"}, "7", "A, B", ["GPT-J"], ""),
        ({"name": None, "author": {}, "supported": [1, None, "x"], "description": []}, "", "", ["1", "x"], ""),
    ],
)
def test_metadata_of_any_shape(tmp_path, meta, name, author, supported, description):
    path = tmp_path / "noir.zip"
    members = [("tensor.npy", npy(ROWS))]
    if meta is not None:
        members.append(("meta.json", b"null" if meta is type(None) else json.dumps(meta).encode()))
    path.write_bytes(make_zip(*members))
    for read in (load(path), read_header(path)):
        assert (read.name, read.author, read.supported, read.description) == (
            name, author, supported, description,
        )  # fmt: skip


def test_metadata_with_a_byte_order_mark_and_with_what_python_alone_writes(tmp_path):
    path = tmp_path / "noir.zip"
    text = '\ufeff{"name": "Noir é", "loss": NaN, "best": -Infinity, "huge": 1e999, "step": 12}'
    path.write_bytes(make_zip(("tensor.npy", npy(ROWS)), ("meta.json", text.encode())))
    assert dict(load(path).metadata) == {"name": "Noir é", "loss": None, "best": None, "huge": None, "step": 12}
    assert load(path).metadata == read_header(path).metadata


def test_scale_and_order_are_what_the_file_declares(tmp_path):
    path = tmp_path / "noir.zip"
    path.write_bytes(kobold_zip(ROWS))
    assert (load(path).scale, read_header(path).scale) == (Scale.MATRIX, Scale.MATRIX)
    assert (load(path).order, read_header(path).order) == (Order.BEFORE_BOS, Order.BEFORE_BOS)
    path.write_bytes(kobold_zip(ROWS, kobold_sp_plugin={"scale": "module", "order": "after_bos"}))
    assert (load(path).scale, read_header(path).scale) == (Scale.MODULE, Scale.MODULE)
    assert (load(path).order, read_header(path).order) == (Order.AFTER_BOS, Order.AFTER_BOS)
    path.write_bytes(kobold_zip(ROWS, kobold_sp_plugin={"scale": 3, "order": ["x"]}))
    assert (load(path).scale, load(path).order) == (Scale.MATRIX, Order.BEFORE_BOS)


def test_headers_tell_other_rows_apart(tmp_path):
    first, second = tmp_path / "a.zip", tmp_path / "b.zip"
    SoftPrompt(ROWS).save(first)
    SoftPrompt(ROWS + 1).save(second)
    assert read_header(first) != read_header(second)
    SoftPrompt(ROWS).save(second)
    first_header, second_header = read_header(first), read_header(second)
    assert first_header.checksum == second_header.checksum


def test_a_header_is_read_without_the_rows(tmp_path):
    """Rows that do not unpack are no obstacle: only loading reads them."""
    rows = rows_of(200, 64)
    path = tmp_path / "noir.zip"
    packed = kobold_zip(rows, method=DEFLATED)
    middle = len(packed) // 2
    path.write_bytes(packed[:middle] + bytes(20) + packed[middle + 20 :])
    assert read_header(path).n_tokens == 200


@pytest.mark.parametrize("fortran", [False, True])
def test_loading_takes_little_more_than_the_rows(tmp_path, fortran):
    """4 bytes a value, and a piece: the rows are read once, into the array that the soft prompt keeps."""
    rows = np.zeros((2000, 1024), dtype=np.float64)
    path = tmp_path / "big.zip"
    path.write_bytes(make_zip(("tensor.npy", npy(rows, fortran=fortran)), method=DEFLATED))
    tracemalloc.start()
    try:
        load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * rows.size + 2e6


def test_the_largest_soft_prompt_that_is_allowed(tmp_path):
    path = tmp_path / "big.npy"
    np.save(path, np.zeros((2047, 16384), dtype=np.float16))
    assert load(path).rows.shape == (2047, 16384)


def test_a_missing_file_is_an_os_error(tmp_path):
    for read in (load, read_header):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.zip")


def test_errors_name_the_file(tmp_path):
    from kobold_sp_plugin.errors import NotASoftPromptFile

    path = tmp_path / "noir.zip"
    path.write_bytes(b"hello there")
    with pytest.raises(NotASoftPromptFile) as caught:
        SoftPrompt.load(path)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: a file of another kind; expected a soft prompt")


@pytest.mark.parametrize("checksum", [None, 12, ["x"]])
def test_a_checksum_that_is_no_text_is_none(tmp_path, checksum):
    path = tmp_path / "a.zip"
    path.write_bytes(kobold_zip(ROWS, kobold_sp_plugin={"sha256": checksum}))
    assert load(path).n_tokens == len(ROWS)
