"""The header of a GGUF file: metadata and where the tensors lie; nothing is believed before it was checked."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, NamedTuple, Optional, Sequence, Set, Union

import numpy as np

from ..errors import CorruptModelFile, MissingLibrary, NotAModelFile, TruncatedModelFile, UnsupportedModelFile

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
"""Types of metadata, by their number in a file."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}

F32, F16, Q4_0, BF16 = 0, 1, 2, 30
"""Types of tensors, by their number in a file; the ``gguf`` library knows the rest."""
_PLAIN: Dict[int, Any] = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: np.dtype("<u2")}

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_MOST_HEADER = 2**28
"""Bytes; a vocabulary of 260,000 tokens takes some ten million."""
_MOST_FIELDS = 2**16
_MOST_TENSORS = 2**18
_LONGEST_NAME = 2**16
_AT_ONCE = 2**20
_LARGEST_ALIGNMENT = 2**20


class Field(NamedTuple):
    """One entry of the metadata: its type and its bytes, as they stand in the file."""

    kind: int
    raw: bytes


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    name: str
    shape: Sequence[int]
    """As GGUF has it: columns first."""
    kind: int
    offset: int
    """Bytes from the beginning of the file."""
    length: int
    """Bytes up to the next tensor, or to the end of the file."""


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file's header."""

    path: str
    version: int
    fields: Dict[str, Field]
    tensors: Dict[str, Tensor]
    """In the order of the file's table."""
    alignment: int

    @property
    def architecture(self) -> str:
        """What the file calls its family: "llama", "gemma2"; "" where it does not tell."""
        return self.text("general.architecture")

    @property
    def n_parts(self) -> int:
        """Files that the model is split into."""
        return self.number("split.count") or 1

    @property
    def embedding(self) -> Tensor:
        """The input embedding.

        Raises :class:`CorruptModelFile`, or :class:`NotAModelFile` for an adapter and the like.
        """
        tensor = self.tensors.get(EMBEDDING)
        if tensor is None:
            raise NotAModelFile(f"{self.path} has no input embedding: it is no language model, or not its first part.")
        if len(tensor.shape) != 2 or row_bytes(tensor) * tensor.shape[1] > tensor.length:
            raise CorruptModelFile(f"{self.path}: {EMBEDDING} is no matrix, or runs past its end.")
        return tensor

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return OUTPUT not in self.tensors

    def text(self, key: str) -> str:
        """A text of the metadata, or ""."""
        field = self.fields.get(key)
        return field.raw[8:].decode("utf-8", "replace") if field is not None and field.kind == STRING else ""

    def number(self, key: str) -> Optional[int]:
        """A whole number of the metadata, or None."""
        field = self.fields.get(key)
        if field is None or field.kind in (STRING, ARRAY, FLOAT32, BOOL, 12):
            return None
        return int(struct.unpack("<" + _SCALARS[field.kind], field.raw)[0])

    def of_architecture(self, key: str) -> Optional[int]:
        """A whole number that the metadata have for the architecture ("context_length"), or None."""
        return self.number(f"{self.architecture}.{key}")

    def strings(self, key: str) -> List[bytes]:
        """An array of texts, or []."""
        field = self.fields.get(key)
        if field is None or field.kind != ARRAY or struct.unpack_from("<I", field.raw)[0] != STRING:
            return []
        found, at = [], 12
        while at < len(field.raw):
            (length,) = struct.unpack_from("<Q", field.raw, at)
            found.append(field.raw[at + 8 : at + 8 + length])
            at += 8 + length
        return found

    def integers(self, key: str) -> np.ndarray:
        """An array of whole numbers of 32 bits; empty where there is none."""
        field = self.fields.get(key)
        if field is None or field.kind != ARRAY or struct.unpack_from("<I", field.raw)[0] not in (UINT32, INT32):
            return np.zeros(0, dtype=np.int32)
        return np.frombuffer(field.raw, dtype="<i4", offset=12)

    def rows(self, tensor: Tensor, ids: np.ndarray) -> np.ndarray:
        """The rows ``ids`` of a matrix as float32 ``[len(ids), columns]``; nothing else of the file is read.

        Raises :class:`MissingLibrary` for a quantised one without the ``gguf`` library.
        """
        stored = self.stored(tensor)[ids]
        if tensor.kind == BF16:
            return np.asarray((stored.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32))
        if tensor.kind in _PLAIN:
            return np.asarray(stored.view(_PLAIN[tensor.kind]).astype(np.float32))
        quants = _library("quants")
        kind = _library("constants").GGMLQuantizationType(tensor.kind)
        try:
            return np.asarray(quants.dequantize(np.ascontiguousarray(stored), kind), dtype=np.float32)
        except NotImplementedError as error:
            raise UnsupportedModelFile(f"{self.path}: rows of the type {kind.name} cannot be read.") from error

    def stored(self, tensor: Tensor) -> np.ndarray:
        """The bytes of a matrix, uint8 ``[rows, bytes of a row]``, mapped from the file."""
        shape = (int(tensor.shape[1]), row_bytes(tensor))
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=shape)


