"""A copy of an attached model is a plain model of its own."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from models import FAMILIES, FAMILY, softprompt, tiny_model

from kobold_sp_plugin import attach

TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])


def generate(model):
    return model.generate(TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=8, do_sample=False).tolist()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, **({"weights_only": False} if hasattr(torch, "compiler") else {}))


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_was_never_attached(family, make):
    model = tiny_model(family)
    plain, keys, embedding_keys = generate(model), set(vars(model)), set(vars(model.get_input_embeddings()))
    handle = attach(model)
    handle.select(softprompt(width=model.get_input_embeddings().embedding_dim))
    having = generate(model)
    if make is copy.copy:  # it shares its submodules with the model, and their soft tokens with them
        assert set(vars(make(model))) == keys
        return
    other = make(model)
    assert set(vars(other.get_input_embeddings())) == embedding_keys
    assert set(vars(other)) == keys
    assert generate(other) == plain and generate(model) == having
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert generate(model) == having
    attach(other).select(softprompt(1, width=model.get_input_embeddings().embedding_dim))
    attach(other).detach()


def test_a_part_of_the_model_can_be_copied_too():
    model = tiny_model(FAMILY)
    embedding = model.get_input_embeddings()
    before = set(vars(embedding))
    attach(model).select(softprompt())
    other = copy.deepcopy(embedding)
    assert set(vars(other)) == before
    assert torch.equal(other(TEXT), embedding(TEXT))


def test_a_deleted_model_goes_with_its_prefixes():
    model = tiny_model(FAMILY)
    handle = attach(model)
    handle.select(softprompt())
    generate(model)
    tensor = weakref.ref(next(model.parameters()))
    gc.collect()
    gc.disable()
    try:
        del model
        assert tensor() is None
    finally:
        gc.enable()
    handle.detach()
