"""The hook on a model's input embedding, which gives soft tokens their rows."""

import weakref
from typing import Any, Callable, Optional, Tuple

import torch

from ..errors import NoEmbedding, UnsupportedCall
from ..patching import patch
from .rows import Rows


class EmbeddingHook:
    """Changes the input embedding of ``model``, in place, so that soft tokens read as their rows, until ``undo``.

    ``rows_now`` says whose rows the forward pass that is beginning reads; None: it has no soft tokens.
    """

    def __init__(self, model: Any, rows_now: Callable[[], Optional[Rows]]):
        embedding = embedding_of(model)
        self._model = weakref.ref(model)
        self._embedding = weakref.ref(embedding)
        self.vocabulary, self.width = self._size = _size_of(embedding)
        self._rows_now = rows_now
        self.patches = [patch(embedding, "forward", self._embed)]

    def undo(self) -> None:
        """Put back what was there."""
        for each in reversed(self.patches):
            each.undo()

    @property
    def embedding(self) -> Any:
        """The module that is hooked, or None where it is gone."""
        return self._embedding()

    def checked(self) -> Any:
        """The module that is hooked; raises :class:`UnsupportedCall` where the model has another by now."""
        model, embedding = self._model(), self._embedding()
        if model is None:
            raise UnsupportedCall("the model that this handle belonged to no longer exists")
        if embedding is None or embedding_of(model) is not embedding or _size_of(embedding) != self._size:
            raise UnsupportedCall(
                "the model's input embedding was replaced or resized after attach(); detach() and attach() it again"
            )
        return embedding

    def _embed(self, original: Callable[..., torch.Tensor], input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = self._rows_now()
        if rows is None:
            return original(input, *args, **kwargs)
        is_soft = input >= self.vocabulary
        embedded = original(input.masked_fill(is_soft, 0), *args, **kwargs)
        copy = rows.copy_on(embedded.device, embedded.dtype)
        row = (input - (rows.first - 1)).clamp(0, rows.n_tokens + 1)
        return torch.where(is_soft.unsqueeze(-1), copy[row.long()], embedded)


def has_encoder(model: Any) -> bool:
    """Whether the model reads its text with an encoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def embedding_of(model: Any) -> Any:
    """The module that embeds the ids of the text; an encoder's where there is one. Raises :class:`NoEmbedding`."""
    reader = model.get_encoder() if has_encoder(model) else model
    try:
        embedding = reader.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = getattr(reader, "embed_tokens", None)  # encoders of releases before 4.30
    if embedding is None or getattr(embedding, "weight", None) is None:
        raise NoEmbedding(f"{type(model).__name__} has no input embedding that takes token ids")
    return embedding


def _size_of(embedding: Any) -> Tuple[int, int]:
    """Rows and columns of the embedding; a weight on another device, or quantised, need not be looked at."""
    shape = embedding.weight.shape
    return (
        int(getattr(embedding, "num_embeddings", shape[0])),
        int(getattr(embedding, "embedding_dim", shape[1])),
    )
