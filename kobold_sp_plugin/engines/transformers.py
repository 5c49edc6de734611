"""A transformers model in this process: text piece by piece, one generation at a time.

One mechanism serves every release: a stopping criterion. It sees the ids after each new token, makes
text of them, and answers whether to stop; streamers came later than our lowest release.
"""

import logging
import secrets
import threading
import weakref
from pathlib import Path, PureWindowsPath
from queue import SimpleQueue
from typing import Any, Callable, ContextManager, Dict, Generator, List, Optional, Sequence, Tuple, Union

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers import __version__ as transformers_version

from ..compatibility import ModelFacts, context_of, facts
from ..compatibility.matrix import Matrix, matrix_of
from ..errors import ModelError, NoModel, UnsupportedModel
from ..soft_tokens import SoftTokens, attach, attached
from ..soft_tokens.text import without_soft_tokens
from ..softprompt import SoftPrompt
from . import GREEDY_BELOW, PROBES, Effect, Ending, GenerationSettings
from .detokenizer import UNFINISHED, Detokenizer
from .effects import effect_of
from .fitting import fit
from .samplers import samplers
from .tokenizer import Tokenizer
from .turns import Turns

log = logging.getLogger(__name__)

_RANDOM = threading.Lock()
"""torch draws from one stream per process: one generation at a time sets it and draws from it."""

_Piece = Union[str, BaseException, Ending]
"""Text; how it ended; or the error that ended it."""

_MOST_LOGITS = 2**25
"""Of a batch of probes: 128 MB in float32."""


def load_transformers(path: Union[str, Path], **options: Any) -> Tuple[Any, Any, str]:
    """Load a causal model and its tokenizer, from a folder or by its name on the hub: (model, tokenizer, name).

    The model is in evaluation mode without gradients; on a GPU in the dtype it is stored in, else in
    float32. With ``options``, for ``from_pretrained``, it stays as they have it. Raises :class:`ModelError`.
    """
    if _is_a_path(str(path)) and not Path(path).is_dir():
        raise ModelError(f"There is no folder {path}.")
    auto_dtype = {"torch_dtype": "auto"} if int(transformers_version.split(".")[0]) < 5 else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), **(options or auto_dtype))
    except KeyError as error:  # how releases before 4.30 say it
        raise ModelError(
            f"{path} cannot be loaded: transformers {transformers_version} knows no models of the type {error}"
        ) from error
    except Exception as error:  # each library that reads weights has errors of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path} cannot be loaded as a causal language model: {lines[0]}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:
        raise ModelError(f"{path} has no tokenizer that transformers can load.") from error
    if not options:
        model = model.to("cuda") if torch.cuda.is_available() else model.float()
    model.eval().requires_grad_(False)
    return model, tokenizer, Path(path).resolve().name if Path(path).is_dir() else str(path)


def _is_a_path(name: str) -> bool:
    """Whether this can be no name on the hub: those are ``name`` or ``owner/name``."""
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1 or bool(PureWindowsPath(name).drive)


def _gone() -> None:
    """The model of an engine that was closed."""


