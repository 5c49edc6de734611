"""Soft prompt files of every format: read safely whatever their bytes are, written so that the original reads them.

A file is known by its content, never by its extension. Nothing is unpickled, evaluated or extracted.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, ContextManager, Iterator, Mapping, NamedTuple, Optional, Tuple, Union

from ..errors import FormatError, NotASoftPromptFile, NotWritable, UnknownScale
from ..softprompt import Order, Scale, SoftPrompt, WithMetadata, own_metadata
from ..softprompt import declared as declared_as
from . import (
    exelents,
    folder,
    google,
    kobold_zip,
    metadata,
    mkultra,
    mtjsp,
    novelai,
    npy,
    peft,
    safetensors,
    torch_save,
    upload_json,
    vllm,
)
from .source import Candidate, Source

__all__ = [
    "EXTENSIONS", "FORMATS", "Format", "Header", "format_named", "format_of", "formats_table", "load", "parts_of",
    "read_header", "save",
]  # fmt: skip

ALL = "everything"
DTYPES = npy.DTYPES


class Format(NamedTuple):
    """One format: how it is told, read and written, and what its rows are."""

    name: str
    """Its name on a command line."""
    sentence: str
    """What it is, in a few words."""
    extensions: Tuple[str, ...]
    """Usual endings, the one that stands for it first; none: a folder."""
    detect: Callable[[Candidate], bool]
    """Whether a candidate, which is of none of the formats before this one, is of this one."""
    opened: Callable[[Candidate], ContextManager[Source]]
    write: Optional[Callable[[SoftPrompt, str, str], None]]
    """Write a soft prompt to a path in a dtype; None: it is only read, and ``why_not`` says why."""
    scale: Scale
    """The space that its rows are in, unless a file says otherwise."""
    holds: str
    """The metadata that it has a place for."""
    declares_scale: bool = False
    """Whether a file of it can say that its rows are in the other scale."""
    dtypes: Tuple[str, ...] = DTYPES
    """What it can store rows as."""
    why_not: str = ""
    reads: bool = True
    """False for a format that is only told apart."""

    def writer(self) -> Callable[[SoftPrompt, str, str], None]:
        """``write``. Raises :class:`NotWritable` where there is none."""
        if self.write is None:
            raise NotWritable(f"{self.sentence}: {self.why_not}", "another format")
        return self.write


# The order of detection: of the zips, and of the folders, the one that takes all others comes last.
FORMATS = (
    Format("mtjsp", "mtj-softtuner's checkpoint, `.mtjsp` (an npz)", (".mtjsp",), mtjsp.detect_npz, mtjsp.opened_npz,
           None, Scale.MATRIX, "step, loss, gradient norms",
           why_not="it is a training checkpoint and needs the optimizer's state, which a soft prompt has not"),
    Format("mkusp", "KoboldAI's checkpoint, `.mtjsp` too (a `torch.save` file)", (".mtjsp",), mtjsp.detect_torch,
           mtjsp.opened_torch, None, Scale.MATRIX, "step, loss, gradient norm",
           why_not="it is a training checkpoint and needs the optimizer's state, which a soft prompt has not"),
    Format("pt", "plain `torch.save` file, a tensor", (".pt", ".pth", ".bin"), torch_save.detect, torch_save.opened,
           torch_save.write, Scale.MATRIX, "nothing"),
    Format("zip", "KoboldAI's zip", (".zip",), kobold_zip.detect, kobold_zip.opened,
           kobold_zip.write, Scale.MATRIX, ALL, declares_scale=True),
    Format("npy", "plain NumPy array", (".npy",), npy.detect, npy.opened, npy.write, Scale.MATRIX, "nothing"),
    Format("vllm", "vLLM's `prompt_embeds`, base64", (".b64",), vllm.detect, vllm.opened,
           vllm.write, Scale.MODULE, "nothing"),
    Format("mkultra", "mkultra's and Soft Prompt Tuner's JSON", (".json",), mkultra.detect,
           mkultra.opened, mkultra.write, Scale.MATRIX, ALL),
    Format("upload", "sukima's upload JSON, 20 rows", (".json",), upload_json.detect, upload_json.opened,
           upload_json.write, Scale.MODULE, ALL, dtypes=("float16",)),
    Format("safetensors", "plain safetensors", (".safetensors",), safetensors.detect, safetensors.opened,
           safetensors.write, Scale.MATRIX, ALL, declares_scale=True),
    Format("peft", "PEFT adapter (prompt tuning, p-tuning), a folder", (), peft.detect, peft.opened, peft.write,
           Scale.MODULE, ALL),
    Format("exelents", "exelents' soft-prompt-tuning, a folder", (), exelents.detect, exelents.opened,
           exelents.write, Scale.MODULE, "the model's name"),
    Format("google", "Google's prompt-tuning checkpoints, a folder", (), google.detect, google.opened,
           None, Scale.MODULE, "step",
           why_not="its trainer starts from a plain .npy: convert to npy"),
    Format("folder", "KoboldAI's zip, extracted", (), folder.detect, folder.opened, folder.write,
           Scale.MATRIX, ALL, declares_scale=True),
    Format("novelai", "NovelAI's module", (".module",), novelai.detect, novelai.opened, None,
           Scale.MATRIX, "unknown", reads=False, why_not=novelai.REASON),
)  # fmt: skip

EXTENSIONS = tuple(sorted({extension for each in FORMATS for extension in each.extensions}))
"""Endings of files that are meant as soft prompts."""


@dataclass(frozen=True)
class Header(WithMetadata):
    """What a soft prompt file says of itself, read without its rows."""

    n_tokens: int
    width: int
    dtype: str
    """What the rows are stored as: "float32", "float16", "bfloat16" or "float64"."""
    metadata: Mapping[str, Any] = field(hash=False)
    scale: Scale
    order: Order
    checksum: Optional[int] = field(default=None, repr=False)
    """CRC-32 of the tensor, where the file tells it without the rows being read."""
    format: str = "zip"
    """The name of its format in :data:`FORMATS`."""
    others: Tuple[str, ...] = ()
    """What else the file holds, by name; of a folder's other files nothing is said, since they stay."""


