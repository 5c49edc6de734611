"""A GGUF file in this process, by llama-cpp-python: the rows go in as embeddings, the text as ids.

What the model makes of a soft prompt is kept and copied for each generation, so that its rows are read once; of a
text that begins as the one before, what is new is read.
"""

import hashlib
import math
import secrets
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Generator, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from ..compatibility import ModelFacts, facts
from ..errors import ModelError, NoModel
from ..gguf.families import embedding_scale, scale_of_rows
from ..gguf.reading import ModelFile, read
from ..soft_tokens.text import runs_of, tokenised, without_soft_tokens
from ..softprompt import Order, Scale, SoftPrompt, TaggedText
from . import GREEDY_BELOW, PROBES, Effect, Ending, GenerationSettings
from .detokenizer import Detokenizer
from .effects import effect_of
from .fitting import fit, in_front, softprompts_inside
from .gguf_model import chat_prompt, check_widths
from .llama_bindings import Decoder
from .samplers import REPETITION_PENALTY, TEMPERATURE, TOP_K, TOP_P, TYPICAL
from .turns import Turns

DEFAULT_CONTEXT = 8192
"""Tokens, where nobody asks for more: what models can read takes more memory than most machines have."""
_TEXT, _KEPT, _PROBE = range(3)
"""Sequences: the story; what was made of the soft prompts; a probe."""


class Beginning(NamedTuple):
    """What stands before the text: rows, around the beginning-of-sequence token if it comes among them."""

    before: np.ndarray
    bos: Optional[int]
    after: np.ndarray
    key: str
    """Of the content; "" where there is nothing."""

    @property
    def n_tokens(self) -> int:
        """Positions that it takes, the beginning-of-sequence token's among them."""
        return len(self.before) + (self.bos is not None) + len(self.after)


class _Read(NamedTuple):
    """What a sequence has read: a beginning, by its key and length, and ids after it."""

    key: str = ""
    n_beginning: int = 0
    ids: Sequence[int] = ()

    @property
    def n_tokens(self) -> int:
        return self.n_beginning + len(self.ids)


