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
from ..softprompt import SoftPrompt
from .batching import ManagerAdapter, Requests, with_room
from .batching import is_supported as batching_is_supported
from .columns import grow_mask, insert_columns, start_of_text
from .conversation import Conversation, Conversations
from .embedding import has_encoder
from .prefix import Prefixes
from .rows import Rows
from .text import softprompts_in

CACHES = ("cache", "past_key_values", "past", "cache_params", "state", "mems", "past_buckets_states")
"""Names under which releases and families hand their caches from step to step."""

_NO_ID = sys.maxsize
"""The first soft token's id where there is none."""

_READ = "_kobold_sp_read"
"""The attribute of a cache that says which soft prompts are in it."""

NEED_ALL_STATES = ("penalty_alpha", "output_hidden_states", "output_attentions")
"""Settings of ``generate`` for which the prompt has to be read whole: they look at what each position became."""

READ_ALL = ("cpmant", "xlm-roberta-xl", "xlnet")
"""Models that have to be given all ids at each step: they find by themselves what is new, and where it stands."""
READ_ALL_AT_FIRST = ("mamba2",)
"""Those that had to be before 4.57: batches go wrong where the mask is not made as long as the ids."""


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
    Seam("generate_batch", "_batch"),  # continuous batching reads ids without any of the above
    Seam("init_continuous_batching", "_begin_batching"),
)

# The same for a model that reads its text with an encoder, before the loop begins.
ENCODER_SEAMS = (
    Seam("generate", "_generate"),
    Seam("_prepare_attention_mask_for_generation", "_infer_mask"),
    Seam("_prepare_text_encoder_decoder_kwargs_for_generation", "_encode"),  # from 5.15: inserts them
    Seam("_prepare_encoder_decoder_kwargs_for_generation", "_encode"),  # before: the same
)


_NO_BATCHING = "continuous batching of this release takes no soft prompts; use generate(), or clear the selection"

_UNKNOWN = -1
"""The length of a cache that does not tell it: Gemma 2's, in releases before 4.48."""


class Read(NamedTuple):
    """What a cache holds besides the text."""

    softprompts: Tuple[SoftPrompt, ...]
    positions: int


class Generation:
    """What one call of ``generate`` is doing; its soft prompts are a snapshot."""

    def __init__(
        self, rows: Rows, reads_all: bool, n_new: Optional[int] = None, conversation: Optional[Conversation] = None
    ):
        self.rows = rows
        self.n_new = n_new
        """Columns of the text that a cache which the caller gave back does not hold; None: there is no such cache."""
        self.conversation = conversation
        self.has_read_prompt = False
        self.inserted = False
        """The ids that the loop hands over already hold the soft tokens (a prompt that is read in chunks)."""
        self.reads_all = reads_all
        """The model is given all ids at each step, though it has a cache."""
        self.needs_all_states = False
        """Nothing is reused: somebody looks at the states of all positions."""
        self.decoding = False
        """The next forward's ids are text only, so that the embedding has nothing to substitute."""