def load(path: Union[str, Path], part: Optional[str] = None) -> SoftPrompt:
    """Read a soft prompt from a file or folder of any format; ``part`` names one where it holds several.

    Raises a :class:`~kobold_sp_plugin.errors.FormatError` or :class:`OSError`.
    """
    with _opened(path, part) as (kind, source):
        scale, order = _declared(source.metadata, kind)
        rows = source.rows()
        rows.setflags(write=False)  # ours to give away: the soft prompt need not copy them
        return SoftPrompt(rows, source.metadata, scale, order)


def read_header(path: Union[str, Path], part: Optional[str] = None) -> Header:
    """Read what a soft prompt file says of itself: its metadata and the header of its tensor, no rows.

    Raises a :class:`~kobold_sp_plugin.errors.FormatError` or :class:`OSError`. What only the rows tell
    (a wrong checksum, NaN, a compressed stream that ends early) is found by :func:`load`.
    """
    with _opened(path, part) as (kind, source):
        scale, order = _declared(source.metadata, kind)
        return Header(
            n_tokens=source.shape[0],
            width=source.shape[1],
            dtype=source.dtype,
            metadata=MappingProxyType(source.metadata),
            scale=scale,
            order=order,
            checksum=source.checksum,
            format=kind.name,
            others=source.others,
        )


def save(softprompt: SoftPrompt, path: Union[str, Path], dtype: str = "float32", format: str = "zip") -> None:
    """Write ``path`` in one step, whatever its extension: a KoboldAI zip, or another of :data:`FORMATS`.

    Raises :class:`UnsupportedDtype`, :class:`TooManyRows`, :class:`TooLarge`, :class:`NotFinite`,
    :class:`MetadataTooLarge`, :class:`NotWritable`, :class:`UnknownScale` for rows in the other scale than the
    format's where its files cannot say so, or :class:`OSError`.
    """
    path, kind = os.fspath(path), format_named(format)
    try:
        write = kind.writer()
        if softprompt.scale != kind.scale and not kind.declares_scale:
            raise UnknownScale(f"rows in {softprompt.scale} scale for {kind.sentence}", f"{kind.scale} scale")
        write(softprompt, path, dtype)
    except FormatError as error:
        error.path = path
        raise


def format_named(name: str) -> Format:
    """The format of that name. Raises :class:`KeyError` for a name that none has."""
    return {each.name: each for each in FORMATS}[name]


def format_of(path: Union[str, Path]) -> Format:
    """The format that a file or folder is of. Raises a FormatError or :class:`OSError`."""
    with Candidate(os.fspath(path)) as candidate:
        return _format_of(candidate)


def parts_of(folder: str) -> Tuple[str, ...]:
    """The files in ``folder`` that a soft prompt in it is read from; () where there is none. Opens nothing."""
    for first, *others in (
        (peft.CONFIG, peft.WEIGHTS, peft.OLD_WEIGHTS),
        (exelents.WEIGHTS, exelents.CONFIG),
    ):
        if os.path.exists(os.path.join(folder, first)):
            return (first, *others)
    tensor = (npy.TENSOR, metadata.LABEL) if os.path.exists(os.path.join(folder, npy.TENSOR)) else ()
    return google.parts_of(folder) or tensor


def formats_table() -> str:
    """The formats as a table in Markdown, for people."""
    lines = ["| `--to` | format | read | written | rows | metadata |", "|---|---|---|---|---|---|"]
    for each in sorted(FORMATS, key=lambda each: (each.write is None, each.name != "zip", each.name)):
        written = "yes" if each.write else f"no: {each.why_not}"
        read = "yes" if each.reads else "no"
        rows = f"{each.scale}, or as the file says" if each.declares_scale else str(each.scale)
        if each.dtypes != DTYPES:
            rows += f", {' or '.join(each.dtypes)}"
        rows = rows if each.reads else "unknown"
        lines.append(f"| {each.name} | {each.sentence} | {read} | {written} | {rows} | {each.holds} |")
    return "\n".join(lines)


@contextmanager
def _opened(path: Union[str, Path], part: Optional[str]) -> Iterator[Tuple[Format, Source]]:
    """The file at ``path`` in the format that its content is of; errors raised inside carry the path."""
    path = os.fspath(path)
    try:
        with Candidate(path, part) as candidate:
            kind = _format_of(candidate)
            with kind.opened(candidate) as source:
                yield kind, source
    except FormatError as error:
        error.path = path
        raise


def _format_of(candidate: Candidate) -> Format:
    for each in FORMATS:
        if each.detect(candidate):
            return each
    found = "a file of another kind" if candidate.start else "an empty file"
    raise NotASoftPromptFile(found, "a soft prompt in a format that `kobold-sp convert --help` lists")


def _declared(meta: Mapping[str, Any], kind: Format) -> Tuple[Scale, Order]:
    """Scale and order: what the file states, else the format's."""
    own = own_metadata(meta)
    scale = declared_as(Scale, own["scale"]) if kind.declares_scale and "scale" in own else kind.scale
    return scale, declared_as(Order, own.get("order"))