class LlamaCppEngine:
    """Generates with a GGUF file.

    ``context``: tokens of soft prompts, text and new text; None: the model's own, at most 8,192. ``gpu_layers`` and
    ``cache_type``: see :class:`Decoder`. Raises :class:`ModelError` or :class:`MissingLibrary`.
    """

    def __init__(
        self,
        path: Union[str, Path],
        name: Optional[str] = None,
        context: Optional[int] = None,
        gpu_layers: int = -1,
        cache_type: str = "f16",
    ):
        self._file = read(path)
        self._file.embedding  # noqa: B018  what is no language model is told before llama.cpp sees it
        own = self._file.of_architecture("context_length") or DEFAULT_CONTEXT
        self.name = name or Path(path).stem
        self._decoder: Optional[Decoder] = Decoder(
            str(path), min(context or DEFAULT_CONTEXT, own), gpu_layers, 3, cache_type
        )
        self.lock = Turns()
        self._facts: Optional[ModelFacts] = None
        self._selected: Tuple[SoftPrompt, ...] = ()
        self._kept = _Read()
        self._story = _Read()

    @property
    def alive(self) -> bool:
        """Whether the model is loaded."""
        return self._decoder is not None

    @property
    def context(self) -> Optional[int]:
        """Tokens that there is room for."""
        return self._decoder.n_context if self._decoder is not None else None

    def close(self) -> None:
        """Free the model, when what it is generating has ended."""
        with self.lock:
            decoder, self._decoder = self._decoder, None
            if decoder is not None:
                decoder.close()

    def facts(self) -> ModelFacts:
        """Name, width, context and fingerprint, from the file; computed once."""
        if self._facts is None:
            found = facts(self._file.path, self.name)
            self._facts = ModelFacts(**{**vars(found), "context": self.context})
        return self._facts

    def select(self, softprompts: Sequence[SoftPrompt]) -> None:
        """Make these, in order, the soft prompts of generations that begin from now on.

        Raises :class:`WidthMismatch`; the selection is then what it was.
        """
        check_widths(softprompts, self._file)
        self._selected = tuple(softprompts)

    def effect(self, softprompts: Sequence[SoftPrompt]) -> Effect:
        """Mean total-variation distance of the next-token distribution with and without, over ``PROBES``: 0 to 1.

        The model reads one probe at a time, in between generations.
        """
        return effect_of(self._next_tokens(()), self._next_tokens(softprompts))

    def logits(self, ids: Sequence[int], softprompts: Sequence[SoftPrompt] = ()) -> np.ndarray:
        """Logits after ``ids``, with these soft prompts in front: float32 ``[vocabulary]``; what is kept stays."""
        with self.lock.in_between(), self._using() as decoder:
            beginning, rest = beginning_of(softprompts, ids, self._file, decoder.bos)
            self._make_room(decoder, beginning, self._story.n_tokens + len(rest))
            self._begin(decoder, beginning, _PROBE)
            for _ in self._read_on(decoder, rest, beginning.n_tokens, _PROBE):
                pass
            found = decoder.logits()
            decoder.drop(_PROBE)
            return found

    def token_text(self, token_id: int) -> str:
        """One token as text."""
        decoder = self._existing()
        return decoder.text_of([token_id], special=True) or str(token_id)

    def token_ids(self, text: str) -> List[int]:
        """The ids that the model would read for a text."""
        return _Reader(self._existing(), self.name).ids(text)

    def chat_prompt(self, messages: Sequence[Dict[str, Any]]) -> Optional[str]:
        """A conversation as the file's template writes it; None where it has none, or not for these messages."""
        return chat_prompt(self._file, messages, begins=bool(self._existing().ids_of("")))

    def generate(
        self,
        settings: GenerationSettings,
        softprompts: Optional[Sequence[SoftPrompt]] = None,
        stop: Optional[threading.Event] = None,
    ) -> Generator[str, None, Ending]:
        """Text, piece by piece, with these soft prompts in place of the selection unless None.

        The soft prompts and the text are fixed when this is called; the model starts when the first piece is asked
        for and no other generation is running. Closing the iterator or setting ``stop`` ends it within one token.
        Soft prompts that stand in the text itself (:class:`TaggedText`) are read there. Raises
        :class:`ContextExceeded`, :class:`WidthMismatch` or :class:`NoModel`.
        """
        decoder = self._existing()
        settings, chosen = in_front(settings, self._selected if softprompts is None else softprompts)
        check_widths([*chosen, *softprompts_inside(settings)], self._file)
        n_soft = sum(each.n_tokens for each in chosen)
        ids = fit(settings, n_soft, decoder.n_context, _Reader(decoder, self.name))
        return self._pieces(settings, chosen, ids, stop or threading.Event())

    def _pieces(
        self, settings: GenerationSettings, softprompts: Sequence[SoftPrompt], ids: List[int], stop: threading.Event
    ) -> Generator[str, None, Ending]:
        if not self.lock.acquire_unless(stop.is_set):
            return Ending("stop", len(without_soft_tokens(ids)), 0)
        try:
            with self._using() as decoder:
                return (yield from self._run(decoder, settings, softprompts, ids, stop))
        finally:
            self.lock.release()

    def _run(
        self,
        decoder: Decoder,
        settings: GenerationSettings,
        softprompts: Sequence[SoftPrompt],
        ids: List[int],
        stop: threading.Event,
    ) -> Generator[str, None, Ending]:
        beginning, rest = beginning_of(softprompts, ids, self._file, decoder.bos)
        of_text = without_soft_tokens(ids)
        text = Detokenizer(_Reader(decoder, self.name), of_text, settings.stop_sequence, settings.keep_stop)
        reason, n_new = "length", 0
        read = self._begin_story(decoder, beginning, rest, settings.max_length)
        with _sampler(decoder, settings, of_text) as sample:
            for part in self._read_on(decoder, rest[len(read) :], beginning.n_tokens + len(read), _TEXT):
                read.extend(part)
                if stop.is_set():
                    return Ending("stop", len(of_text), 0)
            while n_new < settings.max_length:
                token = sample()
                n_new += 1
                if decoder.is_end(token):
                    reason = "stop"
                    break
                piece = text.add([token])
                if piece:
                    yield piece
                if text.ended or stop.is_set():
                    return Ending("stop", len(of_text), n_new)
                if n_new < settings.max_length:
                    decoder.read_ids([token], beginning.n_tokens + len(read), _TEXT)
                    read.append(token)
        piece = text.rest()
        if piece:
            yield piece
        return Ending("stop" if text.ended else reason, len(of_text), n_new)

    def _read_on(self, decoder: Decoder, ids: Sequence[int], position: int, sequence: int) -> Iterator[Sequence[int]]:
        """Read ``ids``, of text or of soft tokens, part by part; each part when it is read."""
        for run, softprompt, first in runs_of(ids):
            if softprompt is not None:
                decoder.read_rows(_rows([softprompt], self._file)[first : first + len(run)], position, sequence)
                yield run
            for start in range(0, len(run) if softprompt is None else 0, decoder.at_once):
                part = run[start : start + decoder.at_once]
                decoder.read_ids(part, position + start, sequence)
                yield part
            position += len(run)

    def _begin_story(self, decoder: Decoder, beginning: Beginning, rest: Sequence[int], n_new: int) -> List[int]:
        """Have the story's sequence know the beginning and as much of ``rest`` as it has read before; which is that.

        The list that is returned is what the sequence is taken to have read; who reads on adds to it.
        """
        self._make_room(decoder, beginning, len(rest) + n_new)
        before, read = self._story, []
        most = min(len(before.ids), len(rest) - 1)  # the last is read again, for its logits
        if before.key == beginning.key and most > 0:
            known = next((at for at in range(most) if before.ids[at] != rest[at]), most)
            if known and decoder.drop(_TEXT, beginning.n_tokens + known):
                read = list(rest[:known])
        self._story = _Read(beginning.key, beginning.n_tokens, read)
        if not read:
            self._begin(decoder, beginning, _TEXT)
        return read

    def _begin(self, decoder: Decoder, beginning: Beginning, sequence: int) -> None:
        """Have ``sequence`` know the beginning and nothing else; its rows are read where they are not kept."""
        decoder.drop(sequence)
        if not beginning.key:
            return
        if self._kept.key != beginning.key:
            self._forget(decoder, _KEPT)
            at = len(beginning.before)
            decoder.read_rows(beginning.before, 0, _KEPT)
            if beginning.bos is not None:
                decoder.read_ids([beginning.bos], at, _KEPT)
                decoder.read_rows(beginning.after, at + 1, _KEPT)
            self._kept = _Read(beginning.key, beginning.n_tokens)
        decoder.copy(_KEPT, sequence)

    def _make_room(self, decoder: Decoder, beginning: Beginning, count: int) -> None:
        """Forget what is kept of other soft prompts, and the story, where there is no room for all."""
        kept = self._kept.n_tokens if self._kept.key != beginning.key else 0
        if kept + beginning.n_tokens + count > decoder.n_context:
            if kept:
                self._forget(decoder, _KEPT)
            self._forget(decoder, _TEXT)

    def _forget(self, decoder: Decoder, sequence: int) -> None:
        decoder.drop(sequence)
        if sequence == _KEPT:
            self._kept = _Read()
        if sequence == _TEXT:
            self._story = _Read()

    def _next_tokens(self, softprompts: Sequence[SoftPrompt]) -> np.ndarray:
        """``[len(PROBES), vocabulary]``: the distribution of the token after each probe."""
        ids = [self._existing().ids_of(probe) for probe in PROBES]
        logits = np.stack([self.logits(each, softprompts) for each in ids]).astype(np.float64)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True))

    @contextmanager
    def _using(self) -> Iterator[Decoder]:
        """The model, with the lock held; after an error nothing that it had read is relied on."""
        decoder = self._existing()
        try:
            yield decoder
        except GeneratorExit:
            raise
        except BaseException:
            for sequence in (_TEXT, _KEPT, _PROBE):
                self._forget(decoder, sequence)
            raise

    def _existing(self) -> Decoder:
        if self._decoder is None:
            raise NoModel(f"The model {self.name} is no longer loaded.")
        return self._decoder


