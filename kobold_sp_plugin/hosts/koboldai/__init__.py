"""KoboldAI, the Client and United: the hook that waits for the host, and which of the two it is.

KoboldAI runs ``aiserver.py`` as ``__main__``, under eventlet's monkey patching. :func:`arm` is called at the
start of Python, long before that: it waits for ``flask_session``, and then for ``Session(app)``, which the host
calls when everything is defined and no model is loaded. Until then only the standard library is imported.
"""

import logging
import os
import sys
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Type

from ... import __version__, patching
from ...errors import HostError
from ...patching import Patch, patch, when_imported

if TYPE_CHECKING:
    from .attachment import Attachment

log = logging.getLogger(__name__)

SCRIPT = "aiserver.py"


def arm() -> "Hook":
    """Wait for KoboldAI in this process, and attach to it when it is there; whatever fails, the host starts."""
    return Hook()


def attach(host: Dict[str, Any]) -> "Attachment":
    """Hook KoboldAI, in place, by its globals ``host``; its soft prompts are in ``softprompts`` where it runs.

    Raises :class:`HostError`, which names what is missing; then nothing was changed.
    """
    from .attachment import faults
    from .client import Client
    from .united import United

    found: Type[Attachment] = United if "koboldai_vars" in host else Client
    missing = list(faults(host, found.SEAMS))
    if missing:
        raise HostError(f"this is not a KoboldAI that the hook knows: {'; '.join(missing)}")
    return found(host)


def attach_or_say_why_not(host: Dict[str, Any]) -> "Optional[Attachment]":
    """Hook KoboldAI, in place, or leave it as it is; one line in the log says which."""
    try:
        attached = attach(host)
    except Exception as error:  # whatever it is, the host starts
        what = str(error) if isinstance(error, HostError) else f"{type(error).__name__}: {error}"
        log.warning("kobold_sp_plugin stays out of this host: %s", what)
        log.debug("why it stays out", exc_info=True)
        return None
    # Nothing shows Python's own log below warnings; the host's shows this.
    say = getattr(host.get("logger"), "info", log.info)
    say(f"kobold_sp_plugin {__version__} is attached: {attached.session.catalogue.folder}")
    return attached


class Hook:
    """Waits for the host; made by :func:`arm`."""

    def __init__(self) -> None:
        self.attached: Optional[Attachment] = None
        self._session: Optional[Patch] = None
        self._import = when_imported("flask_session", self._imported)

    def undo(self) -> None:
        """Take everything back: stop waiting, or leave the host."""
        self._import.cancel()
        if self._session is not None:
            self._session.undo()
        if self.attached is not None:
            self.attached.undo()
            self.attached = None

    def _imported(self, flask_session: ModuleType) -> None:
        self._session = patch(flask_session.Session, "__init__", self._made)

    def _made(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        try:
            caller = _caller()
            if not _is_aiserver(caller):
                return
            assert self._session is not None
            self._session.undo()
            self.attached = attach_or_say_why_not(caller.f_globals)
        except Exception:
            log.exception("kobold_sp_plugin stays out of this host")


def _caller() -> FrameType:
    """The innermost frame that is neither ours nor the patch's."""
    frame: Optional[FrameType] = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, patching.__name__):
        frame = frame.f_back
    assert frame is not None
    return frame


def _is_aiserver(frame: FrameType) -> bool:
    # By the code's file name: the Client sets its global ``__file__`` to its folder.
    return frame.f_globals.get("__name__") == "__main__" and os.path.basename(frame.f_code.co_filename) == SCRIPT
