"""PEFT's adapters for prompt tuning and p-tuning: ``adapter_config.json`` and the virtual tokens' embeddings.

Both methods store what leaves the embedding module, ``prompt_embeddings`` ``[n_tokens, width]``; of p-tuning that
is what its encoder puts out, not the encoder. The values are in ``adapter_model.safetensors`` or, from older
releases, ``adapter_model.bin``. Source: ``peft/utils/save_and_load.py`` of PEFT 0.3 to 0.21.
"""

import json
from contextlib import contextmanager
from typing import Any, Dict, Iterator

from ..errors import NoTensor, UnsupportedMethod
from ..softprompt import SoftPrompt
from . import metadata, safetensors, torch_file
from .archive import BoundedFile
from .source import Candidate, Source, read_part
from .writing import write_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
KEPT = "adapter_config"
"""The key of the metadata that keeps the adapter's configuration."""
_NAME = "prompt_embeddings"
_METHODS = ("PROMPT_TUNING", "P_TUNING")
_REASONS = {
    "PREFIX_TUNING": "prefix tuning stores keys and values for each layer, not embeddings",
    "CARTRIDGE": "a cartridge stores keys and values for each layer, not embeddings",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning makes the rows anew for each task",
    "CPT": "context-aware prompt tuning adds to the embeddings of a text; its rows are not all there is",
}


def detect(candidate: Candidate) -> bool:
    """Whether it is a folder with ``adapter_config.json``."""
    return CONFIG in candidate.names


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The virtual tokens. Raises a FormatError; :class:`UnsupportedMethod` for an adapter of another method."""
    config = metadata.parse(read_part(candidate.part_path(CONFIG), metadata.MAX_BYTES), CONFIG)
    _check_method(config)
    meta: Dict[str, Any] = {KEPT: {key: value for key, value in config.items() if value is not None}}
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        meta["supported"] = [base]
    if WEIGHTS in candidate.names:
        with BoundedFile(candidate.part_path(WEIGHTS)) as file:
            found = safetensors.source(file, WEIGHTS, _NAME)
            yield found._replace(metadata={**meta, **found.metadata})
    elif OLD_WEIGHTS in candidate.names:
        with BoundedFile(candidate.part_path(OLD_WEIGHTS)) as file:
            saved = torch_file.read(file)
            _, tensor = torch_file.chosen(saved.value, _NAME, OLD_WEIGHTS)
            yield torch_file.source(saved, tensor, _NAME, meta)
    else:
        raise NoTensor(f"an adapter without {WEIGHTS}", f"it or {OLD_WEIGHTS}")


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the adapter; what an adapter's configuration cannot hold goes into the header of its weights."""
    kept = softprompt.metadata.get(KEPT)
    supported = softprompt.supported
    config = {
        "base_model_name_or_path": supported[0] if supported else None,
        "num_attention_heads": 1,
        "num_layers": 1,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        **(kept if isinstance(kept, dict) else {}),
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": softprompt.n_tokens,
        "task_type": "CAUSAL_LM",
        "token_dim": softprompt.width,
    }
    if config.get("peft_type") not in _METHODS:
        config["peft_type"] = _METHODS[0]
    text = json.dumps(config, indent=2, sort_keys=True).encode("ascii")
    metadata.check_size(len(text), CONFIG)
    write_folder(path, {WEIGHTS: safetensors.content(softprompt, dtype), CONFIG: text})


def _check_method(config: Dict[str, Any]) -> None:
    method = config.get("peft_type")
    if method not in _METHODS:
        reason = _REASONS.get(str(method), f"{str(method)[:40]} changes the model's weights and has no rows")
        raise UnsupportedMethod(f"an adapter that is no soft prompt: {reason}", "prompt tuning or p-tuning")
    submodules = config.get("num_transformer_submodules")
    if isinstance(submodules, int) and submodules > 1:
        raise UnsupportedMethod("an adapter for a model with an encoder", "one for a causal language model")
