"""Text that soft prompts stand in, for tokenizers: each soft prompt becomes the ids of its soft tokens.

Text is split on soft prompts before it is tokenised. Their ids, of which every soft prompt has its own in the
whole process, lie past any vocabulary, so that the ids of a text say how much of the context it uses;
``generate`` of an attached model takes them out again before the decoding loop begins.
"""

import bisect
import copy
import functools
import logging
import threading
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from ..errors import UnsupportedCall
from ..softprompt import Order, SoftPrompt, TaggedText, has_tags, parts_of

_LOG = logging.getLogger(__name__)

FIRST_ID = 2**30
"""Ids from here on are soft tokens of a text; they fit an int32 and a tokenizer's unsigned 32 bits."""

MOST_KEPT = 64
"""So many soft prompts are kept for the ids that a text was tokenised to; others live as long as somebody has them."""

_OPTIONS = {"add_special_tokens", "padding", "max_length", "pad_to_multiple_of", "padding_side", "return_tensors"}
_OPTIONS |= {"return_attention_mask", "return_token_type_ids", "verbose"}

WORD_STARTS = ("\u2581", "\u0120")
"""What tokenizers write for the space before a word."""


class _Ids:
    """The ids of the soft prompts that texts were tokenised with; by content, and never those of another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = FIRST_ID
        self._first_of: WeakKeyDictionary[SoftPrompt, int] = WeakKeyDictionary()
        self._by_first: WeakValueDictionary[int, SoftPrompt] = WeakValueDictionary()
        self._firsts: List[int] = []
        self._kept: OrderedDict[int, SoftPrompt] = OrderedDict()

    def first_of(self, softprompt: SoftPrompt) -> int:
        """The first of its ids, which follow each other."""
        with self._lock:
            first = self._first_of.get(softprompt)
            if first is None or first not in self._by_first:
                first, self._next = self._next, self._next + softprompt.n_tokens
                self._first_of[softprompt] = first
                self._by_first[first] = softprompt
                self._firsts = [*(each for each in self._firsts if each in self._by_first), first]
            self._kept[first] = self._by_first[first]
            self._kept.move_to_end(first)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return first

    def found_in(self, ids: Iterable[int]) -> Dict[int, SoftPrompt]:
        """First id -> soft prompt, for all that ``ids`` are of."""
        found: Dict[int, SoftPrompt] = {}
        with self._lock:
            firsts = self._firsts
            for each in sorted(ids):
                at = bisect.bisect_right(firsts, each) - 1
                softprompt = self._by_first.get(firsts[at]) if at >= 0 else None
                if softprompt is None or each >= firsts[at] + softprompt.n_tokens:
                    raise UnsupportedCall(f"the soft prompt that the id {each} was of is gone; tokenise the text again")
                found[firsts[at]] = softprompt
        return found

    def __bool__(self) -> bool:
        return self._next > FIRST_ID


_IDS = _Ids()


def softprompts_in(ids: Any) -> Dict[int, SoftPrompt]:
    """First id -> soft prompt, for the soft tokens among ``ids``, an integer tensor or anything else.

    Raises :class:`~kobold_sp_plugin.errors.UnsupportedCall` where a soft prompt is gone.
    """
    if not _IDS or not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        return {}
    return _IDS.found_in(torch.unique(ids[ids >= FIRST_ID]).tolist())


def without_soft_tokens(ids: Iterable[int]) -> List[int]:
    """The text's own among ``ids``."""
    return [each for each in ids if each < FIRST_ID]


def without_oldest_text(ids: Sequence[int], n: int, keep: int = 0) -> List[int]:
    """``ids`` without ``n`` that are text, behind the first ``keep`` of these; no soft token is ever left out."""
    kept: List[int] = []
    for each in ids:
        if each < FIRST_ID:
            if keep > 0:
                keep -= 1
            elif n > 0:
                n -= 1
                continue
        kept.append(each)
    return kept


