"""One model in llama.cpp, by the C functions that llama-cpp-python binds: reads ids and rows, gives logits.

Its high-level class cannot be handed embeddings, so that this stands in its place. Sequences are numbered; what one
has read can be copied to another without cost.
"""

import ctypes
import logging
import threading
from collections import deque
from importlib import import_module
from typing import Any, Deque, List, Optional, Sequence

import numpy as np
import torch

from ..errors import ContextExceeded, MissingLibrary, ModelError
from ..soft_tokens.text import WORD_STARTS

log = logging.getLogger(__name__)

_AT_ONCE = 512
"""Tokens that are read in one go; in between, a generation can be stopped."""
_ERROR = 3
"""llama.cpp's number for the gravest of what it says."""
_CALLBACKS: List[Any] = []
"""What hears it; kept, since ctypes does not."""
_SAID: Deque[str] = deque(maxlen=5)
"""The last errors that llama.cpp told."""
_LOADING = threading.Lock()


def library() -> Any:
    """llama-cpp-python, with what it says going to our logger. Raises :class:`MissingLibrary`."""
    try:
        llama = import_module("llama_cpp")
    except (ImportError, RuntimeError, FileNotFoundError, OSError) as error:  # the latter: built for another machine
        raise MissingLibrary(
            f'A GGUF file needs llama-cpp-python ({error}): pip install "kobold_sp_plugin[llama-cpp]"'
        ) from error
    if not _CALLBACKS:
        _CALLBACKS.append(llama.llama_log_callback(_hear))
        llama.llama_log_set(_CALLBACKS[0], ctypes.c_void_p(0))
    return llama


