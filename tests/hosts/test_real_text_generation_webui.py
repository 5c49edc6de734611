"""The extension in a real text-generation-webui: what its API writes, against rows in a larger embedding matrix.

Run where ``KOBOLD_SP_TEXTGEN`` and ``KOBOLD_SP_TEXTGEN_PYTHON`` name an installation; its user_data stays as it is.
"""

import json
import math
import subprocess
import threading

import numpy as np
import pytest
import torch
import transformers
from hosts.real_text_generation_webui import (
    FOLDER,
    MISSING,
    PYTHON,
    Host,
    Refused,
    Truth,
    make_checkpoints,
    make_lora,
    make_with_rows,
    user_data,
)

from kobold_sp_plugin import SoftPrompt

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(400)]

PROMPT = "The door opened and the rain came in. Nobody said a word; the door opened and the"
MESSAGES = [{"role": "user", "content": "The door opened"}]
FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "gemma3")
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def softprompt(seed, n_tokens=5, width=32, **metadata):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, width)).astype(np.float32)
    return SoftPrompt(rows=rows, metadata={"name": f"Test {seed}", **metadata})


RAIN, NOIR = softprompt(1), softprompt(2, n_tokens=3)
STORM = SoftPrompt(rows=2 * softprompt(6, n_tokens=60).rows, metadata={"name": "Storm"})  # moves a long prompt too
FILES = {"storm.zip": STORM, "rain.zip": RAIN, "noir.zip": NOIR, "wide.zip": softprompt(3, width=64)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A ``user_data`` with checkpoints, a LoRA, the extension and files of soft prompts."""
    folder = user_data(tmp_path_factory.mktemp("textgen") / "user_data")
    make_checkpoints(folder / "models")
    make_lora(folder / "loras" / "lora", folder / "models" / "llama")
    for name, each in FILES.items():
        each.save(folder / "softprompts" / name)
    (folder / "softprompts" / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    return folder


@pytest.fixture(scope="module")
def host(data):
    with Host(data) as host:
        yield host


@pytest.fixture
def llama(host):
    """The host with the llama checkpoint loaded and no LoRA, whatever the test before left."""
    if host.get("/v1/internal/model/info") != {"model_name": "llama", "lora_names": [], "loader": "Transformers"}:
        host.load("llama")
    return host


@pytest.fixture(scope="module")
def without(data, tmp_path_factory):
    """A host without the extension, which has the llama checkpoint and one that reads the rain's rows by itself."""
    folder = user_data(tmp_path_factory.mktemp("without") / "user_data", extension=False)
    (folder / "models").rmdir()
    (folder / "models").symlink_to(data / "models")
    make_with_rows(data / "models" / "llama-rain", data / "models" / "llama", RAIN)
    with Host(folder, "--trust-remote-code", extension=False) as host:
        yield host


@pytest.fixture(scope="module")
def rain(data):
    return Truth(data / "models" / "llama", RAIN)


@pytest.fixture(scope="module")
def bare(data):
    return Truth(data / "models" / "llama")


# Completions


@STREAMED
@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_is_what_rows_in_the_matrix_give(host, data, family, stream):
    if host.get("/v1/internal/model/info")["model_name"] != family:
        host.load(family)
    with_rows = Truth(data / "models" / family, RAIN).text(PROMPT, 24)
    without = Truth(data / "models" / family).text(PROMPT, 24)
    assert with_rows != without
    assert host.complete(PROMPT, 24, stream, soft_prompt="rain.zip") == with_rows
    assert host.complete(PROMPT, 24, stream) == without


def test_several_completions_each_have_the_soft_prompt_once(llama, rain):
    answer = llama.post(
        "/v1/completions",
        {"prompt": [PROMPT, "The rain"], "max_tokens": 12, "temperature": 0, "n": 3, "soft_prompt": "rain.zip"},
    )
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [rain.text(PROMPT, 12)] * 3 + [rain.text("The rain", 12)] * 3


def test_several_soft_prompts_stand_in_order(llama, data):
    for names, rows in ((["rain.zip", "noir.zip"], (RAIN, NOIR)), (["noir.zip", "rain.zip"], (NOIR, RAIN))):
        expected = Truth(data / "models" / "llama", *rows).text(PROMPT, 16)
        assert llama.complete(PROMPT, 16, soft_prompt=names) == expected


def test_a_stopping_string_ends_the_text_with_and_without_streaming(llama, rain):
    whole = rain.text(PROMPT, 24)
    stop = whole[8:10]
    for stream in (False, True):
        text = llama.complete(PROMPT, 24, stream, stop=[stop], soft_prompt="rain.zip")
        assert text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "name, status", [("nobody.zip", 400), ("wide.zip", 400), ("broken.zip", 400), ("../models/llama", 400), (17, 400)]
)
@STREAMED
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(llama, bare, path, name, status, stream):
    body = {"prompt": "The door", "messages": MESSAGES, "max_tokens": 4, "stream": stream, "soft_prompt": name}
    if path == "/v1/chat/completions":
        del body["prompt"]
    with pytest.raises(Refused) as refused:
        llama.post(path, body)
    assert status <= refused.value.status < 500
    reason = {"wide.zip": "64", "broken.zip": "zip"}.get(name, "")
    assert reason in refused.value.body
    assert llama.complete("The door", 4) == bare.text("The door", 4)


