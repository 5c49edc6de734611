"""The extension in a stand-in for the host's modules, loaded as the host loads it, with real tiny models."""

import copy
import gc
import importlib
import json
import logging
import os
import shutil
import sys
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILY, VOCABULARY, softprompt, tiny_model, tiny_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.errors import NoModel, NoTensor, SoftPromptError, TooLarge
from kobold_sp_plugin.hosts import text_generation_webui as ours
from kobold_sp_plugin.hosts.text_generation_webui import panel, selection_file
from kobold_sp_plugin.hosts.text_generation_webui.generation import reserve
from kobold_sp_plugin.hosts.text_generation_webui.model import BACKENDS

REPOSITORY = Path(ours.__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "hooks" / "text_generation_webui" / "script.py"
STANDIN = Path(__file__).resolve().parent / "standin_text_generation_webui"
PROMPT = "The door opened and the rain came in."

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 10), reason="text-generation-webui itself has never run on a Python before 3.10"
)

needs_pydantic = pytest.mark.skipif(
    not find_spec("pydantic"), reason="the host's API is made of pydantic's models, which are not installed"
)

NOIR, SPACE, WIDE = softprompt(1, name="Noir"), softprompt(2, 6, name="Space"), softprompt(3, width=64, name="Wide")


class Host:
    """The stand-in's modules, and the ways a user goes through them."""

    def __init__(self, data):
        self.data = data
        for name in ("shared", "extensions", "models", "text_generation", "chat", "prompts", "logits"):
            setattr(self, name, importlib.import_module(f"modules.{name}"))
        self.shared.user_data_dir = data
        self.shared.available = {
            name: lambda make=make: (make(), tiny_tokenizer())
            for name, make in {
                "first": first,
                "second": lambda: tiny_model("gpt2", seed=2),
                "wide": lambda: tiny_model("gpt2", seed=3, n_embd=64),
            }.items()
        }

    @property
    def folder(self):
        return self.data / "softprompts"

    @property
    def attached(self):
        return ours.extension.attached

    @property
    def session(self):
        return self.attached.session

    def start(self, extensions=("soft_prompts",)):
        """What the host does when its interface starts, or starts again."""
        self.shared.args.extensions = list(extensions)
        self.extensions.load_extensions()

    def load(self, name, loader=None):
        self.models.unload_model()
        self.shared.model, self.shared.tokenizer = self.models.load_model(name, loader)

    def state(self, **changes):
        return {
            "truncation_length": 100,
            "max_new_tokens": 12,
            "do_sample": False,
            "stream": False,
            "history": {"internal": []},
            **changes,
        }

    def text(self, prompt=PROMPT, **changes):
        return list(self.text_generation.generate_reply(prompt, self.state(**changes)))[-1]

    def snapshot(self):
        """Every function of the host's modules."""
        return {
            (name, key): value
            for name, module in sys.modules.items()
            if name.split(".")[0] == "modules"
            for key, value in vars(module).items()
            if callable(value) and key not in ("model", "tokenizer")
        }


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The stand-in with a model and three files, one of which does not fit; the extension is not yet in."""
    (tmp_path / "extensions" / "soft_prompts").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "extensions" / "soft_prompts")
    (tmp_path / "softprompts").mkdir()
    NOIR.save(tmp_path / "softprompts" / "noir.zip")
    SPACE.save(tmp_path / "softprompts" / "space.zip")
    WIDE.save(tmp_path / "softprompts" / "wide.zip")
    monkeypatch.syspath_prepend(str(STANDIN))
    host = Host(tmp_path)
    host.load("first")
    yield host
    ours.extension.undo()
    ours.extension.fault = ""
    for name in [name for name in sys.modules if name.split(".")[0] in ("modules", "user_ext_soft_prompts")]:
        del sys.modules[name]


@pytest.fixture
def started(host):
    host.start()
    assert ours.extension.fault == ""
    return host


def ids_of(host, prompt=PROMPT):
    return host.shared.tokenizer.encode(prompt, return_tensors="pt")


def first():
    """The model that the host has at first."""
    return tiny_model(FAMILY, seed=8)


def reference(host, softprompts, prompt=PROMPT, room=None, model=None, **options):
    """The text of a model in whose embedding matrix the rows really stand, read as ordinary tokens."""
    larger, n_tokens = enlarged(first() if model is None else model, softprompts)
    ids = ids_of(host, prompt)
    ids = ids if room is None else ids[:, -room:]
    soft = torch.arange(VOCABULARY, VOCABULARY + n_tokens).unsqueeze(0)
    ids = torch.cat([soft, ids], dim=1)
    with torch.no_grad():
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, **options}
        output = larger.generate(ids, **options)
    return host.shared.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def enlarged(model, softprompts):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    weight = base.get_input_embeddings().weight.detach()
    rows = [torch.tensor(np.array(each.rows)) for each in softprompts]
    base.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat([weight, *rows])))
    return model, sum(each.n_tokens for each in softprompts)


# The text


def test_the_text_is_that_of_a_larger_embedding_matrix_and_without_it_the_hosts_own(host):
    plain = host.text()
    with_noir = reference(host, [NOIR])
    host.start()
    assert host.text() == plain
    host.attached.select(["noir.zip"])
    assert host.text() == host.text(stream=True) == with_noir != plain
    assert list(host.text_generation.generate_reply(PROMPT, host.state(), stopping_strings=["\0"]))[-1] == with_noir
    host.attached.select([])
    assert host.text() == host.text(stream=True) == plain


def test_several_are_read_in_order(host):
    texts = {names: reference(host, names) for names in ((NOIR, SPACE), (SPACE, NOIR))}
    host.start()
    host.attached.select(["noir.zip", "space.zip"])
    assert host.text() == texts[NOIR, SPACE]
    host.attached.select(["space.zip", "noir.zip"])
    assert host.text() == texts[SPACE, NOIR] != texts[NOIR, SPACE]


@pytest.mark.parametrize("path", ["chatbot_wrapper", "impersonate_wrapper"])
def test_chat_reads_it_and_stays_within_the_budget(host, path):
    history = {"internal": [[f"Word {number}.", "Came in."] for number in range(20)]}
    host.start()
    host.attached.select(["space.zip"])
    state = host.state(history=history)
    before = copy.deepcopy(state)
    text = list(getattr(host.chat, path)(PROMPT, state))[-1]
    assert state == before, "the host's own state stays as it is"
    (context,) = host.shared.contexts
    assert 60 < context <= 100 - 12 - 6
    # What it generated from: the chat's prompt, or, where that is made past the state hook, as much of its end.
    room = {**state, "truncation_length": 94} if path == "chatbot_wrapper" else state
    text_in = PROMPT if path == "chatbot_wrapper" else ""
    prompt = host.chat.generate_chat_prompt(text_in, room) + ("" if text_in else PROMPT)
    assert text == reference(host, [SPACE], prompt, room=82)


def test_a_chats_budget_is_reserved_once(started):
    started.attached.select(["space.zip"])
    list(started.chat.chatbot_wrapper("a", started.state(history={"internal": [["a", "b"]] * 60})))
    (context,) = started.shared.contexts
    assert 100 - 12 - 6 - 4 < context <= 100 - 12 - 6


def test_a_long_prompt_is_cut_to_the_token_and_soft_tokens_are_never_cut(host):
    long = " ".join([PROMPT] * 20)
    expected = reference(host, [SPACE], long, room=100 - 12 - 6)
    host.start()
    host.attached.select(["space.zip"])
    assert host.text(long) == host.text(long, auto_max_new_tokens=True) == expected
    assert host.shared.contexts == [82, 82]


def test_a_truncation_length_beyond_the_model_does_not_go_past_its_context(host):
    long = " ".join([PROMPT] * 20)
    expected = reference(host, [SPACE], long, room=128 - 12 - 6)
    host.start()
    host.attached.select(["space.zip"])
    assert host.text(long, truncation_length=8192) == expected


class Witness(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return scores


def test_samplers_see_text_only_and_the_hosts_list_is_its_own(started):
    witness = Witness()
    processors = LogitsProcessorList([witness])
    started.attached.select(["noir.zip"])
    state = started.state(logits_processor=processors, repetition_penalty=1.5, no_repeat_ngram_size=2)
    list(started.text_generation.generate_reply(PROMPT, state))
    text = ids_of(started)[0].tolist()
    assert witness.seen and all(seen[0][: len(text)] == text for seen in witness.seen)
    assert max(max(seen[0]) for seen in witness.seen) < VOCABULARY
    assert state["logits_processor"] is processors and list(processors) == [witness] and not vars(processors)


def test_a_bare_processor_is_carried_along(started):
    witness = Witness()
    started.text(logits_processor=witness)
    assert witness.seen


def test_a_grammar_serves_one_generation_though_the_state_is_used_twice(started):
    started.attached.select(["noir.zip"])
    state = started.attached.carrying(started.state(grammar_string="root ::= [a-z]+"))
    for _ in range(2):
        list(started.text_generation.generate_reply(PROMPT, state, is_chat=True))
        assert list(state["logits_processor"]) == []


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"static_cache": True}])
def test_other_ways_of_generating(host, options):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this release has it not, or in another form")
    expected = reference(host, [NOIR])
    host.start()
    host.attached.select(["noir.zip"])
    assert host.text(**options) == expected


def test_guidance_by_a_negative_prompt(host):
    options = {"guidance_scale": 1.8, "negative_prompt_ids": ids_of(host, "Rain.")}
    expected = reference(host, [NOIR], **options)
    host.start()
    host.attached.select(["noir.zip"])
    assert host.text(guidance_scale=1.8, negative_prompt="Rain.") == expected != host.text()


def test_a_generation_that_has_begun_keeps_its_soft_prompts(host):
    expected = reference(host, [NOIR])
    host.start()
    host.attached.select(["noir.zip"])
    replies = host.text_generation.generate_reply(PROMPT, host.state(stream=True))
    next(replies)
    host.attached.select([])
    assert list(replies)[-1] == expected
    carrying = host.attached.carrying(host.state())
    host.attached.select(["space.zip"])
    assert list(host.text_generation.generate_reply(PROMPT, carrying, is_chat=True))[-1] != expected
    carrying = host.attached.carrying(host.state())
    host.attached.select(["noir.zip"])
    assert list(host.text_generation.generate_reply(PROMPT, carrying, is_chat=True))[-1] == reference(host, [SPACE])


def test_a_state_that_is_copied_deeply_keeps_them(started):
    started.attached.select(["noir.zip"])
    state = copy.deepcopy(started.attached.carrying(started.state()))
    chosen = vars(state["logits_processor"])["kobold_sp_carried"]
    assert chosen.softprompts == started.session.softprompts
    assert chosen.softprompts[0] is started.session.softprompts[0]


def test_a_generation_past_the_extensions_has_none_and_the_log_says_so(started, caplog):
    plain = started.text()
    started.attached.select(["noir.zip"])
    assert list(started.text_generation.generate_reply(PROMPT, started.state(), is_chat=True))[-1] == plain
    assert "without the selected soft prompt" in caplog.text


def test_a_failure_is_shown(started):
    started.attached.select(["noir.zip"])
    with pytest.raises(SoftPromptError):
        started.shared.model.generate(
            inputs_embeds=torch.zeros(1, 3, 32), logits_processor=started.attached.carrying({})["logits_processor"]
        )
    assert "The last generation failed" in panel.Panel(started.attached).page()
    started.text()
    assert "The last generation failed" not in panel.Panel(started.attached).page()


def test_a_model_that_came_since_the_state_was_made_reads_them_too(started):
    started.attached.select(["noir.zip"])
    started.load("second")
    expected = started.text()
    started.load("first")
    state = started.attached.carrying(started.state())
    started.load("second")
    assert list(started.text_generation.generate_reply(PROMPT, state, is_chat=True))[-1] == expected
    started.load("wide")
    with pytest.raises(SoftPromptError, match="made for 32 columns, this model has 64"):
        list(started.text_generation.generate_reply(PROMPT, state, is_chat=True))


def test_a_chat_with_an_idle_host_keeps_to_the_budget_from_the_start(started, monkeypatch):
    started.attached.select(["space.zip"])
    started.models.unload_model(keep_model_name=True)
    started.attached.sync()
    started.shared.args.idle_timeout = 1
    budgets = []
    make = started.chat.generate_chat_prompt

    def prompt(text, state, **options):
        budgets.append(state["truncation_length"])
        return make(text, state, **options)

    monkeypatch.setattr(started.chat, "generate_chat_prompt", prompt)
    list(started.chat.chatbot_wrapper(PROMPT, started.state()))
    assert budgets == [100 - 6]


# The budget


@pytest.mark.parametrize(
    ("limit", "new", "n_tokens", "most", "expected"),
    [
        (2048, 512, 100, None, (1948, 512)),
        (2048, 512, 0, 1024, (2048, 512)),
        (2048, 512, 100, 1024, (924, 512)),
        (2048, 2000, 100, None, (1948, 1900)),
        (512, 512, 12, None, (500, 250)),
        (200, 512, 20, None, (180, 90)),
        (64, 10, 80, None, (2, 1)),
    ],
)
def test_the_budget(limit, new, n_tokens, most, expected):
    state = {"truncation_length": limit, "max_new_tokens": new, "other": 1}
    reserved = reserve(state, n_tokens, most)
    assert (reserved["truncation_length"], reserved["max_new_tokens"]) == expected
    assert reserved["other"] == 1 and reserved is not state
    assert state == {"truncation_length": limit, "max_new_tokens": new, "other": 1}


@given(st.integers(0, 9000), st.integers(0, 9000), st.integers(1, 2047), st.integers(1, 9000) | st.none())
def test_the_budget_is_never_zero_and_never_more_than_there_is(limit, new, n_tokens, most):
    reserved = reserve({"truncation_length": limit, "max_new_tokens": new}, n_tokens, most)
    room = reserved["truncation_length"] - reserved["max_new_tokens"]
    assert room >= 1
    assert 0 <= reserved["max_new_tokens"] <= new
    least = min(limit, most or limit) - n_tokens
    assert reserved["truncation_length"] == max(2, least)


def test_an_answer_that_has_to_be_shorter_is_announced(started, caplog):
    started.attached.select(["space.zip"])
    started.text(max_new_tokens=97)
    assert "6 soft tokens leave no room for a prompt beside 97 new tokens; 91 are generated" in caplog.text


def test_the_token_counters_tell_the_truth(started):
    words = started.prompts.count_tokens(PROMPT)
    chat = started.chat.count_prompt_tokens(PROMPT, started.state())
    assert chat == f"{words} / 100"
    started.attached.select(["noir.zip"])
    assert int(started.prompts.count_tokens(PROMPT)) == int(words) + 4
    assert started.chat.count_prompt_tokens(PROMPT, started.state()) == f"{int(words) + 4} / 100"
    long = started.state(history={"internal": [["Word.", "Came."]] * 40})
    assert int(started.chat.count_prompt_tokens(PROMPT, long).split()[0]) <= 100 - 12


# Models come and go


def test_the_selection_outlasts_a_model_that_is_unloaded_reloaded_and_changed(host):
    expected = reference(host, [NOIR])
    host.start()
    host.attached.select(["noir.zip"])
    host.models.unload_model(keep_model_name=True)
    host.attached.sync()
    assert host.session.engine is None and host.session.selection == ("noir.zip",)
    host.shared.args.idle_timeout = 1
    assert host.text() == expected
    host.load("wide")
    host.attached.sync()
    assert host.session.selection == () and "noir.zip" in host.session.status()["notice"]
    assert panel.Panel(host.attached).page().count("soft-prompts-notice") == 1, "it is said once"
    assert {each["filename"]: each["usable"] for each in host.session.status()["entries"]}["wide.zip"]
    host.load("first")
    assert host.text() == expected, "what was chosen last is chosen again"


def test_another_choice_is_not_undone_by_a_change_of_model(started):
    started.attached.select(["noir.zip"])
    started.attached.select([])
    started.load("second")
    started.attached.sync()
    assert started.session.selection == ()


def test_the_last_generation_of_a_model_that_goes_does_not_keep_it(started):
    started.attached.select(["noir.zip"])
    started.text()
    model = weakref.ref(started.shared.model)
    started.load("second")
    started.attached.sync()
    gc.collect()
    assert model() is None


def test_a_measurement_does_not_bring_back_what_was_taken_off_a_model(started):
    model, engine = started.shared.model, started.session.engine
    ours.extension.undo()
    with pytest.raises(NoModel):  # one that comes too late
        engine.effect([NOIR])
    assert "kobold_sp" not in str(vars(model)) and "kobold_sp" not in str(vars(model.get_input_embeddings()))


def test_a_loader_waits_for_a_measurement_of_the_old_model(started):
    engine = started.session.engine
    loaded = threading.Thread(target=started.load, args=("second",))
    with engine.lock:
        loaded.start()
        loaded.join(0.2)
        assert loaded.is_alive()
    loaded.join(30)
    assert not loaded.is_alive() and started.shared.model_name == "second"


def test_a_backend_that_takes_none_says_why_and_is_left_alone(started):
    started.attached.select(["noir.zip"])
    started.load("second", "llama.cpp")
    state = started.state()
    assert started.attached.carrying(state) is state
    assert started.text() == f"llama.cpp: {PROMPT}"
    for each in started.session.status()["entries"]:
        assert each["verdict"] == "not with this backend"
        assert "llama.cpp runs as a process of its own" in each["reason"] and "Transformers loader" in each["reason"]
    assert "noir.zip" in started.session.status()["notice"]
    with pytest.raises(SoftPromptError, match=r"llama\.cpp"):
        started.attached.select(["noir.zip"])
    started.load("first", "Transformers")
    started.attached.sync()
    assert started.session.selection == ("noir.zip",)


def test_a_model_that_cannot_generate_is_left_alone(host):
    host.start()
    model = first().model
    before = set(vars(model)), set(vars(model.get_input_embeddings()))
    host.models.unload_model()
    host.attached.sync()
    host.shared.model, host.shared.tokenizer = model, tiny_tokenizer()
    host.attached.sync()
    assert {each["verdict"] for each in host.session.status()["entries"]} == {"not with this backend"}
    assert "cannot generate" in host.session.status()["entries"][0]["reason"]
    assert (set(vars(model)), set(vars(model.get_input_embeddings()))) == before


@pytest.mark.parametrize("spoil", [lambda model: model.set_input_embeddings(None), None])
def test_a_model_that_soft_tokens_cannot_be_given_to_is_left_alone(host, spoil):
    host.start()
    model = host.shared.model if spoil else type("Odd", (), {})()
    if spoil:
        spoil(model)
    host.models.unload_model()
    host.attached.sync()
    host.shared.model, host.shared.tokenizer = model, object()
    host.attached.sync()
    assert {each["verdict"] for each in host.session.status()["entries"]} == {"not with this backend"}
    assert "kobold_sp" not in str(vars(model))


def test_every_known_backend_has_a_reason_of_its_own():
    assert len(BACKENDS) >= 4 and all(BACKENDS.values())


def test_loras_come_and_go(host):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"]

    def adapted(model):
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.7, generator=torch.Generator().manual_seed(len(name)))
        return wrapped.eval()

    plain, expected = host.text(), reference(host, [NOIR])
    with_lora = reference(host, [NOIR], model=adapted(first()))
    assert len({plain, expected, with_lora}) == 3
    host.start()
    host.attached.select(["noir.zip"])
    host.shared.model, host.shared.lora_names = adapted(host.shared.model), ["tiny"]
    assert host.text() == host.text(stream=True) == with_lora
    assert host.session.status()["model"] == "first + tiny"
    host.shared.model, host.shared.lora_names = host.shared.model.unload(), []
    assert host.text() == expected


# Probabilities


def logits_with(host, softprompts, prompt=PROMPT):
    larger, n_tokens = enlarged(first(), softprompts)
    soft = torch.arange(VOCABULARY, VOCABULARY + n_tokens).unsqueeze(0)
    with torch.no_grad():
        return larger(torch.cat([soft, ids_of(host, prompt)], dim=1)).logits[0, n_tokens:]


def test_the_next_tokens_probabilities_are_those_with_the_soft_prompt(host):
    plain, expected = logits_with(host, [])[-1], logits_with(host, [NOIR])[-1]
    host.start()
    state = host.state()
    torch.testing.assert_close(host.logits.get_next_logits(PROMPT, state, False, ""), plain)
    host.attached.select(["noir.zip"])
    torch.testing.assert_close(host.logits.get_next_logits(PROMPT, state, False, ""), expected)
    assert host.logits.get_next_logits(PROMPT, state, True, "") == host.text(max_new_tokens=1)
    ids = ids_of(host)
    with torch.no_grad():
        torch.testing.assert_close(host.shared.model(input_ids=ids).logits[0, -1], plain)


# The API


@pytest.fixture
def api(host):
    """The host's API, imported after the extensions as the host does."""
    host.start()
    host.attached.select(["space.zip"])
    host.requests = importlib.import_module("modules.api.typing")
    host.completions = importlib.import_module("modules.api.completions")
    host.errors = importlib.import_module("modules.api.errors")

    def ask(stream=False, **fields):
        body = host.requests.to_dict(host.requests.CompletionRequest(prompt=PROMPT, max_tokens=12, **fields))
        if stream:
            return list(host.completions.stream_completions(body))[-1]
        return host.completions.completions(body)

    host.ask = ask
    return host


