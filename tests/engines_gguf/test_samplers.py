"""What front ends send besides temperature, top-p and top-k, in the engines that read GGUF files."""

import os
import socket
import subprocess
import time

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
import gguf_files

from kobold_sp_plugin.engines import GenerationSettings
from kobold_sp_plugin.engines.llama_cpp import LlamaCppEngine
from kobold_sp_plugin.engines.llama_server import LlamaServerEngine
from kobold_sp_plugin.errors import EngineUnreachable

pytestmark = pytest.mark.llama_cpp

PROGRAM = os.environ.get("KOBOLD_SP_LLAMA_SERVER")
PROMPT = "The door opened and"
DRAWN = {"temperature": 1.0, "top_p": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(gguf_files.write(gguf_files.tiny("llama"), tmp_path_factory.mktemp("model") / "model.gguf"))


@pytest.fixture(scope="module", params=["in process", "llama-server"])
def engine(request, path, tmp_path_factory):
    if request.param == "in process":
        made = LlamaCppEngine(path, cache_type="f32")
        yield made
        made.close()
        return
    if not PROGRAM:
        pytest.skip("KOBOLD_SP_LLAMA_SERVER names no llama-server")
    folder = tmp_path_factory.mktemp("slots")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PROGRAM, "-m", path, "--port", str(port), "--slot-save-path", f"{folder}/", "-c", "512", "-np", "1"]
    process = subprocess.Popen(
        [*command, "-t", "1", "-tb", "1", "--no-warmup"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            try:
                made = LlamaServerEngine(f"http://127.0.0.1:{port}", path, folder)
                break
            except EngineUnreachable:
                time.sleep(0.1)
        yield made
    finally:
        process.terminate()
        process.wait()


def written(engine, **settings):
    """(text, how it ended)."""
    settings = {"temperature": 0.0, "max_length": 12, **settings}
    pieces, text = engine.generate(GenerationSettings(PROMPT, **settings), ()), ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            return text, end.value


def text_of(engine, **settings):
    return written(engine, **settings)[0]


@pytest.fixture(scope="module")
def greedy(engine):
    return text_of(engine)


def test_a_bias_is_added(engine, greedy):
    token = engine.token_ids("Q")[-1]
    assert text_of(engine, logit_bias=((token, 100.0),)) == 12 * engine.token_text(token)


def test_the_end_can_be_banned(engine):
    end = engine.token_ids("</s>")[-1]
    likely = {"logit_bias": ((end, 100.0),), "max_length": 3}
    assert written(engine, **likely)[1].n_new <= 1
    assert written(engine, **likely, ban_eos=True)[1] == written(engine, max_length=3)[1]


def test_min_p_of_one_leaves_the_likeliest(engine, greedy):
    assert text_of(engine, **DRAWN, min_p=1.0) == greedy != text_of(engine, **DRAWN)


def test_the_order_is_the_clients(engine, greedy):
    """A high temperature makes every token as likely as any: what cuts before it knows better than what cuts after."""
    hot = {**DRAWN, "temperature": 1000.0, "min_p": 0.999}
    assert text_of(engine, **hot, sampler_order=(6, 0, 1, 2, 3, 4, 5)) == greedy
    assert text_of(engine, **hot, sampler_order=(6, 5, 0, 1, 2, 3, 4)) != greedy


def test_the_repetition_penalty_has_a_range(engine, greedy):
    token = engine.token_ids("Q")[-1]
    likely = {"logit_bias": ((token, 20.0),), "rep_pen": 100.0, "max_length": 8}
    everywhere, last = text_of(engine, **likely), text_of(engine, **likely, rep_pen_range=1)
    q = engine.token_text(token)
    assert everywhere.count(q) == 1 and last.count(q) == 4


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_openais_penalties(engine, greedy, name):
    token = engine.token_ids("Q")[-1]
    likely = {"logit_bias": ((token, 20.0),), "max_length": 8}
    q = engine.token_text(token)
    assert text_of(engine, **likely).count(q) == 8 and text_of(engine, **likely, **{name: 100.0}).count(q) == 1
