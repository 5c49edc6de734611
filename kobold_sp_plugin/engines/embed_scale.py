"""By how much a model's embedding module multiplies its rows: from its configuration, without its weights."""

from pathlib import Path
from typing import Tuple, Union

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as transformers_version

from ..compatibility import width_of
from ..errors import ModelError, WidthMismatch

_FIRST_THAT_SCALE_INSIDE = (4, 38)
"""Releases of transformers before it multiply outside the embedding module, if they do."""


def embed_scale(path: Union[str, Path], width: int) -> float:
    """The factor of the model at ``path``, a folder or a name on the hub, as the installed transformers has it.

    The model is built without memory for its weights, which takes torch 2.0. ``width`` is the soft prompt's.
    Raises :class:`ModelError`, or :class:`WidthMismatch` for a model of another width.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # None would ask at the terminal
    except Exception as error:  # a value that does not belong there makes the library raise almost anything
        raise ModelError(f"{path} has no configuration of a model: {_brief(error)}") from error
    factor, found = _read(path, config)
    if found != width:
        raise WidthMismatch(f"the soft prompt has {width} columns, this model has {found}")
    return factor


def _read(path: Union[str, Path], config: object) -> Tuple[float, object]:
    version = tuple(int(part) for part in transformers_version.split(".")[:2])
    if version < _FIRST_THAT_SCALE_INSIDE:
        return 1.0, width_of(config)
    if int(torch.__version__.split(".")[0]) < 2:
        raise ModelError(f"whether {path} scales its embeddings can be told with torch 2.0 or later")
    try:
        with torch.device("meta"):
            embedding = AutoModelForCausalLM.from_config(config).get_input_embeddings()
    except Exception as error:
        raise ModelError(f"{path} cannot be built from its configuration: {_brief(error)}") from error
    scale = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):  # rounded as the module rounds it
        scale = torch.tensor(embedding.scalar_embed_scale).to(embedding.weight.dtype)
    return float(scale), width_of(embedding) or getattr(embedding, "embedding_dim", None)


def _brief(error: Exception) -> str:
    """Its text, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
