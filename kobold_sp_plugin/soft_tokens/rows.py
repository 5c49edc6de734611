"""The rows of a selection, and the ids that they have in one model."""

import copy
import weakref
from typing import Any, Dict, List, Optional, Tuple, Union

import torch

from ..errors import NotFinite
from ..softprompt import Order, Scale, SoftPrompt
from .columns import insert_columns, start_of_text


class Rows:
    """The rows of one selection, under ids that nothing else ever gets; immutable.

    The NumPy rows are the master copy. Torch copies are a cache: a host may empty every tensor in the
    process, and then they are made again.
    """

    def __init__(self, softprompts: Tuple[SoftPrompt, ...], first: int, embedding: Any):
        before = [each for each in softprompts if each.order is Order.BEFORE_BOS]
        after = [each for each in softprompts if each.order is Order.AFTER_BOS]
        self.softprompts = softprompts
        self.first = first
        self.n_before = sum(each.n_tokens for each in before)
        self.n_tokens = sum(each.n_tokens for each in softprompts)
        self.room = self.n_tokens
        """Positions that they take besides those of the text."""
        self._in_order = before + after
        self._embedding = weakref.ref(embedding)
        self._copies: Dict[Tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def in_place_of_text(self) -> "Rows":
        """The same rows for no text: the decoding loop has one stand-in for it, which reads as the last of them."""
        rows = copy.copy(self)
        rows.room = self.n_tokens - 1
        return rows

    def ids(self, device: Union[torch.device, str, None] = None) -> torch.Tensor:
        """``[n_tokens]``: the ids, in the order in which they are read."""
        return torch.arange(self.first, self.first + self.n_tokens, device=device, dtype=torch.long)

    def contents(self) -> List[Tuple[SoftPrompt, int]]:
        """What each id stands for, from ``first`` on: a soft prompt, and the row in it."""
        return [(softprompt, row) for softprompt in self._in_order for row in range(softprompt.n_tokens)]

    def copy_on(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``[1 + n_tokens + 1, width]``: the rows between two of NaN, which ids of other rows read as.

        Raises :class:`~kobold_sp_plugin.errors.NotFinite` for values that ``dtype`` cannot hold.
        """
        table = self._copies.get((device, dtype))
        if table is None or table.dim() != 2:
            table = self._copies[device, dtype] = self._built(device, dtype)
        return table

    def _built(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        edge = torch.full((1, self.softprompts[0].width), float("nan"), dtype=dtype, device=device)
        parts = []
        for each in self._in_order:
            part = torch.tensor(each.rows).to(dtype)
            if each.scale is Scale.MATRIX:
                part = _through(self._embedding(), part, device)
            if not torch.isfinite(part).all():
                largest = f"values up to {abs(each.rows).max():g} in {each.name or 'a soft prompt'}"
                raise NotFinite(largest, f"values that the model's {dtype} can hold")
            parts.append(part.to(device))
        return torch.cat([edge, *parts, edge])

    def insert(self, input_ids: torch.Tensor, grown_mask: Optional[torch.Tensor], bos: Optional[int]) -> torch.Tensor:
        """``input_ids [batch, length]`` with the soft tokens in their place.

        ``grown_mask`` already has room for them; None: there is no padding. ``bos`` is the model's
        beginning-of-sequence token, if it has one.
        """
        soft = self.ids(input_ids.device)
        if self.room < self.n_tokens:
            return torch.cat([soft.expand(len(input_ids), -1), input_ids[:, 1:]], dim=1)
        start = (
            input_ids.new_zeros(input_ids.shape[0], dtype=torch.long)
            if grown_mask is None
            else start_of_text(grown_mask.to(input_ids.device))
        )
        ids = insert_columns(input_ids, soft[: self.n_before], start)
        if self.n_before == self.n_tokens:
            return ids
        start = start + self.n_before
        if bos is not None:
            at_start = ids.gather(1, start.clamp(max=ids.shape[1] - 1).unsqueeze(1)).squeeze(1)
            start = start + (at_start == bos).long()
        return insert_columns(ids, soft[self.n_before :], start)


def _through(embedding: Any, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``rows`` of the matrix as they leave the module, with the module's own operations, so that roundings agree."""
    scale = getattr(embedding, "embed_scale", None)
    if isinstance(scale, torch.Tensor):
        if scale.device.type == "meta":
            scale = torch.tensor(embedding.scalar_embed_scale)
        return rows * scale.detach().cpu().to(rows.dtype)
    if scale is not None:
        return rows * float(scale)
    forward = type(embedding).forward
    weights = [embedding.weight, *(each for part in embedding.children() for each in part.parameters())]
    if forward is torch.nn.Embedding.forward or not all(
        each.is_floating_point() and each.device.type != "meta" for each in weights
    ):
        return rows
    # A module that does more than look up (Inkling's has a norm): one like it, with our rows for a matrix.
    own = copy.copy(embedding)
    own._parameters = {**embedding._parameters, "weight": rows.to(device)}
    with torch.no_grad():
        return torch.as_tensor(forward(own, torch.arange(len(rows), device=device)))