@needs_pydantic
def test_a_request_may_name_its_own(api):
    noir, space, both, none = (reference(api, each) for each in ([NOIR], [SPACE], [NOIR, SPACE], []))
    assert len({noir, space, both, none}) == 4
    assert api.ask()["choices"] == [space]
    assert api.ask(soft_prompt=None)["choices"] == [space]
    assert api.ask(soft_prompt="noir.zip")["choices"] == [noir]
    assert api.ask(soft_prompt="noir.zip", n=3)["choices"] == [noir] * 3
    assert api.ask(soft_prompt="noir.zip", stream=True)["text"] == noir
    assert api.ask(soft_prompt=["noir.zip", "space.zip"])["choices"] == [both]
    assert api.ask(soft_prompt="")["choices"] == api.ask(soft_prompt=[])["choices"] == [none]
    assert api.session.selection == ("space.zip",)


@needs_pydantic
def test_the_budget_is_reserved_once_for_each_of_several_answers(api):
    api.requests.to_dict(api.requests.CompletionRequest())
    body = api.requests.to_dict(
        api.requests.CompletionRequest(prompt=" ".join([PROMPT] * 20), max_tokens=12, n=3, soft_prompt="space.zip")
    )
    api.completions.completions(body)
    assert api.shared.contexts == [100 - 12 - 6] * 3


