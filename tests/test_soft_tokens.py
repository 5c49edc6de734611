"""Soft tokens against the same model with ordinary tokens, or a larger matrix, in their place."""

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
import transformers
from models import CACHE, FAMILIES, FAMILY, VOCABULARY, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import (
    ContextExceeded,
    NoEmbedding,
    NotFinite,
    UnsupportedCall,
    UnsupportedModel,
    WidthMismatch,
)

HARD = [77, 12, 101, 5, 64]
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])


def rows_of(model, ids):
    """The embedding matrix's own rows of ``ids``, as a soft prompt: reads the same as the tokens themselves."""
    return SoftPrompt(rows=model.get_input_embeddings().weight.detach()[ids].numpy())


def in_front(ids, text):
    return torch.cat([torch.tensor([ids]).expand(text.shape[0], -1), text], dim=1)


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 12, "do_sample": False, **options})


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def llama_or_gptj():
    return tiny_model(FAMILY)


@pytest.fixture
def random_prompt(llama_or_gptj):
    generator = np.random.default_rng(0)
    return SoftPrompt(rows=generator.standard_normal((4, 32)).astype(np.float32))


# The same as ordinary tokens, in every way of generating


def test_a_forward_pass_equals_a_larger_embedding_matrix(model):
    embedding = model.get_input_embeddings()
    scale = 1.0 if getattr(embedding, "embed_scale", None) is None else float(embedding.embed_scale)
    new = np.random.default_rng(0).standard_normal((4, embedding.embedding_dim)).astype(np.float32)
    larger = copy.deepcopy(model)
    grown = copy.deepcopy(embedding)
    grown.weight = torch.nn.Parameter(torch.cat([embedding.weight, torch.tensor(new)]))
    larger.set_input_embeddings(grown)
    ids = in_front(list(range(VOCABULARY, VOCABULARY + 4)), TEXT)
    expected = larger(ids).logits

    handle = attach(model)
    handle.select(SoftPrompt(rows=new))
    torch.testing.assert_close(model(**handle.prepend(TEXT)).logits, expected, rtol=0, atol=0)
    handle.select(SoftPrompt(rows=new * scale, scale="module"))
    torch.testing.assert_close(model(**handle.prepend(TEXT)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_generate_equals_ordinary_tokens_in_front(model, options):
    torch.manual_seed(0)
    expected = generate(model, in_front(HARD, TEXT), **options)[:, len(HARD) :]
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    torch.manual_seed(0)
    result = generate(model, TEXT, **options)
    assert result.tolist() == expected.tolist()


def test_a_left_padded_row_equals_the_row_alone(model):
    short, long = TEXT[:, :4], TEXT
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)
    batch, mask = torch.cat([padded, long]), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    result = generate(model, batch, mask)
    for row, alone in zip(result, (generate(model, short)[0, 4:], generate(model, long)[0, 7:])):
        assert row[7 : 7 + len(alone)].tolist() == alone.tolist()


def test_the_mask_that_transformers_infers_is_right_too(model):
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), TEXT[:, :4]], dim=1), TEXT])
    mask = (batch != 0).long()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    assert model.generate(batch, **options).tolist() == model.generate(batch, attention_mask=mask, **options).tolist()


def test_after_bos_stands_between_bos_and_text(model):
    expected = generate(model, torch.cat([TEXT[:, :1], torch.tensor([HARD]), TEXT[:, 1:]], dim=1))
    handle = attach(model)
    handle.select(SoftPrompt(rows=rows_of(model, HARD).rows, order="after_bos"))
    result = generate(model, TEXT)
    assert result[:, TEXT.shape[1] :].tolist() == expected[:, TEXT.shape[1] + len(HARD) :].tolist()
    assert result[:, : TEXT.shape[1]].tolist() == TEXT.tolist()


def test_several_are_read_in_order_each_where_it_belongs(llama_or_gptj):
    model = llama_or_gptj
    front, back, after = [77, 12], [101], [5, 64]
    expected = generate(model, torch.tensor([[*front, *back, 1, *after, *TEXT[0, 1:].tolist()]]))
    handle = attach(model)
    third = SoftPrompt(rows=rows_of(model, after).rows, order="after_bos")
    handle.select(rows_of(model, front), [third, rows_of(model, back)])
    assert handle.n_tokens == 5
    result = generate(model, TEXT)
    assert result[:, TEXT.shape[1] :].tolist() == expected[:, TEXT.shape[1] + 5 :].tolist()


