"""The caches of forward passes: whether one can begin with another's keys and values, and how.

Attention is causal: what a layer makes of the first positions does not depend on what follows them. So a text
that begins as one before it can begin with that one's cache, and only the rest is forwarded. Where that would
not be exact, or cannot be known to be, :class:`NotExact` says why.
"""

import copy
from typing import Any, Callable, Dict, Hashable, Iterator, List, Optional

import torch

_PER_POSITION = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids", "cache_position")
"""Inputs of a forward pass whose last dimension is the positions that it reads."""

_CACHES = ("cache", "past_key_values", "cache_params")
"""Names under which a forward pass takes its cache; the first from 5.24 on."""

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

FIRST_ROW = slice(0, 1)

MOVED = "_kobold_sp_moved"
"""The attribute of a replaced ``forward`` under which keys and values are others than those that are kept."""

_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE = 0.05
"""How far a probe may be from the same logits without reuse, relative to them; half precisions round."""

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
"""How a model says that it cannot read a part of a text; it may still read the whole."""


class NotExact(Exception):
    """Why a text is read without reuse."""


# A beginning is a list of a cache's layers, or a pair of lists of tensors, or nested tuples of tensors; of one row
# where nothing else is said.


def check(model: Any, inputs: Dict[str, Any], mask: Optional[torch.Tensor]) -> None:
    """Raise :class:`NotExact` where a forward pass with these ``inputs`` is not to begin with another's cache."""
    ids = inputs.get("input_ids")
    use_cache = inputs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(model.config, "use_cache", True)
    if not isinstance(ids, torch.Tensor) or not use_cache:
        raise NotExact("the model is called without a cache")
    if torch.is_grad_enabled() or model.training:
        raise NotExact("the model is being trained")
    if _autocasts(ids.device.type):
        raise NotExact("autocast decides the precision")
    if mask is not None and not bool(mask.all()):
        raise NotExact("a row is padded")
    _check_inputs(inputs)
    cache = inputs.get(name_of_cache(inputs))
    _check_cache(cache)
    keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    if getattr(cache, "key_cache", None) or any(isinstance(each, torch.Tensor) for each in keys):
        raise NotExact("its cache holds a text already")


def _check_inputs(inputs: Dict[str, Any]) -> None:
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() and name not in _PER_POSITION:
            if name != "attention_mask":
                raise NotExact(f"the model is called with {name}")
            if value.dim() != 2:
                raise NotExact(f"its attention mask has {value.dim()} dimensions")
        elif name not in _CACHES and not isinstance(value, (torch.Tensor, type(None), bool, int, float, str)) and value:
            raise NotExact(f"the model is called with {name}")


def name_of_cache(inputs: Dict[str, Any]) -> str:
    return next((name for name in _CACHES if inputs.get(name) is not None), _CACHES[0])


def _check_cache(cache: Any) -> None:
    """Whether this is a cache, still empty, that can begin with another's tensors; None: the model makes its own."""
    if cache is None:
        return
    kind = type(cache).__name__
    if kind != "DynamicCache" or getattr(cache, "offloading", False):
        raise NotExact(f"its cache is {'offloaded' if kind == 'DynamicCache' else f'of the kind {kind}'}")
    for layer in getattr(cache, "layers", ()):
        if type(layer).__name__ not in _FROZEN_LAYERS + _CHANGING_LAYERS:
            raise NotExact(f"its cache has layers of the kind {type(layer).__name__}")


def state_of(model: Any) -> Hashable:
    """What changes when the model does: its modules, where their tensors are, how often they were written to.

    Torch does not count what is written through ``.data``; PEFT's adapters, which do, are looked at by name.
    """
    _check_rope(model)
    found: List[Hashable] = []
    for module in model.modules():
        own = vars(module)
        if getattr(own.get("forward"), MOVED, False):
            raise NotExact("its positions have been moved")
        found.append(id(module))
        for hook in [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]:
            if not str(getattr(hook, "__module__", "")).startswith("transformers."):
                raise NotExact(f"somebody has hooked {type(module).__name__}")
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    found.extend((id(tensor), tensor.dtype, tensor.data_ptr(), tensor._version))
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
                    raise NotExact(f"its positions ({kind}) depend on the length of the text")


