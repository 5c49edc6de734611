"""The hook on a model's input embedding, which gives soft tokens their rows."""

import threading
import weakref
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch

from ..errors import NoEmbedding, UnsupportedCall, UnsupportedModel
from ..patching import Patch, patch
from .rows import Rows


class Reader(NamedTuple):
    """A module beside the input embedding that is given the ids of the text too, and what stands in for a soft one."""

    mark: str
    """The module has an attribute of this name, or is one of this name."""
    stands_in: str


# What else reads ids, in the models that have it. Past the end of its table an id would be an error, or, worse,
# mean something else.
READERS = (
    # Gemma 3n and 4 have a row per layer for each id. A soft prompt has none: it gets those of the padding token,
    # as images do there, and soft prompts in llama.cpp.
    Reader("embed_tokens_per_layer", "_pad"),
    Reader("tid2eid", "_pad"),  # DeepSeek V4: the experts of each id
    Reader("ngram_heads_offsets", "_pad"),  # Qwen 4: rows of the last few ids together
    Reader("vocab_offset", "_rows"),  # Gemma 3n: ids past the text's are sounds
)

# Models that no soft token can be given to, by the attribute that tells, and why.
REFUSED = {
    "encoder_hash_tok_embedding": "it reads bytes, and makes tokens of them by their values",
}


class EmbeddingHook:
    """Changes the input embedding of ``model``, in place, so that soft tokens read as their rows, until ``undo``.

    ``rows_now`` says whose rows the forward pass that is beginning reads; None: it has no soft tokens.
    """

    def __init__(self, model: Any, rows_now: Callable[[], Optional[Rows]]):
        embedding = embedding_of(model)
        self._model = weakref.ref(model)
        self._embedding = weakref.ref(embedding)
        self.vocabulary, self.width = self._size = _size_of(embedding)
        self._rows_now = rows_now
        self._thread = threading.local()
        self._padding = _padding_of(model)
        others = list(_other_readers(model, embedding))
        self.patches: List[Tuple[Any, Patch]] = [(self._embedding, patch(embedding, "forward", self._embed))]
        for module, reader in others:
            around = patch(module, "forward", getattr(self, reader.stands_in))
            self.patches.append((weakref.ref(module), around))

    def undo(self) -> None:
        """Put back what was there."""
        for _, each in reversed(self.patches):
            each.undo()

    @property
    def embedding(self) -> Any:
        """The module that is hooked, or None where it is gone."""
        return self._embedding()

    def checked(self) -> Any:
        """The module that is hooked; raises :class:`UnsupportedCall` where the model has another by now."""
        model, embedding = self._model(), self._embedding()
        if model is None:
            raise UnsupportedCall("the model that this handle belonged to no longer exists")
        if embedding is None or embedding_of(model) is not embedding or _size_of(embedding) != self._size:
            raise UnsupportedCall(
                "the model's input embedding was replaced or resized after attach(); detach() and attach() it again"
            )
        return embedding

    def _embed(self, original: Callable[..., torch.Tensor], input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = self._rows_now()
        if len(self.patches) > 1:
            self._thread.rows = rows
        if rows is None:
            return original(input, *args, **kwargs)
        is_soft = input >= self.vocabulary
        embedded = original(input.masked_fill(is_soft, 0), *args, **kwargs)
        return self._placed(rows, input, is_soft, embedded)

    def _placed(self, rows: Rows, ids: torch.Tensor, is_soft: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        copy = rows.copy_on(embedded.device, embedded.dtype)
        row = (ids - (rows.first - 1)).clamp(0, rows.n_rows + 1)
        return torch.where(is_soft.unsqueeze(-1), copy[row.long()], embedded)

    # The other readers are called behind the embedding, in the same forward pass.

    def _pad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if getattr(self._thread, "rows", None) is None:
            return original(*args, **kwargs)
        return original(*map(self._padded, args), **{name: self._padded(value) for name, value in kwargs.items()})

    def _padded(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32):
            return value.masked_fill(value >= self.vocabulary, self._padding)
        return value

    def _rows(self, original: Callable[..., Any], input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        rows = getattr(self._thread, "rows", None)
        if rows is None or input_ids is None:
            return original(input_ids, *args, **kwargs)
        is_soft = input_ids >= self.vocabulary
        embedded = original(input_ids.masked_fill(is_soft, self.vocabulary - 1), *args, **kwargs)
        return self._placed(rows, input_ids, is_soft, embedded)


def has_encoder(model: Any) -> bool:
    """Whether the model reads its text with an encoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def embedding_of(model: Any) -> Any:
    """The module that embeds the ids of the text; an encoder's where there is one. Raises :class:`NoEmbedding`."""
    reader = model.get_encoder() if has_encoder(model) else model
    try:
        embedding = reader.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = getattr(reader, "embed_tokens", None)  # encoders of releases before 4.30
    if embedding is None or getattr(embedding, "weight", None) is None:
        raise NoEmbedding(f"{type(model).__name__} has no input embedding that takes token ids")
    return embedding


def reads_ids_elsewhere(model: Any, embedding: Any) -> bool:
    """Whether the model reads the ids of the text in other places than its input embedding, too."""
    return any(True for _ in _other_readers(model, embedding))


def _other_readers(model: Any, embedding: Any) -> Iterator[Tuple[Any, Reader]]:
    for name, module in model.named_modules():
        own = vars(module)
        for mark, reason in REFUSED.items():
            if mark in own or mark in own["_modules"]:
                raise UnsupportedModel(f"{type(model).__name__} cannot have soft tokens: {reason}")
        for reader in READERS:
            marked = reader.mark in own or reader.mark in own["_buffers"] or name.split(".")[-1] == reader.mark
            if marked and module is not embedding:
                yield module, reader


def _padding_of(model: Any) -> int:
    """The id whose entries soft tokens get in tables that have none for them."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "pad_token_id", None) or 0)


def _size_of(embedding: Any) -> Tuple[int, int]:
    """Rows and columns of the embedding; a weight on another device, or quantised, need not be looked at."""
    shape = embedding.weight.shape
    return (
        int(getattr(embedding, "num_embeddings", shape[0])),
        int(getattr(embedding, "embedding_dim", shape[1])),
    )