@needs_pydantic
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("gone.zip", "there is no soft prompt named 'gone.zip'"),
        ("../softprompts/noir.zip", "leads out of the folder"),
        ("wide.zip", "wide.zip: made for 64 columns, this model has 32"),
        (["noir.zip", "gone.zip"], "there is no soft prompt named 'gone.zip'"),
        (["noir.zip"] * 32, "128 soft tokens leave no room in the model's 128"),
        (["noir.zip"] * 65, "65 soft prompts at once"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_before_it_is_answered(api, asked, reason):
    with pytest.raises(api.errors.InvalidRequestError) as refused:
        api.requests.CompletionRequest(prompt=PROMPT, soft_prompt=asked)
    assert refused.value.code == 400 and refused.value.param == "soft_prompt" and reason in refused.value.message


@needs_pydantic
def test_an_api_that_does_not_answer_its_own_errors_is_told_of_a_wrong_value(api):
    import pydantic

    script = sys.modules["modules.api.script"] = SimpleNamespace(app=SimpleNamespace(exception_handlers={404: None}))
    with pytest.raises(pydantic.ValidationError, match=r"there is no soft prompt named 'gone\.zip'"):
        api.requests.CompletionRequest(prompt=PROMPT, soft_prompt="gone.zip")
    script.app.exception_handlers[api.errors.OpenAIError] = None
    with pytest.raises(api.errors.InvalidRequestError):
        api.requests.CompletionRequest(prompt=PROMPT, soft_prompt="gone.zip")


@needs_pydantic
def test_what_is_no_name_is_refused_like_any_other_wrong_type(api):
    import pydantic

    with pytest.raises(pydantic.ValidationError):
        api.requests.CompletionRequest(prompt=PROMPT, soft_prompt=5)


@needs_pydantic
def test_a_request_to_an_idle_host_names_a_file_that_is_read_when_the_model_is_back(api):
    expected = reference(api, [NOIR])
    api.models.unload_model(keep_model_name=True)
    api.shared.args.idle_timeout = 1
    assert api.ask(soft_prompt="noir.zip")["choices"] == [expected]


@needs_pydantic
@pytest.mark.parametrize("stream", [False, True])
def test_the_prompts_own_probabilities_are_those_of_the_request(api, stream):
    plain, with_noir, with_space = (logits_with(api, each) for each in ([], [NOIR], [SPACE]))
    torch.testing.assert_close(api.ask(stream, echo=True, logprobs=1)["logprobs"], with_space)
    torch.testing.assert_close(api.ask(stream, echo=True, logprobs=1, soft_prompt="noir.zip")["logprobs"], with_noir)
    torch.testing.assert_close(api.ask(stream, echo=True, logprobs=1, soft_prompt="")["logprobs"], plain)


@needs_pydantic
def test_a_prompt_too_long_to_be_scored_is_refused(api):
    context = api.session.engine.context
    body = api.requests.to_dict(api.requests.CompletionRequest(prompt="x" * 4 * context, max_tokens=1, echo=True))
    with pytest.raises(api.errors.InvalidRequestError) as refused:
        api.completions.completions(body)
    assert "exceed a context" in refused.value.message


@needs_pydantic
def test_an_api_whose_routes_are_built_already_is_announced(host, caplog):
    module = importlib.import_module("modules.api.typing")
    sys.modules["modules.api.script"] = SimpleNamespace(app=object())
    before = module.CompletionRequest
    host.start()
    assert "started anew" in caplog.text
    assert module.CompletionRequest is not before
    ours.extension.undo()
    assert module.CompletionRequest is before


# The extension comes, stays and goes


def test_the_script_is_executed_again_and_again(host):
    expected = reference(host, [NOIR])
    host.start()
    attached, functions = host.attached, None
    host.attached.select(["noir.zip"])
    for _ in range(3):
        host.start()
        assert host.attached is attached
        assert functions in (None, host.snapshot())
        functions = host.snapshot()
    assert host.text() == expected


def test_what_is_switched_off_is_off(host):
    plain, words = host.text(), host.prompts.count_tokens(PROMPT)
    host.start()
    host.attached.select(["noir.zip"])
    assert host.text() != plain
    host.start(extensions=())
    assert host.text() == host.text(stream=True) == plain
    assert list(host.chat.impersonate_wrapper(PROMPT, host.state()))[-1] == plain
    assert host.prompts.count_tokens(PROMPT) == words
    torch.testing.assert_close(host.logits.get_next_logits(PROMPT, host.state(), False, ""), logits_with(host, [])[-1])


def test_undo_leaves_modules_and_model_as_they_were(host):
    before = host.snapshot()
    one, other = host.shared.model, host.shared.available["second"]()[0]

    def attributes():
        return [set(vars(part)) for model in (one, other) for part in (model, model.get_input_embeddings())]

    untouched = attributes()
    host.start()
    host.attached.select(["noir.zip"])
    for host.shared.model in (other, one):
        host.text()
        assert host.snapshot() != before and attributes() != untouched
    assert attributes()[2:] == untouched[2:], "a model that was let go"
    ours.extension.undo()
    assert host.snapshot() == before and attributes() == untouched


def test_a_page_that_is_still_open_does_not_bring_it_back_after_undo(host):
    plain, model = host.text(), host.shared.model
    before = set(vars(model))
    host.start()
    host.attached.select(["noir.zip"])
    left = host.attached
    ours.extension.undo()
    left.sync()
    panel.Panel(left).refresh()
    state = host.state()
    assert left.carrying(state) is state and not left.enabled
    assert set(vars(model)) == before and host.text() == plain


def test_what_is_remembered_is_what_was_chosen_last_though_two_choose_at_once(started, monkeypatch):
    write = selection_file.write
    others = []

    def slow(path, selection):
        if not others:
            others.append(threading.Thread(target=started.attached.select, args=(["space.zip"],)))
            others[0].start()
            others[0].join(0.3)
        write(path, selection)

    monkeypatch.setattr(selection_file, "write", slow)
    started.attached.select(["noir.zip"])
    others[0].join(30)
    remembered = json.loads((started.data / "softprompts.json").read_text())["selection"]
    assert tuple(remembered) == started.session.selection


def test_the_selection_outlasts_the_program(host):
    expected = reference(host, [SPACE])
    host.start()
    host.attached.select(["space.zip"])
    ours.extension.undo()
    assert json.loads((host.data / "softprompts.json").read_text()) == {"selection": ["space.zip"]}
    host.start()
    assert host.session.selection == ("space.zip",)
    assert host.text() == expected
    host.attached.select([])
    ours.extension.undo()
    host.start()
    assert host.session.selection == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 60000,
        b'{"selection": 5}',
        b'{"selection": {"noir.zip": 1}}',
        b"\xff\xfe",
        b'{"selection": ["gone.zip"]}',
    ],
)
def test_a_choice_that_cannot_be_read_or_carried_out_does_not_keep_it_from_starting(host, content):
    (host.data / "softprompts.json").write_bytes(content)
    host.start()
    assert ours.extension.fault == "" and host.session.selection == ()
    assert host.text()