class TransformersEngine:
    """Generates with a model that is already loaded; the model gets soft tokens, and is held weakly.

    ``lock`` is held while the model generates. A host that generates by itself takes it too, so that a
    measurement waits. Raises :class:`UnsupportedModel` for a model with an encoder: what it writes does not
    continue the text.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str):
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{type(model).__name__} has an encoder; it answers a text, but continues none")
        self.name = name
        self.lock = Turns()
        self._model: Callable[[], Any] = weakref.ref(model)
        self._tokenizer = tokenizer
        self._reader = Tokenizer(tokenizer, name)
        self._context = context_of(model)
        self._facts: Optional[ModelFacts] = None
        self._measuring = threading.Lock()
        attach(model)

    @property
    def alive(self) -> bool:
        """Whether the model still exists."""
        return self._model() is not None

    def close(self) -> None:
        """Let the model go for good, so that who detaches it finds it as it stays: no measurement attaches it again.

        Waits for the forward pass of a measurement, never for a generation.
        """
        with self._measuring:
            model = self._model()
            handle = None if model is None else attached(model)
            if handle is not None:
                handle.forget()
            self._model = _gone

    @property
    def context(self) -> Optional[int]:
        """Tokens that the model can attend to, or None where its config does not tell."""
        return self._context

    def facts(self) -> ModelFacts:
        """Name, width, context and fingerprint; the matrix is read at the first call."""
        if self._facts is None:
            self._facts = facts(self._existing(), self.name)
        return self._facts

    def select(self, softprompts: Sequence[SoftPrompt]) -> None:
        """Make these, in order, the soft prompts of generations that begin from now on.

        A model that is gone, or that was detached, has none and gets none. Raises :class:`WidthMismatch`; the
        selection is then what it was.
        """
        model = self._model()
        handle = attached(model) if model is not None else None
        if handle is not None:
            handle.select(softprompts)

    def override(self, softprompts: Sequence[SoftPrompt]) -> ContextManager[None]:
        """Have what a host generates in this thread, inside the ``with`` block, read these and not the selection."""
        return self._handle_of(self._existing()).override(softprompts)

    def effect(self, softprompts: Sequence[SoftPrompt]) -> Effect:
        """Mean total-variation distance of the next-token distribution with and without, over ``PROBES``: 0 to 1.

        Runs the model for one forward pass at a time, in between generations: none waits for more than that.
        """
        return effect_of(self._next_tokens(()).cpu().numpy(), self._next_tokens(softprompts).cpu().numpy())

    def _next_tokens(self, softprompts: Sequence[SoftPrompt]) -> torch.Tensor:
        """``[len(PROBES), vocabulary]``: the distribution of the token after each probe, with these soft prompts.

        As many probes at a time as keep the logits below 128 MB; padding stands on the right, where a causal model
        does not see it.
        """
        probes = [self._reader.ids(probe) for probe in PROBES]
        length = max(map(len, probes))
        n_tokens = sum(softprompt.n_tokens for softprompt in softprompts)
        found: List[torch.Tensor] = []
        while len(found) < len(probes):
            with self.lock.in_between(), self._measuring, torch.no_grad():
                model = self._existing()  # not before: who waits for the lock must not keep a model alive
                handle = self._handle_of(model)
                vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None) or 2**18
                at_once = max(1, _MOST_LOGITS // (vocabulary * (n_tokens + length)))
                part = probes[len(found) : len(found) + at_once]
                padded = [text + [self._pad_id()] * (length - len(text)) for text in part]
                ids = torch.tensor(padded, device=_device_of(model))
                mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in part], device=ids.device)
                with handle.override(softprompts):
                    logits = model(**handle.prepend(ids, mask)).logits
                for row, text in zip(logits, part):
                    found.append(torch.softmax(row[len(text) - 1 - length].float(), dim=-1))
        return torch.stack(found)

    def token_text(self, token_id: int) -> str:
        """One token as text; by its name in the vocabulary where it is no whole character."""
        text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if text and UNFINISHED not in text:
            return text
        return str(self._tokenizer.convert_ids_to_tokens(token_id) or token_id)

    def matrix(self) -> Matrix:
        """The model's embedding matrix, by its rows. Raises :class:`NoEmbedding` or :class:`NoModel`."""
        return matrix_of(self._existing())

    def token_ids(self, text: str) -> List[int]:
        """The ids that the model would read for a text."""
        return self._reader.ids(text)

    def chat_prompt(self, messages: Sequence[Dict[str, Any]]) -> Optional[str]:
        """A conversation as the tokenizer's template writes it; None where it has none, or not for these messages."""
        return self._reader.chat_prompt(messages)

    def generate(
        self,
        settings: GenerationSettings,
        softprompts: Optional[Sequence[SoftPrompt]] = None,
        stop: Optional[threading.Event] = None,
    ) -> Generator[str, None, Ending]:
        """Text, piece by piece, with these soft prompts in place of the selection unless None.

        The soft prompts and the text are fixed when this is called; the model starts when the first piece
        is asked for and no other generation is running. Closing the iterator or setting ``stop`` ends it
        within one token. Soft prompts that stand in the prompt itself (:class:`TaggedText`) are read there, behind
        the others. Raises :class:`ContextExceeded` or :class:`NoModel`; what goes wrong later is
        raised from the iterator.
        """
        handle = self._handle_of(self._existing())
        chosen = handle.selection if softprompts is None else tuple(softprompts)
        ids = fit(settings, sum(softprompt.n_tokens for softprompt in chosen), self._context, self._reader)
        text = Detokenizer(self._tokenizer, without_soft_tokens(ids), settings.stop_sequence, settings.keep_stop)
        return self._pieces(handle, chosen, ids, settings, text, stop or threading.Event())

    def _pieces(
        self,
        handle: SoftTokens,
        softprompts: Sequence[SoftPrompt],
        ids: List[int],
        settings: GenerationSettings,
        text: Detokenizer,
        stop: threading.Event,
    ) -> Generator[str, None, Ending]:
        """The generation, in a thread of its own that ends before the iterator does."""
        pieces: SimpleQueue[_Piece] = SimpleQueue()
        closed = threading.Event()
        n_prompt = len(without_soft_tokens(ids))
        watcher = _Watcher(text, _n_text(ids), pieces, (stop, closed))

        def run() -> None:
            try:
                if not self.lock.acquire_unless(watcher.is_stopped):
                    pieces.put(Ending("stop", n_prompt, 0))
                    return
                try:
                    self._run(handle, softprompts, ids, settings, watcher)
                finally:
                    self.lock.release()
                has_room = watcher.n_new < settings.max_length
                pieces.put(text.rest())
                is_short = has_room or text.ended or watcher.last_id in self._end_ids()
                pieces.put(Ending("stop" if is_short else "length", n_prompt, watcher.n_new))
            except BaseException as error:  # whatever it is, the reader must not wait for ever
                pieces.put(error)

        thread = threading.Thread(target=run, name="generation", daemon=True)
        thread.start()
        try:
            while True:
                piece = pieces.get()
                if isinstance(piece, Ending):
                    return piece
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            closed.set()
            thread.join()

    def _run(
        self,
        handle: SoftTokens,
        softprompts: Sequence[SoftPrompt],
        ids: List[int],
        settings: GenerationSettings,
        watcher: "_Watcher",
    ) -> None:
        try:
            output = self._generated(handle, softprompts, ids, settings, watcher)
        except (RuntimeError, MemoryError):
            # What is kept of earlier texts must never be why there is no memory for this one.
            if not handle.forget() or watcher.n_new:
                raise
            output = None
        if output is None:  # not before: an error that is being handled holds on to tensors
            output = self._generated(handle, softprompts, ids, settings, watcher)
        output = output[:, len(ids) - _n_text(ids) :]  # the watcher never saw the soft tokens that stand in the text
        watcher.see(output)  # an end-of-sequence token ends the loop before the criterion is asked

    def _generated(
        self,
        handle: SoftTokens,
        softprompts: Sequence[SoftPrompt],
        ids: List[int],
        settings: GenerationSettings,
        watcher: "_Watcher",
    ) -> torch.Tensor:
        model = self._existing()
        device = _device_of(model)
        input_ids = torch.tensor([ids], device=device)
        gpus = [device.index or 0] if device.type == "cuda" else []
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        with _RANDOM, handle.override(softprompts), torch.no_grad(), torch.random.fork_rng(devices=gpus):
            torch.manual_seed(seed)  # torch draws from one stream per process; it is given back as it was
            with handle.remembering():  # a story is sent whole each turn; only what is new in it has to be read
                return model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=settings.max_length,
                    num_beams=1,
                    num_return_sequences=1,
                    return_dict_in_generate=False,
                    pad_token_id=self._pad_id(),
                    stopping_criteria=StoppingCriteriaList([watcher]),
                    **self._sampling(settings, _n_text(ids)),
                )

    def _sampling(self, settings: GenerationSettings, n_prompt: int) -> Dict[str, Any]:
        """How ``generate`` draws: with our own samplers; those of the model's own configuration are off."""
        greedy = min(settings.temperature, settings.top_p) < GREEDY_BELOW
        chosen = samplers(settings, n_prompt, self._end_ids(), self._reader.texts, greedy)
        off: Dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
        config = getattr(self._existing(), "generation_config", None)
        for name, neutral in (("min_p", None), ("epsilon_cutoff", 0.0), ("eta_cutoff", 0.0)):  # of later releases
            if getattr(config, name, None):
                off[name] = neutral
        off = {} if greedy else off
        return {"do_sample": not greedy, "repetition_penalty": 1.0, "logits_processor": chosen, **off}

    def _end_ids(self) -> Tuple[int, ...]:
        """The tokens that end a text."""
        model = self._existing()
        config = getattr(model, "generation_config", None) or model.config
        ids = config.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    def _pad_id(self) -> int:
        """An id for padding; with one row there is none, but transformers warns where it has to guess."""
        for token_id in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    def _handle_of(self, model: Any) -> SoftTokens:
        """The model's handle; what was detached since stays detached."""
        handle = attached(model)
        if handle is None:
            raise NoModel(f"The soft tokens of {self.name} were taken back.")
        return handle

    def _existing(self) -> Any:
        model = self._model()
        if model is None:
            raise NoModel(f"The model {self.name} is no longer loaded.")
        return model


