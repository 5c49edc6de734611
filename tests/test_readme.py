"""The README's code runs, and what it says that code says too is the same."""

import gc
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from kobold_sp_plugin.cli import main
from kobold_sp_plugin.compatibility import Verdict
from kobold_sp_plugin.formats import formats_table
from kobold_sp_plugin.menu import events_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(mark):
    return README.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def test_the_python_examples_run(monkeypatch, capsys):
    pytest.importorskip("transformers", "4.28")
    monkeypatch.chdir(ROOT)
    gc.collect()  # while another test's "Noir" of other rows lives, the tag tells the two apart by a digest
    example, in_text, in_training = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("The door opened and")
    assert "noir compatible" in printed.lower()
    exec(compile(in_text, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("<softprompt:Noir>The sky over the port")
    exec(compile(in_training, "README.md", "exec"), names)
    assert names["rows"].grad.abs().sum() > 0 and names["mine"].n_tokens == 20


def test_the_table_of_events_is_the_one_in_the_code():
    assert between("events") == events_table().strip()


def test_every_verdict_is_explained():
    for verdict in Verdict:
        assert f"| {verdict} | " in README


def test_the_table_of_formats_is_the_one_in_the_code():
    assert between("formats") == formats_table().strip()


def test_the_inspected_example_is_what_it_prints(monkeypatch):
    pytest.importorskip("transformers", "4.28")
    monkeypatch.chdir(ROOT)
    ((command, lines),) = re.findall(r"```console\n\$ kobold-sp (inspect .*?)\n(.*?)…\n```", README, re.DOTALL)
    assert CliRunner().invoke(main, command.split()).output.startswith(lines)
