"""KoboldAI United: what is hooked there, as data, and what our side of each seam does."""

from typing import Tuple

from .attachment import Attachment, Seam

UNITED: Tuple[Seam, ...] = (Seam("function", "not_written_yet", "Keeps the hook out of United."),)


class United(Attachment):
    """United, attached."""

    SEAMS = UNITED
