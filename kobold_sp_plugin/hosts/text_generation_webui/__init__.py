"""text-generation-webui: the extension in it, as its script sees it.

The host executes the extension's script again at every restart of its interface, and forgets the old one;
what has to stay lives here, in :data:`extension`. A generation's soft prompts travel with it: the host hands
``state["logits_processor"]``, a list, from the state to ``model.generate`` as it is, so that what hangs on the
list arrives there, whichever thread generates. The list itself gets nothing: no sampler sees a soft token.
"""

from typing import Any, Dict, Optional

from ...errors import HostError
from .attachment import Attachment
from .host import log


class Extension:
    """The extension in this process, as the script sees it; does nothing in a host that it does not know."""

    def __init__(self) -> None:
        self.attached: Optional[Attachment] = None
        self.fault = ""
        """Why it stays out, where it does."""

    def setup(self) -> None:
        """Attach to the host, once; whatever fails, the host goes on and one log line says why."""
        if self.attached is not None:
            self.attached.sync()
            return
        try:
            self.attached = Attachment(self.state_modifier)
            self.fault = ""
        except HostError as error:
            self.fault = str(error)
            log().warning("The soft prompts extension stays out of this host: %s", error)
        except Exception as error:
            self.fault = f"it could not attach: {type(error).__name__}: {error}"
            log().exception("The soft prompts extension stays out of this host")

    def undo(self) -> None:
        """Leave the host; its models, modules and API are its own again."""
        if self.attached is not None:
            self.attached.undo()
            self.attached = None

    def state_modifier(self, state: Dict[str, Any]) -> Dict[str, Any]:
        """A copy of ``state`` with the budget reserved and its soft prompts in it; ``state`` stays as it is."""
        return state if self.attached is None else self.attached.carrying(state)

    def ui(self) -> None:
        """Build the block, inside the host's interface; whatever fails, the rest of that is built."""
        from . import panel

        try:
            panel.build(self.attached, self.fault)
        except Exception:
            log().exception("The soft prompts block could not be built")

    def custom_css(self) -> str:
        """What the block's looks need."""
        from . import panel

        return panel.CSS

    def custom_js(self) -> str:
        """What keeps the block up to date, for the page's load event."""
        from . import panel

        return panel.JS


extension = Extension()
"""The one of this process."""
