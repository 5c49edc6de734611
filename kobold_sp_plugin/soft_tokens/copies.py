"""Copies of an attached model: plain models that were never attached."""

import weakref
from typing import Any, Callable, Dict, List, Tuple

from ..patching import Patch

_STATE = "__getstate__"
"""``copy`` and ``pickle`` ask an object for its state; on every release of Python an instance may answer itself."""


def copies_are_plain(patches: List[Tuple[Any, Patch]], also: str) -> Callable[[], None]:
    """Change how the patches' owners are copied and pickled, in place, and return what takes that back.

    ``patches`` are each owner's weak reference and patch. A copy has none of the patches, nor the attribute
    ``also``: what hangs on an instance would otherwise go on serving the instance that was copied.
    """
    owned: Dict[int, Tuple[Any, List[Patch]]] = {}
    for reference, each in patches:
        owned.setdefault(id(reference()), (reference, []))[1].append(each)
    installed = []
    for reference, mine in owned.values():
        state = _plain_state(reference, mine, also)
        vars(reference())[_STATE] = state
        installed.append((reference, state))

    def undo() -> None:
        for reference, state in installed:
            owner = reference()
            if owner is not None and vars(owner).get(_STATE) is state:
                del vars(owner)[_STATE]

    return undo


def _plain_state(reference: "weakref.ref[Any]", patches: List[Patch], also: str) -> Callable[[], Any]:
    def state() -> Any:
        owner = reference()
        own = getattr(type(owner), _STATE, None)
        found = dict(vars(owner)) if own is None or own is getattr(object, _STATE, None) else own(owner)
        if isinstance(found, dict):
            for name in (also, _STATE):
                found.pop(name, None)
            for each in reversed(patches):
                each.take_from(found)
        return found

    return state
