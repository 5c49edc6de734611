import torch

from modules import models, shared
from modules.text_generation import encode, generate_reply


def get_next_logits(*args, **kwargs):
    models.load_model_if_idle_unloaded()
    return _get_next_logits(*args, **kwargs)


def _get_next_logits(prompt, state, use_samplers, previous, top_logits=25, return_dict=False):
    if use_samplers:
        return list(generate_reply(prompt, {**state, "max_new_tokens": 1}))[-1]
    with torch.no_grad():
        output = shared.model(input_ids=encode(prompt))
    return output["logits"][-1][-1]
