import gc
import threading
import time
import weakref
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from models import FAMILY, tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.demonstration import MODEL
from kobold_sp_plugin.engines import Effect, GenerationSettings
from kobold_sp_plugin.engines import transformers as transformers_engine
from kobold_sp_plugin.engines.detokenizer import Detokenizer
from kobold_sp_plugin.engines.fitting import fit
from kobold_sp_plugin.engines.transformers import PROBES, TransformersEngine, load_transformers
from kobold_sp_plugin.errors import ContextExceeded, ModelError, NoModel, UnsupportedCall

GREEDY = {"temperature": 0.0}
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def softprompt(seed=0, n_tokens=5, width=32):
    return SoftPrompt(np.random.default_rng(seed).normal(size=(n_tokens, width)).astype(np.float32))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_model(FAMILY, eos_token_id=None)  # so that no text ends by chance


@pytest.fixture
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer, "tiny")


def text_of(engine, prompt="The door opened and", softprompts=None, **settings):
    return "".join(engine.generate(GenerationSettings(prompt, **{"max_length": 20, **settings}), softprompts))


def ids_of(model, tokenizer, prompt, softprompts=(), max_length=20):
    """What the model itself generates, greedily."""
    given = tokenizer(prompt, return_tensors="pt")
    ids = {name: given[name] for name in ("input_ids", "attention_mask")}
    with attach(model).override(softprompts), torch.no_grad():
        out = model.generate(**ids, max_new_tokens=max_length, do_sample=False, pad_token_id=0)
    return out[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("softprompts", [(), (softprompt(),)], ids=["plain", "with a soft prompt"])
def test_the_pieces_are_the_text_that_the_model_generates(engine, model, tokenizer, softprompts):
    prompt = "The door opened and"
    before = tokenizer(prompt)["input_ids"]
    after = before + ids_of(model, tokenizer, prompt, softprompts)
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, after)]
    assert text_of(engine, prompt, softprompts, **GREEDY) == decoded[1][len(decoded[0]) :]


def test_text_comes_while_it_is_generated(engine):
    arrived = []
    with closing(engine.generate(GenerationSettings("The door", max_length=30))) as pieces:
        for piece in pieces:
            arrived.append(piece)
    assert len(arrived) > 10
    assert all(arrived)


def test_a_selection_changes_the_text_and_its_end_restores_it(engine):
    plain = text_of(engine, **GREEDY)
    engine.select([softprompt()])
    assert text_of(engine, **GREEDY) != plain
    assert text_of(engine, softprompts=(), **GREEDY) == plain
    engine.select([])
    assert text_of(engine, **GREEDY) == plain


def test_a_generation_keeps_the_soft_prompts_that_it_was_asked_with(engine):
    engine.select([softprompt(1)])
    expected = text_of(engine, **GREEDY)
    pieces = engine.generate(GenerationSettings("The door opened and", max_length=20, **GREEDY))
    engine.select([softprompt(2)])
    text = next(pieces)
    engine.select([])
    assert text + "".join(pieces) == expected


def test_the_same_seed_gives_the_same_text_and_leaves_the_process_its_own(engine):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (text_of(engine, seed=seed, temperature=1.0) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.rand(3), expected)
    assert text_of(engine, temperature=1.0) != text_of(engine, temperature=1.0), "without a seed, texts differ"


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-5}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-3}, {"typical": 0.0, "rep_pen": 1.3}]
)
def test_extreme_settings_work(engine, settings):
    assert text_of(engine, **settings)


def test_an_end_of_sequence_token_ends_the_text(engine, model, tokenizer):
    ids = ids_of(model, tokenizer, "The door opened and")
    at = next(at for at in range(3, 20) if ids[at] not in ids[:at])
    whole = text_of(engine, **GREEDY)
    (getattr(model, "generation_config", None) or model.config).eos_token_id = ids[at]
    ended = text_of(engine, **GREEDY)
    assert whole.startswith(ended) and 0 < len(ended) < len(whole)


def test_sampling_is_said_in_full(engine, model):
    generation_config = getattr(model, "generation_config", None)
    if generation_config is None:
        pytest.skip("before generation_config")
    generation_config.top_k, generation_config.num_beams = 1, 1
    generation_config.do_sample = True
    assert len({text_of(engine, seed=seed, temperature=2.0, top_p=1.0) for seed in range(5)}) == 5


