"""Train a soft prompt: texts in, rows out; the model stays as it is."""

from .settings import Settings
from .trainer import Progress, Training, train

__all__ = ["Progress", "Settings", "Training", "train"]
