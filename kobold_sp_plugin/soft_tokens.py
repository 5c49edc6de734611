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

import torch

from .compatibility import context_of
from .errors import ContextExceeded, NoEmbedding, NotFinite, UnsupportedCall, UnsupportedModel, WidthMismatch
from .patching import patch
from .softprompt import Order, Scale, SoftPrompt

_HANDLE = "_kobold_sp_soft_tokens"
_CACHES = ("past_key_values", "past", "cache_params", "state", "mems", "past_buckets_states")
"""Names under which releases and families hand their caches from step to step."""

_ATTACHING = threading.Lock()

SoftPrompts = Union[SoftPrompt, Iterable[SoftPrompt]]


def attach(model: Any) -> "SoftTokens":
    """Give ``model`` soft tokens, in place, and return the handle; once per model, then the same handle.

    ``model`` is a causal ``transformers`` model, or a PEFT wrapper of one. Instances are hooked, never
    classes; ``SoftTokens.detach`` leaves the model as it was. Raises
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


class _Rows:
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
        self._in_order = before + after
        self._embedding = weakref.ref(embedding)
        self._copies: Dict[Tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def copy_on(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``[1 + n_tokens + 1, width]``: the rows between two of NaN, which ids of other rows read as.

        Raises :class:`~kobold_sp_plugin.errors.NotFinite` for values that ``dtype`` cannot hold.
        """
        copy = self._copies.get((device, dtype))
        if copy is None or copy.dim() != 2:
            copy = self._copies[device, dtype] = self._built(dtype).to(device)
        return copy

    def _built(self, dtype: torch.dtype) -> torch.Tensor:
        edge = torch.full((1, self.softprompts[0].width), float("nan"), dtype=dtype)
        parts = []
        for each in self._in_order:
            part = torch.tensor(each.rows).to(dtype)
            if each.scale is Scale.MATRIX:
                part = part * _scale_of(self._embedding(), dtype)
            if not torch.isfinite(part).all():
                largest = f"values up to {abs(each.rows).max():g} in {each.name or 'a soft prompt'}"
                raise NotFinite(largest, f"values that the model's {dtype} can hold")
            parts.append(part)
        return torch.cat([edge, *parts, edge])


class _Generation:
    """What one call of ``generate`` is doing; its soft prompts are a snapshot."""

    def __init__(self, rows: _Rows):
        self.rows = rows
        self.has_read_prompt = False
        self.inserted = False
        """The ids that the loop hands over already hold the soft tokens (a prompt that is read in chunks)."""
        self.decoding = False
        """The next forward's ids are text only, so that the embedding has nothing to substitute."""


