"""kobold-sp inspect, check, edit and combine, and what they are made of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from embeddings import write_safetensors
from models import FAMILY, tiny_model, tiny_tokenizer

import kobold_sp_plugin
from kobold_sp_plugin import SoftPrompt, attach, formats
from kobold_sp_plugin.cli import main
from kobold_sp_plugin.compatibility import fingerprint
from kobold_sp_plugin.compatibility.matrix import matrix_of
from kobold_sp_plugin.engines.transformers import TransformersEngine
from kobold_sp_plugin.inspection import draw, inspect


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("model") / "tiny-story", tiny_model(FAMILY)
    made.save_pretrained(folder)
    if not (folder / "model.safetensors").exists():  # old releases write another format, of which no rows are read
        weight = made.get_input_embeddings().weight.detach()
        write_safetensors(folder / "embedding.safetensors", {"embed_tokens.weight": weight})
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model(FAMILY)


@pytest.fixture
def noir(tmp_path, model):
    """A soft prompt that began as tokens of the tiny model, and is far from them in one row."""
    rows = model.get_input_embeddings().weight[[40, 41, 42]].detach() * 2
    rows[2] = torch.randn(32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "noir.zip"
    metadata = {"name": "Noir", "author": "A", "supported": ["tiny 1M"], "description": "Dark."}
    SoftPrompt(rows, {**metadata, "kobold_sp_plugin": {"fingerprint": fingerprint(model)}}).save(path, "float16")
    return path


@pytest.fixture
def old(tmp_path, noir):
    """The same without a fingerprint."""
    path = tmp_path / "old.zip"
    SoftPrompt(formats.load(noir).rows, {"name": "Old"}).save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


class TestInspect:
    def test_everything_in_json(self, noir, model_folder):
        result = run("inspect", noir, "--model", model_folder, "--json")
        assert result.exit_code == 0
        told = json.loads(result.output)
        expected = {
            "filename": "noir.zip", "format": "zip", "name": "Noir", "author": "A", "description": "Dark.",
            "supported": ["tiny 1M"], "n_tokens": 3, "width": 32, "dtype": "float16", "scale": "matrix",
            "order": "before_bos", "fingerprint": True, "model": "tiny-story", "verdict": "compatible",
            "usable": True, "hint": None,
        }  # fmt: skip
        assert {key: told[key] for key in expected} == expected
        assert 0 < told["effect"] <= 1
        tokenizer = tiny_tokenizer()
        nearest = [row["nearest"][0] for row in told["rows"]]
        assert [text for text, _ in nearest[:2]] == [tokenizer.decode([40]), tokenizer.decode([41])]
        assert nearest[0][1] > 0.95 > nearest[2][1]
        assert [len(row["nearest"]) for row in told["rows"]] == [3, 3, 3]
        lengths = np.linalg.norm(formats.load(noir).rows, axis=1)
        assert [row["length"] for row in told["rows"]] == pytest.approx(lengths.tolist(), rel=1e-3)

    def test_as_a_table(self, noir, model_folder):
        printed = run("inspect", noir, "--model", model_folder).output
        assert printed.startswith("noir.zip: Noir, by A\n  Dark.\n  3 rows of width 32, float16, matrix scale, before")
        assert "tiny-story: compatible: made for this model" in printed
        assert "effect: moves " in printed
        assert printed.count("\n   ") == 3 and "   2 " in printed

    def test_without_a_fingerprint_the_rows_are_asked_and_it_is_said_that_they_prove_nothing(self, old, model_folder):
        printed = run("inspect", old, "--model", model_folder).output
        assert "unproven: same width; nothing tells" in printed and "no proof: its rows lie nearer" in printed

    def test_what_the_model_cannot_use_is_told_without_it(self, tmp_path, model_folder):
        SoftPrompt(np.ones((2, 64), np.float32)).save(tmp_path / "wide.zip")
        told = json.loads(run("inspect", tmp_path / "wide.zip", "--model", model_folder, "--json").output)
        assert told["verdict"] == "incompatible" and told["effect"] is None and told["usual_lengths"] is None
        assert [row["nearest"] for row in told["rows"]] == [[], []]
        assert run("inspect", tmp_path / "wide.zip", "--model", model_folder).exit_code == 0

    def test_texts_out_of_the_file_are_printed_harmlessly(self, tmp_path, model_folder):
        evil = dict.fromkeys(("name", "author", "description", "supported"), "x\x1b[31m\n\u202e")
        SoftPrompt(np.ones((2, 32), np.float32), evil).save(tmp_path / "evil.zip")
        result = run("inspect", tmp_path / "evil.zip", "--model", model_folder)
        assert result.exit_code == 0 and not {"\x1b", "\u202e"} & set(result.output)

    def test_the_selection_of_the_engine_stays(self, noir, model):
        engine = TransformersEngine(model, tiny_tokenizer(), "tiny")
        kept = SoftPrompt(np.ones((2, 32), np.float32))
        engine.select([kept])
        inspect(noir, engine, matrix_of(model))
        assert attach(model).selection == (kept,)


class TestPicture:
    def test_it_is_one_png_whatever_the_tokens_and_names_hold(self, tmp_path, noir, model):
        pytest.importorskip("matplotlib")
        changed = formats.load(noir)
        SoftPrompt(changed.rows, {"name": "$x_{$ 雨\x1b"}).save(noir)
        engine = TransformersEngine(model, tiny_tokenizer(), "tiny")
        texts = ["$", "日本", "\x1b", "\\frac", "a" * 500]
        found = inspect(noir, engine, matrix_of(model), lambda token_id: texts[token_id % 5])
        draw(found, tmp_path / "noir.png")
        assert (tmp_path / "noir.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["noir.png", "noir.zip"]

    def test_many_rows_of_zeros_and_no_model_fit_on_it_too(self, tmp_path, model):
        pytest.importorskip("matplotlib")
        SoftPrompt(np.zeros((500, 64), np.float32)).save(tmp_path / "zeros.zip")
        draw(inspect(tmp_path / "zeros.zip", TransformersEngine(model, tiny_tokenizer(), "t")), tmp_path / "zeros.png")
        assert (tmp_path / "zeros.png").stat().st_size > 1000

    def test_from_the_command_line(self, tmp_path, noir, model_folder):
        pytest.importorskip("matplotlib")
        assert run("inspect", noir, "--model", model_folder, "--picture", tmp_path / "noir.png").exit_code == 0
        assert (tmp_path / "noir.png").exists()
        result = run("inspect", noir, "--model", model_folder, "--picture", tmp_path / "absent" / "noir.png")
        assert result.exit_code == 2 and "Cannot write" in result.output

    def test_without_matplotlib_it_says_what_to_install(self, noir, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = run("inspect", noir, "--picture", tmp_path / "noir.png")
        assert result.exit_code == 2 and 'pip install "kobold_sp_plugin[picture]"' in result.output


class TestCheck:
    def test_a_folder_says_what_the_loaded_model_says(self, noir, model_folder):
        told = json.loads(run("inspect", noir, "--model", model_folder, "--json").output)
        result = run("check", noir, "--model", model_folder, "--json")
        said = json.loads(result.output)
        assert result.exit_code == 0
        assert (said["verdict"], said["reason"]) == (told["verdict"], told["reason"]) and said["hint"] == ""

    def test_a_configuration_alone_proves_nothing(self, noir, model_folder):
        result = run("check", noir, "--model", model_folder / "config.json")
        assert result.exit_code == 0 and "unproven" in result.output and "none is known of this model" in result.output

    def test_without_a_fingerprint_the_rows_are_asked(self, old, model_folder):
        assert "a hint for it, no proof" in run("check", old, "--model", model_folder).output

    def test_weights_that_cannot_be_read_are_said(self, old, model_folder, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
        (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
        result = run("check", old, "--model", tmp_path / "model")
        assert result.exit_code == 0 and "not in safetensors" in result.output

    def test_rows_whose_squares_pass_float32_are_compared_all_the_same(self, tmp_path, model_folder):
        rows = np.random.RandomState(0).normal(size=(3, 32)).astype(np.float32) * np.float32(1e37)
        SoftPrompt(rows).save(tmp_path / "huge.zip")
        answer = json.loads(run("check", tmp_path / "huge.zip", "--model", model_folder, "--json").output)
        assert "times longer" in answer["hint"] and "inf" not in answer["hint"]
        told = run("inspect", tmp_path / "huge.zip", "--model", model_folder, "--json").output
        assert "Infinity" not in told and "NaN" not in told

    def test_no_is_1(self, tmp_path, model_folder):
        SoftPrompt(np.ones((2, 64), np.float32)).save(tmp_path / "wide.zip")
        result = run("check", tmp_path / "wide.zip", "--model", model_folder)
        assert result.exit_code == 1 and "incompatible: made for 64 columns, this model has 32" in result.output

    def test_inspect_tells_that_a_file_cannot_be_read_before_it_loads_the_model(self, tmp_path):
        (tmp_path / "broken.zip").write_bytes(b"PK")
        result = run("inspect", tmp_path / "broken.zip", "--model", tmp_path / "absent")
        assert result.exit_code == 1 and "unreadable" in result.output

    @pytest.mark.parametrize("command", ["check", "inspect"])
    def test_unreadable_is_1(self, tmp_path, model_folder, command):
        (tmp_path / "broken.zip").write_bytes(b"PK")
        result = run(command, tmp_path / "broken.zip", "--model", model_folder)
        assert result.exit_code == 1 and "broken.zip: unreadable: " in result.output
        result = run(command, tmp_path / "broken.zip", "--model", model_folder, "--json")
        assert result.exit_code == 1 and json.loads(result.output)["verdict"] == "unreadable"

    def test_wrong_use_is_2(self, noir, tmp_path):
        (tmp_path / "folder" / "config.json").mkdir(parents=True)
        for arguments in (
            ["check", tmp_path / "absent.zip"],
            ["check", noir, "--model", tmp_path / "absent"],
            ["check", noir, "--model", noir],
            ["check", noir, "--model", tmp_path / "folder"],
            ["inspect", tmp_path / "absent.zip"],
        ):
            assert run(*arguments).exit_code == 2, arguments

    def test_nothing_heavy_is_loaded(self, noir, model_folder):
        code = (
            "import sys; from kobold_sp_plugin.cli import main; "
            f"main(['check', {str(noir)!r}, '--model', {str(model_folder)!r}], standalone_mode=False)"
        )
        code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n{code}"
        environment = {**os.environ, "PYTHONPATH": str(Path(kobold_sp_plugin.__file__).parents[1])}
        printed = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        ).stdout
        assert printed.splitlines()[-1] == "False"


class TestEditAndCombine:
    def test_edit_changes_what_is_named(self, noir):
        result = run("edit", noir, "--name", "Night", "--author", "A", "--author", "B", "--supported", "")
        assert result.exit_code == 0 and "name: Night" in result.output
        after = formats.load(noir)
        assert (after.name, after.metadata["author"], after.supported) == ("Night", ["A", "B"], [])
        assert (after.description, formats.read_header(noir).dtype) == ("Dark.", "float16")
        told = json.loads(run("edit", noir, "--description", "x", "--json").output)
        assert told["description"] == "x" and told["name"] == "Night"

    def test_edit_says_what_is_wrong(self, noir, tmp_path):
        assert run("edit", noir).exit_code == 2
        assert run("edit", tmp_path / "absent.zip", "--name", "x").exit_code == 2
        np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
        result = run("edit", tmp_path / "x.npy", "--name", "x")
        assert result.exit_code == 1 and "Not changed: x.npy is in a format" in result.output

    def test_combine(self, noir, old, tmp_path):
        out = tmp_path / "both.zip"
        result = run("combine", noir, old, "-o", out, "--rows", 4, "--json")
        assert result.exit_code == 0
        assert json.loads(result.output) == {
            "file": str(out), "name": "Noir + Old", "n_tokens": 4, "width": 32, "dtype": "float32",
        }  # fmt: skip
        assert run("combine", noir, "-o", out).exit_code == 2
        assert run("combine", noir, "-o", out, "--force").exit_code == 0
        assert formats.read_header(out).dtype == "float16"
        result = run("combine", noir, "-o", tmp_path / "x.zip", "--rows", 9)
        assert result.exit_code == 1 and "9 rows of 3" in result.output and not (tmp_path / "x.zip").exists()
        assert run("combine", tmp_path / "absent.zip", "-o", out).exit_code == 2
        for place in (tmp_path, tmp_path / "absent" / "x.zip", tmp_path / "x.json"):
            assert run("combine", noir, "-o", place, "--force").exit_code == 2, place
        assert not (tmp_path / "x.json").exists()
