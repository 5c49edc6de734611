"""What a soft prompt learns from: files of text, as passages of which some parts are to be learned.

- a folder: every ``.txt``, ``.jsonl`` and ``.json`` in it and below it, in the order of their names
- ``.txt``: documents, apart at ``<|endoftext|>``
- ``.jsonl``: an object a line; "text", or "prompt" and "completion" (only the completion is learned), or "messages"
  (only what the assistant says is learned; the model's own chat template writes them)
- ``.json``: a World Info or lorebook file, keys and entries (only the entry is learned)
"""

import codecs
import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import DataNotUnderstood, NoData

DOCUMENT_END = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".json")
_NO_PLAIN_TEXT = (".rtf", ".doc", ".docx", ".odt", ".pdf", ".epub", ".mobi")
_OTHER_DOCUMENTS = (*_NO_PLAIN_TEXT, ".md", ".htm", ".html", ".csv")
_OF_TRAININGS = ("tokens.json", "report.html")
"""What a training writes into its own folder that :data:`SUFFIXES` or :data:`_OTHER_DOCUMENTS` would take for texts."""
_EMPTY = "Put the texts to learn from there."

_PAIRS = (("prompt", "completion"), ("call", "response"), ("key", "entry"), ("key", "content"), ("keys", "text"))
"""What a pair's two halves are called: ours, the Soft Prompt Tuner's, KoboldAI's (old and new), NovelAI's."""


class Passage(NamedTuple):
    """One document: its parts in order, and whether each is learned or only read."""

    parts: Tuple[Tuple[str, bool], ...]
    source: str
    """Where it comes from, for messages: the file's name."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _ in self.parts)


class Decoded(NamedTuple):
    """The text of a file, and how its bytes were read."""

    text: str
    encoding: str
    is_guess: bool


def files_of(path: Path) -> List[Path]:
    """The files of text at ``path``, a file or a folder, in order; hidden ones are left out. Raises :class:`NoData`."""
    if path.is_file():
        if path.suffix.lower() in _NO_PLAIN_TEXT:
            raise NoData(f"{path.name} is no plain text. Open it, and save it as plain text (.txt).")
        return [path]
    if not path.is_dir():
        raise NoData(f"There is no file or folder {path}. {_meant(path)}")
    found = _of_kinds(path, SUFFIXES)
    if not found:
        raise NoData(f"There is no .txt, .jsonl or .json file in {path}. {left_out(path) or _EMPTY}")
    return found


def other_documents(path: Path) -> List[Path]:
    """The documents in a folder that :func:`files_of` leaves out, in order; none beside a single file."""
    return _of_kinds(path, _OTHER_DOCUMENTS) if path.is_dir() else []


def left_out(path: Path) -> str:
    """A sentence on the :func:`other_documents`, or "" where there are none."""
    found = other_documents(path)
    if not found:
        return ""
    names = ", ".join(each.name for each in found[:3]) + ", ..." * (len(found) > 3)
    return f"Only .txt, .jsonl and .json are read. Save these as plain text, or they are left out: {names}"


def _of_kinds(folder: Path, suffixes: Sequence[str]) -> List[Path]:
    """Files below ``folder`` by suffix, in order; without hidden ones, and what a training wrote into its folder."""
    found = [each for each in sorted(folder.rglob("*")) if each.suffix.lower() in suffixes and each.is_file()]
    found = [each for each in found if not any(part.startswith(".") for part in each.relative_to(folder).parts)]
    return [each for each in found if each.name not in _OF_TRAININGS or not (each.parent / "tokens.ids").exists()]


def _meant(path: Path) -> str:
    """What to do about a path that is not there: as far as it is, and what is there instead."""
    there = path.absolute().parent
    while not there.is_dir():
        there = there.parent
    missing = path.absolute().relative_to(there).parts[0]
    near = (
        get_close_matches(missing, [each.name for each in there.iterdir()], 3, 0.5) if os.access(there, os.R_OK) else []
    )
    meant = f"; did you mean {' or '.join(near)}?" if near else ". Check the path of the data."
    return f"In {there} is no {missing}{meant}"


def passages(path: Path, tokenizer: Any = None) -> Iterator[Passage]:
    """Every passage of the data at ``path``, in order; ``tokenizer`` writes chat messages.

    Raises :class:`NoData`, or :class:`DataNotUnderstood`, which names file and line.
    """
    for file in files_of(path):
        suffix = file.suffix.lower()
        if suffix == ".jsonl":
            yield from _of_jsonl(file, tokenizer)
        elif suffix == ".json":
            yield from _of_world_info(file)
        else:
            yield from documents(in_order(decoded(file.read_bytes()).text), file.name)


def in_order(text: str) -> str:
    """``text`` without what a wrong encoding on its way has made of it; as it is where ftfy is not installed."""
    try:
        import ftfy
    except ImportError:
        return text
    return str(ftfy.fix_text(text, unescape_html=True, normalization="NFC", uncurl_quotes=False))


def documents(text: str, source: str = "") -> Iterator[Passage]:
    """The documents of a text, apart at ``<|endoftext|>``; blank ones are left out. All of each is learned."""
    for document in text.replace("\r\n", "\n").replace("\r", "\n").split(DOCUMENT_END):
        if document.strip():
            yield Passage(((document.strip("\n"), True),), source)


def decoded(data: bytes) -> Decoded:
    """The text of ``data``: by its byte order mark, as UTF-8, or in the encoding that it most likely has."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return Decoded(data.decode(encoding, errors="replace"), encoding, False)
    try:
        return Decoded(data.decode("utf-8"), "utf-8", False)
    except UnicodeDecodeError:
        pass
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        best = None
    else:
        best = from_bytes(data).best()
    if best is not None:
        return Decoded(str(best), best.encoding, True)
    return Decoded(data.decode("cp1252", errors="replace"), "cp1252", True)


