"""llama.cpp in this process, and the files that we export, beside transformers with the same weights."""

import ctypes
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
import gguf_files

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.engines import GenerationSettings, Tokenizing
from kobold_sp_plugin.engines.gguf_model import token_texts
from kobold_sp_plugin.engines.llama_bindings import Decoder, library
from kobold_sp_plugin.engines.llama_cpp import LlamaCppEngine
from kobold_sp_plugin.engines.samplers import samplers
from kobold_sp_plugin.errors import ContextExceeded, ModelError, NoModel, WidthMismatch
from kobold_sp_plugin.export import lora, model_copy, slot
from kobold_sp_plugin.gguf.reading import read
from kobold_sp_plugin.session import Session
from kobold_sp_plugin.soft_tokens.text import tokenised, without_soft_tokens
from kobold_sp_plugin.softprompt import TaggedText

pytestmark = pytest.mark.llama_cpp

PROMPT = "The door opened and"
NOTICEABLE = 1e-3
GREEDY = {"temperature": 0.0, "max_length": 20}


def softprompt(seed=1, n_tokens=37, **options):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, gguf_files.WIDTH)).astype(np.float32) * 0.3
    return SoftPrompt(rows, {"name": "noir"}, **options)


class Pair:
    """A model in transformers, its file, and an engine for that, all in float32."""

    def __init__(self, family, folder):
        self.model = gguf_files.tiny(family)
        self.path = str(gguf_files.write(self.model, folder / "model.gguf"))
        self.engine = LlamaCppEngine(self.path, cache_type="f32")
        self.ids = self.engine._decoder.ids_of(PROMPT)

    def logits(self, softprompts):
        handle = attach(self.model)
        with handle.override(softprompts), torch.no_grad():
            return self.model(**handle.prepend(torch.tensor([self.ids]))).logits[0, -1].numpy()

    def text(self, softprompts, length=20):
        ids = torch.tensor([self.ids])
        with attach(self.model).override(softprompts), torch.no_grad():
            made = self.model.generate(ids, attention_mask=ids > 0, max_new_tokens=length, do_sample=False)
        text_of = self.engine._decoder.text_of
        return text_of(made[0].tolist())[len(text_of(self.ids)) :]


@pytest.fixture(scope="module", params=gguf_files.FAMILIES)
def pair(request, tmp_path_factory):
    made = Pair(request.param, tmp_path_factory.mktemp("model"))
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    made = Pair("llama", tmp_path_factory.mktemp("model"))
    yield made
    made.engine.close()


def text_of(engine, softprompts=(), prompt=PROMPT, **settings):
    return "".join(engine.generate(GenerationSettings(prompt, **{**GREEDY, **settings}), softprompts))


STACKS = {
    "none": [],
    "before the beginning": [softprompt()],
    "after the beginning": [softprompt(order="after_bos")],
    "as the module gives them": [softprompt(scale="module")],
    "one of each": [softprompt(2, 3, order="after_bos"), softprompt(3, 5)],
}


@pytest.mark.parametrize("name", STACKS)
def test_it_is_as_in_transformers(pair, name):
    stack = STACKS[name]
    assert np.abs(pair.engine.logits(pair.ids, stack) - pair.logits(stack)).max() < NOTICEABLE
    assert text_of(pair.engine, stack) == pair.text(stack)
    assert text_of(pair.engine, stack) == pair.text(stack), "once more, from what was kept"


@pytest.mark.parametrize("name", STACKS)
def test_what_is_left_of_a_difference_is_how_gelu_is_computed(pair, name):
    stack = STACKS[name]
    with gguf_files.as_llama_cpp_computes(pair.model):
        assert np.abs(pair.engine.logits(pair.ids, stack) - pair.logits(stack)).max() < 1e-4


def test_a_copy_of_the_model_reads_its_soft_tokens_as_the_rows(pair, tmp_path):
    made = model_copy.export(softprompt(), pair.path, tmp_path / "copy.gguf")
    copy = LlamaCppEngine(made.path, cache_type="f32")
    try:
        decoder = copy._decoder
        assert decoder.ids_of(made.text, begin=False) == list(made.tokens), "they can be typed"
        count = len(gguf_files.TOKENS)
        read = copy.logits([*made.tokens, *pair.ids])
        assert np.abs(read[:count] - pair.logits([softprompt()])).max() < NOTICEABLE
        assert np.abs(copy.logits(pair.ids)[:count] - pair.logits([])).max() < NOTICEABLE
        behind = SoftPrompt(softprompt().rows, order="after_bos")
        assert text_of(copy, prompt=made.text + PROMPT) == pair.text([behind]), "typed, they stand behind the beginning"
    finally:
        copy.close()


