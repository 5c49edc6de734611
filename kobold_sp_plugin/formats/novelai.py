"""NovelAI's ``.module``: told apart, so that its owner learns why it cannot be used."""

from contextlib import contextmanager
from typing import Iterator

from ..errors import UnsupportedMethod
from .source import Candidate, Source

REASON = "it is made for NovelAI's own models, which nobody else has, and its content is not documented"


def detect(candidate: Candidate) -> bool:
    """Whether its name ends in ``.module``: nothing public tells what it begins with."""
    return not candidate.is_folder and candidate.path.lower().endswith(".module")


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """Raises :class:`UnsupportedMethod`."""
    raise UnsupportedMethod(f"a NovelAI module: {REASON}", "a soft prompt for a model that you have")
    yield  # a context manager has to be a generator
