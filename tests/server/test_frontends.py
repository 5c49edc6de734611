"""Whole requests, field by field as SillyTavern 1.12.6 and KoboldAI Lite of July 2026 were seen to send them.

What their users wrote is ours. Where something is asserted of the model's text, the settings are greedy.
"""

import json

import pytest
from serving import as_lite_reads

CHAT = "Write Rita's next reply in a fictional chat between Rita and User.\n***\nUser: The door opened.\nRita:"

CLASSIC = {
    "prompt": CHAT,
    "use_story": False,
    "use_memory": False,
    "use_authors_note": False,
    "use_world_info": False,
    "max_context_length": 8192,
    "max_length": 12,
    "rep_pen": 1,
    "rep_pen_range": 600,
    "rep_pen_slope": 0,
    "temperature": 1,
    "tfs": 1,
    "top_a": 0,
    "top_k": 1,
    "top_p": 0.95,
    "min_p": 0,
    "typical": 1,
    "sampler_order": [6, 0, 1, 2, 3, 4, 5],
    "singleline": False,
    "use_default_badwordsids": False,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5,
    "grammar": "",
    "stop_sequence": ["\nUser:", "\n***"],
}
"""SillyTavern's KoboldAI Classic, to ``/api/extra/generate/stream`` or ``/api/v1/generate``."""

TEXT_COMPLETION = {
    "prompt": CHAT,
    "max_new_tokens": 12,
    "max_tokens": 12,
    "temperature": 0.5,
    "top_p": 0.9,
    "typical_p": 1,
    "typical": 1,
    "sampler_seed": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "top_k": 1,
    "skew": 0,
    "min_tokens": 0,
    "add_bos_token": True,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "dry_allowed_length": 2,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_sequence_breakers": '["\\n",":","\\"","*"]',
    "dry_penalty_last_n": 0,
    "max_tokens_second": 0,
    "stopping_strings": ["\nUser:", "\n***"],
    "stop": ["\nUser:", "\n***"],
    "truncation_length": 8192,
    "ban_eos_token": False,
    "skip_special_tokens": True,
    "top_a": 0,
    "tfs": 1,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "custom_token_bans": "",
    "banned_strings": [],
    "api_type": "koboldcpp",
    "api_server": "http://127.0.0.1:5000",
    "legacy_api": False,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "xtc_threshold": 0.1,
    "xtc_probability": 0,
    "grammar": "",
    "rep_pen": 1,
    "rep_pen_range": 0,
    "repetition_penalty_range": 0,
    "seed": -1,
    "guidance_scale": 1,
    "negative_prompt": "",
    "grammar_string": "",
    "repeat_penalty": 1,
    "tfs_z": 1,
    "repeat_last_n": 0,
    "n_predict": 12,
    "num_predict": 12,
    "num_ctx": 8192,
    "mirostat": 0,
    "ignore_eos": False,
    "rep_pen_slope": 1,
    "stream": True,
}
"""SillyTavern's Text Completion with KoboldCpp, to ``/v1/completions``; with our extension, ``character`` as well."""

LITE = {
    "n": 1,
    "max_context_length": 12288,
    "max_length": 1536,
    "rep_pen": 1.05,
    "temperature": 0.75,
    "top_p": 0.92,
    "top_k": 100,
    "top_a": 0,
    "typical": 1,
    "tfs": 1,
    "rep_pen_range": 360,
    "rep_pen_slope": 0.7,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "memory": "",
    "trim_stop": True,
    "genkey": "KCPP5230",
    "min_p": 0,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "nsigma": 0,
    "banned_tokens": [],
    "render_special": False,
    "logprobs": False,
    "presence_penalty": 0,
    "logit_bias": {},
    "stop_sequence": ["### Instruction:", "### Response:"],
    "use_default_badwordsids": False,
    "bypass_eos": False,
    "prompt": "\n### Instruction:\nThe door opened and\n### Response:\n",
}
"""KoboldAI Lite, to ``/api/extra/generate/stream``: more new text than the model has room for, by far."""

CHARACTERS = "/api/extra/softprompts/characters"


def classic(ask, **more):
    events = as_lite_reads(ask("POST", "/api/extra/generate/stream", {**CLASSIC, **more}).body)
    return "".join(data["token"] for _, data in events)


def text_completion(ask, **more):
    """The text of the events, as SillyTavern takes them apart: up to ``[DONE]``, each with one choice's text."""
    answer = ask("POST", "/v1/completions", {**TEXT_COMPLETION, **more})
    assert answer.status == 200, answer.body
    lines = [line[6:] for line in answer.body.decode().split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_sillytavern_has_one_text_by_every_way_that_it_has(ask):
    (whole,) = ask("POST", "/api/v1/generate", CLASSIC).json["results"]
    assert len(whole["text"]) > 5
    assert classic(ask) == whole["text"] == text_completion(ask)


@pytest.mark.parametrize("write", [classic, text_completion])
def test_what_is_selected_in_the_extension_holds_for_the_next_text(ask, write):
    without = write(ask)
    ask("PUT", "/api/extra/softprompts", {"selection": ["noir.zip"]})
    noir = write(ask)
    ask("PUT", "/api/extra/softprompts", {"selection": []})
    assert write(ask) == without != noir


@pytest.mark.parametrize("write", [classic, text_completion])
def test_a_character_is_known_by_the_last_line_of_the_prompt(ask, write):
    everyone = write(ask)
    ask("PUT", CHARACTERS, {"character": "Rita", "soft_prompt": ["noir.zip"]})
    ritas = write(ask)
    assert ritas != everyone
    ask("PUT", CHARACTERS, {"character": "Rita", "soft_prompt": []})
    assert write(ask) == everyone


def test_continuing_a_characters_text_needs_the_extension_to_say_whose_it_is(ask):
    continued = CHAT + " The door"
    everyone = text_completion(ask, prompt=continued)
    ask("PUT", CHARACTERS, {"character": "Rita", "soft_prompt": ["noir.zip"]})
    assert text_completion(ask, prompt=continued) == everyone
    assert text_completion(ask, prompt=continued, character="Rita") != everyone
    assert text_completion(ask, prompt=continued, character="Nobody") == everyone


def test_lite_asks_for_more_than_there_is_room_for_and_gets_what_there_is(ask):
    events = as_lite_reads(ask("POST", "/api/extra/generate/stream", {**LITE, "top_k": 1}).body)
    assert events[-1][1]["finish_reason"] == "length" and len(events) > 100
    asked = ask("POST", "/api/extra/abort", {"genkey": LITE["genkey"]})
    assert asked.status == 200 and asked.json["done"] == "true"
