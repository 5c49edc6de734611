"""Prefix reuse: the keys and values of soft tokens that stand at the front, computed once for all requests.

Attention is causal: what a layer makes of the first positions does not depend on what follows them. So a
prompt that begins with the same soft tokens as one before it can begin with that one's cache, and only
the text's positions are forwarded. Where that would not be exact, or cannot be known to be, nothing is
reused; a debug line of this module's logger says why.
"""

import copy
import logging
import threading
from collections import OrderedDict
from typing import Any, Callable, Dict, Hashable, Iterator, List, Optional

import torch

from .rows import Rows

_LOG = logging.getLogger(__name__)

MOST_PREFIXES = 4
MOST_BYTES = 512 * 2**20
"""All prefixes of one model together; one that is larger is not kept."""

_PER_POSITION = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids", "cache_position")
"""Inputs of a forward pass whose last dimension is the positions that it reads."""

_CACHES = ("past_key_values", "cache_params")
"""Names under which a forward pass takes its cache."""

_FROZEN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Layers of a cache that make new tensors when they grow, so that all requests can begin with the same ones."""
_CHANGING_LAYERS = (
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""Layers that change their tensors in place, so that each request gets tensors of its own."""

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")
"""Rotary embeddings whose first positions look different in a long text than in a short one."""

MOVED = "_kobold_sp_moved"
"""The attribute of a replaced ``forward`` under which keys and values are others than those that are kept."""

_PROBE_POSITIONS = 8
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE = 0.05
"""How far a probe may be from the same logits without reuse, relative to them; half precisions round."""


class _NotExact(Exception):
    """Why this prompt is read without reuse."""