def row_bytes(tensor: Tensor) -> int:
    """Bytes of one row. Raises :class:`UnsupportedModelFile`, :class:`CorruptModelFile` or :class:`MissingLibrary`."""
    if tensor.kind in _PLAIN:
        return int(tensor.shape[0]) * _PLAIN[tensor.kind].itemsize
    constants = _library("constants")
    try:
        block, size = constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType(tensor.kind)]
    except (KeyError, ValueError) as error:
        raise UnsupportedModelFile(f"{tensor.name} is of type {tensor.kind}, which is not known.") from error
    if tensor.shape[0] % block:
        raise CorruptModelFile(f"{tensor.name} has {tensor.shape[0]} columns in blocks of {block}.")
    return int(tensor.shape[0]) // block * size


def kind_name(kind: int) -> str:
    """A tensor's type as people write it: "Q4_K"."""
    names = {F32: "F32", F16: "F16", BF16: "BF16", Q4_0: "Q4_0"}
    return names.get(kind) or _library("constants").GGMLQuantizationType(kind).name


def is_gguf(path: Union[str, Path]) -> bool:
    """Whether the file at ``path`` begins as GGUF does; False where there is none."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Union[str, Path]) -> ModelFile:
    """Read the header of the GGUF file at ``path``, and check it against the file's size.

    Raises :class:`NotAModelFile`, :class:`UnsupportedModelFile`, :class:`TruncatedModelFile`,
    :class:`CorruptModelFile` or :class:`OSError`.
    """
    path = os.fspath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise NotAModelFile(f"{path} is no ordinary file.")
    with open(path, "rb") as file:
        return _Reader(file, path).model()


class _Reader:
    """Reads from the beginning of a file as far as is asked for; never more than is there, nor past the limit."""

    def __init__(self, file: BinaryIO, path: str):
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size
        self._data = bytearray()
        self._at = 0

    def model(self) -> ModelFile:
        if self._size < 4 or self._take(4) != MAGIC:
            raise NotAModelFile(f"{self._path} is no GGUF file: it does not begin with GGUF.")
        version = self._number("I")
        if version not in (2, 3):
            why = "which is not known" if version & 0xFFFF else "of a machine with the other byte order"
            raise UnsupportedModelFile(f"{self._path} is GGUF of version {version}, {why}; versions 2 and 3 are read.")
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        if n_tensors > _MOST_TENSORS or n_fields > _MOST_FIELDS:
            raise CorruptModelFile(f"{self._path} claims {n_tensors} tensors and {n_fields} fields.")
        fields: Dict[str, Field] = {}
        for _ in range(n_fields):
            key = self._name()
            if key in fields:
                raise CorruptModelFile(f"{self._path} has the field {key[:80]} twice.")
            fields[key] = self._field()
        alignment = self._alignment(fields)
        table = [self._entry(alignment) for _ in range(n_tensors)]
        return ModelFile(self._path, version, fields, self._placed(table, alignment), alignment)

    def _alignment(self, fields: Dict[str, Field]) -> int:
        field = fields.get("general.alignment")
        if field is None:
            return 32
        value = struct.unpack("<I", field.raw)[0] if field.kind == UINT32 else 0
        if not 0 < value <= _LARGEST_ALIGNMENT or value & (value - 1):
            raise CorruptModelFile(f"{self._path} aligns its tensors at {value} bytes.")
        return int(value)

    def _entry(self, alignment: int) -> Tensor:
        name = self._name()
        n_dimensions = self._number("I")
        if not 1 <= n_dimensions <= 4:
            raise CorruptModelFile(f"{self._path}: {name[:80]} has {n_dimensions} dimensions.")
        shape = tuple(self._number("Q") for _ in range(n_dimensions))
        kind, offset = self._number("I"), self._number("Q")
        if not all(0 < size < 2**40 for size in shape):
            raise CorruptModelFile(f"{self._path}: {name[:80]} has the shape {list(shape)}.")
        if offset % alignment:
            raise CorruptModelFile(
                f"{self._path}: {name[:80]} begins at {offset}, between two multiples of {alignment}."
            )
        return Tensor(name, shape, kind, offset, 0)

    def _placed(self, table: List[Tensor], alignment: int) -> Dict[str, Tensor]:
        """The tensors with their places in the file: each ends where the next begins."""
        start = -(-self._at // alignment) * alignment
        ends = [*sorted({each.offset for each in table}), self._size - start]
        if len(ends) != len(table) + 1:
            raise CorruptModelFile(f"{self._path} has two tensors in one place.")
        after = dict(zip(ends, ends[1:]))
        tensors: Dict[str, Tensor] = {}
        names: Set[str] = set()
        for each in table:
            length = after[each.offset] - each.offset
            if length <= 0:
                raise TruncatedModelFile(f"{self._path} ends before {each.name[:80]}: it is not all there.")
            if each.name in names:
                raise CorruptModelFile(f"{self._path} has the tensor {each.name[:80]} twice.")
            names.add(each.name)
            if each.kind in _PLAIN and int(np.prod(each.shape, dtype=object)) * _PLAIN[each.kind].itemsize > length:
                raise TruncatedModelFile(f"{self._path} ends within {each.name[:80]}: it is not all there.")
            tensors[each.name] = Tensor(each.name, each.shape, each.kind, start + each.offset, length)
        return tensors

    def _field(self) -> Field:
        kind = self._number("I")
        start = self._at
        if kind == STRING:
            self._skip(self._number("Q"))
        elif kind == ARRAY:
            self._skip_array()
        elif kind in _SCALARS:
            self._skip(struct.calcsize("<" + _SCALARS[kind]))
        else:
            raise CorruptModelFile(f"{self._path} has metadata of type {kind}, which is none.")
        return Field(kind, bytes(self._data[start : self._at]))

    def _skip_array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        if kind == STRING:
            self._need(8 * count)  # so that a huge count ends here, and not after as many turns
            at, length_at = self._at, struct.Struct("<Q").unpack_from
            for _ in range(count):  # hundreds of thousands
                if at + 8 > len(self._data):
                    self._need(at + 8 - self._at)
                at += 8 + length_at(self._data, at)[0]
            self._skip(at - self._at)
        elif kind in _SCALARS:
            self._skip(count * struct.calcsize("<" + _SCALARS[kind]))
        else:
            raise CorruptModelFile(f"{self._path} has an array of type {kind}, which is none that models have.")

    def _name(self) -> str:
        length = self._number("Q")
        if length > _LONGEST_NAME:
            raise CorruptModelFile(f"{self._path} has a name of {length} bytes.")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptModelFile(f"{self._path} has a name that is no text.") from error

    def _number(self, form: str) -> int:
        size = struct.calcsize("<" + form)
        self._need(size)
        value = struct.unpack_from("<" + form, self._data, self._at)[0]
        self._at += size
        return int(value)

    def _take(self, count: int) -> bytes:
        self._skip(count)
        return bytes(self._data[self._at - count : self._at])

    def _skip(self, count: int) -> None:
        self._need(count)
        self._at += count

    def _need(self, count: int) -> None:
        """Have ``count`` bytes more at hand."""
        end = self._at + count
        if end <= len(self._data):
            return
        if end > self._size:
            raise TruncatedModelFile(f"{self._path} ends within its header: it is not all there.")
        if end > _MOST_HEADER:
            raise CorruptModelFile(f"{self._path} has a header of more than {_MOST_HEADER} bytes.")
        self._data += self._file.read(max(end - len(self._data), _AT_ONCE))
        if end > len(self._data):
            raise TruncatedModelFile(f"{self._path} became shorter while it was read.")


def _library(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"gguf.{module}")
    except ImportError as error:
        raise MissingLibrary(
            'Quantised GGUF files need the gguf library: pip install "kobold_sp_plugin[gguf]"'
        ) from error