class TestStopping:
    def test_text_ends_before_a_stop_sequence_and_none_of_it_was_shown(self, engine):
        whole = text_of(engine, max_length=60, **GREEDY)
        stop = whole[20:25]
        settings = GenerationSettings("The door opened and", max_length=60, stop_sequence=("zzzz", stop), **GREEDY)
        pieces = list(engine.generate(settings))
        assert "".join(pieces) == whole[: whole.index(stop)]

    def test_closing_the_iterator_ends_the_model_within_a_token(self, engine, model):
        forwards = count_forwards(model)
        pieces = engine.generate(GenerationSettings("The door", max_length=90))
        next(pieces)
        pieces.close()
        at_end = forwards()
        assert at_end < 90
        time.sleep(0.05)
        assert forwards() == at_end

    def test_a_stop_from_another_thread_ends_it_within_a_token(self, engine, model):
        stop = threading.Event()
        forwards = count_forwards(model)
        pieces = engine.generate(GenerationSettings("The door", max_length=90), stop=stop)
        next(pieces)
        at_stop = forwards()
        stop.set()
        list(pieces)
        assert forwards() <= at_stop + 2

    def test_one_that_waits_for_its_turn_can_be_stopped(self, engine):
        stop = threading.Event()
        with engine.lock:
            timer = threading.Timer(0.1, stop.set)
            timer.start()
            assert list(engine.generate(GenerationSettings("The door"), stop=stop)) == []
        timer.join()

    def test_a_generation_goes_before_a_measurement_that_is_under_way(self, engine, model, monkeypatch):
        monkeypatch.setattr("kobold_sp_plugin.engines.transformers._MOST_LOGITS", 1)  # one probe at a time
        order = []
        model.register_forward_pre_hook(lambda *_: order.append(threading.current_thread().name))
        with engine.lock:
            measuring = threading.Thread(target=engine.effect, args=([softprompt()],), name="measuring")
            measuring.start()
        wait = threading.Event()
        while not order:
            wait.wait(0.001)
        began = len(order)
        with engine.lock:
            order.append("turn")
            wait.wait(0.05)
        measuring.join()
        turn = order.index("turn")
        assert turn <= began + 2, "no later than after the forward pass that was under way"
        after = ["measuring"] * (2 * len(PROBES) - turn)  # nothing of it during the turn
        assert order == ["measuring"] * turn + ["turn"] + after

    def test_an_iterator_that_nobody_reads_starts_nothing(self, engine):
        threads = threading.active_count()
        engine.generate(GenerationSettings("The door"))
        assert threading.active_count() == threads


def count_forwards(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


class TestErrors:
    def test_an_error_of_the_model_is_raised_from_the_iterator_and_the_next_works(self, engine, model):
        handle = model.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            text_of(engine)
        handle.remove()
        assert text_of(engine)

    def test_a_model_that_is_gone_is_said_to_be(self, tokenizer):
        model = tiny_model(FAMILY)
        engine = TransformersEngine(model, tokenizer, "tiny")
        reference = weakref.ref(model)
        assert engine.alive and text_of(engine)
        del model
        gc.collect()
        assert reference() is None and not engine.alive
        engine.select([])
        for call in (lambda: text_of(engine), lambda: engine.effect([]), engine.facts):
            with pytest.raises(NoModel):
                call()

    def test_an_encoder_decoder_is_refused(self, tokenizer):
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        with pytest.raises((ModelError, UnsupportedCall)):
            TransformersEngine(T5ForConditionalGeneration(config), tokenizer, "t5")

    @pytest.mark.parametrize("content", [None, "{}", "not json"])
    def test_a_folder_that_is_no_model_is_a_named_error(self, tmp_path, content):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=str(tmp_path)):
            load_transformers(tmp_path)

    @pytest.mark.parametrize("size", [0, 5, 1000])
    def test_weights_that_are_cut_off_are_a_named_error(self, tmp_path, tokenizer, size):
        tiny_model(FAMILY).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        for weights in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")):
            weights.write_bytes(weights.read_bytes()[:size])
        with pytest.raises(ModelError, match=r"cannot be loaded as a causal language model: \w"):
            load_transformers(tmp_path)

    def test_a_model_without_a_tokenizer_is_said_to_have_none(self, tmp_path):
        tiny_model(FAMILY).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="has no tokenizer that transformers can load"):
            load_transformers(tmp_path)

    @pytest.mark.parametrize("path", ["/nonexistent", "./absent", "~/absent", "C:\\absent", "some/absent/folder"])
    def test_a_path_to_nothing_is_not_looked_for_on_the_hub(self, path):
        with pytest.raises(ModelError) as caught:
            load_transformers(path)
        assert str(caught.value) == f"There is no folder {path}."


