"""The folder of exelents' soft-prompt-tuning: ``pytorch_weights.bin`` with several soft prompts at once.

The tensor ``s_wte.learned_embedding`` is ``[n_prompts, n_tokens, width]``; ``config.json`` tells the first two.
Source: ``gptj_utils.py`` and ``soft_embedding.py``.
"""

import json
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Dict, Iterator

from ..errors import NoTensor, SeveralSoftPrompts
from ..softprompt import SoftPrompt
from . import metadata, torch_file
from .archive import BoundedFile, write_members
from .source import Candidate, Source, read_part
from .torch_pickle import Tensor
from .writing import write_folder

WEIGHTS = "pytorch_weights.bin"
CONFIG = "config.json"
_NAME = "s_wte.learned_embedding"


def detect(candidate: Candidate) -> bool:
    """Whether it is a folder with ``pytorch_weights.bin``."""
    return WEIGHTS in candidate.names


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """One soft prompt of the folder: the only one, or the one of the number ``part``. Raises a FormatError."""
    meta: Dict[str, Any] = {}
    if CONFIG in candidate.names:
        config = metadata.parse(read_part(candidate.part_path(CONFIG), metadata.MAX_BYTES), CONFIG)
        base = config.get("_name_or_path")
        if isinstance(base, str) and base:
            meta["supported"] = [base]
    with BoundedFile(candidate.part_path(WEIGHTS)) as file:
        saved = torch_file.read(file)
        found = {name: each for name, each in _tensors(saved.value).items() if "learned_embedding" in name}
        if len(found) != 1:
            raise NoTensor(f"{WEIGHTS} without {_NAME}", "it in the dictionary")
        (tensor,) = found.values()
        count = tensor.shape[0] if isinstance(tensor.shape, tuple) and len(tensor.shape) == 3 else 1
        if candidate.part is None and count != 1:
            raise SeveralSoftPrompts(
                f"{str(count)[:20]} soft prompts", "one; `kobold-sp convert` with `--part 0` takes the first out"
            )
        number = candidate.part or "0"
        if not number.isdecimal() or len(number) > 6:
            raise NoTensor(f"no soft prompt {number[:20]!r}", "a number from 0")
        yield torch_file.source(saved, tensor, _NAME, meta, int(number))


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the folder, with one soft prompt in it."""
    shape = (1, softprompt.n_tokens, softprompt.width)
    weights = BytesIO()
    write_members(weights, torch_file.write_zip(softprompt.rows, dtype, shape, _NAME))
    config = {
        "model_type": "gptj",
        "_name_or_path": (softprompt.supported or [""])[0],
        "n_embd": softprompt.width,
        "soft_emb_n_prompts": 1,
        "soft_emb_n_tokens": softprompt.n_tokens,
    }
    write_folder(path, {WEIGHTS: weights.getvalue(), CONFIG: json.dumps(config, indent=2).encode()})


def _tensors(value: Any) -> Dict[str, Tensor]:
    items = value.items() if isinstance(value, dict) else ()
    return {name: each for name, each in items if isinstance(name, str) and isinstance(each, Tensor)}
