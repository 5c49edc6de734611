import copy

from modules.extensions import apply_extensions
from modules.text_generation import generate_reply, get_encoded_length, get_max_prompt_length


def generate_chat_prompt(user_input, state, impersonate=False):
    """The history, as much of its end as there is room for, and what the user says."""
    messages = list(state["history"]["internal"])
    while True:
        prompt = "".join(f"{you} {bot} " for you, bot in messages) + user_input
        if not messages or get_encoded_length(prompt) <= get_max_prompt_length(state):
            return prompt
        messages.pop(0)


def count_prompt_tokens(text_input, state):
    prompt = generate_chat_prompt(text_input, copy.deepcopy(state))
    return f"{get_encoded_length(prompt)} / {state['truncation_length']}"


def chatbot_wrapper(text, state, regenerate=False, _continue=False, loading_message=True, for_ui=False):
    state = apply_extensions("state", state)
    prompt = generate_chat_prompt(text, state)
    yield from generate_reply(prompt, state, stopping_strings=["\n\n"], is_chat=True, for_ui=for_ui)


def impersonate_wrapper(textbox, state):
    prompt = generate_chat_prompt("", state, impersonate=True)
    yield from generate_reply(prompt + textbox, state, stopping_strings=["\n\n"], is_chat=True)