class TestBudget:
    """Invariant 10: what must go is the oldest story text."""

    LONG = " ".join(f"door {number}" for number in range(60))

    def seen_by(self, model, engine, **settings):
        seen = []
        handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        text = text_of(engine, **settings)
        handle.remove()
        return [token_id for token_id in seen[0][0].tolist() if token_id < model.config.vocab_size], text

    @pytest.mark.parametrize("n_soft", [0, 5])
    @pytest.mark.parametrize("asked", [None, 50, 4096])
    def test_the_oldest_story_text_goes(self, engine, model, tokenizer, n_soft, asked):
        softprompts = [softprompt(n_tokens=n_soft)] if n_soft else []
        settings = {"prompt": self.LONG, "memory": "The clock.", "max_length": 20, "max_context_length": asked}
        ids, _ = self.seen_by(model, engine, softprompts=softprompts, **settings)
        memory, story = tokenizer("The clock.")["input_ids"], tokenizer(self.LONG)["input_ids"]
        room = min(asked or 128, 128) - n_soft - 20
        assert room - (room - len(memory)) // 8 < len(ids) <= room
        assert ids[: len(memory)] == memory and ids[0] == tokenizer.bos_token_id
        kept = ids[len(memory) :]
        assert kept == story[-len(kept) :]

    def test_the_beginning_goes_by_the_eighth_so_that_turns_begin_alike(self, engine, tokenizer):
        begins, sizes, words = [], [], self.LONG
        for turn in range(60):
            words += f" the clock {turn}"
            ids = fit(GenerationSettings(words, memory="The clock.", max_length=20), 5, engine.context, engine._reader)
            begins.append(tuple(ids[:40]))
            sizes.append(len(ids))
        story = len(tokenizer(words)["input_ids"]) - len(tokenizer(self.LONG)["input_ids"])
        room = 128 - 5 - 20
        eighth = (room - len(tokenizer("The clock.")["input_ids"])) // 8
        assert len(set(begins)) <= story // eighth + 2
        assert all(room - eighth < size <= room for size in sizes)

    @pytest.mark.parametrize("room", range(1, 20))
    def test_the_last_token_of_the_story_always_stays(self, engine, room):
        settings = GenerationSettings(self.LONG, memory="The clock.", max_length=1)
        head, ids = engine.token_ids("The clock."), engine.token_ids("The clock." + self.LONG)
        fitted = fit(replace(settings, max_context_length=len(head) + room + 1), 0, engine.context, engine._reader)
        assert fitted[: len(head)] == head and fitted[len(head) :] == ids[len(head) - len(fitted) :]
        assert len(head) < len(fitted) <= len(head) + room

    def test_the_last_token_still_fits(self, engine):
        settings = {"prompt": self.LONG, "max_length": 100, "softprompts": [softprompt()]}
        assert text_of(engine, **settings)

    @pytest.mark.parametrize("max_length", [123, 128, 10**9])
    def test_what_cannot_fit_is_refused_with_the_numbers(self, engine, max_length):
        with pytest.raises(ContextExceeded, match=rf"128 tokens .* 5 of soft prompts, {max_length} of new text"):
            text_of(engine, softprompts=[softprompt()], max_length=max_length)

    def test_memory_is_never_cut(self, engine):
        with pytest.raises(ContextExceeded, match=r"\d+ of memory, 20 of new text"):
            text_of(engine, memory=self.LONG, prompt="The end")

    def test_memory_is_not_spoken_of_where_there_is_none(self, engine):
        with pytest.raises(ContextExceeded, match=r"^A context of 128 tokens .* beside 128 of new text\.$"):
            text_of(engine, max_length=128)

    def test_an_empty_prompt_begins_with_what_the_tokenizer_begins_with(self, engine, tokenizer):
        assert text_of(engine, prompt="")
        assert engine.token_ids("") == [tokenizer.bos_token_id]


def harmful(engine, goal, n_tokens=20):
    """A soft prompt trained so that the probes are followed by one token, by any token, or each by one of its own."""
    model = engine._existing()
    rows = torch.nn.Parameter(torch.tensor(softprompt(n_tokens=n_tokens, width=160).rows) * 0.2)
    optimizer = torch.optim.Adam([rows], lr=0.05)
    texts = [torch.tensor([engine.token_ids(probe)]) for probe in PROBES]
    for _ in range(60):
        inputs = [torch.cat([rows[None], model.get_input_embeddings()(ids)], 1) for ids in texts]
        ends = torch.stack([model(inputs_embeds=each).logits[0, -1].log_softmax(-1) for each in inputs])
        entropies = -(ends.exp() * ends).sum(-1)
        losses = {"one token": -ends[:, 300].mean(), "any token": -entropies.mean(), "few tokens": entropies.mean()}
        optimizer.zero_grad()
        losses[goal].backward()
        optimizer.step()
    return SoftPrompt(rows)