class GenerationAdapter:
    """Changes ``generate`` of ``model``, in place, so that soft tokens are read before the text, until ``undo``.

    ``chosen`` says which soft prompts a generation begun now, in this thread, reads, given those that stand inside of
    its text; ``check`` raises where the model cannot read them any more; ``ended`` is called when no generation is
    running.
    """

    def __init__(
        self,
        model: Any,
        chosen: Callable[..., Optional[Rows]],
        check: Callable[[], Any],
        ended: Callable[[], None],
    ):
        self._model = weakref.ref(model)
        self._has_encoder = has_encoder(model)
        kind = getattr(model.config, "model_type", None)
        is_late = hasattr(model, "_prefill") or hasattr(model, "_prefill_chunking")
        self._reads_all = kind in READ_ALL or (kind in READ_ALL_AT_FIRST and not is_late)
        self._chosen = chosen
        self._check = check
        self._ended = ended
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._prefixes = Prefixes()
        self.conversations = Conversations()
        self._managers: List[ManagerAdapter] = []
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
        for manager in self._managers:
            manager.undo()
        self._managers = []
        self._prefixes = Prefixes()

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
        return rows.insert(input_ids, grown_mask, self._bos())

    def _bos(self) -> Optional[int]:
        model = self._model()
        return getattr(model.config, "bos_token_id", None) if model is not None else None

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
        if kwargs.get("cache_implementation") == "paged" and batching_is_supported():
            return original(*args, **kwargs)  # which calls generate_batch
        given = _ids_of(args, kwargs)
        inside = softprompts_in(given)
        rows = self._chosen(tuple(inside.values()))
        remembers = getattr(self._thread, "remembers", False) and not self._reads_all and not self._has_encoder
        if rows is None:
            return self._generate_without(original, remembers, *args, **kwargs)
        self._check()
        as_a_whole = bool(inside) or self._is_without_text(args, kwargs)
        if as_a_whole:
            rows, args, kwargs = self._text_of(rows, inside, args, kwargs)
        n_new = self._beyond_cache(rows, args, kwargs)
        kwargs = self._with_room_for(rows, args, kwargs)
        conversation = Conversation(self.conversations, rows) if remembers else None
        generation = Generation(rows, self._reads_all, n_new, conversation)
        generation.needs_all_states = any(self._setting(name, kwargs) for name in NEED_ALL_STATES)
        with self._in_generation(generation):
            result = original(*args, **kwargs)
            self._remember(generation)
        if not generation.has_read_prompt:
            raise UnsupportedCall(
                "the soft prompt was not read: somebody has replaced prepare_inputs_for_generation since attach()"
            )
        if not (generation.reads_all or self._has_encoder):
            for used in (kwargs, result):
                _mark(_cache_in(used), _what_is_read(rows))
        if not as_a_whole or self._has_encoder:
            return result
        n_text = _ids_of(args, kwargs).shape[1]
        if isinstance(result, torch.Tensor):
            return _behind(given, result[:, n_text:])
        result.sequences = _behind(given, result.sequences[:, n_text:])
        return result

    def _remember(self, generation: Optional[Generation]) -> None:
        if generation is not None and generation.conversation is not None:
            generation.decoding = False
            generation.conversation.end(self._model(), lambda ids: self.insert(generation.rows, ids, None))

    def _generate_without(self, original: Callable[..., Any], remembers: bool, *args: Any, **kwargs: Any) -> Any:
        """Without soft prompts; a cache that holds some would be taken for one of the text alone."""
        if _read_in(_cache_in(kwargs)) is not None and _length_of(_cache_in(kwargs)):
            raise UnsupportedCall(
                "generate() was given a cache that holds a soft prompt, and none is selected; select it again, or "
                "begin with a new cache"
            )
        generation = None
        if remembers:
            rows = Rows((), _NO_ID, self._model())
            generation = Generation(rows, False, conversation=Conversation(self.conversations, rows))
        with self._in_generation(generation):
            result = original(*args, **kwargs)
            self._remember(generation)
        for used in (kwargs, result):
            _mark(_cache_in(used), None)
        return result

    def _beyond_cache(self, rows: Rows, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Optional[int]:
        """Columns of the text behind those that the caller's cache holds; None where there is none, or an empty one.

        The cache has to be one that a generation with the same soft prompts has filled.
        """
        cache = _cache_in(kwargs)
        held = _length_of(cache)
        if not held:
            return None
        read = _read_in(cache)
        if read != _what_is_read(rows) or rows.prompt is not None:
            raise UnsupportedCall(
                "generate() was given a filled cache that does not begin with the selected soft prompt, or a text with "
                "soft prompts inside; begin with a new cache"
            )
        ids, mask = _ids_of(args, kwargs), kwargs.get("attention_mask")
        length = ids.shape[-1] if mask is None or not self._takes_new_ids_only else mask.shape[-1]
        if held == _UNKNOWN:
            raise UnsupportedCall(f"generate() was given a {type(cache).__name__}, which does not tell how full it is")
        n_new = length - (held - read.positions)
        if not 0 < n_new <= min(ids.shape[-1], length):
            raise UnsupportedCall(
                f"generate() was given a cache of {held - read.positions} positions of text, and a text of {length}; "
                "it has to begin with the same text, and to be longer"
            )
        return int(n_new)

    @property
    def _takes_new_ids_only(self) -> bool:
        """Whether a caller may give, beside a cache, only the ids that are new, and a mask of all (from 5.0)."""
        return hasattr(self._model(), "_prefill")

    def _is_without_text(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> bool:
        ids = _ids_of(args, kwargs)
        return isinstance(ids, torch.Tensor) and ids.shape[-1:] == (0,) and not self._has_encoder

    def _text_of(
        self, rows: Rows, inside: Dict[int, SoftPrompt], args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Rows, Tuple[Any, ...], Dict[str, Any]]:
        """The call with the text alone, for the decoding loop, and rows that know the prompt as it is read.

        Lengths that the call gives count all of its ids. ``generate`` cannot begin with no text at all: it gets the
        last of the vocabulary then, for which KoboldAI's samplers take every soft token.
        """
        ids, mask = _ids_of(args, kwargs), kwargs.get("attention_mask")
        if mask is None:
            pad, ends = self._setting("pad_token_id", kwargs), self._setting("eos_token_id", kwargs)
            is_told = pad is not None and pad not in (ends if isinstance(ends, (list, tuple)) else [ends])
            mask = (ids != pad).long() if is_told else torch.ones_like(ids)
        nothing = self._check().num_embeddings - 1
        rows, text, mask = rows.reading(ids, mask, self._bos(), inside, nothing)
        is_text = (self.insert(rows, text, mask) < rows.first) & (mask > 0)
        if kwargs.get("streamer") is not None and not bool(is_text.any()):
            raise UnsupportedCall("generate() without any text takes no streamer")
        changed = {**kwargs, "attention_mask": mask}
        if args:
            args = (text, *args[1:])
        else:
            changed["input_ids" if kwargs.get("input_ids") is not None else "inputs"] = text
        if self._setting("max_new_tokens", kwargs) is None and not self._has_encoder:
            more = text.shape[1] - ids.shape[1]
            for name, default in (("max_length", 20), ("min_length", 0)):
                config = getattr(kwargs.get("generation_config"), name, None)
                length = kwargs.get(name) or (None if config == default else config)
                if length is None and more > 0:
                    length = self._setting(name, kwargs)
                if length is not None:
                    changed[name] = length + more
        return rows, args, changed

    # Continuous batching

    def _batch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        for ids in call["inputs"]:  # what a manager refuses is only logged
            self._request(ids, self._setting("max_new_tokens", {**call, **call.get("kwargs", {})}))
        for each in self._managers:
            each.refused = None
        result = original(*args, **kwargs)
        for each in self._managers:
            if each.refused is not None:
                raise each.refused
        return result

    def _begin_batching(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = self._chosen()
        if not batching_is_supported():
            if rows is not None:
                raise UnsupportedCall(_NO_BATCHING)
            manager = original(*args, **kwargs)
            if hasattr(manager, "add_request") and "add_request" not in vars(manager):
                # It may outlive this moment: what it is asked for while something is selected is refused too.
                patch(manager, "add_request", self._refuse)
            return manager
        manager = original(*args, **with_room(kwargs, rows.n_tokens if rows else 0))
        self._managers = [each for each in self._managers if each.manager() is not None]
        if manager not in [each.manager() for each in self._managers]:
            nothing = Rows((), _NO_ID, self._model())
            generation = Generation(nothing, False)

            def change(rows: Optional[Rows]) -> None:
                generation.rows = rows or nothing

            def run(loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                with self._in_generation(generation):
                    return loop(*args, **kwargs)

            vocabulary = self._check().num_embeddings
            self._managers.append(ManagerAdapter(manager, self._request, run, Requests(change), vocabulary))
        return manager

    def _request(self, input_ids: Any, n_new: Optional[int]) -> Optional[Tuple[Rows, List[int]]]:
        """What a request made now is read with, and its ids with the soft tokens; None: it has none."""
        ids = torch.tensor([list(input_ids)], dtype=torch.long)
        inside = softprompts_in(ids)
        rows = self._chosen(tuple(inside.values()))
        if rows is None:
            return None
        self._check()
        if not batching_is_supported():
            raise UnsupportedCall(_NO_BATCHING)
        whole = self.insert(rows, rows.placed(ids, inside), None)[0]
        n_text = int((whole < rows.first).sum())
        if not n_text or int(whole[-1]) >= rows.first:
            raise UnsupportedCall("continuous batching takes no soft prompt at the end of a text; use generate()")
        self._check_room(len(whole) - n_text, n_text, n_new or 1)
        return rows, whole.tolist()

    def _refuse(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._chosen() is not None:
            raise UnsupportedCall(_NO_BATCHING)
        return original(*args, **kwargs)

    def _with_room_for(self, rows: Rows, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Dict[str, Any]:
        """``kwargs`` with what the caller says per position widened by the soft tokens' positions."""
        taken = [("inputs_embeds", "embeddings"), ("position_ids", "positions of its own")]
        if self._has_encoder:
            taken.append(("encoder_outputs", "a text that was read before"))
        for name, what in taken:
            if kwargs.get(name) is not None:
                raise UnsupportedCall(f"generate() was given {what} ({name}); with a soft prompt it takes ids only")
        if self._setting("assistant_early_exit", kwargs) is not None:
            raise UnsupportedCall(
                "assistant_early_exit makes a model its own helper, which reads the text without the soft prompt; "
                "generate without it"
            )
        self._check_context(rows, args, kwargs)
        grown = dict(kwargs)
        if not _cuts_relatively() and not self._has_encoder:
            # These releases cut the cache, some the mask too, back to the length of the text; without a helper
            # that guesses ahead, the text is the same.
            for helper in ("assistant_model", "prompt_lookup_num_tokens"):
                if self._setting(helper, kwargs) is not None:
                    grown[helper] = None
        if kwargs.get("attention_mask") is not None and rows.prompt is None:
            grown["attention_mask"] = grow_mask(kwargs["attention_mask"], rows.room)
        if kwargs.get("token_type_ids") is not None:
            types = kwargs["token_type_ids"]
            start = start_of_text(grown.get("attention_mask", types))
            grown["token_type_ids"] = insert_columns(types, types.new_zeros(rows.n_tokens), start)
        return grown

    def _check_context(self, rows: Rows, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        ids = _ids_of(args, kwargs)
        if not isinstance(ids, torch.Tensor):
            return
        text = ids.shape[-1]
        new = self._setting("max_new_tokens", kwargs)
        if new is None:
            new = (self._setting("max_length", kwargs) or text + 1) - text
        self._check_room(rows.room, text, 0 if self._has_encoder else max(1, new))  # a decoder's positions are its own

    def _check_room(self, soft: int, text: int, new: int) -> None:
        context = context_of(self._model())
        if context is None:
            return
        # A host may ask for far more than the model could ever write, and stop by a rule of its own.
        fits_alone = text + new <= context
        if soft + text >= context + self._has_encoder or (fits_alone and soft + text + new > context):
            raise ContextExceeded(
                f"{soft} soft tokens, {text} tokens of text and {new} new ones do not fit "
                f"the model's context of {context}; shorten the text by {soft + text + new - context}"
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
            mask = model_kwargs.get("attention_mask")
            if generation.n_new is None:
                input_ids = self.insert(generation.rows, input_ids, mask)
            elif self._takes_new_ids_only:
                input_ids = input_ids[:, -generation.n_new :]
            else:  # 4.57 begins at the first position again
                raise UnsupportedCall(
                    "generate() was given a filled cache and a prefill_chunk_size; use one of the two"
                )
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
        if generation.conversation is not None:
            generation.conversation.step(input_ids, _cache_in(kwargs))
        mask = kwargs.get("attention_mask")
        if generation.inserted:
            generation.has_read_prompt = True
            generation.decoding = False
            return original(input_ids, *args, **kwargs)
        if generation.rows.room and mask is not None and mask.dim() == 2 and mask.shape[1] == input_ids.shape[1]:
            # Who guesses ahead cuts the mask to the text and its guesses; what went is not padding.
            mask = kwargs["attention_mask"] = grow_mask(mask, generation.rows.room)
        # The first call reads the prompt; later ones read what is new, or, without a cache, all again.
        caches = [kwargs[name] for name in CACHES if kwargs.get(name) is not None]
        if generation.has_read_prompt and not generation.reads_all and caches and not _is_empty(caches[0]):
            new_ids = input_ids
            positions = kwargs.get("cache_position")
            if positions is not None and generation.rows.room:
                # 4.44 to 4.57 would take the ids at these positions, past the text's end
                new_ids = input_ids[:, -positions.shape[0] :]
            generation.decoding = True
            return original(new_ids, *args, **kwargs)
        if generation.n_new is not None and not generation.has_read_prompt:
            generation.has_read_prompt = generation.decoding = True
            if "next_sequence_length" in kwargs:  # from 5.0
                kwargs["next_sequence_length"] = generation.n_new
            else:  # before, the model cuts off as many ids as its cache has positions
                input_ids = self.insert(generation.rows, input_ids, mask)
            return original(input_ids, *args, **kwargs)
        inputs = original(self.insert(generation.rows, input_ids, mask), *args, **kwargs)
        generation.decoding = not generation.has_read_prompt and self._begins_later(generation, inputs, mask)
        generation.has_read_prompt = True
        return inputs

    def _begins_later(self, generation: Generation, inputs: Dict[str, Any], mask: Optional[torch.Tensor]) -> bool:
        """Change ``inputs``, in place, to begin behind what a cache holds; whether all soft tokens are among that."""
        if generation.needs_all_states:
            return False
        model = self._model()
        if generation.conversation is not None and generation.conversation.begin(model, inputs, mask):
            return True
        fronts = [] if generation.rows.first == _NO_ID else generation.rows.at_front()
        return bool(fronts) and self._prefixes.shorten(model, fronts, inputs, mask) and fronts[0].is_all

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


def _behind(given: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What was generated, behind the ids that were given; as many rows of it for each of them as there are."""
    return torch.cat([given.repeat_interleave(len(new) // len(given), dim=0), new.to(given.dtype)], dim=1)


def _what_is_read(rows: Rows) -> Read:
    """What a cache that was filled with these rows holds; nobody can go on with soft prompts inside of a text."""
    return Read((*rows.softprompts, *rows.inside), rows.room if rows.prompt is None else _UNKNOWN)


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
    if isinstance(cache, (tuple, list)):  # of a release that has no class for it: keys and values of each layer
        pairs = [each for each in cache[:1] if isinstance(each, (tuple, list))]
        return int(pairs[0][1].shape[-2]) if pairs else len(cache)
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else len(cache)
    return _UNKNOWN if length is None else int(length)


def _cache_in(arguments: Any) -> Any:
    """The cache among the arguments of ``generate``, or in what it returned."""
    found = (arguments.get(name) for name in CACHES) if isinstance(arguments, dict) else ()
    return next((cache for cache in found if cache is not None), None)


def _marked(cache: Any) -> Any:
    """What of a cache can carry an attribute: a tuple cannot, but its first tensor."""
    while isinstance(cache, (tuple, list)) and cache:
        cache = cache[0]
    return cache


def _read_in(cache: Any) -> Optional[Read]:
    read: Optional[Read] = getattr(_marked(cache), _READ, None)
    return read


def _mark(cache: Any, read: Optional[Read]) -> None:
    """Note on ``cache``, in place, what it holds besides the text; None: nothing."""
    holder = _marked(cache)
    if read is not None and hasattr(holder, "__dict__"):
        setattr(holder, _READ, read)
    elif read is None and hasattr(holder, _READ):
        delattr(holder, _READ)
