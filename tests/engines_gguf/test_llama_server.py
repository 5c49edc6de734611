"""An unmodified llama-server; its program's path is in the environment variable ``KOBOLD_SP_LLAMA_SERVER``."""

import socket
import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
import gguf_files
from llama_servers import EXACT, PROGRAM, Server, softprompt
from serving import GREEDY, asking, eventually, outlives

from kobold_sp_plugin.engines import GenerationSettings, Tokenizing
from kobold_sp_plugin.engines.llama_cpp import LlamaCppEngine
from kobold_sp_plugin.engines.llama_server import LlamaServerEngine, _request
from kobold_sp_plugin.engines.samplers import samplers
from kobold_sp_plugin.errors import (
    EngineRefused,
    EngineUnreachable,
    SoftPromptNotRead,
    UnknownSoftPrompt,
    UnsupportedCall,
    WrongModel,
)
from kobold_sp_plugin.server import app as host
from kobold_sp_plugin.server.generation_queue import GenerationQueue
from kobold_sp_plugin.session import Session

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not PROGRAM, reason="KOBOLD_SP_LLAMA_SERVER names no llama-server"),
]


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


@pytest.fixture(scope="module")
def in_process(llama):
    engine = LlamaCppEngine(llama.model, cache_type="f32")
    yield engine
    engine.close()


DRAWN = {
    "temperature": {"temperature": 1.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.5},
    "min-p": {"min_p": 0.3},
    "typical": {"typical": 0.4},
    "repetition penalty": {"rep_pen": 1.5},
    "its range": {"rep_pen": 1.5, "rep_pen_range": 4},
    "a range that would reach what stands for soft tokens": {"rep_pen": 1.5, "rep_pen_range": 400},
    "logit bias": {"logit_bias": ((310, 5.0), (311, -100.0))},
    "a banned letter": {"bad_words": ("o",)},
    "no end": {"logit_bias": ((2, 10.0),), "ban_eos": True},
    "an order": {"top_p": 0.7, "temperature": 2.0, "rep_pen": 1.3, "sampler_order": (5, 0, 1, 2, 3, 4, 6)},
    "the usual order": {"top_p": 0.9, "top_k": 20, "typical": 0.9, "temperature": 0.6, "rep_pen": 1.1},
}
NAMED = {
    "top-a": {"top_a": 0.2},
    "tail free": {"tfs": 0.9},
    "slope": {"rep_pen": 1.1, "rep_pen_range": 100, "rep_pen_slope": 0.7},
    "OpenAI's penalties": {"presence_penalty": 1.0},
    "a banned word": {"bad_words": ("the",)},
}


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


def test_it_dies_in_the_middle_of_a_text_and_comes_back(llama, tmp_path):
    (tmp_path / "slots").mkdir()
    for seed, name in enumerate(("noir", "sea")):
        softprompt(seed).save(tmp_path / f"{name}.zip")
    program = Server(llama.model, tmp_path / "slots", "-np", "1", *EXACT)
    session = Session(tmp_path, program.engine())
    try:
        with host.Server(session, port=0) as server:
            outlives(server, program.process.kill, {"prompt": "The door", "max_length": 400, "ban_eos_token": True})
            program.close()
            program = Server(llama.model, tmp_path / "slots", "-np", "1", *EXACT, port=program.port)
            ask = asking(server)
            assert ask("POST", "/api/v1/generate", GREEDY).text
            ask("PUT", "/api/extra/softprompts", {"selection": ["sea.zip"]})
            eventually(lambda: session.effect is not None)
            assert session.status()["notice"] == ""

            # Somebody starts it with another model of the same shape but another vocabulary.
            program.close()
            smaller = gguf_files.write(gguf_files.tiny("qwen3"), tmp_path / "other.gguf")
            with pytest.raises(WrongModel):
                program = Server(smaller, tmp_path / "slots", "-np", "1", *EXACT, port=program.port)
                LlamaServerEngine(program.url, llama.model, tmp_path / "slots")
            answer = ask("POST", "/api/v1/generate", GREEDY)
            assert answer.status == 500 and "other.gguf loaded, and not" in answer.json["detail"]["msg"]
            assert session.selection == ("sea.zip",)
    finally:
        session.close()
        program.close()


class TestSamplers:
    """What is left to be drawn from, and how likely, is what KoboldAI's samplers leave."""

    def left(self, server, stack, **given):
        """The probabilities of the next token, as the server draws from them; behind soft prompts."""
        engine = server.engine()
        settings = GenerationSettings("The door opened and", **{"temperature": 1.0, "top_p": 1.0, **given})
        ids = engine.token_ids(settings.prompt)
        said = ()
        for seed in range(50):  # they are told only where a token is drawn that is a whole character
            settings = replace(settings, seed=seed)
            request = {**_request(settings, engine.context, engine._banned(settings.bad_words)), "n_predict": 1}
            request.update(n_probs=2 * len(gguf_files.TOKENS), post_sampling_probs=True)
            answers = list(engine._stream(request, stack, ids, threading.Event()))
            said = [each for answer in answers for each in answer.get("completion_probabilities") or ()]
            if said:
                break
        found = torch.zeros(len(gguf_files.TOKENS))
        for each in said[0]["top_probs"]:
            found[each["id"]] = each["prob"]
        return settings, ids, engine, found

    @pytest.mark.parametrize("order", ["before_bos", "after_bos"])
    @pytest.mark.parametrize("name", DRAWN)
    def test_each_does_what_koboldai_says(self, llama, in_process, name, order):
        stack = [softprompt(order=order)]
        settings, ids, engine, found = self.left(llama, stack, **DRAWN[name])
        assert engine.lacking(settings) == ()
        logits = torch.tensor(in_process.logits(ids, stack))[None]
        chosen = samplers(settings, len(ids), (2,), in_process.token_texts, False)
        expected = chosen(torch.tensor([ids]), logits).softmax(-1)[0]
        # Of tokens that are as likely as each other, which a cut goes between, either may be the one that stays.
        assert (found.sort().values - expected.sort().values).abs().max() < 1e-4
        in_both = (found > 0) & (expected > 0)
        assert in_both.any() and (found - expected)[in_both].abs().max() < 1e-4

    @pytest.mark.parametrize("name", NAMED)
    def test_what_it_does_not_do_is_named(self, llama, name):
        settings = GenerationSettings("The", **{"temperature": 1.0, "top_p": 1.0, **NAMED[name]})
        assert len(llama.engine().lacking(settings)) == 1

    def test_the_same_seed_gives_the_same_text(self, llama):
        texts = [text_of(llama.engine(), [softprompt()], temperature=1.0, top_p=1.0, seed=seed) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_a_banned_letter_never_comes(self, llama):
        drawn = {"temperature": 1.5, "top_p": 1.0, "seed": 1, "max_length": 200, "ban_eos": True}
        assert "e" in text_of(llama.engine(), [softprompt()], **drawn)
        assert "e" not in text_of(llama.engine(), [softprompt()], **drawn, bad_words=("E",)).lower()


def test_what_is_no_llama_server(llama):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        thread = threading.Thread(target=lambda: silent.accept()[0].close())
        thread.start()
        with pytest.raises(EngineUnreachable):
            LlamaServerEngine(f"http://127.0.0.1:{silent.getsockname()[1]}", llama.model, llama.folder)
        thread.join()