def test_without_a_model_it_waits(host):
    expected = reference(host, [NOIR])
    host.models.unload_model()
    (host.data / "softprompts.json").write_text('{"selection": ["noir.zip"]}')
    host.start()
    assert host.session.selection == ()
    host.load("first")
    assert host.text() == expected


def test_a_missing_folder_is_made(host):
    shutil.rmtree(host.folder)
    host.start()
    assert host.folder.is_dir()


def test_a_folder_that_cannot_be_made_is_named_in_one_line(host, caplog):
    shutil.rmtree(host.folder)
    host.folder.write_text("a file")
    host.start()
    (line,) = caplog.records
    assert "softprompts cannot be made" in line.getMessage() and not line.exc_info
    assert "softprompts cannot be made" in ours.extension.fault and host.text()


def spoil_state_hook(host):
    host.extensions.EXTENSION_MAP.pop("state")


def spoil_loader(host):
    host.models.transformers_loader = lambda model_name, other: None


def spoil_shared(host):
    del host.shared.tokenizer


def spoil_generation(host):
    host.text_generation.generate_reply_HF = lambda question, state: iter(())


def spoil_signature(host):
    host.text_generation.generate_reply_HF = lambda question: iter(())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_state_hook, "it has no hook for the state"),
        (spoil_loader, "there is no transformers_loader(model_name)"),
        (spoil_shared, "there is no shared.tokenizer"),
        (spoil_generation, "does not hand state['logits_processor'] on"),
        (spoil_signature, "generate_reply_HF takes no state"),
    ],
)
def test_a_host_that_is_not_known_is_left_alone_and_told_why(host, caplog, spoil, reason):
    spoil(host)
    before = host.snapshot()
    model = set(vars(host.shared.model))
    with caplog.at_level(logging.INFO):
        host.start()
    (line,) = [record.getMessage() for record in caplog.records]
    assert reason in line and "1.2 or later" in line
    assert ours.extension.attached is None and reason in ours.extension.fault
    assert host.snapshot() == before and set(vars(host.shared.model)) == model
    state = host.state()
    assert ours.extension.state_modifier(state) is state


