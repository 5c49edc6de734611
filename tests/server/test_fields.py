"""From the fields of a request to the settings of a generation, by every name that a client may use."""

import pytest

from kobold_sp_plugin.engines import GenerationSettings
from kobold_sp_plugin.server.fields import read_chat, read_completion, read_generation

SAMPLERS = {
    "temperature": 0.5,
    "top_p": 0.6,
    "top_k": 7,
    "top_a": 0.1,
    "min_p": 0.2,
    "tfs": 0.7,
    "typical": 0.3,
    "rep_pen": 1.1,
    "rep_pen_range": 100,
    "rep_pen_slope": 0.9,
    "presence_penalty": 0.4,
    "frequency_penalty": -0.5,
    "sampler_order": (6, 5, 4, 3, 2, 1, 0),
}
"""Fields that every API has by the names of the settings; all differ, so that none can be taken for another."""


def settings_of(read, **fields):
    (settings,) = read(fields).settings
    return settings


def completion_of(**fields):
    (settings,) = read_completion(fields)[0].settings
    return settings


def test_koboldais_fields_reach_their_settings():
    fields = {**SAMPLERS, "sampler_order": list(SAMPLERS["sampler_order"]), "max_length": 9, "max_context_length": 99}
    more = {"memory": "Rain.", "sampler_seed": 5, "stop_sequence": ["You:"], "logit_bias": {"3": -100}}
    found = settings_of(read_generation, prompt="The door", **fields, **more)
    assert found == GenerationSettings(
        "The door",
        memory="Rain.",
        max_length=9,
        max_context_length=99,
        **SAMPLERS,
        logit_bias=((3, -100.0),),
        stop_sequence=("You:",),
        keep_stop=True,
        seed=5,
    )


def test_what_koboldai_is_not_told_is_as_its_users_have_it():
    assert settings_of(read_generation, prompt="x") == GenerationSettings("x", keep_stop=True)


@pytest.mark.parametrize("name", ["use_default_badwordsids", "ban_eos_token", "bypass_eos"])
def test_the_end_of_the_text_is_banned_by_any_of_its_names(name):
    assert settings_of(read_generation, prompt="x", **{name: True}).ban_eos
    assert not settings_of(read_generation, prompt="x", **{name: False}).ban_eos


def test_bad_words_are_those_of_the_request_and_koboldais_brackets():
    found = settings_of(read_generation, prompt="x", banned_tokens=["rain"], use_default_badwordsids=True)
    assert found.bad_words == ("rain", "[", "]")
    assert settings_of(read_generation, prompt="x", banned_tokens=["rain"]).bad_words == ("rain",)
    assert completion_of(prompt="x", banned_tokens=["rain"], banned_strings=["door"]).bad_words == ("rain", "door")


def test_openais_fields_reach_their_settings():
    fields = {**SAMPLERS, "sampler_order": list(SAMPLERS["sampler_order"]), "memory": "Rain.", "max_tokens": 9}
    found = completion_of(prompt="The door", **fields, truncation_length=99, seed=5, stop="You:", ban_eos_token=True)
    assert found == GenerationSettings(
        "The door",
        memory="Rain.",
        max_length=9,
        max_context_length=99,
        **SAMPLERS,
        ban_eos=True,
        stop_sequence=("You:",),
        seed=5,
    )


@pytest.mark.parametrize(
    ("fields", "setting", "value"),
    [
        ({"typical_p": 0.4}, "typical", 0.4),
        ({"repetition_penalty": 1.3}, "rep_pen", 1.3),
        ({"max_context_length": 50}, "max_context_length", 50),
        ({"sampler_seed": 8}, "seed", 8),
        ({"seed": -1}, "seed", None),
        ({"rep_pen_range": -1}, "rep_pen_range", 0),
        ({"top_k": -1}, "top_k", -1),
        ({"temperature": 0}, "temperature", 0.0),
        ({}, "temperature", 1.0),
        ({}, "top_p", 1.0),
        ({}, "keep_stop", False),
    ],
)
def test_the_other_names_and_defaults_of_openais(fields, setting, value):
    assert getattr(completion_of(prompt="x", **fields), setting) == value


def test_a_conversation_has_its_own_name_for_the_length():
    fields = {"messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 12}
    (settings,) = read_chat(fields, None)[0].settings
    assert settings.max_length == 12 and settings.prompt == "User: Hello\nAssistant:"


def test_unknown_fields_are_left_aside():
    assert settings_of(read_generation, prompt="x", mirostat=2, grammar="root", dry_multiplier="?") == settings_of(
        read_generation, prompt="x"
    )
