"""A cache that a generation returned, or filled, given back with the text so far: the soft tokens are in it already."""

import copy

import pytest
import torch
import transformers
from models import CACHE, FAMILIES, softprompt, tiny_model

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import UnsupportedCall

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
HARD = [77, 12, 101, 5, 64]
TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])
MORE = torch.tensor([[33, 71, 9]])

pytestmark = pytest.mark.skipif(RELEASE < (4, 36), reason="this release returns no cache")


@pytest.fixture(params=FAMILIES)
def model(request):
    model = tiny_model(request.param)
    model.generation_config.eos_token_id = None
    return model


def rows_of(model, ids):
    return SoftPrompt(rows=model.get_input_embeddings().weight.detach()[ids].numpy())


def generate(model, ids, mask=None, **options):
    """A dictionary with the returned cache, or one without it where the release returns none."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


def turns(model, **options):
    """Three turns of a dialogue with a cache that goes back each time, and the same without: ids, and last scores."""
    kept = fresh = TEXT
    back = dict(options)
    for _ in range(3):
        with_cache = generate(model, kept, output_scores=True, **back)
        without = generate(model, fresh, output_scores=True)
        back[CACHE] = cache_of(with_cache)
        kept, fresh = (torch.cat([out.sequences, MORE], dim=1) for out in (with_cache, without))
    return (kept, torch.stack(with_cache.scores)), (fresh, torch.stack(without.scores))


def cache_of(out):
    cache = out.get(CACHE)
    if cache is None:
        pytest.skip("this release returns no cache")
    if type(cache).__name__ == "HybridCache":
        pytest.skip("this release's cache does not tell how full it is")
    return cache


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}], ids=str)
def test_three_turns_are_those_without_a_cache(model, options):
    if "prefill_chunk_size" in options and RELEASE < (5, 0):
        pytest.skip("4.57 begins at the first position again")
    if RELEASE < (4, 44) and model.config.model_type in ("gpt2", "bloom", "opt", "gptj"):
        pytest.skip("the bare model of this release keeps one new token only")
    kept, fresh = turns(model, **options)
    if kept[0].tolist() != fresh[0].tolist():
        pytest.skip("the bare model does not agree with itself")
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    having, expected = turns(model, **options)
    assert having[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(having[1], expected[1], rtol=1e-3, atol=1e-3)
    assert not torch.equal(having[1], kept[1])


def test_padded_rows_too(model):
    if RELEASE < (4, 57):
        pytest.skip("bare models of this release do not agree with themselves")
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), TEXT[:, :4]], dim=1), TEXT])
    mask = (batch != 0).long()
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    first = generate(model, batch, mask)
    longer = torch.cat([first.sequences, MORE.expand(2, -1)], dim=1)
    mask = torch.cat([mask, torch.ones(2, longer.shape[1] - 7, dtype=torch.long)], dim=1)
    expected = generate(model, longer, mask).sequences
    found = generate(model, longer, mask, **{CACHE: first[CACHE]}).sequences
    assert found.tolist() == expected.tolist()


def test_a_cache_of_the_callers_own_is_filled_and_used_again(model):
    if RELEASE < (4, 57):
        pytest.skip("a cache of the caller's own came later")
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    cache, ids, expected = transformers.DynamicCache(), TEXT, TEXT
    for _ in range(2):
        ids = torch.cat([generate(model, ids, **{CACHE: cache}, return_dict_in_generate=False), MORE], dim=1)
        expected = torch.cat([generate(model, expected).sequences, MORE], dim=1)
    assert ids.tolist() == expected.tolist()


def test_a_cache_goes_back_by_its_old_name_too(model):
    if RELEASE < (5, 24):
        pytest.skip("this release has one name")
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    first = generate(model, TEXT)
    longer = torch.cat([first.sequences, MORE], dim=1)
    with pytest.warns(FutureWarning, match="deprecated"):
        found = generate(model, longer, past_key_values=first[CACHE]).sequences
    assert found.tolist() == generate(model, longer).sequences.tolist()


def test_only_the_new_ids_and_a_mask_of_all(model):
    if RELEASE < (5, 0):
        pytest.skip("from 5.0")
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    first = generate(model, TEXT)
    longer = torch.cat([first.sequences, MORE], dim=1)
    expected = generate(model, longer).sequences[:, longer.shape[1] :]
    new = longer[:, first.sequences.shape[1] - 1 :]  # the last of a generation is not in its cache
    found = generate(model, new, torch.ones_like(longer), **{CACHE: first[CACHE]}).sequences
    assert found[:, new.shape[1] :].tolist() == expected.tolist()


def test_copies_of_one_cache_begin_several_texts(model):
    if RELEASE < (4, 57):
        pytest.skip("a cache that can be copied came later")
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    cache = transformers.DynamicCache()
    generate(model, TEXT, **{CACHE: cache}, max_new_tokens=1)
    for each in ([5, 6], [90, 91, 92]):
        ids = torch.cat([TEXT, torch.tensor([each])], dim=1)
        found = generate(model, ids, **{CACHE: copy.deepcopy(cache)}).sequences
        assert found.tolist() == generate(model, ids).sequences.tolist()


def test_a_selection_that_went_and_came_back_is_the_same(model):
    handle, noir = attach(model), rows_of(model, HARD)
    handle.select(noir)
    first = generate(model, TEXT)
    cache_of(first)
    handle.clear()
    handle.select(SoftPrompt(rows=noir.rows.copy()))
    longer = torch.cat([first.sequences, MORE[:, :1]], dim=1)
    if RELEASE < (4, 44):
        longer = first.sequences  # one new token
    found = generate(model, longer, **{CACHE: first[CACHE]}).sequences
    assert found.tolist() == generate(model, longer).sequences.tolist()


def test_a_cache_of_another_selection_is_refused(model):
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    first = generate(model, TEXT)
    cache = cache_of(first)
    longer = torch.cat([first.sequences, MORE], dim=1)
    handle.select(softprompt(width=model.get_input_embeddings().embedding_dim))
    with pytest.raises(UnsupportedCall, match="does not begin with the selected"):
        generate(model, longer, **{CACHE: cache})
    handle.clear()
    with pytest.raises(UnsupportedCall, match="none is selected"):
        generate(model, longer, **{CACHE: cache})
    bare = generate(model, TEXT)[CACHE]
    handle.select(rows_of(model, HARD))
    with pytest.raises(UnsupportedCall, match="does not begin with the selected"):
        generate(model, longer, **{CACHE: bare})
    with pytest.raises(UnsupportedCall, match="to be longer"):
        generate(model, TEXT, **{CACHE: cache})


def test_a_filled_cache_and_chunks_are_refused_where_the_release_cannot(model):
    if not (4, 57) <= RELEASE < (5, 0):
        pytest.skip("only 4.57 begins at the first position again")
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    first = generate(model, TEXT)
    longer = torch.cat([first.sequences, MORE], dim=1)
    with pytest.raises(UnsupportedCall, match="prefill_chunk_size"):
        generate(model, longer, **{CACHE: first[CACHE]}, prefill_chunk_size=2)
