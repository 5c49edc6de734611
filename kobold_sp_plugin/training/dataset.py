"""Passages as token ids in memory-mapped files: pieces of at most a block, each with what of it is learned.

A piece is one document, or a part of one: documents never share a row, so that none reads another. Batches are made of
pieces of like length, so that little is padding.
"""

import copy
import hashlib
import json
import os
import random
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..errors import NoData
from ..formats.writing import write_file
from .texts import Passage

_AT_ONCE = 2**20
"""Letters that the tokenizer is given at once: what it keeps of each token takes far more memory than the token."""
IGNORED = -100
"""The label of a position at which nothing is to be learned; torch's own convention."""


class Batch(NamedTuple):
    """Right-padded texts: where a causal model does not see it, padding needs no mask."""

    ids: np.ndarray
    """int64 ``[batch, length]``; the tokens before the text (the beginning-of-sequence token) included."""
    labels: np.ndarray
    """int64 ``[batch, length]``: the id itself where it is learned, else -100."""


class Dataset:
    """The pieces, on disk; opened again from its folder by :meth:`open`."""

    def __init__(self, folder: Path):
        self.folder = folder
        about = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        self.digest: str = about["digest"]
        """SHA-256 of ids, labels and cuts: two trainings on the same digest read the same."""
        self.prefix: Tuple[int, ...] = tuple(about["prefix"])
        """Tokens before every piece."""
        self.n_tokens: int = about["n_tokens"]
        self._ids = np.memmap(folder / "tokens.ids", dtype=about["dtype"], mode="r", shape=(self.n_tokens,))
        self._learned = np.memmap(folder / "tokens.learned", dtype=np.bool_, mode="r", shape=(self.n_tokens,))
        cuts = np.asarray(about["cuts"], dtype=np.int64)
        self._starts, self._stops = cuts[:-1], cuts[1:]
        self._documents = np.asarray(about["documents"], dtype=np.int64)
        self._runs = np.asarray(about["runs"], dtype=np.int64)
        """For each piece the number of its run: pieces of a document that nothing was left out between."""

    @classmethod
    def write(
        cls,
        passages: Iterable[Passage],
        tokenizer: Any,
        folder: Path,
        block: int,
        newline: str = "\n",
        source: Optional[str] = None,
    ) -> "Dataset":
        """Tokenise ``passages`` into ``folder``; pieces of at most ``block`` tokens, the prefix included.

        ``newline``: what a line break is for the model ("</s>" for fairseq models). ``source``: a digest of all that
        this depends on; where ``folder`` holds what was made of the same, nothing is done. Raises :class:`NoData`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if source is not None and cls._is_of(folder, source):
            return cls(folder)
        with suppress(FileNotFoundError):
            os.unlink(folder / "tokens.json")  # without it nobody takes half of the other two for the whole
        prefix = prefix_of(tokenizer)
        room = max(1, block - len(prefix))
        dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
        digest = hashlib.sha256(repr((prefix, room)).encode())
        cuts, documents, runs, run, count = [0], [], [], 0, 0
        with _whole(folder / "tokens.ids") as ids_file, _whole(folder / "tokens.learned") as learned_file:
            for number, passage in enumerate(passages):
                ids, learned = _tokens(passage, tokenizer, newline)
                if not any(learned):
                    continue
                run += 1
                # Parts of one length: cut at every block, the last one would be a few words out of nowhere.
                parts = -(-len(ids) // room)
                for number_of_part in range(parts):
                    part = slice(len(ids) * number_of_part // parts, len(ids) * (number_of_part + 1) // parts)
                    if not any(learned[part]):
                        run += 1
                        continue
                    for file, values in (
                        (ids_file, np.asarray(ids[part], dtype=dtype).tobytes()),
                        (learned_file, np.asarray(learned[part], dtype=np.bool_).tobytes()),
                    ):
                        file.write(values)
                        digest.update(values)
                    count += part.stop - part.start
                    cuts.append(count)
                    documents.append(number)
                    runs.append(run)
        if not count:
            raise NoData("The data holds nothing to learn from: every document in it is empty.")
        digest.update(np.asarray(cuts, dtype="<i8").tobytes())
        about = {"dtype": dtype.str, "n_tokens": count, "prefix": list(prefix)}
        about.update(cuts=cuts, documents=documents, runs=runs, digest=digest.hexdigest(), source=source)
        content = json.dumps(about)
        write_file(str(folder / "tokens.json"), content.encode("utf-8"))
        return cls(folder)

    @staticmethod
    def _is_of(folder: Path, source: str) -> bool:
        try:
            about = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
            sizes = [(folder / name).stat().st_size for name in ("tokens.ids", "tokens.learned")]
            count = about["n_tokens"]
            return bool(about["source"] == source and sizes == [count * np.dtype(about["dtype"]).itemsize, count])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def n_documents(self) -> int:
        """How many documents the pieces are of."""
        return len(np.unique(self._documents))

    def is_beginning(self, piece: int) -> bool:
        """Whether a piece is the beginning of its document."""
        return piece == 0 or bool(self._documents[piece - 1] != self._documents[piece])

    def length(self, piece: int) -> int:
        """Tokens of a piece, those before it included."""
        return len(self.prefix) + int(self._stops[piece] - self._starts[piece])

    def batch(self, pieces: Sequence[int]) -> Batch:
        """The batch of these pieces."""
        longest = max(map(self.length, pieces))
        ids = np.zeros((len(pieces), longest), dtype=np.int64)
        labels = np.full((len(pieces), longest), IGNORED, dtype=np.int64)
        ids[:, : len(self.prefix)] = self.prefix
        for row, piece in enumerate(pieces):
            part = slice(self._starts[piece], self._stops[piece])
            columns = slice(len(self.prefix), self.length(piece))
            ids[row, columns] = self._ids[part]
            labels[row, columns] = np.where(self._learned[part], ids[row, columns], IGNORED)
        return Batch(ids, labels)

    def split(self, share: float, seed: int, most_tokens: int = 2**16) -> Tuple[List[int], List[int]]:
        """The pieces to train on, and those held out, of at most about ``most_tokens``: looking at more tells no more.

        Whole documents; the last pieces of all of them where there are too few (some books).
        """
        documents = sorted(set(self._documents.tolist()))
        if not share or len(self) < 2:
            return list(range(len(self))), []
        share = min(share, most_tokens / self.n_tokens)
        if share * len(documents) < 0.5 or len(documents) == 1:
            parts = [np.flatnonzero(self._documents == document).tolist() for document in documents]
            last = sorted(piece for part in parts for piece in part[len(part) - round(share * len(part)) :])
            last = last or [len(self) - 1]
            return sorted(set(range(len(self))) - set(last)), last
        random.Random(f"held out:{seed}").shuffle(documents)
        held = set(documents[: max(1, round(share * len(documents)))])
        pieces: Tuple[List[int], List[int]] = ([], [])
        for piece, document in enumerate(self._documents.tolist()):
            pieces[document in held].append(piece)
        return pieces

    def cut_anew(self, pieces: Sequence[int], order: Any) -> "Dataset":
        """The tokens of ``pieces`` as a data set of its own, cut at places drawn by ``order``.

        What is one piece stays so; of several pieces of a document in a row the first gets any length from an eighth
        of the longest piece up to all of it, and the others are alike again. ``order`` is as in :meth:`batches`.
        """
        rng = random.Random(order)
        ordered = np.sort(np.asarray(pieces))
        room = int((self._stops - self._starts)[ordered].max())
        follows = (np.diff(ordered) == 1) & (np.diff(self._runs[ordered]) == 0)
        cut: List[Tuple[int, int, int, int]] = []
        for together in np.split(ordered, np.flatnonzero(~follows) + 1):
            first, start, stop = together[0], int(self._starts[together[0]]), int(self._stops[together[-1]])
            places = [start, stop]
            if len(together) > 1:
                least = max(1, room // 8)  # fewer tokens would be a few words out of nowhere
                second = start + rng.randint(least, min(room, stop - start - least))
                parts = -(-(stop - second) // room)
                places = [start, *(second + (stop - second) * part // parts for part in range(parts + 1))]
            about = int(self._documents[first]), int(self._runs[first])
            cut += [(*ends, *about) for ends in zip(places, places[1:]) if self._learned[slice(*ends)].any()]
        anew = copy.copy(self)
        anew._starts, anew._stops, anew._documents, anew._runs = np.asarray(cut, dtype=np.int64).T
        return anew

    def batches(self, pieces: Sequence[int], most_tokens: int, extra: int, order: Any) -> List[List[int]]:
        """Batches of pieces of like length, of at most ``most_tokens`` with padding and ``extra`` tokens a row.

        A piece too long for that is a batch by itself. ``order``: anything that :class:`random.Random` takes; the same
        gives the same batches in the same order.
        """
        rng = random.Random(order)
        by_length = sorted(pieces, key=lambda piece: (self.length(piece), rng.random()))
        result: List[List[int]] = []
        for piece in by_length:
            if not result or (len(result[-1]) + 1) * (self.length(piece) + extra) > most_tokens:
                result.append([])
            result[-1].append(piece)
        rng.shuffle(result)
        return result


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is on the disk at the end of the ``with`` block; where that fails it is gone again.

    It has its name from the beginning: it is large, and nothing reads it without the file that says that it is whole.
    """
    try:
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            os.unlink(path)  # a disk that is full gets its room back
        raise


def prefix_of(tokenizer: Any) -> Tuple[int, ...]:
    """What the tokenizer puts before every text: the beginning-of-sequence token, for models that have it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    return ()


def _tokens(passage: Passage, tokenizer: Any, newline: str) -> Tuple[List[int], List[bool]]:
    """The ids of a passage and whether each is learned; the end of the text, where there is a token for it, is."""
    ids: List[int] = []
    learned: List[bool] = []
    for text, is_learned in passage.parts:
        # JSON can hold half of a character; tokenizers refuse it.
        whole = text.encode("utf-8", "replace").decode("utf-8")
        for piece in _at_lines(whole):
            part = tokenizer(piece.replace("\n", newline), add_special_tokens=False, verbose=False)["input_ids"]
            ids += part
            learned += [is_learned] * len(part)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        learned.append(True)
    return ids, learned


def _at_lines(text: str) -> Iterator[str]:
    """``text`` in pieces of at most :data:`_AT_ONCE` letters that end with a line wherever that can be."""
    start = 0
    while start < len(text):
        end = start + _AT_ONCE
        if end < len(text):
            end = (text.rfind("\n", start, end) + 1) or end
        yield text[start:end]
        start = end
