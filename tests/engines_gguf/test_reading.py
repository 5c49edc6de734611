"""GGUF files are read without the library that loads them: what is right, and what strangers may have made."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kobold_sp_plugin.compatibility import facts
from kobold_sp_plugin.compatibility.model_facts import matrix_in_folder
from kobold_sp_plugin.errors import (
    CorruptModelFile,
    ModelError,
    NotAModelFile,
    TruncatedModelFile,
    UnsupportedModelFile,
)
from kobold_sp_plugin.gguf import writing
from kobold_sp_plugin.gguf.families import scale_of_rows
from kobold_sp_plugin.gguf.reading import F32, Field, is_gguf, read

ROWS = np.random.default_rng(0).normal(size=(70, 8)).astype("<f4")


def strings(values):
    return Field(9, struct.pack("<IQ", 8, len(values)) + b"".join(writing.text(each).raw for each in values))


def fields(**more):
    return {
        "general.architecture": writing.text("llama"),
        "llama.context_length": writing.unsigned(512),
        "tokenizer.ggml.tokens": strings([f"token {number}" for number in range(len(ROWS))]),
        **more,
    }


def matrix(name="token_embd.weight", rows=ROWS):
    return writing.Content(name, (rows.shape[1], len(rows)), F32, rows.nbytes, [rows.tobytes()])


def content(tensors=None, given=None):
    file = io.BytesIO()
    writing.write(file, fields() if given is None else given, [matrix()] if tensors is None else tensors)
    return file.getvalue()


@pytest.fixture
def written(tmp_path):
    def write(data):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


def test_what_is_in_a_file(written):
    path = written(content())
    model = read(path)
    assert is_gguf(path) and model.architecture == "llama" and model.tied and model.n_parts == 1
    assert model.of_architecture("context_length") == 512
    assert model.strings("tokenizer.ggml.tokens")[69] == b"token 69"
    assert np.array_equal(model.rows(model.embedding, np.array([3, 69])), ROWS[[3, 69]])


def test_facts_are_those_of_the_file(written):
    known = facts(written(content()))
    assert (known.name, known.width, known.context, known.size) == ("model", 8, 512, 560.0)
    assert known.fingerprint is not None and known.fingerprint["vocabulary"] == 70
    assert known.base is None, "GGUF calls Mistral's models llama, too"
    named = facts(written(content(given=fields(**{"general.name": writing.text("Mistral 7B")}))))
    assert named.base == "Mistral"


def test_gemma_scales_what_it_reads(written):
    for family, of_tokens, of_rows in (("gemma2", 8**0.5, 1), ("gemma3", 8**0.5, 8**0.5), ("llama", 1, 1)):
        path = written(content(given=fields(**{"general.architecture": writing.text(family)})))
        assert matrix_in_folder(path).scale == pytest.approx(of_tokens)
        assert scale_of_rows(read(path)) == pytest.approx(of_rows)


def replaced(old, new):
    data = content()
    assert data.count(old) == 1
    return data.replace(old, new)


def counted(n_tensors=1, n_fields=3, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + content()[24:]


def entry(shape=(8, 70), kind=F32, offset=0):
    return struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BAD = {
    "nothing": (b"", NotAModelFile),
    "another format": (b"PK\x03\x04" + bytes(100), NotAModelFile),
    "an adapter": (content([matrix("blk.0.attn_q.weight.lora_a")]), NotAModelFile),
    "version 1": (counted(version=1), UnsupportedModelFile),
    "the other byte order": (counted(version=3 << 24), UnsupportedModelFile),
    "more tensors than any model": (counted(n_tensors=2**60), CorruptModelFile),
    "more fields than any model": (counted(n_fields=2**60), CorruptModelFile),
    "more tensors than there are": (counted(n_tensors=1000), ModelError),
    "half a header": (content()[:60], TruncatedModelFile),
    "half a tensor": (content()[:-1200], TruncatedModelFile),
    "no tensor": (content()[: -len(ROWS.tobytes())], TruncatedModelFile),
    "a text of 2**64 bytes": (replaced(b"\x05" + bytes(7) + b"llama", b"\xff" * 8 + b"llama"), TruncatedModelFile),
    "2**62 texts": (replaced(struct.pack("<IQ", 8, 70), struct.pack("<IQ", 8, 2**62)), TruncatedModelFile),
    "2**62 numbers": (replaced(struct.pack("<IQ", 8, 70), struct.pack("<IQ", 4, 2**62)), TruncatedModelFile),
    "arrays of arrays": (replaced(struct.pack("<IQ", 8, 70), struct.pack("<IQ", 9, 70)), CorruptModelFile),
    "metadata of no type": (replaced(struct.pack("<II", 4, 512), struct.pack("<II", 99, 512)), CorruptModelFile),
    "a name that is no text": (replaced(b"general.architecture", b"general.architectur\xff"), CorruptModelFile),
    "a field twice": (replaced(b"llama.context_length", b"general.architecture"), CorruptModelFile),
    "two tensors of one name": (content([matrix(), matrix()]), CorruptModelFile),
    "two tensors in one place": (
        content([matrix("a"), matrix("b")]).replace(entry(offset=2240), entry(offset=0)),
        CorruptModelFile,
    ),
    "five dimensions": (replaced(entry(), struct.pack("<I", 5) + entry()[4:]), CorruptModelFile),
    "no columns": (replaced(entry(), entry((0, 70))), CorruptModelFile),
    "more rows than bytes": (replaced(entry(), entry((8, 2**39))), TruncatedModelFile),
    "a crooked place": (replaced(entry(), entry(offset=7)), CorruptModelFile),
    "a place past the end": (replaced(entry(), entry(offset=2**50)), TruncatedModelFile),
    "an alignment of 3": (content(given=fields(**{"general.alignment": writing.unsigned(3)})), CorruptModelFile),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_has_an_error_that_says_what_is_wrong(written, name):
    data, error = BAD[name]
    path = written(data)
    with pytest.raises(error) as caught:
        read(path).embedding  # noqa: B018
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_does_anything_else(tmp_path_factory, data):
    whole = bytearray(content())
    header = len(whole) - ROWS.nbytes
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    try:
        model = read(path)
        if model.embedding.kind == F32:
            model.rows(model.embedding, np.zeros(1, dtype=np.int64))
        model.strings("tokenizer.ggml.tokens")
    except (ModelError, ImportError):
        pass


def test_a_folder_and_a_missing_file_are_no_gguf(tmp_path):
    assert not is_gguf(tmp_path) and not is_gguf(tmp_path / "none")
    with pytest.raises(NotAModelFile):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