class Prefixes:
    """The prefixes of one model, at most ``MOST_PREFIXES`` and ``MOST_BYTES``; dropped when the model changes.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._state: Hashable = None
        self._proved: Dict[Hashable, bool] = {}

    def shorten(self, model: Any, rows: Rows, inputs: Dict[str, Any], mask: Optional[torch.Tensor]) -> bool:
        """Change ``inputs``, in place, to begin behind the soft tokens; False: they stay as they are.

        ``inputs`` are those of the forward pass that reads the whole prompt, with an empty cache; ``mask`` is
        the prompt's attention mask, None where nothing is padding.
        """
        try:
            n_prefix = self._shorten(model, rows, inputs, mask)
        except _NotExact as reason:
            _LOG.debug("no prefix reuse: %s", reason)
            return False
        _LOG.debug("read %d soft tokens from the cache of their prefix", n_prefix)
        return True

    def _shorten(self, model: Any, rows: Rows, inputs: Dict[str, Any], mask: Optional[torch.Tensor]) -> int:
        ids = inputs.get("input_ids")
        use_cache = inputs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(model.config, "use_cache", True)
        if rows.room < rows.n_tokens:
            raise _NotExact("there is no text behind the soft tokens")
        if not isinstance(ids, torch.Tensor) or not use_cache:
            raise _NotExact("the model is called without a cache")
        if torch.is_grad_enabled() or model.training:
            raise _NotExact("the model is being trained")
        if _autocasts(ids.device.type):
            raise _NotExact("autocast decides the precision")
        if mask is not None and not bool(mask.all()):
            raise _NotExact("a row is padded")
        n_prefix = _length_of_prefix(rows, ids)
        _check_inputs(inputs)
        _check_cache(inputs.get(_name_of_cache(inputs)))
        state = _state_of(model)
        key = (rows.softprompts, n_prefix)
        with self._lock:
            if state != self._state:
                self._kept.clear()
                self._proved.clear()
                self._state = state
            prefix = self._kept.get(key)
        if prefix is None or _was_emptied(prefix):
            prefix = self._made(model, inputs, n_prefix)
        self._keep(key, prefix, state)
        if isinstance(prefix, _NotExact):
            raise prefix
        _begin_behind(inputs, prefix, n_prefix)
        return n_prefix

    def _made(self, model: Any, inputs: Dict[str, Any], n_prefix: int) -> Any:
        """A new prefix, or why there is none."""
        try:
            prefix = _computed(model, inputs, n_prefix)
            size = _bytes_of(prefix)
            if size > MOST_BYTES:
                raise _NotExact(f"{size} bytes of keys and values are more than are kept")
            self._prove(model, inputs, prefix, n_prefix)
        except _NotExact as reason:
            return reason
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError) as error:
            # The prompt as a whole is what was asked for: a model that cannot read a part of it may still read that.
            return _NotExact(f"reading it in two parts failed ({type(error).__name__}: {error})")
        return prefix

    def _keep(self, key: Hashable, prefix: Any, state: Hashable) -> None:
        with self._lock:
            if state != self._state:
                return
            self._kept[key] = prefix
            self._kept.move_to_end(key)
            while len(self._kept) > MOST_PREFIXES or sum(map(_bytes_of, self._kept.values())) > MOST_BYTES:
                self._kept.popitem(last=False)

    def _prove(self, model: Any, inputs: Dict[str, Any], prefix: Any, n_prefix: int) -> None:
        """Once for each kind of cache: the logits behind the prefix have to be those of the whole prompt."""
        kind = (type(prefix), *(type(each) for each in prefix), *{tensor.dtype for tensor in _tensors_in(prefix)})
        if kind not in self._proved:
            length = min(inputs["input_ids"].shape[-1], n_prefix + _PROBE_POSITIONS)
            probe = _sliced(inputs, slice(0, length))
            whole = _called(model, probe).logits[:, -1].float()
            _begin_behind(probe, prefix, n_prefix)
            behind = _called(model, probe).logits[:, -1].float()
            tolerance = _TOLERANCES.get(next(_tensors_in(prefix)).dtype, _TOLERANCE)
            finite = torch.isfinite(whole) & torch.isfinite(behind)
            spread = (whole[finite] - whole[finite].mean()).norm()
            self._proved[kind] = bool((whole[finite] - behind[finite]).norm() <= tolerance * spread)
        if not self._proved[kind]:
            raise _NotExact("a probe with reuse differs from one without")


def _length_of_prefix(rows: Rows, ids: torch.Tensor) -> int:
    """Positions up to the last soft token, which all rows of ``ids`` have to share."""
    if rows.n_before == rows.n_tokens:
        n_prefix = rows.n_tokens
    else:  # behind the beginning-of-sequence token, where there is one
        n_prefix = rows.n_tokens + int(bool((ids[0, rows.n_before] < rows.first).item()))
        if not bool((ids[:, :n_prefix] == ids[:1, :n_prefix]).all()):
            raise _NotExact("the rows of the batch begin differently")
    if n_prefix >= ids.shape[1]:
        raise _NotExact("there is no text behind the soft tokens")
    return n_prefix


def _check_inputs(inputs: Dict[str, Any]) -> None:
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() and name not in _PER_POSITION:
            if name != "attention_mask":
                raise _NotExact(f"the model is called with {name}")
            if value.dim() != 2:
                raise _NotExact(f"its attention mask has {value.dim()} dimensions")
        elif name not in _CACHES and not isinstance(value, (torch.Tensor, type(None), bool, int, float, str)) and value:
            raise _NotExact(f"the model is called with {name}")


def _name_of_cache(inputs: Dict[str, Any]) -> str:
    return next((name for name in _CACHES if inputs.get(name) is not None), _CACHES[0])


def _check_cache(cache: Any) -> None:
    """Whether this is a cache, still empty, that can begin with another's tensors; None: the model makes its own."""
    if cache is None:
        return
    kind = type(cache).__name__
    if kind != "DynamicCache" or getattr(cache, "offloading", False):
        raise _NotExact(f"its cache is {'offloaded' if kind == 'DynamicCache' else f'of the kind {kind}'}")
    for layer in getattr(cache, "layers", ()):
        if type(layer).__name__ not in _FROZEN_LAYERS + _CHANGING_LAYERS:
            raise _NotExact(f"its cache has layers of the kind {type(layer).__name__}")


def _state_of(model: Any) -> Hashable:
    """What changes when the model does: its modules, where their tensors are, how often they were written to.

    Torch does not count what is written through ``.data``; PEFT's adapters, which do, are looked at by name.
    """
    _check_rope(model)
    found: List[Hashable] = []
    for module in model.modules():
        own = vars(module)
        if getattr(own.get("forward"), MOVED, False):
            raise _NotExact("its positions have been moved")
        found.append(id(module))
        for hook in [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]:
            if not str(getattr(hook, "__module__", "")).startswith("transformers."):
                raise _NotExact(f"somebody has hooked {type(module).__name__}")
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    found.extend((id(tensor), tensor.data_ptr(), tensor._version))
        if "_disable_adapters" in own:
            found.append(str([own.get(name) for name in ("_disable_adapters", "_active_adapter", "merged_adapters")]))
            found.append(str(own.get("scaling")))
    return hash(tuple(found))


