"""Facts of a model: name, width, context, base type, size and fingerprint, however much of the model is there."""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Union

from ..errors import ModelError, NoEmbedding
from ..gguf.reading import is_gguf, read
from .claims import base_of, size_of
from .fingerprints import describe, sampled_ids
from .gguf_model import fields_of_facts, matrix_in_gguf
from .matrix import Matrix, embedding_of, matrix_in, matrix_of, positive

_LOG = logging.getLogger(__name__)

_MAX_CONFIG = 2**22
"""Bytes of a ``config.json``; that of a classifier of many thousand labels has some hundred thousand."""
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
    base: Optional[str] = None
    """Its base type ("GPT-J"), where its configuration is of one that we know by name."""
    size: Optional[float] = None
    """About how many parameters it has."""


def facts(model: Any, name: Optional[str] = None) -> ModelFacts:
    """The facts of ``model``: a torch model, a configuration, a folder, a GGUF file, a ``config.json``, or facts.

    Of a folder ``config.json`` is read, and some rows of the embedding where its weights are safetensors files;
    of a ``config.json`` that alone, so that there is no fingerprint. Facts are returned as they are. Raises
    :class:`ModelError` for a GGUF file or ``config.json`` that is none, or :class:`FileNotFoundError`.
    """
    if isinstance(model, ModelFacts):
        return model
    if isinstance(model, (str, os.PathLike)):
        return _of_folder(Path(model), name)
    config = getattr(model, "config", model)
    known = name or str(_field(config, "_name_or_path") or type(model).__name__)
    known = Path(known).name if os.path.isabs(known) else known
    mark = _fingerprint_or_none(model) if hasattr(model, "get_input_embeddings") else None
    return _facts(known, width_of(model), config, mark)


def fingerprint(model: Union[Matrix, Any]) -> Dict[str, Any]:
    """The fingerprint of a model's input embedding, or of a matrix: below 1 kB as JSON; 512 rows are read.

    Raises :class:`NoEmbedding`.
    """
    matrix = model if isinstance(model, Matrix) else matrix_of(model)
    return describe(matrix.rows(sampled_ids(matrix.vocabulary)), matrix.vocabulary)


def matrix_in_folder(folder: Union[str, Path]) -> Matrix:
    """The embedding matrix of the model in ``folder``, or in a GGUF file; it is not loaded.

    Raises :class:`NoEmbedding`, :class:`ModelError`, :class:`MissingLibrary` or :class:`OSError`.
    """
    if is_gguf(folder):
        return matrix_in_gguf(read(folder))
    config = _read_config(Path(folder) / "config.json")
    return matrix_in(Path(folder), width_of(config), _first_field(config, ("vocab_size",)))


def width_of(model_or_config: Any) -> Optional[int]:
    """Columns of the input embedding: the module's own, or what a configuration says of it."""
    embedding = embedding_of(model_or_config)
    width = positive(getattr(embedding, "embedding_dim", None))
    if width is None and len(getattr(getattr(embedding, "weight", None), "shape", ())) == 2:
        width = positive(int(embedding.weight.shape[1]))
    return width or _first_field(getattr(model_or_config, "config", model_or_config), _WIDTH_FIELDS)


def context_of(model_or_config: Any) -> Optional[int]:
    """Tokens that the model can read at once, or None where its configuration names no limit."""
    return _first_field(getattr(model_or_config, "config", model_or_config), _CONTEXT_FIELDS)


def _of_folder(path: Path, name: Optional[str]) -> ModelFacts:
    if is_gguf(path):
        fields = fields_of_facts(read(path))
        return ModelFacts(**{**fields, "name": name or fields["name"]})
    alone = path.exists() and not path.is_dir()
    config = _read_config(path if alone else path / "config.json")
    mark = None
    if not alone:
        try:
            mark = fingerprint(matrix_in_folder(path))
        except (NoEmbedding, OSError, ValueError) as error:
            _LOG.info("no fingerprint of %s: %s", path, error)
    own_name = path.resolve().parent.name if alone else path.resolve().name
    return _facts(name or own_name, width_of(config), config, mark)


def _facts(name: str, width: Optional[int], config: Any, mark: Optional[Dict[str, Any]]) -> ModelFacts:
    kind = _field(config, "model_type")
    kind = kind if isinstance(kind, str) else None

    def number(*names: str) -> Optional[int]:
        return _first_field(config, names)

    experts = number("num_local_experts", "num_experts", "n_routed_experts") is not None
    untied = _field(config, "tie_word_embeddings") is False
    one_key = _field(config, "multi_query") is True and _field(config, "new_decoder_architecture") is not True
    size = size_of(number, kind, experts, untied, one_key)
    return ModelFacts(name, width, context_of(config), mark, base=base_of(kind), size=size)


def _fingerprint_or_none(model: Any) -> Optional[Dict[str, Any]]:
    try:
        return fingerprint(model)
    except Exception as error:  # any module may be an embedding; without one the verdict is "unproven"
        _LOG.info("no fingerprint of %s: %s", type(model).__name__, error)
        return None


def _first_field(config: Any, names: Sequence[str]) -> Optional[int]:
    """The first of the fields that is a positive number, in the configuration or in its text part."""
    for part in (config, _text_part(config)):
        for name in names:
            value = positive(_field(part, name))
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


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is no ordinary file; expected a model's configuration")
        with open(path, "rb") as file:
            data = file.read(_MAX_CONFIG + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_CONFIG:
        raise ModelError(f"{path} has more than {_MAX_CONFIG} bytes; expected a model's configuration")
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} does not parse ({error}); expected a model's configuration") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no object; expected a model's configuration")
    return config