# Samplers and settings: they see text tokens only


def repetition(penalty):
    def processor(ids, scores):
        seen = torch.tensor(sorted(set(ids)))
        scores = scores.clone()
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        return scores

    return processor


def presence_and_frequency(presence, frequency):
    def processor(ids, scores):
        counts = torch.bincount(torch.tensor(ids), minlength=len(scores)).to(scores.dtype)
        return scores - presence * (counts > 0) - frequency * counts

    return processor


def dry(multiplier, base, allowed):
    """ "Don't repeat yourself": what would extend a repetition of ``allowed`` tokens or more is made less likely."""

    def processor(ids, scores):
        longest = {}
        for end in range(len(ids) - 1):
            length = 0
            while length <= end and ids[end - length] == ids[-1 - length]:
                length += 1
            longest[ids[end + 1]] = max(longest.get(ids[end + 1], 0), min(length, 50))
        scores = scores.clone()
        for token, length in longest.items():
            if length >= max(allowed, 1):
                scores[token] -= multiplier * base ** (length - allowed)
        return scores

    return processor


def of_transformers(make):
    """A processor of transformers that is made anew for each truth."""

    def processor(ids, scores):
        return make(torch.tensor([ids]))(torch.tensor([ids]), scores.unsqueeze(0).clone())[0]

    return processor


PENALTIES = {
    "repetition": ({"repetition_penalty": 1.4}, repetition(1.4)),
    "presence": ({"presence_penalty": 1.5}, presence_and_frequency(1.5, 0)),
    "frequency": ({"frequency_penalty": 0.9}, presence_and_frequency(0, 0.9)),
    "dry": (
        {"dry_multiplier": 2.0, "dry_base": 1.5, "dry_allowed_length": 1, "dry_sequence_breakers": "[]"},
        dry(2.0, 1.5, 1),
    ),
    "no_repeat_ngram": (
        {"no_repeat_ngram_size": 2},
        of_transformers(lambda ids: transformers.NoRepeatNGramLogitsProcessor(2)),
    ),
}


@STREAMED
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_count_text_tokens_only(llama, rain, name, stream):
    options, processor = PENALTIES[name]
    expected = rain.text(PROMPT, 24, processor)
    assert expected != rain.text(PROMPT, 24)
    assert llama.complete(PROMPT, 24, stream, soft_prompt="rain.zip", **options) == expected


def test_encoder_repetition_penalty_favours_the_prompts_tokens_not_the_soft_ones(llama, rain):
    prompt = torch.tensor([rain.encode(PROMPT)])
    processor = transformers.EncoderRepetitionPenaltyLogitsProcessor(4.0, prompt)

    def favour(ids, scores):
        return processor(torch.tensor([ids]), scores.unsqueeze(0).clone())[0]

    expected = rain.text(PROMPT, 24, favour)
    assert expected != rain.text(PROMPT, 24)
    assert llama.complete(PROMPT, 24, soft_prompt="rain.zip", encoder_repetition_penalty=4.0) == expected


@STREAMED
def test_guidance_compares_with_the_negative_prompt_without_the_soft_prompt(llama, rain, stream):
    negative = rain.encode("Nobody said a word")
    start = len(rain.encode(PROMPT))

    def guide(ids, scores):
        given = scores.log_softmax(-1)
        unguided = rain.logits(negative + ids[start:], soft=[])[-1].log_softmax(-1)
        return unguided + 1.8 * (given - unguided)

    expected = rain.text(PROMPT, 16, guide)
    assert expected != rain.text(PROMPT, 16)
    options = {"guidance_scale": 1.8, "negative_prompt": "Nobody said a word", "soft_prompt": "rain.zip"}
    assert llama.complete(PROMPT, 16, stream, **options) == expected


