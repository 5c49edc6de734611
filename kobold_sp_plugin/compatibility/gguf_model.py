"""The facts and the embedding matrix of a GGUF file, which is not loaded."""

import logging
import math
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np

from ..errors import MissingLibrary, ModelError
from ..gguf.families import embedding_scale
from ..gguf.reading import ModelFile
from .claims import base_of, claims
from .fingerprints import describe, sampled_ids
from .matrix import Matrix

_LOG = logging.getLogger(__name__)

_MODEL_TYPES = {"gptneox": "gpt_neox", "phi2": "phi"}
"""GGUF's names of families that transformers calls otherwise."""
_AMBIGUOUS = ("llama",)
"""Families whose name says too little: Mistral's models are Llama's to GGUF."""


def fields_of_facts(model: ModelFile) -> Dict[str, Any]:
    """What a soft prompt is judged against: the fields of ``ModelFacts`` by name.

    Raises a :class:`ModelError` for a file without an embedding, or :class:`MissingLibrary`.
    """
    embedding = model.embedding
    titles = [title for title in (model.text("general.name"), model.text("general.basename")) if title]
    base = base_of(_MODEL_TYPES.get(model.architecture, model.architecture))
    if model.architecture in _AMBIGUOUS:
        base = next((each.base for each in claims([*titles, Path(model.path).stem]) if each.base), None)
    whole = model.n_parts == 1 and not model.of_architecture("expert_count")
    size = float(sum(math.prod(tensor.shape) for tensor in model.tensors.values())) if whole else None
    return {
        "name": Path(model.path).stem,
        "width": int(embedding.shape[0]),
        "context": model.of_architecture("context_length"),
        "fingerprint": _fingerprint_or_none(model),
        "base": base,
        "size": size,
    }


def matrix_in_gguf(model: ModelFile) -> Matrix:
    """The embedding matrix, unpacked row by row.

    Raises a :class:`ModelError`, or :class:`MissingLibrary` for a quantised one without the ``gguf`` library.
    """
    tensor = model.embedding

    def rows(ids: np.ndarray) -> np.ndarray:
        return model.rows(tensor, ids)

    rows(np.zeros(1, dtype=np.int64))  # so that a type that cannot be read shows now
    return Matrix(int(tensor.shape[1]), int(tensor.shape[0]), rows, embedding_scale(model))


def _fingerprint_or_none(model: ModelFile) -> Optional[Dict[str, Any]]:
    try:
        matrix = matrix_in_gguf(model)
        return describe(matrix.rows(sampled_ids(matrix.vocabulary)), matrix.vocabulary)
    except (MissingLibrary, ModelError, OSError) as error:
        _LOG.info("no fingerprint of %s: %s", model.path, error)
        return None
