"""An unmodified llama-server; its program's path is in the environment variable ``KOBOLD_SP_LLAMA_SERVER``."""

import os
import socket
import subprocess
import threading
import time
from contextlib import closing

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
import gguf_files

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.engines import GenerationSettings, Tokenizing
from kobold_sp_plugin.engines.llama_cpp import LlamaCppEngine
from kobold_sp_plugin.engines.llama_server import LlamaServerEngine
from kobold_sp_plugin.errors import (
    EngineRefused,
    EngineUnreachable,
    SoftPromptNotRead,
    UnknownSoftPrompt,
    UnsupportedCall,
    WrongModel,
)
from kobold_sp_plugin.server.generation_queue import GenerationQueue
from kobold_sp_plugin.session import Session

PROGRAM = os.environ.get("KOBOLD_SP_LLAMA_SERVER")
pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not PROGRAM, reason="KOBOLD_SP_LLAMA_SERVER names no llama-server"),
]

EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "--swa-full", "--cache-ram", "0")


def softprompt(seed=1, n_tokens=37, **options):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, gguf_files.WIDTH)).astype(np.float32) * 0.3
    return SoftPrompt(rows, {"name": "noir"}, **options)


class Server:
    """A llama-server with one model, on a free port."""

    def __init__(self, model, folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.model, self.folder = f"http://127.0.0.1:{port}", str(model), folder
        command = [PROGRAM, "-m", self.model, "--port", str(port), "--slot-save-path", f"{folder}/", "-c", "512"]
        command += ["-t", "1", "-tb", "1", "--no-warmup", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                return self.engine() and None
            except EngineUnreachable:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def engine(self, **options):
        return LlamaServerEngine(self.url, self.model, self.folder, **{"cache_type": "f32", **options})

    def close(self):
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "gemma3"])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    path = gguf_files.write(gguf_files.tiny(request.param), folder / "model.gguf")
    made = Server(path, folder, "-np", "1", *EXACT)
    yield made
    made.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    path = gguf_files.write(gguf_files.tiny("llama"), folder / "model.gguf")
    made = Server(path, folder, "-np", "1", *EXACT)
    yield made
    made.close()


def text_of(engine, softprompts=(), prompt="The door opened and", **settings):
    settings = {"temperature": 0.0, "max_length": 20, **settings}
    return "".join(engine.generate(GenerationSettings(prompt, **settings), softprompts))


def test_text_and_effect_are_those_of_the_engine_in_process(server):
    engine, own = server.engine(), LlamaCppEngine(server.model, cache_type="f32")
    stacks = [(), (softprompt(),), (softprompt(order="after_bos"),), (softprompt(2, 5), softprompt(3, 4)), ()]
    for stack in [*stacks, *reversed(stacks)]:
        assert text_of(engine, stack) == text_of(own, stack)
    assert engine.effect([softprompt()]) == pytest.approx(own.effect([softprompt()]), abs=1e-2)
    own.close()


def test_soft_prompts_in_the_text(llama):
    engine = llama.engine()
    expected = text_of(engine, [softprompt()])
    assert text_of(engine, prompt=softprompt() + "The door opened and") == expected
    assert text_of(engine, memory=softprompt() + "") == expected
    with pytest.raises(UnsupportedCall, match="in front of a text only"):
        text_of(engine, prompt="The door " + softprompt() + "opened and")


def test_how_it_ended_and_what_it_counts(llama):
    engine, own = llama.engine(), LlamaCppEngine(llama.model, cache_type="f32")
    assert isinstance(engine, Tokenizing)
    for text in ("The door", "", softprompt() + "The door"):
        assert engine.token_ids(text) == own.token_ids(text)
    assert engine.chat_prompt([{"role": "user", "content": "The door"}]) is None
    whole = text_of(engine, [softprompt()])
    for settings in ({}, {"stop_sequence": (whole[8:10],)}, {"stop_sequence": (whole[8:10],), "keep_stop": True}):
        told = []
        for each in (engine, own):
            settings = {"temperature": 0.0, "max_length": 20, **settings}
            pieces, text = each.generate(GenerationSettings("The door opened and", **settings), [softprompt()]), ""
            while True:
                try:
                    text += next(pieces)
                except StopIteration as end:
                    told.append((text, end.value.reason, end.value.n_prompt))
                    break
        assert told[0] == told[1]
    own.close()


def asked(engine, monkeypatch):
    paths = []
    ask = engine._ask
    monkeypatch.setattr(engine, "_ask", lambda path, *given: (paths.append(path), ask(path, *given))[1])
    return paths