def test_soft_tokens_of_a_copy_are_never_drawn(llama, tmp_path):
    made = model_copy.export(softprompt(), llama.path, tmp_path / "copy.gguf")
    copy = LlamaCppEngine(made.path)
    try:
        drawn = []
        add = type(copy._decoder).read_ids
        copy._decoder.read_ids = lambda ids, *where: (drawn.extend(ids), add(copy._decoder, ids, *where))
        for seed in range(3):
            text_of(copy, temperature=100.0, top_p=1.0, max_length=100, seed=seed)
        assert len(drawn) > 250 and max(drawn) < len(gguf_files.TOKENS)
    finally:
        copy.close()


def test_an_adapter_gives_reserved_tokens_the_rows(pair, tmp_path):
    if pair.model.config.tie_word_embeddings:
        pytest.skip("refused: a tied model")
    made = lora.export(softprompt(), pair.path, tmp_path / "lora.gguf")
    llama, decoder = library(), Decoder(pair.path, 512, cache_type="f32")
    try:
        adapter = llama.llama_adapter_lora_init(decoder.model, made.path.encode())
        scales = (ctypes.c_float * 1)(1.0)
        llama.llama_set_adapters_lora(decoder.context, (llama.llama_adapter_lora_p_ctypes * 1)(adapter), 1, scales)
        decoder.read_ids([*made.tokens, *pair.ids], 0)
        assert np.abs(decoder.logits() - pair.logits([softprompt()])).max() < NOTICEABLE
    finally:
        decoder.close()


def test_a_saved_state_stands_for_the_rows(pair, tmp_path):
    for order in ("before_bos", "after_bos"):
        wanted = softprompt(order=order)
        made = slot.export(wanted, pair.path, tmp_path / "noir.slot", "f32")
        llama, decoder = library(), Decoder(pair.path, 512, cache_type="f32")
        try:
            ids, count = (ctypes.c_int32 * 512)(), ctypes.c_size_t()
            path = str(tmp_path / "noir.slot").encode()
            assert llama.llama_state_seq_load_file(decoder.context, path, 0, ids, 512, ctypes.byref(count))
            assert tuple(ids[: count.value]) == made.tokens
            decoder.read_ids(pair.ids[order == "after_bos" :], count.value)
            assert np.abs(decoder.logits() - pair.logits([wanted])).max() < NOTICEABLE
        finally:
            decoder.close()


class TestSoftPromptsInText:
    """What stands in the text is read there, as transformers reads it."""

    NOIR, SEA = softprompt(4, 6), softprompt(5, 9, order="after_bos")

    def expected(self, pair, parts, length=20):
        """Of transformers, from the same ids: those of the words, and soft tokens between them."""
        decoder, handle = pair.engine._decoder, attach(pair.model)
        ids = [1]
        for part in parts:
            ids += tokenised(part, lambda text: decoder.ids_of(text, begin=False))
        made = torch.tensor([ids])
        with torch.no_grad(), handle.override([]):
            made = pair.model.generate(made, attention_mask=made >= 0, max_new_tokens=length, do_sample=False)
        text_of = decoder.text_of
        before = without_soft_tokens(ids)
        return text_of(without_soft_tokens(made[0].tolist()))[len(text_of(before)) :]

    def test_in_the_middle_and_at_the_end(self, pair):
        for text, parts in [
            ("The door " + self.NOIR + " opened and", ["The door ", self.NOIR, "opened and"]),
            ("The" + self.NOIR + self.SEA + "door" + self.NOIR, ["The", self.NOIR, self.SEA, "door", self.NOIR]),
        ]:
            expected = self.expected(pair, parts)
            assert text_of(pair.engine, prompt=text) == expected
            assert text_of(pair.engine, prompt=text) == expected, "once more, with the story known"

    def test_in_front_it_is_as_one_that_is_selected(self, llama):
        for stack in ([self.NOIR], [self.SEA], [self.NOIR, self.SEA]):
            text = TaggedText([*stack, PROMPT])
            expected = text_of(llama.engine, stack)
            assert text_of(llama.engine, prompt=text) == expected != text_of(llama.engine)
            assert text_of(llama.engine, memory=TaggedText(stack)) == expected
        assert text_of(llama.engine, [self.SEA], self.NOIR + PROMPT) == text_of(llama.engine, [self.SEA, self.NOIR])

    def test_a_story_that_goes_on_is_not_read_again(self, llama, monkeypatch):
        rows, read = [], Decoder.read_rows
        monkeypatch.setattr(Decoder, "read_rows", lambda *given: (rows.append(len(given[1])), read(*given)))
        text = "The rain " + self.NOIR + "was in the door"
        text_of(llama.engine, prompt=text, max_length=1)
        text_of(llama.engine, prompt=text + " and he said", max_length=1)
        assert rows == [6]

    def test_the_oldest_text_goes_and_the_soft_prompt_stays(self, llama, monkeypatch):
        rows, read = [], Decoder.read_rows
        monkeypatch.setattr(Decoder, "read_rows", lambda *given: (rows.append(len(given[1])), read(*given)))
        long = "The rain was in the door. " * 60
        assert text_of(llama.engine, prompt=long + self.NOIR + long, max_length=5)
        assert rows == [6]

    def test_another_width_is_refused(self, llama):
        with pytest.raises(WidthMismatch):
            text_of(llama.engine, prompt="The " + SoftPrompt(np.zeros((1, 8), np.float32)) + "door")


