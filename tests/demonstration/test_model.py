import pytest
import torch

pytest.importorskip("transformers", "4.28", "The demonstration model is a Llama, which came with transformers 4.28")

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.compatibility import Verdict, facts, judge
from kobold_sp_plugin.demonstration import MODEL, build, report
from kobold_sp_plugin.demonstration.classifier import Classifier
from kobold_sp_plugin.demonstration.lexicon import GENRES

SOFTPROMPTS = MODEL.parents[2] / "softprompts"
LIMIT = 4_000_000  # bytes


@pytest.fixture(scope="module")
def demonstration():
    return report.load()


@pytest.fixture(scope="module")
def softprompts():
    return {genre: SoftPrompt.load(SOFTPROMPTS / f"{genre}.zip") for genre in GENRES}


def test_the_shipped_model_is_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= LIMIT


def test_encoding_puts_the_beginning_of_sequence_first_and_decodes_to_the_same_text(demonstration):
    model, tokenizer = demonstration
    ids = tokenizer("The door opened and").input_ids
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The door opened and"
    assert tokenizer.decode(tokenizer("Ünïcode – ok\n\n").input_ids[1:]) == "Ünïcode – ok\n\n"


def test_every_softprompt_is_for_this_model(demonstration, softprompts):
    model, _ = demonstration
    for softprompt in softprompts.values():
        assert softprompt.width == model.config.hidden_size
        assert judge(softprompt, facts(model)).verdict is Verdict.COMPATIBLE


def test_the_right_softprompt_beats_none_and_every_wrong_one(demonstration, softprompts):
    model, tokenizer = demonstration
    for genre, texts in report.held_out(6).items():
        right = report.loss(model, tokenizer, texts, softprompts[genre], tokens=64)
        wrong = [softprompts[other] for other in GENRES if other != genre]
        assert all(right < report.loss(model, tokenizer, texts, each, tokens=64) for each in [None, *wrong])


def test_continuations_begin_with_the_opening_and_turn_to_the_genre(demonstration, softprompts, monkeypatch):
    model, tokenizer = demonstration
    monkeypatch.setattr(report, "NEW_TOKENS", 40)
    texts = report.continuations(model, tokenizer, softprompts["noir"], 8)
    assert all(text.startswith("The door opened and") for text in texts)
    assert Classifier.fitted(count=50).share(texts, "noir") >= 0.75


def test_one_seed_builds_the_same_and_the_build_is_readable(tmp_path, monkeypatch):
    for key, value in {"hidden_size": 40, "num_hidden_layers": 1, "vocab_size": 512}.items():
        monkeypatch.setitem(build.CONFIG, key, value)
    monkeypatch.setattr(build, "PROMPT_STORIES", 5)
    for name in ("a", "b"):
        build.build(tmp_path / name / "model", tmp_path / name / "softprompts", seed=1, count=10)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 5 + len(GENRES)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    model, tokenizer = report.load(tmp_path / "a" / "model")
    assert len(tokenizer) <= model.config.vocab_size


def test_where_a_story_turns_only_what_follows_is_learned():
    passages = list(build.genre_passages("noir", 10, seed=1))
    turning = [passage.parts for passage in passages if len(passage.parts) == 2]
    assert len(turning) == 2
    assert all(not before_is_learned and is_learned for (_, before_is_learned), (_, is_learned) in turning)


def test_padding_counts_nothing(demonstration):
    model, tokenizer = demonstration
    texts = [build.tokens_of(tokenizer.backend_tokenizer, text) for text in ("Jack came in.", "Rita left him there.")]
    with torch.no_grad():
        apart = [build.loss_of(model, [text]) * (len(text) - 1) for text in texts]
        together = build.loss_of(model, texts) * sum(len(text) - 1 for text in texts)
    assert torch.allclose(sum(apart), together, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("genre", GENRES)
def test_continuations_classify_as_the_selected_genre(demonstration, softprompts, genre):
    model, tokenizer = demonstration
    torch.set_num_threads(2)
    texts = report.continuations(model, tokenizer, softprompts[genre], 200)
    first, whole = report.shares(Classifier.fitted(), texts, genre)
    assert first >= 0.9
    assert whole >= 0.8
