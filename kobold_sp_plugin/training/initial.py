"""What the rows are before they learn."""

import re
from typing import Any, List, Sequence, Union

import numpy as np

from ..compatibility.matrix import matrix_of, rows_as_in_matrix
from ..errors import UnknownScale, WidthMismatch
from ..softprompt import SoftPrompt
from .dataset import Dataset
from .settings import Settings
from .trainable import matrix_rows


def initial_rows(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    dataset: Dataset,
    start_from: Union[SoftPrompt, Sequence[SoftPrompt], None] = None,
) -> np.ndarray:
    """float32 ``[settings.n_tokens, width]``, in the scale of the embedding matrix; of several one more dimension.

    ``start_from`` wins over ``settings.initial``; it may have fewer or more rows. Raises :class:`WidthMismatch`.
    """
    embedding = model.get_input_embeddings()
    rng = np.random.default_rng(settings.seed)
    if start_from is not None:
        if isinstance(start_from, SoftPrompt):
            return rows_of(start_from, model, settings.n_tokens)
        several = [rows_of(each, model, settings.n_tokens) for each in start_from]
        return np.stack(several) if len(several) > 1 else several[0]
    if settings.initial == "words":
        return _of_words(words_of(settings.initial_text)[: settings.n_tokens], tokenizer, embedding, settings, rng)
    if settings.initial == "vocabulary":
        ids = _sampled(rng, tokenizer, settings.n_tokens)
    elif settings.initial_text.strip():
        ids = tokenizer(settings.initial_text, add_special_tokens=False)["input_ids"]
    else:
        pieces = [piece for piece in range(len(dataset)) if dataset.length(piece) > settings.n_tokens]
        piece = int(rng.choice(pieces or range(len(dataset))))
        ids = dataset.batch([piece]).ids[0, len(dataset.prefix) :]
    return matrix_rows(embedding, np.resize(np.asarray(ids), settings.n_tokens))


def words_of(text: str) -> List[str]:
    """The words that rows begin as: what commas and line ends part, or, where there are none, white space."""
    parts = re.split(r"[,\r\n]", text.strip())
    return [word.strip() for word in (parts if len(parts) > 1 else text.split()) if word.strip()]


def _of_words(
    words: Sequence[str], tokenizer: Any, embedding: Any, settings: Settings, rng: np.random.Generator
) -> np.ndarray:
    """A row for each word, the mean of its tokens; the rows that are left are sampled from the vocabulary."""
    rows = []
    for word in words:
        # As it is within a text, where most vocabularies have a word with the space before it.
        found = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in (f" {word}", word)]
        ids = min(filter(None, found), key=len, default=None)
        if ids is not None:  # a tokenizer may leave out what it does not know
            rows.append(matrix_rows(embedding, ids).mean(axis=0))
    rows += list(matrix_rows(embedding, _sampled(rng, tokenizer, settings.n_tokens - len(rows))))
    return np.stack(rows)


def _sampled(rng: np.random.Generator, tokenizer: Any, count: int) -> np.ndarray:
    # The first ids are the most frequent of most vocabularies; rare rows hardly left their initialisation.
    return rng.choice(min(5000, len(tokenizer)), count)


def rows_of(softprompt: SoftPrompt, model: Any, n_tokens: int) -> np.ndarray:
    """float32 ``[n_tokens, width]``, in the scale of the embedding matrix: its rows, again or only some where need be.

    Raises :class:`WidthMismatch` or :class:`UnknownScale`.
    """
    matrix = matrix_of(model)
    if softprompt.width != matrix.width:
        raise WidthMismatch(
            f"the soft prompt to start from has {softprompt.width} columns, this model has {matrix.width}"
        )
    rows = rows_as_in_matrix(softprompt, matrix)
    if rows is None:
        raise UnknownScale("rows as they leave the embedding module", "rows as stored in the matrix")
    return np.resize(rows, (n_tokens, matrix.width)).astype(np.float32)
