"""What is known of text-generation-webui: which releases the extension can be part of, and their log."""

import importlib
import inspect
import logging
from typing import Any, Iterator, Tuple

OLDEST = "1.2"
"""The first release (July 2023) that hands ``state["logits_processor"]`` to ``generate``."""


def faults() -> Iterator[str]:
    """What keeps this host from being one that is known; looking changes nothing."""
    modules = {}
    for name in ("shared", "extensions", "models", "text_generation"):
        try:
            modules[name] = importlib.import_module(f"modules.{name}")
        except ImportError as error:
            yield f"modules.{name} cannot be imported ({error})"
    if len(modules) < 4:
        return
    for name in ("model", "tokenizer", "model_name", "args", "gradio"):
        if not hasattr(modules["shared"], name):
            yield f"there is no shared.{name}"
    if not callable(getattr(modules["extensions"], "iterator", None)):
        yield "there is no extensions.iterator"
    if "state" not in getattr(modules["extensions"], "EXTENSION_MAP", {}):
        yield "it has no hook for the state (state_modifier)"
    loaders = [getattr(modules["models"], name, None) for name in ("transformers_loader", "huggingface_loader")]
    if not any(parameters(loader) == ("model_name",) for loader in loaders if loader is not None):
        yield "there is no transformers_loader(model_name) in modules.models"
    generate = getattr(modules["text_generation"], "generate_reply_HF", None)
    if "state" not in parameters(generate):
        yield "generate_reply_HF takes no state"
    elif "logits_processor" not in _constants(generate):
        yield "generate_reply_HF does not hand state['logits_processor'] on"


def parameters(function: Any) -> Tuple[str, ...]:
    """The names of a function's parameters; none where it is none."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _constants(function: Any) -> Tuple[Any, ...]:
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_consts", ("logits_processor",))


def log() -> logging.Logger:
    """The host's logger: it sends everybody else's records nowhere."""
    try:
        logger: logging.Logger = importlib.import_module("modules.logging_colors").logger
        return logger
    except (ImportError, AttributeError):
        return logging.getLogger(__name__)
