"""Reversible patches, and callbacks for the moment when a module is imported.

Standard library only: a host imports this long before it imports anything else of ours.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import sys
import threading
import weakref
from types import ModuleType
from typing import Any, Callable, Dict, Optional, Sequence

log = logging.getLogger(__name__)

_ABSENT = object()


class Patch:
    """One replaced function, which ``undo`` puts back; made by :func:`patch`."""

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]):
        self.name = name
        self._around = around
        self._active = True
        # A module's instance must not be kept alive by what we hang on it; what cannot be referenced
        # weakly (a dictionary of globals) lives as long as its process.
        self._owner: Callable[[], Any] = (lambda: owner) if isinstance(owner, dict) else weakref.ref(owner)
        self._before = _namespace(owner).get(name, _ABSENT)
        self._installed = self._wrapper(owner)
        _put(owner, name, self._installed)

    def undo(self) -> None:
        """Put back what was there; where somebody has patched over us, only stop taking part."""
        self._active = False
        owner = self._owner()
        if owner is None or _namespace(owner).get(self.name, _ABSENT) is not self._installed:
            return
        if self._before is _ABSENT:
            _remove(owner, self.name)
        else:
            _put(owner, self.name, self._before)

    def take_from(self, namespace: Dict[str, Any]) -> None:
        """Change ``namespace``, a copy of the owner's, in place, to what it would be without this patch."""
        if namespace.get(self.name, _ABSENT) is self._installed:
            if self._before is _ABSENT:
                del namespace[self.name]
            else:
                namespace[self.name] = self._before

    def _wrapper(self, owner: Any) -> Any:
        if isinstance(owner, type):
            return self._class_wrapper(owner)
        if self._before is not _ABSENT:
            return self._function_wrapper(self._before, self._before)
        # An inherited method, seen from an instance: looked up at every call, so that a class that is
        # patched later counts, and through a weak reference, so that the instance can die.
        instance, name = weakref.ref(owner), self.name
        current = getattr(owner, name)

        def inherited(*args: Any, **kwargs: Any) -> Any:
            this = instance()
            if this is None:
                raise ReferenceError(f"what this {name}() belongs to no longer exists; keep a reference to it")
            return inspect.getattr_static(type(this), name).__get__(this, type(this))(*args, **kwargs)

        inherited.__signature__ = inspect.signature(current)  # type: ignore[attr-defined]
        return self._function_wrapper(inherited, getattr(current, "__func__", current))

    def _class_wrapper(self, owner: type) -> Any:
        static = inspect.getattr_static(owner, self.name)
        if isinstance(static, (classmethod, staticmethod)):
            kind = type(static)
            return kind(self._function_wrapper(static.__func__, static.__func__))
        return self._function_wrapper(static, static)

    def _function_wrapper(self, original: Callable[..., Any], described: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._active:
                return self._around(original, *args, **kwargs)
            return original(*args, **kwargs)

        functools.update_wrapper(wrapper, described)
        # Callers that look at the arguments must see the original's. ``__wrapped__`` would say the same,
        # but for an instance it would name a function with ``self``.
        wrapper.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        wrapper.__dict__.pop("__wrapped__", None)
        return wrapper


def patch(owner: Any, name: str, around: Callable[..., Any]) -> Patch:
    """Replace the function ``name`` of ``owner``, in place, until ``Patch.undo``.

    ``owner`` is a class, a module, an instance (its class stays as it is) or a dictionary of globals.
    Calls become ``around(original, *arguments)``; for a class, the arguments begin with the instance
    (or, for a class method, the class), and ``original`` takes them. Raises :class:`AttributeError` if
    there is no such name, and :class:`TypeError` or :class:`ValueError` if it is no function with a signature.
    """
    if isinstance(owner, dict):
        if name not in owner:
            raise AttributeError(f"there is no global named {name!r}")
    else:
        inspect.getattr_static(owner, name)
    return Patch(owner, name, around)


def _namespace(owner: Any) -> Dict[str, Any]:
    return owner if isinstance(owner, dict) else vars(owner)  # type: ignore[return-value]


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        _namespace(owner)[name] = value  # torch's modules do more than that in __setattr__


def _remove(owner: Any, name: str) -> None:
    if isinstance(owner, type):
        delattr(owner, name)
    else:
        del _namespace(owner)[name]


class ImportCallback(importlib.abc.MetaPathFinder):
    """A callback that waits on ``sys.meta_path`` for one module; made by :func:`when_imported`."""

    def __init__(self, module: str, callback: Callable[[ModuleType], None]):
        self._module = module
        self._callback = callback
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Optional[Sequence[Any]] = None, target: Optional[ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        """The module's own spec, with the callback behind the end of its execution."""
        if fullname != self._module or getattr(self._searching, "now", False):
            return None
        self._searching.now = True  # the finders that are asked next include this one
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.now = False
        # Only a loader from a file is made anew for each module, so that it can be changed for this one.
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            log.warning("kobold_sp_plugin: %s is not imported from a file; nothing will follow its import", fullname)
            return None
        loader = spec.loader

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # a reload is no first import
            loader.exec_module(module)
            self.cancel()
            self._run(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def cancel(self) -> None:
        """Stop waiting."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _run(self, module: ModuleType) -> None:
        try:
            self._callback(module)
        except Exception:  # the host must start as if we were not there
            log.exception("kobold_sp_plugin: what was to happen after the import of %s failed", self._module)


def when_imported(module: str, callback: Callable[[ModuleType], None]) -> ImportCallback:
    """Call ``callback(module)`` once, as soon as the named module has been imported; adds to ``sys.meta_path``.

    If it has been, now. An error in the callback is logged, never raised into the import.
    """
    waiting = ImportCallback(module, callback)
    if module in sys.modules:
        waiting._run(sys.modules[module])
    else:
        sys.meta_path.insert(0, waiting)
    return waiting
