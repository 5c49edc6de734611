"""Loading a model to train a soft prompt for it: frozen, in the precision that the machine can hold."""

from pathlib import Path
from typing import Any, Dict, Tuple, Union

from ..engines.transformers import load_transformers
from ..errors import BadSetting
from . import processes

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "8bit", "4bit")
BYTES_PER_WEIGHT: Dict[str, float] = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.1, "4bit": 0.6}


def load_model(path: Union[str, Path], precision: str = "auto", sharded: bool = False) -> Tuple[Any, Any, str]:
    """Load a causal model, its tokenizer and its name; the rows that are trained over it are in float32 anyway.

    ``precision``: one of :data:`PRECISIONS`; "auto" is float32 on a CPU, and as stored on a GPU. 8 and 4 bit need
    bitsandbytes. ``sharded``: the layers are spread over all GPUs, and what does not fit there stays in memory; with
    several processes (:mod:`.processes`) each holds its part of every layer.

    Raises :class:`BadSetting` or a :class:`~kobold_sp_plugin.errors.ModelError`.
    """
    if precision not in PRECISIONS:
        raise BadSetting(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision == "auto" and not sharded:
        return load_transformers(path)
    import torch

    if precision in ("8bit", "4bit"):
        from transformers import BitsAndBytesConfig

        half = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
        options: Dict[str, Any] = (
            {"load_in_8bit": True} if precision == "8bit" else {"load_in_4bit": True, "bnb_4bit_compute_dtype": half}
        )
        one: Any = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        device_map = "auto" if sharded else one
        return load_transformers(path, quantization_config=BitsAndBytesConfig(**options), device_map=device_map)
    if sharded:
        stored = "auto" if torch.cuda.is_available() else torch.float32
        dtype = stored if precision == "auto" else getattr(torch, precision)
        if processes.count() == 1:
            return load_transformers(path, torch_dtype=dtype, device_map="auto")
        model, tokenizer, name = load_transformers(path, torch_dtype=dtype)
        processes.share(model)
        return model, tokenizer, name
    model, tokenizer, name = load_transformers(path, torch_dtype=getattr(torch, precision))
    return model.to("cuda") if torch.cuda.is_available() else model, tokenizer, name
