"""The Colab notebook, away from Colab: its cells are run in their order, on the demonstration model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kobold_sp_plugin import SoftPrompt, cli

pytest.importorskip("ftfy")

REPOSITORY = Path(cli.__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "hooks" / "colab" / "train_soft_prompt.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code_of(**changed):
    """The cells as one program, with the form filled in."""
    parts = []
    for cell in CELLS:
        if cell["cell_type"] == "code":
            parts.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                parts += [f"assert {name!r} in globals()\n{name} = {value!r}" for name, value in changed.items()]
    return "\n\n".join(parts)


def run(place, **changed):
    return subprocess.run(
        [sys.executable, "-c", code_of(**changed)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_it_holds_no_outputs():
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in CELLS)


@pytest.mark.parametrize("start_from, passed", [("", {"--tokens", "--initial-text"}), ("old.zip", {"--from"})])
def test_where_a_training_goes_on_from_a_soft_prompt_that_says_what_the_rows_begin_as(tmp_path, start_from, passed):
    (form,) = (cell for cell in CELLS if "parameters" in cell["metadata"].get("tags", ()))
    (train,) = (cell for cell in CELLS if "".join(cell["source"]).startswith("# @title Train "))
    given = []
    names = {"Path": Path, "kobold_sp": lambda *arguments: given.extend(arguments) or 0}
    exec("".join(form["source"]), names)
    names.update(initial_prompt="The rain", start_from=start_from, output_path=str(tmp_path))
    exec("".join(train["source"]), names)
    assert {"--tokens", "--initial-text", "--from"} & set(given) == passed


@pytest.mark.slow
@pytest.mark.timeout(240)  # its commands each begin with an import of all that training needs
def test_from_a_folder_of_texts_to_a_soft_prompt_and_a_report(tmp_path):
    drive = tmp_path / "MyDrive"
    (drive / "dataset").mkdir(parents=True)
    texts = [f"The rain was over, and the {a} knew it. Nobody asked the {b}." for a in ("clerk", "cat") for b in "abcd"]
    (drive / "dataset" / "a.txt").write_text("<|endoftext|>".join([*texts, texts[0]]), encoding="utf-8")
    softprompts = drive / "KoboldAI" / "softprompts"
    form = {
        "name": "Rain: one/two",
        "model": "",
        "tokens": 4,
        "author": "Ada",
        "initial_prompt": "The rain",
        "epochs": 2.0,
    }
    ran = run(tmp_path, dataset_path=str(drive / "dataset"), output_path=str(softprompts), **form)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = SoftPrompt.load(softprompts / "Rain- one-two.zip")
    assert (found.name, found.author, found.n_tokens) == ("Rain: one/two", "Ada", 4)
    assert "twice" in ran.stdout and "with ! before it" in ran.stdout
    assert "documents" in ran.stdout and "held out" in ran.stdout
    assert f"The report: {drive / 'KoboldAI' / 'training' / 'Rain- one-two' / 'report.html'}" in ran.stdout


def test_a_folder_that_is_not_there_is_said_with_what_is(tmp_path):
    (tmp_path / "datasets").mkdir()
    ran = run(tmp_path, dataset_path=str(tmp_path / "dataset"))
    assert ran.returncode == 1 and "['datasets']" in ran.stderr and "Correct dataset_path" in ran.stderr
