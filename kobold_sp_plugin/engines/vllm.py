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
from io import BytesIO
from typing import Any, Dict, Generator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..compatibility.matrix import Matrix
from ..compatibility.model_facts import matrix_in_folder
from ..errors import (
    EngineRefused,
    ModelError,
    NoEmbedding,
    WrongModel,
)
from ..formats import torch_file
from ..formats.archive import write_members
from ..soft_tokens.text import runs_of, without_soft_tokens
from ..softprompt import Order, SoftPrompt
from . import GREEDY_BELOW, Ending, GenerationSettings
from .lacking import is_drawn, lacking
from .remote import Remote
from .samplers import REPETITION_PENALTY, TEMPERATURE, TOP_K, TOP_P
from .vllm_model import TOP, VllmModel

_JOINED = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""A chat template that adds nothing: no roles, no line ends."""
_MOST_ENCODED = 8
"""Soft prompts that are kept in the form in which they are sent."""


class VllmServer(VllmModel):
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
        config, tokenizer = _configuration_and_tokenizer(path, named=model is not None)
        super().__init__(path, config, tokenizer, served.get("max_model_len"))
        self._encoded: OrderedDict[SoftPrompt, str] = OrderedDict()
        self._encoding = threading.Lock()
        self._matrix = self._probe()

    def _probe(self) -> Optional[Matrix]:
        """Have the server read one row; None: it takes our template, else the matrix to embed texts with.

        Raises :class:`WrongModel` or :class:`EngineRefused`.
        """
        row = _encode(np.full((1, self._width), 0.01, np.float32))
        try:
            self._remote.ask("/v1/chat/completions", {**self._chat([_part(row), "."]), "max_tokens": 1}, 120)
            return None
        except EngineRefused as error:
            self._explain(error)
            if "chat template" not in str(error).lower() and "chat_template" not in str(error).lower():
                raise
        try:
            self._remote.ask("/v1/completions", {"model": self._id, "prompt_embeds": row, "max_tokens": 1}, 120)
        except EngineRefused as error:
            self._explain(error)
            raise
        try:
            matrix = matrix_in_folder(self._path)
        except (NoEmbedding, ModelError, OSError) as error:
            raise EngineRefused(
                f"{self._remote.url} does not take our chat template, and {self._path} holds no weights to embed texts "
                f"with instead. {_START}"
            ) from error
        if matrix.scale is None:
            matrix = matrix._replace(scale=self._scale())
        return matrix

    def _explain(self, error: EngineRefused) -> None:
        """Raise what a refusal of the first row means, where that is known."""
        said = str(error)
        if "hidden_size" in said:
            raise WrongModel(
                f"The server has another model than {self._path}, which has {self._width} columns: {said}"
            ) from error
        if "enable-prompt-embeds" in said or "enable_prompt_embeds" in said:
            raise EngineRefused(f"{self._remote.url} takes no soft prompts: {_START}") from error

    def _next_tokens(self, probe: str, softprompts: Sequence[SoftPrompt]) -> Dict[str, float]:
        """Probabilities of the likeliest next tokens."""
        prompt = self._prompt(GenerationSettings(probe, max_length=1), softprompts)
        body = {**prompt.body, "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
        body.update({"logprobs": True, "top_logprobs": TOP} if prompt.is_chat else {"logprobs": TOP})
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

        Closing the iterator or setting ``stop`` ends it on the server too. What vLLM does not do of the settings is
        left out; :meth:`lacking` tells. Soft prompts that stand in the text itself (:class:`TaggedText`) are read
        there. Raises :class:`ContextExceeded`, or from the iterator an :class:`EngineError`.
        """
        chosen = self._selected if softprompts is None else tuple(softprompts)
        return self._pieces(self._prompt(settings, chosen), settings, stop or threading.Event())

    def lacking(self, settings: GenerationSettings) -> Tuple[str, ...]:
        """What of these settings vLLM does not do, or does in its own way: a sentence each."""
        found = lacking_in_vllm(settings)
        if self._matrix is not None and settings.rep_pen != 1:
            found.append("vLLM sees no text but its own here: rep_pen does not count the prompt's tokens.")
        return tuple(found)

    def _pieces(
        self, prompt: "_Prompt", settings: GenerationSettings, stop: threading.Event
    ) -> Generator[str, None, Ending]:
        wanted = sampling(settings, self._banned(settings))
        body = {**prompt.body, **wanted, "stream": True, "stream_options": {"include_usage": True}}
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
            events.close()
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
        settings, softprompts, ids = self._fitted(settings, softprompts)
        n_text = len(without_soft_tokens(ids))
        if not softprompts and n_text == len(ids):
            return _Prompt("/v1/completions", {"model": self._id, "prompt": ids}, n_text)
        before = [each for each in softprompts if each.order is Order.BEFORE_BOS]
        after = [each for each in softprompts if each.order is Order.AFTER_BOS]
        begins = self._reader.begins(ids)
        if self._matrix is None:
            start = [str(self._tokenizer.bos_token)] if begins else []
            texts = self._reader.written(settings, ids, is_first=not (softprompts or begins))
            contents = [
                self._part_of(each) if isinstance(each, SoftPrompt) else each
                for each in (*before, *start, *after, *texts)
            ]
            return _Prompt("/v1/chat/completions", self._chat(contents), n_text)
        rows = [*map(self._rows_of, before), self._words(ids[:begins]), *map(self._rows_of, after)]
        for run, softprompt, _ in runs_of(ids[begins:]):
            rows.append(self._words(run) if softprompt is None else self._rows_of(softprompt))
        body = {"model": self._id, "prompt_embeds": _encode(np.concatenate(rows)), "return_token_ids": True}
        return _Prompt("/v1/completions", body, n_text, loses_space=True)

    def _words(self, ids: Sequence[int]) -> np.ndarray:
        """Rows of the model's own matrix, as they leave the embedding module."""
        matrix = self._matrix
        assert matrix is not None
        return matrix.rows(np.array(ids, dtype=np.int64)) * np.float32(matrix.scale or 1.0)

    def _chat(self, contents: Sequence[Any]) -> Dict[str, Any]:
        return {
            "model": self._id,
            "messages": [{"role": "user", "content": content} for content in contents],
            "chat_template": _JOINED,
            "add_generation_prompt": False,
        }

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


