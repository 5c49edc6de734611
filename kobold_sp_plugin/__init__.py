"""Soft prompts, made to work everywhere that people run local language models.

>>> from kobold_sp_plugin import Catalogue, SoftPrompt, attach

``SoftPrompt`` is the value, ``Catalogue`` a folder of them, ``attach`` gives a model its soft tokens.
"""

from typing import Any

__version__ = "0.5.0"
__all__ = ["Catalogue", "SoftPrompt", "Verdict", "attach"]

_HOMES = {
    "Catalogue": "catalogue",
    "SoftPrompt": "softprompt",
    "Verdict": "compatibility",
    "attach": "soft_tokens",
}


def __getattr__(name: str) -> Any:
    """Import a public name's room when it is first used: a host's start must not pay for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
