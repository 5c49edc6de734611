"""What clients ask for, checked: KoboldAI's fields of a request for text, with United's ranges."""

import json
import math
import sys
from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from ..engines import GenerationSettings
from ..errors import SoftPromptError
from ..session import Session
from ..softprompt import SoftPrompt

LONGEST_BODY = 4 * 1024 * 1024
"""Bytes of a request's body; a longer one is refused."""

LONGEST_TEXT = 65536
"""New tokens that may be asked for; where a model's context is unknown, nothing else limits them."""

_LARGEST_SEED = 2**64 - 1


class InvalidRequest(SoftPromptError):
    """Fields that are missing, or not of the type or range they have to be; ``detail`` lists them as KoboldAI does."""

    def __init__(self, detail: Dict[str, List[str]]):
        self.detail = detail
        super().__init__("; ".join(f"{field}: {' '.join(messages)}" for field, messages in detail.items()))


class _Number(NamedTuple):
    whole: bool = False
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    def read(self, value: Any) -> Any:
        """The value as the number it has to be. Raises :class:`ValueError` with what is wrong."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise ValueError("Not a valid integer." if self.whole else "Not a valid number.")
        if self.whole and value != int(value):
            raise ValueError("Not a valid integer.")
        if not self.least <= value <= self.most:
            raise ValueError(f"Must be {self._range()}.")
        if not value > self.above:
            raise ValueError(f"Must be greater than {self.above:g}.")
        return int(value) if self.whole else float(value)

    def _range(self) -> str:
        least = f"greater than or equal to {self.least:g}"
        return least if self.most == math.inf else f"{least} and less than or equal to {self.most}"


_SETTINGS = {
    "max_length": ("max_length", _Number(whole=True, least=1, most=LONGEST_TEXT)),
    "max_context_length": ("max_context_length", _Number(whole=True, least=1)),
    "temperature": ("temperature", _Number(above=0)),
    "top_p": ("top_p", _Number(least=0, most=1)),
    "top_k": ("top_k", _Number(whole=True, least=0)),
    "typical": ("typical", _Number(least=0, most=1)),
    "rep_pen": ("rep_pen", _Number(least=1)),
    "sampler_seed": ("seed", _Number(whole=True, least=0, most=_LARGEST_SEED)),
}
"""KoboldAI's field, ours, and what it may be."""

_NOT_HONOURED = {
    "rep_pen_range": _Number(whole=True, least=0),
    "rep_pen_slope": _Number(least=0),
    "tfs": _Number(least=0, most=1),
    "top_a": _Number(least=0),
}
"""Samplers that transformers has not: checked, so that a client's mistake shows, and left aside."""

_N = _Number(whole=True, least=1, most=5)


class GenerationRequest(NamedTuple):
    """A checked request for text."""

    settings: Tuple[GenerationSettings, ...]
    """One for each text that is wanted."""
    soft_prompt: Optional[str]
    """For this request alone: a file name, blank for none; None for what is selected."""

    def softprompts(self, session: Session) -> Tuple[SoftPrompt, ...]:
        """The soft prompts as they are now. Raises what :meth:`Session.softprompt` raises."""
        if self.soft_prompt is None:
            return session.softprompts
        return (session.softprompt(self.soft_prompt),) if self.soft_prompt.strip() else ()


def read_object(body: bytes) -> Dict[str, Any]:
    """The JSON object of a body; an empty body is an empty object. Raises :class:`InvalidRequest`."""
    if not body.strip():
        return {}
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest({"json": [f"Invalid JSON body: {error}"]}) from error
    if not isinstance(value, dict):
        raise InvalidRequest({"json": ["Expected an object."]})
    return value


def read_generation(fields: Dict[str, Any]) -> GenerationRequest:
    """A request for text from its fields; a null is as good as none, and unknown fields are left aside.

    Raises :class:`InvalidRequest` with everything that is wrong.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    wrong: Dict[str, List[str]] = {}
    settings: Dict[str, Any] = {}
    n = 1
    if "prompt" not in given:
        wrong["prompt"] = ["Missing data for required field."]
    for name in ("prompt", "memory", "soft_prompt"):
        if not isinstance(given.get(name, ""), str):
            wrong[name] = ["Not a valid string."]
    for name in given:
        try:
            if name in _SETTINGS:
                ours, number = _SETTINGS[name]
                settings[ours] = number.read(given[name])
            elif name in _NOT_HONOURED:
                _NOT_HONOURED[name].read(given[name])
            elif name == "n":
                n = _N.read(given[name])
            elif name == "stop_sequence":
                settings[name] = _texts(given[name])
            elif name == "sampler_order":
                _check_order(given[name])
        except ValueError as error:
            wrong[name] = [str(error)]
    if wrong:
        raise InvalidRequest(wrong)
    texts: Dict[str, Any] = {name: _whole(given[name]) for name in ("prompt", "memory") if name in given}
    first = GenerationSettings(**texts, **settings)
    seeds = [None if first.seed is None else (first.seed + each) % (_LARGEST_SEED + 1) for each in range(n)]
    return GenerationRequest(tuple(replace(first, seed=seed) for seed in seeds), given.get("soft_prompt"))


def read_soft_prompt(fields: Dict[str, Any]) -> str:
    """The file name that ``PUT config/soft_prompt`` asks for, "" for none. Raises :class:`InvalidRequest`."""
    value = fields.get("value")
    if value is None:
        raise InvalidRequest({"value": ["Missing data for required field."]})
    if not isinstance(value, str):
        raise InvalidRequest({"value": ["Not a valid string."]})
    return value if value.strip() else ""


def _texts(value: Any) -> Tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("Not a valid list of strings.")
    return tuple(_whole(text) for text in value)


def _whole(text: str) -> str:
    """``text`` with U+FFFD for halves of a character, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_finite(value: float) -> bool:
    """Whether a float can hold it; JSON's whole numbers may have any number of digits."""
    return abs(value) <= sys.float_info.max


def _check_order(value: Any) -> None:
    if not isinstance(value, list) or len(value) < 6:
        raise ValueError("Shorter than minimum length 6.")
    if any(isinstance(each, bool) or not isinstance(each, int) for each in value) or sorted(value) != list(
        range(len(value))
    ):
        raise ValueError("Must be a permutation of the first N non-negative integers, where N is its length.")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