def test_the_oldest_release_that_has_what_is_needed(host):
    """1.2 (July 2023): another loader's name, a seed among the parameters, and a list of exactly that type."""
    text_generation = host.text_generation

    def generate_reply_HF(question, original_question, seed, state, stopping_strings=None, is_chat=False):
        processor = state.get("logits_processor", LogitsProcessorList([]))
        if type(processor) != LogitsProcessorList:  # noqa: E721, as that release has it
            processor = LogitsProcessorList([processor])
        ids = text_generation.encode(question, truncation_length=text_generation.get_max_prompt_length(state))
        output = host.shared.model.generate(
            inputs=ids, logits_processor=processor, max_new_tokens=state["max_new_tokens"], do_sample=False
        )
        yield text_generation.decode(output[0][len(ids[0]) :])

    expected = reference(host, [NOIR])
    text_generation.generate_reply_HF = generate_reply_HF
    host.models.huggingface_loader = lambda model_name: None
    del host.models.transformers_loader, host.shared.lora_names, sys.modules["modules.logits"]
    host.start()
    assert ours.extension.fault == ""
    host.attached.select(["noir.zip"])
    state = copy.deepcopy(ours.extension.state_modifier(host.state()))  # as it does where there are stopping strings
    assert next(generate_reply_HF(PROMPT, PROMPT, 0, state)) == expected


