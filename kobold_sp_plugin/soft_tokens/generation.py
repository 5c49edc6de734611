"""The generation adapter: soft tokens between the decoding loop and the model, and nowhere else."""

import inspect
import sys
import threading
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch

from ..compatibility import context_of
from ..errors import ContextExceeded, UnsupportedCall
from ..patching import Patch, patch
from .columns import grow_mask, insert_columns, start_of_text
from .conversation import Conversation, Conversations
from .embedding import has_encoder
from .prefix import Prefixes
from .rows import Rows

CACHES = ("past_key_values", "past", "cache_params", "state", "mems", "past_buckets_states")
"""Names under which releases and families hand their caches from step to step."""

_NO_ID = sys.maxsize
"""The first soft token's id where there is none."""

READ_ALL = ("cpmant", "xlm-roberta-xl", "xlnet")
"""Models that have to be given all ids at each step: they find by themselves what is new, and where it stands."""


def _cuts_relatively() -> bool:
    """Whether assisted decoding cuts so many positions off the cache, and not all after the text's length."""
    try:
        from transformers.cache_utils import Cache
    except ImportError:  # before 4.36
        return False
    return "tokens_to_remove" in inspect.signature(getattr(Cache, "crop", lambda: None)).parameters


class Seam(NamedTuple):
    """A method of the model that is replaced on the instance, and by which of ours."""

    name: str
    adapter: str


# What is replaced, where the installed release has it, on a model that reads its text in the decoding loop.
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

# The same for a model that reads its text with an encoder, before the loop begins.
ENCODER_SEAMS = (
    Seam("generate", "_generate"),
    Seam("_prepare_attention_mask_for_generation", "_infer_mask"),
    Seam("_prepare_text_encoder_decoder_kwargs_for_generation", "_encode"),  # from 5.15: inserts them
    Seam("_prepare_encoder_decoder_kwargs_for_generation", "_encode"),  # before: the same
)


class Generation:
    """What one call of ``generate`` is doing; its soft prompts are a snapshot."""

    def __init__(self, rows: Rows, reads_all: bool, conversation: Optional[Conversation] = None):
        self.rows = rows
        self.conversation = conversation
        self.has_read_prompt = False
        self.inserted = False
        """The ids that the loop hands over already hold the soft tokens (a prompt that is read in chunks)."""
        self.reads_all = reads_all
        """The model is given all ids at each step, though it has a cache."""
        self.decoding = False
        """The next forward's ids are text only, so that the embedding has nothing to substitute."""


