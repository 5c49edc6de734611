"""Does this soft prompt go with this model: facts of a model, its fingerprint, and the verdict.

A fingerprint tells one embedding matrix from another without keeping any of it. Version 1 is made so:

1. Of the token ids below ``vocabulary`` (the rows of the matrix), take the 64 with the smallest
   ``id * 2654435761 mod 2**32``: a matrix with some rows added keeps nearly all of them.
2. Scale each of their rows to length 1 and subtract the mean of them all: what rows share proves nothing.
3. Flip the signs of each row's columns by the bits of SHAKE-256 of "row <id>", and project it onto the 32
   directions of +1 and -1 that the bits of SHAKE-256 of "directions" give. Keep the 32 signs.

Two matrices agree in the share ``1 - angle / pi`` of the signs: unrelated ones in a half, whatever the
architecture; one and its copy in another precision in nearly all.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

from .errors import ModelError, NoEmbedding
from .softprompt import own_metadata

_LOG = logging.getLogger(__name__)

FINGERPRINT_VERSION = 1
SAME = 0.98
"""Share of agreeing signs from which it is the same matrix, in whatever precision (8 bits: above 0.99)."""
RELATED = 0.70
"""Share from which it is a fine-tune or a coarsely quantised copy; unrelated ones stay below 0.55."""

_SAMPLED_ROWS = 64
_SIGNS = 32
_FEWEST_SHARED_ROWS = 8

_WIDTH_FIELDS = (
    "word_embed_proj_dim",
    "embedding_size",
    "hidden_size",
    "d_model",
    "model_dim",
    "n_embed",
    "n_embd",
)
_CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "context_length",
)


class Verdict(str, Enum):
    """Whether a soft prompt can be used with a model; its text is what a menu shows."""

    COMPATIBLE = "compatible"
    UNPROVEN = "unproven"
    """Same width, but nothing tells which model it was made for."""
    DIFFERENT = "different embedding matrix"
    """Same width, and its fingerprint says another model: a warning."""
    INCOMPATIBLE = "incompatible"
    UNREADABLE = "unreadable"
    NO_MODEL = "no model"
    NOT_WITH_BACKEND = "not with this backend"

    def __str__(self) -> str:
        return self.value

    @property
    def usable(self) -> bool:
        """Whether it may be selected."""
        return self in (Verdict.COMPATIBLE, Verdict.UNPROVEN, Verdict.DIFFERENT)


class Described(Protocol):
    """What is judged: a soft prompt, or what its file says of it."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def supported(self) -> Sequence[str]: ...


class Judgement(NamedTuple):
    """A verdict and the sentence that explains it to a user."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class ModelFacts:
    """What has to be known of a model to judge a soft prompt for it."""

    name: str
    width: Optional[int] = None
    """Columns of its input embedding."""
    context: Optional[int] = None
    """Tokens that it can read at once; None where there is no limit or none is known."""
    fingerprint: Optional[Dict[str, Any]] = field(default=None, hash=False, repr=False)
    refusal: Optional[str] = None
    """Why its backend takes no soft prompts, where that is so."""


def facts(model: Any, name: Optional[str] = None) -> ModelFacts:
    """The facts of ``model``: a torch model, a configuration, a folder with ``config.json``, or facts.

    Of a folder only ``config.json`` is read, so that there is no fingerprint. Facts are returned as they are.
    Raises :class:`ModelError` for a ``config.json`` that is none, or :class:`OSError`.
    """
    if isinstance(model, ModelFacts):
        return model
    if isinstance(model, (str, os.PathLike)):
        config = _read_config(Path(model))
        return ModelFacts(name or Path(model).name, width_of(config), context_of(config))
    config = getattr(model, "config", model)
    known = name or str(_field(config, "_name_or_path") or type(model).__name__)
    return ModelFacts(
        name=Path(known).name if os.path.isabs(known) else known,
        width=width_of(model),
        context=context_of(config),
        fingerprint=_fingerprint_or_none(model) if hasattr(model, "get_input_embeddings") else None,
    )


def width_of(model_or_config: Any) -> Optional[int]:
    """Columns of the input embedding: the module's own, or what a configuration says of it."""
    embedding = _embedding_of(model_or_config)
    width = _positive(getattr(embedding, "embedding_dim", None))
    if width is None and len(getattr(getattr(embedding, "weight", None), "shape", ())) == 2:
        width = _positive(int(embedding.weight.shape[1]))
    return width or _first_field(getattr(model_or_config, "config", model_or_config), _WIDTH_FIELDS)


