"""A fingerprint tells one embedding matrix from another without keeping any of it. Version 2 is made so:

1. Of the token ids below ``min(vocabulary, 4096)``, take the 512 with the smallest
   ``id * 2654435761 mod 2**32``. Tokens that are added at the end change nothing.
2. Subtract the mean of their rows: what rows share proves nothing. Then divide each column by its standard
   deviation, or by twice the median of all columns' if that is more: in some models a few columns outweigh all
   others, and nothing else would count.
3. Project each row onto 8 directions of its own, of +1 and -1 as the bits of SHAKE-256 of "row <id>" say, and
   keep the signs: 512 bytes.

Of two matrices whose rows differ by the angle ``a`` the share ``1 - a / pi`` of the signs agree; the similarity
is the cosine of that angle. ``benchmarks/fingerprint.py`` is the experiment that chose all this, and the thresholds.
"""

import base64
import binascii
import hashlib
import math
from functools import lru_cache
from typing import Any, Dict, Mapping, NamedTuple, Optional

import numpy as np

from ..errors import NoEmbedding

VERSION = 2
SAME = 0.998
"""Similarity from which it is the same matrix, in 16 bits or in 8. A gentle fine-tune can be as close, and a copy in 8
bits whose rows have one scale each may be less: nothing that is small tells those two apart for sure."""
CLOSE = 0.90
"""Similarity from which a relative is close: most fine-tunes, and copies in 4 bits."""
RELATED = 0.20
"""Similarity from which one was made from the other, or both from one. Of 59,400 simulated unrelated pairs none is
above 0.13, of 11,016 related ones none below 0.32."""

N_ROWS = 512
N_SIGNS = 8
_AMONG = 4096
_FEWEST_ROWS = 64
"""With fewer rows in common, chance could pass for kinship."""
_AT_ONCE = 32
"""Rows whose directions are made at a time: 8 MB for a width of 8,192."""


class _Signs(NamedTuple):
    width: int
    ids: np.ndarray
    signs: np.ndarray


def describe(rows: np.ndarray, vocabulary: int) -> Dict[str, Any]:
    """The fingerprint of a matrix of ``vocabulary`` rows whose rows :func:`sampled_ids` are ``rows``: small JSON.

    ``rows``: float32 ``[len(sampled_ids(vocabulary)), width]``. Raises :class:`NoEmbedding` for rows that are not
    finite, or all alike.
    """
    signs = _signs(sampled_ids(vocabulary), rows)
    return {
        "version": VERSION,
        "vocabulary": vocabulary,
        "width": int(rows.shape[1]),
        "signs": base64.b64encode(np.packbits(signs).tobytes()).decode("ascii"),
    }


@lru_cache(maxsize=8)
def sampled_ids(vocabulary: int) -> np.ndarray:
    """Step 1 of the module's docstring: int64, in the order of the ids."""
    if vocabulary > _AMONG:
        return sampled_ids(_AMONG)  # the same array for all, so that it is seen at a glance
    order = np.arange(vocabulary, dtype=np.uint32) * np.uint32(2654435761)
    ids = np.sort(np.argsort(order, kind="stable")[:N_ROWS]).astype(np.int64)
    ids.setflags(write=False)
    return ids


def similarity(first: Any, second: Any) -> Optional[float]:
    """How alike two matrices are, -1 to 1, by their fingerprints; None where those cannot be compared."""
    ours, theirs = _decoded(first), _decoded(second)
    if ours is None or theirs is None or ours.width != theirs.width:
        return None
    our_signs, their_signs = ours.signs, theirs.signs
    if ours.ids is not theirs.ids:
        _, in_ours, in_theirs = np.intersect1d(ours.ids, theirs.ids, assume_unique=True, return_indices=True)
        our_signs, their_signs = our_signs[in_ours], their_signs[in_theirs]
    if len(our_signs) < _FEWEST_ROWS:
        return None
    return math.cos(math.pi * np.count_nonzero(our_signs != their_signs) / our_signs.size)


def _decoded(fingerprint: Any) -> Optional[_Signs]:
    """What a fingerprint of this version says, else None."""
    if not isinstance(fingerprint, Mapping) or fingerprint.get("version") != VERSION:
        return None
    width, vocabulary, signs = (fingerprint.get(key) for key in ("width", "vocabulary", "signs"))
    if not isinstance(signs, str) or len(signs) > 1000:
        return None
    if not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in (width, vocabulary)):
        return None
    return _decoded_text(int(width or 0), min(int(vocabulary or 0), _AMONG), signs)


@lru_cache(maxsize=64)
def _decoded_text(width: int, vocabulary: int, text: str) -> Optional[_Signs]:
    ids = sampled_ids(vocabulary)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(data) * 8 != len(ids) * N_SIGNS:
        return None
    return _Signs(width, ids, np.unpackbits(np.frombuffer(data, dtype=np.uint8)).reshape(len(ids), N_SIGNS))


def _signs(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Steps 2 and 3: bool ``[len(ids), 8]`` for ``rows`` ``[len(ids), width]``."""
    if not np.isfinite(rows).all():
        raise NoEmbedding("the embedding holds values that are not finite")
    largest = float(np.abs(rows).max())
    rows = rows - rows.mean(axis=0)
    deviations = rows.std(axis=0)
    if len(rows) > 1 and float(deviations.max()) <= 1e-6 * largest:
        raise NoEmbedding("the rows of the embedding are all alike: nothing was loaded into it")
    rows /= np.maximum(deviations, max(2 * float(np.median(deviations)), 1e-30))
    signs = np.empty((len(ids), N_SIGNS), dtype=bool)
    for start in range(0, len(ids), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        directions = np.stack([_directions(token_id, rows.shape[1]) for token_id in ids[part]])
        signs[part] = np.matmul(directions, rows[part, :, None])[:, :, 0] >= 0
    return signs


def _directions(token_id: int, width: int) -> np.ndarray:
    """Float32 ``[8, width]`` of +1 and -1."""
    seed = f"kobold_sp_plugin fingerprint {VERSION}: row {token_id}"
    data = hashlib.shake_256(seed.encode("ascii")).digest(-(-width * N_SIGNS // 8))
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    return (bits[: width * N_SIGNS].astype(np.float32) * 2 - 1).reshape(N_SIGNS, width)
