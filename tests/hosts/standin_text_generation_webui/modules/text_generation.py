import copy

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from modules import models, shared
from modules.callbacks import Iteratorize
from modules.extensions import apply_extensions


class Stream(StoppingCriteria):
    def __init__(self, callback_func):
        self.callback_func = callback_func

    def __call__(self, input_ids, scores, **kwargs):
        self.callback_func(input_ids[0])
        return False


class GrammarProcessor(LogitsProcessor):
    """A processor with a state, good for one generation, as the host's grammar is: it counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


def generate_reply(*args, **kwargs):
    models.load_model_if_idle_unloaded()
    shared.generation_lock.acquire()
    try:
        yield from _generate_reply(*args, **kwargs)
    finally:
        shared.generation_lock.release()


def _generate_reply(question, state, stopping_strings=None, is_chat=False, escape_html=False, for_ui=False):
    generate_func = generate_reply_custom if type(shared.model).__name__ == "LlamaServer" else generate_reply_HF
    if not is_chat:
        state = apply_extensions("state", state)
    is_stream = state["stream"]
    stops = list(stopping_strings or [])
    if stops and not is_stream:
        processors = state.get("logits_processor")
        state = copy.deepcopy(state)
        if processors is not None:
            state["logits_processor"] = processors
        state["stream"] = True
    reply = ""
    for reply in generate_func(question, question, state, stopping_strings, is_chat=is_chat):
        found = [reply.find(stop) for stop in stops if stop in reply]
        if found:
            reply = reply[: min(found)]
            break
        if is_stream:
            yield reply
    yield reply


def encode(prompt, add_special_tokens=True, add_bos_token=True, truncation_length=None):
    if shared.tokenizer is None:
        models.load_model_if_idle_unloaded()
    ids = shared.tokenizer.encode(str(prompt), return_tensors="pt", add_special_tokens=add_special_tokens)
    return ids if truncation_length is None else ids[:, -truncation_length:]


def decode(output_ids, skip_special_tokens=True):
    return shared.tokenizer.decode(output_ids, skip_special_tokens=skip_special_tokens)


def get_encoded_length(prompt):
    length = apply_extensions("tokenized_length", prompt)
    return len(encode(prompt)[0]) if length is None else length


def get_max_prompt_length(state):
    return state["truncation_length"] - state["max_new_tokens"]


def generate_reply_HF(question, original_question, state, stopping_strings=None, is_chat=False):
    names = ("max_new_tokens", "do_sample", "repetition_penalty", "guidance_scale", "no_repeat_ngram_size")
    generate_params = {name: state[name] for name in names if name in state}
    if state.get("prompt_lookup_num_tokens", 0) > 0:
        generate_params["prompt_lookup_num_tokens"] = state["prompt_lookup_num_tokens"]
    if state.get("static_cache"):
        generate_params["cache_implementation"] = "static"
    if state.get("negative_prompt"):
        generate_params["negative_prompt_ids"] = encode(state["negative_prompt"])
    input_ids = encode(question, truncation_length=get_max_prompt_length(state))
    shared.contexts.append(len(input_ids[0]))
    if state.get("auto_max_new_tokens"):
        generate_params["max_new_tokens"] = state["truncation_length"] - input_ids.shape[-1]
    question, input_ids, inputs_embeds = apply_extensions("tokenizer", state, question, input_ids, None)
    generate_params["inputs"] = input_ids
    if inputs_embeds is not None:
        generate_params["inputs_embeds"] = inputs_embeds
    generate_params["stopping_criteria"] = StoppingCriteriaList()
    processor = state.get("logits_processor", LogitsProcessorList([]))
    if not isinstance(processor, LogitsProcessorList):
        processor = LogitsProcessorList([processor])
    if state.get("grammar_string"):
        processor.append(GrammarProcessor())
    generate_params["logits_processor"] = processor
    if not state["stream"]:
        with torch.no_grad():
            output = shared.model.generate(**generate_params)[0]
        yield decode(output[len(input_ids[0]) :])
        return

    def generate_with_callback(callback=None, *args, **kwargs):
        kwargs["stopping_criteria"].append(Stream(callback))
        with torch.no_grad():
            shared.model.generate(**kwargs)

    with Iteratorize(generate_with_callback, [], generate_params) as outputs:
        for output in outputs:
            yield decode(output[len(input_ids[0]) :])
    outputs.thread.join()


def generate_reply_custom(question, original_question, state, stopping_strings=None, is_chat=False):
    yield shared.model.generate(question, copy.deepcopy(state))
