"""What soft prompts do to the next-token distribution, from the distributions themselves."""

from typing import Any, Dict, Sequence

import numpy as np

from . import Effect


def effect_of(without: np.ndarray, having: np.ndarray) -> Effect:
    """The effect, from the distributions without and with the soft prompts, each ``[probes, vocabulary]``."""
    return Effect(
        float(min(1.0, _distances(having, without).mean())),
        float(_entropies(having).mean()),
        float(_entropies(without).mean()),
        float(_distances(having[:, None], having[None]).mean()),
        float(_distances(without[:, None], without[None]).mean()),
    )


def effect_of_likeliest(without: Sequence[Dict[Any, float]], having: Sequence[Dict[Any, float]]) -> Effect:
    """The effect, from the probabilities of the likeliest tokens only, of one probe each.

    What the others have is counted as one token, so that the true figure is at least this.
    """
    named = list({token: None for each in (*without, *having) for token in each})

    def rows(distributions: Sequence[Dict[Any, float]]) -> np.ndarray:
        found = np.array([[each.get(token, 0.0) for token in named] for each in distributions])
        return np.concatenate([found, 1 - found.sum(-1, keepdims=True)], -1).clip(0)

    return effect_of(rows(without), rows(having))


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Total variation between distributions in the last dimension."""
    return np.asarray(np.abs(first - second).sum(-1) / 2)


def _entropies(distributions: np.ndarray) -> np.ndarray:
    """In nats, over the last dimension."""
    return np.asarray(-(distributions * np.log(np.maximum(distributions, np.finfo(distributions.dtype).tiny))).sum(-1))
