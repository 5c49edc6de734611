"""Pickles that torch writes, read without executing anything.

A pickle is a program for a stack machine. The one here knows the instructions that torch's files are made of,
and instead of importing and calling what a file names, it notes the few calls that describe tensors and
refuses all others. What comes out is inert: texts, numbers, lists, dictionaries and descriptions of tensors.

Sources: the comments of CPython's ``pickletools``; ``torch/serialization.py`` and ``torch/_utils.py`` of
torch 1.11 to 2.13, for what is called.
"""

import re
import struct
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from ..errors import CorruptMember, TooLarge, UnsafePickle

MAX_INSTRUCTIONS = 100_000
"""A checkpoint of a large model needs some ten thousand; each may take some hundred bytes of memory."""
MAX_PAIRS = 100_000
"""Items of dictionaries that calls make, all together: a call is one instruction, however long its list is."""
MAX_TEXT = 2**16
MAX_INTEGER = 64
"""Bytes of a whole number; torch's magic number has ten."""

DTYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
}
"""torch's storages that can hold rows."""


class Global(NamedTuple):
    """Something that a pickle names; nothing is imported."""

    module: str
    name: str


class Storage(NamedTuple):
    """The memory that a tensor lies in."""

    kind: str
    """torch's class: "FloatStorage"."""
    key: str
    length: int
    """How many values it has, as the pickle says."""


class Tensor(NamedTuple):
    """Where a tensor's values are; nothing of it is checked yet."""

    storage: Any
    """A :class:`Storage`, or the bytes of a file of torch's own that holds one."""
    offset: Any
    shape: Any
    strides: Any


class Inert:
    """A value of a harmless kind that no rows are in: an optimizer's dtype, a device."""


_INERT = Inert()
_MARK = object()

