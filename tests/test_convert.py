"""``kobold-sp convert``: what is kept, what is said, what is refused, and how it ends."""

import json
import os

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from models import CONFIGS, FAMILY, tiny_model
from zips import rows_of

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.cli import main
from kobold_sp_plugin.formats import load, read_header

ROWS = rows_of(20, 32)
META = {"name": "Noir", "author": "A", "supported": ["gpt-j"], "description": "Rain.", "mood": [1]}


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


@pytest.fixture
def noir(tmp_path):
    own = {"kobold_sp_plugin": {"fingerprint": {"version": 9}}}
    SoftPrompt(ROWS, {**META, **own}).save(tmp_path / "noir.zip", "float16")
    return tmp_path / "noir.zip"


def test_there_and_back(tmp_path, noir):
    result = run(noir, tmp_path / "noir.json")
    assert result.exit_code == 0, result.output
    assert "noir.json: 20 rows of 32 columns, float16, mkultra from zip" in result.output
    assert "the same, bit for bit" in result.output
    assert "No place" not in result.output
    assert run(tmp_path / "noir.json", tmp_path / "back.zip").exit_code == 0
    back = load(tmp_path / "back.zip")
    assert np.array_equal(back.rows, ROWS)
    assert read_header(tmp_path / "back.zip").dtype == "float16"
    assert back.metadata["kobold_sp_plugin"]["fingerprint"] == {"version": 9}
    assert {key: back.metadata[key] for key in META} == {key: load(noir).metadata[key] for key in META}


def test_what_has_no_place_is_listed(tmp_path, noir):
    result = run(noir, tmp_path / "noir.npy", "--json")
    report = json.loads(result.output)
    assert report["lost"] == ["author", "description", "kobold_sp_plugin", "mood", "name", "supported"]
    assert (report["format"], report["to"], report["shape"], report["difference"]) == ("zip", "npy", [20, 32], 0.0)
    assert "No place in this format: author, desc" in run(noir, tmp_path / "noir.pt").output


def test_a_dtype_that_the_target_has_not_is_said(tmp_path):
    np.save(tmp_path / "a.npy", ROWS.astype(np.float64) + 1e-9)
    result = run(tmp_path / "a.npy", tmp_path / "a.zip")
    assert "They were float64, and are float32 now." in result.output
    np.save(tmp_path / "b.npy", ROWS + np.float32(1e-4))
    SoftPrompt(ROWS + np.float32(1e-4), scale="module").save(tmp_path / "b.zip")
    result = run(tmp_path / "b.zip", tmp_path / "b.json", "--to", "upload")
    assert "They were float32, and are float16 now." in result.output
    assert "the rows differ by up to" in result.output


def test_the_model_is_asked_for_where_conventions_differ(tmp_path, noir):
    out = tmp_path / "adapter"
    result = run(noir, out, "--to", "peft")
    assert result.exit_code == 2
    assert "Use --model PATH" in result.output
    assert not out.exists()
    model = tmp_path / "model"
    tiny_model(FAMILY).config.save_pretrained(model)  # no weights
    result = run(noir, out, "--to", "peft", "--model", model)
    assert result.exit_code == 0, result.output
    assert "the same, bit for bit" in result.output
    assert np.array_equal(load(out).rows, ROWS)
    result = run(out, tmp_path / "kept.zip")
    assert "and the file says so" in result.output
    assert load(tmp_path / "kept.zip").scale == "module"
    assert run(out, tmp_path / "back.zip", "--model", model).exit_code == 0
    assert load(tmp_path / "back.zip").scale == "matrix"
    assert np.array_equal(load(tmp_path / "back.zip").rows, ROWS)


