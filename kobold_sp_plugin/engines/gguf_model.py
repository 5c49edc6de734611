"""What the two ways to llama.cpp share: which soft prompts a GGUF file's model can read, and how it is spoken with."""

import logging
import re
from typing import Any, Dict, List, Optional, Sequence

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import ByteLevel

from ..errors import WidthMismatch
from ..gguf.reading import ModelFile
from ..soft_tokens.text import WORD_STARTS
from ..softprompt import SoftPrompt

log = logging.getLogger(__name__)

_SPECIAL = (2, 3, 5)
"""Types of tokens that add nothing to a text: unknown, control, unused."""
_BYTE = 6
_BYTE_NAME = re.compile("<0x[0-9A-Fa-f]{2}>")


def check_widths(softprompts: Sequence[SoftPrompt], model: ModelFile) -> None:
    """Raise :class:`WidthMismatch` for a soft prompt of another width than the model's."""
    for each in softprompts:
        if each.width != model.embedding.shape[0]:
            raise WidthMismatch(
                f"{each.name or 'the soft prompt'} was made for {each.width} columns, "
                f"this model has {model.embedding.shape[0]}"
            )


def token_texts(model: ModelFile) -> List[str]:
    """What each token adds to a text, in lower case, by its id, as far as the file tells; special ones add nothing."""
    names = [name.decode("utf-8", "replace") for name in model.strings("tokenizer.ggml.tokens")]
    types = model.integers("tokenizer.ggml.token_type")
    if model.text("tokenizer.ggml.model") == "gpt2":
        decode = ByteLevel().decode
        texts = [decode([name]) for name in names]
    else:
        texts = [name.replace(WORD_STARTS[0], " ") for name in names]
    for token, kind in enumerate(types):
        if kind == _BYTE and _BYTE_NAME.fullmatch(names[token]):
            texts[token] = bytes([int(names[token][1:-1], 16)]).decode("utf-8", "replace")
        elif kind in _SPECIAL:
            texts[token] = ""
    return [text.lower() for text in texts]


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
