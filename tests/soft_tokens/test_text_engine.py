"""An engine that is given texts with soft prompts in them: what it writes, and what it cuts to fit the context."""

import pytest
import torch
from models import FAMILY, softprompt, tiny_model, tiny_tokenizer

from kobold_sp_plugin import attach
from kobold_sp_plugin.engines import GenerationSettings
from kobold_sp_plugin.engines.fitting import fit
from kobold_sp_plugin.engines.transformers import TransformersEngine
from kobold_sp_plugin.errors import ContextExceeded
from kobold_sp_plugin.soft_tokens.text import softprompts_in, with_softprompts, without_soft_tokens

NOIR, SEA = softprompt(1, 5, name="dark"), softprompt(2, 9, name="deep")
LONG = "The door opened and the rain came in. " * 8


@pytest.fixture
def engine():
    model = tiny_model(FAMILY, eos_token_id=None)
    made = TransformersEngine(model, tiny_tokenizer(), "tiny")
    made.model = model  # it holds the model weakly
    return made


def text_of(engine, prompt, softprompts=(), **settings):
    settings = GenerationSettings(prompt, **{"max_length": 20, "temperature": 0.0, **settings})
    return "".join(engine.generate(settings, softprompts))


@pytest.mark.parametrize("prompt", [NOIR + "The door", "The door " + NOIR + "opened", "The door" + NOIR, NOIR + ""])
def test_it_writes_what_the_model_writes(engine, prompt):
    tokenizer = with_softprompts(tiny_tokenizer())
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    result = engine.model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0)
    before = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    after = tokenizer.decode(result[0], skip_special_tokens=True)
    assert text_of(engine, prompt) == after[len(before) :]


def test_one_at_the_front_of_the_text_is_as_one_that_is_selected(engine):
    assert text_of(engine, NOIR + "The door") == text_of(engine, "The door", [NOIR])
    assert text_of(engine, SEA + "The door", [NOIR]) == text_of(engine, "The door", [NOIR, SEA])
    assert text_of(engine, "The door", [NOIR]) != text_of(engine, "The door")


@pytest.mark.parametrize(("memory", "selected"), [("", ()), ("The clock.", ()), ("The " + SEA + " clock.", (SEA,))])
def test_the_oldest_story_text_goes_and_never_a_soft_token(engine, memory, selected):
    prompt = LONG + NOIR + LONG + SEA
    settings = GenerationSettings(prompt, memory, max_length=20)
    n_selected = sum(each.n_tokens for each in selected)
    ids = fit(settings, n_selected, engine.context, engine._reader)
    room = engine.context - 20 - n_selected
    assert room - room // 8 < len(ids) <= room
    assert list(softprompts_in(torch.tensor(ids)).values()).count(NOIR) == 1
    wanted = sum(each.n_tokens for each in (memory + prompt).softprompts)
    assert len(ids) - len(without_soft_tokens(ids)) == wanted
    whole = tiny_tokenizer()(LONG + LONG)["input_ids"]
    n_memory = len(without_soft_tokens(with_softprompts(tiny_tokenizer())(memory)["input_ids"])) if memory else 1
    text = without_soft_tokens(ids)
    assert text[n_memory:] == whole[len(whole) - len(text) + n_memory :]
    text_of(engine, prompt, selected, memory=memory)


def test_soft_prompts_that_leave_no_room_are_refused_with_the_numbers(engine):
    with pytest.raises(ContextExceeded, match="126 of soft prompts, 20 of new text"):
        text_of(engine, "The door" + softprompt(3, 121) + "opened", [NOIR])


def test_soft_prompts_of_a_text_leave_the_selection_alone(engine):
    handle = attach(engine.model)
    handle.select(SEA)
    with_both = text_of(engine, NOIR + "The door", None)
    assert handle.selection == (SEA,)
    assert with_both == text_of(engine, "The door", [SEA, NOIR])