class TestEffect:
    def test_nothing_has_none_and_a_random_prompt_has_one(self, engine):
        assert engine.effect([]) == 0.0
        assert 0.01 < engine.effect([softprompt()]) <= 1.0

    def test_it_is_the_mean_distance_of_the_distributions(self, engine, model, tokenizer):
        prompt, expected = softprompt(), []
        embed = model.get_input_embeddings()
        for probe in PROBES:
            ids = tokenizer(probe, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                plain = embed(ids)
                rows = torch.tensor(prompt.rows)[None]
                ends = [model(inputs_embeds=x).logits[0, -1].softmax(-1) for x in (plain, torch.cat([rows, plain], 1))]
            expected.append((ends[0] - ends[1]).abs().sum().item() / 2)
        assert engine.effect([prompt]) == pytest.approx(sum(expected) / len(expected), abs=1e-4)

    def test_probes_go_one_by_one_where_a_batch_would_take_too_much_memory(self, engine, monkeypatch):
        expected = engine.effect([softprompt()])
        sizes = []
        forward = engine._existing().forward

        def counted(*args, **kwargs):
            sizes.append(len(kwargs["input_ids"]))
            return forward(*args, **kwargs)

        monkeypatch.setattr(engine._existing(), "forward", counted)
        assert engine.effect([softprompt()]) == pytest.approx(expected, abs=1e-5)
        monkeypatch.setattr(transformers_engine, "_MOST_LOGITS", 1)
        assert engine.effect([softprompt()]) == pytest.approx(expected, abs=1e-5)
        assert sizes == [len(PROBES)] * 2 + [1] * 2 * len(PROBES)

    def test_one_that_changes_nothing_is_called_that(self, engine):
        assert "next to nothing" in engine.effect([]).remark
        assert engine.effect([softprompt()]).remark == ""

    @pytest.mark.parametrize(
        ("measured", "said"),
        [
            (Effect(0.273, 2.22, 2.31, 0.81, 0.81), ""),
            (Effect(0.997, 0.07, 2.31, 0.01, 0.81), "drowns the text out"),
            (Effect(0.889, 6.49, 2.31, 0.56, 0.81), "guessing"),
            (Effect(0.711, 0.02, 2.31, 0.87, 0.81), "no choice of words"),
            (Effect(0.004, 2.31, 2.31, 0.81, 0.81), "next to nothing"),
        ],
    )
    def test_nonsense_is_called_that(self, measured, said):
        """The numbers are those of noir and of the three harmful soft prompts below, with the demonstration model."""
        assert (said in measured.remark) if said else (measured.remark == "")

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize(
        ("goal", "said"), [("one token", "drowns"), ("any token", "guessing"), ("few tokens", "no choice of words")]
    )
    def test_soft_prompts_trained_to_do_harm_are_called_nonsense(self, goal, said):
        model, tokenizer, name = load_transformers(MODEL)
        engine = TransformersEngine(model, tokenizer, name)
        assert said in engine.effect([harmful(engine, goal)]).remark

    def test_it_leaves_the_selection(self, engine):
        engine.select([softprompt(1)])
        before = text_of(engine, **GREEDY)
        engine.effect([softprompt(2)])
        assert text_of(engine, **GREEDY) == before

    def test_it_waits_for_a_generation_and_does_not_disturb_it(self, engine):
        expected = text_of(engine, max_length=60, **GREEDY)
        pieces = engine.generate(GenerationSettings("The door opened and", max_length=60, **GREEDY))
        text = next(pieces)
        measured = []
        thread = threading.Thread(target=lambda: measured.append(engine.effect([softprompt()])))
        thread.start()
        text += "".join(pieces)
        thread.join()
        assert text == expected and measured


class Bytes:
    """A tokenizer of bytes: a character may need several tokens."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", errors="replace")


def fed(text, stops=(), prompt=b"Once"):
    maker = Detokenizer(Bytes(), list(prompt), stops)
    pieces = []
    for byte in text.encode():
        if maker.ended:
            break
        pieces.append(maker.add([byte]))
    return [*pieces, maker.rest()], maker


class TestText:
    @pytest.mark.parametrize("text", ["plain", "naïve “quotes” 日本語 🙂🙂", "", "\n\n"])
    def test_pieces_join_to_the_text_and_no_half_character_is_shown(self, text):
        pieces, _ = fed(text)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)

    def test_an_unfinished_character_at_the_end_is_not_lost(self):
        maker = Detokenizer(Bytes(), [], ())
        assert maker.add(list("é".encode())[:1]) == ""
        assert maker.rest() == "\ufffd"

    @pytest.mark.parametrize(
        ("stops", "expected"),
        [
            (["\nYou:"], "She ran.\nYou"),
            (["You: no"], "She ran.\n"),
            (["ran", "She"], ""),
            (["absent", ""], "She ran.\nYou: no"),
            (["no way"], "She ran.\nYou: no"),
        ],
    )
    def test_stop_sequences(self, stops, expected):
        text = "She ran.\nYou: no"
        expected = expected if stops != ["\nYou:"] else "She ran."
        pieces, maker = fed(text, stops)
        assert "".join(pieces) == expected
        assert maker.ended == (expected != text)


@pytest.mark.skipif(RELEASE < (4, 54), reason="few models of this release have a cache that can be cut")
class TestConversation:
    """A story is sent as a whole each turn, and only what is new in it is read."""

    STORY = "The door opened and the rain came in. "

    def read_by(self, model, act):
        """Positions of each forward pass."""
        embedding, read = model.get_input_embeddings(), []
        inner = vars(embedding)["forward"]
        vars(embedding)["forward"] = lambda ids, *args, **kwargs: (
            read.append(ids.shape[1]),
            inner(ids, *args, **kwargs),
        )[1]
        try:
            act()
        finally:
            vars(embedding)["forward"] = inner
        return read

    @pytest.mark.parametrize("softprompts", [(), (softprompt(),)], ids=["plain", "with a soft prompt"])
    def test_turns_read_what_is_new_and_write_what_they_would(self, engine, model, tokenizer, softprompts):
        story = self.STORY
        for turn in range(4):
            attach(model).forget()
            expected = text_of(engine, story, softprompts, max_length=8, **GREEDY)
            again = self.read_by(model, lambda: text_of(engine, story, softprompts, max_length=8, **GREEDY))  # noqa: B023
            assert again == [1] * 8, "all of it was read already"
            assert text_of(engine, story, softprompts, max_length=8, **GREEDY) == expected
            story += expected + f" Nobody said a word. {turn}"

    def test_a_text_that_is_tokenised_anew_is_read_from_where_it_differs(self, engine, model, tokenizer):
        text_of(engine, self.STORY, **GREEDY)
        ids = engine.token_ids(self.STORY)
        changed = engine.token_ids(self.STORY + "s")
        common = next(at for at, pair in enumerate(zip([*ids, None], changed)) if pair[0] != pair[1])
        read = self.read_by(model, lambda: text_of(engine, self.STORY + "s", **GREEDY))
        assert read[0] <= len(changed) - common
        attach(model).forget()
        expected = text_of(engine, self.STORY + "s", **GREEDY)
        text_of(engine, self.STORY, **GREEDY)
        assert text_of(engine, self.STORY + "s", **GREEDY) == expected

    def test_past_a_full_context_most_turns_read_what_is_new(self, engine, model):
        story, reads = self.STORY * 6, []
        settings = {"max_length": 2, "memory": "The clock.", "softprompts": [softprompt()], **GREEDY}
        text_of(engine, story, **settings)
        for _ in range(20):
            story += " the"
            written = []
            read = self.read_by(model, lambda: written.append(text_of(engine, story, **settings)))  # noqa: B023
            reads.append(max(read))
            story += written[0]
        assert sum(read > 80 for read in reads) in range(2, 9), "where the beginning is cut, all is read"
        assert sum(read < 10 for read in reads) >= 12

    def test_what_is_kept_is_never_why_there_is_no_memory(self, engine, model):
        expected = text_of(engine, self.STORY, **GREEDY)
        text_of(engine, "Nobody", **GREEDY)
        kept = attach(model)._adapter.conversations._kept
        assert len(kept) == 2
        forward = vars(model).get("forward", model.forward)

        def runs_out(*args, **kwargs):
            if len(kept):
                raise RuntimeError("out of memory")
            return forward(*args, **kwargs)

        vars(model)["forward"] = runs_out
        try:
            assert text_of(engine, self.STORY, **GREEDY) == expected
        finally:
            del vars(model)["forward"]

    def test_an_engine_that_is_closed_keeps_nothing(self, engine, model):
        text_of(engine, self.STORY)
        engine.close()
        assert not attach(model).forget()


def test_a_model_that_was_detached_is_left_alone(engine, model):
    attach(model).detach()
    engine.select(())
    engine.select([softprompt()])
    for use in (lambda: engine.effect([softprompt()]), lambda: text_of(engine), lambda: engine.override(())):
        with pytest.raises(NoModel, match="taken back"):
            use()
    assert not [name for name in vars(model) if name.startswith("_kobold")]
