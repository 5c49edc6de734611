"""A vLLM server, 0.21 or later, as it is: soft prompts go with each request as ``prompt_embeds``.

Two ways in. In a chat, rows are one part of a message, and a template of ours, which only joins the messages,
makes a plain text of it: the server tokenises and embeds, samplers see the text. It takes
``--trust-request-chat-template``. Without that the whole prompt is embedded here, with the model's own matrix, and
sent as one ``prompt_embeds``. Both take ``--enable-prompt-embeds``. The server keeps the keys and values of whole
blocks of rows by their content, so that the next request finds those of the soft prompt.
Source: ``vllm/renderers/embed_utils.py``; ``vllm/entrypoints/chat_utils.py``.
"""

import base64
import math
import threading
from collections import OrderedDict
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Dict, Generator, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..compatibility import ModelFacts, facts
from ..compatibility.matrix import Matrix
from ..compatibility.model_facts import matrix_in_folder
from ..errors import (
    ContextExceeded,
    EngineRefused,
    ModelError,
    NoEmbedding,
    SoftPromptError,
    UnknownScale,
    WidthMismatch,
    WrongModel,
)
from ..formats import torch_file
from ..formats.archive import write_members
from ..softprompt import Order, Scale, SoftPrompt
from . import GREEDY_BELOW, PROBES, Effect, Ending, GenerationSettings
from .remote import Remote

