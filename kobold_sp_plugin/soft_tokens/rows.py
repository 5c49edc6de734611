"""The rows of a selection, and of soft prompts inside of texts, and the ids that they have in one model."""

import copy
import weakref
from typing import Any, Dict, List, Optional, Tuple, Union

import torch

from ..errors import NotFinite
from ..softprompt import Order, Scale, SoftPrompt
from .columns import grow_mask, insert_columns, start_of_text


class Rows:
    """The rows of one selection, under ids that nothing else ever gets; immutable.

    ``softprompts`` are put in front of the text; those ``inside`` of it stand where the text has them.
    The NumPy rows are the master copy. Torch copies are a cache: a host may empty every tensor in the
    process, and then they are made again.
    """

    def __init__(
        self, softprompts: Tuple[SoftPrompt, ...], first: int, embedding: Any, inside: Tuple[SoftPrompt, ...] = ()
    ):
        before = [each for each in softprompts if each.order is Order.BEFORE_BOS]
        after = [each for each in softprompts if each.order is Order.AFTER_BOS]
        self.softprompts = softprompts
        self.inside = inside
        self.first = first
        self.n_before = sum(each.n_tokens for each in before)
        self.n_tokens = sum(each.n_tokens for each in softprompts)
        self.room = self.n_tokens
        """Positions that they take besides those of the text."""
        self._in_order = [*before, *after, *inside]
        self.n_rows = sum(each.n_tokens for each in self._in_order)
        self.prompt: Optional[torch.Tensor] = None
        """``[batch, length]``: the prompt as the model reads it, where it is not the text behind the selection."""
        self.is_all = True
        """No soft token stands behind these."""
        self._embedding = weakref.ref(embedding)
        self._copies: Dict[Tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def reading(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        bos: Optional[int],
        places: Dict[int, SoftPrompt],
        nothing: int,
    ) -> "Tuple[Rows, torch.Tensor, torch.Tensor]":
        """The same rows for one prompt ``input_ids [batch, length]``, its text alone, and its mask.

        ``places``: the first id, in ``input_ids``, of each soft prompt inside. ``mask [batch, length]`` is theirs. In
        the text ``[batch, shorter]``, rows that are shorter by more than others begin with their own first token
        again: one that no sampler has not seen. A row without any text has ``nothing`` in its place.
        """
        ids = self.placed(input_ids, places)
        mask = grow_mask(mask, self.n_tokens)
        ids = self.insert(ids, mask, bos)
        is_soft = ids >= self.first
        n_text = max(1, ids.shape[1] - int(is_soft.sum(1).min()))
        behind_soft = torch.sort((~is_soft).long(), dim=1, stable=True).indices[:, -n_text:]
        is_text = (mask > 0) & ~is_soft
        own = ids.gather(1, is_text.long().argmax(1, keepdim=True))
        filler = torch.where(is_text.any(1, keepdim=True), own, torch.full_like(own, nothing))
        text = torch.where(is_soft.gather(1, behind_soft), filler, ids.gather(1, behind_soft))
        rows = copy.copy(self)
        rows.prompt = ids
        rows.room = ids.shape[1] - n_text
        return rows, text, mask

    def placed(self, input_ids: torch.Tensor, places: Dict[int, SoftPrompt]) -> torch.Tensor:
        """``input_ids`` with the ids that the soft prompts inside have in this model."""
        first_of, next_id = {}, self.first + self.n_tokens
        for softprompt in self.inside:
            first_of[softprompt] = next_id
            next_id += softprompt.n_tokens
        ids = input_ids.long()
        for place, softprompt in places.items():
            is_of_it = (input_ids >= place) & (input_ids < place + softprompt.n_tokens)
            ids = torch.where(is_of_it, input_ids - place + first_of[softprompt], ids)
        return ids

    def at_front(self) -> "List[Rows]":
        """What the prompt begins with, as a selection: of all its rows, or, as many positions, of each of them.

        Empty where that is no soft prompt.
        """
        if self.prompt is None:
            return [self]
        is_soft = self.prompt >= self.first
        shared = (self.prompt == self.prompt[:1]).all(0) & is_soft[0]
        fronts = [self._whole_in(self.prompt[0, : int(shared.long().cumprod(0).sum())].tolist())]
        if not fronts[0]:
            runs = is_soft.long().cumprod(1).sum(1).tolist()
            fronts = [self._whole_in(row[:run].tolist()) for row, run in zip(self.prompt, runs)]
        lengths = {sum(each.n_tokens for each in front) for front in fronts}
        if len(lengths) > 1 or lengths == {0}:
            return []
        at = lengths.pop()
        is_all = not bool(is_soft[:, at:].any())
        found = []
        for front in fronts:
            rows = copy.copy(self)
            rows.prompt = None
            rows.softprompts = front
            rows.n_before = rows.n_tokens = rows.room = at
            rows.is_all = is_all
            found.append(rows)
        return found

    def _whole_in(self, ids: List[int]) -> Tuple[SoftPrompt, ...]:
        """The soft prompts that ``ids`` begin with, as far as they are whole."""
        starts, softprompts = {}, []
        next_id = self.first
        for softprompt in self._in_order:
            starts[next_id] = softprompt
            next_id += softprompt.n_tokens
        at = 0
        while at < len(ids):
            found = starts.get(ids[at])
            if found is None or ids[at : at + found.n_tokens] != list(range(ids[at], ids[at] + found.n_tokens)):
                break
            softprompts.append(found)
            at += found.n_tokens
        return tuple(softprompts)

    def ids(self, device: Union[torch.device, str, None] = None) -> torch.Tensor:
        """``[n_tokens]``: the ids, in the order in which they are read."""
        return torch.arange(self.first, self.first + self.n_tokens, device=device, dtype=torch.long)

    def contents(self) -> List[Tuple[SoftPrompt, int]]:
        """What each id stands for, from ``first`` on: a soft prompt, and the row in it."""
        return [(softprompt, row) for softprompt in self._in_order for row in range(softprompt.n_tokens)]

    def copy_on(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``[1 + n_rows + 1, width]``: the rows between two of NaN, which ids of other rows read as.

        Raises :class:`~kobold_sp_plugin.errors.NotFinite` for values that ``dtype`` cannot hold.
        """
        table = self._copies.get((device, dtype))
        if table is None or table.dim() != 2:
            table = self._copies[device, dtype] = self._built(device, dtype)
        return table

    def _built(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        edge = torch.full((1, self._in_order[0].width), float("nan"), dtype=dtype, device=device)
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
        if self.prompt is not None:  # beams and several continuations of a row stand side by side
            prompt = self.prompt.repeat_interleave(len(input_ids) // len(self.prompt), dim=0)
            new = input_ids[:, prompt.shape[1] - self.room :]
            return torch.cat([prompt, new.to(prompt.dtype)], dim=1)
        soft = self.ids(input_ids.device)
        if input_ids.shape[1] == 0:
            return soft.expand(len(input_ids), -1)
        start = (
            input_ids.new_zeros(input_ids.shape[0], dtype=torch.long)
            if grown_mask is None
            else start_of_text(grown_mask.to(input_ids.device))
        )
        ids = insert_columns(input_ids, soft[: self.n_before], start)
        if self.n_before == self.n_tokens:
            return ids
        # Those of a text stand in front of its beginning too.
        column = torch.arange(ids.shape[1], device=ids.device)
        start = ((column < start.unsqueeze(1)) | (ids >= self.first)).long().cumprod(1).sum(1)
        if bos is not None:
            at_start = ids.gather(1, start.clamp(max=ids.shape[1] - 1).unsqueeze(1)).squeeze(1)
            start = start + (at_start == bos).long()
        return insert_columns(ids, soft[self.n_before :], start)


def _through(embedding: Any, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``rows`` of the matrix as they leave the module, with the module's own operations, so that roundings agree."""
    if (
        "weight" not in embedding._parameters
    ):  # around the module that has the matrix: a LoRA, whose own rows are text's
        within = (each for each in embedding.modules() if each._parameters.get("weight") is embedding.weight)
        embedding = next(within, embedding)
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