def runs_of(ids: Sequence[int]) -> Iterator[Tuple[Sequence[int], Optional[SoftPrompt], int]]:
    """``ids`` in parts, each of text or of one soft prompt: the ids, the soft prompt, which of its rows is the first.

    Raises :class:`~kobold_sp_plugin.errors.UnsupportedCall` where a soft prompt is gone.
    """
    found = _IDS.found_in({each for each in ids if each >= FIRST_ID})
    firsts = sorted(found)
    begin = 0
    while begin < len(ids):
        end = begin + 1
        if ids[begin] < FIRST_ID:
            while end < len(ids) and ids[end] < FIRST_ID:
                end += 1
            yield ids[begin:end], None, 0
        else:
            first = firsts[bisect.bisect_right(firsts, ids[begin]) - 1]
            softprompt = found[first]
            while end < len(ids) and ids[end] == ids[end - 1] + 1 < first + softprompt.n_tokens:
                end += 1
            yield ids[begin:end], softprompt, ids[begin] - first
        begin = end


def tokenised(
    text: Union[str, SoftPrompt], bare: Callable[[str], List[int]], begin: Sequence[int] = (), adds_space: bool = False
) -> List[int]:
    """Ids of ``text``, behind those that a text begins with, and those of the soft prompts in it.

    ``bare(text)``: ids of a text without what it begins with. ``adds_space``: it puts a space before the first word.
    """
    parts = parts_of(text)
    front: List[SoftPrompt] = []
    for part in parts:
        if not isinstance(part, SoftPrompt):
            break
        front.append(part)
    ids = [each for softprompt in front if softprompt.order is Order.BEFORE_BOS for each in _ids(softprompt)]
    ids += begin
    ids += [each for softprompt in front if softprompt.order is Order.AFTER_BOS for each in _ids(softprompt)]
    for number, part in enumerate(parts[len(front) :]):
        if isinstance(part, SoftPrompt):
            ids += _ids(part)
        else:
            # A tokenizer that begins every text with a space would make two of one in the middle.
            ids += bare(part[1:] if number and adds_space and part.startswith(" ") else part)
    return ids


def with_softprompts(tokenizer: Any) -> Any:
    """A copy of a ``transformers`` tokenizer that reads soft prompts in text, and is otherwise the same.

    Called with ``softprompt + "The sky"``, or a list with such texts in it, it gives ids and mask for
    ``generate`` of an attached model, for ``pipeline`` and for a budget. Soft prompts at the beginning stand where
    their order says, before the beginning-of-sequence token or behind it; any other stands where it is written.
    Rows are padded on the left, as ``generate`` needs them, unless ``padding_side`` is given. ``decode`` leaves
    soft tokens out. Text without soft prompts is tokenised as ever.
    """
    if isinstance(tokenizer, _ReadsSoftPrompts):
        return tokenizer
    mine, plain = copy.copy(tokenizer), type(tokenizer)  # type: Any, Any
    object.__setattr__(mine, "__class__", _reading(plain))
    return mine


