"""The embedding matrix of a model, of which some rows can be asked for, and what lies near a soft prompt's rows."""

from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from ..errors import NoEmbedding
from ..softprompt import Scale, SoftPrompt
from . import checkpoint
from .fingerprints import sampled_ids

_CHUNK_VALUES = 2**22
"""Values of the matrix that are looked at at a time: 16 MB."""
_COMMON = 4096
"""Tokens that are looked at where not all need to be; those with the lowest ids are the commonest."""


class Matrix(NamedTuple):
    """An embedding matrix ``[vocabulary, width]``, by its rows."""

    vocabulary: int
    width: int
    rows: Callable[[np.ndarray], np.ndarray]
    """Rows of these ids (int64): float32 ``[len(ids), width]``, as they are stored in the matrix."""
    scale: Optional[float] = 1.0
    """What the module multiplies its rows by; None where that is not known."""

    def chunks(self, most: Optional[int] = None) -> Iterator[Tuple[int, np.ndarray]]:
        """The matrix, or its first ``most`` rows, in pieces of at most 16 MB, each with the id of its first row."""
        end = min(self.vocabulary, most or self.vocabulary)
        step = max(1, _CHUNK_VALUES // self.width)
        for start in range(0, end, step):
            yield start, self.rows(np.arange(start, min(start + step, end)))

    def lengths(self) -> np.ndarray:
        """Euclidean lengths of the commonest tokens' rows, those of the 4,096 lowest ids."""
        return np.concatenate([lengths_of(part) for _, part in self.chunks(_COMMON)])


class Evidence(NamedTuple):
    """What the rows of a soft prompt look like beside a matrix; a hint at most, and no proof."""

    length: float
    """Median length of the rows, of the median length of the matrix's."""
    nearness: float
    """Mean over the rows of the cosine with the nearest of 4,096 tokens; what all tokens share is taken away."""
    chance: float
    """The same for random rows of the same lengths: as near as rows come that have nothing to do with it."""

    @property
    def sentence(self) -> str:
        """For a user."""
        if self.length == 0:
            return "a hint against it, no proof: its rows are all zeros"
        if not 1 / 30 < self.length < 30:
            times = f"{self.length:.0f} times longer" if self.length > 1 else f"{1 / self.length:.0f} times shorter"
            return f"a hint against it, no proof: its rows are {times} than this model's tokens"
        if self.nearness > 1.2 * self.chance:
            return "a hint for it, no proof: its rows lie nearer to this model's tokens than chance would have them"
        return "no hint: its rows lie no nearer to this model's tokens than chance would have them"


def matrix_of(model: Any) -> Matrix:
    """The embedding matrix of a loaded model. Rows are taken from the weight where it is there, and by calling
    the module where it is not (offloaded or packed weights). Raises :class:`NoEmbedding`.
    """
    embedding = embedding_of(model)
    shape = tuple(getattr(getattr(embedding, "weight", None), "shape", ()))
    shape = shape if len(shape) == 2 else (None, None)
    vocabulary = positive(getattr(embedding, "num_embeddings", None)) or positive(shape[0])
    width = positive(getattr(embedding, "embedding_dim", None)) or positive(shape[1])
    if embedding is None or vocabulary is None or width is None:
        raise NoEmbedding(f"{type(model).__name__} has no input embedding with rows to look at")
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    factor = float(scale) if getattr(getattr(scale, "device", None), "type", "") != "meta" else None

    def rows(ids: np.ndarray) -> np.ndarray:
        return _rows_of_module(embedding, ids, width, factor or 1.0)

    return Matrix(vocabulary, width, rows, factor)


def matrix_in(folder: Path, width: Optional[int], vocabulary: Optional[int] = None) -> Matrix:
    """The embedding matrix of a checkpoint in ``folder``, read row by row from its safetensors files.

    Raises :class:`NoEmbedding` or :class:`OSError`.
    """
    tensor = checkpoint.embedding(folder, width, vocabulary)
    return Matrix(tensor.shape[0], tensor.shape[1], tensor.rows, None)


def nearest(rows: np.ndarray, matrix: Matrix, count: int = 3) -> List[List[Tuple[int, float]]]:
    """For each of ``rows`` (float32 ``[n_tokens, width]``, as in the matrix), the ``count`` nearest tokens.

    Tokens are (id, cosine), the nearest first; the mean of the matrix is taken from both sides, since in most
    models all rows lie in one direction. The matrix is read in pieces of 16 MB.
    """
    mean = matrix.rows(sampled_ids(matrix.vocabulary)).mean(axis=0)
    units = _unit(rows - mean)
    best_ids = np.zeros((len(rows), 0), dtype=np.int64)
    best = np.zeros((len(rows), 0), dtype=np.float32)
    for start, part in matrix.chunks():
        cosines = units @ _unit(part - mean).T
        ids = np.broadcast_to(np.arange(start, start + len(part)), cosines.shape)
        best, best_ids = np.concatenate([best, cosines], 1), np.concatenate([best_ids, ids], 1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :count]
        best, best_ids = np.take_along_axis(best, order, 1), np.take_along_axis(best_ids, order, 1)
    return [[(int(i), float(c)) for i, c in zip(*each)] for each in zip(best_ids, best)]


def evidence(softprompt: SoftPrompt, matrix: Matrix) -> Optional[Evidence]:
    """What the rows say without a fingerprint; None where their scale cannot be brought to the matrix's."""
    rows = rows_as_in_matrix(softprompt, matrix)
    if rows is None:
        return None
    usual = float(np.median(matrix.lengths()))
    lengths = lengths_of(rows)
    length = float(np.median(lengths)) / (usual or 1.0)
    mean = matrix.rows(sampled_ids(matrix.vocabulary)).mean(axis=0)
    noise = np.random.RandomState(0).normal(size=rows.shape).astype(np.float32)
    noise = _unit(noise) * lengths[:, None]
    both = _unit(np.concatenate([rows, noise]) - mean)
    best = np.full(len(both), -1.0)
    for _, part in matrix.chunks(_COMMON):
        best = np.maximum(best, (both @ _unit(part - mean).T).max(axis=1))
    near, chance = best[: len(rows)].mean(), best[len(rows) :].mean()
    return Evidence(length, float(near), float(chance))


def rows_as_in_matrix(softprompt: SoftPrompt, matrix: Matrix) -> Optional[np.ndarray]:
    """The rows in the scale of the matrix; None where the module's scale is not known and would be needed."""
    if softprompt.scale is Scale.MATRIX or matrix.scale == 1:
        return softprompt.rows
    return softprompt.rows / np.float32(matrix.scale) if matrix.scale else None


def lengths_of(rows: np.ndarray) -> np.ndarray:
    """Euclidean lengths of ``rows`` (float32 ``[n, width]``), float64: the squares of large values pass float32."""
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)))


def embedding_of(model: Any) -> Any:
    """The input embedding of a model, or None: a configuration, or a model that has none."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def positive(value: Any) -> Optional[int]:
    """``value`` if it is a positive whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _rows_of_module(embedding: Any, ids: np.ndarray, width: int, scale: float) -> np.ndarray:
    import torch

    weight = embedding.weight
    index = torch.as_tensor(np.array(ids, dtype=np.int64))
    with torch.no_grad():
        if weight.device.type != "meta" and weight.is_floating_point() and weight.shape[1:] == (width,):
            rows = weight.detach()[index.to(weight.device)]
        else:
            device = index.device if weight.device.type == "meta" else weight.device
            rows = embedding(index.to(device)) / scale
        return np.asarray(rows.to(device="cpu", dtype=torch.float32).numpy())


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = lengths_of(rows)[:, None]
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), dtype=np.float32)