class GenerationAdapter:
    """Changes ``generate`` of ``model``, in place, so that soft tokens are read before the text, until ``undo``.

    ``chosen`` says which soft prompts a generation begun now, in this thread, reads; ``check`` raises where
    the model cannot read them any more; ``ended`` is called when no generation is running.
    """

    def __init__(
        self,
        model: Any,
        chosen: Callable[[], Optional[Rows]],
        check: Callable[[], Any],
        ended: Callable[[], None],
    ):
        self._model = weakref.ref(model)
        self._has_encoder = has_encoder(model)
        self._model_type = getattr(model.config, "model_type", None)
        self._chosen = chosen
        self._check = check
        self._ended = ended
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._prefixes = Prefixes()
        self.conversations = Conversations()
        self.running = 0
        """Calls of ``generate`` with soft prompts that have not ended."""
        self.patches: List[Tuple[Any, Patch]] = [
            (self._model, patch(model, seam.name, getattr(self, seam.adapter)))
            for seam in (ENCODER_SEAMS if self._has_encoder else SEAMS)
            if callable(getattr(type(model), seam.name, None))
        ]

    def undo(self) -> None:
        """Put back what was there."""
        for _, each in reversed(self.patches):
            each.undo()

    def rows_now(self) -> Optional[Rows]:
        """Whose rows the forward pass that is beginning in this thread reads; None where it has text only."""
        generation = self._generation
        if generation is None:
            return self._chosen()
        if generation.decoding:
            # What somebody reads between two steps may hold soft tokens; after an encoder nobody reads any.
            generation.decoding = self._has_encoder
            return None
        return None if generation.rows.first == _NO_ID else generation.rows

    def insert(self, rows: Rows, input_ids: torch.Tensor, grown_mask: Optional[torch.Tensor]) -> torch.Tensor:
        """``input_ids`` with the soft tokens in their place; ``grown_mask`` has room for them, None: no padding."""
        model = self._model()
        bos = getattr(model.config, "bos_token_id", None) if model is not None else None
        return rows.insert(input_ids, grown_mask, bos)

    @property
    def _generation(self) -> Optional[Generation]:
        return getattr(self._thread, "generation", None)

    @contextmanager
    def _in_generation(self, generation: Optional[Generation]) -> Iterator[None]:
        outer = self._generation
        self._thread.generation = generation
        with self._lock:
            self.running += generation is not None
        try:
            yield
        finally:
            self._thread.generation = outer
            with self._lock:
                self.running -= generation is not None
                last = not self.running
            if last:
                self._ended()

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Have this thread's generations inside the ``with`` block begin with what ``conversations`` keeps."""
        before = getattr(self._thread, "remembers", False)
        self._thread.remembers = True
        try:
            yield
        finally:
            self._thread.remembers = before

    # The call

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = self._chosen()
        reads_all = self._model_type in READ_ALL
        remembers = getattr(self._thread, "remembers", False) and not reads_all and not self._has_encoder
        if rows is None and not remembers:
            with self._in_generation(None):
                return original(*args, **kwargs)
        if rows is None:
            return self._generate_text(original, *args, **kwargs)
        self._check()
        stands_in = self._is_without_text(args, kwargs)
        if stands_in:
            rows = rows.in_place_of_text()
            args, kwargs = (), self._with_a_stand_in(args, kwargs)
        kwargs = self._with_room_for(rows, args, kwargs)
        generation = Generation(rows, reads_all, Conversation(self.conversations, rows) if remembers else None)
        with self._in_generation(generation):
            result = original(*args, **kwargs)
            self._remember(generation)
        if not generation.has_read_prompt:
            raise UnsupportedCall(
                "the soft prompt was not read: somebody has replaced prepare_inputs_for_generation since attach()"
            )
        if not stands_in:
            return result
        if isinstance(result, torch.Tensor):
            return result[:, 1:]
        result.sequences = result.sequences[:, 1:]
        return result

    def _generate_text(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call as it is, without soft tokens, so that what it reads is remembered."""
        rows = Rows((), _NO_ID, self._model())
        generation = Generation(rows, False, Conversation(self.conversations, rows))
        with self._in_generation(generation):
            result = original(*args, **kwargs)
            self._remember(generation)
        return result

    def _remember(self, generation: Generation) -> None:
        if generation.conversation is not None:
            generation.decoding = False
            generation.conversation.end(self._model(), lambda ids: self.insert(generation.rows, ids, None))

    def _is_without_text(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> bool:
        ids = _ids_of(args, kwargs)
        return isinstance(ids, torch.Tensor) and ids.shape[-1:] == (0,) and not self._has_encoder

    def _with_a_stand_in(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Dict[str, Any]:
        """The call with one token of text, which will read as a soft one: ``generate`` cannot begin with none.

        It is the last of the vocabulary, for which KoboldAI's samplers take every soft token.
        """
        if len(args) > 1 or kwargs.get("streamer") is not None:
            raise UnsupportedCall("generate() without any text takes its settings by name, and no streamer")
        ids = _ids_of(args, kwargs)
        changed = {name: value for name, value in kwargs.items() if name not in ("inputs", "attention_mask")}
        changed["input_ids"] = ids.new_full((len(ids), 1), self._check().num_embeddings - 1, dtype=torch.long)
        changed["attention_mask"] = torch.ones_like(changed["input_ids"])
        most = self._setting("max_length", kwargs)
        if most is not None and self._setting("max_new_tokens", kwargs) is None:
            changed["max_length"] = most + 1
        return changed

    def _refuse(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._chosen() is not None:
            raise UnsupportedCall("continuous batching takes no soft prompts; use generate(), or clear the selection")
        return original(*args, **kwargs)

    def _with_room_for(self, rows: Rows, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Dict[str, Any]:
        """``kwargs`` with what the caller says per position widened by the soft tokens' positions."""
        taken = [("inputs_embeds", "embeddings"), ("position_ids", "positions of its own")]
        if self._has_encoder:
            taken.append(("encoder_outputs", "a text that was read before"))
        for name, what in taken:
            if kwargs.get(name) is not None:
                raise UnsupportedCall(f"generate() was given {what} ({name}); with a soft prompt it takes ids only")
        for name in CACHES:
            if _length_of(kwargs.get(name)):
                raise UnsupportedCall(f"generate() was given a filled cache ({name}) together with a soft prompt")
        self._check_context(rows, args, kwargs)
        grown = dict(kwargs)
        if not _cuts_relatively() and not self._has_encoder:
            # These releases cut the cache, some the mask too, back to the length of the text; without a helper
            # that guesses ahead, the text is the same.
            for helper in ("assistant_model", "prompt_lookup_num_tokens"):
                if self._setting(helper, kwargs) is not None:
                    grown[helper] = None
        if kwargs.get("attention_mask") is not None:
            grown["attention_mask"] = grow_mask(kwargs["attention_mask"], rows.room)
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            start = start_of_text(grown.get("attention_mask", types))
            grown["token_type_ids"] = insert_columns(types, types.new_zeros(rows.room), start)
        return grown

    def _check_context(self, rows: Rows, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        context = context_of(self._model())
        ids = _ids_of(args, kwargs)
        if context is None or not isinstance(ids, torch.Tensor):
            return
        text = ids.shape[-1]
        new = self._setting("max_new_tokens", kwargs)
        if new is None:
            new = (self._setting("max_length", kwargs) or text + 1) - text
        new = 0 if self._has_encoder else max(1, new)  # a decoder's positions are its own
        # A host may ask for far more than the model could ever write, and stop by a rule of its own.
        fits_alone = text + new <= context
        if rows.room + text >= context + self._has_encoder or (fits_alone and rows.room + text + new > context):
            raise ContextExceeded(
                f"{rows.room} soft tokens, {text} tokens of text and {new} new ones do not fit "
                f"the model's context of {context}; shorten the text by {rows.room + text + new - context}"
            )

    def _setting(self, name: str, kwargs: Dict[str, Any]) -> Any:
        """What ``generate`` will take for one of its settings: the call's, its configuration's, the model's."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        model = self._model()
        own = getattr(model, "generation_config", None) or getattr(model, "config", None)
        return getattr(kwargs.get("generation_config") or own, name, None)

    # Its steps

    def _infer_mask(self, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = original(*args, **kwargs)
        generation = self._generation
        return mask if generation is None else grow_mask(mask, generation.rows.room)

    def _first_positions(self, original: Callable[..., Any], length: Any, *args: Any, **kwargs: Any) -> Any:
        generation = self._generation
        if generation is not None:
            n_tokens = generation.rows.room
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
                call.arguments[name] += generation.rows.room
        return original(*call.args, **call.kwargs)

    def _read_in_chunks(
        self, original: Callable[..., Any], input_ids: torch.Tensor, generation_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        generation = self._generation
        if generation is not None and generation_config.prefill_chunk_size is not None:
            model_kwargs = args[0] if args else kwargs.get("model_kwargs", kwargs)  # 4.57 spreads them
            input_ids = self.insert(generation.rows, input_ids, model_kwargs.get("attention_mask"))
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
        mask = kwargs.get("attention_mask")
        if generation.inserted:
            generation.has_read_prompt = True
            generation.decoding = False
            return original(input_ids, *args, **kwargs)
        # The first call reads the prompt; later ones read what is new, or, without a cache, all again.
        caches = [kwargs[name] for name in CACHES if kwargs.get(name) is not None]
        if generation.has_read_prompt and not generation.reads_all and caches and not _is_empty(caches[0]):
            new_ids = input_ids
            positions = kwargs.get("cache_position")
            if positions is not None and generation.rows.room:
                # 4.44 to 4.57 would take the ids at these positions, past the text's end
                new_ids = input_ids[:, -positions.shape[0] :]
            generation.decoding = True
            inputs = original(new_ids, *args, **kwargs)
        else:
            inputs = original(self.insert(generation.rows, input_ids, mask), *args, **kwargs)
            generation.decoding = not generation.has_read_prompt and self._begins_later(generation, inputs, mask)
        generation.has_read_prompt = True
        if generation.conversation is not None:
            generation.conversation.step(input_ids, caches[0] if caches else None)
        return inputs

    def _begins_later(self, generation: Generation, inputs: Dict[str, Any], mask: Optional[torch.Tensor]) -> bool:
        """Change ``inputs``, in place, to begin behind what a cache holds; whether all soft tokens are among that."""
        model = self._model()
        if generation.conversation is not None and generation.conversation.begin(model, inputs, mask):
            return True
        if generation.rows.first == _NO_ID:
            return False
        return self._prefixes.shorten(model, generation.rows, inputs, mask)

    def _encode(self, original: Callable[..., Any], inputs_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        generation = self._generation
        if generation is None:
            return original(inputs_tensor, *args, **kwargs)
        model_kwargs = args[0] if args else kwargs["model_kwargs"]
        inputs_tensor = self.insert(generation.rows, inputs_tensor, model_kwargs.get("attention_mask"))
        result = original(inputs_tensor, *args, **kwargs)
        generation.has_read_prompt = generation.decoding = True
        return result


def _ids_of(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    """The text that ``generate`` is given, under one of the names that it has."""
    return kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))


def _is_empty(cache: Any) -> bool:
    """Whether nobody has used this cache: some models have no use for the one that they are given."""
    layers = getattr(cache, "layers", None)
    if layers is not None:
        return not any(getattr(layer, "is_initialized", True) for layer in layers)
    return getattr(cache, "key_cache", None) == []


def _length_of(cache: Any) -> int:
    """Positions that a cache handed in by a caller already holds."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache)
