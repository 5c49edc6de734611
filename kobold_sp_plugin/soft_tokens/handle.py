"""``attach`` and its handle: which soft prompts a model reads first."""

import threading
import weakref
from contextlib import contextmanager
from typing import Any, ContextManager, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch

from ..errors import UnsupportedCall, UnsupportedModel, WidthMismatch
from ..softprompt import SoftPrompt
from .columns import grow_mask
from .copies import copies_are_plain
from .embedding import EmbeddingHook, embedding_of
from .generation import GenerationAdapter
from .rows import Rows
from .text import softprompts_in

_HANDLE = "_kobold_sp_soft_tokens"

_ATTACHING = threading.Lock()

SoftPrompts = Union[SoftPrompt, Iterable[SoftPrompt]]


def attach(model: Any) -> "SoftTokens":
    """Give ``model`` soft tokens, in place, and return the handle; once per model, then the same handle.

    ``model`` is a ``transformers`` model that generates text, or a PEFT wrapper of one; one with an encoder
    reads its soft tokens there. Instances are hooked, never classes; ``SoftTokens.detach`` leaves the model
    as it was, and a copy of the model is one that was never attached. Raises
    :class:`~kobold_sp_plugin.errors.NoEmbedding` or :class:`~kobold_sp_plugin.errors.UnsupportedModel`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _ATTACHING:
        handle = vars(base).get(_HANDLE)
        if handle is None or not handle._stays():
            handle = SoftTokens(base)
        return handle


def attached(model: Any) -> "Optional[SoftTokens]":
    """The handle of a model that has soft tokens now, else None; unlike :func:`attach`, this changes nothing."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle: Optional[SoftTokens] = vars(base).get(_HANDLE)
    return None if handle is None or handle._detached else handle


