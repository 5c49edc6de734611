"""The two checkpoints named ``.mtjsp``: mtj-softtuner's, an ``.npz``, and KoboldAI's, a file of torch's.

Of the optimizer's state, which in both is a pickle, nothing is read. Sources: ``trainer_base.py`` of
mtj-softtuner, ``prompt_tuner.py`` of KoboldAI.
"""

from contextlib import contextmanager
from typing import Any, Dict, Iterator

import numpy as np

from ..errors import FormatError, WrongRank
from . import npy, torch_file
from .archive import Member
from .source import Candidate, Source
from .torch_pickle import Tensor

_NUMBERS = ("step", "loss", "last_loss", "grad_norm", "grad_norm_micro", "g_avg", "s_avg")
_SCALARS: Dict[str, "np.dtype[Any]"] = {
    "<u4": np.dtype("<u4"),
    "<f4": np.dtype("<f4"),
    "<f8": np.dtype("<f8"),
    "<i8": np.dtype("<i8"),
}


def detect_npz(candidate: Candidate) -> bool:
    """Whether it is a zip with the arrays ``tensor``, ``opt_state`` and ``step``."""
    if not candidate.is_zip or "opt_state.npy" not in candidate.members:
        return False
    return npy.TENSOR in candidate.members and "step.npy" in candidate.members


@contextmanager
def opened_npz(candidate: Candidate) -> Iterator[Source]:
    """The tensor and the numbers of the training's progress. Raises a FormatError."""
    meta: Dict[str, Any] = {}
    for name in _NUMBERS:
        info = candidate.members.get(f"{name}.npy")
        if info is not None and info.file_size <= 512:
            member = Member(candidate.file, info, f"{name}.npy")
            value = _scalar(member.read(512))
            if value is not None:
                meta[name] = value
    info = candidate.members[npy.TENSOR]
    tensor = Member(candidate.file, info, npy.TENSOR)
    yield npy.source(tensor.read, info.file_size, npy.TENSOR, meta, tensor.finish, info.CRC)


def detect_torch(candidate: Candidate) -> bool:
    """Whether it is a zip of torch's with a dictionary of ``tensor``, ``opt_state`` and ``step``."""
    if not candidate.is_zip or not torch_file.is_zip(candidate.members):
        return False
    value = torch_file.of(candidate).value
    return isinstance(value, dict) and all(name in value for name in ("tensor", "opt_state", "step"))


@contextmanager
def opened_torch(candidate: Candidate) -> Iterator[Source]:
    """The tensor and the numbers of the training's progress. Raises a FormatError."""
    value = torch_file.of(candidate).value
    tensor = value["tensor"]
    if not isinstance(tensor, Tensor):
        raise WrongRank("a tensor that is none", "a tensor of torch's")
    meta = {name: value[name] for name in _NUMBERS if isinstance(value.get(name), (int, float))}
    finite = {name: number for name, number in meta.items() if abs(number) < float("inf")}
    yield torch_file.source(torch_file.of(candidate), tensor, "tensor", finite)


def _scalar(data: bytes) -> Any:
    """The number that a small ``.npy`` holds; None where it is not of the kinds that trainers write."""
    try:
        descr, shape, start = npy.small_header(data)
    except FormatError:
        return None
    stored = _SCALARS.get(descr)
    if stored is None or shape != () or len(data) - start != stored.itemsize:
        return None
    value = np.frombuffer(data[start:], stored)[0].item()
    return value if abs(value) < float("inf") else None