_LARGEST = 2**31 - 1
_NEVER = -100.0
"""The lowest bias that vLLM takes."""
_FIXED = (
    (REPETITION_PENALTY, TOP_K),
    (REPETITION_PENALTY, TOP_P),
    (TEMPERATURE, TOP_P),
    (TOP_K, TOP_P),
)
"""Samplers whose order makes a difference, as vLLM has it."""

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


def sampling(settings: GenerationSettings, banned: Sequence[int]) -> Dict[str, Any]:
    """The settings in vLLM's words. ``banned``: ids that must not come."""
    greedy = min(settings.temperature, settings.top_p) < GREEDY_BELOW
    body: Dict[str, Any] = {
        "max_tokens": settings.max_length,
        "temperature": 0 if greedy else settings.temperature,
        "top_p": 1.0 if greedy else settings.top_p,
        "top_k": min(settings.top_k, _LARGEST) or -1,
        "min_p": 0.0 if greedy else _min_p(settings),
        "repetition_penalty": settings.rep_pen,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "ignore_eos": settings.ban_eos,
        "stop": list(settings.stop_sequence),
        "include_stop_str_in_output": settings.keep_stop,
    }
    biases = {**dict(settings.logit_bias), **dict.fromkeys(banned, _NEVER)}
    if biases:
        body["logit_bias"] = {str(token): bias for token, bias in biases.items()}
    words = [word for word in settings.bad_words if len(word) > 1]
    if words:
        body["bad_words"] = words
    if settings.seed is not None:
        body["seed"] = settings.seed
    return body


def _min_p(settings: GenerationSettings) -> float:
    """vLLM compares after the temperature; where the client has it later, a value by which the same tokens stay."""
    if [number for number in settings.sampler_order if number in (TOP_P, TEMPERATURE)] == [TOP_P, TEMPERATURE]:
        return float(settings.min_p ** (1 / settings.temperature))
    return settings.min_p


def lacking_in_vllm(settings: GenerationSettings) -> List[str]:
    """What of these settings vLLM does not do, or does in its own way: a sentence each."""
    found = lacking(settings, ("top_a", "tfs", "typical", "rep_pen_range", "rep_pen_slope"), "vLLM")
    used = {
        TOP_K: settings.top_k > 0,
        TOP_P: settings.top_p < 1,
        TEMPERATURE: settings.temperature != 1,
        REPETITION_PENALTY: settings.rep_pen != 1,
    }
    order = [number for number in settings.sampler_order if used.get(number)]
    both_used = [pair for pair in _FIXED if {*pair} <= {*order}]
    is_other = any(order.index(first) > order.index(then) for first, then in both_used)
    if is_drawn(settings) and (is_other or (settings.min_p > 0 and settings.top_p < 1)):
        found.append("vLLM has an order of its own: penalties, temperature, min_p, top_k, top_p.")
    if any(len(word) > 1 for word in settings.bad_words):
        found.append("vLLM: a banned word can still come, written with other tokens than its own.")
    return found


def _encode(rows: np.ndarray) -> str:
    """Rows as a request carries them: base64 of a file of ``torch.save``."""
    file = BytesIO()
    write_members(file, torch_file.write_zip(np.ascontiguousarray(rows, np.float32), "float32", rows.shape))
    return base64.b64encode(file.getvalue()).decode("ascii")


def _part(data: str) -> List[Dict[str, str]]:
    return [{"type": "prompt_embeds", "data": data}]
