"""Rows put before the embedded text, before or after the position embedding is added; in training too."""

import copy

import pytest
import torch
import transformers
from models import FAMILIES, FAMILY, VOCABULARY, softprompt, tiny_model

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import UnsupportedModel, WidthMismatch
from kobold_sp_plugin.soft_tokens import concatenated, outside_positions

TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120], [1, 9, 33, 71, 50, 4, 6]])
N_TOKENS = 4
LEARNED = [family for family in ("gpt2", "opt") if family in FAMILIES]


def rows_for(model):
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(3)
    scale = embedding.weight.detach().std() * float(getattr(embedding, "embed_scale", 1.0))
    return (torch.randn(N_TOKENS, embedding.embedding_dim, generator=generator) * scale).requires_grad_()


def with_rows_in_the_matrix(model, rows):
    """A copy whose embedding matrix ends with ``rows``, and the ids that they have in it."""
    larger = copy.deepcopy(model)
    embedding = larger.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0))
    embedding.weight = torch.nn.Parameter(torch.cat([embedding.weight.detach(), rows.detach() / scale]))
    return larger, torch.arange(VOCABULARY, VOCABULARY + len(rows))


@pytest.mark.parametrize("family", FAMILIES)
def test_before_positions_are_added_it_is_a_larger_matrix_in_training_too(family):
    model = tiny_model(family)
    rows = rows_for(model)
    larger, new = with_rows_in_the_matrix(model, rows)
    ids = torch.cat([new.expand(2, -1), TEXT], dim=1)
    labels = torch.where(ids >= VOCABULARY, -100, ids)
    expected = larger(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels.clone())
    found = model(**concatenated(model, rows, TEXT, labels=TEXT))
    torch.testing.assert_close(found.logits, expected.logits[..., :VOCABULARY], rtol=1e-4, atol=1e-4)
    matrix = larger.get_input_embeddings().weight
    scale = float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))
    if expected.logits.shape[-1] == VOCABULARY:  # else the head writes the new ids too, and the loss is another one
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
        (by_matrix,) = torch.autograd.grad(expected.loss, matrix)
        (by_rows,) = torch.autograd.grad(found.loss, rows)
        torch.testing.assert_close(by_rows, by_matrix[VOCABULARY:] / scale, rtol=1e-3, atol=1e-5)
    assert found.logits.shape[:2] == (2, 11)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_soft_tokens_are(family):
    model = tiny_model(family)
    rows = rows_for(model)
    mask = torch.ones_like(TEXT)
    mask[0, :2] = 0
    ids = TEXT * mask
    handle = attach(model)
    handle.select(SoftPrompt(rows=rows, scale="module"))
    expected = model(**handle.prepend(ids, mask)).logits
    inputs = concatenated(model, rows, ids, mask, labels=ids)
    assert inputs["attention_mask"].tolist() == handle.prepend(ids, mask)["attention_mask"].tolist()
    found = model(inputs_embeds=inputs["inputs_embeds"], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0, 2:], expected[0, 2:], rtol=1e-5, atol=1e-5)
    assert inputs["labels"][0].tolist() == [0, 0, *[-100] * N_TOKENS, *ids[0, 2:].tolist()]
    assert inputs["labels"][1].tolist() == [*[-100] * N_TOKENS, *ids[1].tolist()]


# After the position embedding is added


def learned(family):
    """A tiny model with a learned position embedding as wide as its token embedding, and that position embedding."""
    if family == "gpt2":
        model = tiny_model(family)
        return model, model.transformer.wpe.weight
    model = tiny_model(family, word_embed_proj_dim=48)
    return model, model.model.decoder.embed_positions.weight[2:]


def by_hand(model, positions, rows, ids):
    """The logits of ``[rows][text + its position embedding]``: what the model will add is taken off beforehand."""
    wanted = torch.cat(
        [rows.expand(len(ids), -1, -1), model.get_input_embeddings()(ids) + positions[: ids.shape[1]]], 1
    )
    mask = torch.ones(wanted.shape[:2], dtype=torch.long)
    return model(inputs_embeds=wanted - positions[: wanted.shape[1]], attention_mask=mask).logits


@pytest.mark.parametrize("family", LEARNED)
def test_after_positions_are_added_text_is_where_it_is_without_rows(family):
    model, positions = learned(family)
    rows = rows_for(model)
    expected = by_hand(model, positions, rows, TEXT)
    (wanted,) = torch.autograd.grad(expected[:, N_TOKENS:].square().mean(), rows)
    with outside_positions(model, N_TOKENS):
        found = model(**concatenated(model, rows, TEXT)).logits
        (gradient,) = torch.autograd.grad(found[:, N_TOKENS:].square().mean(), rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    inside = model(**concatenated(model, rows, TEXT)).logits
    assert (inside - found).abs().max() > 1e-2


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", LEARNED)
def test_generating_outside_of_positions(family, use_cache):
    """Masks and caches are right: each step is the one that is made by hand, without a cache."""
    model, positions = learned(family)
    rows = rows_for(model).detach()
    ids = TEXT
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, by_hand(model, positions, rows, ids)[:, -1:].argmax(-1)], dim=1)
    handle = attach(model)
    handle.select(SoftPrompt(rows=rows, scale="module"))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["use_cache"] = use_cache
    model.config.eos_token_id = None
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    inside = model.generate(TEXT, attention_mask=torch.ones_like(TEXT), **options)
    with outside_positions(model, N_TOKENS):
        for _ in range(2):
            assert model.generate(TEXT, attention_mask=torch.ones_like(TEXT), **options).tolist() == ids.tolist()
        padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), TEXT[1:, :5]], dim=1)
        batch = torch.cat([TEXT[:1], padded])
        mask = torch.ones_like(batch)
        mask[1, :2] = 0
        together = model.generate(batch, attention_mask=mask, **options)
        alone = model.generate(padded[:, 2:], attention_mask=mask[1:, 2:], **options)
    assert together[0].tolist() == ids[0].tolist() and together[1, 2:].tolist() == alone[0].tolist()
    assert model.generate(TEXT, attention_mask=torch.ones_like(TEXT), **options).tolist() == inside.tolist()
    assert inside.tolist() != ids.tolist()


def test_a_position_embedding_is_put_back():
    model, _ = learned("gpt2")
    before = dict(vars(model.transformer.wpe))
    with pytest.raises(KeyError), outside_positions(model, 3):
        raise KeyError
    assert vars(model.transformer.wpe) == before


# Refusals


def test_models_without_learned_positions_are_refused_by_name():
    for family in set(FAMILIES) - set(LEARNED):
        model = tiny_model(family)
        with pytest.raises(UnsupportedModel, match=type(model).__name__), outside_positions(model, 3):
            pass


def test_models_that_have_to_see_the_ids_are_refused():
    model = tiny_model(FAMILY)
    model.tid2eid = torch.zeros(VOCABULARY, 2, dtype=torch.long)
    with pytest.raises(UnsupportedModel, match="attach"):
        concatenated(model, torch.zeros(2, 32), TEXT)
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedModel, match="T5"):
        concatenated(transformers.T5ForConditionalGeneration(config), torch.zeros(2, 32), TEXT)


def test_rows_of_another_width_are_refused():
    with pytest.raises(WidthMismatch, match="16 columns, this model has 32"):
        concatenated(tiny_model(FAMILY), torch.tensor(softprompt(width=16).rows), TEXT)
