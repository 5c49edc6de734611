"""An unmodified llama-server, by HTTP: it restores the state of the soft prompts, and is asked whether it used it."""

import http.client
import json
import math
import secrets
import threading
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Dict, Generator, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from ..compatibility import ModelFacts, facts
from ..errors import (
    EngineRefused,
    EngineUnreachable,
    MissingLibrary,
    SoftPromptNotRead,
    UnknownSoftPrompt,
    WrongModel,
)
from ..gguf.reading import read
from ..softprompt import SoftPrompt
from . import GREEDY_BELOW, PROBES, Effect, GenerationSettings
from .llama_cpp import _check_widths, _distances, _entropies, fit
from .slots import Slot, slot_of, write_slot
from .transformers import _TURN_SECONDS, Turns

_SECONDS = 10
"""For an answer that takes no model."""
_READING_SECONDS = 600
"""Until the next token: a long story on a slow machine."""
_LONGEST_ANSWER = 2**24
_LIKELIEST = 1000
"""Tokens whose probability is asked for, to measure an effect; the rest of the distribution counts as one."""


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
        self._url = url.rstrip("/")
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
        _check_widths(softprompts, self._file)
        if softprompts:
            self._state_of(softprompts)
        self._selected = tuple(softprompts)

    def effect(self, softprompts: Sequence[SoftPrompt]) -> Effect:
        """Mean total-variation distance of the next-token distribution with and without, over ``PROBES``: 0 to 1.

        Of each distribution the likeliest 1,000 tokens count by themselves, and the rest as one.
        """
        without, having = (self._next_tokens(each) for each in ((), softprompts))
        ids = sorted({token for each in (*without, *having) for token in each})
        first, second = (
            np.array([[each.get(token, 0.0) for token in ids] for each in part]) for part in (without, having)
        )
        first, second = (
            np.concatenate([part, 1 - part.sum(-1, keepdims=True)], -1).clip(0) for part in (first, second)
        )
        return Effect(
            float(min(1.0, _distances(second, first).mean())),
            float(_entropies(second).mean()),
            float(_entropies(first).mean()),
            float(_distances(second[:, None], second[None]).mean()),
            float(_distances(first[:, None], first[None]).mean()),
        )

    def generate(
        self,
        settings: GenerationSettings,
        softprompts: Optional[Sequence[SoftPrompt]] = None,
        stop: Optional[threading.Event] = None,
    ) -> Generator[str, None, None]:
        """Text, piece by piece, with these soft prompts in place of the selection unless None.

        Nothing is yielded before the server has said that it used the soft prompts' state. Raises
        :class:`ContextExceeded`, :class:`WidthMismatch` or an :class:`EngineError`, some from the iterator.
        """
        chosen = self._selected if softprompts is None else tuple(softprompts)
        _check_widths(chosen, self._file)
        bos = self._file.number("tokenizer.ggml.bos_token_id")
        n_soft = sum(each.n_tokens for each in chosen)
        ids = fit(settings, n_soft, self.context, self._ids_of, bos, self.name)
        return self._pieces(settings, chosen, ids, stop or threading.Event())

    def _pieces(
        self, settings: GenerationSettings, softprompts: Sequence[SoftPrompt], ids: List[int], stop: threading.Event
    ) -> Generator[str, None, None]:
        while not self.lock.acquire(timeout=_TURN_SECONDS):
            if stop.is_set():
                return
        try:
            with closing(self._stream(_request(settings, self.context), softprompts, ids)) as answers:
                for answer in answers:
                    if stop.is_set():
                        return
                    if answer.get("content"):
                        yield str(answer["content"])
        finally:
            self.lock.release()

    def _next_tokens(self, softprompts: Sequence[SoftPrompt]) -> List[Dict[int, float]]:
        """The probabilities of the likeliest tokens after each probe."""
        request = {"n_predict": 1, "n_probs": _LIKELIEST, "temperature": 0.0, "samplers": ["top_k"], "stream": False}
        found = []
        for probe in PROBES:
            ids = self._ids_of(probe)
            # Probabilities are told before biases, and only of a token that is a whole character: one of the text is.
            request["logit_bias"] = [[ids[-1], 1e4]]
            with self.lock.in_between(), closing(self._stream(request, softprompts, ids)) as answers:
                said = [each for answer in answers for each in answer.get("completion_probabilities") or ()]
            try:
                found.append({int(each["id"]): math.exp(each["logprob"]) for each in said[0]["top_logprobs"]})
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise EngineRefused(f"{self._url} told no probabilities; is it a llama-server?") from error
        return found

    def _stream(
        self, request: Dict[str, Any], softprompts: Sequence[SoftPrompt], ids: Sequence[int]
    ) -> Generator[Dict[str, Any], None, None]:
        """The parts of an answer, the first of which has shown that the state was used; with the lock held."""
        self._check_model()
        slot = self._state_of(softprompts) if softprompts else Slot("", (), False)
        prompt = [*slot.ids, *(ids[1:] if slot.takes_bos else ids)]
        request = {**request, "prompt": prompt, "id_slot": self._slot, "cache_prompt": True}
        for attempt in range(2):
            if slot.ids and (attempt or self._restored != slot.ids):
                self._restore(slot)
            with closing(self._completion(request)) as answers:
                try:
                    first = next(answers)
                except StopIteration:
                    raise EngineRefused(f"{self._url} ended its answer before it began.") from None
                used = first.get("timings", {}).get("cache_n")
                if not slot.ids or (isinstance(used, int) and used >= len(slot.ids)):
                    # Text without a soft prompt, or with another, takes the slot.
                    self._restored = slot.ids
                    yield first
                    yield from answers
                    return
            self._erase()  # what it has read for the ids is no soft prompt
        raise SoftPromptNotRead(
            f"{self._url} did not use the soft prompt's state ({used} of {len(slot.ids)} tokens); its answer is not "
            "shown. Start it with --kv-unified --no-cache-idle-slots where it has several slots, and with --swa-full "
            "for a model with a sliding window."
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
            raise SoftPromptNotRead(f"{self._url} restored {answer.get('n_restored')} of {len(slot.ids)} tokens.")

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
            raise WrongModel(f"{self._url} has {loaded or 'another model'} loaded, and not {self._file.path}.")
        context = props.get("default_generation_settings", {}).get("n_ctx")
        if not isinstance(context, int) or context <= 0:
            raise EngineRefused(f"{self._url} does not tell its context; is it a llama-server?")
        return context

    def _ids_of(self, text: str) -> List[int]:
        answer = self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        ids = answer.get("tokens")
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise EngineRefused(f"{self._url} made no tokens of a text; is it a llama-server?")
        return ids

    def token_text(self, token_id: int) -> str:
        """One token as text."""
        return str(self._ask("/detokenize", {"tokens": [token_id]}).get("content") or token_id)

    def _ask(self, path: str, body: Optional[Dict[str, Any]] = None, seconds: float = _SECONDS) -> Dict[str, Any]:
        with self._open(path, body, seconds) as response:
            try:
                answer = json.loads(response.read(_LONGEST_ANSWER))
            except ValueError as error:
                raise EngineRefused(f"{self._url} answered something else than JSON; is it a llama-server?") from error
        if not isinstance(answer, dict):
            raise EngineRefused(f"{self._url} answered something else than was asked; is it a llama-server?")
        return answer

    def _completion(self, body: Dict[str, Any]) -> Generator[Dict[str, Any], None, None]:
        """The answer, in parts if it is streamed; closing it ends the generation in the server."""
        if not body["stream"]:
            yield self._ask("/completion", body, _READING_SECONDS)
            return
        with self._open("/completion", body, _READING_SECONDS) as response:
            for raw in iter(lambda: response.readline(_LONGEST_ANSWER), b""):
                name, _, text = raw.partition(b":")
                if name not in (b"data", b"error") or text.strip() == b"[DONE]":
                    continue
                try:
                    part = json.loads(text)
                except ValueError as error:
                    raise EngineRefused(f"{self._url} sent something that is no JSON.") from error
                if name == b"error" or "error" in part:
                    raise EngineRefused(f"{self._url} says: {_message(part)}")
                yield part
                if part.get("stop"):
                    return
        raise EngineUnreachable(f"{self._url} ended within its answer.")

    @contextmanager
    def _open(self, path: str, body: Optional[Dict[str, Any]], seconds: float) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode("utf-8")
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method="GET" if data is None else "POST"
        )
        try:
            with _OPENER.open(request, timeout=seconds) as response:
                yield response
        except urllib.error.HTTPError as error:
            with error:
                try:
                    said = _message(json.loads(error.read(_LONGEST_ANSWER)))
                except ValueError:
                    said = str(error.reason)
            if error.code == 503:
                raise EngineUnreachable(f"{self._url} is not ready: {said}") from error
            raise EngineRefused(f"{self._url} refuses ({error.code}): {said}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._restored = ()
            reason = getattr(error, "reason", None) or error
            raise EngineUnreachable(f"{self._url} does not answer: {reason}. Is llama-server running?") from error


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the proxy of the environment: the server is near."""


def _request(settings: GenerationSettings, last: int) -> Dict[str, Any]:
    """The settings in llama-server's words, with the samplers in the order of transformers."""
    greedy = min(settings.temperature, settings.top_p) < GREEDY_BELOW
    return {
        "stream": True,
        "timings_per_token": True,  # so that the first part tells what of the prompt was not read again
        "n_predict": settings.max_length,
        "temperature": 0.0 if greedy else settings.temperature,
        "top_k": 1 if greedy else settings.top_k,
        "top_p": settings.top_p,
        "typical_p": max(settings.typical, 1e-6),
        "min_p": 0.0,
        "repeat_penalty": settings.rep_pen,
        "repeat_last_n": last,
        "samplers": ["penalties", "top_k"] if greedy else ["penalties", "temperature", "top_k", "top_p", "typ_p"],
        "stop": [each for each in settings.stop_sequence if each],
        "seed": secrets.randbits(31) if settings.seed is None else settings.seed % 0xFFFFFFFF,
    }


def _message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
