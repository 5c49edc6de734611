"""An unmodified llama-server, by HTTP: it restores the state of the soft prompts, and is asked whether it used it."""

import math
import secrets
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, Dict, Generator, List, Optional, Sequence, Tuple, Union

from ..compatibility import ModelFacts, facts
from ..errors import (
    EngineRefused,
    MissingLibrary,
    ModelError,
    SoftPromptNotRead,
    UnknownSoftPrompt,
    UnsupportedCall,
    WrongModel,
)
from ..gguf.reading import read
from ..soft_tokens.text import tokenised
from ..softprompt import SoftPrompt, TaggedText
from . import GREEDY_BELOW, PROBES, Effect, Ending, GenerationSettings
from .effects import effect_of_likeliest
from .fitting import fit, in_front, softprompts_inside
from .gguf_model import chat_prompt, check_widths
from .remote import Remote
from .samplers import REPETITION_PENALTY, TEMPERATURE, TOP_K, TOP_P, TYPICAL
from .slots import Slot, slot_of, write_slot
from .turns import Turns

_LIKELIEST = 1000
"""Tokens whose probability is asked for, to measure an effect; the rest of the distribution counts as one."""
_STREAMED = {"stream": True, "timings_per_token": True}
"""So that the first part of an answer tells what of the prompt was not read again."""