class _ReadsSoftPrompts:
    """What :func:`with_softprompts` puts in front of a tokenizer's class."""

    _plain: Any

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        texts = text if isinstance(text, (list, tuple)) else [text]
        if not any(isinstance(each, (TaggedText, SoftPrompt)) for each in texts):
            if any(isinstance(each, str) and has_tags(each) for each in texts):
                _LOG.warning("a soft prompt's tag is read as ordinary text here; use + or read_tags() to mean it")
            return super().__call__(text, *args, **kwargs)  # type: ignore[misc]
        unknown = [name for name, value in kwargs.items() if name not in _OPTIONS and value not in (None, False)]
        if args or unknown:
            what = ", ".join(unknown) or "a second text"
            raise UnsupportedCall(f"a text with soft prompts in it is not tokenised with {what}")
        special = kwargs.get("add_special_tokens", True)
        rows = [self._ids_of(each, special) for each in texts]
        return self._batch(rows, text is not texts, **kwargs)

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """Ids of ``text``."""
        if isinstance(text, (TaggedText, SoftPrompt)):
            return self(text, *args, **kwargs)["input_ids"]
        return super().encode(text, *args, **kwargs)  # type: ignore[misc]

    def _decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return super()._decode(without_soft_tokens(ids), *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Tuple[Any, ...]:
        plain = copy.copy(self._plain.__new__(self._plain))
        vars(plain).update(vars(self))
        return (with_softprompts, (plain,))

    def _ids_of(self, text: Union[str, SoftPrompt], special: bool) -> List[int]:
        begin, end, adds_space = self._habits()
        if not special:
            begin, end = [], []
        return tokenised(text, self._bare, begin, adds_space) + end

    def _bare(self, text: str) -> List[int]:
        return list(super().__call__(text, add_special_tokens=False)["input_ids"]) if text else []  # type: ignore[misc]

    def _habits(self) -> Tuple[List[int], List[int], bool]:
        """Ids that this tokenizer begins and ends a text with, and whether it puts a space before the first word."""
        bare = self._bare("a")
        whole = list(super().__call__("a")["input_ids"])  # type: ignore[misc]
        at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), len(whole))
        first: str = self.convert_ids_to_tokens(bare)[0]  # type: ignore[attr-defined]
        return whole[:at], whole[at + len(bare) :], first.startswith(WORD_STARTS)

    def _batch(
        self,
        rows: List[List[int]],
        is_alone: bool,
        padding: Any = False,
        max_length: Optional[int] = None,
        pad_to_multiple_of: Optional[int] = None,
        padding_side: Optional[str] = "left",
        return_tensors: Any = None,
        return_token_type_ids: Optional[bool] = None,
        **ignored: Any,
    ) -> Any:
        from transformers import BatchEncoding  # here, so that attach() alone does not import it

        tokenizer: Any = self
        length = max(map(len, rows))
        if padding == "max_length":
            length = max(length, max_length or tokenizer.model_max_length)
        length += -length % (pad_to_multiple_of or 1)
        if padding in (False, "do_not_pad"):
            length = 0
        pad = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
        masks = []
        for number, ids in enumerate(rows):
            padded, mask = [pad] * (length - len(ids)), [0] * (length - len(ids))
            rows[number] = padded + ids if padding_side == "left" else ids + padded
            masks.append(mask + [1] * len(ids) if padding_side == "left" else [1] * len(ids) + mask)
        encoded = {"input_ids": rows, "attention_mask": masks}
        has_types = "token_type_ids" in tokenizer.model_input_names
        if has_types if return_token_type_ids is None else return_token_type_ids:
            encoded["token_type_ids"] = [[0] * len(ids) for ids in rows]
        if is_alone and return_tensors is None:
            return BatchEncoding({name: values[0] for name, values in encoded.items()})
        return BatchEncoding(encoded, tensor_type=return_tensors)


def _ids(softprompt: SoftPrompt) -> range:
    first = _IDS.first_of(softprompt)
    return range(first, first + softprompt.n_tokens)


@functools.lru_cache(maxsize=None)
def _reading(plain: Any) -> Any:
    """The class of a tokenizer with soft prompts; it has the plain one's name, which is written when it is saved."""
    return type(plain.__name__, (_ReadsSoftPrompts, plain), {"_plain": plain, "__module__": plain.__module__})


class TokenizerWithSoftPrompts:
    """``AutoTokenizer`` whose tokenizers read soft prompts in text: the Soft Prompt Tuner's way to one."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """What ``AutoTokenizer`` loads, through :func:`with_softprompts`."""
        from transformers import AutoTokenizer

        return with_softprompts(AutoTokenizer.from_pretrained(*args, **kwargs))


class ModelWithSoftPrompts:
    """``AutoModelForCausalLM`` whose models have soft tokens: the Soft Prompt Tuner's way to one."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """What ``AutoModelForCausalLM`` loads, attached."""
        from transformers import AutoModelForCausalLM

        from .handle import attach

        model = AutoModelForCausalLM.from_pretrained(*args, **kwargs)
        attach(model)
        return model