def beginning_of(
    softprompts: Sequence[SoftPrompt], ids: Sequence[int], model: ModelFile, bos: Optional[int]
) -> Tuple[Beginning, List[int]]:
    """What stands before the text, its rows as llama.cpp takes them; and the ids that are left to come after it."""
    before = [each for each in softprompts if each.order is Order.BEFORE_BOS]
    after = [each for each in softprompts if each.order is Order.AFTER_BOS]
    starts = bool(ids) and ids[0] == bos
    if not starts:
        before, after = [*before, *after], []
    digest = hashlib.sha256()
    for each in [*before, *after]:
        digest.update(f"{each.scale} {each.rows.shape} {starts and each.order}".encode())
        digest.update(each.rows.tobytes())
    beginning = Beginning(
        _rows(before, model), bos if after else None, _rows(after, model), digest.hexdigest() if softprompts else ""
    )
    return beginning, list(ids[1:] if after else ids)


def _rows(softprompts: Sequence[SoftPrompt], model: ModelFile) -> np.ndarray:
    parts = [np.zeros((0, int(model.embedding.shape[0])), dtype=np.float32)]
    for each in softprompts:
        factor = scale_of_rows(model)
        if each.scale is Scale.MODULE:
            factor /= embedding_scale(model)
        parts.append(each.rows if factor == 1 else each.rows * np.float32(factor))
    return np.concatenate(parts)