def test_the_state_is_restored_when_it_is_not_there_any_more(llama, monkeypatch):
    engine, other = llama.engine(), llama.engine()
    expected = text_of(engine, [softprompt()])
    paths = asked(engine, monkeypatch)
    assert text_of(engine, [softprompt()]) == expected
    assert not [path for path in paths if "slots" in path], "what the slot holds is used as it is"
    text_of(other, prompt="Somebody else came in")
    assert text_of(engine, [softprompt()]) == expected
    assert "/slots/0?action=restore" in paths


def test_what_is_stopped_before_its_first_word_proves_nothing(llama, monkeypatch):
    engine = llama.engine()
    expected = text_of(engine, [softprompt()])
    text_of(llama.engine(), prompt="Somebody else came in")
    complete = engine._completion

    def stopped(body, stop):  # the server has read the ids, as ordinary tokens, when the client goes
        with closing(complete(body, stop)) as parts:
            next(parts)
        stop.set()
        yield from ()

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_completion", stopped)
        assert text_of(engine, [softprompt()]) == ""
    assert text_of(engine, [softprompt()]) == expected


def test_an_answer_without_the_soft_prompt_is_never_shown(llama, monkeypatch):
    engine = llama.engine()
    monkeypatch.setattr(engine, "_restore", lambda slot: None)  # as if the server had lost it
    text_of(engine)
    shown = []
    with pytest.raises(SoftPromptNotRead, match="its answer is not shown"):
        for piece in engine.generate(GenerationSettings("The door"), [softprompt(9)]):
            shown.append(piece)
    assert shown == []
    assert text_of(llama.engine(), [softprompt(9)]) != text_of(llama.engine(), [])


def test_other_cache_types_are_refused_with_advice(llama):
    (llama.folder / "other").mkdir(exist_ok=True)
    engine = LlamaServerEngine(llama.url, llama.model, llama.folder / "other", cache_type="f32")
    with pytest.raises(EngineRefused, match="--slot-save-path"):
        text_of(engine, [softprompt(11)])


def test_a_state_that_nothing_can_make(llama, monkeypatch, tmp_path):
    from kobold_sp_plugin.errors import MissingLibrary

    def missing(*_):
        raise MissingLibrary("not installed")

    monkeypatch.setattr("kobold_sp_plugin.engines.llama_server.write_slot", missing)
    with pytest.raises(UnknownSoftPrompt, match="kobold-sp export --to slot"):
        LlamaServerEngine(llama.url, llama.model, tmp_path).select([softprompt(12)])


def test_the_wrong_model(llama, tmp_path):
    other = gguf_files.write(gguf_files.tiny("qwen3"), tmp_path / "other.gguf")
    with pytest.raises(WrongModel, match=r"model.gguf loaded, and not .*other.gguf"):
        LlamaServerEngine(llama.url, other, tmp_path)


def test_stopping_ends_it_in_the_server_too(llama):
    engine, stop = llama.engine(), threading.Event()
    pieces = engine.generate(GenerationSettings("The door", max_length=450, temperature=0.0), [softprompt()], stop)
    next(pieces)
    stop.set()
    assert len(list(pieces)) <= 1
    assert text_of(engine, max_length=3)


def test_a_server_that_is_down_is_an_error_and_the_session_goes_on(llama, tmp_path):
    folder = tmp_path / "slots"
    folder.mkdir()
    server = Server(llama.model, folder, "-np", "1", *EXACT)
    engine = server.engine()
    softprompt().save(tmp_path / "noir.zip")
    session, queue = Session(tmp_path, engine), GenerationQueue()
    try:
        session.select("noir.zip")
        server.close()
        failed = queue.submit(engine, GenerationSettings("The door"), session.softprompts)
        assert failed.finished.wait(20)
        assert isinstance(failed.error, EngineUnreachable) and "No answer from" in str(failed.error)
        assert session.selection == ("noir.zip",)
        session.select("")
        session.use(llama.engine())
        works = queue.submit(session.engine, GenerationSettings("The door", max_length=3, temperature=0.0), ())
        assert works.finished.wait(20) and works.error is None
    finally:
        queue.close()
        session.close()
        server.close()


def test_what_is_no_llama_server(llama):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        thread = threading.Thread(target=lambda: silent.accept()[0].close())
        thread.start()
        with pytest.raises(EngineUnreachable):
            LlamaServerEngine(f"http://127.0.0.1:{silent.getsockname()[1]}", llama.model, llama.folder)
        thread.join()
