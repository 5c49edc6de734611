"""Continuous batching: requests get the soft tokens that are selected when they are made."""

import gc
import weakref

import pytest
import torch
import transformers
from models import softprompt, tiny_model

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import ContextExceeded, UnsupportedCall
from kobold_sp_plugin.soft_tokens.batching import is_supported
from kobold_sp_plugin.soft_tokens.text import with_softprompts

TEXTS = [[1, 17, 44, 90, 23, 8, 120], [1, 33, 71]]
NEW = 6

pytestmark = [
    pytest.mark.skipif(
        not hasattr(transformers.GPT2LMHeadModel, "generate_batch"), reason="this release has no continuous batching"
    ),
    pytest.mark.filterwarnings("ignore"),
]
supported = pytest.mark.skipif(not is_supported(), reason="refused with this release: below")


@pytest.fixture
def model():
    model = tiny_model("llama", max_position_embeddings=64)
    model.generation_config = configuration()
    return model


def configuration():
    return transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)


def small(**options):
    """So small that prompts are read in parts, and beside each other."""
    kind = transformers.generation.configuration_utils.ContinuousBatchingConfig
    return kind(**{"num_blocks": 16, "page_size": 16, "max_batch_tokens": 8, "use_cuda_graph": False, **options})


def alone(model, text):
    ids = torch.tensor([text])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=configuration())
    return found[0, len(text) :].tolist()


def batch(model, texts, **options):
    found = model.generate_batch(texts, configuration(), small(), warmup=False, **options)
    return list(found.values())


class Begun:
    """A manager that runs inside the ``with`` block."""

    def __init__(self, model):
        self.manager = model.init_continuous_batching(configuration(), small())

    def __enter__(self):
        self.manager.start()
        return self.manager

    def __exit__(self, *_):
        self.manager.stop()


def results(manager, requests):
    found = {}
    while len(found) < len(requests):
        output = manager.get_result(timeout=30)
        assert output is not None
        found[output.request_id] = output.generated_tokens
    return [found[each] for each in requests]


@supported
def test_a_batch_is_what_generate_writes_and_its_prompts_are_text(model):
    handle = attach(model)
    bare = [alone(model, text) for text in TEXTS]
    handle.select(softprompt(seed=1), softprompt(seed=2, order="after_bos"))
    expected = [alone(model, text) for text in TEXTS]
    found = batch(model, TEXTS)
    assert [each.generated_tokens for each in found] == expected != bare
    assert [each.prompt_ids for each in found] == TEXTS
    handle.clear()
    assert [each.generated_tokens for each in batch(model, TEXTS)] == bare


@supported
def test_generate_in_pages_is_a_batch(model):
    attach(model).select(softprompt())
    expected = alone(model, TEXTS[0])
    in_pages = configuration()
    in_pages.continuous_batching_config = small()
    found = model.generate(torch.tensor(TEXTS[:1]), cache_implementation="paged", generation_config=in_pages)
    assert found.tolist() == [[TEXTS[0] + expected]]


@supported
def test_requests_with_several_selections_run_beside_each_other(model):
    """Those that were made keep theirs; what nobody reads any more is kept by nobody."""
    handle = attach(model)
    selections = [softprompt(seed=seed, n_tokens=3 + seed) for seed in range(3)]
    expected = []
    for each in selections:
        handle.select(each)
        expected.append(alone(model, TEXTS[0]))
    handle.clear()
    expected.append(alone(model, TEXTS[0]))
    with Begun(model) as manager:
        requests = []
        with manager.pause():
            for each in selections:
                with handle.override(each):
                    requests.append(manager.add_request(TEXTS[0]))
            requests.append(manager.add_request(TEXTS[0]))
        assert results(manager, requests) == expected
        assert len({str(each) for each in expected}) == 4
        gone = [weakref.ref(each) for each in selections]
        del selections, each
        handle.select(softprompt(seed=9))
        wanted = alone(model, TEXTS[1])
        assert results(manager, [manager.add_request(TEXTS[1])]) == [wanted]
        handle._adapter._prefixes.__init__()  # they keep some, to be reused
        gc.collect()
        assert [each() for each in gone] == [None] * 3


