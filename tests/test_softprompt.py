"""The value itself."""

import copy
import pickle

import numpy as np
import pytest
import torch
from zips import rows_of

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.errors import MetadataNotJSON, NoRows, NotFinite, UnsupportedDtype, WrongRank
from kobold_sp_plugin.softprompt import Order, Scale


def test_it_is_a_frozen_copy():
    rows, metadata = rows_of(), {"name": "Noir", "tags": ["a"]}
    softprompt = SoftPrompt(rows, metadata)
    rows[0, 0] = 99
    metadata["name"] = "Other"
    metadata["tags"].append("b")
    assert softprompt.rows[0, 0] != 99
    assert dict(softprompt.metadata) == {"name": "Noir", "tags": ["a"]}
    with pytest.raises(ValueError):
        softprompt.rows[0, 0] = 1
    with pytest.raises(TypeError):
        softprompt.metadata["name"] = "x"
    with pytest.raises(AttributeError):
        softprompt.rows = rows


def test_its_facts():
    metadata = {"name": "Noir", "author": ["A", "B"], "supported": "GPT-J", "description": 5}
    softprompt = SoftPrompt(rows_of(3, 4), metadata)
    assert (softprompt.n_tokens, softprompt.width) == (3, 4)
    assert (softprompt.name, softprompt.author, softprompt.supported) == ("Noir", "A, B", ["GPT-J"])
    assert softprompt.description == "5"
    assert repr(softprompt) == "<SoftPrompt 'Noir': 3 tokens of width 4>"


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_any_float_become_float32(dtype, order):
    softprompt = SoftPrompt(np.asarray(rows_of(), dtype=dtype, order=order))
    assert softprompt.rows.dtype == np.float32
    assert softprompt.rows.flags.c_contiguous
    assert np.array_equal(softprompt.rows, rows_of())


def test_scale_and_order():
    assert (SoftPrompt(rows_of()).scale, SoftPrompt(rows_of()).order) == (Scale.MATRIX, Order.BEFORE_BOS)
    declared = SoftPrompt(rows_of(), {"kobold_sp_plugin": {"scale": "module", "order": "after_bos"}})
    assert (declared.scale, declared.order) == (Scale.MODULE, Order.AFTER_BOS)
    given = SoftPrompt(rows_of(), dict(declared.metadata), scale="matrix", order=Order.BEFORE_BOS)
    assert (given.scale, given.order) == (Scale.MATRIX, Order.BEFORE_BOS)
    with pytest.raises(ValueError):
        SoftPrompt(rows_of(), scale="tensor")


@pytest.mark.parametrize(
    "rows, error",
    [
        (np.zeros((2, 3), int), UnsupportedDtype),
        (np.array([["a"]]), UnsupportedDtype),
        (np.zeros(3), WrongRank),
        (np.zeros((1, 2, 3)), WrongRank),
        (np.zeros((0, 3)), NoRows),
        (np.zeros((3, 0)), NoRows),
        (np.array([[1.0, np.nan]]), NotFinite),
        (np.array([[1.0, -np.inf]]), NotFinite),
        (np.array([[1e39]]), NotFinite),
    ],
)
def test_rows_that_are_none(rows, error):
    with pytest.raises(error):
        SoftPrompt(rows)


@pytest.mark.parametrize("metadata", [{"a": {1, 2}}, {"a": float("nan")}, {"a": b"x"}])
def test_metadata_that_no_file_could_hold(metadata):
    with pytest.raises(MetadataNotJSON):
        SoftPrompt(rows_of(), metadata)


def test_equality_and_hash():
    first, second = SoftPrompt(rows_of(), {"name": "a"}), SoftPrompt(rows_of(), {"name": "a"})
    assert first == second
    assert hash(first) == hash(second)
    assert first != SoftPrompt(rows_of(), {"name": "b"})
    assert first != SoftPrompt(rows_of(seed=1), {"name": "a"})
    assert first != SoftPrompt(rows_of(), {"name": "a"}, scale="module")
    assert first != "noir"


def test_saved_and_loaded(tmp_path):
    softprompt = SoftPrompt(rows_of(), {"name": "Noir", "supported": [], "description": "", "mood": 1})
    softprompt.save(tmp_path / "noir.zip")
    loaded = SoftPrompt.load(str(tmp_path / "noir.zip"))
    assert np.array_equal(loaded.rows, softprompt.rows)
    assert loaded.metadata == {**softprompt.metadata, "kobold_sp_plugin": {"scale": "matrix", "order": "before_bos"}}


def test_it_can_be_copied_and_sent_to_another_process():
    softprompt = SoftPrompt(rows_of(), {"name": "Noir"}, scale="module", order="after_bos")
    assert copy.deepcopy(softprompt) == softprompt == pickle.loads(pickle.dumps(softprompt))


def test_equal_ones_have_equal_hashes():
    zero, minus_zero = (SoftPrompt(np.array([[value, 1.0]], dtype=np.float32)) for value in (0.0, -0.0))
    assert zero == minus_zero and hash(zero) == hash(minus_zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_may_be_a_torch_parameter(dtype):
    rows = torch.nn.Parameter(torch.tensor(rows_of()).to(dtype))
    assert np.array_equal(SoftPrompt(rows).rows, rows.detach().float().numpy())
    with pytest.raises(UnsupportedDtype):
        SoftPrompt(torch.ones(2, 3, dtype=torch.long))