@pytest.mark.parametrize(
    ("since", "options"),
    [
        ((4, 44), {"cache_implementation": "static"}),
        ((4, 57), {"prefill_chunk_size": 5}),
        ((4, 40), {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_other_ways_of_reading_and_guessing_ahead(model, since, options):
    if since > RELEASE:
        pytest.skip("this release has it not, or in another form")
    if "cache_implementation" in options and model.config.model_type in ("bloom", "opt", "gpt2", "gptj"):
        pytest.skip("static caches came to this family by and by")
    if "cache_implementation" in options and model.config.model_type == "gemma2" and RELEASE < (4, 48):
        pytest.skip("the bare model of this release has a cache of its own only")
    expected = generate(model, in_front(HARD, TEXT))[:, len(HARD) :].tolist()
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    assert generate(model, TEXT, **options).tolist() == expected


# Nobody else sees a soft token


class Witness(LogitsProcessor):
    """Keeps what it is shown, as a processor or as a streamer."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores

    def put(self, value):
        self.seen.append(value.reshape(1, -1).clone())

    def end(self):
        pass


class WatchingRule(StoppingCriteria):
    """Keeps what it is shown, as a stopping rule."""

    def __init__(self, witness):
        self.witness = witness

    def __call__(self, input_ids, scores, **kwargs):
        self.witness.seen.append(input_ids.clone())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool) if RELEASE >= (4, 39) else False


def test_processors_stopping_rules_streamers_and_results_see_text_only(model):
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    witness = Witness()
    options = {
        "logits_processor": LogitsProcessorList([witness]),
        "stopping_criteria": StoppingCriteriaList([WatchingRule(witness)]),
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 3,
    }
    if hasattr(transformers, "TextStreamer"):
        options["streamer"] = witness
    result = generate(model, TEXT, **options)
    assert witness.seen and result.shape[1] > TEXT.shape[1]
    for ids in [*witness.seen, result]:
        assert int(ids.max()) < VOCABULARY
    text = TEXT[0].tolist()
    assert all(ids[0].tolist()[:7] == text for ids in witness.seen if ids.shape[1] >= 7)
    assert result[0, :7].tolist() == text


def test_the_repetition_penalty_is_that_of_the_text(llama_or_gptj):
    model = llama_or_gptj
    processors = pytest.importorskip(
        "transformers.generation_logits_process"
        if transformers.__version__.startswith("4.24.")
        else "transformers.generation.logits_process"
    )
    penalty = processors.RepetitionPenaltyLogitsProcessor(1.8)

    class OfText(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return penalty(input_ids[:, len(HARD) :], scores)

    expected = generate(model, in_front(HARD, TEXT), logits_processor=LogitsProcessorList([OfText()]))
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    assert generate(model, TEXT, repetition_penalty=1.8).tolist() == expected[:, len(HARD) :].tolist()


def test_stop_strings_end_the_text(llama_or_gptj):
    if not hasattr(transformers, "StopStringCriteria"):
        pytest.skip("stop_strings came with transformers 4.39")
    model, tokenizer = llama_or_gptj, tiny_tokenizer()
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    whole = generate(model, TEXT, eos_token_id=None)[0].tolist()
    stop = tokenizer.decode(whole[10])
    stopped = generate(model, TEXT, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer)[0].tolist()
    assert stopped == whole[: len(stopped)] and 7 < len(stopped) <= 11
    assert stop in tokenizer.decode(stopped[7:])


def test_lengths_count_text_only(model):
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    options = {"eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    assert model.generate(TEXT, attention_mask=torch.ones_like(TEXT), max_length=10, **options).shape == (1, 10)
    assert model.generate(TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=3, **options).shape == (1, 10)


# The caller's own


def test_the_callers_tensors_are_not_changed(model):
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    ids, mask = TEXT.clone(), torch.ones_like(TEXT)
    mask[0, 0] = 0
    ids[0, 0] = 0
    before = ids.clone(), mask.clone()
    generate(model, ids, mask)
    prepended = handle.prepend(ids, mask)
    kept = prepended["input_ids"].clone()
    model(**prepended)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])
    assert torch.equal(prepended["input_ids"], kept)


def snapshot(model):
    """Of every module: its attributes, its class, its hooks. Not of a cache: some releases keep the last one there."""

    def hooks(module):
        return {key: dict(value) for key, value in vars(module).items() if "hooks" in key}

    modules = ((name, each) for name, each in model.named_modules() if name != "_cache")
    return {name: (dict(vars(each)), type(each), hooks(each)) for name, each in modules}


def test_attach_and_detach_are_exact(model):
    expected = generate(model, TEXT)
    before, classes = snapshot(model), {cls: dict(vars(cls)) for cls in type(model).__mro__}
    handle = attach(model)
    assert attach(model) is handle
    handle.select(rows_of(model, HARD))
    generate(model, TEXT)
    handle.clear()
    assert generate(model, TEXT).tolist() == expected.tolist()
    handle.select(rows_of(model, HARD))
    handle.detach()
    assert {cls: dict(vars(cls)) for cls in type(model).__mro__} == classes
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name][0].keys() == before[name][0].keys()
        assert all(after[name][0][key] is before[name][0][key] for key in before[name][0])
        assert after[name][1:] == before[name][1:]
    assert generate(model, TEXT).tolist() == expected.tolist()
    assert attach(model) is not handle
    attach(model).detach()


def test_an_attached_model_is_not_kept_alive(random_prompt):
    model = tiny_model("gptj")
    handle = attach(model)
    handle.select(random_prompt)
    generate(model, TEXT)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    handle.clear()
    handle.detach()


# Robustness


def test_every_tensor_in_the_process_is_emptied_and_the_rows_come_back(llama_or_gptj, random_prompt):
    model = llama_or_gptj
    handle = attach(model)
    handle.select(random_prompt)
    expected = generate(model, TEXT).tolist()
    kept = {id(tensor) for tensor in [*model.parameters(), *model.buffers(), TEXT]}
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and id(each) not in kept]
    ours = [each for each in tensors if each.shape[1:] == (random_prompt.width,)]
    assert ours
    for tensor in ours:
        tensor.set_(torch.tensor([], dtype=tensor.dtype))
    assert generate(model, TEXT).tolist() == expected


class SelectsMidway(LogitsProcessor):
    def __init__(self, act):
        self.act = act

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == TEXT.shape[1] + 3:
            self.act()
        return scores


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generation_keeps_its_soft_prompts_whatever_is_selected_meanwhile(llama_or_gptj, random_prompt, use_cache):
    model = llama_or_gptj
    handle = attach(model)
    handle.select(random_prompt)
    expected = generate(model, TEXT, use_cache=use_cache).tolist()
    other = SoftPrompt(rows=random_prompt.rows[::-1][:3] * 2)
    for act in (lambda: handle.select(other), handle.clear):
        handle.select(random_prompt)
        processors = LogitsProcessorList([SelectsMidway(act)])
        assert generate(model, TEXT, use_cache=use_cache, logits_processor=processors).tolist() == expected


def test_threads_generate_each_with_its_own(llama_or_gptj, random_prompt):
    model = llama_or_gptj
    handle = attach(model)
    other = SoftPrompt(rows=5 * np.random.default_rng(9).standard_normal((7, 32)).astype(np.float32))
    expected = {}
    for key, prompts in (("none", ()), ("one", (random_prompt,)), ("other", (other,))):
        with handle.override(*prompts):
            expected[key] = generate(model, TEXT, use_cache=key != "one").tolist()
    assert len({str(value) for value in expected.values()}) == 3
    results = {key: [] for key in expected}

    def work(key, prompts):
        for _ in range(4):
            with handle.override(*prompts):
                results[key].append(generate(model, TEXT, use_cache=key != "one").tolist())

    threads = [
        threading.Thread(target=work, args=item)
        for item in (("none", ()), ("one", (random_prompt,)), ("other", (other,)))
    ]
    for each in threads:
        each.start()
    for _ in range(20):
        handle.select(other)
        handle.clear()
    for each in threads:
        each.join()
    assert results == {key: [value] * 4 for key, value in expected.items()}


def test_an_id_belongs_to_one_content_for_ever(llama_or_gptj, random_prompt):
    handle = attach(llama_or_gptj)
    handle.select(random_prompt)
    first = handle.prepend(TEXT)["input_ids"][0, :4].tolist()
    handle.select(random_prompt)
    assert handle.prepend(TEXT)["input_ids"][0, :4].tolist() == first
    handle.select(SoftPrompt(rows=random_prompt.rows * 2))
    second = handle.prepend(TEXT)["input_ids"][0, :4].tolist()
    assert not set(first) & set(second)
    assert min(first + second) >= VOCABULARY


def test_ids_of_what_is_no_longer_selected_do_not_read_as_something_else(llama_or_gptj, random_prompt):
    model = llama_or_gptj
    handle = attach(model)
    handle.select(random_prompt)
    stale = handle.prepend(TEXT)
    handle.select(SoftPrompt(rows=random_prompt.rows * 2))
    assert torch.isnan(model(**stale).logits).any()


def test_a_thousand_selections_leave_no_rows_behind(llama_or_gptj):
    handle = attach(llama_or_gptj)
    gone = []
    for number in range(1000):
        softprompt = SoftPrompt(rows=np.full((3, 32), 1.0 + number, dtype=np.float32))
        with handle.override(softprompt):
            handle.select(softprompt)
        gone.append(weakref.ref(handle._selected))
    assert [ref() is None for ref in gone] == [True] * 999 + [False]


# Cost


def operators_per_step(model, ids, **options):
    steps = [[]]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            steps[-1].append(str(function))
            return function(*args, **(kwargs or {}))

    class Step(LogitsProcessor):
        def __call__(self, input_ids, scores):
            steps.append([])
            return scores

    with Count():
        generate(model, ids, logits_processor=LogitsProcessorList([Step()]), eos_token_id=None, **options)
    return steps[1:]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_a_decode_step_dispatches_the_bare_models_operators(model, options):
    if not hasattr(torch, "compiler"):
        pytest.skip("TorchDispatchMode took its present form in torch 2.0")
    bare = operators_per_step(model, in_front(HARD, TEXT), **options)
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    soft = operators_per_step(model, TEXT, **options)
    assert len(bare) == len(soft) == 12
    if hasattr(model, "_get_initial_cache_position"):
        # 4.44 to 4.57 gather the newest id by its position; with soft tokens it is a slice, and a copy of that one id.
        views = {"aten.index.Tensor", "aten.slice.Tensor", "aten.alias.default", "aten.clone.default"}
        bare, soft = ([[name for name in step if name not in views] for step in steps] for steps in (bare, soft))
    assert soft == bare


def test_a_forward_pass_compiles_without_a_graph_break(llama_or_gptj, random_prompt):
    if not hasattr(torch, "compiler"):
        pytest.skip("this torch has no compiler")
    model = llama_or_gptj
    embedding = model.get_input_embeddings()
    handle = attach(model)
    handle.select(random_prompt)
    ids = handle.prepend(TEXT)["input_ids"]
    expected = embedding(ids)
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), expected)


def test_what_is_read_between_two_steps_may_hold_soft_tokens(llama_or_gptj, random_prompt):
    model = llama_or_gptj
    handle = attach(model)
    handle.select(random_prompt)
    expected = model(**handle.prepend(TEXT)).logits
    seen = []

    class Reads(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(model(**handle.prepend(TEXT)).logits)
            return scores

    generate(model, TEXT, logits_processor=LogitsProcessorList([Reads()]))
    assert len(seen) > 2 and all(torch.equal(each, expected) for each in seen)


@pytest.mark.parametrize("use_cache", [True, False])
def test_detached_in_the_middle_it_goes_when_the_generation_ends(llama_or_gptj, random_prompt, use_cache):
    model = llama_or_gptj
    handle = attach(model)
    handle.select(random_prompt)
    expected = generate(model, TEXT, use_cache=use_cache).tolist()
    processors = LogitsProcessorList([SelectsMidway(handle.detach)])
    assert generate(model, TEXT, use_cache=use_cache, logits_processor=processors).tolist() == expected
    assert "generate" not in vars(model) and attach(model) is not handle


def test_attach_from_many_threads_makes_one_handle(llama_or_gptj):
    barrier, handles = threading.Barrier(4), []

    def work():
        barrier.wait()
        handles.append(attach(llama_or_gptj))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(set(map(id, handles))) == 1


# Refusals


def test_a_resized_or_replaced_embedding_is_refused(llama_or_gptj, random_prompt):
    model = llama_or_gptj
    handle = attach(model)
    handle.select(random_prompt)
    model.resize_token_embeddings(VOCABULARY + 9)
    for act in (lambda: generate(model, TEXT), lambda: handle.select(random_prompt, random_prompt)):
        with pytest.raises(UnsupportedCall, match="replaced or resized"):
            act()
    handle.detach()
    attach(model).select(random_prompt)
    generate(model, TEXT)


def test_an_adapter_that_somebody_took_away_is_noticed(llama_or_gptj, random_prompt):
    model = llama_or_gptj
    attach(model).select(random_prompt)
    model.prepare_inputs_for_generation = type(model).prepare_inputs_for_generation.__get__(model)
    # Before 5.0 the mask that has grown does not fit the text any more, and the model itself fails.
    expected = UnsupportedCall if RELEASE >= (5, 0) else (UnsupportedCall, RuntimeError, IndexError, ValueError)
    with pytest.raises(expected):
        generate(model, TEXT)


def test_one_embedding_has_one_handle(llama_or_gptj):
    attach(llama_or_gptj)
    with pytest.raises(UnsupportedModel, match="belongs to a model attached before"):
        attach(llama_or_gptj.base_model)


def test_values_that_the_models_dtype_cannot_hold_are_refused():
    model = tiny_model("gpt2").half()
    with pytest.raises(NotFinite, match="100000"):
        attach(model).select(SoftPrompt(rows=np.full((2, 32), 1e5, dtype=np.float32), metadata={"name": "loud"}))


def test_a_file_name_is_no_soft_prompt(llama_or_gptj):
    with pytest.raises(TypeError, match=r"SoftPrompt\.load"):
        attach(llama_or_gptj).select("noir.zip")


def test_a_soft_prompt_of_another_width_is_refused_and_the_selection_stays(llama_or_gptj, random_prompt):
    handle = attach(llama_or_gptj)
    handle.select(random_prompt)
    with pytest.raises(WidthMismatch, match="made for 16 columns, this model has 32"):
        handle.select(SoftPrompt(rows=np.ones((2, 16), dtype=np.float32)))
    assert handle.selection == (random_prompt,)


@pytest.mark.parametrize("new", [1, 60])
def test_what_does_not_fit_the_context_is_refused_before_anything_is_generated(model, new):
    if model.config.model_type == "bloom":
        pytest.skip("BLOOM's positions have no limit")
    handle = attach(model)
    handle.select(SoftPrompt(rows=np.ones((100, model.get_input_embeddings().embedding_dim), dtype=np.float32)))
    ids = TEXT.repeat(1, 4 if new == 1 else 2)
    with pytest.raises(ContextExceeded, match="100 soft tokens"):
        generate(model, ids, max_new_tokens=new)
    with pytest.raises(ContextExceeded, match=f"{new} new"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_length=ids.shape[1] + new)
    if hasattr(transformers, "GenerationConfig"):
        config = transformers.GenerationConfig(max_new_tokens=new)
        with pytest.raises(ContextExceeded, match=f"{new} new"):
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def test_embeddings_and_filled_caches_are_refused(llama_or_gptj, random_prompt):
    model = llama_or_gptj
    handle = attach(model)
    filled = model(TEXT, use_cache=True)[CACHE]
    handle.select(random_prompt)
    with pytest.raises(UnsupportedCall, match="inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(TEXT), max_new_tokens=2)
    with pytest.raises(UnsupportedCall, match="filled cache"):
        generate(model, TEXT, **{CACHE: filled})


def test_models_without_a_place_for_soft_tokens_are_refused():
    class NoInputs(torch.nn.Module):
        config = transformers.GPT2Config()

        def get_input_embeddings(self):
            raise NotImplementedError

    model = NoInputs()
    before = dict(vars(model))
    with pytest.raises(NoEmbedding):
        attach(model)
    assert vars(model) == before