def _hear(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", "replace").strip()
    if level == _ERROR and line:
        _SAID.append(line)
    log.debug("%s", line)


class Decoder:
    """A model and its context; not for several threads at once. ``close()`` frees both.

    ``context``: tokens that all sequences together can hold. ``gpu_layers``: -1 for all, where there is a GPU.
    ``cache_type``: of keys and values, "f16" or "f32", which takes twice the memory and turns flash attention off.
    Raises :class:`ModelError` or :class:`MissingLibrary`.
    """

    def __init__(self, path: str, context: int, gpu_layers: int = -1, sequences: int = 1, cache_type: str = "f16"):
        self._llama = llama = library()
        with _LOADING:
            llama.llama_backend_init()
            options = llama.llama_model_default_params()
            options.n_gpu_layers = gpu_layers if gpu_layers >= 0 else 2**15
            _SAID.clear()
            self._model = llama.llama_model_load_from_file(path.encode("utf-8"), options)
            if not self._model:
                raise ModelError(f"llama.cpp cannot load {path}: {_said()}")
            settings = llama.llama_context_default_params()
            settings.n_ctx = context
            settings.n_batch = settings.n_ubatch = min(_AT_ONCE, context)
            settings.n_seq_max = sequences
            settings.n_threads = settings.n_threads_batch = torch.get_num_threads()  # more would wait for each other
            if cache_type == "f32":
                settings.type_k = settings.type_v = llama.GGML_TYPE_F32
                settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
            settings.kv_unified = True  # so that sequences share what they have in common
            settings.swa_full = True  # else what slides out of a window could not be gone back to
            self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            llama.llama_model_free(self._model)
            raise ModelError(f"llama.cpp has no room for a context of {context} tokens: {_said()}")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self._memory = llama.llama_get_memory(self._context)
        self.n_context = int(llama.llama_n_ctx(self._context))
        self.width = int(llama.llama_model_n_embd_inp(self._model))
        self.vocabulary = int(llama.llama_vocab_n_tokens(self._vocab))
        self.bos: Optional[int] = int(llama.llama_vocab_bos(self._vocab))
        self.bos = None if self.bos < 0 else self.bos
        self._ids = llama.llama_batch_init(settings.n_batch, 0, 1)
        self._rows = llama.llama_batch_init(settings.n_batch, self.width, 1)
        self._at_once = int(settings.n_batch)
        self._ends: Optional[List[int]] = None

    def close(self) -> None:
        """Free everything; nothing else may be called after it."""
        llama = self._llama
        llama.llama_batch_free(self._ids)
        llama.llama_batch_free(self._rows)
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)

    @property
    def model(self) -> Any:
        """For the library's own functions."""
        return self._model

    @property
    def context(self) -> Any:
        """For the library's own functions."""
        return self._context

    def ids_of(self, text: str, begin: bool = True) -> List[int]:
        """Ids of ``text``, behind what the tokenizer begins a text with; special tokens may be written out."""
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            ids = (self._llama.llama_token * room)()
            count = self._llama.llama_tokenize(self._vocab, data, len(data), ids, room, begin, True)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def text_of(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ``ids``; unfinished characters as U+FFFD. ``special``: with special tokens written out."""
        given = (self._llama.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 16
        while True:
            data = ctypes.create_string_buffer(room)
            count = self._llama.llama_detokenize(self._vocab, given, len(ids), data, room, False, special)
            if count >= 0:
                return data.raw[:count].decode("utf-8", "replace")
            room = -count

    def read_ids(self, ids: Sequence[int], position: int, sequence: int = 0) -> None:
        """Read at most :attr:`at_once` ``ids`` from ``position`` on; logits are those of the last."""
        batch = self._ids
        for number, each in enumerate(ids):
            batch.token[number] = each
        self._read(batch, len(ids), position, sequence, True)

    def read_rows(self, rows: np.ndarray, position: int, sequence: int = 0) -> None:
        """Read rows, float32 ``[n, width]`` in the scale that :func:`~..gguf.families.scale_of_rows` tells; logits are
        those of the last.
        """
        batch = self._rows
        for start in range(0, len(rows), self._at_once):
            part = np.ascontiguousarray(rows[start : start + self._at_once], dtype=np.float32)
            ctypes.memmove(batch.embd, part.ctypes.data, part.nbytes)
            self._read(batch, len(part), position + start, sequence, start + len(part) == len(rows))

    @property
    def at_once(self) -> int:
        """Ids that can be read in one go."""
        return self._at_once

    def _read(self, batch: Any, count: int, position: int, sequence: int, with_logits: bool) -> None:
        batch.n_tokens = count
        for number in range(count):
            batch.pos[number] = position + number
            batch.n_seq_id[number] = 1
            batch.seq_id[number][0] = sequence
            batch.logits[number] = with_logits and number == count - 1
        answer = self._llama.llama_decode(self._context, batch)
        if answer == 1:
            raise ContextExceeded(f"The context of {self.n_context} tokens is full.")
        if answer != 0:
            raise ModelError(f"llama.cpp cannot read this ({answer}): {_said()}")

    def logits(self) -> np.ndarray:
        """Logits after the last id or row that was read: float32 ``[vocabulary]``, a copy."""
        found = self._llama.llama_get_logits_ith(self._context, -1)
        return np.array(np.ctypeslib.as_array(found, shape=(self.vocabulary,)))

    def copy(self, source: int, target: int) -> None:
        """Have ``target``, which is empty, know what ``source`` has read."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def drop(self, sequence: int, start: int = 0) -> bool:
        """Forget what ``sequence`` has read from position ``start`` on; whether that can be done."""
        return bool(self._llama.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def save(self, path: str, ids: Sequence[int], sequence: int = 0) -> None:
        """Write what ``sequence`` has read to ``path``, as if it had been ``ids``. Raises :class:`ModelError`."""
        given = (self._llama.llama_token * len(ids))(*ids)
        if not self._llama.llama_state_seq_save_file(self._context, path.encode("utf-8"), sequence, given, len(ids)):
            raise ModelError(f"llama.cpp cannot write {path}: {_said()}")

    def begins_with_space(self) -> bool:
        """Whether a space is put before the first word of a text."""
        first = self.ids_of("a", begin=False)[0]
        return bool(
            self._llama.llama_vocab_get_text(self._vocab, first).decode("utf-8", "replace").startswith(WORD_STARTS)
        )

    def is_end(self, token: int) -> bool:
        """Whether a text ends with this token."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    def ends(self) -> List[int]:
        """The tokens that a text ends with; looked for once, since there are many to look at."""
        if self._ends is None:
            self._ends = [token for token in range(self.vocabulary) if self.is_end(token)]
        return self._ends

    def suppressed(self) -> List[int]:
        """The tokens that the file says are never to be drawn."""
        count = ctypes.c_int32()
        tokens = self._llama.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return [int(tokens[number]) for number in range(count.value)]


def _said() -> str:
    return " ".join(_SAID)[-400:] or "it does not say why"