def test_the_script_alone_does_not_keep_the_host_from_starting(host, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "kobold_sp_plugin.hosts.text_generation_webui", None)
    host.start()
    assert "kobold-sp install" in caplog.text
    assert host.text()


# The block


def test_a_block_that_cannot_be_built_leaves_the_rest_of_the_interface_alone(started, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    ours.extension.ui()
    assert "could not be built" in caplog.text


def test_the_script_has_what_the_host_looks_for(started):
    script = sys.modules["user_ext_soft_prompts"]
    assert script.params["is_tab"] is False
    assert panel.POLL in script.custom_css() and panel.POLL in script.custom_js()
    assert callable(script.ui) and not hasattr(script, "custom_tokenized_length"), "it would silence other extensions'"


@pytest.fixture
def block(started):
    return panel.Panel(started.attached)


def test_the_block_shows_what_is_in_use_and_why_a_file_is_not(started, block):
    softprompt(9, name="<script>alert(1)</script>").save(started.folder / "evil.zip")
    block.refresh()
    assert block.choices() == [
        ("<script>alert(1)</script> (4 tokens)", "evil.zip"),
        ("Noir (4 tokens)", "noir.zip"),
        ("Space (6 tokens)", "space.zip"),
    ]
    page = block.page("<b>said</b>")
    assert "<script>" not in page and "<b>" not in page
    assert "No soft prompt in use" in page and "made for 64 columns, this model has 32" in page
    assert block.load(["noir.zip", "space.zip"]) == ""
    assert block.selection == ["noir.zip", "space.zip"]
    assert 'light on"' in block.page() and "In use: Noir + Space (10 tokens" in block.page()
    assert "gone.zip" in block.load(["gone.zip"])
    assert block.selection == ["noir.zip", "space.zip"]
    started.models.unload_model()
    started.attached.sync()
    assert 'light waiting"' in block.page() and "Waiting for a model: Noir + Space" in block.page()
    assert block.load([]) == "" and block.selection == []


def test_two_of_one_name_are_told_apart(started, block):
    NOIR.save(started.folder / "noir2.zip")
    block.refresh()
    labels = [label for label, _ in block.choices()]
    assert labels == ["Noir, noir.zip (4 tokens)", "Noir, noir2.zip (4 tokens)", "Space (6 tokens)"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_a_file_whose_name_is_not_unicode_is_shown_and_chosen(started, block):
    shutil.copy(started.folder / "noir.zip", os.fsencode(started.folder) + b"/\xff.zip")
    block.refresh()
    (value,) = {name for _, name in block.choices()} - {"noir.zip", "space.zip"}
    assert block.load([value]) == "" and block.selection == [value]
    assert started.session.selection == (os.fsdecode(b"\xff.zip"),)
    json.dumps([block.choices(), block.selection, block.page()], ensure_ascii=False).encode("utf-8")


def test_a_selected_file_that_cannot_be_read_any_more_has_no_count(started, block):
    assert block.load(["noir.zip"]) == ""
    (started.folder / "noir.zip").write_bytes(b"PK")
    block.refresh()
    assert ("noir", "noir.zip") in block.choices()


def test_the_block_is_due_again_when_the_folder_or_the_model_changes(started):
    before = started.attached.revision
    started.session.refresh()
    assert started.attached.revision == before
    NOIR.save(started.folder / "new.zip")
    started.session.refresh()
    changed = started.attached.revision
    assert changed > before
    started.load("second")
    started.attached.sync()
    assert started.attached.revision > changed


def test_a_good_file_is_taken_under_a_name_of_ours_and_over_no_other(started, block, tmp_path):
    (tmp_path / "upload").mkdir()
    uploaded = tmp_path / "upload" / "..%2f no<i>ir?.ZIP"
    NOIR.save(uploaded)
    assert block.upload(str(uploaded)) == "2f no_i_ir.zip is in the folder now."
    assert block.upload(SimpleNamespace(name=str(uploaded))) == "2f no_i_ir 2.zip is in the folder now."
    assert np.array_equal(SoftPrompt.load(started.folder / "2f no_i_ir 2.zip").rows, NOIR.rows)
    assert {"2f no_i_ir.zip", "2f no_i_ir 2.zip"} < {each["filename"] for each in started.session.status()["entries"]}
    assert block.upload(None) == ""


def test_what_is_no_soft_prompt_is_not_stored(started, block, tmp_path):
    before = sorted(started.folder.iterdir())
    broken = tmp_path / "broken.zip"
    broken.write_bytes((started.folder / "noir.zip").read_bytes()[:-40])
    said = block.upload(str(broken))
    assert said.startswith("broken.zip was not taken: ") and str(started.folder) not in said
    assert "was not taken" in block.upload(str(tmp_path / "gone.zip"))
    assert sorted(started.folder.iterdir()) == before


def test_an_upload_is_bounded(tmp_path, monkeypatch):
    NOIR.save(tmp_path / "noir.zip")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(panel, "MAX_UPLOAD", 100)
    with pytest.raises(TooLarge):
        panel.store(tmp_path / "noir.zip", tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []


def test_an_upload_is_checked_whole(tmp_path):
    import zips

    (tmp_path / "folder").mkdir()
    (tmp_path / "none.zip").write_bytes(zips.make_zip(("meta.json", b"{}")))
    with pytest.raises(NoTensor):
        panel.store(tmp_path / "none.zip", tmp_path / "folder")