@STREAMED
def test_a_grammar_holds(llama, rain, stream):
    allowed = [
        token for token in range(4, rain.vocabulary) if set(rain.tokenizer.convert_ids_to_tokens(token)) <= set("abc")
    ]

    def grammar(ids, scores):
        mask = torch.full_like(scores, -math.inf)
        mask[allowed + ([rain.tokenizer.eos_token_id] if len(ids) > start else [])] = 0
        return scores + mask

    start = len(rain.encode(PROMPT))
    expected = rain.text(PROMPT, 12, grammar)
    options = {"grammar_string": 'root ::= ("a" | "b" | "c")+', "soft_prompt": "rain.zip"}
    assert llama.complete(PROMPT, 12, stream, **options) == expected


@pytest.mark.parametrize(
    "options, stream",
    [
        ({"prompt_lookup_num_tokens": 3}, False),  # streamed, the host loses text with it, with or without us
        ({"static_cache": True}, False),
        ({"static_cache": True}, True),
        ({"max_tokens_second": 500}, True),
        ({"add_bos_token": False}, False),
    ],
    ids=str,
)
def test_ways_to_decode_change_nothing(llama, rain, bare, options, stream):
    for _ in range(2):  # a cache is kept from one request to the next
        assert llama.complete(PROMPT, 24, stream, soft_prompt="rain.zip", **options) == rain.text(PROMPT, 24)
        assert llama.complete(PROMPT, 24, stream, **options) == bare.text(PROMPT, 24)


def test_logprobs_are_those_with_the_soft_prompt(llama, rain):
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "logprobs": 3, "soft_prompt": "rain.zip"}
    given = llama.post("/v1/completions", body)["choices"][0]["logprobs"]["top_logprobs"]
    ids = rain.encode(PROMPT)
    for step in given[:5]:
        scores = rain.logits(ids)[-1].log_softmax(-1)
        values = sorted(scores.topk(3).values.tolist(), reverse=True)
        assert sorted(step.values(), reverse=True)[: len(values)] == pytest.approx(values, abs=1e-3)
        ids.append(int(scores.argmax()))


def test_logprobs_of_the_prompt_are_those_with_the_soft_prompt(llama, rain, bare):
    for truth, options in ((rain, {"soft_prompt": "rain.zip"}), (bare, {})):
        body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1, **options}
        given = llama.post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        ids = truth.encode(PROMPT)
        scores = truth.logits(ids).log_softmax(-1)
        expected = [float(scores[i, token]) for i, token in enumerate(ids[1:])]
        assert given[0] is None
        assert given[1:] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("use_samplers", [False, True])
def test_next_token_probabilities_are_those_with_the_soft_prompt(llama, rain, bare, use_samplers):
    for truth, options in ((rain, {"soft_prompt": "rain.zip"}), (bare, {})):
        body = {"prompt": PROMPT, "use_samplers": use_samplers, "top_logits": 3, "top_p": 1, **options}
        given = llama.post("/v1/internal/logits", body)
        expected = truth.logits(truth.encode(PROMPT))[-1].softmax(-1).topk(3).values.tolist()
        assert sorted(given.values(), reverse=True) == pytest.approx(expected, abs=1e-4)