class SoftTokens:
    """The handle of an attached model: which soft prompts it reads first, and the way back.

    Made by :func:`attach`. Safe to use from several threads.
    """

    def __init__(self, model: Any):
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                f"{type(model).__name__} has an encoder; soft prompts are given to causal language models only"
            )
        embedding = _embedding_of(model)
        if _HANDLE in vars(embedding):
            raise UnsupportedModel(f"the embedding of this {type(model).__name__} belongs to a model attached before")
        self._model = weakref.ref(model)
        self._embedding = weakref.ref(embedding)
        self._vocabulary, self._width = self._size = _size_of(embedding)
        self._lock = threading.Lock()
        self._next_id = self._vocabulary
        self._selected: Optional[_Rows] = None
        self._thread = threading.local()
        self._running = 0
        """Calls of ``generate`` with soft prompts that have not ended."""
        self._detached = False
        self._patches = [patch(embedding, "forward", self._embed)]
        for seam in SEAMS:
            if callable(getattr(type(model), seam.name, None)):
                self._patches.append(patch(model, seam.name, getattr(self, seam.adapter)))
        vars(model)[_HANDLE] = vars(embedding)[_HANDLE] = self

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

    def detach(self) -> None:
        """Take everything back that :func:`attach` changed on the model, at the end of what it is generating."""
        with self._lock:
            self._detached = True
            self._selected = None
            if not self._running:
                self._undo()

    def _stays(self) -> bool:
        """Whether the model still has this handle; one that waits for the end of a generation to go, stays."""
        with self._lock:
            if self._detached and self._running:
                self._detached = False
            return not self._detached

    def _undo(self) -> None:
        for each in reversed(self._patches):
            each.undo()
        for owner in (self._model(), self._embedding()):
            if owner is not None and vars(owner).get(_HANDLE) is self:
                del vars(owner)[_HANDLE]

    def prepend(
        self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None
    ) -> Dict[str, torch.Tensor]:
        """The arguments of a bare forward pass with the selection in front of the text.

        ``input_ids`` and ``attention_mask`` are integer ``[batch, length]``; the returned dictionary has
        both, of length ``n_tokens + length``; the arguments themselves stay as they are. Logits then have
        ``n_tokens`` more positions.
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
        """``softprompts`` under ids of their own, or None for none; nothing is selected yet."""
        if not softprompts:
            return None
        embedding = self._current_embedding()
        for each in softprompts:
            if each.width != self._width:
                raise WidthMismatch(
                    f"{each.name or 'the soft prompt'} was made for {each.width} columns, this model has {self._width}"
                )
        current = self._selected
        if current is not None and current.softprompts == softprompts:
            return current
        with self._lock:
            # New ids each time: what a cache may have remembered under an old id stays true.
            rows = _Rows(softprompts, self._next_id, embedding)
            self._next_id += rows.n_tokens
        weight = embedding.weight
        if weight.is_floating_point() and weight.device.type != "meta":
            rows.copy_on(weight.device, weight.dtype)
        return rows

    def _current_embedding(self) -> Any:
        """The embedding that is hooked; refuses a handle that is detached, or whose model has another by now."""
        model, embedding = self._model(), self._embedding()
        if self._detached or model is None:
            raise UnsupportedCall("this handle is detached from its model; attach() the model again")
        if embedding is None or model.get_input_embeddings() is not embedding or _size_of(embedding) != self._size:
            raise UnsupportedCall(
                "the model's input embedding was replaced or resized after attach(); detach() and attach() it again"
            )
        return embedding

    # Embedding

    def _embed(self, original: Callable[..., torch.Tensor], input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        generation = self._generation
        if generation is None:
            rows = self._chosen()
        elif generation.decoding:
            generation.decoding = False  # what somebody reads between two steps may hold soft tokens
            rows = None
        else:
            rows = generation.rows
        if rows is None:
            return original(input, *args, **kwargs)
        is_soft = input >= self._vocabulary
        embedded = original(input.masked_fill(is_soft, 0), *args, **kwargs)
        copy = rows.copy_on(embedded.device, embedded.dtype)
        row = (input - (rows.first - 1)).clamp(0, rows.n_tokens + 1)
        return torch.where(is_soft.unsqueeze(-1), copy[row.long()], embedded)

    # Generation

    @property
    def _generation(self) -> Optional[_Generation]:
        return getattr(self._thread, "generation", None)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = self._chosen()
        if rows is None:
            with self._in_generation(None):
                return original(*args, **kwargs)
        self._current_embedding()
        kwargs = self._with_room_for(rows, args, kwargs)
        generation = _Generation(rows)
        with self._in_generation(generation):
            result = original(*args, **kwargs)
        if not generation.has_read_prompt:
            raise UnsupportedCall(
                "the soft prompt was not read: somebody has replaced prepare_inputs_for_generation since attach()"
            )
        return result

    @contextmanager
    def _in_generation(self, generation: Optional[_Generation]) -> Iterator[None]:
        outer = self._generation
        self._thread.generation = generation
        with self._lock:
            self._running += generation is not None
        try:
            yield
        finally:
            self._thread.generation = outer
            with self._lock:
                self._running -= generation is not None
                if self._detached and not self._running:
                    self._undo()

    def _refuse(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._chosen() is not None:
            raise UnsupportedCall("continuous batching takes no soft prompts; use generate(), or clear the selection")
        return original(*args, **kwargs)

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
        if not hasattr(self._model(), "_prefill"):
            # Releases before 5.0 cut the cache back to the length of the text; without a helper that guesses
            # ahead, the text is the same.
            for helper in ("assistant_model", "prompt_lookup_num_tokens"):
                if self._setting(helper, kwargs) is not None:
                    grown[helper] = None
        if kwargs.get("attention_mask") is not None:
            grown["attention_mask"] = _grow_mask(kwargs["attention_mask"], rows.n_tokens)
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            start = _start_of_text(grown.get("attention_mask", types))
            grown["token_type_ids"] = _insert_columns(types, types.new_zeros(rows.n_tokens), start)
        return grown

    def _check_context(self, rows: _Rows, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        context = context_of(self._model())
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if context is None or not isinstance(ids, torch.Tensor):
            return
        text = ids.shape[-1]
        new = self._setting("max_new_tokens", kwargs)
        if new is None:
            new = (self._setting("max_length", kwargs) or text + 1) - text
        new = max(1, new)
        # A host may ask for far more than the model could ever write, and stop by a rule of its own.
        fits_alone = text + new <= context
        if rows.n_tokens + text >= context or (fits_alone and rows.n_tokens + text + new > context):
            raise ContextExceeded(
                f"{rows.n_tokens} soft tokens, {text} tokens of text and {new} new ones do not fit "
                f"the model's context of {context}; shorten the text by {rows.n_tokens + text + new - context}"
            )

    def _setting(self, name: str, kwargs: Dict[str, Any]) -> Any:
        """What ``generate`` will take for one of its settings: the call's, its configuration's, the model's."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        model = self._model()
        own = getattr(model, "generation_config", None) or getattr(model, "config", None)
        return getattr(kwargs.get("generation_config") or own, name, None)

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
            model_kwargs = args[0] if args else kwargs.get("model_kwargs", kwargs)  # 4.57 spreads them
            input_ids = self._insert(generation.rows, input_ids, model_kwargs.get("attention_mask"))
            generation.inserted = True
            try:
                return original(input_ids, generation_config, *args, **kwargs)
            finally:
                generation.inserted = False
        return original(input_ids, generation_config, *args, **kwargs)

    def _prepare_inputs(self, original: Callable[..., Any], input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
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
    """A method of the model that is replaced on the instance, and by which of ours."""

    name: str
    adapter: str


# What the generation adapter replaces, where the installed release has it.
SEAMS = (
    Seam("generate", "_generate"),  # takes the snapshot; widens the caller's masks
    Seam("_prepare_attention_mask_for_generation", "_infer_mask"),  # widens the mask that transformers infers
    Seam("prepare_inputs_for_generation", "_prepare_inputs"),  # inserts the soft tokens when the prompt is read
    Seam("_get_initial_cache_position", "_first_positions"),  # 4.44 to 4.57: counts their positions
    Seam("_prepare_cache_for_generation", "_make_cache"),  # from 4.48: makes a static cache long enough
    Seam("_get_cache", "_make_cache"),  # 4.44: the same
    Seam("_prefill", "_read_in_chunks"),  # from 5.0: inserts them before a prompt is cut into chunks
    Seam("_prefill_chunking", "_read_in_chunks"),  # 4.57: the same
    Seam("generate_batch", "_refuse"),  # reads ids without any of the above
    Seam("init_continuous_batching", "_refuse"),
)


def _flat(softprompts: Tuple[SoftPrompts, ...]) -> Tuple[SoftPrompt, ...]:
    flat: List[SoftPrompt] = []
    for each in softprompts:
        flat.extend([each] if isinstance(each, SoftPrompt) else each)
    for each in flat:
        if not isinstance(each, SoftPrompt):
            raise TypeError(f"expected a SoftPrompt, got {each!r}; SoftPrompt.load(path) reads one from a file")
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
