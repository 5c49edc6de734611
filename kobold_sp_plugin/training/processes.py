"""Several processes that train together, as ``accelerate launch`` and ``torchrun`` start them.

Each takes its share of a step's batches, and all of them the same step: gradients and losses are summed. Everything
that is written, the first one writes. On one process nothing here does anything.
"""

import os
from typing import Any, Sequence

import torch
import torch.distributed as distributed

from .frozen import layers_of


def join() -> None:
    """Join the processes that this one was started with, if it was; on machines with GPUs each takes one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not distributed.is_available() or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leave what :func:`join` joined."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """Which one this is, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that writes."""
    return number() == 0


def wait() -> None:
    """Wait until all are here."""
    if count() > 1:
        distributed.barrier()


def add(tensors: Sequence[torch.Tensor]) -> None:
    """Change each tensor, in place, to the sum of all processes' own."""
    if count() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def share(model: Any) -> None:
    """Leave each process its part of the weights of each of ``model``'s layers, in place, and freeze them.

    A layer is whole only while it computes, so that from now on all processes have to call the model together. What is
    no layer (embedding, head) each has whole. torch's own ``fully_shard``; raises :class:`ImportError` before 2.6.
    """
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)
    for layer in layers_of(model):
        fully_shard(layer, reshard_after_forward=True)  # each is wrapped by itself, and torch leaves a root whole else
    if torch.cuda.is_available():
        model.to(torch.cuda.current_device())
    model._is_fsdp_managed_module = True  # where transformers looks: its `generate` goes on until all have ended


def can_share() -> bool:
    """Whether this torch has what :func:`share` needs."""
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        return False
    return True


def shares(model: Any) -> bool:
    """Whether :func:`share` was called on it."""
    return bool(getattr(model, "_is_fsdp_managed_module", False))


def sums(values: Sequence[float], device: Any) -> Sequence[float]:
    """The sums of all processes' own numbers."""
    if count() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor)
    return [float(each) for each in tensor]


def least(value: int, device: Any) -> int:
    """The least of all processes' own."""
    if count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MIN)
    return int(tensor)
