from collections import deque

import torch

from modules import shared
from modules.text_generation import encode, generate_reply


def _compute_prompt_logprob_entries(prompt, logprobs_count, input_ids=None):
    model = shared.model
    with torch.inference_mode():
        logits = model(input_ids=encode(prompt) if input_ids is None else input_ids).logits
    return logits[0]


def completions_common(body, is_legacy=False, stream=False, stop_event=None):
    generate_params = body
    generate_params["max_new_tokens"] = body.pop("max_tokens")
    generate_params["truncation_length"] = body["truncation_length"] or shared.settings["truncation_length"]
    generate_params.update({"stream": stream, "do_sample": False})
    prompt = body["prompt"]
    ids = encode(prompt)
    entries = _compute_prompt_logprob_entries(prompt, body["logprobs"], input_ids=ids) if body["echo"] else None
    if stream:
        for reply in generate_reply(prompt, generate_params, is_chat=False):
            yield {"text": reply, "logprobs": entries}
        return
    choices = [list(generate_reply(prompt, generate_params, is_chat=False))[-1] for _ in range(body["n"] or 1)]
    yield {"choices": choices, "logprobs": entries, "usage": {"prompt_tokens": len(ids[0])}}


def completions(body, is_legacy=False, stop_event=None):
    return deque(completions_common(body, is_legacy, stream=False, stop_event=stop_event), maxlen=1).pop()


def stream_completions(body, is_legacy=False, stop_event=None):
    yield from completions_common(body, is_legacy, stream=True, stop_event=stop_event)