class LlamaServerEngine:
    """Generates with the llama-server at ``url``, which has the GGUF file ``model`` loaded.

    ``folder``: the server's ``--slot-save-path``, seen from here. States that are not there are made, which takes
    llama-cpp-python; ``cache_type`` is then the server's. ``slot``: the one that is used, of those that it has.
    Raises :class:`EngineError`, :class:`ModelError` or :class:`OSError`.
    """

    def __init__(
        self,
        url: str,
        model: Union[str, Path],
        folder: Union[str, Path],
        name: Optional[str] = None,
        cache_type: str = "f16",
        slot: int = 0,
    ):
        self._remote = Remote(url)
        self._file = read(model)
        self._folder = Path(folder)
        self._cache_type = cache_type
        self._slot = slot
        self.name = name or f"{Path(model).stem} in llama-server"
        self.lock = Turns()
        self._selected: Tuple[SoftPrompt, ...] = ()
        self._facts: Optional[ModelFacts] = None
        self._restored: Tuple[int, ...] = ()
        """The ids whose state the slot is known to hold."""
        self.context: int = self._check_model()

    @property
    def alive(self) -> bool:
        """Whether there is a model: a server that is down may come back, so that this is always so."""
        return True

    def facts(self) -> ModelFacts:
        """Name, width, context and fingerprint, from the file; computed once."""
        if self._facts is None:
            self._facts = ModelFacts(**{**vars(facts(self._file.path, self.name)), "context": self.context})
        return self._facts

    def select(self, softprompts: Sequence[SoftPrompt]) -> None:
        """Make these, in order, the soft prompts of generations that begin from now on; their state is made if need be.

        Raises :class:`WidthMismatch`, :class:`UnknownSoftPrompt` (no state, and nothing to make it with) or
        :class:`ModelError`.
        """
        check_widths(softprompts, self._file)
        if softprompts:
            self._state_of(softprompts)
        self._selected = tuple(softprompts)

    def effect(self, softprompts: Sequence[SoftPrompt]) -> Effect:
        """Mean total-variation distance of the next-token distribution with and without, over ``PROBES``: 0 to 1.

        Of each distribution the likeliest 1,000 tokens count by themselves, and the rest as one.
        """
        return effect_of_likeliest(self._next_tokens(()), self._next_tokens(softprompts))

    def generate(
        self,
        settings: GenerationSettings,
        softprompts: Optional[Sequence[SoftPrompt]] = None,
        stop: Optional[threading.Event] = None,
    ) -> Generator[str, None, Ending]:
        """Text, piece by piece, with these soft prompts in place of the selection unless None.

        Nothing is yielded before the server has said that it used the soft prompts' state. Soft prompts may stand at
        the beginning of the text. Raises :class:`ContextExceeded`, :class:`WidthMismatch`, :class:`UnsupportedCall`
        (soft prompts elsewhere in the text) or an :class:`EngineError`, some from the iterator.
        """
        settings, chosen = in_front(settings, self._selected if softprompts is None else softprompts)
        if softprompts_inside(settings):
            raise UnsupportedCall(
                "llama-server reads soft prompts in front of a text only; put the tag at its beginning, or select it."
            )
        check_widths(chosen, self._file)
        ids = fit(settings, sum(each.n_tokens for each in chosen), self.context, self)
        return self._pieces(settings, chosen, ids, stop or threading.Event())

    def _pieces(
        self, settings: GenerationSettings, softprompts: Sequence[SoftPrompt], ids: List[int], stop: threading.Event
    ) -> Generator[str, None, Ending]:
        if not self.lock.acquire_unless(stop.is_set):
            return Ending("stop", len(ids), 0)
        n_new = 0
        try:
            with closing(self._stream(_request(settings, self.context), softprompts, ids, stop)) as answers:
                for answer in answers:
                    n_new = answer.get("tokens_predicted", n_new)
                    if answer.get("content"):
                        yield str(answer["content"])
                    if answer.get("stop") and settings.keep_stop and answer.get("stopping_word"):
                        yield str(answer["stopping_word"])
                    if answer.get("stop_type") == "limit":
                        return Ending("length", len(ids), n_new)
        finally:
            self.lock.release()
        return Ending("stop", len(ids), n_new)

    def _next_tokens(self, softprompts: Sequence[SoftPrompt]) -> List[Dict[int, float]]:
        """The probabilities of the likeliest tokens after each probe."""
        request = {"n_predict": 1, "n_probs": _LIKELIEST, "temperature": 0.0, "samplers": ["top_k"], **_STREAMED}
        found = []
        for probe in PROBES:
            ids = self.token_ids(probe)
            # Probabilities are told before biases, and only of a token that is a whole character: one of the text is.
            request["logit_bias"] = [[ids[-1], 1e4]]
            with self.lock.in_between(), closing(self._stream(request, softprompts, ids, threading.Event())) as answers:
                said = [each for answer in answers for each in answer.get("completion_probabilities") or ()]
            try:
                found.append({int(each["id"]): math.exp(each["logprob"]) for each in said[0]["top_logprobs"]})
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise EngineRefused(f"{self._remote.url} told no probabilities; is it a llama-server?") from error
        return found

    def _stream(
        self, request: Dict[str, Any], softprompts: Sequence[SoftPrompt], ids: Sequence[int], stop: threading.Event
    ) -> Generator[Dict[str, Any], None, None]:
        """The parts of an answer, the first of which has shown that the state was used; with the lock held."""
        self._check_model()
        slot = self._state_of(softprompts) if softprompts else Slot("", (), False)
        prompt = [*slot.ids, *(ids[1:] if slot.takes_bos else ids)]
        request = {**request, "prompt": prompt, "id_slot": self._slot, "cache_prompt": True}
        for attempt in range(2):
            if slot.ids and (attempt or self._restored != slot.ids):
                self._restore(slot)
            self._restored = ()  # until it is proven, since the answer may end before it has begun
            with closing(self._completion(request, stop)) as answers:
                try:
                    first = next(answers)
                except StopIteration:
                    if stop.is_set():
                        return
                    raise EngineRefused(f"{self._remote.url} ended its answer before it began.") from None
                used = first.get("timings", {}).get("cache_n")
                if not slot.ids or (isinstance(used, int) and used >= len(slot.ids)):
                    # Text without a soft prompt, or with another, takes the slot.
                    self._restored = slot.ids
                    yield first
                    yield from answers
                    return
            self._erase()  # what it has read for the ids is no soft prompt
        raise SoftPromptNotRead(
            f"{self._remote.url} did not use the soft prompt's state ({used} of {len(slot.ids)} tokens); its "
            "answer is not shown. Start it with --kv-unified --no-cache-idle-slots where it has several slots, and "
            "with --swa-full for a model with a sliding window."
        )

    def _restore(self, slot: Slot) -> None:
        self._restored = ()
        try:
            answer = self._ask(f"/slots/{self._slot}?action=restore", {"filename": slot.filename})
        except EngineRefused as error:
            raise EngineRefused(
                f"{error} Is {self._folder} its --slot-save-path, and {self._cache_type} its cache type?"
            ) from error
        if answer.get("n_restored") != len(slot.ids):
            raise SoftPromptNotRead(
                f"{self._remote.url} restored {answer.get('n_restored')} of {len(slot.ids)} tokens."
            )

    def _erase(self) -> None:
        self._restored = ()
        self._ask(f"/slots/{self._slot}?action=erase", {})

    def _state_of(self, softprompts: Sequence[SoftPrompt]) -> Slot:
        """Their slot, whose file is in the folder."""
        slot = slot_of(softprompts, self._file)
        path = self._folder / slot.filename
        if not path.is_file():
            try:
                write_slot(softprompts, self._file, path, self._cache_type)
            except MissingLibrary as error:
                names = ", ".join(each.name or "unnamed" for each in softprompts)
                raise UnknownSoftPrompt(
                    f"There is no {slot.filename} in {self._folder}, the state of {names}. Make it with "
                    f"kobold-sp export --to slot, or here: {error}"
                ) from error
        return slot

    def _check_model(self) -> int:
        """The server's context, if it has loaded the model that is meant. Raises an :class:`EngineError`."""
        self._ask("/health")
        props = self._ask("/props")
        models = self._ask("/v1/models").get("data")
        meta = models[0].get("meta") if isinstance(models, list) and models and isinstance(models[0], dict) else None
        meta = meta if isinstance(meta, dict) else {}
        embedding = self._file.embedding
        ours = {"n_vocab": int(embedding.shape[1]), "n_embd": int(embedding.shape[0])}
        if self._file.n_parts == 1:
            ours["n_params"] = sum(math.prod(tensor.shape) for tensor in self._file.tensors.values())
        theirs = {key: meta.get(key, value) for key, value in ours.items()}
        loaded = str(props.get("model_path", ""))
        if theirs != ours or not meta:
            raise WrongModel(f"{self._remote.url} has {loaded or 'another model'} loaded, and not {self._file.path}.")
        context = props.get("default_generation_settings", {}).get("n_ctx")
        if not isinstance(context, int) or context <= 0:
            raise EngineRefused(f"{self._remote.url} does not tell its context; is it a llama-server?")
        return context

    def ids(self, text: str) -> List[int]:
        """Ids of ``text`` behind what every text begins with; never none. Raises an :class:`EngineError`."""
        if isinstance(text, TaggedText):  # it is only counted: generate() takes the soft prompts off
            ids = tokenised(text, lambda part: self._tokens(part, begin=False), self.prefix())
        else:
            ids = self._tokens(text)
        bos = self._file.number("tokenizer.ggml.bos_token_id")
        if not ids and bos is None:
            raise ModelError(f"{self.name} has no token that a text can begin with; the prompt must not be empty.")
        return ids or [int(bos or 0)]

    def prefix(self) -> List[int]:
        """What every text begins with."""
        return self._tokens("")

    def token_ids(self, text: str) -> List[int]:
        """The ids that the model would read for a text."""
        return self.ids(text)

    def chat_prompt(self, messages: Sequence[Dict[str, Any]]) -> Optional[str]:
        """A conversation as the file's template writes it; None where it has none, or not for these messages."""
        return chat_prompt(self._file, messages, begins=bool(self.prefix()))

    def _tokens(self, text: str, begin: bool = True) -> List[int]:
        answer = self._ask("/tokenize", {"content": text, "add_special": begin, "parse_special": True})
        ids = answer.get("tokens")
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise EngineRefused(f"{self._remote.url} made no tokens of a text; is it a llama-server?")
        return ids

    def token_text(self, token_id: int) -> str:
        """One token as text."""
        return str(self._ask("/detokenize", {"tokens": [token_id]}).get("content") or token_id)

    def _ask(self, path: str, body: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        answer = self._remote.ask(path, body)
        if not isinstance(answer, dict):
            raise EngineRefused(f"{self._remote.url} answered something else than was asked; is it a llama-server?")
        return answer

    def _completion(self, body: Dict[str, Any], stop: threading.Event) -> Generator[Dict[str, Any], None, None]:
        """The answer, part by part; closing it, or setting ``stop``, ends the generation in the server."""
        with closing(self._remote.stream("/completion", body, stop)) as parts:
            for part in parts:
                if not isinstance(part, dict):
                    raise EngineRefused(f"{self._remote.url} answered something else than was asked.")
                yield part
                if part.get("stop"):
                    return


def _request(settings: GenerationSettings, context: int) -> Dict[str, Any]:
    """The settings in llama-server's words.

    Top-a, tail free, the slope of the repetition penalty and banned words, which it has not, are left aside; presence
    and frequency penalties look at what stands there already too, as far back as the repetition penalty.
    """
    greedy = min(settings.temperature, settings.top_p) < GREEDY_BELOW
    order = [_SAMPLERS[number] for number in settings.sampler_order if number in _SAMPLERS]
    return {
        **_STREAMED,
        "n_predict": settings.max_length,
        "temperature": 0.0 if greedy else settings.temperature,
        "top_k": 1 if greedy else settings.top_k,
        "top_p": settings.top_p,
        "typical_p": max(settings.typical, 1e-6),
        "min_p": settings.min_p,
        "repeat_penalty": settings.rep_pen,
        "repeat_last_n": min(settings.rep_pen_range or context, context),
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "samplers": ["penalties", "top_k"] if greedy else [name for names in order for name in names],
        "logit_bias": [[token, bias] for token, bias in settings.logit_bias],
        "ignore_eos": settings.ban_eos,
        "stop": [each for each in settings.stop_sequence if each],
        "seed": secrets.randbits(31) if settings.seed is None else settings.seed % 0xFFFFFFFF,
    }


_SAMPLERS = {
    REPETITION_PENALTY: ["penalties"],
    TOP_K: ["top_k"],
    TOP_P: ["top_p", "min_p"],
    TYPICAL: ["typ_p"],
    TEMPERATURE: ["temperature"],
}
"""KoboldAI's numbers of its samplers in llama-server's words; KoboldCpp has min-p in the place of top-p."""
