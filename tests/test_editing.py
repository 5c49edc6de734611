"""Other metadata in place, and several soft prompts as one."""

import json
import zipfile

import numpy as np
import pytest
import torch
from embeddings import Model, moved, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from zips import rows_of

from kobold_sp_plugin import SoftPrompt, formats
from kobold_sp_plugin.compatibility import fingerprint
from kobold_sp_plugin.editing import combine, edit
from kobold_sp_plugin.errors import EditError, NotASoftPromptFile
from kobold_sp_plugin.formats.conversion import convert

METADATA = {
    "name": "Noir",
    "author": "A",
    "supported": ["GPT-J 6B"],
    "description": "Dark.",
    "mood": {"deep": [1, 2]},
    "kobold_sp_plugin": {"fingerprint": {"version": 9}, "later": True},
}


class TestEdit:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_rows_dtype_and_all_other_metadata_stay(self, tmp_path, dtype):
        path = tmp_path / "noir.zip"
        SoftPrompt(rows_of(5, 8), METADATA, order="after_bos").save(path, dtype)
        before = formats.load(path)
        with zipfile.ZipFile(path) as archive:
            tensor = archive.read("tensor.npy")
        edit(path, {"name": "Night", "author": ["A", "B"]})
        after = formats.load(path)
        with zipfile.ZipFile(path) as archive:
            assert archive.read("tensor.npy") == tensor
        assert {**before.metadata, "name": "Night", "author": ["A", "B"]} == dict(after.metadata)
        assert (after.order, after.scale) == (before.order, before.scale)
        assert formats.read_header(path).dtype == dtype

    @pytest.mark.parametrize("kind", ["folder", "safetensors", "mkultra", "peft"])
    def test_other_formats_that_hold_metadata(self, tmp_path, kind):
        path = tmp_path / "noir"
        scale = formats.format_named(kind).scale
        formats.save(SoftPrompt(rows_of(5, 8), METADATA, scale), path, format=kind)
        before = formats.load(path)
        edit(path, {"description": "Night."})
        after = formats.load(path)
        assert (after.rows == before.rows).all()
        assert {**before.metadata, "description": "Night."} == dict(after.metadata)
        assert formats.format_of(path).name == kind

    def test_an_empty_value_takes_its_key_away(self, tmp_path):
        path = tmp_path / "noir.zip"
        SoftPrompt(rows_of(5, 8), METADATA).save(path)
        assert "mood" not in edit(path, {"mood": None, "author": ""}).metadata
        assert (formats.load(path).author, formats.load(path).name) == ("", "Noir")

    def test_a_format_without_metadata_is_refused_and_left(self, tmp_path):
        path = tmp_path / "noir.npy"
        np.save(path, rows_of(5, 8))
        before = path.read_bytes()
        with pytest.raises(EditError, match="kobold-sp convert"):
            edit(path, {"name": "Night"})
        assert path.read_bytes() == before

    def test_what_else_is_in_the_file_is_not_thrown_away(self, tmp_path):
        SoftPrompt(rows_of(5, 8), METADATA).save(tmp_path / "noir.zip")
        with zipfile.ZipFile(tmp_path / "noir.zip", "a") as archive:
            archive.writestr("licence.txt", "Ask me.")
        formats.save(SoftPrompt(rows_of(5, 8), METADATA), tmp_path / "noir.json", format="mkultra")
        text = json.loads((tmp_path / "noir.json").read_text())
        (tmp_path / "noir.json").write_text(json.dumps({**text, "licence.txt": "Ask me."}))
        tensors = {"prompt_embeddings": torch.ones(5, 8), "licence.txt": torch.ones(3)}
        write_safetensors(tmp_path / "noir.safetensors", tensors)
        for path in tmp_path.iterdir():
            before = path.read_bytes()
            with pytest.raises(EditError, match=r"would be lost: licence\.txt\. Convert it first"):
                edit(path, {"name": "Night"})
            assert path.read_bytes() == before
            if path.suffix != ".zip":
                assert "licence.txt" in convert(path, tmp_path / "new", "zip").lost

    def test_a_zip_that_has_a_folder_for_them_is_no_hindrance(self, tmp_path):
        SoftPrompt(rows_of(5, 8), METADATA).save(tmp_path / "a.zip")
        with zipfile.ZipFile(tmp_path / "a.zip") as old, zipfile.ZipFile(tmp_path / "b.zip", "w") as new:
            new.writestr("noir/", "")
            new.writestr("__MACOSX/noir/._tensor.npy", "x")
            for name in old.namelist():
                new.writestr("noir/" + name, old.read(name))
        assert edit(tmp_path / "b.zip", {"name": "Night"}).name == "Night"

    def test_float64_is_refused_rather_than_rounded(self, tmp_path):
        folder = tmp_path / "noir"
        folder.mkdir()
        np.save(folder / "tensor.npy", rows_of(5, 8).astype(np.float64))
        (folder / "meta.json").write_text('{"name": "Noir"}')
        with pytest.raises(EditError, match="float64"):
            edit(folder, {"name": "Night"})

    def test_what_is_no_soft_prompt_stays_what_it_is(self, tmp_path):
        path = tmp_path / "letter.zip"
        path.write_bytes(b"Dear reader")
        with pytest.raises(NotASoftPromptFile):
            edit(path, {"name": "Night"})
        assert path.read_bytes() == b"Dear reader"


