"""Where a training stands, in one file without pickle: arrays in an ``.npz``, everything else in its JSON."""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
import torch

from ..errors import CheckpointMismatch
from ..formats.writing import replacing

FILENAME = "checkpoint.npz"
FORMAT = 2
"""Of what a step reads and does, where no setting says it: 1 until 0.4.0, when every epoch was cut alike."""


class Checkpoint(NamedTuple):
    """After a step; the same checkpoint continues to the same rows."""

    about: Dict[str, Any]
    """What the training is of: settings, digest of the data, fingerprint of the model."""
    step: int
    parameters: List[np.ndarray]
    """All that learn."""
    best: np.ndarray
    best_loss: Optional[float]
    looks_since_best: int
    history: List[Dict[str, float]]
    optimizer: List[Dict[str, Any]]
    """For each parameter: arrays and numbers by name."""
    batch_tokens: int
    """Of the batches until now."""


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``checkpoint`` to ``folder``, in one step."""
    arrays = {"best": checkpoint.best}
    arrays.update({f"parameter.{number}": array for number, array in enumerate(checkpoint.parameters)})
    numbers: List[Dict[str, Any]] = []
    for number, state in enumerate(checkpoint.optimizer):
        numbers.append({name: value for name, value in state.items() if not isinstance(value, torch.Tensor)})
        for name in set(state) - set(numbers[-1]):
            arrays[f"optimizer.{number}.{name}"] = state[name].detach().cpu().numpy()
    rest = checkpoint._asdict()
    about = {key: rest[key] for key in ("about", "step", "best_loss", "looks_since_best", "history", "batch_tokens")}
    text = json.dumps({**about, "optimizer": numbers})
    arrays["json"] = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    with replacing(str(folder / FILENAME)) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load(folder: Path, about: Dict[str, Any]) -> Optional[Checkpoint]:
    """The checkpoint in ``folder``, or None where there is none.

    Raises :class:`CheckpointMismatch` where it is of another training than ``about`` describes, or is no checkpoint.
    """
    path = folder / FILENAME
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        rest = json.loads(arrays.pop("json").tobytes().decode("utf-8"))
        optimizer = rest.pop("optimizer")
        for number, state in enumerate(optimizer):
            prefix = f"optimizer.{number}."
            names = [name for name in arrays if name.startswith(prefix)]
            state.update({name[len(prefix) :]: torch.from_numpy(arrays.pop(name)) for name in names})
        parameters = [arrays.pop(f"parameter.{number}") for number in range(len(optimizer))]
        checkpoint = Checkpoint(**rest, **arrays, parameters=parameters, optimizer=optimizer)
    except Exception as error:  # whatever a damaged file makes of NumPy, zipfile and JSON
        raise CheckpointMismatch(f"{path} is damaged ({error}). Move it away to train from the beginning.") from error
    if checkpoint.about.get("format", 1) != about.get("format", 1):
        raise CheckpointMismatch(
            f"{path} is of a training that another version of kobold_sp_plugin began, and this one goes other steps. "
            "Give the training another name, or move the file away to train from the beginning."
        )
    differing = sorted(key for key in {*about, *checkpoint.about} if about.get(key) != checkpoint.about.get(key))
    if differing:
        raise CheckpointMismatch(
            f"{path} is of another training: {'; '.join(_told(key, checkpoint.about, about) for key in differing)}. "
            "Give back what it was trained with, or move it away to train from the beginning."
        )
    return checkpoint


def _told(key: str, was: Dict[str, Any], now: Dict[str, Any]) -> str:
    """How one thing differs, in words; digests and fingerprints by their name only."""
    if key in ("data", "model", "initial rows"):
        return f"the {key} differ" + ("" if key in ("data", "initial rows") else "s")
    return f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
