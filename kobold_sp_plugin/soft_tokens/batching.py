"""Continuous batching: a manager's thread reads requests with several selections in one forward pass.

A request gets its soft tokens when it is added, and an id belongs to one content for ever: so the rows of all requests
that a manager works at can stand in one table.
"""

import dataclasses
import threading
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from ..errors import UnsupportedCall
from ..patching import Patch, patch
from .rows import Rows


class Together(Rows):
    """The rows of several selections under the ids that they have; what no selection has is NaN."""

    def __init__(self, parts: List[Rows]):
        self._parts = parts
        self.first = min(each.first for each in parts)
        self.n_rows = max(each.first + each.n_rows for each in parts) - self.first
        self._copies: Dict[Tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def _built(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        tables = [each.copy_on(device, dtype)[1:-1] for each in self._parts]
        together = tables[0].new_full((1 + self.n_rows + 1, tables[0].shape[1]), float("nan"))
        for each, table in zip(self._parts, tables):
            start = 1 + each.first - self.first
            together[start : start + each.n_rows] = table
        return together


class Requests:
    """What the requests of one manager are read with; safe to use from several threads.

    ``changed`` is called with the rows of all of them, None where there are none.
    """

    def __init__(self, changed: Callable[[Optional[Rows]], None]):
        self._lock = threading.Lock()
        self._counted: Dict[int, Tuple[Rows, int]] = {}
        self._changed = changed

    def add(self, rows: Rows, n: int) -> None:
        """Count ``n`` requests more, or fewer; rows that no request is left with go."""
        with self._lock:
            count = n + self._counted.get(rows.first, (rows, 0))[1]
            self._counted[rows.first] = (rows, count)
            if count <= 0:
                del self._counted[rows.first]
            if count == n or count <= 0:
                self._tell()

    def end(self, ids: List[int]) -> None:
        """Count one request less, whose prompt was ``ids``."""
        with self._lock:
            found = [rows for rows, _ in self._counted.values() if any(0 <= i - rows.first < rows.n_rows for i in ids)]
        for rows in found:
            self.add(rows, -1)

    def end_all(self) -> None:
        """There are no requests any more: those that were cancelled never ended."""
        with self._lock:
            self._counted.clear()
            self._tell()

    def _tell(self) -> None:
        parts = [rows for rows, _ in self._counted.values()]
        self._changed(parts[0] if len(parts) == 1 else Together(parts) if parts else None)


class ManagerAdapter:
    """Changes a manager of continuous batching, in place, so that its requests get soft tokens, until ``undo``.

    ``read`` says what a request of these ids and so many new tokens that is made now, in this thread, is read with,
    and its ids with the soft tokens, or None; ``around`` runs the manager's loop; ids from ``vocabulary`` on are soft.
    """

    def __init__(
        self,
        manager: Any,
        read: Callable[[List[int], Optional[int]], Optional[Tuple[Rows, List[int]]]],
        around: Callable[..., Any],
        requests: Requests,
        vocabulary: int,
    ):
        self.manager = weakref.ref(manager)
        self._read = read
        self._around = around
        self._requests = requests
        self._vocabulary = vocabulary
        self.refused: Optional[UnsupportedCall] = None
        """The last request that was; ``generate_batch`` only logs what is raised for one."""
        router = manager.output_router
        self._patches: List[Patch] = [
            patch(manager, "add_request", self._add if not manager.is_running() else self._refuse),
            patch(manager, "_run_generation_loop", self._run),
            patch(router, "deliver", self._deliver),
            patch(router, "deliver_batch", self._deliver_batch),
        ]

    def undo(self) -> None:
        """Put back what was there."""
        for each in reversed(self._patches):
            each.undo()

    def _add(self, original: Callable[..., Any], input_ids: List[int], *args: Any, **kwargs: Any) -> Any:
        manager: Any = self.manager()
        new = kwargs.get("max_new_tokens", args[1] if len(args) > 1 else None)
        found = self._read(input_ids, manager.generation_config.max_new_tokens if new is None else new)
        if found is None:
            return original(input_ids, *args, **kwargs)
        rows, ids = found
        if any(manager.continuous_batching_config.cuda_graph_booleans):
            self.refused = UnsupportedCall(
                "continuous batching with CUDA graphs takes no soft prompts, which would be those of the recording; "
                "pass ContinuousBatchingConfig(use_cuda_graph=False)"
            )
            raise self.refused
        n = max(1, getattr(manager, "num_return_sequences", 1))
        self._requests.add(rows, n)
        request = None
        try:
            request = original(ids, *args, **kwargs)
        finally:
            if request is None:  # the manager takes no requests, or its queue is full
                self._requests.add(rows, -n)
        return request

    def _refuse(self, original: Callable[..., Any], input_ids: List[int], *args: Any, **kwargs: Any) -> Any:
        if self._read(input_ids, None) is not None:
            raise UnsupportedCall("this manager of continuous batching was started before attach(); begin another one")
        return original(input_ids, *args, **kwargs)

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return self._around(original, *args, **kwargs)
        finally:
            self._requests.end_all()

    def _deliver(self, original: Callable[..., Any], output: Any) -> Any:
        return original(self._without_soft_tokens(output))

    def _deliver_batch(self, original: Callable[..., Any], outputs: List[Any]) -> Any:
        return original([self._without_soft_tokens(output) for output in outputs])

    def _without_soft_tokens(self, output: Any) -> Any:
        """``output``, changed in place."""
        soft = [each for each in output.prompt_ids if each >= self._vocabulary]
        if soft:
            output.prompt_ids = [each for each in output.prompt_ids if each < self._vocabulary]
            if output.is_finished():
                self._requests.end(soft[:1])
        return output


def is_supported() -> bool:
    """Whether this release's managers tell what they do by the names that are patched."""
    try:
        from transformers import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
    except ImportError:
        return False
    return all(
        hasattr(owner, name)
        for owner, name in (
            (ContinuousBatchingManager, "add_request"),
            (ContinuousBatchingManager, "_run_generation_loop"),
            (OutputRouter, "deliver"),
            (OutputRouter, "deliver_batch"),
            (ContinuousBatchingConfig, "cuda_graph_booleans"),  # earlier ones have a method of another name
        )
    )


def with_room(kwargs: Dict[str, Any], n_tokens: int) -> Dict[str, Any]:
    """The arguments that begin a manager, with room for soft tokens in what they say about the requests to come."""
    hints = kwargs.get("workload_hints")
    if hints is None:
        return kwargs
    return {
        **kwargs,
        "workload_hints": dataclasses.replace(hints, max_prompt_length=hints.max_prompt_length + n_tokens),
    }