def _check_rope(model: Any) -> None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in ("rope_scaling", "rope_parameters"):
        given = getattr(config, name, None)
        if isinstance(given, dict):
            for part in [given, *(each for each in given.values() if isinstance(each, dict))]:
                kind = part.get("rope_type", part.get("type"))
                if kind in _LENGTH_DEPENDENT_ROPE:
                    raise _NotExact(f"its positions ({kind}) depend on the length of the text")


def _autocasts(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


# A prefix is a list of a cache's layers, or a pair of lists of tensors, or nested tuples of tensors.


def _computed(model: Any, inputs: Dict[str, Any], n_prefix: int) -> Any:
    """The first ``n_prefix`` positions' keys and values, of batch size 1."""
    mine = _sliced(inputs, slice(0, n_prefix))
    output = _called(model, mine)
    cache: Any = mine.get(_name_of_cache(mine))
    if cache is None:
        cache = getattr(output, "past_key_values", None)
    _check_cache(cache if not isinstance(cache, tuple) else None)
    prefix: Any
    if isinstance(cache, tuple):
        prefix = cache
    elif hasattr(cache, "layers"):
        prefix = list(cache.layers)
    elif hasattr(cache, "key_cache"):
        prefix = (tuple(cache.key_cache), tuple(cache.value_cache))
    else:
        raise _NotExact("the model gives no cache back")
    if next(_tensors_in(prefix), None) is None:
        raise _NotExact("the model keeps nothing in its cache")
    return prefix


def _called(model: Any, inputs: Dict[str, Any]) -> Any:
    # Tensors made in inference mode could not be used outside of it; ours outlive the call.
    with torch.inference_mode(False), torch.no_grad():
        return model(**{**inputs, "use_cache": True, "return_dict": True})


def _sliced(inputs: Dict[str, Any], positions: slice) -> Dict[str, Any]:
    """The inputs of a forward pass over some ``positions`` of the first row, with a cache of its own."""
    mine = dict(inputs)
    for name in (*_PER_POSITION, "attention_mask"):
        value = mine.get(name)
        if isinstance(value, torch.Tensor):
            mine[name] = (value[..., :1, positions] if value.dim() > 1 else value[positions]).clone()
    name = _name_of_cache(inputs)
    mine[name] = copy.deepcopy(inputs.get(name))
    return mine


def _begin_behind(inputs: Dict[str, Any], prefix: Any, n_prefix: int) -> None:
    """Change ``inputs``, and the empty cache in them, to what follows ``prefix``."""
    batch = inputs["input_ids"].shape[0]
    for name in _PER_POSITION:
        if isinstance(inputs.get(name), torch.Tensor):
            inputs[name] = inputs[name][..., n_prefix:].contiguous()
    cache: Any = inputs.get(_name_of_cache(inputs))
    if cache is None:
        inputs["past_key_values"] = _mapped(prefix, lambda tensor: _widened(tensor, batch))
    elif hasattr(cache, "layers"):
        recording = [getattr(layer, "record_past", False) for layer in cache.layers] or [False] * len(prefix)
        cache.layers[:] = [_layer_for(layer, batch, records) for layer, records in zip(prefix, recording)]
    else:
        keys, values = prefix
        cache.key_cache[:] = [_widened(tensor, batch) for tensor in keys]
        cache.value_cache[:] = [_widened(tensor, batch) for tensor in values]
        cache._seen_tokens = n_prefix


def _layer_for(layer: Any, batch: int, records: bool) -> Any:
    """A layer that begins with the tensors of ``layer``, for ``batch`` rows."""
    mine = copy.copy(layer)
    changing = type(layer).__name__ in _CHANGING_LAYERS

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        wide = _widened(tensor, batch) if tensor.dim() else tensor
        return wide.clone() if changing else wide

    for name, value in vars(layer).items():
        vars(mine)[name] = _mapped(value, widened)
    if records:
        mine.record_past = True
    return mine


def _widened(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """``tensor`` of one row, for ``batch`` rows; a view, except where heads are folded into the rows."""
    if tensor.shape[0] == 1:
        return tensor.expand(batch, *tensor.shape[1:])
    return tensor.repeat(batch, *([1] * (tensor.dim() - 1)))


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, change) for each in value)
    return value


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)
    elif type(value).__name__ in _FROZEN_LAYERS + _CHANGING_LAYERS:
        yield from _tensors_in(list(vars(value).values()))


def _bytes_of(prefix: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(prefix))


def _was_emptied(prefix: Any) -> bool:
    """Whether a host has emptied every tensor in the process."""
    return any(not tensor.numel() for tensor in _tensors_in(prefix))