class SoftTokens:
    """The handle of an attached model: which soft prompts it reads first, and the way back.

    Made by :func:`attach`. Safe to use from several threads.
    """

    def __init__(self, model: Any):
        embedding = embedding_of(model)
        if _HANDLE in vars(embedding):
            raise UnsupportedModel(f"the embedding of this {type(model).__name__} belongs to a model attached before")
        self._lock = threading.Lock()
        self._selected: Optional[Rows] = None
        self._inside: Optional[Rows] = None
        """The rows of the texts that were read last, with the selection of then."""
        self._thread = threading.local()
        self._detached = False
        self._hook = EmbeddingHook(model, lambda: self._adapter.rows_now())
        self._adapter = GenerationAdapter(model, self._chosen, self._hook.checked, self._no_generation_runs)
        self._next_id = self._hook.vocabulary
        self._owners = [weakref.ref(model), weakref.ref(embedding)]
        for owner in (model, embedding):
            vars(owner)[_HANDLE] = self
        self._copied = copies_are_plain([*self._hook.patches, *self._adapter.patches], _HANDLE)

    # Selection

    @property
    def selection(self) -> Tuple[SoftPrompt, ...]:
        """The soft prompts that a generation begun now, in this thread, would read first."""
        rows = self._chosen()
        return rows.softprompts if rows else ()

    @property
    def n_tokens(self) -> int:
        """How many soft tokens the selection puts in front of the text."""
        rows = self._chosen()
        return rows.n_tokens if rows else 0

    def select(self, *softprompts: SoftPrompts) -> None:
        """Change the selection to one or several soft prompts, in order; generations under way keep theirs.

        Raises :class:`~kobold_sp_plugin.errors.WidthMismatch`, or
        :class:`~kobold_sp_plugin.errors.NotFinite` for values too large for the model's dtype; the
        selection is then what it was.
        """
        self._selected = self._allocate(_flat(softprompts))

    def clear(self) -> None:
        """Change the selection to none."""
        self.select()

    @contextmanager
    def override(self, *softprompts: SoftPrompts) -> Iterator[None]:
        """Use these soft prompts, or none, in place of the selection for this thread inside the ``with`` block.

        Blocks of one thread have to nest; a thread that is started inside does not inherit it.
        """
        before = getattr(self._thread, "override", None)
        self._thread.override = (self._allocate(_flat(softprompts)),)
        try:
            yield
        finally:
            self._thread.override = before

    def remembering(self) -> ContextManager[None]:
        """Have what this thread generates inside the ``with`` block begin where an earlier text of it left off.

        Generations of one row then keep what the model has read: at most four texts and 4 GiB, until
        :meth:`forget` or :meth:`detach`, or until the model changes. What they write is what it was, but for
        roundings.
        """
        return self._adapter.remembering()

    def forget(self) -> bool:
        """Drop what ``remembering`` has kept; False: there was nothing."""
        return self._adapter.conversations.forget()

    def prepend(
        self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None
    ) -> Dict[str, torch.Tensor]:
        """The arguments of a bare forward pass with the selection in front of the text.

        ``input_ids`` and ``attention_mask`` are integer ``[batch, length]``; the returned dictionary has
        both, of length ``n_tokens + length``; the arguments themselves stay as they are. Logits then have
        ``n_tokens`` more positions, except a decoder's behind an encoder.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = self._chosen()
        if rows is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        mask = grow_mask(attention_mask, rows.n_tokens)
        return {"input_ids": self._adapter.insert(rows, input_ids, mask), "attention_mask": mask}

    @contextmanager
    def reading(
        self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None
    ) -> Iterator[Dict[str, torch.Tensor]]:
        """Like :meth:`prepend`, for ids of a text that soft prompts stand in; ``generate`` needs no such thing.

        The arguments are good for forward passes of this thread inside the ``with`` block.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        places = softprompts_in(input_ids)
        rows = self._chosen(tuple(places.values()))
        if rows is None:
            yield {"input_ids": input_ids, "attention_mask": attention_mask}
            return
        mask = grow_mask(attention_mask, rows.n_tokens)
        ids = self._adapter.insert(rows, rows.placed(input_ids, places), mask)
        before = getattr(self._thread, "override", None)
        self._thread.override = (rows,)
        try:
            yield {"input_ids": ids, "attention_mask": mask}
        finally:
            self._thread.override = before

    def _chosen(self, inside: Tuple[SoftPrompt, ...] = ()) -> Optional[Rows]:
        """The selection, with the rows of what stands ``inside`` of a text besides."""
        override = getattr(self._thread, "override", None)
        chosen: Optional[Rows] = override[0] if override else self._selected
        if not inside:
            return chosen
        softprompts = chosen.softprompts if chosen else ()
        known = self._inside
        if known is None or (known.softprompts, known.inside) != (softprompts, inside):
            known = self._inside = self._allocate(softprompts, inside)
        return known

    def _allocate(self, softprompts: Tuple[SoftPrompt, ...], inside: Tuple[SoftPrompt, ...] = ()) -> Optional[Rows]:
        """``softprompts`` under ids of their own, or None for none; nothing is selected yet."""
        if not softprompts and not inside:
            return None
        if self._detached:
            raise UnsupportedCall("this handle is detached from its model; attach() the model again")
        embedding = self._hook.checked()
        for each in (*softprompts, *inside):
            if each.width != self._hook.width:
                raise WidthMismatch(
                    f"{each.name or 'the soft prompt'} was made for {each.width} columns, "
                    f"this model has {self._hook.width}"
                )
        current = self._selected
        if current is not None and (current.softprompts, current.inside) == (softprompts, inside):
            return current
        with self._lock:
            # New ids each time: what a cache may have remembered under an old id stays true.
            rows = Rows(softprompts, self._next_id, embedding, inside)
            self._next_id += rows.n_rows
        weight = embedding.weight
        if weight.is_floating_point() and weight.device.type != "meta":
            rows.copy_on(weight.device, weight.dtype)
        return rows

    # The way back

    def detach(self) -> None:
        """Take everything back that :func:`attach` changed on the model, at the end of what it is generating."""
        self._detached = True
        self._selected = self._inside = None
        self._no_generation_runs()

    def _stays(self) -> bool:
        """Whether the model still has this handle; one that waits for the end of a generation to go, stays."""
        with self._lock:
            if self._detached and self._adapter.running:
                self._detached = False
            return not self._detached

    def _no_generation_runs(self) -> None:
        with self._lock:
            if not self._detached or self._adapter.running:
                return
            self._adapter.undo()
            self._adapter.conversations.forget()
            self._hook.undo()
            self._copied()
            for owner in (each() for each in self._owners):
                if owner is not None and vars(owner).get(_HANDLE) is self:
                    del vars(owner)[_HANDLE]


def _flat(softprompts: Tuple[SoftPrompts, ...]) -> Tuple[SoftPrompt, ...]:
    flat: List[SoftPrompt] = []
    for each in softprompts:
        flat.extend([each] if isinstance(each, SoftPrompt) else each)
    for each in flat:
        if not isinstance(each, SoftPrompt):
            raise TypeError(f"expected a SoftPrompt, got {each!r}; SoftPrompt.load(path) reads one from a file")
    return tuple(flat)
