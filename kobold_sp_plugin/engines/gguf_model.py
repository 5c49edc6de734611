"""What the two ways to llama.cpp share: which soft prompts a GGUF file's model can read, and how it is spoken with."""

import logging
from typing import Any, Dict, Optional, Sequence

from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import WidthMismatch
from ..gguf.reading import ModelFile
from ..softprompt import SoftPrompt

log = logging.getLogger(__name__)


def check_widths(softprompts: Sequence[SoftPrompt], model: ModelFile) -> None:
    """Raise :class:`WidthMismatch` for a soft prompt of another width than the model's."""
    for each in softprompts:
        if each.width != model.embedding.shape[0]:
            raise WidthMismatch(
                f"{each.name or 'the soft prompt'} was made for {each.width} columns, "
                f"this model has {model.embedding.shape[0]}"
            )


def chat_prompt(model: ModelFile, messages: Sequence[Dict[str, Any]], begins: bool) -> Optional[str]:
    """A conversation as the file's template writes it; None where it has none, or not for these messages.

    ``begins``: every text is begun with the beginning-of-sequence token, so that the template's own is left out.
    """
    template = model.text("tokenizer.chat_template")
    if not template:
        return None
    tokens = model.strings("tokenizer.ggml.tokens")

    def special(key: str) -> str:
        at = model.number(f"tokenizer.ggml.{key}_token_id")
        return tokens[at].decode("utf-8", "replace") if at is not None and 0 <= at < len(tokens) else ""

    def refuse(message: str) -> None:
        raise ValueError(message)

    # As transformers sets it up, for which templates are written.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    start = special("bos")
    try:
        text = environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token=start, eos_token=special("eos")
        )
    except Exception as error:  # templates refuse what they do not know, each in its own way
        log.warning("The template for conversations of %s cannot be used: %s", model.path, error)
        return None
    return text[len(start) :] if start and begins and text.startswith(start) else text
