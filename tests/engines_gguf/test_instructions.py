"""What each export says of its use is tried word for word: commands are run, requests sent, programs executed.

koboldcpp and LM Studio cannot be had here, so that what is said of them is not tried.
"""

import io
import json
import os
import re
import shlex
import socket
import subprocess
import time
from contextlib import contextmanager, redirect_stderr

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
import gguf_files
from llama_servers import PROGRAM, softprompt

from kobold_sp_plugin import attach
from kobold_sp_plugin.cli import main
from kobold_sp_plugin.engines.llama_bindings import Decoder
from kobold_sp_plugin.engines.remote import Remote
from kobold_sp_plugin.errors import EngineUnreachable

pytestmark = pytest.mark.llama_cpp
needs_server = pytest.mark.skipif(not PROGRAM, reason="KOBOLD_SP_LLAMA_SERVER names no llama-server")

TEXT = "your text"
LENGTH = 8
"""Tokens: what the engines keep is in half precision here, and random weights leave more of them close to a tie."""
SECONDS = 120
GREEDY = {"temperature": 0.0, "n_predict": LENGTH}


class Exported:
    """What ``kobold-sp export`` printed, run in the folder that it was run in."""

    def __init__(self, folder, family, to, *options, order="before_bos"):
        self.model = gguf_files.tiny(family)
        gguf_files.write(self.model, folder / "model.gguf")
        self.softprompt = softprompt(order=order)
        self.softprompt.save(folder / "noir.zip")
        answer = CliRunner().invoke(main, ["export", "noir.zip", "--model", "model.gguf", "--to", to, *options])
        assert answer.exit_code == 0, answer.output
        self.lines = [line[2:] for line in answer.output.splitlines() if line.startswith("- ")]
        assert len(self.lines) == 3
        self.soft_tokens = answer.output.splitlines()[-1] if "as text:" in answer.output else ""

    def quoted(self, start):
        """What stands between backticks in the line that begins so."""
        (line,) = (line for line in self.lines if line.startswith(start))
        return re.findall("`([^`]+)`", line)

    def expected(self, softprompts):
        """What transformers writes after the text, which differs with a soft prompt and without."""
        texts = [self._written(each) for each in (softprompts, [] if softprompts else [self.softprompt])]
        assert texts[0] != texts[1]
        return texts[0]

    def _written(self, softprompts):
        decoder = Decoder("model.gguf", 512)
        ids = torch.tensor([decoder.ids_of(TEXT)])
        with attach(self.model).override(softprompts), torch.no_grad():
            made = self.model.generate(ids, attention_mask=ids > 0, max_new_tokens=LENGTH, do_sample=False)
        text = decoder.text_of(made[0].tolist())[len(decoder.text_of(ids[0].tolist())) :]
        decoder.close()
        return text


@pytest.fixture(params=["before_bos", "after_bos"])
def exported(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda family, to, *options: Exported(tmp_path, family, to, *options, order=request.param)


@contextmanager
def running(command):
    """A llama-server that was started by this command line, as it is but for its program's path and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name, *options = shlex.split(command)
    assert name == "llama-server"
    process = subprocess.Popen(
        [PROGRAM, *options, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LLAMA_ARG_THREADS": "1"},  # on a busy machine they would wait for each other
    )
    remote = Remote(f"http://127.0.0.1:{port}")
    try:
        for _ in range(600):
            try:
                remote.ask("/health")
                break
            except EngineUnreachable:
                assert process.poll() is None, "it did not start"
                time.sleep(0.1)
        yield remote
    finally:
        process.terminate()
        process.wait()


@needs_server
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_lora_in_llama_server(exported, family):
    made = exported(family, "lora")
    command, body, off = made.quoted("llama-server: ")
    with running(command) as remote:
        body = {**json.loads(body), **GREEDY}
        assert remote.ask("/completion", body, SECONDS)["content"] == made.expected([made.softprompt])
        plain = {**json.loads(f"{{{off}}}"), "prompt": TEXT, **GREEDY}
        assert remote.ask("/completion", plain, SECONDS)["content"] == made.expected([])


@needs_server
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_gguf_in_llama_server(exported, family):
    made = exported(family, "gguf")
    command, body = made.quoted("llama-server: ")
    with running(command) as remote:
        body = {**json.loads(body), **GREEDY}
        assert remote.ask("/completion", body, SECONDS)["content"] == made.expected([made.softprompt])
        typed = {"prompt": made.soft_tokens + TEXT, **GREEDY}
        if made.softprompt.order == "after_bos":
            assert remote.ask("/completion", typed, SECONDS)["content"] == made.expected([made.softprompt])
        assert remote.ask("/completion", {"prompt": TEXT, **GREEDY}, SECONDS)["content"] == made.expected([])


@needs_server
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_llama_server_never_draws_the_soft_tokens_of_a_copy(exported, family):
    made = exported(family, "gguf")
    command, body = made.quoted("llama-server: ")
    with running(command) as remote:
        wild = {"temperature": 100.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "n_predict": 400}
        wild.update(seed=1, ignore_eos=True, return_tokens=True)
        drawn = remote.ask("/completion", {**json.loads(body), **wild}, SECONDS)["tokens"]
    assert len(set(drawn)) > 100 and max(drawn) < len(gguf_files.TOKENS)


@needs_server
@pytest.mark.parametrize("cache_type", ["f16", "f32"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_slot_in_llama_server(exported, family, cache_type):
    made = exported(family, "slot", "--cache-type", cache_type)
    command, restored = made.quoted("llama-server: ")
    (body,) = made.quoted("then POST to /completion ")
    (least,) = re.findall(r"timings\.cache_n is at least (\d+)", made.lines[2])
    with running(command) as remote:
        for _ in range(2):
            remote.ask("/completion", {"prompt": "Something else", **GREEDY}, SECONDS)
            remote.ask("/slots/0?action=restore", json.loads(restored))
            answer = remote.ask("/completion", {**json.loads(body), **GREEDY}, SECONDS)
            assert answer["timings"]["cache_n"] >= int(least)
            assert answer["content"] == made.expected([made.softprompt])


@pytest.mark.parametrize(
    ("family", "to"), [("llama", "lora"), ("qwen3", "lora"), ("llama", "gguf"), ("gemma2", "gguf"), ("gemma3", "gguf")]
)
def test_llama_cpp_python(exported, family, to):
    made = exported(family, to)
    (program,) = made.quoted("llama-cpp-python: ")
    call = "llm.create_completion("
    assert program.count(call) == 1 and program.endswith(")")
    names = {}
    with redirect_stderr(io.StringIO()):
        exec(program, names)  # as it stands: that it runs
        again = program[program.index(call) : -1] + f", temperature=0.0, max_tokens={LENGTH})"
        text = eval(again, names)["choices"][0]["text"]
    names["llm"].close()
    assert text == made.expected([made.softprompt]).replace("\ufffd", "")  # it leaves out what is no character