@pytest.mark.parametrize("family", ["gemma2", "xglm"])
def test_a_model_that_scales_its_embeddings(tmp_path, noir, family, monkeypatch):
    options = {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128}
    monkeypatch.setitem(CONFIGS, "xglm", ("XGLM", options))
    if not hasattr(transformers, f"{CONFIGS[family][0]}Config"):
        pytest.skip("not in this release of transformers")
    model = tiny_model(family)
    factor = float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))
    model.config.save_pretrained(tmp_path / "model")
    result = run(noir, tmp_path / "a.b64", "--to", "vllm", "--model", tmp_path / "model", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["factor"] == pytest.approx(factor, rel=1e-6)
    assert np.array_equal(load(tmp_path / "a.b64").rows, ROWS * np.float32(report["factor"]))
    assert (report["scale"], report["dtype"]) == ("module", "float16" if factor == 1 else "float32")


def test_a_model_of_another_width(tmp_path, noir):
    tiny_model("gpt2", n_embd=64).config.save_pretrained(tmp_path / "model")
    result = run(noir, tmp_path / "a", "--to", "peft", "--model", tmp_path / "model")
    assert result.exit_code == 1
    assert "32 columns, this model has 64" in result.output
    assert run(noir, tmp_path / "a", "--to", "peft", "--model", tmp_path / "none").exit_code == 2


def test_nothing_is_replaced_unless_told(tmp_path, noir):
    out = tmp_path / "out.json"
    out.write_text("mine")
    result = run(noir, out)
    assert result.exit_code == 2
    assert "--force replaces it" in result.output
    assert out.read_text() == "mine"
    assert run(noir, out, "--force").exit_code == 0
    assert load(out).name == "Noir"
    assert run(out, out, "--force").exit_code == 0
    assert load(out).name == "Noir"


def test_a_failure_leaves_what_was_there(tmp_path):
    SoftPrompt(ROWS * 1e5).save(tmp_path / "a.zip")
    SoftPrompt(ROWS * 1e5, scale="module").save(tmp_path / "b.zip")
    (tmp_path / "out.json").write_text("mine")
    result = run(tmp_path / "b.zip", tmp_path / "out.json", "--to", "upload", "--force", "--json")
    assert result.exit_code == 1
    assert "float16 cannot hold" in json.loads(result.output)["error"]
    assert (tmp_path / "out.json").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("noir.zip", "out"), "does not tell which format"),
        (("noir.zip", "out", "--to", "gguf"), "There is no format 'gguf'"),
        (("none.zip", "out.npy"), "There is no"),
        (("noir.zip", "folder", "--to", "npy", "--force"), "is a folder"),
        (("noir.zip", "noir.zip", "--to", "peft", "--force"), "is a file"),
    ],
)
def test_wrong_use(tmp_path, noir, arguments, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize("out", ["a.mtjsp", "a.module"])
def test_formats_that_are_only_read_say_why(tmp_path, noir, out):
    result = run(noir, tmp_path / out)
    assert result.exit_code == 1
    assert "optimizer's state" in result.output or "NovelAI's own models" in result.output


def test_a_part_is_chosen_and_an_unreadable_file_named(tmp_path):
    import torch

    torch.save({"a": torch.tensor(ROWS), "b": torch.tensor(ROWS) + 1}, tmp_path / "two.pt")
    result = run(tmp_path / "two.pt", tmp_path / "a.npy")
    assert result.exit_code == 1
    assert "2 tensors (a, b)" in result.output
    assert run(tmp_path / "two.pt", tmp_path / "a.npy", "--part", "b").exit_code == 0
    assert np.array_equal(load(tmp_path / "a.npy").rows, ROWS + 1)
    (tmp_path / "bad.zip").write_bytes(b"hello")
    assert run(tmp_path / "bad.zip", tmp_path / "b.npy").exit_code == 1


def test_the_help_shows_an_example_and_every_format():
    from kobold_sp_plugin.formats import FORMATS

    output = run("--help").output
    assert "kobold-sp convert noir.json noir.zip" in output
    for kind in FORMATS:
        assert kind.write is None or kind.name in output


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, noir):
    for name, file in (("model", "config.json"), ("adapter", "adapter_config.json"), ("other", "letter.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        for to in ("folder", "exelents"):
            result = run(noir, tmp_path / name, "--to", to, "--model", tmp_path, "--force")
            assert result.exit_code == 2 and "something else in it" in result.output
        assert [path.name for path in (tmp_path / name).iterdir()] == [file]
    (tmp_path / "empty").mkdir()
    assert run(noir, tmp_path / "empty", "--to", "folder", "--force").exit_code == 0
    assert run(noir, tmp_path / "empty", "--to", "folder", "--force").exit_code == 0


def test_a_folder_that_is_not_there_and_a_pipe_are_said(tmp_path, noir):
    result = run(noir, tmp_path / "absent" / "noir.npy")
    assert result.exit_code == 2 and "There is no folder" in result.output and ".tmp" not in result.output
    os.mkfifo(tmp_path / "pipe.npy")
    result = run(noir, tmp_path / "pipe.npy", "--force")
    assert result.exit_code == 1 and "no ordinary file" in result.output
    assert (tmp_path / "pipe.npy").is_fifo()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": "x"},
        {"model_type": "opt", "hidden_act": "x", "activation_function": "x"},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
    ],
)
def test_a_configuration_that_nothing_can_be_built_of_is_wrong_use(tmp_path, noir, config):
    """In one line, and without asking whether the model's own code may be run."""
    pytest.importorskip("transformers", "4.38")  # earlier ones are not asked to build anything
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text("raise SystemExit(77)")
    arguments = ["convert", noir, tmp_path / "out", "--to", "peft", "--model", tmp_path / "model"]
    result = CliRunner().invoke(main, list(map(str, arguments)), input="y\n")
    assert result.exit_code == 2 and "[y/N]" not in result.output
    assert "configuration" in result.output and "\ufffd" not in result.output