def part(name, n_tokens=4, seed=0, **fields):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, fields.pop("width", 8)))
    metadata = {"name": name, "author": name[0], "supported": ["GPT-J 6B"], **fields.pop("metadata", {})}
    return SoftPrompt(rows, metadata, **fields)


def marked(name, model):
    return part(name, width=64, metadata={"kobold_sp_plugin": {"fingerprint": fingerprint(model)}})


class TestCombine:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
    def test_the_rows_of_all_in_order_cut_to_the_first(self, sizes, data):
        parts = [part(f"P{i}", size, seed=i) for i, size in enumerate(sizes)]
        n_tokens = data.draw(st.none() | st.integers(1, sum(sizes)))
        made = combine(parts, n_tokens)
        assert (made.rows == np.concatenate([each.rows for each in parts])[:n_tokens]).all()
        made_of = made.metadata["kobold_sp_plugin"]["made_of"]
        assert sum(each["n_tokens"] for each in made_of) == made.n_tokens

    def test_metadata_say_what_it_is_made_of(self, tmp_path):
        made = combine([part("Noir"), part("Space", metadata={"supported": ["OPT 6.7B"]})], 6)
        assert made.name == "Noir + Space" and made.author == "N, S"
        assert made.supported == ["GPT-J 6B", "OPT 6.7B"]
        assert made.description == "Made of Noir (4 rows) and Space (2 rows)"
        assert combine([part("Noir")], 2, "Short").name == "Short"
        made.save(tmp_path / "made.zip")
        again = SoftPrompt.load(tmp_path / "made.zip")
        assert (again.rows == made.rows).all()
        assert again.metadata["kobold_sp_plugin"]["made_of"] == made.metadata["kobold_sp_plugin"]["made_of"]

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"width": 9}, "Noir has width 8, and Other 9"),
            ({"scale": "module"}, "scale matrix, and Other module"),
            ({"order": "after_bos"}, "order before_bos, and Other after_bos"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, changed, said):
        with pytest.raises(EditError, match=said):
            combine([part("Noir"), part("Other", **changed)])

    def test_fingerprints_have_to_agree(self):
        model = Model()
        noir = marked("Noir", model)
        together = combine([noir, marked("Tuned", Model().changed(moved(0.1)))])
        assert together.metadata["kobold_sp_plugin"]["fingerprint"] == fingerprint(model)
        with pytest.raises(EditError, match="Noir and Other were made for different models"):
            combine([noir, marked("Other", Model(seed=1))])
        with pytest.raises(EditError, match="different models"):  # each with each, not with the first only
            combine([part("None", width=64), noir, marked("Other", Model(seed=1))])

    def test_of_one_without_a_fingerprint_nothing_is_claimed(self):
        assert (
            "fingerprint" not in combine([marked("Noir", Model()), part("Old", width=64)]).metadata["kobold_sp_plugin"]
        )

    @pytest.mark.parametrize("n_tokens", [0, -1, 9])
    def test_more_rows_than_there_are_or_none_is_refused(self, n_tokens):
        with pytest.raises(EditError, match="rows of 8"):
            combine([part("Noir"), part("Space")], n_tokens)
        with pytest.raises(EditError, match="nothing"):
            combine([])