@contextmanager
def _sampler(decoder: Decoder, settings: GenerationSettings, ids: Sequence[int]) -> Iterator[Any]:
    """A function that draws the next token, by llama.cpp's own samplers, in the client's order.

    Top-a, tail free, the slope of the repetition penalty and banned words, which llama.cpp has not, are left aside.
    """
    llama, vocabulary = decoder._llama, decoder.vocabulary
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    try:

        def add(sampler: Any, seen: Sequence[int] = ()) -> None:
            for each in seen:
                llama.llama_sampler_accept(sampler, each)
            llama.llama_sampler_chain_add(chain, sampler)

        biases = [(token, bias) for token, bias in settings.logit_bias if token < vocabulary]
        biases += [(token, -math.inf) for token in (*decoder.never, *(decoder.ends if settings.ban_eos else ()))]
        if biases:
            array = (llama.llama_logit_bias * len(biases))(*[llama.llama_logit_bias(*each) for each in biases])
            add(llama.llama_sampler_init_logit_bias(vocabulary, len(biases), array))
        greedy = min(settings.temperature, settings.top_p) < GREEDY_BELOW
        for number in settings.sampler_order:
            if number == REPETITION_PENALTY:
                if settings.rep_pen != 1:
                    reach = min(settings.rep_pen_range or decoder.n_context, decoder.n_context)
                    add(llama.llama_sampler_init_penalties(vocabulary, reach, settings.rep_pen, 0.0, 0.0), ids)
                often, once = settings.frequency_penalty, settings.presence_penalty
                if often or once:  # of what is new alone
                    add(llama.llama_sampler_init_penalties(vocabulary, decoder.n_context, 1.0, often, once))
            elif greedy:
                continue
            elif number == TOP_K and settings.top_k > 0:
                add(llama.llama_sampler_init_top_k(settings.top_k))
            elif number == TOP_P:  # KoboldCpp has min-p in the same place
                if settings.top_p < 1:
                    add(llama.llama_sampler_init_top_p(settings.top_p, 1))
                if settings.min_p > 0:
                    add(llama.llama_sampler_init_min_p(settings.min_p, 1))
            elif number == TYPICAL and settings.typical < 1:
                add(llama.llama_sampler_init_typical(max(settings.typical, 1e-6), 1))
            elif number == TEMPERATURE:
                add(llama.llama_sampler_init_temp(settings.temperature))
        if greedy:
            add(llama.llama_sampler_init_greedy())
        else:
            seed = secrets.randbits(32) if settings.seed is None else settings.seed
            add(llama.llama_sampler_init_dist(seed % 0xFFFFFFFF))  # the last means "draw one"
        yield lambda: int(llama.llama_sampler_sample(chain, decoder.context, -1))
    finally:
        llama.llama_sampler_free(chain)


class _Reader:
    """The decoder's tokenizer, as texts are fitted with and made with."""

    def __init__(self, decoder: Decoder, name: str):
        self._decoder = decoder
        self._name = name

    def ids(self, text: str) -> List[int]:
        decoder = self._decoder
        if isinstance(text, TaggedText):
            ids = tokenised(
                text, lambda part: decoder.ids_of(part, begin=False), self.prefix(), decoder.begins_with_space()
            )
        else:
            ids = decoder.ids_of(text)
        if not ids and decoder.bos is None:
            raise ModelError(f"{self._name} has no token that a text can begin with; the prompt must not be empty.")
        return ids or [int(decoder.bos or 0)]

    def prefix(self) -> List[int]:
        return self._decoder.ids_of("")

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return self._decoder.text_of(ids)