DRAWN = {
    "temperature": {"temperature": 1.6},
    "top-k": {"top_k": 3},
    "top-a": {"top_a": 8.0},
    "top-p": {"top_p": 0.5},
    "min-p": {"min_p": 0.3},
    "tail free": {"tfs": 0.5},
    "typical": {"typical": 0.4},
    "repetition penalty": {"rep_pen": 1.5},
    "its range and slope": {"rep_pen": 4.0, "rep_pen_range": 20, "rep_pen_slope": 2.0},
    "OpenAI's penalties": {"presence_penalty": 2.0, "frequency_penalty": 1.0},
    "logit bias": {"logit_bias": ((310, 5.0), (311, -100.0))},
    "banned words": {"bad_words": ("k", "bj", "o")},
    "an order": {"top_p": 0.7, "temperature": 2.0, "rep_pen": 1.3, "sampler_order": (5, 0, 1, 2, 3, 4, 6)},
    "KoboldAI's own": {"temperature": 0.5, "top_p": 0.9, "rep_pen": 1.1, "rep_pen_range": 1024, "rep_pen_slope": 0.7},
}


class TestSamplers:
    """With a seed, drawing gives the text that transformers gives with the same samplers."""

    def expected(self, llama, settings, stack):
        decoder, ids = llama.engine._decoder, torch.tensor([llama.ids])
        chosen = samplers(settings, ids.shape[1], decoder.ends(), llama.engine.token_texts, False)
        torch.manual_seed(settings.seed)
        off = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": 2}
        with attach(llama.model).override(stack), torch.no_grad(), torch.random.fork_rng():
            made = llama.model.generate(
                ids, attention_mask=ids > 0, max_new_tokens=settings.max_length, logits_processor=chosen, **off
            )
        return decoder.text_of(made[0].tolist())[len(decoder.text_of(llama.ids)) :]

    @pytest.mark.parametrize("name", DRAWN)
    def test_each_does_what_koboldai_says(self, llama, name):
        settings = {"temperature": 1.0, "top_p": 1.0, "max_length": 40, "seed": 5}
        stack = [softprompt()]
        found = text_of(llama.engine, stack, **{**settings, **DRAWN[name]})
        assert found == self.expected(llama, GenerationSettings(PROMPT, **{**settings, **DRAWN[name]}), stack)
        assert found != text_of(llama.engine, stack, **settings), "it makes a difference"

    def test_the_end_can_be_banned(self, llama):
        settings = {"temperature": 1.0, "top_p": 1.0, "max_length": 40, "seed": 5}
        wants_to_end = {**settings, "logit_bias": ((2, 100.0),)}
        assert text_of(llama.engine, **wants_to_end) == ""
        assert text_of(llama.engine, **wants_to_end, ban_eos=True) == text_of(llama.engine, **settings)

    def test_what_tokens_add_to_a_text_is_read_from_the_file_as_well(self, llama):
        assert token_texts(read(llama.path)) == llama.engine.token_texts()


