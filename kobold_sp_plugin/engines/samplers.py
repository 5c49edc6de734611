"""KoboldAI's samplers as logits processors: each in one class, applied in the order that the client gives.

A sampler takes ``input_ids [batch, length]``, the text so far without any soft token, and ``scores [batch,
vocabulary]``, and returns new scores; what it removes gets minus infinity. The likeliest token is never removed.
Their meaning is KoboldAI's (United's ``warpers.py``); min-p, the bias and the OpenAI penalties, which United has
not, are KoboldCpp's and OpenAI's.
"""

import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from . import GenerationSettings

TOP_K, TOP_A, TOP_P, TAIL_FREE, TYPICAL, TEMPERATURE, REPETITION_PENALTY = range(7)
"""KoboldAI's numbers of its samplers, as ``sampler_order`` has them."""


class TopK(LogitsProcessor):
    """Keeps the ``k`` likeliest tokens, and what is as likely as the last of them."""

    def __init__(self, k: int):
        self._k = k

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        least = scores.topk(min(self._k, scores.shape[-1])).values[..., -1:]
        return scores.masked_fill(scores < least, -math.inf)


class TopA(LogitsProcessor):
    """Removes tokens less probable than ``a`` times the square of the highest probability."""

    def __init__(self, a: float):
        self._a = a

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities = _probabilities(scores)
        most = probabilities.amax(-1, keepdim=True)
        return scores.masked_fill(probabilities < torch.minimum(self._a * most * most, most), -math.inf)


class TopP(LogitsProcessor):
    """Keeps the fewest likeliest tokens whose probabilities add up to ``p``."""

    def __init__(self, p: float):
        self._p = p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities, order = _probabilities(scores).sort(dim=-1, descending=True)
        removed = probabilities.cumsum(-1) - probabilities >= self._p
        removed[..., 0] = False
        return _without(scores, order, removed)


class MinP(LogitsProcessor):
    """Removes tokens less probable than ``p`` times the highest probability (KoboldCpp)."""

    def __init__(self, p: float):
        self._p = p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities = _probabilities(scores)
        return scores.masked_fill(probabilities < self._p * probabilities.amax(-1, keepdim=True), -math.inf)


class TailFree(LogitsProcessor):
    """Cuts the tail off where the curve of the sorted probabilities flattens out.

    The absolute second differences of the sorted probabilities are normed to a sum of 1; what lies behind the
    point where they have added up to ``z`` goes. With 0, the likeliest token alone is left.
    """

    def __init__(self, z: float):
        self._z = z

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[-1] < 3:
            return scores
        probabilities, order = _probabilities(scores).sort(dim=-1, descending=True)
        curvature = probabilities.diff(dim=-1).diff(dim=-1).abs()
        tail = (curvature / curvature.sum(-1, keepdim=True)).cumsum(-1) > self._z
        # The differences are two fewer than the tokens: the first stays, the last goes.
        removed = torch.cat([torch.zeros_like(tail[..., :1]), tail, torch.ones_like(tail[..., :1])], -1)
        return _without(scores, order, removed)


class Typical(LogitsProcessor):
    """Keeps the fewest tokens that add up to ``mass``, those first whose surprise is nearest to the mean of all.

    Locally typical sampling (Meister et al. 2022, arXiv:2202.00666).
    """

    def __init__(self, mass: float):
        self._mass = mass

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities = _probabilities(scores)
        surprise = -probabilities.log()
        entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
        order = (surprise - entropy).abs().argsort(dim=-1)
        probabilities = probabilities.gather(-1, order)
        removed = probabilities.cumsum(-1) - probabilities >= self._mass
        removed[..., 0] = False
        return _without(scores, order, removed)


class Temperature(LogitsProcessor):
    """Divides the scores by ``temperature``."""

    def __init__(self, temperature: float):
        self._temperature = min(temperature, 1e6)  # as flat as can be; infinity would make nonsense of what is removed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores / self._temperature


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens less likely that stand among the last ``reach`` of the text; 0: anywhere in it.

    A score above zero is divided by the penalty, any other multiplied with it. With a ``slope``, the penalty grows
    over the reach from 1 to ``penalty`` along an S (1: a straight line); a token has that of its last occurrence.
    """

    def __init__(self, penalty: float, reach: int = 0, slope: float = 0.0):
        # Past these bounds nothing changes any more, but numbers overflow.
        self._penalty = min(max(penalty, 0.01), 100.0)
        self._reach = min(reach, 2**31)
        self._slope = min(max(slope, 1e-4), 1e4) if slope else 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = input_ids[:, -self._reach :]
        of_token = torch.ones_like(scores)
        if self._slope and self._reach > 1:
            length = seen.shape[1]
            at = torch.arange(self._reach - length, self._reach, dtype=torch.float64, device=scores.device)
            at = 2 * at / (self._reach - 1) - 1
            curve = self._slope * at / (1 + at.abs() * (self._slope - 1))
            penalties = (1 + (curve + 1) / 2 * (self._penalty - 1)).to(scores.dtype)
            for row, ids in enumerate(seen.tolist()):
                last = {token: place for place, token in enumerate(ids)}
                of_token[row, list(last)] = penalties[list(last.values())]
        else:
            of_token.scatter_(1, seen, self._penalty)
        return torch.where(scores > 0, scores / of_token, scores * of_token)


class CountPenalty(LogitsProcessor):
    """OpenAI's two penalties, on tokens generated so far: ``presence`` once, ``frequency`` each time."""

    def __init__(self, presence: float, frequency: float, n_prompt: int):
        self._presence = presence
        self._frequency = frequency
        self._n_prompt = n_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self._n_prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class Bias(LogitsProcessor):
    """Adds to the scores of single tokens; ids that the vocabulary has not are left aside."""

    def __init__(self, biases: Sequence[Tuple[int, float]]):
        self._biases = dict(biases)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        known = {token: bias for token, bias in self._biases.items() if 0 <= token < scores.shape[-1]}
        scores = scores.clone()
        if known:
            scores[:, list(known)] += torch.tensor(list(known.values()), dtype=scores.dtype, device=scores.device)
        return scores


