"""mkultra's JSON, which Soft Prompt Tuner, mtj-softtuner and KoboldAI write too.

``metadata`` is an object; ``tensor`` is base64 of a pickle of a torch tensor ``[n_tokens, width]`` or
``[1, n_tokens, width]``, often of one that lay on a GPU. Source: ``mkultra/soft_prompt.py``.
"""

import base64
import hashlib
import json
import uuid
from contextlib import contextmanager
from typing import Any, Dict, Iterator

from ..errors import CorruptMember, MetadataNotJSON
from ..softprompt import SoftPrompt
from . import metadata, torch_file
from .archive import BoundedBytes
from .source import Candidate, Source
from .torch_pickle import Storage, Tensor, scan
from .writing import write_file


def detect(candidate: Candidate) -> bool:
    """Whether it is a JSON object with ``tensor``, a long text."""
    return candidate.json is not None and candidate.json.key == "tensor"


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The tensor inside the pickle inside the base64, of which nothing is executed.

    Raises a :class:`~kobold_sp_plugin.errors.FormatError`.
    """
    assert candidate.json is not None
    meta = candidate.json.value.get("metadata")
    if meta is not None and not isinstance(meta, dict):
        raise MetadataNotJSON("metadata that is not an object", "an object")
    found = dict(meta or {})
    metadata.check_size(len(json.dumps(found)), "metadata")
    tensor = scan(memoryview(candidate.json.data)).value
    if not isinstance(tensor, Tensor) or not isinstance(tensor.storage, (memoryview, Storage)):
        raise CorruptMember("a pickle that is no tensor", "a tensor of torch's")
    if isinstance(tensor.storage, Storage):
        raise CorruptMember("a tensor without its values", "the values inside the pickle")
    inner = torch_file.read_legacy(BoundedBytes(tensor.storage))
    others = tuple(name[:100] for name in candidate.json.value if name != "metadata")
    yield torch_file.source(inner, tensor._replace(storage=inner.value), "tensor", found)._replace(others=others)


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the JSON. mkultra's four keys are always there, as its reader would add them."""
    found: Dict[str, Any] = metadata.portable(softprompt)
    name = found.pop("name", "") or "Untitled"
    tensor = torch_file.write_pickle(softprompt.rows, dtype)
    own = {
        "name": name,
        "uuid": found.pop("uuid", None) or str(uuid.UUID(bytes=hashlib.sha256(tensor).digest()[:16], version=4)),
        "description": found.pop("description", "") or "",
        "epoch": found.pop("epoch", None) or 0,
    }
    text = {"metadata": {**own, **found}, "tensor": base64.b64encode(tensor).decode("ascii")}
    write_file(path, json.dumps(text).encode("ascii"))
