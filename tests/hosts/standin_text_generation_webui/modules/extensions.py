import importlib.util
import sys
from functools import partial

from modules import shared
from modules.logging_colors import logger

state = {}
available_extensions = []
setup_called = set()


def load_extensions():
    global state
    state = {}
    for i, name in enumerate(shared.args.extensions):
        try:
            path = shared.user_data_dir / "extensions" / name / "script.py"
            spec = importlib.util.spec_from_file_location(f"user_ext_{name}", str(path))
            extension = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = extension
            spec.loader.exec_module(extension)
            if extension not in setup_called:
                if hasattr(extension, "setup"):
                    extension.setup()
                setup_called.add(extension)
            state[name] = [True, i, extension]
        except ModuleNotFoundError:
            raise
        except Exception:
            logger.exception(f'Failed to load the extension "{name}".')


def iterator():
    for name in sorted(state, key=lambda each: state[each][1]):
        if state[name][0]:
            yield state[name][2], name


def _apply_state_modifier_extensions(state):
    for extension, _ in iterator():
        if hasattr(extension, "state_modifier"):
            state = extension.state_modifier(state)
    return state


def _apply_tokenizer_extensions(function_name, state, prompt, input_ids, input_embeds):
    for extension, _ in iterator():
        if hasattr(extension, function_name):
            prompt, input_ids, input_embeds = getattr(extension, function_name)(state, prompt, input_ids, input_embeds)
    return prompt, input_ids, input_embeds


def _apply_custom_tokenized_length(prompt):
    for extension, _ in iterator():
        if hasattr(extension, "custom_tokenized_length"):
            return extension.custom_tokenized_length(prompt)
    return None


EXTENSION_MAP = {
    "state": _apply_state_modifier_extensions,
    "tokenizer": partial(_apply_tokenizer_extensions, "tokenizer_modifier"),
    "tokenized_length": _apply_custom_tokenized_length,
}


def apply_extensions(typ, *args, **kwargs):
    return EXTENSION_MAP[typ](*args, **kwargs)