def context_of(model_or_config: Any) -> Optional[int]:
    """Tokens that the model can read at once, or None where its configuration names no limit."""
    return _first_field(getattr(model_or_config, "config", model_or_config), _CONTEXT_FIELDS)


def judge(softprompt: Described, facts: Optional[ModelFacts]) -> Judgement:
    """Whether ``softprompt`` goes with the model that ``facts`` describe; None where no model is loaded."""
    if facts is None:
        return Judgement(Verdict.NO_MODEL, "no model is loaded")
    if facts.refusal is not None:
        return Judgement(Verdict.NOT_WITH_BACKEND, facts.refusal)
    if facts.width is not None and softprompt.width != facts.width:
        reason = f"made for {softprompt.width} columns, this model has {facts.width}"
        return Judgement(Verdict.INCOMPATIBLE, reason)
    if facts.context is not None and softprompt.n_tokens >= facts.context:
        reason = f"uses {softprompt.n_tokens} tokens of a context of {facts.context}: no room for text"
        return Judgement(Verdict.INCOMPATIBLE, reason)
    if facts.width is None:
        return Judgement(Verdict.UNPROVEN, "this model does not tell its width: try whether it works")
    agreement = _agreement(own_metadata(softprompt.metadata).get("fingerprint"), facts.fingerprint)
    if agreement is None:
        return Judgement(Verdict.UNPROVEN, _unproven(softprompt.supported))
    if agreement >= SAME:
        return Judgement(Verdict.COMPATIBLE, "made for this model: its fingerprint matches")
    if agreement >= RELATED:
        reason = "this model looks like a fine-tune, or a quantised copy, of the one it was made for"
        return Judgement(Verdict.COMPATIBLE, reason)
    reason = "same width, but its fingerprint says that it was made for another model: expect garbled text"
    return Judgement(Verdict.DIFFERENT, reason)


def fingerprint(model: Any) -> Dict[str, Any]:
    """The fingerprint of ``model``'s input embedding, below 1 kB as JSON; 64 rows of the matrix are read.

    Rows are taken from the weight where it is there, and by calling the module where it is not (offloaded
    or packed weights). Raises :class:`NoEmbedding`.
    """
    embedding = _embedding_of(model)
    width = width_of(model)
    vocabulary = _positive(getattr(embedding, "num_embeddings", None))
    if vocabulary is None and len(getattr(getattr(embedding, "weight", None), "shape", ())) == 2:
        vocabulary = int(embedding.weight.shape[0])
    if embedding is None or not width or not vocabulary:
        raise NoEmbedding(f"{type(model).__name__} has no input embedding with rows to take a fingerprint of")
    ids = _sampled_ids(vocabulary)
    signs = _signs(ids, _rows(embedding, ids, width))
    return {
        "version": FINGERPRINT_VERSION,
        "vocabulary": vocabulary,
        "width": width,
        "ids": base64.b64encode(ids.astype("<u4").tobytes()).decode("ascii"),
        "signs": base64.b64encode(np.packbits(signs, axis=1).tobytes()).decode("ascii"),
    }


def _unproven(supported: Sequence[str]) -> str:
    claim = ", ".join(supported)[:200]
    if not claim:
        return "same width; nothing tells which model it was made for"
    return f"same width; it says that it was made for {claim}, but carries no proof"


def _agreement(made_for: Any, model: Any) -> Optional[float]:
    """The share of signs in which two fingerprints agree, or None where they cannot be compared."""
    ours, theirs = _decoded(made_for), _decoded(model)
    if ours is None or theirs is None or ours[0] != theirs[0]:
        return None
    _, our_ids, our_signs = ours
    _, their_ids, their_signs = theirs
    _, in_ours, in_theirs = np.intersect1d(our_ids, their_ids, assume_unique=True, return_indices=True)
    if len(in_ours) < min(_FEWEST_SHARED_ROWS, len(our_ids), len(their_ids)):
        return None
    return float(np.mean(our_signs[in_ours] == their_signs[in_theirs]))


