"""What the rows are before they learn."""

from typing import Any, Sequence, Union

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
    if settings.initial == "vocabulary":
        # The first ids are the most frequent of most vocabularies; rare rows hardly left their initialisation.
        ids = rng.choice(min(5000, len(tokenizer)), settings.n_tokens)
    elif settings.initial == "words" or settings.initial_text.strip():
        ids = tokenizer(settings.initial_text, add_special_tokens=False)["input_ids"]
    else:
        pieces = [piece for piece in range(len(dataset)) if dataset.length(piece) > settings.n_tokens]
        piece = int(rng.choice(pieces or range(len(dataset))))
        ids = dataset.batch([piece]).ids[0, len(dataset.prefix) :]
    return matrix_rows(embedding, np.resize(np.asarray(ids), settings.n_tokens))


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
