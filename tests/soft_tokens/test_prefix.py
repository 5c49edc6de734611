"""Prefix reuse: the same text for less, and only where it is the same."""

import gc
import logging
import threading

import numpy as np
import pytest
import torch
import transformers
from models import FAMILIES, FAMILY, softprompt, tiny_model

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.soft_tokens import prefix

TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
USED = "read 4 soft tokens"


# Before 4.48 Gemma 2 has a cache of its own, of a fixed length, which is not reused.
@pytest.fixture(params=[family for family in FAMILIES if family != "gemma2" or RELEASE >= (4, 48)])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def llama_or_gptj():
    return tiny_model(FAMILY)


@pytest.fixture
def said(caplog):
    """What the last generation said of reuse."""
    caplog.set_level(logging.DEBUG, logger="kobold_sp_plugin.soft_tokens.prefix")
    return lambda: caplog.messages[-1]


def width_of(model):
    return model.get_input_embeddings().embedding_dim


def generate(model, ids=TEXT, **options):
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def scored(model, ids=TEXT, **options):
    out = generate(model, ids, output_scores=True, return_dict_in_generate=True, **options)
    return out.sequences.tolist(), torch.stack(out.scores)


class Whole:
    """While it lasts, everything is read as a whole."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(lambda module, args: None)

    def __exit__(self, *args):
        self.hook.remove()


OPTIONS = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"repetition_penalty": 1.7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_and_scores_are_those_without_reuse(model, said, options):
    handle = attach(model)
    handle.select(softprompt(width=width_of(model)))
    with Whole(model):
        expected = scored(model, **options)
        assert said() == f"no prefix reuse: somebody has hooked {type(model).__name__}"
    for _ in range(2):
        tokens, scores = scored(model, **options)
        assert said().startswith(USED)
        assert tokens == expected[0]
        finite = torch.isfinite(expected[1])
        torch.testing.assert_close(scores[finite], expected[1][finite], rtol=1e-4, atol=1e-4)


def positions_read(model, act):
    """How many positions each forward pass of the embedding has."""
    embedding, read = model.get_input_embeddings(), []
    inner = vars(embedding).get("forward")  # ours, put aside: a hook would switch reuse off
    vars(embedding)["forward"] = lambda ids, *args, **kwargs: (read.append(ids.shape[1]), inner(ids, *args, **kwargs))[
        1
    ]
    try:
        act()
    finally:
        vars(embedding)["forward"] = inner
    return read


def test_only_the_texts_positions_are_forwarded(model):
    attach(model).select(softprompt(width=width_of(model)))
    first = positions_read(model, lambda: generate(model))
    assert first[0] == 4 and set(first[-11:]) == {1}
    assert positions_read(model, lambda: generate(model)) == [7] + [1] * 11


def test_a_batch_of_several_texts_begins_with_one_prefix(llama_or_gptj, said):
    batch = torch.cat([TEXT, TEXT.flip(1), TEXT + 3])
    handle = attach(llama_or_gptj)
    handle.select(softprompt())
    alone = [generate(llama_or_gptj, row[None], eos_token_id=None).tolist()[0] for row in batch]
    assert generate(llama_or_gptj, batch, eos_token_id=None, pad_token_id=0).tolist() == alone
    assert said().startswith(USED)


@pytest.mark.parametrize("begins_with_bos", [True, False])
def test_behind_the_beginning_of_sequence_token_it_belongs_to_the_prefix(llama_or_gptj, said, begins_with_bos):
    text = TEXT if begins_with_bos else TEXT[:, 1:]
    handle = attach(llama_or_gptj)
    handle.select(softprompt(1), SoftPrompt(softprompt(2).rows, order="after_bos"))
    with Whole(llama_or_gptj):
        expected = generate(llama_or_gptj, text).tolist()
    assert generate(llama_or_gptj, text).tolist() == expected
    assert said().startswith(f"read {8 + begins_with_bos} soft tokens")
    if begins_with_bos:
        generate(llama_or_gptj, torch.cat([text, text + 1]), pad_token_id=0)
        assert said() == "no prefix reuse: the rows of the batch begin differently"


def test_a_selection_that_comes_back_needs_no_new_prefix(llama_or_gptj):
    model, handle = llama_or_gptj, attach(llama_or_gptj)
    for _ in range(2):
        for seed in range(3):
            with handle.override(softprompt(seed)):
                read = positions_read(model, lambda: generate(model))
    assert read == [7] + [1] * 11


# Where it would not be exact, and what says so


def padded(model):
    mask = torch.ones_like(TEXT)
    mask[0, 0] = 0
    model.generate(TEXT, attention_mask=mask, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (padded, "a row is padded"),
        (lambda model: generate(model, use_cache=False), "the model is called without a cache"),
        (lambda model: generate(model.train()), "the model is being trained"),
    ],
)
def test_it_is_off_and_says_why(llama_or_gptj, said, act, reason):
    attach(llama_or_gptj).select(softprompt())
    act(llama_or_gptj)
    assert said() == f"no prefix reuse: {reason}"


def test_it_is_off_with_a_static_cache(llama_or_gptj, said):
    if RELEASE < (4, 44):
        pytest.skip("this release has no static caches in generate()")
    attach(llama_or_gptj).select(softprompt())
    expected = generate(llama_or_gptj).tolist()
    assert generate(llama_or_gptj, cache_implementation="static").tolist() == expected
    # 4.44 makes masks of four dimensions for it.
    reasons = ("its cache is of the kind Static", "its attention mask has 4")
    assert said().startswith(tuple(f"no prefix reuse: {reason}" for reason in reasons))


def test_it_is_off_where_positions_depend_on_the_length(said):
    if FAMILY != "llama" or RELEASE < (5, 0):
        pytest.skip("configurations say it in another way")
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    attach(model).select(softprompt())
    generate(model)
    assert said() == "no prefix reuse: its positions (dynamic) depend on the length of the text"


def test_a_model_that_sees_what_follows_is_found_out(said):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=131
    )
    config.is_decoder = False
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    attach(model).select(softprompt())
    generate(model, pad_token_id=0)
    assert "no prefix reuse" in said()


def test_too_large_a_prefix_is_not_kept_nor_made_again(llama_or_gptj, said, monkeypatch):
    monkeypatch.setattr(prefix, "MOST_BYTES", 1000)
    attach(llama_or_gptj).select(softprompt())
    generate(llama_or_gptj)
    assert "bytes of keys and values are more than are kept" in said()
    assert positions_read(llama_or_gptj, lambda: generate(llama_or_gptj)) == [11] + [1] * 11


# What changes the prefix


def test_a_model_that_changes_gets_a_new_prefix(llama_or_gptj):
    model = llama_or_gptj
    attach(model).select(softprompt())
    before = scored(model)[1]
    changes = [
        lambda: next(model.parameters()).detach().mul_(1.5),
        lambda: model.load_state_dict({**model.state_dict(), **{n: 0.9 * p for n, p in model.named_parameters()}}),
        lambda: model.set_input_embeddings(model.get_input_embeddings().to(torch.float64).to(torch.float32)),
    ]
    with torch.no_grad():
        for change in changes:
            change()
            with Whole(model):
                expected = scored(model)
            tokens, scores = scored(model)
            assert tokens == expected[0]
            finite = torch.isfinite(expected[1])
            torch.testing.assert_close(scores[finite], expected[1][finite], rtol=1e-4, atol=1e-4)
    assert before.shape != scores.shape or not torch.equal(before, scores)


def test_an_adapter_that_is_switched_gives_a_new_prefix(llama_or_gptj):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(llama_or_gptj, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    handle = attach(tuned)
    handle.select(softprompt())
    model = tuned.get_base_model()

    def both():
        with Whole(model):
            expected = scored(model)
        found = scored(model)
        assert found[0] == expected[0]
        torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3)
        return found[1]

    having = both()
    with tuned.disable_adapter():
        without = both()
    assert having.shape != without.shape or not torch.allclose(having, without)
    both()
    tuned.merge_adapter()
    both()
    tuned.base_model.scaling = None
    tuned.unmerge_adapter()
    both()


def test_every_tensor_is_emptied_and_the_prefix_comes_back(llama_or_gptj, said):
    model = llama_or_gptj
    attach(model).select(softprompt())
    expected = generate(model).tolist()
    kept = {id(tensor) for tensor in [*model.parameters(), *model.buffers(), TEXT]}
    gc.collect()  # what other tests left, among it views that cannot be emptied
    for tensor in [each for each in gc.get_objects() if type(each) is torch.Tensor and id(each) not in kept]:
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor.set_(torch.tensor([], dtype=tensor.dtype))
    assert generate(model).tolist() == expected
    assert said().startswith(USED)


def test_prefixes_are_bounded(llama_or_gptj):
    handle = attach(llama_or_gptj)
    for seed in range(2 * prefix.MOST_PREFIXES):
        with handle.override(softprompt(seed)):
            generate(llama_or_gptj, max_new_tokens=1)
    assert len(handle._adapter._prefixes._kept) == prefix.MOST_PREFIXES


def test_threads_share_a_prefix(llama_or_gptj):
    model, handle = llama_or_gptj, attach(llama_or_gptj)
    handle.select(softprompt())
    with Whole(model):
        expected = generate(model).tolist()
    results = []
    threads = [threading.Thread(target=lambda: results.append(generate(model).tolist())) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert results == [expected] * 4


def test_half_precision_is_no_further_from_float32_than_without_reuse():
    if FAMILY != "llama" or not hasattr(torch, "compiler"):
        pytest.skip("this torch has no bfloat16 for all that the model does")
    model, half = tiny_model("llama"), tiny_model("llama").bfloat16()
    rows = softprompt(n_tokens=20)
    far = {True: [], False: []}
    for seed in range(12):
        text = torch.randint(3, 131, (1, 30), generator=torch.Generator().manual_seed(seed))
        attach(model).select(rows)
        attach(half).select(rows)
        exact = scored(model, text, max_new_tokens=1)[1]
        far[True].append((scored(half, text, max_new_tokens=1)[1].float() - exact).norm())
        with Whole(half):
            far[False].append((scored(half, text, max_new_tokens=1)[1].float() - exact).norm())
    assert np.mean(far[True]) <= 1.25 * np.mean(far[False])
