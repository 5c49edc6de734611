"""OpenAI's API, with soft prompts as one more field."""

import json

import pytest
from serving import GREEDY, slowly

ASKED = {"prompt": "The door opened and", "max_tokens": 20, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "The door opened"}], "max_tokens": 20, "temperature": 0}


def events(answer):
    """The chunks of a stream, which has to end with [DONE]."""
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
    *chunks, last, rest = answer.body.decode().split("\n\n")
    assert last == "data: [DONE]" and rest == ""
    return [json.loads(chunk[len("data: ") :]) for chunk in chunks]


@pytest.fixture
def expected(ask):
    return ask("POST", "/api/v1/generate", GREEDY).text


def test_the_model_is_listed(ask, session):
    listed = ask("GET", "/v1/models").json
    assert listed["object"] == "list" and [each["id"] for each in listed["data"]] == ["tiny"]
    session.use(None)
    assert ask("GET", "/v1/models").json["data"] == []


def test_a_completion(ask, expected, engine):
    answer = ask("POST", "/v1/completions", ASKED).json
    (choice,) = answer["choices"]
    assert choice["text"] == expected and choice["finish_reason"] == "length" and choice["index"] == 0
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    n_prompt = len(engine.token_ids("The door opened and"))
    assert answer["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": 20, "total_tokens": n_prompt + 20}


def test_a_completion_as_it_comes(ask, expected):
    fields = {**ASKED, "stream": True, "echo": True, "stream_options": {"include_usage": True}}
    *chunks, usage = events(ask("POST", "/v1/completions", fields))
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts[0] == "The door opened and" and "".join(texts[1:]) == expected and len(texts) > 5
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 20
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_several_prompts_and_several_texts(ask, expected):
    fields = {**ASKED, "prompt": ["The door opened and", "Nobody"], "temperature": 1.3, "n": 2, "seed": 5}
    choices = ask("POST", "/v1/completions", fields).json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in choices}) == 4
    assert ask("POST", "/v1/completions", fields).json["choices"] == choices
    streamed = {}
    for chunk in events(ask("POST", "/v1/completions", {**fields, "stream": True})):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert streamed == {choice["index"]: choice["text"] for choice in choices}


def test_a_conversation_by_the_models_own_template(ask, engine, tokenizer):
    template = "{% for m in messages %}{{ m['role'].upper() }}! {{ m['content'] }} {% endfor %}ASSISTANT!"
    tokenizer.chat_template = template
    try:
        assert engine.chat_prompt(CHAT["messages"]) == "USER! The door opened ASSISTANT!"
        answer = ask("POST", "/v1/chat/completions", CHAT).json
        prompt = {**ASKED, "prompt": "USER! The door opened ASSISTANT!"}
        text = ask("POST", "/v1/completions", prompt).json["choices"][0]["text"]
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
        assert answer["object"] == "chat.completion"
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        assert engine.chat_prompt(CHAT["messages"]) is None
    finally:
        tokenizer.chat_template = None


def test_a_template_that_writes_the_beginning_itself_does_not_double_it(engine, tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    try:
        ids = engine.token_ids(engine.chat_prompt([{"role": "user", "content": "The door"}]))
        assert ids == engine.token_ids("The door")
    finally:
        tokenizer.chat_template = None


def test_a_conversation_with_a_model_that_has_no_template(ask):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "door"}]},
        {"role": "assistant", "content": "opened."},
        {"role": "user", "content": "And?"},
    ]
    prompt = "Be kind.\nUser: The door\nAssistant: opened.\nUser: And?\nAssistant:"
    answer = ask("POST", "/v1/chat/completions", {**CHAT, "messages": messages}).json["choices"][0]["message"]
    assert answer["content"] == ask("POST", "/v1/completions", {**ASKED, "prompt": prompt}).json["choices"][0]["text"]