def _decoded(fingerprint: Any) -> Optional[Tuple[int, np.ndarray, np.ndarray]]:
    """Width, ids and signs ``[len(ids), 32]`` of a fingerprint of this version, else None."""
    if not isinstance(fingerprint, Mapping) or fingerprint.get("version") != FINGERPRINT_VERSION:
        return None
    width, ids, signs = (fingerprint.get(key) for key in ("width", "ids", "signs"))
    if _positive(width) is None or not isinstance(ids, str) or not isinstance(signs, str):
        return None
    return _decoded_texts(width, ids, signs)


@lru_cache(maxsize=64)
def _decoded_texts(width: int, ids: str, signs: str) -> Optional[Tuple[int, np.ndarray, np.ndarray]]:
    if len(ids) > 1000 or len(signs) > 1000:
        return None
    try:
        id_bytes, sign_bytes = base64.b64decode(ids, validate=True), base64.b64decode(signs, validate=True)
    except (binascii.Error, ValueError):
        return None
    if not id_bytes or len(id_bytes) % 4 or len(id_bytes) != len(sign_bytes):  # 32 bits each
        return None
    id_array = np.frombuffer(id_bytes, dtype="<u4")
    if len(np.unique(id_array)) != len(id_array):
        return None
    sign_array = np.unpackbits(np.frombuffer(sign_bytes, dtype=np.uint8).reshape(len(id_array), -1), axis=1)
    return width, id_array, sign_array


@lru_cache(maxsize=8)
def _sampled_ids(vocabulary: int) -> np.ndarray:
    """Step 1 of the module's docstring: uint32, in the order of the ids."""
    order = np.arange(vocabulary, dtype=np.uint32) * np.uint32(2654435761)
    return np.sort(np.argsort(order, kind="stable")[:_SAMPLED_ROWS]).astype(np.uint32)


def _signs(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Steps 2 and 3: bool ``[len(ids), 32]`` for float32 ``rows`` ``[len(ids), width]``."""
    width = rows.shape[1]
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(lengths > 0, lengths, 1)
    rows = rows - rows.mean(axis=0)
    flips = np.stack([_plus_minus_one(f"row {token_id}", width) for token_id in ids])
    directions = _plus_minus_one("directions", width * _SIGNS).reshape(_SIGNS, width)
    return np.asarray((rows * flips) @ directions.T >= 0)


def _plus_minus_one(seed: str, count: int) -> np.ndarray:
    seed = f"kobold_sp_plugin fingerprint {FINGERPRINT_VERSION}: {seed}"
    data = hashlib.shake_256(seed.encode("ascii")).digest(-(-count // 8))
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8))[:count].astype(np.float32) * 2 - 1


def _rows(embedding: Any, ids: np.ndarray, width: int) -> np.ndarray:
    """The rows ``ids`` of an embedding module: float32 ``[len(ids), width]``."""
    import torch

    weight = embedding.weight
    index = torch.as_tensor(ids.astype(np.int64))
    with torch.no_grad():
        if weight.device.type != "meta" and weight.is_floating_point() and weight.shape[1:] == (width,):
            rows = weight.detach()[index.to(weight.device)]
        else:
            device = index.device if weight.device.type == "meta" else weight.device
            rows = embedding(index.to(device))
        return np.asarray(rows.to(device="cpu", dtype=torch.float32).numpy())


def _fingerprint_or_none(model: Any) -> Optional[Dict[str, Any]]:
    try:
        return fingerprint(model)
    except Exception as error:  # any module may be an embedding; without one the verdict is "unproven"
        _LOG.info("no fingerprint of %s: %s", type(model).__name__, error)
        return None


def _embedding_of(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a configuration, or a model that has none
        return None


def _first_field(config: Any, names: Sequence[str]) -> Optional[int]:
    """The first of the fields that is a positive number, in the configuration or in its text part."""
    for part in (config, _text_part(config)):
        for name in names:
            value = _positive(_field(part, name))
            if value is not None:
                return value
    return None


def _text_part(config: Any) -> Any:
    """The text model's part of a configuration of several models, or None."""
    part = _field(config, "text_config")
    if part is None and hasattr(config, "get_text_config"):
        part = config.get_text_config()
    return part


def _field(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except (NotImplementedError, ValueError):  # how XLNet says that it has none, and others that it varies by layer
        return None


def _positive(value: Any) -> Optional[int]:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} does not parse ({error}); expected a model's configuration") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no object; expected a model's configuration")
    return config