def _autocasts(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def computed(model: Any, inputs: Dict[str, Any], n: int, rows: slice = FIRST_ROW) -> Any:
    """What the model keeps of the first ``n`` positions of these ``rows``."""
    mine = sliced(inputs, slice(0, n), rows)
    output = _called(model, mine)
    cache: Any = mine.get(name_of_cache(mine))
    if cache is None:
        cache = next((output[name] for name in _CACHES if output.get(name) is not None), None)
    _check_cache(cache if not isinstance(cache, tuple) else None)
    return held_by(cache)


def held_by(cache: Any) -> Any:
    """The tensors of a filled cache, as another can begin with them; it may grow meanwhile."""
    held: Any
    if isinstance(cache, tuple):
        held = cache
    elif hasattr(cache, "layers"):
        held = [copy.copy(layer) for layer in cache.layers]
    elif hasattr(cache, "key_cache"):
        held = (tuple(cache.key_cache), tuple(cache.value_cache))
    else:
        raise NotExact("the model gives no cache back")
    if next(_tensors_in(held), None) is None:
        raise NotExact("the model keeps nothing in its cache")
    return held


def cut(held: Any, length: int, n: int) -> Any:
    """What is held of the first ``n`` of ``length`` positions; views."""
    if isinstance(held, list):
        return [_cut_layer(layer, length, n) for layer in held]
    return _mapped(held, lambda tensor: _cut_tensor(tensor, length, n))


def _cut_layer(layer: Any, length: int, n: int) -> Any:
    kind = type(layer).__name__
    if kind not in _FROZEN_LAYERS:
        raise NotExact(f"its cache has layers of the kind {kind}, which hold one state for all positions")
    if next(_tensors_in([getattr(layer, "keys", None)]), None) is None:
        return layer  # one that takes what another layer holds
    mine = copy.copy(layer)
    if hasattr(layer, "cumulative_length"):
        if layer.cumulative_length == length == n:
            return mine  # nothing is cut off; a window that is full goes on as it is
        if layer.keys.shape[-2] < length:
            raise NotExact("a sliding window is full, and what left it is gone")
        mine.cumulative_length = n
    mine.keys, mine.values = (_cut_tensor(tensor, length, n) for tensor in (layer.keys, layer.values))
    return mine


def _cut_tensor(tensor: torch.Tensor, length: int, n: int) -> torch.Tensor:
    if tensor.dim() != 4 or tensor.shape[-2] != length:
        raise NotExact(f"its cache has tensors of the shape {list(tensor.shape)} for {length} positions")
    return tensor[:, :, :n]


def parted(held: Any, batch: int) -> List[Any]:
    """What is held of ``batch`` rows, row by row; copies, so that one can go without the others."""
    for tensor in _checked_rows(held):
        if tensor.shape[0] != batch:
            raise NotExact(f"its cache has tensors of the shape {list(tensor.shape)} for {batch} rows")
    return [_with_tensors(held, [each[row : row + 1].clone() for each in _checked_rows(held)]) for row in range(batch)]


def stacked(parts: List[Any], times: int) -> Any:
    """What is held of several rows, each of them so many ``times``, of what is held of each."""
    tensors = [torch.cat(each) for each in zip(*map(_checked_rows, parts))]
    return _with_tensors(parts[0], [each.repeat_interleave(times, dim=0) if times > 1 else each for each in tensors])


def _checked_rows(held: Any) -> List[torch.Tensor]:
    """The tensors of keys and values, of which each row has its own."""
    if isinstance(held, list) and not all(type(layer).__name__ in _FROZEN_LAYERS for layer in held):
        raise NotExact("its cache holds more than keys and values of each row")
    tensors = [each for each in _tensors_in(held) if each.numel()]
    if not all(each.dim() == 4 for each in tensors):
        raise NotExact("its cache holds more than keys and values of each row")
    return tensors


def _with_tensors(held: Any, tensors: List[torch.Tensor]) -> Any:
    """``held`` with others in the place of its tensors."""
    others = iter(tensors)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return next(others) if tensor.numel() else tensor

    if not isinstance(held, list):
        return _mapped(held, change)
    made = [copy.copy(layer) for layer in held]
    for layer in made:
        vars(layer).update(_mapped(vars(layer), change))
    return made


def agree(model: Any, inputs: Dict[str, Any], held: Any, n: int) -> bool:
    """Whether the logits at the end of ``inputs`` are the same behind the first ``n`` positions, which ``held`` holds.

    In half precision, nearly the same. ``inputs`` are changed.
    """
    whole = _called(model, sliced(inputs, slice(0, None))).logits[:, -1].float()
    begin_behind(inputs, held, n)
    behind = _called(model, inputs).logits[:, -1].float()
    tolerance = _TOLERANCES.get(next(_tensors_in(held)).dtype, _TOLERANCE)
    finite = torch.isfinite(whole) & torch.isfinite(behind)
    spread = (whole[finite] - whole[finite].mean()).norm()
    return bool((whole[finite] - behind[finite]).norm() <= tolerance * spread)


def kind_of(held: Any) -> Hashable:
    """What two caches have in common that behave alike."""
    return (type(held), *(type(each) for each in held), *{tensor.dtype for tensor in _tensors_in(held)})


def compact(held: Any) -> Any:
    """The same, without what tensors are views of where that is far more than they show."""
    if isinstance(held, list):
        made = [copy.copy(layer) for layer in held]
        for layer in made:
            vars(layer).update(_mapped(vars(layer), _compact_tensor))
        return made
    return _mapped(held, _compact_tensor)


def _compact_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if _stored_bytes(tensor) > 2 * tensor.numel() * tensor.element_size() else tensor


def _stored_bytes(tensor: torch.Tensor) -> int:
    storage = getattr(tensor, "untyped_storage", tensor.storage)()
    return int(storage.nbytes())


def _called(model: Any, inputs: Dict[str, Any]) -> Any:
    # Tensors made in inference mode could not be used outside of it; ours outlive the call.
    with torch.inference_mode(False), torch.no_grad():
        return model(**{**inputs, "use_cache": True, "return_dict": True})


def sliced(inputs: Dict[str, Any], positions: slice, rows: slice = FIRST_ROW) -> Dict[str, Any]:
    """The inputs of a forward pass over some ``positions`` of ``rows``, with a cache of its own."""
    mine = dict(inputs)
    for name in (*_PER_POSITION, "attention_mask"):
        value = mine.get(name)
        if isinstance(value, torch.Tensor):
            mine[name] = (value[..., rows, positions] if value.dim() > 1 else value[positions]).clone()
    name = name_of_cache(inputs)
    if name in inputs:
        mine[name] = copy.deepcopy(inputs[name])
    return mine


def begin_behind(inputs: Dict[str, Any], held: Any, n: int) -> None:
    """Change ``inputs``, and the empty cache in them, to what follows the ``n`` positions that ``held`` holds."""
    batch = inputs["input_ids"].shape[0]
    for name in _PER_POSITION:
        if isinstance(inputs.get(name), torch.Tensor):
            inputs[name] = inputs[name][..., n:].contiguous()
    cache: Any = inputs.get(name_of_cache(inputs))
    if cache is None:
        inputs["past_key_values"] = _mapped(held, lambda tensor: _widened(tensor, batch))
    elif hasattr(cache, "layers"):
        recording = [getattr(layer, "record_past", False) for layer in cache.layers] or [False] * len(held)
        cache.layers[:] = [_layer_for(layer, batch, records) for layer, records in zip(held, recording)]
    else:
        keys, values = held
        cache.key_cache[:] = [_widened(tensor, batch) for tensor in keys]
        cache.value_cache[:] = [_widened(tensor, batch) for tensor in values]
        cache._seen_tokens = n


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
    if tensor.dim() == 4 and tensor.shape[0] == batch:  # each row has its own
        return tensor
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


def bytes_of(held: Any) -> int:
    """The memory that it takes."""
    return sum(map(_stored_bytes, _tensors_in(held)))


def was_emptied(held: Any) -> bool:
    """Whether a host has emptied every tensor in the process."""
    return any(not tensor.numel() for tensor in _tensors_in(held))
