"""Facts of models, fingerprints and verdicts."""

import hashlib
import json

import numpy as np
import pytest
import torch
import transformers
from zips import rows_of

from kobold_sp_plugin import SoftPrompt, Verdict
from kobold_sp_plugin.compatibility import (
    RELATED,
    SAME,
    ModelFacts,
    _agreement,
    context_of,
    facts,
    fingerprint,
    judge,
    width_of,
)
from kobold_sp_plugin.errors import ModelError, NoEmbedding

GOLDEN = "1dc5e61d88e95a007ce5682677a56e56258289189022265d2c7eb3ef7904b3f0"


class Model(torch.nn.Module):
    """A model as far as its embedding."""

    def __init__(self, vocabulary=2000, width=64, seed=0, common=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(vocabulary, width)
        with torch.no_grad():
            self.embedding.weight.mul_(0.02).add_(common * torch.randn(width))

    def get_input_embeddings(self):
        return self.embedding

    def changed(self, change):
        with torch.no_grad():
            self.embedding.weight.copy_(change(self.embedding.weight))
        return self


def quantised(bits, block=32):
    def change(weight):
        blocks = weight.reshape(-1, block)
        step = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((blocks / step).round() * step).reshape(weight.shape)

    return change


def moved(by):
    """A fine-tune: every row moved by noise of ``by`` times its own size."""
    return lambda weight: weight + by * weight.std() * torch.randn_like(weight)


def agreement(first, second):
    return _agreement(fingerprint(first), fingerprint(second))


def softprompt_for(model, **metadata):
    own = {"kobold_sp_plugin": {"fingerprint": fingerprint(model)}}
    return SoftPrompt(rows_of(5, width_of(model)), {**metadata, **own})


@pytest.mark.parametrize(
    "change",
    [lambda weight: weight.half(), lambda weight: weight.bfloat16(), quantised(8), lambda weight: weight * 22.6],
    ids=["float16", "bfloat16", "8 bits", "scaled"],
)
def test_a_copy_in_another_precision_is_the_same(change):
    assert agreement(Model(), Model().changed(change)) >= SAME


@pytest.mark.parametrize("change", [quantised(4), moved(0.05), moved(0.2), moved(0.5)])
def test_a_fine_tune_is_related(change):
    assert RELATED <= agreement(Model(), Model().changed(change)) < 1


@pytest.mark.parametrize("width", [4, 32, 768])
@pytest.mark.parametrize("common", [0.0, 0.2])
def test_unrelated_matrices_are_told_apart(width, common):
    """Also where every row of a matrix has one large part in common, as real ones have."""
    models = [Model(width=width, seed=seed, common=common) for seed in range(6)]
    prints = [fingerprint(model) for model in models]
    found = [_agreement(a, b) for index, a in enumerate(prints) for b in prints[:index]]
    assert min(found) > 0.42 and max(found) < 0.58


def test_added_and_removed_tokens_change_little():
    model = Model(2000)
    for vocabulary in (2064, 1990):
        other = Model(vocabulary, seed=1)
        shared = min(vocabulary, 2000)
        with torch.no_grad():
            other.embedding.weight[:shared] = model.embedding.weight[:shared]
        assert agreement(model, other) >= SAME


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 100])
def test_small_vocabularies(vocabulary):
    assert agreement(Model(vocabulary), Model(vocabulary)) == 1


def test_it_is_small_json_and_never_changes():
    """Golden: files carry it. Whoever changes it gives it another version."""
    model = Model(100, 8)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.from_numpy(np.random.RandomState(0).randint(-99, 99, (100, 8))))
    mark = fingerprint(model)
    assert json.loads(json.dumps(mark)) == mark
    assert len(json.dumps(mark)) < 1000
    assert {key: mark[key] for key in ("version", "vocabulary", "width")} == {
        "version": 1, "vocabulary": 100, "width": 8,
    }  # fmt: skip
    assert hashlib.sha256(f"{mark['ids']} {mark['signs']}".encode()).hexdigest() == GOLDEN


def test_a_large_matrix_is_not_read_whole():
    class Rows:
        """A weight that counts the rows that are taken from it."""

        device, shape, taken = torch.device("cpu"), (256_000, 16), 0

        def detach(self):
            return self

        def is_floating_point(self):
            return True

        def __getitem__(self, index):
            self.taken += len(index)
            return torch.randn(len(index), 16)

    model = Model(10, 16)
    embedding = type("Embedding", (), {"embedding_dim": 16, "num_embeddings": 256_000, "weight": Rows()})()
    model.get_input_embeddings = lambda: embedding
    fingerprint(model)
    assert embedding.weight.taken == 64


def test_offloaded_rows_are_asked_of_the_module():
    class Offloaded(torch.nn.Embedding):
        def forward(self, ids):
            return kept[ids]

    model = Model()
    kept = model.embedding.weight.detach().clone()
    mark = fingerprint(model)
    model.embedding = Offloaded(2000, 64, device="meta")
    assert fingerprint(model) == mark


def test_a_model_without_an_embedding():
    with pytest.raises(NoEmbedding):
        fingerprint(torch.nn.Linear(2, 2))
    assert facts(torch.nn.Linear(2, 2)).width is None


def test_a_table_that_was_emptied_has_no_fingerprint():
    """KoboldAI empties every tensor when it changes models."""
    model = Model()
    with torch.no_grad():
        model.embedding.weight.set_()
    assert facts(model).fingerprint is None
    assert facts(model).width == 64