_JOINED = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""A chat template that adds nothing: no roles, no line ends."""
_MOST_ENCODED = 8
"""Soft prompts that are kept in the form in which they are sent."""
_TOP = 20
"""Likeliest tokens that a server tells of where nothing else was configured."""


class VllmEngine:
    """Generates on a vLLM server. What it needs of the model is read from ``model``: its configuration and tokenizer,
    and, where they are there, some rows of its embedding matrix for the fingerprint; never the rest of its weights.

    ``model``: a folder, or a name on the hub; where it is None, what the server names, if that can be found from
    here. Raises :class:`EngineUnreachable`, :class:`EngineRefused`, whose text says how to start the server, or
    :class:`WrongModel`.
    """

    def __init__(self, url: str, model: Optional[str] = None, api_key: Optional[str] = None):
        self._remote = Remote(url, api_key)
        served = _served(self._remote)
        self._id = served["id"]
        path = model or str(served.get("root") or self._id)
        config, self._tokenizer = _configuration_and_tokenizer(path, named=model is not None)
        self.name = Path(path).resolve().name if Path(path).is_dir() else path
        known = facts(path, self.name) if Path(path).is_dir() else facts(config, self.name)
        limits = [each for each in (served.get("max_model_len"), known.context) if isinstance(each, int)]
        self._facts = replace(known, context=min(limits) if limits else None)
        self._path = path
        self._encoded: OrderedDict[SoftPrompt, str] = OrderedDict()
        self._encoding = threading.Lock()
        self._selected: Tuple[SoftPrompt, ...] = ()
        self._matrix = self._probe()

    def _probe(self) -> Optional[Matrix]:
        """Have the server read one row; None: it takes our template, else the matrix to embed texts with.

        Raises :class:`WrongModel` or :class:`EngineRefused`.
        """
        width = self._facts.width
        if width is None:
            raise ModelError(f"{self._path} does not tell how wide its embedding is.")
        row = _encode(np.full((1, width), 0.01, np.float32))
        try:
            self._remote.ask("/v1/chat/completions", {**self._chat([_part(row), "."]), "max_tokens": 1}, 120)
            return None
        except EngineRefused as error:
            said = str(error)
            if "hidden_size" in said:
                raise WrongModel(
                    f"The server has another model than {self._path}, which has {width} columns: {said}"
                ) from error
            if "enable-prompt-embeds" in said or "enable_prompt_embeds" in said:
                raise EngineRefused(f"{self._remote.url} takes no soft prompts: {_START}") from error
            if "chat template" not in said.lower() and "chat_template" not in said.lower():
                raise
        try:
            matrix = matrix_in_folder(self._path)
        except (NoEmbedding, ModelError, OSError) as error:
            raise EngineRefused(
                f"{self._remote.url} does not take our chat template, and {self._path} holds no weights to embed texts "
                f"with instead. {_START}"
            ) from error
        if matrix.scale is None:
            raise EngineRefused(f"It is not known by what {self._path} multiplies its embeddings. {_START}")
        self._remote.ask("/v1/completions", {"model": self._id, "prompt_embeds": row, "max_tokens": 1}, 120)
        return matrix

    @property
    def alive(self) -> bool:
        """True: a server that is down may come back; until then each request says so."""
        return True

    @property
    def context(self) -> Optional[int]:
        """Tokens that the model can attend to, or as many as the server was started for."""
        return self._facts.context

    def facts(self) -> ModelFacts:
        """What is known of the model from here, with the server's context."""
        return self._facts

    def select(self, softprompts: Sequence[SoftPrompt]) -> None:
        """Make these, in order, the soft prompts of generations that begin from now on.

        Raises :class:`WidthMismatch` or :class:`UnknownScale`; the selection is then what it was.
        """
        for each in softprompts:
            self._data_of(each)
        self._selected = tuple(softprompts)

    def effect(self, softprompts: Sequence[SoftPrompt]) -> Effect:
        """Mean total variation of the next-token distribution with and without, over ``PROBES``: 0 to 1.

        A server tells of the likeliest tokens only: what the others have is counted as one token, so that the true
        figure is at least this.
        """
        without = [self._next_tokens(probe, ()) for probe in PROBES]
        having = [self._next_tokens(probe, softprompts) for probe in PROBES]
        return Effect(
            min(1.0, _mean(_distance(one, other) for one, other in zip(having, without))),
            _mean(map(_entropy, having)),
            _mean(map(_entropy, without)),
            _mean(_distance(one, other) for one in having for other in having),
            _mean(_distance(one, other) for one in without for other in without),
        )

    def _next_tokens(self, probe: str, softprompts: Sequence[SoftPrompt]) -> Dict[str, float]:
        """Probabilities of the likeliest next tokens."""
        prompt = self._prompt(GenerationSettings(probe, max_length=1), softprompts)
        body = {**prompt.body, "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
        body.update({"logprobs": True, "top_logprobs": _TOP} if prompt.is_chat else {"logprobs": _TOP})
        answer = self._remote.ask(prompt.route, body, 120)["choices"][0]["logprobs"]
        if prompt.is_chat:
            top = {each["token"]: each["logprob"] for each in answer["content"][0]["top_logprobs"]}
        else:
            top = answer["top_logprobs"][0]
        return {token: math.exp(logprob) for token, logprob in top.items()}

    def generate(
        self,
        settings: GenerationSettings,
        softprompts: Optional[Sequence[SoftPrompt]] = None,
        stop: Optional[threading.Event] = None,
    ) -> Generator[str, None, Ending]:
        """Text, piece by piece, with these soft prompts in place of the selection unless None.

        Closing the iterator or setting ``stop`` ends it on the server too. KoboldAI's samplers that vLLM does not
        have (top-a, tail-free, typical, the slope and range of the repetition penalty, an order) are left out.
        Raises :class:`ContextExceeded`, or from the iterator an :class:`EngineError`.
        """
        chosen = self._selected if softprompts is None else tuple(softprompts)
        return self._pieces(self._prompt(settings, chosen), settings, stop or threading.Event())

    def _pieces(
        self, prompt: "_Prompt", settings: GenerationSettings, stop: threading.Event
    ) -> Generator[str, None, Ending]:
        body = {**prompt.body, **_sampling(settings), "stream": True, "stream_options": {"include_usage": True}}
        reason, n_new = "stop", 0
        lost_space = prompt.loses_space
        events = self._remote.stream(prompt.route, body, stop)
        try:
            for event in events:
                n_new = (event.get("usage") or {}).get("completion_tokens", n_new)
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content") if prompt.is_chat else choice.get("text")
                    reason = choice.get("finish_reason") or reason
                    if piece:
                        if lost_space and self._began_with_space(choice.get("token_ids")):
                            piece = " " + piece
                        lost_space = False
                        yield piece
        finally:
            events.close()  # type: ignore[attr-defined]
        return Ending("length" if reason == "length" and not stop.is_set() else "stop", prompt.n_text, n_new)

    def _began_with_space(self, token_ids: Optional[Sequence[int]]) -> bool:
        """Whether the text of the first of these begins with a space, of which a server that saw no text lets go."""
        if not token_ids:
            return False
        anchor = self._tokenizer("x", add_special_tokens=False)["input_ids"][-1:]
        both, alone = (self._tokenizer.decode(ids) for ids in ([*anchor, token_ids[0]], anchor))
        return bool(both[len(alone) :].startswith(" "))

    # The prompt

    def _prompt(self, settings: GenerationSettings, softprompts: Sequence[SoftPrompt]) -> "_Prompt":
        """The request for this text behind these soft prompts, cut to what the context has room for."""
        n_soft = sum(each.n_tokens for each in softprompts)
        start, text, ids = self._fit(settings, n_soft)
        if not softprompts:
            return _Prompt("/v1/completions", {"model": self._id, "prompt": ids}, len(ids))
        before = [each for each in softprompts if each.order is Order.BEFORE_BOS]
        after = [each for each in softprompts if each.order is Order.AFTER_BOS]
        if self._matrix is None:
            texts = [*map(self._part_of, before), start, *map(self._part_of, after), text]
            return _Prompt("/v1/chat/completions", self._chat([each for each in texts if each]), len(ids))
        begins = self._tokenizer.bos_token_id is not None and ids[:1] == [self._tokenizer.bos_token_id]
        words = self._matrix.rows(np.array(ids)) * np.float32(self._matrix.scale or 1.0)
        rows = [*map(self._rows_of, before), words[:begins], *map(self._rows_of, after), words[begins:]]
        body = {"model": self._id, "prompt_embeds": _encode(np.concatenate(rows)), "return_token_ids": True}
        return _Prompt("/v1/completions", body, len(ids), loses_space=True)

    def _chat(self, contents: Sequence[Any]) -> Dict[str, Any]:
        return {
            "model": self._id,
            "messages": [{"role": "user", "content": content} for content in contents],
            "chat_template": _JOINED,
            "add_generation_prompt": False,
        }

    def _fit(self, settings: GenerationSettings, n_soft: int) -> Tuple[str, str, List[int]]:
        """What a text begins with, the text, as much of the story's end as there is room for, and the ids of both."""
        beginning = list(self._tokenizer("")["input_ids"])
        bos = self._tokenizer.bos_token_id
        beginning = beginning[:1] if bos is not None and beginning[:1] == [bos] else []
        start = self._tokenizer.bos_token if beginning else ""

        def ids_of(text: str) -> List[int]:
            return beginning + list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

        story = settings.prompt
        ids = ids_of(settings.memory + story)
        limits = [limit for limit in (self.context, settings.max_context_length) if limit is not None]
        if limits:
            room = min(limits) - n_soft - settings.max_length
            if len(ids_of(settings.memory)) >= room:
                soft = f"{n_soft} of soft prompts and " if n_soft else ""
                raise ContextExceeded(
                    f"A context of {min(limits)} tokens has no room for the story beside {soft}{settings.max_length} "
                    "of new text."
                )
            while len(ids) > room:  # the end of a text, alone, may have a token more than it had in the whole
                places = self._tokenizer(story, add_special_tokens=False, return_offsets_mapping=True)
                begins = [start for start, _ in places["offset_mapping"]]
                story = story[begins[min(len(ids) - room, len(begins) - 1)] or 1 :]
                ids = ids_of(settings.memory + story)
        if not ids:
            raise ModelError(f"{self.name} has no token that a text can begin with; the prompt must not be empty.")
        return start, settings.memory + story, ids

    # Soft prompts, as they are sent

    def _part_of(self, softprompt: SoftPrompt) -> List[Dict[str, str]]:
        return _part(self._data_of(softprompt))

    def _data_of(self, softprompt: SoftPrompt) -> str:
        with self._encoding:
            data = self._encoded.get(softprompt)
            if data is None:
                data = self._encoded[softprompt] = _encode(self._rows_of(softprompt))
            self._encoded.move_to_end(softprompt)
            while len(self._encoded) > _MOST_ENCODED:
                self._encoded.popitem(last=False)
            return data

    def _rows_of(self, softprompt: SoftPrompt) -> np.ndarray:
        """Its rows as they leave the embedding module, which is what the server takes."""
        width = self._facts.width
        if softprompt.width != width:  # checked here: one of another width can end the server
            raise WidthMismatch(
                f"{softprompt.name or 'the soft prompt'} was made for {softprompt.width} columns, "
                f"{self.name} has {width}"
            )
        if softprompt.scale is Scale.MODULE:
            return softprompt.rows
        return softprompt.rows * np.float32(self._scale())

    def _scale(self) -> float:
        from .embed_scale import embed_scale

        try:
            return embed_scale(self._path, self._facts.width or 0)
        except SoftPromptError as error:
            raise UnknownScale(
                f"rows as they stand in the matrix, and {self.name}'s scale is not known ({error})",
                "rows as they leave the embedding module",
            ) from error


class _Prompt(NamedTuple):
    """One request, without its sampling."""

    route: str
    body: Dict[str, Any]
    n_text: int
    loses_space: bool = False
    """Whether the server has no text before its own, and so drops the space that its first word may begin with."""

    @property
    def is_chat(self) -> bool:
        return "chat" in self.route


_START = "Start it with: vllm serve MODEL --enable-prompt-embeds --trust-request-chat-template"


def _served(remote: Remote) -> Dict[str, Any]:
    """The model that the server has, as ``/v1/models`` tells it; not an adapter of it."""
    answer = remote.ask("/v1/models")
    models = answer.get("data") if isinstance(answer, dict) else None
    for each in models if isinstance(models, list) else ():
        if isinstance(each, dict) and isinstance(each.get("id"), str) and not each.get("parent"):
            return each
    raise EngineRefused(f"{remote.url} names no model; is it a vLLM server?")


def _configuration_and_tokenizer(path: str, named: bool) -> Tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return config, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library has many
        told = str(error).strip().splitlines() or [type(error).__name__]
        if named:
            raise ModelError(f"{path} has no configuration and tokenizer that can be read: {told[0]}") from error
        raise ModelError(
            f"The server has {path}, which cannot be found from here: name a folder with that model's configuration "
            "and tokenizer with --model"
        ) from error


def _sampling(settings: GenerationSettings) -> Dict[str, Any]:
    """The settings in vLLM's words."""
    greedy = min(settings.temperature, settings.top_p) < GREEDY_BELOW
    body: Dict[str, Any] = {
        "max_tokens": settings.max_length,
        "temperature": 0 if greedy else settings.temperature,
        "top_p": 1.0 if greedy else settings.top_p,
        "top_k": settings.top_k or -1,
        "min_p": settings.min_p,
        "repetition_penalty": settings.rep_pen,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "ignore_eos": settings.ban_eos,
        "stop": list(settings.stop_sequence),
        "include_stop_str_in_output": settings.keep_stop,
    }
    if settings.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in settings.logit_bias}
    if settings.bad_words:
        body["bad_words"] = list(settings.bad_words)
    if settings.seed is not None:
        body["seed"] = settings.seed
    return body


def _encode(rows: np.ndarray) -> str:
    """Rows as a request carries them: base64 of a file of ``torch.save``."""
    file = BytesIO()
    write_members(file, torch_file.write_zip(np.ascontiguousarray(rows, np.float32), "float32", rows.shape))
    return base64.b64encode(file.getvalue()).decode("ascii")


def _part(data: str) -> List[Dict[str, str]]:
    return [{"type": "prompt_embeds", "data": data}]


def _distance(one: Dict[str, float], other: Dict[str, float]) -> float:
    """Total variation, with all tokens that are not named in either as one."""
    named = {*one, *other}
    rest = abs(sum(one.values()) - sum(other.values()))
    return (sum(abs(one.get(each, 0.0) - other.get(each, 0.0)) for each in named) + rest) / 2


def _entropy(distribution: Dict[str, float]) -> float:
    rest = max(0.0, 1.0 - sum(distribution.values()))
    return -sum(each * math.log(each) for each in (*distribution.values(), rest) if each > 0)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