def _n_text(ids: Sequence[int]) -> int:
    """How many of ``ids`` the decoding loop sees: those of the text, or one in its place."""
    return max(1, len(without_soft_tokens(ids)))


def _device_of(model: Any) -> torch.device:
    """Where the model takes its ids; the weights of an offloaded one are on no device."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


class _Watcher(StoppingCriteria):
    """Sees every new token inside ``generate``: passes its text on, and says when to stop."""

    def __init__(
        self,
        text: Detokenizer,
        n_prompt: int,
        pieces: "SimpleQueue[_Piece]",
        stops: Sequence[threading.Event],
    ):
        self._text = text
        self._n_seen = n_prompt
        self._pieces = pieces
        self._stops = stops
        self.n_new = 0
        self.last_id: Optional[int] = None

    def is_stopped(self) -> bool:
        return any(stop.is_set() for stop in self._stops)

    def see(self, input_ids: torch.Tensor) -> None:
        """Pass the text of what is new in ``input_ids [1, length]`` on."""
        new = input_ids[0, self._n_seen :].tolist()
        self._n_seen += len(new)
        self.n_new += len(new)
        self.last_id = new[-1] if new else self.last_id
        self._pieces.put(self._text.add(new))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.see(input_ids)
        stop = self._text.ended or self.is_stopped()
        # A tensor with one answer serves releases that ask each row, and those that ask any().
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)