SAMPLERS = {
    "temperature": {"temperature": 1.3},
    "dynamic_temperature": {
        "dynamic_temperature": True,
        "dynatemp_low": 0.5,
        "dynatemp_high": 2.0,
        "dynatemp_exponent": 1.5,
    },
    "temperature_last": {"temperature": 0.7, "temperature_last": True, "min_p": 0.01},
    "smoothing": {"smoothing_factor": 0.3, "smoothing_curve": 1.5},
    "min_p": {"min_p": 0.3},
    "top_p": {"top_p": 0.6},
    "top_k": {"top_k": 8, "top_p": 1.0},
    "typical_p": {"typical_p": 0.5},
    "xtc": {"xtc_threshold": 0.01, "xtc_probability": 1.0},
    "epsilon_cutoff": {"epsilon_cutoff": 5},
    "eta_cutoff": {"eta_cutoff": 5},
    "tfs": {"tfs": 0.8},
    "top_a": {"top_a": 0.4},
    "top_n_sigma": {"top_n_sigma": 1.2},
    "adaptive_p": {"adaptive_target": 0.3, "adaptive_decay": 0.9},
    "dry": {"dry_multiplier": 1.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": '["the"]'},
    "repetition": {"repetition_penalty": 1.2, "repetition_penalty_range": 20},
    "presence": {"presence_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.7},
    "encoder_repetition": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "mirostat": {"mirostat_mode": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
    "sampler_priority": {"sampler_priority": ["top_p", "temperature", "top_k"], "temperature": 1.2, "top_k": 20},
    "custom_token_bans": {"custom_token_bans": "17,44,60,61,62"},
    "ban_eos_token": {"ban_eos_token": True},
    "logit_bias": {"logit_bias": {"70": 4}},
    "grammar": {"grammar_string": "root ::= [a-z ]+"},
    "preset": {"preset": "Creative"},
    "special_tokens": {"skip_special_tokens": False},
    "greedy": {"do_sample": False},
}
"""Every sampler of the Parameters tab, by what a request says for it."""
TESTED_ELSEWHERE = {
    "add_bos_token",
    "auto_max_new_tokens",
    "guidance_scale",
    "negative_prompt",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "seed",
    "static_cache",
}
"""What has a test of its own, and ``seed``, which every test with samplers gives."""


def test_no_sampler_of_the_parameters_tab_is_forgotten():
    asked = (
        "import json; from modules.loaders import transformers_samplers as names; print(json.dumps(sorted(names())))"
    )
    done = subprocess.run([PYTHON, "-c", asked], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = set(json.loads(done.stdout.splitlines()[-1])) - {"grammar_file_row"}  # whose file fills the grammar
    tested = TESTED_ELSEWHERE.union(*SAMPLERS.values())
    assert names <= tested


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_what_it_draws_where_the_model_reads_the_rows_by_itself(llama, without, name):
    """Randomly, with a seed, in a host without the extension."""
    if without.get("/v1/internal/model/info")["model_name"] != "llama-rain":
        without.load("llama-rain")
    for seed in (1, 2):
        options = {"temperature": 1.0, "seed": seed, **SAMPLERS[name]}
        for stream in (False, True):
            expected = without.complete(PROMPT, 20, stream, **options)
            assert expected
            assert llama.complete(PROMPT, 20, stream, soft_prompt="rain.zip", **options) == expected


def test_contrastive_search_does_what_it_does_without_the_extension(llama, without, rain):
    """With transformers 5 that is nothing: it would load code from a hub. The next generation is right all the same."""
    if without.get("/v1/internal/model/info")["model_name"] != "llama-rain":
        without.load("llama-rain")
    options = {"temperature": 1.0, "do_sample": False, "penalty_alpha": 0.6, "top_k": 4}
    expected = without.complete(PROMPT, 12, **options)
    assert llama.complete(PROMPT, 12, soft_prompt="rain.zip", **options) == expected
    assert llama.complete(PROMPT, 12, soft_prompt="rain.zip") == rain.text(PROMPT, 12)


def test_with_nothing_selected_the_host_writes_what_it_writes_without_the_extension(llama, without):
    without.load("llama")
    for options in ({"temperature": 0}, *SAMPLERS.values()):
        options = {"temperature": 1.0, "seed": 7, **options}
        for stream in (False, True):
            assert llama.complete(PROMPT, 16, stream, **options) == without.complete(PROMPT, 16, stream, **options)
    for mode in ("instruct", "chat", "chat-instruct"):
        options = {"mode": mode, "temperature": 1.0, "seed": 7}
        assert llama.chat(MESSAGES, 16, **options) == without.chat(MESSAGES, 16, **options)


# Chat


@STREAMED
@pytest.mark.parametrize("mode", ["instruct", "chat", "chat-instruct"])
def test_a_chat_is_what_rows_in_the_matrix_give(llama, data, bare, mode, stream):
    prompt = llama.post("/v1/internal/chat-prompt", {"messages": MESSAGES, "mode": mode})["prompt"]
    storm = Truth(data / "models" / "llama", STORM)
    assert storm.text(prompt, 16) != bare.text(prompt, 16)
    for truth, options in ((storm, {"soft_prompt": "storm.zip"}), (bare, {})):
        expected = truth.text(prompt, 16)
        assert llama.chat(MESSAGES, 16, stream, mode=mode, **options).strip() == expected.strip()


# Budget


def test_a_long_prompt_loses_its_oldest_tokens_and_no_more(llama, rain):
    ids = rain.encode(PROMPT * 3)
    room = 64 - 8 - RAIN.n_tokens
    options = {"truncation_length": 64, "soft_prompt": "rain.zip"}
    assert len(ids) > room
    for stream in (False, True):
        text = llama.complete(PROMPT * 3, 8, stream, **options)
        assert text == rain.decode(rain.ids(ids[-room:], 8))


def test_a_prompt_that_just_fits_is_whole(llama, rain):
    length = len(rain.encode(PROMPT))
    whole, cut = rain.text(PROMPT, 8), rain.decode(rain.ids(rain.encode(PROMPT)[1:], 8))
    for room, expected in ((0, whole), (-1, cut)):
        options = {"truncation_length": length + RAIN.n_tokens + 8 + room, "soft_prompt": "rain.zip"}
        assert llama.complete(PROMPT, 8, **options) == expected


def test_new_tokens_fill_the_context_to_the_last(llama, rain):
    """Without max_tokens the host reserves 512 for the answer, and then lets it fill what the prompt leaves."""

    def no_end(ids, scores):
        scores = scores.clone()
        scores[rain.tokenizer.eos_token_id] = -math.inf
        return scores

    room = 512 + 10
    length = len(rain.encode(PROMPT)) + RAIN.n_tokens + room
    text = llama.complete(PROMPT, None, truncation_length=length, ban_eos_token=True, soft_prompt="rain.zip")
    assert text == rain.text(PROMPT, room, no_end)


def test_the_models_own_context_is_kept(host, data):
    """64 positions: truncation_length is the model's own, and the prompt is longer."""
    host.load("short")
    truth = Truth(data / "models" / "short", RAIN)
    ids = truth.encode(PROMPT * 3)
    assert host.complete(PROMPT * 3, 8, soft_prompt="rain.zip") == truth.decode(
        truth.ids(ids[-(64 - 8 - RAIN.n_tokens) :], 8)
    )


def test_a_budget_with_no_room_for_text_says_so_or_keeps_a_token(llama):
    for length in (RAIN.n_tokens, RAIN.n_tokens + 8, RAIN.n_tokens + 9, 1):
        try:
            llama.complete(PROMPT, 8, truncation_length=length, soft_prompt="rain.zip")
        except Refused as refused:
            assert 400 <= refused.status < 500
    assert llama.complete("The door", 4)


# Models come and go


def test_a_lora_is_used_with_the_soft_prompt(llama, data):
    folder = data / "models" / "llama"
    lora = data / "loras" / "lora"
    expected = Truth(folder, RAIN, lora=lora).text(PROMPT, 16)
    assert expected != Truth(folder, RAIN).text(PROMPT, 16)
    llama.post("/v1/internal/lora/load", {"lora_names": ["lora"]})
    for stream in (False, True):
        assert llama.complete(PROMPT, 16, stream, soft_prompt="rain.zip") == expected
        assert llama.complete(PROMPT, 16, stream) == Truth(folder, lora=lora).text(PROMPT, 16)
    llama.post("/v1/internal/lora/unload")
    assert llama.complete(PROMPT, 16, soft_prompt="rain.zip") == Truth(folder, RAIN).text(PROMPT, 16)


def test_requests_at_once_have_each_their_own(llama, data):
    wanted = {"rain.zip": (RAIN,), "noir.zip": (NOIR,), "": ()}
    expected = {name: Truth(data / "models" / "llama", *rows).text(PROMPT, 40) for name, rows in wanted.items()}
    got = []

    def ask(name, stream):
        got.append((name, llama.complete(PROMPT, 40, stream, soft_prompt=name)))

    threads = [threading.Thread(target=ask, args=(name, stream)) for name in wanted for stream in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(got) == len(threads)
    for name, text in got:
        assert text == expected[name], name


def test_a_client_that_goes_away_leaves_the_next_request_right(llama, rain, bare):
    events = llama.stream(
        "/v1/completions", {"prompt": PROMPT, "max_tokens": 400, "ban_eos_token": True, "soft_prompt": "rain.zip"}
    )
    next(events), next(events)
    events.close()
    assert llama.complete(PROMPT, 16) == bare.text(PROMPT, 16)
    assert llama.complete(PROMPT, 16, soft_prompt="rain.zip") == rain.text(PROMPT, 16)
