"""Whoever calls ``generate``: streamers, pipelines, chats, wrappers of the model, helpers of another vocabulary."""

import copy
import threading

import pytest
import torch
import transformers
from models import FAMILIES, FAMILY, VOCABULARY, softprompt, tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import UnsupportedCall

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
HARD = [77, 12, 101, 5, 64]
TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"


def rows_of(model, ids):
    return SoftPrompt(rows=model.get_input_embeddings().weight.detach()[ids].numpy())


def generate(model, ids=TEXT, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).tolist()


def behind_hard(model, ids=TEXT, **options):
    found = generate(model, torch.cat([torch.tensor([HARD]), ids], dim=1), **options)
    return [row[len(HARD) :] for row in found]


@pytest.fixture
def model():
    return tiny_model(FAMILY)


# Streamers


def test_a_streamer_is_given_the_text_and_what_follows(model):
    if not hasattr(transformers, "TextIteratorStreamer"):
        pytest.skip("streamers came with transformers 4.28")
    tokenizer = tiny_tokenizer()
    expected = tokenizer.decode(behind_hard(model)[0][7:], skip_special_tokens=True)
    attach(model).select(rows_of(model, HARD))
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30, skip_special_tokens=True)
    thread = threading.Thread(target=generate, args=(model,), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected and expected
    thread.join()


# Pipelines and chats


@pytest.fixture
def talker(model):
    """The model and a tokenizer with a chat template, where the release has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return model, tokenizer


def written(model, tokenizer, text, **options):
    ids = tokenizer(text, return_tensors="pt", **options).input_ids
    return tokenizer.decode(behind_hard(model, ids)[0][ids.shape[1] :], skip_special_tokens=True)


def test_the_text_generation_pipeline(talker):
    model, tokenizer = talker
    # Pipelines of older releases add no beginning of a text.
    expected = [written(model, tokenizer, "The door opened", add_special_tokens=each) for each in (True, False)]
    attach(model).select(rows_of(model, HARD))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device=-1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_full_text": False}
    assert pipe("The door opened", **options)[0]["generated_text"] in expected
    texts = ["The door opened", "Nobody said a word; the clock"]
    one_by_one = [pipe(text, **options)[0]["generated_text"] for text in texts]
    tokenizer.padding_side = "left"
    together = pipe(texts, batch_size=2, **options)
    assert [each[0]["generated_text"] for each in together] == one_by_one


def test_messages_through_a_chat_template(talker):
    model, tokenizer = talker
    if not hasattr(tokenizer, "apply_chat_template"):
        pytest.skip("chat templates came with transformers 4.34")
    messages = [{"role": "user", "content": "The door"}, {"role": "assistant", "content": "opened"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = written(model, tokenizer, text, add_special_tokens=False)
    attach(model).select(rows_of(model, HARD))
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    n_text = inputs.input_ids.shape[1]
    found = generate(model, inputs.input_ids)[0][n_text:]
    assert tokenizer.decode(found, skip_special_tokens=True) == expected
    if RELEASE >= (4, 44):  # from about then the pipeline takes messages
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device=-1)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_full_text": False}
        bare = pipe(messages[:1], **options)[0]["generated_text"]
        attach(model).clear()
        assert bare != pipe(messages[:1], **options)[0]["generated_text"]
        ids = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_tensors="pt")
        ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
        after = tokenizer.decode(behind_hard(model, ids)[0][ids.shape[1] :], skip_special_tokens=True)
        assert bare == after


# Wrappers


@pytest.mark.parametrize("first", ["attach", "wrap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_model_around_the_base(family, first):
    peft = pytest.importorskip("peft")
    base = tiny_model(family)
    options = {"fan_in_fan_out": True} if family == "gpt2" else {}
    config = peft.LoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, r=2, **options
    )
    torch.manual_seed(1)
    if first == "attach":
        handle = attach(base)
    wrapped = peft.get_peft_model(base, config).eval()
    if first == "wrap":
        handle = attach(wrapped)
    assert attach(wrapped) is attach(base) is handle
    expected = behind_hard(wrapped)
    with wrapped.disable_adapter():
        without = behind_hard(wrapped)
    assert expected != without or family == "bloom"
    handle.select(rows_of(base, HARD))
    for _ in range(2):  # the second time from the prefix's cache
        assert generate(wrapped) == expected
        with wrapped.disable_adapter():
            assert generate(wrapped) == without
    handle.detach()


def test_a_peft_model_that_changes_the_embedding(model):
    peft = pytest.importorskip("peft")
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    config = peft.LoraConfig(target_modules=[name], init_lora_weights=False, r=2)
    attach(model).select(softprompt())
    wrapped = peft.get_peft_model(model, config).eval()
    with pytest.raises(UnsupportedCall, match="replaced or resized"):
        generate(wrapped)
    attach(model).detach()
    handle = attach(wrapped)
    handle.select(softprompt())
    embedded = model.get_input_embeddings()(handle.prepend(TEXT)["input_ids"])
    assert torch.equal(embedded[0, :4], torch.tensor(softprompt().rows))
    assert torch.equal(embedded[0, 4:], model.get_input_embeddings()(TEXT)[0])
    generate(wrapped)


# Helpers that guess


def test_a_helper_of_another_vocabulary(model):
    if RELEASE < (4, 48):
        pytest.skip("universal assisted decoding came with transformers 4.46, in this form later")
    helper = tiny_model(FAMILY, seed=0, num_hidden_layers=1, vocab_size=VOCABULARY + 1)
    mine, its = tiny_tokenizer(), tiny_tokenizer()
    its.add_tokens(["door"])
    expected = behind_hard(model)
    attach(model).select(rows_of(model, HARD))
    options = {"assistant_model": helper, "tokenizer": mine, "assistant_tokenizer": its}
    assert generate(model, **options) == expected


def test_a_helper_with_a_soft_prompt_of_its_own_is_refused(model):
    if RELEASE < (5, 0):
        pytest.skip("releases before 5.0 run without the helper")
    helper = tiny_model(FAMILY, seed=0, num_hidden_layers=1)
    attach(model).select(rows_of(model, HARD))
    attach(helper).select(softprompt())
    with pytest.raises(UnsupportedCall, match="takes ids only"):
        generate(model, assistant_model=helper)
    attach(helper).clear()
    assert generate(model, assistant_model=helper) == generate(model)


def test_helpers_and_padding(model):
    if RELEASE < (5, 0):
        pytest.skip("releases before 5.0 run without the helper")
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TEXT], dim=1)
    mask = (padded != 0).long()
    attach(model).select(rows_of(model, HARD))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(padded, attention_mask=mask, **options).tolist()
    helper = tiny_model(FAMILY, seed=0, num_hidden_layers=1)
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": helper}):
        assert model.generate(padded, attention_mask=mask, **options, **more).tolist() == expected


# Caches that are packed


@pytest.mark.slow  # quanto compiles itself at its first use
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_a_quantised_cache(model, backend):
    pytest.importorskip("optimum.quanto" if backend == "quanto" else "hqq")
    if RELEASE < (4, 57):
        pytest.skip("quantised caches took their present form later")
    config = {"backend": backend, "nbits": 4 if backend == "quanto" else 8, "residual_length": 4, "q_group_size": 8}
    if backend == "hqq":
        config.update(axis_key=1, axis_value=1)
    options = {"cache_implementation": "quantized", "cache_config": config}
    expected = behind_hard(model, **options)
    attach(model).select(rows_of(model, HARD))
    assert generate(model, **options) == expected


# Several at once


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}], ids=str)
def test_threads_with_prompts_of_their_own(model, options):
    if "prefill_chunk_size" in options and RELEASE < (4, 57):
        pytest.skip("this release reads no prompt in chunks")
    handle = attach(model)
    prompts = [softprompt(seed, n_tokens=3 + seed) for seed in range(3)]
    expected = []
    for each in prompts:
        with handle.override(each):
            expected.append(generate(model, **options))
    found = [[] for _ in prompts]
    barrier = threading.Barrier(len(prompts))

    def work(index):
        barrier.wait()
        with handle.override(prompts[index]):
            for _ in range(3):
                found[index].append(generate(model, **options))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [[each] * 3 for each in expected]
    assert len({str(each) for each in expected}) > 1


def test_results_that_hold_more_than_ids(model):
    """Scores are of the text; hidden states and attentions of the first step are those of what was read."""
    hard = copy.deepcopy(model)
    options = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    options.update(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = torch.cat([torch.tensor([HARD]), TEXT], dim=1)
    expected = hard.generate(ids, attention_mask=torch.ones_like(ids), **options)
    attach(model).select(rows_of(model, HARD))
    for _ in range(2):
        found = model.generate(TEXT, attention_mask=torch.ones_like(TEXT), **options)
        assert found.sequences.tolist() == expected.sequences[:, len(HARD) :].tolist()
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
        for step, other in zip(found.hidden_states, expected.hidden_states):
            torch.testing.assert_close(step[-1][:, -1:], other[-1][:, -1:], rtol=1e-4, atol=1e-4)
    assert found.scores[0].shape[-1] == VOCABULARY