def _of_jsonl(file: Path, tokenizer: Any) -> Iterator[Passage]:
    for number, line in enumerate(decoded(file.read_bytes()).text.split("\n"), start=1):
        if line.strip():
            where = f"{file.name}, line {number}"
            found = _passage(_parsed(line, where), where, tokenizer)
            if found is None:
                raise DataNotUnderstood(
                    f'{where}: expected an object with "text", with "prompt" and "completion", or with "messages"'
                )
            yield found


def _of_world_info(file: Path) -> Iterator[Passage]:
    content = _parsed(decoded(file.read_bytes()).text, file.name)
    count = 0
    for each in _entries(content):
        found = _passage(each, file.name, None)
        if found is not None:
            count += 1
            yield found
    if not count:
        raise DataNotUnderstood(f'{file.name}: expected World Info, entries with "key" and "content" or the like')


def _entries(content: Any) -> Iterable[Any]:
    if isinstance(content, Mapping):
        content = next((content[name] for name in ("entries", "data", "worldinfo") if name in content), [])
    if isinstance(content, Mapping):
        content = list(content.values())
    return content if isinstance(content, list) else []


def _passage(item: Any, where: str, tokenizer: Any) -> Optional[Passage]:
    if not isinstance(item, Mapping):
        return None
    if isinstance(item.get("messages"), list):
        return _chat(item["messages"], where, tokenizer)
    for given, learned in _PAIRS:
        before, after = item.get(given), item.get(learned)
        if isinstance(before, list):
            before = ", ".join(map(str, before))
        if isinstance(before, str) and isinstance(after, str) and after.strip():
            return Passage(((before, False), (_joined(before, after), True)), where)
    text = item.get("text")
    return Passage(((text, True),), where) if isinstance(text, str) and text.strip() else None


def _joined(before: str, after: str) -> str:
    """``after``, kept apart from ``before`` by white space, as it would be in a text."""
    return after if not before or before[-1].isspace() or after[0].isspace() else f" {after}"


def _chat(messages: List[Any], where: str, tokenizer: Any) -> Passage:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise DataNotUnderstood(f'{where}: "messages" need a model whose tokenizer has a chat template; this has none')
    parts: List[Tuple[str, bool]] = []
    written = ""
    try:
        for index, message in enumerate(messages):
            is_reply = message["role"] == "assistant"
            for upto, learned in ((index, False), (index + 1, True)) if is_reply else ():
                text = tokenizer.apply_chat_template(
                    messages[:upto], tokenize=False, add_generation_prompt=upto == index
                )
                if not text.startswith(written):
                    raise DataNotUnderstood(
                        f"{where}: the chat template rewrites earlier messages; use prompts instead"
                    )
                parts.append((text[len(written) :], learned))
                written = text
    except (KeyError, TypeError) as error:
        raise DataNotUnderstood(f'{where}: each message needs "role" and "content"') from error
    except DataNotUnderstood:
        raise
    except Exception as error:  # a template is a program, and says what it likes
        raise DataNotUnderstood(f"{where}: the model's chat template refuses these messages: {error}") from error
    if not parts:
        raise DataNotUnderstood(f"{where}: no message of the assistant's, so there is nothing to learn")
    return Passage(tuple(parts), where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataNotUnderstood(f"{where}: this is no JSON ({error})") from error