_STORAGE = re.compile(r"[A-Z][A-Za-z0-9]*Storage")
_HARMLESS = {
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    ("torch", "device"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
_DTYPE = re.compile(r"(u?int|float|bfloat|complex)[0-9]+|bool")


class Scanned(NamedTuple):
    """What a pickle says."""

    value: Any
    end: int
    """Where it ends."""
    storages: Dict[str, Storage]


def scan(data: memoryview, start: int = 0) -> Scanned:
    """The pickle that begins at ``start``.

    Raises :class:`UnsafePickle` for one that asks for anything but tensors, :class:`TooLarge` or
    :class:`CorruptMember`.
    """
    machine = _Machine(data, start)
    try:
        return Scanned(machine.run(), machine.position, machine.storages)
    except (IndexError, ValueError, TypeError, struct.error, OverflowError) as error:
        raise CorruptMember(f"a pickle that cannot be read (byte {machine.position})", "a whole pickle") from error


def integer(value: Any) -> int:
    """``value`` where it is a whole number from 0 to 2**62. Raises :class:`CorruptMember`."""
    if type(value) is not int or not 0 <= value <= 2**62:
        raise CorruptMember("a tensor whose place is no whole number", "whole numbers from 0")
    return value


class _Machine:
    def __init__(self, data: memoryview, start: int):
        self.data, self.position = data, start
        self.stack: List[Any] = []
        self.memo: Dict[int, Any] = {}
        self.storages: Dict[str, Storage] = {}
        self.pairs = 0

    def run(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            code = self.data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                return self.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise UnsafePickle(f"a pickle with the instruction {bytes([code])!r}", "those that torch writes")
            instruction(self)
        raise TooLarge(f"a pickle of more than {MAX_INSTRUCTIONS} instructions", "fewer")

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise IndexError(count)
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def pop_marked(self) -> List[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise IndexError("no mark")

    def text(self, form: str, encoding: str = "utf-8") -> None:
        size = self.number(form)
        if size > MAX_TEXT:
            raise TooLarge(f"a text of {size} bytes in a pickle", f"at most {MAX_TEXT}")
        self.push(str(self.take(size), encoding, "surrogatepass"))

    def bytes_(self, form: str) -> None:
        self.push(self.take(self.number(form)))

    def long_(self, form: str) -> None:
        size = self.number(form)
        if not 0 <= size <= MAX_INTEGER:
            raise ValueError(f"a number of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def line(self) -> str:
        end = self.position
        while self.data[end] != 0x0A:
            end += 1
            if end - self.position > 200:
                raise ValueError("a long name")
        text = str(self.take(end - self.position), "utf-8")
        self.position += 1
        return text

    def tuple_(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def memoize(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise IndexError(place)
        self.push(self.memo[place])

    def append(self, values: List[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif target is not _INERT:
            raise ValueError("appending to no list")

    def set_items(self, values: List[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(values[0::2], values[1::2]):
                if isinstance(key, (str, int)):  # hashing nested tuples could overflow the stack
                    target[key] = value
        elif target is not _INERT:
            raise ValueError("setting items of no dictionary")

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or not _is_known(module, name):
            called = f"{module}.{name}"[:100] if isinstance(module, str) and isinstance(name, str) else "something"
            raise UnsafePickle(f"a pickle that asks for {called!r}", "one that holds tensors and nothing else")
        self.push(Global(module, name))

    def global_(self) -> None:
        module = self.line()
        self.name(module, self.line())

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def persistent(self) -> None:
        values = self.pop()
        if not isinstance(values, tuple) or len(values) not in (5, 6) or values[0] != "storage":
            raise UnsafePickle("a pickle that refers to something outside it", "references to storages only")
        kind, key, count = values[1], values[2], values[4]
        if not isinstance(kind, Global) or not isinstance(key, str):
            raise ValueError("a storage of no kind")
        if len(values) == 6 and values[5] is not None:
            raise UnsafePickle("a storage that is a view of another", "whole storages")
        storage = Storage(kind.name, key, integer(count))
        if self.storages.setdefault(key, storage) != storage:
            raise CorruptMember("a storage of two kinds or sizes", "each the same wherever it is named")
        self.push(storage)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise UnsafePickle("a pickle that calls what it has made", "calls of torch's own")
        result = _CALLS.get(function)
        if result is None:
            if tuple(function) not in _HARMLESS:
                raise UnsafePickle(f"a pickle that calls {function.module}.{function.name}", "calls that make tensors")
            self.push(_INERT)
        else:
            self.pairs += sum(len(each) for each in arguments[:1] if isinstance(each, list))
            if self.pairs > MAX_PAIRS:
                raise TooLarge(f"a pickle that makes dictionaries of more than {MAX_PAIRS} items", "fewer")
            self.push(result(arguments))


def _is_known(module: str, name: str) -> bool:
    if (module, name) in _HARMLESS or Global(module, name) in _CALLS:
        return True
    if module in ("torch", "torch.cuda", "torch.storage"):
        return bool(_STORAGE.fullmatch(name)) or (module == "torch" and bool(_DTYPE.fullmatch(name)))
    return False


def _ordered(arguments: Tuple[Any, ...]) -> Dict[Any, Any]:
    """An OrderedDict; Python 2 hands its items to the call."""
    items = arguments[0] if arguments and isinstance(arguments[0], list) else []
    pairs = [pair for pair in items if isinstance(pair, (list, tuple)) and len(pair) == 2]
    return {key: value for key, value in pairs if isinstance(key, (str, int))}


def _rebuilt(arguments: Tuple[Any, ...]) -> Tensor:
    storage, offset, shape, strides = arguments[:4]
    return Tensor(storage, offset, shape, strides)


_CALLS: Dict[Global, Callable[[Tuple[Any, ...]], Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _rebuilt,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    Global("torch._utils", "_rebuild_parameter"): lambda arguments: arguments[0],
    Global("torch._utils", "_rebuild_parameter_with_state"): lambda arguments: arguments[0],
    Global("torch.storage", "_load_from_bytes"): lambda arguments: arguments[0],
    Global("collections", "OrderedDict"): _ordered,
    Global("collections", "defaultdict"): lambda arguments: {},
}

_INSTRUCTIONS: Dict[int, Callable[[_Machine], Any]] = {
    ord("\x80"): lambda m: m.take(1),  # PROTO
    ord("\x95"): lambda m: m.take(8),  # FRAME
    ord("("): lambda m: m.push(_MARK),
    ord("N"): lambda m: m.push(None),
    ord("\x88"): lambda m: m.push(True),
    ord("\x89"): lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("\x8a"): lambda m: m.long_("<B"),
    ord("\x8b"): lambda m: m.long_("<i"),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("\x8c"): lambda m: m.text("<B"),
    ord("X"): lambda m: m.text("<I"),
    ord("\x8d"): lambda m: m.text("<Q"),
    # Text of Python 2
    ord("U"): lambda m: m.text("<B", "latin-1"),
    ord("T"): lambda m: m.text("<I", "latin-1"),
    ord("C"): lambda m: m.bytes_("<B"),
    ord("B"): lambda m: m.bytes_("<I"),
    ord("\x8e"): lambda m: m.bytes_("<Q"),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): lambda m: m.push(()),
    ord("\x85"): lambda m: m.tuple_(1),
    ord("\x86"): lambda m: m.tuple_(2),
    ord("\x87"): lambda m: m.tuple_(3),
    ord("t"): lambda m: m.push(tuple(m.pop_marked())),
    ord("l"): lambda m: m.push(m.pop_marked()),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.pop_marked()),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.pop_marked()),
    ord("q"): lambda m: m.memoize(m.number("<B")),
    ord("r"): lambda m: m.memoize(m.number("<I")),
    ord("\x94"): lambda m: m.memoize(len(m.memo)),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("c"): lambda m: m.global_(),
    ord("\x93"): lambda m: m.stack_global(),
    ord("Q"): lambda m: m.persistent(),
    ord("R"): lambda m: m.call(),
    ord("b"): lambda m: m.pop(),  # BUILD: the state of an OrderedDict, which holds no rows
}