class TestEngine:
    def test_the_rows_are_read_once(self, llama, monkeypatch):
        rows = []
        read = Decoder.read_rows
        monkeypatch.setattr(Decoder, "read_rows", lambda *given: (rows.append(len(given[1])), read(*given)))
        chosen = [softprompt(7, 11)]
        for prompt in ("The rain", "She said", "The rain came", "He"):
            text_of(llama.engine, chosen, prompt)
        llama.engine.effect(chosen)
        assert sum(rows) == 11

    def test_a_story_that_goes_on_is_not_read_again(self, llama, monkeypatch):
        ids, read, first = [], Decoder.read_ids, "The rain was in the door"
        text_of(llama.engine, [softprompt()], first, max_length=1)
        monkeypatch.setattr(Decoder, "read_ids", lambda *given: (ids.append(len(given[1])), read(*given)))
        more = text_of(llama.engine, [softprompt()], first + " and he said", max_length=2)
        assert max(ids) < len(llama.engine._decoder.ids_of(first))
        text_of(llama.engine, [])
        assert text_of(llama.engine, [softprompt()], first + " and he said", max_length=2) == more

    def test_soft_prompts_that_take_turns_do_not_mix(self, llama):
        expected = {name: text_of(llama.engine, stack) for name, stack in STACKS.items()}
        for name in [*STACKS, *reversed(list(STACKS))]:
            assert text_of(llama.engine, STACKS[name]) == expected[name]

    def test_the_selection_is_a_snapshot(self, llama):
        llama.engine.select([softprompt()])
        pieces = llama.engine.generate(GenerationSettings(PROMPT, **GREEDY))
        llama.engine.select([])
        assert "".join(pieces) == llama.text([softprompt()])

    def test_seeds_and_samplers(self, llama):
        drawn = [
            text_of(llama.engine, temperature=1.0, top_p=0.95, top_k=50, typical=0.9, seed=seed) for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]
        assert text_of(llama.engine, top_k=1, temperature=1.0) == text_of(llama.engine)
        assert text_of(llama.engine, rep_pen=5.0) != text_of(llama.engine)

    def test_stop_sequences_and_stopping(self, llama):
        whole = text_of(llama.engine, max_length=60)
        end = whole[10:12]
        assert text_of(llama.engine, max_length=60, stop_sequence=(end,)) == whole[: whole.index(end)]
        stop = threading.Event()
        pieces = llama.engine.generate(GenerationSettings(PROMPT, max_length=400, temperature=0.0), stop=stop)
        next(pieces)
        stop.set()
        assert len(list(pieces)) <= 1
        pieces = llama.engine.generate(GenerationSettings(PROMPT, max_length=400, temperature=0.0))
        next(pieces)
        pieces.close()
        assert text_of(llama.engine) == llama.text([])

    def test_what_does_not_fit(self, llama):
        room = llama.engine.context
        with pytest.raises(ContextExceeded, match="37 of soft prompts"):
            text_of(llama.engine, [softprompt()], "the rain " * 10, max_length=room - 37)
        with pytest.raises(WidthMismatch):
            llama.engine.select([SoftPrompt(np.zeros((1, 8), np.float32))])
        assert text_of(llama.engine, [softprompt()], "the rain " * 1000, max_length=5), "the end of a long story"

    def test_how_it_ended_and_the_stop_sequence_that_is_kept(self, llama):
        def ending(**settings):
            pieces, text = (
                llama.engine.generate(GenerationSettings(PROMPT, **{**GREEDY, **settings}), [softprompt()]),
                "",
            )
            while True:
                try:
                    text += next(pieces)
                except StopIteration as end:
                    return text, end.value

        whole, ended = ending()
        assert ended == ("length", len(llama.ids), 20)
        text, ended = ending(stop_sequence=(whole[8:10],), keep_stop=True)
        assert text == whole[: whole.index(whole[8:10]) + 2]
        assert ended.reason == "stop" and ended.n_new < 20

    def test_a_server_can_count_and_converse(self, llama, tmp_path):
        assert isinstance(llama.engine, Tokenizing)
        assert llama.engine.token_ids(PROMPT) == llama.ids
        assert len(llama.engine.token_ids(softprompt() + PROMPT)) == 37 + len(llama.ids)
        messages = [{"role": "user", "content": "The door"}]
        assert llama.engine.chat_prompt(messages) is None
        template = "{{ bos_token }}{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}said"
        path = gguf_files.write(llama.model, tmp_path / "chat.gguf", template=template)
        engine = LlamaCppEngine(path)
        try:
            assert engine.chat_prompt(messages) == "user: The door\nsaid"
            assert engine.token_ids(engine.chat_prompt(messages)).count(1) == 1
        finally:
            engine.close()
        refusing = gguf_files.write(llama.model, tmp_path / "no.gguf", template="{{ raise_exception('no') }}")
        engine = LlamaCppEngine(refusing)
        try:
            assert engine.chat_prompt(messages) is None
        finally:
            engine.close()

    def test_an_effect(self, llama):
        effect = llama.engine.effect([softprompt()])
        assert 0.1 < effect < 1 and effect.entropy > 0
        assert llama.engine.effect([SoftPrompt(np.zeros((1, 64), np.float32))]) < effect

    def test_a_session_uses_it_and_a_closed_one_has_no_model(self, llama, tmp_path):
        engine = LlamaCppEngine(llama.path)
        softprompt().save(tmp_path / "noir.zip")
        session = Session(tmp_path, engine)
        session.select("noir.zip")
        assert [str(entry.verdict) for entry in session.entries()] == ["unproven"]
        assert text_of(engine, session.softprompts)
        session.close()
        engine.close()
        assert session.engine is None
        with pytest.raises(NoModel):
            text_of(engine)

    def test_a_file_that_llama_cpp_refuses(self, llama, tmp_path):
        data = bytearray(Path(llama.path).read_bytes())
        at = data.index(b"blk.0.attn_q.weight")
        data[at : at + 3] = b"xyz"
        (tmp_path / "broken.gguf").write_bytes(data)
        with pytest.raises(ModelError, match="cannot load"):
            LlamaCppEngine(tmp_path / "broken.gguf")
