"""The verdicts and their sentences."""

import json

import pytest
from embeddings import Model, moved
from zips import rows_of

from kobold_sp_plugin import SoftPrompt, Verdict
from kobold_sp_plugin.compatibility import ModelFacts, facts, fingerprint, judge, width_of

HERE = ModelFacts("here", width=64, context=1024)


def softprompt_for(model, **metadata):
    own = {"kobold_sp_plugin": {"fingerprint": fingerprint(model)}}
    return SoftPrompt(rows_of(5, width_of(model)), {**metadata, **own})


def claiming(*supported):
    return SoftPrompt(rows_of(5, 64), {"supported": list(supported)})


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
    assert verdict(softprompt, facts(model)) == (
        Verdict.COMPATIBLE,
        "made for this model: its fingerprint matches",
    )
    fine_tune = judge(softprompt, facts(Model().changed(moved(0.2))))
    assert fine_tune.verdict is Verdict.COMPATIBLE
    assert "fine-tune" in fine_tune.reason and "98% alike" in fine_tune.reason
    far = judge(softprompt, facts(Model().changed(moved(1.0))))
    assert far.verdict is Verdict.COMPATIBLE and "may have lost its effect" in far.reason
    other = judge(softprompt, facts(Model(seed=1)))
    assert other.verdict is Verdict.DIFFERENT
    assert "another model" in other.reason


def test_a_fingerprint_that_there_is_nothing_to_compare_with():
    found, reason = verdict(softprompt_for(Model()), HERE)
    assert found is Verdict.UNPROVEN and reason.endswith("it has a fingerprint, but none is known of this model")


GPT_J = ModelFacts("gpt-j", 64, 2048, base="GPT-J", size=6.05e9)
OPT = ModelFacts("opt", 64, 2048, base="OPT", size=2.65e9)


@pytest.mark.parametrize(
    ("supported", "known", "said"),
    [
        (["GPT-Neo 2.7B", "GPT-J"], HERE, "it says that it was made for GPT-Neo 2.7B, GPT-J, which is no proof"),
        (["my own"], GPT_J, "made for my own, which is no proof"),
        (["Generic 6B"], GPT_J, 'made for "Generic 6B", by which GPT-J 6B was mostly meant, which this model (GPT-J'),
        (["Generic 6B"], OPT, "this model is OPT 2.6B: expect garbled text"),
        (["OPT 2.7B", "GPT-J 6B"], OPT, "which this model (OPT 2.6B) may be; that is no proof"),
        (["OPT 6.7B"], OPT, "this model is OPT 2.6B: expect garbled text"),
        (["fairseq-dense-2.7B"], OPT, "they work somewhat on OPT of the same size"),
        (["fairseq-dense-13B"], OPT, "expect garbled text"),
        (["fairseq-dense-6.7B"], GPT_J, "expect garbled text"),
    ],
)  # fmt: skip
def test_what_it_says_it_supports_proves_nothing(supported, known, said):
    found, reason = verdict(claiming(*supported), known)
    assert found is Verdict.UNPROVEN
    assert reason.startswith("same width; ") and said in reason


def test_a_proof_outweighs_what_it_says():
    model = Model()
    assert judge(softprompt_for(model, supported=["Other"]), facts(model)).verdict is Verdict.COMPATIBLE
    other = facts(Model(seed=1))
    opt = ModelFacts("opt", 64, fingerprint=other.fingerprint, base="OPT", size=2.65e9)
    assert judge(softprompt_for(model, supported=["OPT 2.7B"]), opt).verdict is Verdict.DIFFERENT


def test_fairseq_for_opt_with_a_fingerprint_is_a_warning_that_says_what_is_known():
    other = facts(Model(seed=1))
    opt = ModelFacts("opt", 64, fingerprint=other.fingerprint, base="OPT", size=2.65e9)
    found, reason = verdict(softprompt_for(Model(), supported=["fairseq 2.7B"]), opt)
    assert found is Verdict.DIFFERENT and "somewhat on OPT" in reason and "garbled" not in reason


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"version": None},
        {"width": 63},
        {"width": True},
        {"vocabulary": -5},
        {"vocabulary": 100},
        {"vocabulary": "2000"},
        {"vocabulary": 10**30},
        {"signs": "!!!!"},
        {"signs": ""},
        {"signs": "AAAA"},
        {"signs": None},
        {"signs": "é"},
        {"signs": "A" * 10**6},
    ],
)
def test_a_fingerprint_that_is_none_proves_nothing(change):
    model = Model()
    forged = {**fingerprint(model), **change}
    softprompt = SoftPrompt(rows_of(5, 64), {"kobold_sp_plugin": {"fingerprint": forged}})
    expected = Verdict.UNPROVEN
    if change == {"vocabulary": 10**30}:  # as many as one likes: the lowest 4,096 are sampled, and do not agree
        expected = Verdict.DIFFERENT
    assert judge(softprompt, facts(model)).verdict in (expected, Verdict.UNPROVEN)


@pytest.mark.parametrize("forged", [None, [], "x", 5, {}])
def test_no_fingerprint_at_all(forged):
    softprompt = SoftPrompt(rows_of(5, 64), {"kobold_sp_plugin": {"fingerprint": forged}})
    assert judge(softprompt, facts(Model())).verdict is Verdict.UNPROVEN


def test_verdicts_as_text():
    assert [str(each) for each in Verdict if each.usable] == ["compatible", "unproven", "different embedding matrix"]
    assert f"{Verdict.NO_MODEL}" == "no model"
    assert json.dumps(Verdict.INCOMPATIBLE) == '"incompatible"'
    assert Verdict.UNPROVEN == "unproven"