@supported
def test_several_continuations_of_a_request(model):
    attach(model).select(softprompt())
    expected = alone(model, TEXTS[0])
    several = configuration()
    several.num_return_sequences = 3
    found = model.generate_batch(TEXTS[:1], several, small(), warmup=False)
    assert [each.generated_tokens for each in found.values()] == [expected] * 3
    assert [each.prompt_ids for each in found.values()] == TEXTS[:1] * 3


@supported
def test_a_soft_prompt_inside_of_a_text(model):
    from models import tiny_tokenizer

    attach(model)
    tokenizer = with_softprompts(tiny_tokenizer())
    ids = tokenizer("The door " + softprompt() + " opened").input_ids
    expected = alone(model, ids)
    assert [each.generated_tokens for each in batch(model, [ids])] == [expected]
    with pytest.raises(UnsupportedCall, match="at the end"):
        batch(model, [tokenizer("The door " + softprompt()).input_ids])


@supported
def test_a_handle_that_is_detached_goes_at_the_end_of_the_loop(model):
    handle = attach(model)
    plain = alone(model, TEXTS[0])
    handle.select(softprompt())
    expected = alone(model, TEXTS[0])
    with Begun(model) as manager:
        with manager.pause():
            request = manager.add_request(TEXTS[0])
            handle.detach()
        assert results(manager, [request]) == [expected]
        assert results(manager, [manager.add_request(TEXTS[0])]) == [plain]
    assert not [name for name in vars(model) if "kobold" in name or name == "generate"]


@supported
def test_a_manager_that_is_kept_serves_the_next_handle_too(model):
    attach(model).select(softprompt(seed=1))
    first = batch(model, TEXTS, persistent_manager=True)
    attach(model).detach()
    attach(model).select(softprompt(seed=2))
    expected = [alone(model, text) for text in TEXTS]
    second = batch(model, TEXTS, persistent_manager=True)
    assert [each.generated_tokens for each in second] == expected != [each.generated_tokens for each in first]
    model.destroy_cached_continuous_batching_manager()


@supported
def test_a_manager_that_ran_before_attach_is_refused(model):
    with Begun(model) as manager:
        model._cached_continuous_batching_manager = manager
        attach(model).select(softprompt())
        assert model.init_continuous_batching() is manager
        with pytest.raises(UnsupportedCall, match="before attach"):
            manager.add_request(TEXTS[0])
        del model._cached_continuous_batching_manager


@supported
def test_what_cannot_be_is_refused_before_anything_runs(model):
    handle = attach(model)
    handle.select(softprompt(n_tokens=60))
    longer = configuration()
    longer.max_new_tokens = 9
    with pytest.raises(ContextExceeded, match="60 soft tokens, 7 tokens of text and 9 new"):
        model.generate_batch(TEXTS, longer, small(), warmup=False)
    handle.select(SoftPrompt(rows=softprompt().rows))
    with pytest.raises(UnsupportedCall, match="at the end"):
        batch(model, [[]])
    manager = model.init_continuous_batching(configuration(), small())
    manager.continuous_batching_config.use_cuda_graph = (False, True)
    with pytest.raises(UnsupportedCall, match="use_cuda_graph=False"):
        manager.add_request(TEXTS[0])


@pytest.mark.skipif(not is_supported(), reason="this release is refused: below")
def test_a_batch_with_cuda_graphs_is_refused_and_does_not_come_back_empty(model, monkeypatch):
    attach(model).select(softprompt())
    monkeypatch.setattr(type(small()), "cuda_graph_booleans", (True, True))
    with pytest.raises(UnsupportedCall, match="use_cuda_graph=False"):
        batch(model, TEXTS)


@pytest.mark.skipif(is_supported(), reason="it works with this release: above")
def test_a_release_that_does_not_say_what_it_does_is_refused_from_the_moment_of_a_selection(model):
    handle = attach(model)
    manager = model.init_continuous_batching(generation_config=configuration())
    manager.add_request(TEXTS[0])
    handle.select(softprompt())
    with pytest.raises(UnsupportedCall, match="continuous batching"):
        manager.add_request(TEXTS[0])
    for call in (model.init_continuous_batching, lambda: model.generate_batch(TEXTS)):
        with pytest.raises(UnsupportedCall, match="continuous batching"):
            call()
    handle.detach()
    manager.add_request(TEXTS[0])
