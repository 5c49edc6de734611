"""A saved state for llama-server's slots."""

import json
import os
from pathlib import Path
from typing import Union

from ..engines.slots import write_slot
from ..gguf.reading import read
from ..softprompt import SoftPrompt
from .common import Export, check, shell


def export(softprompt: SoftPrompt, model: Union[str, Path], path: Union[str, Path], cache_type: str = "f16") -> Export:
    """Load the model, and write what it makes of the soft prompt to ``path``, in one step.

    Raises an :class:`ExportError`, :class:`WidthMismatch`, :class:`ModelError`, :class:`MissingLibrary` or
    :class:`OSError`.
    """
    found = read(model)
    check(softprompt, found)
    slot = write_slot([softprompt], found, path, cache_type)
    bos = found.number("tokenizer.ggml.bos_token_id")
    start = [] if slot.takes_bos or bos is None else [bos]
    ids = ", ".join(map(str, [*slot.ids, *start]))
    folder, name = os.path.split(os.path.abspath(path))
    types = "" if cache_type == "f16" else f" -ctk {cache_type} -ctv {cache_type} -fa off"
    window = " --swa-full" if found.of_architecture("attention.sliding_window") else ""
    usage = (
        f"llama-server: `llama-server -m {shell(model)} --slot-save-path {shell(folder)} -np 1{types}{window}`; before "
        f'each request POST to /slots/0?action=restore `{{"filename": {json.dumps(name)}}}`',
        f'then POST to /completion `{{"prompt": [{ids}, "your text"], "id_slot": 0, "cache_prompt": true}}`',
        f"and see that timings.cache_n is at least {len(slot.ids)}: with less it has answered without the soft prompt. "
        "kobold-sp serve --engine llama-server does all this for every front end.",
    )
    return Export(str(path), slot.ids, "", os.path.getsize(path), (), usage)