class Ban(LogitsProcessor):
    """Removes tokens that may not come: by their ids, and what would complete one of ``words`` in the new text.

    Words are compared without regard to case, and may begin and end anywhere inside a token. ``texts``: what each
    token adds to a text, by its id. Where nothing would be left, nothing is removed.
    """

    def __init__(self, ids: Sequence[int], words: Sequence[str], texts: Sequence[str], n_prompt: int):
        self._words = [word.lower() for word in words if word]
        self._texts = texts
        self._n_prompt = n_prompt
        holding = [at for at, text in enumerate(texts) if any(word in text for word in self._words)]
        self._always = [*ids, *holding]
        self._always_mask: Optional[torch.Tensor] = None
        self._beginning_with: Dict[str, List[int]] = {}
        self._longest = max(map(len, self._words), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._always_mask is None:
            self._always_mask = torch.zeros_like(scores[0], dtype=torch.bool)
            self._always_mask[[each for each in self._always if 0 <= each < scores.shape[-1]]] = True
        banned = self._always_mask.expand_as(scores)
        if self._longest > 1:
            banned = banned.clone()
            for row, ids in enumerate(input_ids[:, self._n_prompt :].tolist()):
                for rest in self._rests(ids):
                    banned[row, [each for each in self._beginning(rest) if each < scores.shape[-1]]] = True
        nothing_left = (banned | (scores == -math.inf)).all(-1, keepdim=True)
        return scores.masked_fill(banned & ~nothing_left, -math.inf)

    def _rests(self, ids: Sequence[int]) -> List[str]:
        """What would complete a word that the text ends with the beginning of."""
        tail = ""
        for token in reversed(ids):
            tail = (self._texts[token] if token < len(self._texts) else "") + tail
            if len(tail) >= self._longest:
                break
        return [word[size:] for word in self._words for size in range(1, len(word)) if tail.endswith(word[:size])]

    def _beginning(self, rest: str) -> List[int]:
        if rest not in self._beginning_with:
            self._beginning_with[rest] = [at for at, text in enumerate(self._texts) if text.startswith(rest)]
        return self._beginning_with[rest]


def samplers(
    settings: GenerationSettings, n_prompt: int, eos: Sequence[int], texts: Callable[[], Sequence[str]], greedy: bool
) -> LogitsProcessorList:
    """What ``settings`` asks for, in its order; first what is banned. A sampler that would change nothing is left out.

    ``n_prompt``: tokens of text before the first new one. ``eos``: ids that end a text. ``texts``: what each token
    adds to a text, in lower case, by its id; called only where words are banned. ``greedy``: the likeliest token is
    taken in the end, so that only what changes which one that is counts.
    """
    chosen: List[Any] = []
    if settings.logit_bias:
        chosen.append(Bias(settings.logit_bias))
    banned = list(eos) if settings.ban_eos else []
    if banned or settings.bad_words:
        chosen.append(Ban(banned, settings.bad_words, texts() if settings.bad_words else (), n_prompt))
    for each in settings.sampler_order:
        if each == REPETITION_PENALTY:
            if settings.rep_pen != 1.0:
                chosen.append(RepetitionPenalty(settings.rep_pen, settings.rep_pen_range, settings.rep_pen_slope))
            if settings.presence_penalty or settings.frequency_penalty:
                chosen.append(CountPenalty(settings.presence_penalty, settings.frequency_penalty, n_prompt))
        elif not greedy:
            chosen.extend(_cutting(each, settings))
    return LogitsProcessorList(chosen)


def _cutting(number: int, settings: GenerationSettings) -> List[Any]:
    if number == TOP_K and settings.top_k > 0:
        return [TopK(settings.top_k)]
    if number == TOP_A and settings.top_a > 0:
        return [TopA(settings.top_a)]
    if number == TOP_P:  # KoboldCpp has min-p in the same place
        top_p: List[Any] = [TopP(settings.top_p)] if settings.top_p < 1 else []
        return [*top_p, MinP(settings.min_p)] if settings.min_p > 0 else top_p
    if number == TAIL_FREE and settings.tfs < 1:
        return [TailFree(settings.tfs)]
    if number == TYPICAL and settings.typical < 1:
        return [Typical(settings.typical)]
    if number == TEMPERATURE and settings.temperature != 1:
        return [Temperature(settings.temperature)]
    return []


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def _without(scores: torch.Tensor, order: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """``scores`` without what is ``removed``, which is said in ``order``."""
    return scores.masked_fill(removed.scatter(-1, order, removed), -math.inf)
