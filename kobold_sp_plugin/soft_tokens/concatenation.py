"""Rows concatenated with the embedded text: a soft prompt for those who train, or call a model, by themselves.

Soft tokens (``attach``) are rows added to the embedding matrix of a model that is otherwise a black box. Here the
matrix is left alone, and the rows are put before the embedded text: before the position embedding is added, as
for tokens, or, with :func:`outside_positions`, after it.
"""

import copy
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional

import torch

from ..errors import UnsupportedModel, WidthMismatch
from ..patching import patch
from .caches import MOVED
from .columns import grow_mask, insert_columns, start_of_text
from .embedding import embedding_of, has_encoder, reads_ids_elsewhere

NOT_COUNTED = -100
"""The label of a position that is not in the loss."""

POSITION_EMBEDDINGS = ("wpe", "embed_positions", "positions_embed")
"""What families call the learned position embedding that they add to their embedded tokens."""


def concatenated(
    model: Any,
    rows: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: Optional[torch.Tensor] = None,
    labels: Optional[torch.Tensor] = None,
) -> Dict[str, torch.Tensor]:
    """The arguments of a forward pass over ``rows`` and, behind them, a text; gradients flow back to ``rows``.

    ``rows`` is ``[n_tokens, width]`` as they leave the embedding module (the scale ``module``); the others are
    ``[batch, length]``. The dictionary has ``inputs_embeds`` ``[batch, n_tokens + length, width]``,
    ``attention_mask`` and, if given, ``labels``, in which rows are not counted; padding on the left stays on the left.
    Raises :class:`~kobold_sp_plugin.errors.WidthMismatch`, or :class:`~kobold_sp_plugin.errors.UnsupportedModel`
    for a model that has to see the ids themselves, or has an encoder.
    """
    embedding = embedding_of(model)
    if has_encoder(model) or reads_ids_elsewhere(model, embedding):
        raise UnsupportedModel(
            f"{type(model).__name__} needs more of its text than one embedding of its ids; use soft tokens: attach()"
        )
    n_tokens, width = rows.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    embedded = embedding(input_ids)
    if width != embedded.shape[-1]:
        raise WidthMismatch(f"the rows have {width} columns, this model has {embedded.shape[-1]}")
    batch, length = input_ids.shape
    start = start_of_text(mask)
    # Columns of the text, then those of the rows, in the order in which they are read.
    both = torch.cat([embedded, rows.to(embedded).expand(batch, -1, -1)], dim=1)
    columns = torch.arange(length + n_tokens, device=input_ids.device)
    order = insert_columns(columns[:length].expand(batch, -1), columns[length:], start)
    inputs = {
        "inputs_embeds": both.gather(1, order.unsqueeze(-1).expand(-1, -1, width)),
        "attention_mask": grow_mask(mask, n_tokens),
    }
    if labels is not None:
        inputs["labels"] = insert_columns(labels, labels.new_full((n_tokens,), NOT_COUNTED), start)
    return inputs


@contextmanager
def outside_positions(model: Any, n_tokens: int) -> Iterator[None]:
    """Change ``model``'s learned position embedding, in place and for a while: it begins behind ``n_tokens`` positions.

    What stands there, soft tokens or concatenated rows, gets no position embedding added, and the text is at the
    positions that it has without them. For every forward pass and ``generate`` inside the ``with`` block, of every
    thread. Raises :class:`~kobold_sp_plugin.errors.UnsupportedModel` for a model that adds none: rotary, relative and
    computed positions.
    """
    table = _position_embedding_of(model)
    first = int(getattr(table, "offset", 0))  # OPT's first rows are for padding

    def read(original: Any, *args: Any, **kwargs: Any) -> Any:
        weight = table.weight
        moved = copy.copy(table)
        nothing = weight.new_zeros(n_tokens, weight.shape[1])
        moved._parameters = {**table._parameters, "weight": torch.cat([weight[:first], nothing, weight[first:]])}
        return type(table).forward(moved, *args, **kwargs)

    change = patch(table, "forward", read)
    setattr(vars(table)["forward"], MOVED, True)
    try:
        yield
    finally:
        change.undo()


def _position_embedding_of(model: Any) -> torch.nn.Embedding:
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in POSITION_EMBEDDINGS and isinstance(module, torch.nn.Embedding)
    ]
    if len(found) != 1 or has_encoder(model):
        raise UnsupportedModel(
            f"{type(model).__name__} adds no learned position embedding to its embedded tokens; there is nothing for "
            "rows to stand outside of"
        )
    if found[0].weight.device.type == "meta":
        raise UnsupportedModel(f"the position embedding of this {type(model).__name__} is offloaded; load it whole")
    return found[0]
