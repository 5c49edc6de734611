"""However often soft prompts are selected, and texts generated, the process holds what it held before."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from models import FAMILIES, softprompt, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.soft_tokens.prefix import MOST_PREFIXES
from kobold_sp_plugin.soft_tokens.rows import Rows

TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param)


def generate(model, **options):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(TEXT, attention_mask=torch.ones_like(TEXT), **options)


def counts():
    """Tensors and rows that Python can reach; nothing has to wait for its garbage collector."""
    objects = gc.get_objects()
    rows = sum(type(each) is Rows for each in objects)
    return sum(type(each) is torch.Tensor for each in objects), rows


class Fails(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise KeyError


def test_selecting_and_generating_adds_nothing_in_the_end(model):
    width = model.get_input_embeddings().embedding_dim
    gc.collect()
    others = counts()[1]
    handle = attach(model)

    def turn(seed):
        handle.select(softprompt(seed, width=width))
        generate(model)
        with handle.override(softprompt(seed + 500, width=width)):
            generate(model, num_beams=2)
            with pytest.raises(KeyError):
                generate(model, logits_processor=LogitsProcessorList([Fails()]))
        generate(model)

    gc.collect()
    for seed in range(MOST_PREFIXES):
        turn(seed)
    gc.collect()
    before = counts()
    gc.disable()
    try:
        for seed in range(100, 106):
            turn(seed)
        assert counts()[1] == before[1] == others + 1  # the selection's; those of the overrides are gone
    finally:
        gc.enable()
    gc.collect()
    assert counts()[0] <= before[0]
    handle.clear()
    handle.detach()
    assert counts()[1] == others


def test_a_soft_prompt_that_nobody_uses_is_gone(model):
    handle = attach(model)
    rows = np.ones((4, model.get_input_embeddings().embedding_dim), dtype=np.float32)
    gone = weakref.ref(rows)
    handle.select(SoftPrompt(rows=rows))
    del rows
    result = generate(model, return_dict_in_generate=True)
    handle.select(softprompt(1, width=model.get_input_embeddings().embedding_dim))
    for seed in range(2, 2 + MOST_PREFIXES):  # until its prefix has made room for others
        handle.select(softprompt(seed, width=model.get_input_embeddings().embedding_dim))
        generate(model)
    del result  # whose cache knows what it was filled with
    gc.collect()
    assert gone() is None


def test_threads_that_end_leave_nothing(model):
    gc.collect()
    others = counts()[1]
    handle = attach(model)
    prompt = softprompt(width=model.get_input_embeddings().embedding_dim)

    def work():
        with handle.override(prompt):
            generate(model)

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    del thread
    gc.collect()
    assert counts()[1] == others
    assert handle._adapter.running == 0


def test_a_detached_handle_keeps_no_prefixes(model):
    gc.collect()
    before = counts()
    handle = attach(model)
    handle.select(softprompt(width=model.get_input_embeddings().embedding_dim))
    generate(model)
    handle.detach()
    model._modules.pop("_cache", None)  # 4.44 keeps Gemma 2's last cache there, attached or not
    gc.collect()
    assert counts() == before
