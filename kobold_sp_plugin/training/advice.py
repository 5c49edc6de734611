"""What is to be said of a data set before it is trained on, and a cleaned copy of it.

Each :class:`Remark` is one kind of trouble with its count; what :func:`clean` can mend, it mends in a copy.
"""

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

from ..errors import NoData
from ..formats.writing import write_file
from .texts import DOCUMENT_END, decoded, files_of, in_order

ADVISED_BYTES = 8_000_000
"""The guide's advice: at least 8 MB of text; less gives a soft prompt that knows little but its opening."""
_TINY_BYTES = 100_000

_MARKUP = re.compile(
    r"</?(?:p|br|div|span|i|b|em|strong|a|h[1-6]|hr|font|center)\b[^<>]{0,200}>|\[/?(?:b|i|u|url|quote)\]", re.I
)
_ENTITY = re.compile(r"&(?:[a-z]{2,8}|#\d{1,6});", re.I)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Remark(NamedTuple):
    """One kind of trouble."""

    kind: str
    times: int
    """How often; of the size: bytes."""
    sentence: str
    mended: bool
    """Whether :func:`clean` does something about it."""


class Advice(NamedTuple):
    """What was found in a data set."""

    files: int
    documents: int
    n_bytes: int
    remarks: Tuple[Remark, ...]


def advise(path: Path) -> Advice:
    """Look at the texts at ``path``, a file or a folder. Raises :class:`NoData`."""
    found: Dict[str, int] = Counter()
    examples: Dict[str, str] = {}
    seen: Dict[bytes, str] = {}
    files = files_of(path)
    documents = n_bytes = 0
    for file in files:
        text, encoding, is_guess = decoded(file.read_bytes())
        n_bytes += len(text.encode("utf-8", errors="replace"))
        if is_guess:
            found["encoding"] += 1
            examples.setdefault("encoding", f"{file.name}: {encoding}")
        if file.suffix.lower() != ".txt":
            documents += text.count("\n")
            continue
        for document in text.split(DOCUMENT_END):
            if not document.strip():
                continue
            documents += 1
            digest = hashlib.sha256(" ".join(document.split()).encode("utf-8", errors="replace")).digest()
            if digest in seen:
                found["duplicate"] += 1
                examples.setdefault("duplicate", f"{file.name} and {seen[digest]}")
            seen.setdefault(digest, file.name)
            for kind, _, trouble in _TROUBLES:
                count = trouble(document)
                if count:
                    found[kind] += count
                    examples.setdefault(kind, file.name)
    if not documents:
        raise NoData(f"The files in {path} hold no text.")
    remarks = [*_of_size(n_bytes)]
    if found["encoding"]:
        sentence = f"{found['encoding']} files are not UTF-8; their encoding was guessed ({examples['encoding']})"
        remarks.append(Remark("encoding", found["encoding"], sentence, True))
    if found["duplicate"]:
        sentence = f"{found['duplicate']} documents are there twice ({examples['duplicate']})"
        remarks.append(Remark("duplicate", found["duplicate"], sentence, True))
    for kind, sentence, _ in _TROUBLES:
        if found[kind]:
            remarks.append(Remark(kind, found[kind], f"{found[kind]} {sentence} (first in {examples[kind]})", True))
    return Advice(len(files), documents, n_bytes, tuple(remarks))


def clean(path: Path, target: Path) -> List[Path]:
    """Write a cleaned copy of the texts at ``path`` into the folder ``target``; the files that it wrote.

    UTF-8, mended encodings, no markup, paragraphs in one line each, every document once. Nothing at ``path`` changes.
    Raises :class:`NoData`, and :class:`FileExistsError` where ``target`` holds something.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} holds something already; name a new folder")
    written = []
    seen = set()
    for file in files_of(path):
        content = decoded(file.read_bytes()).text
        if file.suffix.lower() == ".txt":
            kept = []
            for document in content.split(DOCUMENT_END):
                mended = mend(document)
                digest = " ".join(mended.split())
                if digest and digest not in seen:
                    seen.add(digest)
                    kept.append(mended)
            content = f"\n{DOCUMENT_END}\n".join(kept)
            if not content:
                continue
        relative = file.name if path.is_file() else str(file.relative_to(path))
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_file(str(copy), content.encode("utf-8", errors="replace"))
        written.append(copy)
    return written


def mend(document: str) -> str:
    """``document`` with its encoding, markup and line breaks put right; running it again changes nothing."""
    text = (
        in_order(document).replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    )
    text = _MARKUP.sub("", _CONTROL.sub("", text))
    if _wrapped_lines(text):
        text = _unwrapped(text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _of_size(n_bytes: int) -> Iterator[Remark]:
    megabytes = n_bytes / 1e6
    if n_bytes < _TINY_BYTES:
        sentence = f"only {n_bytes / 1000:.0f} kB of text: a soft prompt of it repeats it more than it learns from it"
        yield Remark("size", n_bytes, sentence, False)
    elif n_bytes < ADVISED_BYTES:
        yield Remark("size", n_bytes, f"{megabytes:.1f} MB of text; 8 MB or more, on one theme, work best", False)


def _wrapped_lines(text: str) -> int:
    """Lines that were broken to fit a page: most lines of the text end at about one column, in mid-sentence."""
    lines = [line.rstrip() for line in text.split("\n")]
    pairs = [(line, following) for line, following in zip(lines, lines[1:]) if line and following]
    if len(pairs) < 4:
        return 0
    longest = max(len(line) for line, _ in pairs)
    broken = [line for line, following in pairs if _is_broken(line, following, longest)]
    return len(broken) if 40 <= longest <= 120 and len(broken) >= 0.6 * len(pairs) else 0


def _is_broken(line: str, following: str, longest: int) -> bool:
    """Whether the first word of the next line would not have fitted this one, and the sentence goes on."""
    return len(line) + 1 + len(following.split(" ", 1)[0]) > 0.9 * longest and not following.startswith((" ", "\t"))


def _unwrapped(text: str) -> str:
    lines = [line.rstrip() for line in text.split("\n")]
    longest = max(map(len, lines))
    result = [lines[0]]
    for before, line in zip(lines, lines[1:]):
        if before and line and _is_broken(before, line, longest):
            result[-1] += (" " if not result[-1].endswith("-") else "") + line
        else:
            result.append(line)
    return "\n".join(result)


def _mojibake(text: str) -> int:
    import ftfy

    return sum(ftfy.badness.is_bad(line) for line in text.split("\n"))


_TROUBLES: Tuple[Tuple[str, str, Callable[[str], Any]], ...] = (
    ("mojibake", "lines look as if they had been read in a wrong encoding", _mojibake),
    ("markup", "pieces of markup, which the model would learn to write", lambda text: len(_MARKUP.findall(text))),
    ("entity", "HTML entities", lambda text: len(_ENTITY.findall(text))),
    ("wrap", "lines were broken to fit a page, and the model would learn to break them", _wrapped_lines),
    ("control", "control characters", lambda text: len(_CONTROL.findall(text))),
)
