"""Soft tokens: the embedding hook and the generation adapter that give a model its soft prompts.

A soft token is an id past the end of the embedding matrix. The hook on the model's input embedding
gives such ids their rows; the adapter puts the selected soft tokens in front of the text between the
decoding loop and the model (``prepare_inputs_for_generation``). The loop itself keeps text ids only, so
samplers, stopping rules, streamers, length limits and returned sequences never meet a soft token.
"""

import inspect
import threading
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch

from .compatibility import context_of
from .errors import ContextExceeded, NoEmbedding, UnsupportedCall, UnsupportedModel, WidthMismatch
from .patching import Patch, patch
from .softprompt import Order, Scale, SoftPrompt

_HANDLE = "_kobold_sp_soft_tokens"
_CACHES = ("past_key_values", "past", "cache_params", "state", "mems", "past_buckets_states")
"""Names under which releases and families hand their caches from step to step."""

_is_compiling: Callable[[], bool] = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)

SoftPrompts = Union[SoftPrompt, Iterable[SoftPrompt]]


def attach(model: Any) -> "SoftTokens":
    """Give ``model`` soft tokens, in place, and return the handle; once per model, then the same handle.

    ``model`` is a causal ``transformers`` model, or a PEFT wrapper of one. Instances are hooked, never
    classes; ``SoftTokens.detach`` leaves the model as it was. Raises
    :class:`~kobold_sp_plugin.errors.NoEmbedding` or :class:`~kobold_sp_plugin.errors.UnsupportedModel`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = vars(base).get(_HANDLE)
    return handle if handle is not None else SoftTokens(base)


class _Rows:
    """The rows of one selection: allocated once, under ids that nothing else ever gets."""

    def __init__(self, softprompts: Tuple[SoftPrompt, ...], first: int):
        before = [each for each in softprompts if each.order is Order.BEFORE_BOS]
        after = [each for each in softprompts if each.order is Order.AFTER_BOS]
        self.softprompts = softprompts
        self.first = first
        self.n_before = sum(each.n_tokens for each in before)
        self.n_tokens = sum(each.n_tokens for each in softprompts)
        self.parts = [(each.rows, each.scale) for each in before + after]


class _Table:
    """Rows of all live selections, for ids ``first`` to ``first + size - 1``; immutable.

    The NumPy rows are the master copy. Torch copies are a cache: a host may empty every tensor in the
    process, and then they are made again.
    """

    def __init__(self, live: List[_Rows], embedding: Any):
        self.first = live[0].first
        self.size = live[-1].first + live[-1].n_tokens - self.first
        self._embedding = weakref.ref(embedding)
        self._parts: List[Tuple[int, np.ndarray, Scale]] = []
        for rows in live:
            position = rows.first - self.first
            for part, scale in rows.parts:
                self._parts.append((position, part, scale))
                position += len(part)
        self._copies: Dict[Tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``[1 + size + 1, width]``: the rows between two of NaN, which ids without a row are given."""
        copy = self._copies.get((device, dtype))
        if copy is None or copy.dim() != 2:
            copy = self._copies[device, dtype] = self._build(device, dtype)
        return copy

    def _build(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        width = self._parts[0][1].shape[1]
        built = torch.full((self.size + 2, width), float("nan"), dtype=dtype)
        for position, rows, scale in self._parts:
            part = torch.tensor(rows).to(dtype)
            if scale is Scale.MATRIX:
                part = part * _scale_of(self._embedding(), dtype)
            built[1 + position : 1 + position + len(rows)] = part
        return built.to(device)


class _Generation:
    """What one call of ``generate`` is doing; its soft prompts are a snapshot."""

    def __init__(self, rows: _Rows):
        self.rows = rows
        self.has_read_prompt = False
        self.inserted = False
        """The ids that the loop hands over already hold the soft tokens (a prompt that is read in chunks)."""
        self.decoding = False
        """The ids of the next forward are text only, so that the embedding has nothing to substitute."""


class SoftTokens:
    """The handle of an attached model: which soft prompts it reads first, and the way back.

    Made by :func:`attach`. Safe to use from several threads.
    """

    def __init__(self, model: Any):
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                f"{type(model).__name__} has an encoder; soft prompts are given to causal language models only"
            )
        self._model = weakref.ref(model)
        embedding = _embedding_of(model)
        self._vocabulary, self._width = _size_of(embedding)
        self._embedding = weakref.ref(embedding)
        self._lock = threading.Lock()
        self._allocated: List[weakref.ref[_Rows]] = []
        self._next_id = self._vocabulary
        self._table: Optional[_Table] = None
        self._selected: Optional[_Rows] = None
        self._thread = threading.local()
        self._patches: List[Patch] = []
        self._hook(model, embedding)

    def _hook(self, model: Any, embedding: Any) -> None:
        self._patches = [patch(embedding, "forward", self._embed)]
        for seam in SEAMS:
            if callable(getattr(type(model), seam.name, None)):
                self._patches.append(patch(model, seam.name, getattr(self, seam.adapter)))
        vars(model)[_HANDLE] = self

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

        Raises :class:`~kobold_sp_plugin.errors.WidthMismatch`; the selection is then what it was.
        """
        self._selected = self._allocate(_flat(softprompts))
        self._drop_rows_of_the_past()

    def clear(self) -> None:
        """Change the selection to none."""
        self.select()

    @contextmanager
    def override(self, *softprompts: SoftPrompts) -> Iterator[None]:
        """Use these soft prompts, or none, for what this thread generates inside the ``with`` block."""
        before = getattr(self._thread, "override", None)
        self._thread.override = (self._allocate(_flat(softprompts)),)
        try:
            yield
        finally:
            self._thread.override = before

    def detach(self) -> None:
        """Take everything back that :func:`attach` changed on the model."""
        for each in reversed(self._patches):
            each.undo()
        self._patches = []
        model = self._model()
        if model is not None:
            vars(model).pop(_HANDLE, None)

    def prepend(
        self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None
    ) -> Dict[str, torch.Tensor]:
        """The arguments of a bare forward pass with the selection in front of the text.

        ``input_ids`` and ``attention_mask`` are integer ``[batch, length]``; the returned dictionary has
        both, new, of length ``n_tokens + length``. Logits then have ``n_tokens`` more positions.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = self._chosen()
        if rows is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        mask = _grow_mask(attention_mask, rows.n_tokens)
        return {"input_ids": self._insert(rows, input_ids, mask), "attention_mask": mask}

    def _chosen(self) -> Optional[_Rows]:
        override = getattr(self._thread, "override", None)
        return override[0] if override else self._selected

    def _allocate(self, softprompts: Tuple[SoftPrompt, ...]) -> Optional[_Rows]:
        for each in softprompts:
            if each.width != self._width:
                raise WidthMismatch(
                    f"{each.name or 'the soft prompt'} was made for {each.width} columns, "
                    f"this model has {self._width}"
                )
        current = self._selected
        if not softprompts or (current is not None and current.softprompts == softprompts):
            return current if softprompts else None
        with self._lock:
            # New ids each time: what a cache may have remembered under an old id stays true.
            rows = _Rows(softprompts, self._next_id)
            self._next_id += rows.n_tokens
            self._allocated.append(weakref.ref(rows))
            self._make_table()
        return rows

    def _drop_rows_of_the_past(self) -> None:
        with self._lock:
            while self._allocated and self._allocated[0]() is None:
                self._allocated.pop(0)
            self._make_table()

    def _make_table(self) -> None:
        live = [rows for rows in (ref() for ref in self._allocated) if rows is not None]
        self._table = _Table(live, self._embedding()) if live else None

    # Embedding

    def _embed(self, original: Callable[..., torch.Tensor], input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        table = self._table
        if table is None or (not _is_compiling() and self._has_text_only()):
            return original(input_ids, *args, **kwargs)
        is_soft = input_ids >= self._vocabulary
        embedded = original(input_ids.masked_fill(is_soft, 0), *args, **kwargs)
        rows = table.on(embedded.device, embedded.dtype)
        row = (input_ids - (table.first - 1)).clamp(0, table.size + 1)
        return torch.where(is_soft.unsqueeze(-1), rows[row], embedded)

    def _has_text_only(self) -> bool:
        generation = self._generation
        return generation is not None and generation.decoding

    # Generation

    @property
    def _generation(self) -> Optional[_Generation]:
        return getattr(self._thread, "generation", None)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = self._chosen()
        outer = self._generation
        self._thread.generation = _Generation(rows) if rows else None
        try:
            if rows is not None:
                kwargs = self._with_room_for(rows, args, kwargs)
            return original(*args, **kwargs)
        finally:
            self._thread.generation = outer

    def _with_room_for(self, rows: _Rows, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Dict[str, Any]:
        """``kwargs`` with what the caller says per position widened by the soft tokens' positions."""
        for name, what in (("inputs_embeds", "embeddings"), ("position_ids", "positions of its own")):
            if kwargs.get(name) is not None:
                raise UnsupportedCall(f"generate() was given {what} ({name}); with a soft prompt it takes ids only")
        for name in _CACHES:
            if _length_of(kwargs.get(name)):
                raise UnsupportedCall(f"generate() was given a filled cache ({name}) together with a soft prompt")
        self._check_context(rows, args, kwargs)
        grown = dict(kwargs)
        if kwargs.get("attention_mask") is not None:
            grown["attention_mask"] = _grow_mask(kwargs["attention_mask"], rows.n_tokens)
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            start = _start_of_text(grown.get("attention_mask", types))
            grown["token_type_ids"] = _insert_columns(types, types.new_zeros(rows.n_tokens), start)
        return grown

    def _check_context(self, rows: _Rows, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        model = self._model()
        context = context_of(model)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if context is None or not isinstance(ids, torch.Tensor):
            return
        text = ids.shape[-1]
        new = kwargs.get("max_new_tokens") or 1
        fits_alone = text + new <= context
        if rows.n_tokens + text >= context or (fits_alone and rows.n_tokens + text + new > context):
            raise ContextExceeded(
                f"{rows.n_tokens} soft tokens, {text} tokens of text and {new} new ones do not fit "
                f"the model's context of {context}; shorten the text by {rows.n_tokens + text + new - context}"
            )

    def _infer_mask(self, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = original(*args, **kwargs)
        generation = self._generation
        return mask if generation is None else _grow_mask(mask, generation.rows.n_tokens)

    def _first_positions(self, original: Callable[..., Any], length: Any, *args: Any, **kwargs: Any) -> Any:
        generation = self._generation
        if generation is not None:
            n_tokens = generation.rows.n_tokens
            # Releases before 4.50 hand over the ids themselves, of which only the shape counts.
            length = (
                length.new_zeros((length.shape[0], length.shape[1] + n_tokens))
                if isinstance(length, torch.Tensor)
                else length + n_tokens
            )
        return original(length, *args, **kwargs)

    def _make_cache(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generation = self._generation
        if generation is None:
            return original(*args, **kwargs)
        call = inspect.signature(original).bind(*args, **kwargs)
        for name in ("max_cache_length", "max_cache_len"):
            if name in call.arguments:
                call.arguments[name] += generation.rows.n_tokens
        return original(*call.args, **call.kwargs)

    def _read_in_chunks(
        self, original: Callable[..., Any], input_ids: torch.Tensor, generation_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        generation = self._generation
        if generation is not None and generation_config.prefill_chunk_size is not None:
            model_kwargs = args[0] if args else kwargs["model_kwargs"]
            input_ids = self._insert(generation.rows, input_ids, model_kwargs.get("attention_mask"))
            generation.inserted = True
            try:
                return original(input_ids, generation_config, *args, **kwargs)
            finally:
                generation.inserted = False
        return original(input_ids, generation_config, *args, **kwargs)

    def _prepare_inputs(
        self, original: Callable[..., Any], input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        generation = self._generation
        if generation is None:
            return original(input_ids, *args, **kwargs)
        # The first call reads the prompt; later ones read one new token, or, without a cache, all again.
        generation.decoding = generation.has_read_prompt and any(kwargs.get(name) is not None for name in _CACHES)
        if generation.inserted:
            generation.decoding = False
        elif generation.decoding:
            positions = kwargs.get("cache_position")
            if positions is not None:  # 4.44 to 4.57 would take the ids at these positions, past the text's end
                input_ids = input_ids[:, -positions.shape[0] :]
        else:
            input_ids = self._insert(generation.rows, input_ids, kwargs.get("attention_mask"))
        generation.has_read_prompt = True
        return original(input_ids, *args, **kwargs)

    def _insert(self, rows: _Rows, input_ids: torch.Tensor, grown_mask: Optional[torch.Tensor]) -> torch.Tensor:
        """``input_ids`` with the soft tokens in their place; ``grown_mask`` has room for them, None: no padding."""
        soft = torch.arange(rows.first, rows.first + rows.n_tokens, device=input_ids.device, dtype=torch.long)
        start = (
            input_ids.new_zeros(input_ids.shape[0], dtype=torch.long)
            if grown_mask is None
            else _start_of_text(grown_mask.to(input_ids.device))
        )
        ids = _insert_columns(input_ids, soft[: rows.n_before], start)
        if rows.n_before == rows.n_tokens:
            return ids
        start = start + rows.n_before
        model = self._model()
        bos = getattr(model.config, "bos_token_id", None) if model is not None else None
        if bos is not None:
            at_start = ids.gather(1, start.clamp(max=ids.shape[1] - 1).unsqueeze(1)).squeeze(1)
            start = start + (at_start == bos).long()
        return _insert_columns(ids, soft[rows.n_before :], start)


class Seam(NamedTuple):
    """A method of the model that is replaced on the instance."""

    name: str
    adapter: str
    what: str


SEAMS = (
    Seam("generate", "_generate", "Takes the snapshot; widens the caller's masks."),
    Seam("_prepare_attention_mask_for_generation", "_infer_mask", "Widens the mask that transformers infers."),
    Seam("prepare_inputs_for_generation", "_prepare_inputs", "Inserts the soft tokens when the prompt is read."),
    Seam("_get_initial_cache_position", "_first_positions", "Counts the soft tokens' positions (4.44 to 4.57)."),
    Seam("_prepare_cache_for_generation", "_make_cache", "Makes a static cache long enough (4.48 on)."),
    Seam("_get_cache", "_make_cache", "Makes a static cache long enough (4.44)."),
    Seam("_prefill", "_read_in_chunks", "Inserts them before a prompt is cut into chunks (5.x)."),
)
"""What the generation adapter replaces, where the installed release has it."""


def _flat(softprompts: Tuple[SoftPrompts, ...]) -> Tuple[SoftPrompt, ...]:
    flat: List[SoftPrompt] = []
    for each in softprompts:
        flat.extend([each] if isinstance(each, SoftPrompt) else each)
    return tuple(flat)


def _embedding_of(model: Any) -> Any:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
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


def _scale_of(embedding: Any, dtype: torch.dtype) -> Union[float, torch.Tensor]:
    """What the module multiplies its rows by, in the form that it does it in, so that roundings agree."""
    scale = getattr(embedding, "embed_scale", 1.0)
    if not isinstance(scale, torch.Tensor):
        return float(scale)
    if scale.device.type == "meta":
        scale = torch.tensor(embedding.scalar_embed_scale)
    return scale.detach().cpu().to(dtype)


def _length_of(cache: Any) -> int:
    """Positions that a cache handed in by a caller already holds."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache)


def _start_of_text(mask: torch.Tensor) -> torch.Tensor:
    """``[batch]``: how many padding positions each row of a mask ``[batch, length]`` begins with."""
    return (mask.cumsum(-1) == 0).sum(-1)


def _grow_mask(mask: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """``mask`` with ``n_tokens`` more ones behind each row's leading padding."""
    if mask.dim() != 2:
        raise UnsupportedCall(f"an attention mask of {mask.dim()} dimensions; with a soft prompt it has two")
    return _insert_columns(mask, mask.new_ones(n_tokens), _start_of_text(mask))


def _insert_columns(rows: torch.Tensor, columns: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """``rows [batch, length]`` with ``columns [n]`` inserted at ``start [batch]``; nothing waits for the device."""
    batch, length = rows.shape
    n = columns.shape[0]
    if n == 0:
        return rows
    position = torch.arange(length + n, device=rows.device).unsqueeze(0)
    inside = position - start.unsqueeze(1)
    old = torch.where(inside < n, position, position - n).clamp(max=length - 1).expand(batch, -1)
    new = columns.to(rows.dtype)[inside.clamp(0, n - 1)]
    return torch.where((inside >= 0) & (inside < n), new, rows.gather(1, old))
