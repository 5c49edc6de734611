"""Rows that learn: a parameter that a frozen model reads as its first tokens."""

from contextlib import contextmanager
from typing import Any, Iterator, List, Optional

import numpy as np
import torch

from ..errors import NoEmbedding
from ..patching import patch


class TrainableRows(torch.nn.Module):
    """Rows ``[n_tokens, width]`` for ``model``, as one float32 parameter in units of the matrix's root mean square.

    In these units one learning rate suits all models. :attr:`rows` are in the matrix's own. Of ``rows``
    ``[count, n_tokens, width]`` all learn, and so do the weights, which sum to one, of their mean: a mixture.
    """

    def __init__(self, model: Any, rows: np.ndarray):
        super().__init__()
        embedding = model.get_input_embeddings()
        if embedding is None:
            raise NoEmbedding(f"{type(model).__name__} has no input embedding that takes token ids")
        self.unit = unit_of(embedding)
        device = embedding.weight.device if embedding.weight.device.type != "meta" else torch.device("cpu")
        self.parameter = torch.nn.Parameter(torch.tensor(rows / self.unit, dtype=torch.float32, device=device))
        self.logits = torch.nn.Parameter(torch.zeros(len(rows), device=device)) if rows.ndim == 3 else None

    @property
    def rows(self) -> np.ndarray:
        """float32 ``[n_tokens, width]``, a copy, in the scale of the embedding matrix."""
        return self.in_units() * np.float32(self.unit)

    def in_units(self) -> np.ndarray:
        """The same in units of the matrix's root mean square."""
        return np.array(self._mixed().detach().cpu().numpy())

    @property
    def weights(self) -> Optional[List[float]]:
        """Of a mixture's parts; None where it is none."""
        return None if self.logits is None else [float(each) for each in torch.softmax(self.logits.detach(), 0)]

    def _mixed(self) -> torch.Tensor:
        if self.logits is None:
            return self.parameter
        return torch.einsum("k,knd->nd", torch.softmax(self.logits, 0), self.parameter)

    @property
    def n_tokens(self) -> int:
        """How many there are."""
        return int(self.parameter.shape[-2])

    @contextmanager
    def read_by(self, model: Any, start: int) -> Iterator[int]:
        """Change ``model``'s input embedding, in place and for a while: columns from ``start`` on read as the rows.

        Yields the id that is to stand in those columns; it is past the vocabulary, so that whatever else a model
        looks up by id sees that it is no text.
        """
        embedding = model.get_input_embeddings()
        columns = slice(start, start + self.n_tokens)
        scale = getattr(embedding, "embed_scale", 1.0)

        def embed(original: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            text = torch.cat([ids[:, : columns.start], ids[:, columns.stop :]], dim=1)
            embedded = original(text, *args, **kwargs)
            rows = (self._mixed() * self.unit).to(embedded.dtype)
            rows = (rows * torch.as_tensor(scale, device=rows.device, dtype=rows.dtype)).to(embedded.device)
            rows = rows.expand(len(ids), -1, -1)
            return torch.cat([embedded[:, : columns.start], rows, embedded[:, columns.start :]], dim=1)

        hook = patch(embedding, "forward", embed)
        try:
            yield int(embedding.weight.shape[0])
        finally:
            hook.undo()


def unit_of(embedding: Any) -> float:
    """The root mean square of a sample of the matrix's values; at most 1,024 rows are read."""
    count = int(getattr(embedding, "num_embeddings", embedding.weight.shape[0]))
    unit = float(np.sqrt(np.mean(np.square(matrix_rows(embedding, np.linspace(0, count - 1, min(count, 1024)))))))
    return unit if unit > 0 else 1.0


def matrix_rows(embedding: Any, ids: Any) -> np.ndarray:
    """float32 ``[len(ids), width]``: rows of the matrix, before what the module multiplies them by."""
    weight = embedding.weight
    index = torch.as_tensor(np.asarray(ids).astype(np.int64))
    with torch.no_grad():
        if weight.device.type != "meta" and weight.is_floating_point() and weight.dim() == 2:
            rows = weight.detach()[index.to(weight.device)].float()
        else:  # offloaded or packed
            rows = embedding(index.to(weight.device if weight.device.type != "meta" else "cpu")).float()
            rows = rows / torch.as_tensor(getattr(embedding, "embed_scale", 1.0)).float().to(rows.device)
        return np.asarray(rows.cpu().numpy())
