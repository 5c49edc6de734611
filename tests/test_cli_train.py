"""`kobold-sp train` and `kobold-sp dataset`, as a user runs them."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models import FAMILY, tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt, cli
from kobold_sp_plugin.cli import main
from kobold_sp_plugin.softprompt import OWN_KEY

pytest.importorskip("ftfy")

ROOT = Path(cli.__file__).resolve().parents[2]
TEXTS = [f"The door opened and the rain came in. Nobody said a word; {word}." for word in "abcdefghijklmnopqrst"]
QUICK = ("--tokens", 4, "--block", 32, "--batch-tokens", 120)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-story"
    tiny_model(FAMILY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def train(model_folder, *arguments, name="Rain", steps=10):
    return run(
        "train", "--data", "texts", "--name", name, "--model", model_folder, "--steps", steps, *QUICK, *arguments
    )


def command(*arguments):
    """The command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = "from kobold_sp_plugin.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestTrain:
    def test_the_soft_prompt_is_in_its_folder_and_says_what_it_is(self, here, model_folder):
        answer = train(model_folder, "--author", "Ada", "--description", "Rain.")
        assert answer.exit_code == 0, answer.output
        assert "helps" in answer.stdout
        assert files_in(here / "softprompts") == ["Rain.zip"]
        found = SoftPrompt.load("softprompts/Rain.zip")
        assert (found.name, found.author, found.description) == ("Rain", "Ada", "Rain.")
        assert (found.n_tokens, found.width, found.supported) == (4, 32, ["tiny-story"])
        own = found.metadata[OWN_KEY]
        about = own["training"]
        assert own["fingerprint"] and about["model"] == "tiny-story" and about["steps"] == 10
        assert about["held_out_after"] < about["held_out_without"]
        assert about["settings"]["n_tokens"] == 4 and len(about["data_sha256"]) == 64
        assert set(about["versions"]) == {"kobold_sp_plugin", "torch", "transformers"}

    def test_a_program_reads_a_line_for_each_thing_that_happens(self, here, model_folder):
        answer = train(model_folder, "--json-lines", steps=3)
        lines = [json.loads(line) for line in answer.stdout.splitlines()]
        assert [line["event"] for line in lines] == ["begun", "step", "step", "step", "done"]
        assert lines[1]["step"] == 1 and lines[1]["seconds_left"] >= 0 and lines[0]["documents"] == len(TEXTS)
        assert lines[-1]["softprompt"].endswith("Rain.zip") and lines[-1]["sentence"]
        answer = run("train", "--data", "absent", "--name", "Rain", "--json-lines")
        assert answer.exit_code == 2
        told = json.loads(answer.stdout)
        assert told["event"] == "error" and "There is no file or folder absent" in told["message"]

    def test_epochs_order_and_optimizer_are_taken_and_told(self, here, model_folder):
        steps = []
        for epochs in (1, 4):
            arguments = ("--data", "texts", "--name", "Rain", "--model", model_folder, *QUICK, "--epochs", epochs)
            answer = run("train", *arguments, "--order", "after_bos", "--optimizer", "adafactor", "--json")
            assert answer.exit_code in (0, 1), answer.output
            steps.append(json.loads(answer.stdout))
        assert steps[1]["steps"] == 4 * steps[0]["steps"]
        found = SoftPrompt.load(steps[0]["softprompt"])
        assert found.order == "after_bos"
        assert found.metadata[OWN_KEY]["training"]["settings"]["optimizer"] == "adafactor"

    @pytest.mark.parametrize(
        "more",
        [
            (),
            ("--initial-text", "The rain"),
            ("--initial", "vocabulary"),
            ("--initial", "words", "--initial-text", "rain, word"),
        ],
    )
    def test_rows_begin_as_is_asked_for(self, here, model_folder, more):
        answer = json.loads(train(model_folder, *more, "--json", steps=1).stdout)
        settings = SoftPrompt.load(answer["softprompt"]).metadata[OWN_KEY]["training"]["settings"]
        assert settings["initial"] == (more[1] if "--initial" in more else "text")
        assert settings["initial_text"] == (more[-1] if "--initial-text" in more else "")

    def test_samples_are_shown_on_the_way_and_change_no_rows(self, here, model_folder, monkeypatch):
        from kobold_sp_plugin.training import making

        answer = train(model_folder, steps=20)
        assert answer.stderr.count("\n    ") >= 3
        monkeypatch.setattr(making, "_is_time_for_a_sample", lambda progress: False)
        answer = train(model_folder, steps=20)
        assert answer.stderr.count("\n    ") == 0
        one, other = (SoftPrompt.load(f"softprompts/{name}.zip") for name in ("Rain", "Rain-v2"))
        assert one.rows.tobytes() == other.rows.tobytes()

    def test_versions_are_numbered_and_nothing_is_overwritten(self, here, model_folder):
        first = json.loads(train(model_folder, "--json").stdout)
        before = Path(first["softprompt"]).read_bytes()
        second = json.loads(train(model_folder, "--json", "--seed", 1).stdout)
        assert (first["softprompt"], second["softprompt"]) == (
            str(Path("softprompts/Rain.zip")),
            str(Path("softprompts/Rain-v2.zip")),
        )
        assert Path(first["softprompt"]).read_bytes() == before
        assert [SoftPrompt.load(each["softprompt"]).name for each in (first, second)] == ["Rain", "Rain v2"]
        found = [json.loads(train(model_folder, "--json", name="Rain v3", steps=1).stdout) for _ in range(2)]
        assert [Path(each["softprompt"]).name for each in found] == ["Rain v3.zip", "Rain v4.zip"]
        assert SoftPrompt.load(found[1]["softprompt"]).name == "Rain v4"
        assert Path("training/Rain/report.html").is_file() and Path("training/Rain-v2/report.html").is_file()
        again = json.loads(train(model_folder, "--json", "--output", here / "mine" / "x.zip").stdout)
        same = [SoftPrompt.load(each["softprompt"]).rows.tobytes() for each in (first, again)]
        assert same[0] == same[1]
        assert (here / "mine" / "training" / "x" / "report.html").is_file()

    def test_the_data_may_be_the_folder_in_which_it_trains(self, here, model_folder):
        command = ("train", "--data", ".", "--name", "Rain", "--model", model_folder, "--steps", 2, *QUICK, "--json")
        found = [json.loads(run(*command).stdout) for _ in range(2)]
        rows = [SoftPrompt.load(each["softprompt"]).rows.tobytes() for each in found]
        assert rows[0] == rows[1]

    @pytest.mark.parametrize(
        "name, is_there", [("softprompts", True), ("softprompts", False), ("St. Petersburg", False)]
    )
    def test_the_output_may_be_a_folder(self, here, model_folder, name, is_there):
        folder = here / "KoboldAI" / name
        if is_there:
            folder.mkdir(parents=True)
        answer = train(model_folder, "--output", folder, steps=1)
        is_beside = name == "softprompts"
        found = sorted(each.name for each in folder.iterdir())
        assert found == (["Rain.zip"] if is_beside else ["Rain.zip", "training"]), answer.output
        beside = folder.parent if is_beside else folder
        assert (beside / "training" / "Rain" / "report.html").is_file()

    def test_one_that_does_not_help_says_so_and_no_model_means_the_demonstration(self, here):
        SoftPrompt(np.random.default_rng(0).normal(size=(4, 160)).astype(np.float32)).save("noise.zip")
        arguments = ("--data", "texts", "--name", "Rain", "--steps", 1, "--learning-rate", 1e-6, "--from", "noise.zip")
        answer = run("train", *arguments, *QUICK)
        assert answer.exit_code == 1
        assert "does not help" in answer.stdout
        assert "does not help" in Path("training/Rain/report.html").read_text(encoding="utf-8")

    def test_it_goes_on_from_a_soft_prompt(self, here, model_folder):
        train(model_folder, "--tokens", 6, steps=20)
        before = SoftPrompt.load("softprompts/Rain.zip").metadata[OWN_KEY]["training"]
        answer = run(
            *("train", "--data", "texts", "--name", "More", "--model", model_folder, "--steps", 1, "--block", 32),
            *("--batch-tokens", 120, "--from", "softprompts/Rain.zip", "--json"),
        )
        found = json.loads(answer.stdout)
        assert SoftPrompt.load(found["softprompt"]).n_tokens == 6
        assert found["held_out_before"] == pytest.approx(before["held_out_after"], rel=1e-5)

    @pytest.mark.parametrize("kind", ["mtj-softtuner's", "KoboldAI's", "two"])
    def test_it_goes_on_from_the_checkpoints_of_earlier_tuners_and_mixes(self, here, model_folder, kind):
        rows = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
        if kind == "mtj-softtuner's":
            with open("old.mtjsp", "wb") as file:
                np.savez_compressed(file, tensor=rows, opt_state=np.array([{}], dtype=object), step=np.uint32(3))
        elif kind == "KoboldAI's":
            torch.save({"tensor": torch.tensor(rows), "opt_state": {}, "step": 3, "loss": 1.0}, "old.mtjsp")
        else:
            SoftPrompt(rows).save("old.mtjsp")
        more = ("--from", "old.mtjsp") * (2 if kind == "two" else 1)
        answer = run(
            *("train", "--data", "texts", "--name", "More", "--model", model_folder, "--steps", 1, "--block", 32),
            *("--batch-tokens", 120, "--learning-rate", 1e-6, "--json", *more),
        )
        found = SoftPrompt.load(json.loads(answer.stdout)["softprompt"])
        assert np.allclose(found.rows, rows, atol=1e-4)
        assert (found.metadata[OWN_KEY]["training"]["mixture"] is not None) == (kind == "two")

    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    def test_the_model_is_loaded_in_the_precision_that_is_asked_for(self, here, model_folder, precision):
        answer = train(model_folder, "--precision", precision, "--json")
        assert answer.exit_code == 0, answer.output
        found = SoftPrompt.load(json.loads(answer.stdout)["softprompt"])
        assert found.metadata[OWN_KEY]["training"]["precision"] == precision

    def test_another_training_of_the_name_is_not_gone_on_from(self, here, model_folder):
        train(model_folder)
        Path("softprompts/Rain.zip").unlink()
        answer = train(model_folder, "--learning-rate", 0.2)
        assert answer.exit_code == 2
        assert "learning_rate was 0.1, is 0.2" in answer.output

    def test_a_name_becomes_a_file_name_that_is_valid_everywhere(self, here, model_folder):
        answer = json.loads(train(model_folder, "--json", name="../Rain: a/b?", steps=1).stdout)
        name = Path(answer["softprompt"]).name
        assert not re.search(r'[<>:"/\\|?*]', name)
        assert SoftPrompt.load(answer["softprompt"]).name == "../Rain: a/b?"
        assert files_in(here / "softprompts") == [name]

    @pytest.mark.timeout(180)
    @pytest.mark.skipif(os.name == "nt", reason="signals")
    def test_ctrl_c_saves_and_the_same_command_goes_on(self, here, model_folder):
        arguments = ("train", "--data", "texts", "--name", "Rain", "--model", model_folder, "--steps", 400, *QUICK)
        process = command(*arguments)
        while "step " not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=50)
        assert process.returncode == 1
        step = int(re.search(r"Interrupted at step (\d+); saved", told).group(1))
        assert not (here / "softprompts").exists()
        answer = run(*arguments, "--json")
        assert f"Going on from step {step} of 400" in answer.stderr
        assert json.loads(answer.stdout)["resumed_at"] == step

    @pytest.mark.skipif(os.name == "nt", reason="signals")
    def test_ctrl_c_before_the_first_step_ends_at_once(self, here, model_folder, monkeypatch):
        from kobold_sp_plugin.training import dataset

        whole, told = dataset._tokens, []

        def tokens(*arguments):
            told.append(arguments)
            if len(told) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return whole(*arguments)

        monkeypatch.setattr(dataset, "_tokens", tokens)
        answer = train(model_folder)
        assert answer.exit_code == 1 and "The same command goes on" in answer.stderr
        assert len(told) == 3
        assert files_in(here / "training") == ["Rain/lock"]

    @pytest.mark.skipif(os.name == "nt", reason="signals")
    @pytest.mark.parametrize("count", [1, 2])
    def test_a_second_ctrl_c_is_offered_only_where_it_ends_at_once(self, monkeypatch, capsys, count):
        from kobold_sp_plugin.cli.train import _interruptible, _Shown
        from kobold_sp_plugin.training import processes

        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "number", lambda: 0)
        shown = _Shown()
        shown.has_begun = True
        with _interruptible(shown) as is_stopped:
            os.kill(os.getpid(), signal.SIGINT)
            assert is_stopped()
        told = capsys.readouterr().err
        assert "Ending after this step" in told and ("again" in told) == (count == 1)

    @pytest.mark.slow
    @pytest.mark.timeout(180)  # several processes, each of which imports torch
    def test_killed_at_any_moment_it_goes_on_to_the_same_rows(self, here, model_folder):
        arguments = ("train", "--data", "texts", "--model", model_folder, "--steps", 150, *QUICK)
        assert run(*arguments, "--name", "Whole").exit_code == 0
        rng = random.Random()
        killed = 0
        for _ in range(2):
            process = command(*arguments, "--name", "Killed")
            while "documents" not in process.stderr.readline() and process.poll() is None:
                pass
            time.sleep(rng.uniform(0.0, 0.7))
            process.kill()
            process.communicate()
            killed += process.returncode != 0
        assert killed
        if not Path("softprompts/Killed.zip").exists():
            assert run(*arguments, "--name", "Killed").exit_code == 0
        whole, again = (SoftPrompt.load(f"softprompts/{name}.zip") for name in ("Whole", "Killed"))
        assert again.rows.tobytes() == whole.rows.tobytes()
        assert again.metadata[OWN_KEY]["training"] == whole.metadata[OWN_KEY]["training"]

    def test_one_that_ends_before_its_report_is_gone_on_with_and_leaves_nothing(self, here, model_folder, monkeypatch):
        from kobold_sp_plugin.training import making

        def full(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(making, "write_report", full)
            answer = train(model_folder)
        assert answer.exit_code == 2
        assert re.search(r"disk of .*Rain is full\. Make room on it\. The same command goes on", answer.output)
        Path("training/Rain/.kobold-sp-0123456789abcdef.tmp").write_bytes(b"of a process that was killed")
        answer = train(model_folder)
        assert "Going on from step 10 of 10" in answer.stderr
        assert files_in(here / "softprompts") == ["Rain.zip"]
        assert not list(here.rglob(".*"))

    def test_of_two_disks_the_full_one_is_named(self, tmp_path, monkeypatch):
        from kobold_sp_plugin.cli.train import _full_folder
        from kobold_sp_plugin.training.places import Places

        free = {tmp_path / "work": 10**9, tmp_path / "output": 0}
        for folder in free:
            folder.mkdir()
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
        places = Places(tmp_path / "output" / "x.zip", tmp_path / "work")
        assert _full_folder(OSError(errno.ENOSPC, "full"), places) == tmp_path / "output"
        error = OSError(errno.ENOSPC, "full", str(tmp_path / "other" / "x.tmp"))
        assert _full_folder(error, places) == tmp_path / "other"

    def test_two_of_one_name_do_not_train_at_once(self, here, model_folder):
        from kobold_sp_plugin.training.places import alone_in

        with alone_in(Path("training/Rain")):
            answer = train(model_folder)
        assert answer.exit_code == 2
        assert "Another process trains" in answer.output


class TestWhatIsWrong:
    def test_everything_is_named_at_once_and_nothing_is_written(self, here, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "x.jsonl").write_text("{", encoding="utf-8")
        (tmp_path / "t5").mkdir()
        (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
        (tmp_path / "softprompts").write_text("a file", encoding="utf-8")
        answer = run("train", "--data", "data", "--name", "/", "--model", tmp_path / "t5", "--from", "nowhere.zip")
        assert answer.exit_code == 2
        for part in (
            "x.jsonl, line 1",
            "no file name",
            "no causal language model but a t5",
            "nowhere.zip",
            "is a file",
        ):
            assert part.lower() in answer.output.lower()
        assert not (here / "training").exists()

    @pytest.mark.parametrize(
        "arguments, why",
        [
            (("--data", "nowhere"), "no file or folder nowhere"),
            (("--model", "./nowhere"), "no folder ./nowhere"),
            (("--model", "texts"), "no config.json"),
            (("--model", "texts/a.txt"), "a.txt is a file. Training needs the folder"),
            (("--name", " "), "no name"),
            (("--tokens", 126), "leave no room in a context of 128"),
            (("--block", 200), "Try --block 124"),
            (("--learning-rate", -1), "learning_rate is -1"),
            (("--initial-text", "@nowhere.txt"), "nowhere.txt"),
            (("--output", "mine/rain.json"), f'--output "{Path("mine/rain.zip")}"'),
            (("--from", "nowhere.zip", "--initial-text", "Rain."), "leave out --initial"),
            (("--initial", "words"), "there are none"),
        ],
    )
    def test_each_is_named(self, here, model_folder, arguments, why):
        Path("mine").mkdir()
        Path("mine/rain.json").touch()  # what is advised is no later version of it
        answer = train(model_folder, *arguments)
        assert answer.exit_code == 2
        assert why in answer.output

    def test_messages_for_a_model_without_a_chat_template_are_named(self, here, model_folder):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        Path("texts/chat.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
        answer = train(model_folder)
        assert answer.exit_code == 2 and not Path("training").exists()
        assert 'chat.jsonl, line 1: "messages" need a model whose tokenizer has a chat template' in answer.output

    def test_an_empty_text_is_no_data(self, here, model_folder):
        Path("texts/a.txt").write_text("\n\n", encoding="utf-8")
        assert "hold no text" in train(model_folder).output

    def test_a_width_that_does_not_fit_is_named(self, here, model_folder):
        SoftPrompt(np.ones((2, 64), np.float32)).save("wide.zip")
        answer = train(model_folder, "--from", "wide.zip")
        assert answer.exit_code == 2
        assert "made for 64 columns, this model has 32" in answer.output

    def test_a_model_without_weights_or_tokenizer_is_named(self, here, model_folder):
        Path("half").mkdir()
        Path("half/config.json").write_bytes((model_folder / "config.json").read_bytes())
        answer = train("half")
        assert "no weights" in answer.output and "no tokenizer" in answer.output

    def test_several_processes_need_the_memory_several_times_and_share_no_packed_weights(
        self, here, model_folder, monkeypatch
    ):
        from kobold_sp_plugin.training import preflight, processes

        monkeypatch.setattr(processes, "count", lambda: 1000)
        monkeypatch.setattr(processes, "number", lambda: 0)
        monkeypatch.setattr(preflight, "free_memory", lambda *_: (10**10, "memory"))
        answer = train(model_folder, "--sharded", "--precision", "4bit")
        assert answer.exit_code == 2
        assert "memory has 10 MB left" in answer.output and "without accelerate launch" in answer.output

    def test_memory_that_does_not_suffice_is_named_with_what_would(self, here, model_folder, monkeypatch):
        from kobold_sp_plugin.training import preflight

        monkeypatch.setattr(preflight, "free_memory", lambda *_: (60_000_000, "memory"))
        answer = train(model_folder, "--batch-tokens", 2000)
        assert answer.exit_code == 2
        assert "memory has 60 MB left" in answer.output and "No settings would make it fit" in answer.output

    def test_a_fine_tune_is_told_of_its_core_model(self, here, model_folder, tmp_path):
        folder = tmp_path / "tuned"
        folder.mkdir()
        for file in model_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "README.md").write_text("---\nbase_model: core/model-6B\n---\n# Tuned\n", encoding="utf-8")
        answer = train(folder, steps=1)
        assert "is a fine-tune of core/model-6B" in answer.output and "--model core/model-6B" in answer.output


class TestDataset:
    def test_what_is_amiss_is_told_and_mended(self, here):
        Path("texts/b.txt").write_bytes("<p>Die Tür &amp; das Fenster.</p>".encode("cp1252"))
        Path("texts/c.txt").write_text(TEXTS[0], encoding="utf-8")
        answer = run("dataset", "check", "texts")
        assert answer.exit_code == 1
        assert re.search(r"documents, [1-9]\.\d kB of text", answer.output)
        for word in ("encoding", "markup", "entities", "twice", 'dataset clean "texts"'):
            assert word in answer.output
        assert run("dataset", "clean", "texts", "clean").exit_code == 0
        found = json.loads(run("dataset", "check", "clean", "--json").stdout)
        assert found["clean"] and {remark["kind"] for remark in found["remarks"]} == {"size"}

    def test_wrong_use_is_2(self, here):
        assert run("dataset", "check", "nowhere").exit_code == 2
        assert run("dataset", "clean", "texts", "texts").exit_code == 2
