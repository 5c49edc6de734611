import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from models import FAMILY, tiny_model, tiny_tokenizer
from serving import serving

from kobold_sp_plugin import SoftPrompt, cli
from kobold_sp_plugin.cli import main

ROOT = Path(cli.__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-story"
    tiny_model(FAMILY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "softprompts"
    folder.mkdir()
    for name, width in (("noir", 32), ("wide", 64)):
        rows = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
        SoftPrompt(rows, {"name": name.title(), "author": "A"}).save(folder / f"{name}.zip")
    (folder / "broken.zip").write_bytes(b"PK")
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


class TestHelp:
    @pytest.mark.parametrize("command", [[], *([name] for name in main.commands)], ids=" ".join)
    def test_every_command_has_help_with_an_example(self, command):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert re.search(r"Example:\n +kobold-sp ", result.output)

    def test_help_is_quick(self):
        code = "import sys, kobold_sp_plugin.cli; print(sorted({'torch', 'numpy', 'flask'} & set(sys.modules)))"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "[]"

    @pytest.mark.parametrize("arguments", [["nonsense"], ["serve", "--port", "99999"], ["list", "--what"]])
    def test_wrong_use_is_2(self, arguments):
        assert run(*arguments).exit_code == 2


class TestList:
    def test_every_file_with_verdict_and_reason(self, folder, model_folder):
        result = run("list", folder, "--model", model_folder)
        assert result.exit_code == 0
        assert "judged for tiny-story" in result.output
        assert "noir.zip: Noir, by A (4 tokens of width 32)\n  unproven: same width" in result.output
        assert "incompatible: made for 64 columns, this model has 32" in result.output
        assert "broken.zip" in result.output and "unreadable: " in result.output

    def test_as_json(self, folder, model_folder):
        listed = json.loads(run("list", folder, "--model", model_folder, "--json").output)
        assert (listed["model"], listed["width"], listed["context"]) == ("tiny-story", 32, 128)
        verdicts = {each["filename"]: (each["verdict"], each["usable"]) for each in listed["entries"]}
        assert verdicts == {
            "broken.zip": ("unreadable", False),
            "noir.zip": ("unproven", True),
            "wide.zip": ("incompatible", False),
        }

    def test_names_with_control_characters_are_printed_harmlessly(self, folder, model_folder):
        (folder / "noir.zip").rename(folder / "no\x1b[31mir\n.zip")
        result = run("list", folder, "--model", model_folder)
        assert result.exit_code == 0 and "\x1b" not in result.output

    def test_names_that_the_terminals_encoding_has_not_are_printed_all_the_same(self, folder, model_folder):
        SoftPrompt(np.ones((4, 32), np.float32), {"name": "雨 Rain"}).save(folder / "rain.zip")
        result = CliRunner(charset="cp1252").invoke(main, ["list", str(folder), "--model", str(model_folder)])
        assert result.exit_code == 0 and "rain.zip: ? Rain" in result.output

    @pytest.mark.parametrize("arguments", [["absent"], [".", "--model", "./absent-model"]])
    def test_what_is_not_there_is_wrong_use(self, arguments, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = run("list", *arguments)
        assert result.exit_code == 2
        assert "absent" in result.output

    def test_the_folder_is_softprompts_unless_named(self, folder, model_folder, monkeypatch):
        monkeypatch.chdir(folder.parent)
        assert "noir.zip" in run("list", "--model", model_folder).output

    def test_nothing_named_means_the_samples_and_the_demonstration_model(self, tmp_path, monkeypatch):
        pytest.importorskip("transformers", "4.28")  # the demonstration model is a Llama
        monkeypatch.chdir(tmp_path)
        listed = json.loads(run("list", "--json").output)
        assert listed["model"] == "demonstration"
        assert "noir.zip" in [each["filename"] for each in listed["entries"]]
        assert {each["verdict"] for each in listed["entries"]} == {"compatible"}


class TestServe:
    def test_it_says_where_answers_and_ends_on_an_interrupt(self, folder, model_folder):
        with serving("--model", model_folder, "--softprompts", folder) as (url, said, process):
            assert "tiny-story: 1 soft prompts" in said
            with urllib.request.urlopen(f"{url}api/v1/model") as answer:
                assert json.load(answer) == {"result": "tiny-story"}
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
            assert process.returncode == 0
            assert "Traceback" not in errors

    def test_a_port_that_is_taken_is_said_at_once(self, folder):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            result = run("serve", "--softprompts", folder, "--port", port)
        assert result.exit_code == 2
        assert str(port) in result.output and "Try another --port." in result.output

    @pytest.mark.parametrize("host", ["a" * 300, "192.0.2.1"])  # no name at all; another machine's address
    def test_a_host_that_cannot_be_is_wrong_use(self, folder, host):
        result = run("serve", "--softprompts", folder, "--host", host, "--port", 0)
        assert result.exit_code == 2
        assert "Check --host." in result.output and "--port" not in result.output

    def test_a_model_that_cannot_be_loaded_is_wrong_use(self, folder, tmp_path):
        result = run("serve", "--softprompts", folder, "--port", 0, "--model", tmp_path)
        assert result.exit_code == 2 and str(tmp_path) in result.output

    def test_without_a_web_socket_library_it_says_what_to_install(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "simple_websocket", None)
        result = run("serve", "--softprompts", folder)
        assert result.exit_code == 2 and 'pip install "kobold_sp_plugin[server]"' in result.output
