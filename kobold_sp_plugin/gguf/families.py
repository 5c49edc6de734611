"""What llama.cpp does with the embeddings of each family. Source: ``src/models/*.cpp`` of llama.cpp 0.5.0."""

import math

from .reading import ModelFile

_SCALED = ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma-embedding", "afmoe")
"""Families that multiply what they read from the embedding matrix by the square root of its width."""
_ALSO_ROWS = ("gemma", "gemma2", "afmoe")
"""Those of them that do so with rows that are handed over, too; the others with tokens only."""
_MAY_UNTIE = (
    "llama", "mistral3", "qwen2", "qwen3", "phi3", "granite", "falcon", "gpt2", "mpt", "bloom", "gemma3", "smollm3",
    "starcoder2", "olmo", "exaone", "glm4",
)  # fmt: skip
"""Families whose output head is optional: a tied model becomes an untied one by writing it down."""
_BY_LAYER = ("gemma3n", "gemma4")
"""Families that look tokens up in each layer, where rows that are handed over have what the padding token has."""


def embedding_scale(model: ModelFile) -> float:
    """What the model multiplies rows of its embedding matrix by before its first layer reads them."""
    return math.sqrt(model.embedding.shape[0]) if model.architecture in _SCALED else 1.0


def scale_of_rows(model: ModelFile) -> float:
    """What rows as they stand in the matrix are to be multiplied by before they are handed over as embeddings."""
    return 1.0 if model.architecture in _ALSO_ROWS else embedding_scale(model)


def may_untie(model: ModelFile) -> bool:
    """Whether llama.cpp takes an output head from the file for this family, though this file has none."""
    return model.architecture in _MAY_UNTIE


def looks_up_by_layer(model: ModelFile) -> bool:
    """Whether each layer reads token ids, too."""
    return model.architecture in _BY_LAYER