def test_a_conversation_as_it_comes(ask):
    whole = ask("POST", "/v1/chat/completions", CHAT).json["choices"][0]["message"]["content"]
    first, *chunks = events(ask("POST", "/v1/chat/completions", {**CHAT, "stream": True}))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
    assert chunks[-1]["choices"][0]["delta"] == {} and chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("path", "asked"), [("/v1/completions", ASKED), ("/v1/chat/completions", CHAT)])
def test_soft_prompt_is_one_more_field(ask, session, path, asked):
    def text(**fields):
        return ask("POST", path, {**asked, **fields}).json["choices"][0]

    plain, noir = text(), text(soft_prompt="noir.zip")
    assert noir != plain
    session.select("noir.zip")
    assert text() == noir and text(soft_prompt="") == plain
    assert text(soft_prompt=["noir.zip", "space.zip"]) not in (noir, plain)


def test_its_words_are_understood(ask, expected, tokenizer):
    def text(**fields):
        return ask("POST", "/v1/completions", {**ASKED, **fields}).json["choices"][0]

    stop = expected[5:7]
    assert text(stop=stop) == {**text(stop=[stop]), "text": expected[: expected.index(stop)], "finish_reason": "stop"}
    others = {str(token): -100 for token in range(131) if token != tokenizer.convert_tokens_to_ids("Q")}
    assert text(logit_bias=others, max_tokens=3)["text"] == "QQQ"
    assert text(frequency_penalty=2, presence_penalty=2) != text()
    drawn = [text(temperature=1.5, seed=seed)["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_sillytavern_sends_for_koboldcpp_is_taken(ask):
    fields = {
        "prompt": "The door opened and",
        "model": "",
        "max_new_tokens": 16,
        "max_tokens": 16,
        "temperature": 1,
        "top_p": 1,
        "typical_p": 1,
        "typical": 1,
        "sampler_seed": -1,
        "min_p": 0.1,
        "repetition_penalty": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "top_k": 0,
        "skew": 0,
        "min_tokens": 0,
        "add_bos_token": True,
        "smoothing_factor": 0,
        "dry_sequence_breakers": '["\\n"]',
        "stopping_strings": ["\nYou:"],
        "stop": ["\nYou:"],
        "truncation_length": 2048,
        "ban_eos_token": False,
        "skip_special_tokens": True,
        "top_a": 0,
        "tfs": 1,
        "custom_token_bans": "",
        "banned_strings": [],
        "api_type": "koboldcpp",
        "sampler_order": [6, 0, 1, 3, 4, 2, 5],
        "rep_pen": 1,
        "rep_pen_range": 0,
        "seed": -1,
        "grammar": "",
        "guidance_scale": 1,
        "stream": True,
    }
    assert events(ask("POST", "/v1/completions", fields))[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "what"),
    [
        ("/v1/completions", {"prompt": 5}, 400, "prompt"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "n": 9}, 400, "n"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": "x", "soft_prompt": "wide.zip"}, 400, "soft_prompt"),
        ("/v1/chat/completions", {}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ("/v1/nothing", {}, 404, None),
    ],
)
def test_errors_are_in_its_form(ask, path, fields, status, what):
    answer = ask("POST", path, fields)
    assert answer.status == status
    assert answer.json["error"]["message"] and answer.json["error"]["param"] == what


def test_an_error_in_a_stream_is_an_event(ask, model, caplog):
    calls = []

    def fail(*_):
        calls.append(1)
        return 1 / (len(calls) < 8)

    handle = model.register_forward_hook(lambda *_: (fail(), None)[1])
    chunks = events(ask("POST", "/v1/completions", {**ASKED, "stream": True}))
    handle.remove()
    assert chunks[-1]["error"]["type"] == "server_error"


def test_without_a_model_it_says_so(ask, session, model):
    session.use(None)
    with slowly(model):
        answer = ask("POST", "/v1/chat/completions", CHAT)
    assert answer.status == 501 and answer.json["error"]["type"] == "not_implemented"
