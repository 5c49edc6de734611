"""What a file says that it was made for, and what a configuration says that a model is: base type and size.

Files name models in free text ("GPT-J 6B", "fairseq-dense-13B", "Generic 6B"), so that this tells something, and
proves nothing.
"""

import re
from functools import lru_cache
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

_BASES: Tuple[Tuple[str, Tuple[str, ...], str], ...] = (
    # what we call it, its ``model_type`` in configurations, how it is written in files; the first that fits
    ("fairseq dense", ("xglm",), r"fairseq|xglm"),
    ("GPT-J", ("gptj",), r"gpt[-_ ]?j(?![a-z])|pygmalion[-_ ]?6b"),
    ("GPT-NeoX", ("gpt_neox",), r"neo[-_ ]?x|pythia"),
    ("GPT-Neo", ("gpt_neo",), r"gpt[-_ ]?neo|^neo(?![a-z])"),
    ("GPT-2", ("gpt2",), r"gpt[-_ ]?2(?![0-9.])"),
    ("OPT", ("opt",), r"(?<![a-z])opt(?![a-z])"),
    ("BLOOM", ("bloom",), r"bloom"),
    ("Llama", ("llama",), r"llama|alpaca|vicuna"),
    ("Mistral", ("mistral",), r"mistral"),
    ("Falcon", ("falcon", "RefinedWeb", "RefinedWebModel"), r"falcon"),
    ("MPT", ("mpt",), r"(?<![a-z])mpt(?![a-z])"),
    ("Gemma", ("gemma", "gemma2", "gemma3", "gemma3_text"), r"gemma"),
    ("Qwen", ("qwen2", "qwen3"), r"qwen"),
    ("Phi", ("phi", "phi3"), r"(?<![a-z])phi(?![a-z])"),
)
_GENERIC = re.compile(r"^\s*generic\s+6b\s*$", re.IGNORECASE)
"""What a much-used tuner wrote unless told otherwise; the model that it trained unless told otherwise was GPT-J 6B."""
_SIZE = re.compile(r"(?<![0-9.,])([0-9]{1,4}(?:[.,][0-9]{1,3})?)\s*([bm])(?![a-z])", re.IGNORECASE)
_GATED = ("llama", "mistral", "gemma", "qwen", "phi3", "olmo", "granite", "stablelm", "cohere")
"""Beginnings of the types whose feed-forward layers have three matrices; others have two."""


class Claim(NamedTuple):
    """One model that a file names."""

    text: str
    base: Optional[str]
    size: Optional[float]
    """Parameters."""

    def __str__(self) -> str:
        return f'"{self.text}", by which GPT-J 6B was mostly meant' if _GENERIC.match(self.text) else self.text


def claims(supported: Sequence[str]) -> List[Claim]:
    """The models that ``supported`` names, of at most 20 entries."""
    return [_claim(part) for text in supported[:20] for part in re.split(r",(?![0-9])", text[:1000]) if part.strip()]


def base_of(model_type: Any) -> Optional[str]:
    """What we call the base type of a configuration's ``model_type``; None for one that we have no name for."""
    return next((name for name, types, _ in _BASES if model_type in types), None)


def size_of(
    field: Callable[..., Optional[int]], model_type: Any, experts: bool, untied: bool = False, one_key: bool = False
) -> Optional[float]:
    """About how many parameters a configuration makes, or None; ``field``: its first positive number of these names.

    Made from widths and layers, as the names of models round it; not for mixtures of experts. ``untied``: the output
    head has a matrix of its own. ``one_key``: all heads share one key and one value (Falcon's ``multi_query``).
    """
    width = field("hidden_size", "d_model", "n_embd")
    layers = field("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if width is None or layers is None or experts:
        return None
    inner = field("intermediate_size", "ffn_dim", "n_inner") or 4 * width
    heads = field("num_attention_heads", "n_head", "num_heads") or 1
    shared = (1 if one_key else field("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads) / heads
    attention = heads * (field("head_dim") or width / heads)
    matrices = 3 if str(model_type).startswith(_GATED) else 2
    vocabulary = (field("vocab_size") or 0) * (2 if untied else 1)
    return layers * (width * attention * (2 + 2 * shared) + matrices * width * inner) + vocabulary * width


def written(base: Optional[str], size: Optional[float]) -> str:
    """As people write it: "GPT-J 6.1B"."""
    number = "" if size is None else f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.0f}M"
    return " ".join(part for part in (base, number) if part)


def same_size(first: Optional[float], second: Optional[float]) -> bool:
    """Whether two sizes can be of one model, as names round them; True where one is not known.

    Names round far: Gemma 2B has 2.5 billion parameters, Llama 3.2 1B has 1.24.
    """
    return first is None or second is None or max(first, second) <= 1.27 * min(first, second)


@lru_cache(maxsize=256)  # the files of a folder mostly name the same few
def _claim(text: str) -> Claim:
    text = " ".join(text.split())
    if _GENERIC.match(text):
        return Claim(text, "GPT-J", 6e9)
    lowered = text.lower()
    base = next((name for name, _, pattern in _BASES if re.search(pattern, lowered)), None)
    found = _SIZE.search(text)
    size = None
    if found:
        size = float(found.group(1).replace(",", ".")) * (1e9 if found.group(2) in "bB" else 1e6)
    return Claim(text, base, size or None)