CONFIGS = [
    (transformers.GPT2Config(n_embd=24, n_positions=128), 24, 128),
    (transformers.OPTConfig(hidden_size=1024, word_embed_proj_dim=512, max_position_embeddings=2048), 512, 2048),
    (transformers.GPTJConfig(n_embd=4096, n_positions=2048), 4096, 2048),
    (transformers.BloomConfig(hidden_size=64), 64, None),
    (transformers.XGLMConfig(d_model=1024, max_position_embeddings=2048), 1024, 2048),
]


@pytest.mark.parametrize("config, width, context", CONFIGS, ids=lambda value: type(value).__name__)
def test_facts_of_a_configuration(tmp_path, config, width, context):
    assert (width_of(config), context_of(config)) == (width, context)
    config.save_pretrained(tmp_path)
    known = facts(tmp_path)
    assert (known.name, known.width, known.context, known.fingerprint) == (tmp_path.name, width, context, None)
    assert facts(config, "mine").name == "mine"


def test_a_text_model_inside_another():
    class Config:
        text_config = transformers.GPT2Config(n_embd=24, n_positions=128)

    assert (width_of(Config()), context_of(Config())) == (24, 128)
    assert width_of({"text_config": {"hidden_size": 7}, "hidden_size": None}) == 7
    assert width_of({"hidden_size": True, "d_model": -1, "n_embd": "4"}) is None


def test_facts_of_a_model():
    config = transformers.OPTConfig(
        hidden_size=48, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=300, max_position_embeddings=128, do_layer_norm_before=False,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    known = facts(model, "opt")
    assert (known.name, known.width, known.context, known.refusal) == ("opt", 32, 128, None)
    assert known.fingerprint == fingerprint(model)
    assert facts(known) is known
    assert facts(model) == facts(model)


@pytest.mark.parametrize("text", ["[1]", "{", "\ud800"])
def test_a_configuration_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError):
        facts(tmp_path)
    with pytest.raises(OSError):
        facts(tmp_path / "missing")


HERE = ModelFacts("here", width=64, context=1024)


def verdict(softprompt, known):
    judgement = judge(softprompt, known)
    return judgement.verdict, judgement.reason


def test_the_verdicts():
    softprompt = SoftPrompt(rows_of(5, 64))
    assert verdict(softprompt, None) == (Verdict.NO_MODEL, "no model is loaded")
    refusing = ModelFacts("x", 64, 1024, refusal="llama.cpp takes none")
    assert verdict(softprompt, refusing) == (Verdict.NOT_WITH_BACKEND, "llama.cpp takes none")
    assert verdict(SoftPrompt(rows_of(5, 4)), HERE) == (
        Verdict.INCOMPATIBLE,
        "made for 4 columns, this model has 64",
    )
    assert verdict(softprompt, HERE) == (
        Verdict.UNPROVEN,
        "same width; nothing tells which model it was made for",
    )
    assert judge(softprompt, ModelFacts("x")).verdict is Verdict.UNPROVEN


def test_a_context_that_has_no_room_left():
    assert judge(SoftPrompt(rows_of(1023, 64)), HERE).verdict is Verdict.UNPROVEN
    assert verdict(SoftPrompt(rows_of(1024, 64)), HERE) == (
        Verdict.INCOMPATIBLE,
        "uses 1024 tokens of a context of 1024: no room for text",
    )
    assert judge(SoftPrompt(rows_of(1024, 64)), ModelFacts("x", 64)).verdict is Verdict.UNPROVEN


def test_the_fingerprint_decides():
    model = Model()
    softprompt = softprompt_for(model)
    assert judge(softprompt, facts(model)).verdict is Verdict.COMPATIBLE
    fine_tune = judge(softprompt, facts(Model().changed(moved(0.2))))
    assert fine_tune.verdict is Verdict.COMPATIBLE
    assert "fine-tune" in fine_tune.reason
    other = judge(softprompt, facts(Model(seed=1)))
    assert other.verdict is Verdict.DIFFERENT
    assert "another model" in other.reason
    assert judge(softprompt, HERE).verdict is Verdict.UNPROVEN


def test_what_it_says_it_supports_proves_nothing():
    claimed = SoftPrompt(rows_of(5, 64), {"supported": ["GPT-Neo 2.7B", "GPT-J"]})
    assert verdict(claimed, HERE) == (
        Verdict.UNPROVEN,
        "same width; it says that it was made for GPT-Neo 2.7B, GPT-J, but carries no proof",
    )
    model = Model()
    assert judge(softprompt_for(model, supported=["Other"]), facts(model)).verdict is Verdict.COMPATIBLE


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"width": 63},
        {"width": True},
        {"ids": 5},
        {"ids": "!!!!"},
        {"ids": ""},
        {"ids": "AAAAAAAA"},
        {"ids": "A" * 10**6},
        {"signs": "AAAA"},
        {"signs": None},
        {"signs": "é"},
    ],
)
def test_a_fingerprint_that_is_none_proves_nothing(change):
    model = Model()
    forged = {**fingerprint(model), **change}
    softprompt = SoftPrompt(rows_of(5, 64), {"kobold_sp_plugin": {"fingerprint": forged}})
    assert judge(softprompt, facts(model)).verdict is Verdict.UNPROVEN


@pytest.mark.parametrize("forged", [None, [], "x", 5, {}])
def test_no_fingerprint_at_all(forged):
    softprompt = SoftPrompt(rows_of(5, 64), {"kobold_sp_plugin": {"fingerprint": forged}})
    assert judge(softprompt, facts(Model())).verdict is Verdict.UNPROVEN


def test_verdicts_as_text():
    assert [str(each) for each in Verdict if each.usable] == ["compatible", "unproven", "different embedding matrix"]
    assert f"{Verdict.NO_MODEL}" == "no model"
    assert json.dumps(Verdict.INCOMPATIBLE) == '"incompatible"'
    assert Verdict.UNPROVEN == "unproven"
