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
from .preflight import size
from .texts import DOCUMENT_END, SUFFIXES, decoded, files_of, in_order, left_out, other_documents, passages

ADVISED_BYTES = 8_000_000
"""The guide's advice: at least 8 MB of text; less gives a soft prompt that knows little but its opening."""
_TINY_BYTES = 100_000
_JSON = (".jsonl", ".json")

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
    """Look at the texts at ``path``, a file or a folder.

    Raises :class:`NoData` or :class:`~kobold_sp_plugin.errors.DataNotUnderstood`.
    """
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
        is_text = file.suffix.lower() not in _JSON
        if not is_text:
            documents += sum(1 for _ in passages(file, _PlainTemplate()))
        for part in _parts(file, text):
            documents += is_text
            digest = _digest(part)
            if digest in seen:
                found["duplicate"] += 1
                examples.setdefault("duplicate", f"{file.name} and {seen[digest]}")
            seen.setdefault(digest, file.name)
            for kind, _, trouble in _TROUBLES if is_text else ():
                count = trouble(part)
                if count:
                    found[kind] += count
                    examples.setdefault(kind, file.name)
    if not documents:
        raise NoData(f"The files in {path} hold no text.")
    remarks = [*_of_size(n_bytes)]
    others = left_out(path)
    if others:
        remarks.append(Remark("left out", len(other_documents(path)), others, False))
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
    written: List[Path] = []
    seen = set()
    try:
        for file in files_of(path):
            content = decoded(file.read_bytes()).text
            suffix = file.suffix.lower()
            if suffix != ".json":
                kept = []
                for part in _parts(file, content):
                    mended = part.strip() if suffix in _JSON else mend(part)
                    digest = _digest(mended)
                    if mended and digest not in seen:
                        seen.add(digest)
                        kept.append(mended)
                if not kept:
                    continue
                content = ("\n" if suffix in _JSON else f"\n{DOCUMENT_END}\n").join(kept)
            name = file.name if path.is_file() else str(file.relative_to(path))
            copy = target / (name if suffix in SUFFIXES else f"{name}.txt")
            copy.parent.mkdir(parents=True, exist_ok=True)
            written.append(copy)
            write_file(str(copy), content.encode("utf-8", errors="replace"))
    except BaseException:  # half of the texts would pass for all of them
        for copy in written:
            copy.unlink(missing_ok=True)
        for folder in sorted(target.rglob("*"), reverse=True):  # what is in a folder comes before it
            folder.rmdir()
        raise
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


class _PlainTemplate:
    """Writes chat messages for what need not be as the model's own template has it."""

    chat_template = "plain"

    def apply_chat_template(self, messages: List[Any], **options: Any) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def _parts(file: Path, text: str) -> List[str]:
    """What may be there twice: the documents of a text, the lines of a ``.jsonl``; nothing of a ``.json``."""
    suffix = file.suffix.lower()
    parts = [] if suffix == ".json" else text.split("\n" if suffix == ".jsonl" else DOCUMENT_END)
    return [part for part in parts if part.strip()]


def _digest(part: str) -> bytes:
    """The same for parts that differ in white space only."""
    return hashlib.sha256(" ".join(part.split()).encode("utf-8", errors="replace")).digest()


def _of_size(n_bytes: int) -> Iterator[Remark]:
    if n_bytes < _TINY_BYTES:
        sentence = f"only {size(n_bytes)} of text: a soft prompt of it repeats it more than it learns from it"
        yield Remark("size", n_bytes, sentence, False)
    elif n_bytes < ADVISED_BYTES:
        yield Remark("size", n_bytes, f"{size(n_bytes)} of text; 8 MB or more, on one theme, work best", False)


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
