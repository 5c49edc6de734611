"""A model as training has it: frozen, and with no more kept for the backward pass than it takes."""

import ctypes
from typing import Any, Callable, Sequence

import torch
import torch.utils.checkpoint

from ..errors import UnsupportedModel
from ..patching import patch

_UNFUSED = ("NewGELUActivation", "FastGELUActivation") if torch.__version__ >= (1, 12) else ()
"""Transformers' tanh approximation of GELU (GPT-2, GPT-Neo, GPT-J ...), step by step: eight operators, most of which
keep a tensor of the width of the layer's inside. In torch 1.11 there is no such operator."""
_PACKS = "support_avx512bf16_for_cpu"
"""A flag of bitsandbytes' 4-bit layers, on some processors: at the first look without gradients they pack their weights
into a form that nothing can be differentiated through."""


def frozen(model: Any, checkpoint_layers: bool) -> Callable[[], None]:
    """Freeze ``model``, in place and in evaluation mode; returns what takes that back.

    With ``checkpoint_layers`` its layers keep nothing but their input for the backward pass.

    Raises :class:`UnsupportedModel` for a 4-bit model on a CPU that bitsandbytes has made ready for generating alone.
    """
    for module in model.modules():
        if getattr(getattr(module, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModel(
                "On this processor a 4-bit model that has generated can no longer be trained through. Load it anew."
            )
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [module for module in model.modules() if module.training]
    for parameter in learning:
        parameter.requires_grad_(False)
    model.eval()
    hooks = [patch(module, "forward", _gelu) for module in model.modules() if type(module).__name__ in _UNFUSED]
    if checkpoint_layers:
        hooks += [patch(layer, "forward", _recomputed) for layer in layers_of(model)]
    packing = [module for module in model.modules() if getattr(module, _PACKS, False)]
    for module in packing:
        setattr(module, _PACKS, False)

    def restore() -> None:
        for hook in hooks:
            hook.undo()
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in modes:
            module.training = True
        for module in packing:
            setattr(module, _PACKS, True)

    return restore


def layers_of(model: Any) -> Sequence[Any]:
    """The model's layers: the longest list of modules of one class."""
    lists = [list(each) for each in model.modules() if isinstance(each, torch.nn.ModuleList)]
    return max((each for each in lists if len({type(layer) for layer in each}) == 1), key=len, default=[])


def _recomputed(original: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer that keeps nothing for the backward pass but its input.

    The models' own gradient checkpointing is off in evaluation mode, and training mode would bring dropout.
    """
    if not torch.is_grad_enabled():
        return original(*args, **kwargs)

    def layer(*values: Any) -> Any:  # once forward, and again for the backward pass
        given = (*values, *kwargs.values())  # some models pass the hidden states by keyword
        if any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in given):
            _give_back_holes()
        return original(*values, **kwargs)

    return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)


def _trim() -> Callable[[int], int]:
    """glibc's ``malloc_trim``; where the C library is another, nothing."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return lambda kept: 0
    return trim


_malloc_trim = _trim()


def _give_back_holes() -> None:
    """Give the system back what the C library holds of tensors that are gone.

    glibc cannot put an aligned tensor where one of the same size was, and so its heap grows to several times what a
    layer takes. Elsewhere the time that this takes is worth more than the memory.
    """
    _malloc_trim(0)


def _gelu(original: Any, values: torch.Tensor) -> torch.Tensor:
    """The same function as one operator, which keeps its input alone."""
    return torch.nn.functional.gelu(values, approximate="tanh")
