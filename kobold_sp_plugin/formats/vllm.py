"""vLLM's ``prompt_embeds``: base64 of a file of ``torch.save``, one tensor ``[n_tokens, width]``.

To vLLM it is the whole prompt: a client puts the embeddings of the text behind the rows. Source:
``vllm/renderers/embed_utils.py``.
"""

import base64
import os
from contextlib import contextmanager
from io import BytesIO
from typing import Iterator

from ..errors import TooLarge
from ..softprompt import SoftPrompt
from . import json_text, npy, torch_file
from .archive import BoundedBytes, write_members
from .source import Candidate, Source
from .writing import write_file

_STARTS = tuple(base64.b64encode(start)[:6] for start in (b"PK\x03\x04\0", b"\x80\x02\x8a\x0al"))


def detect(candidate: Candidate) -> bool:
    """Whether it begins with base64 of what a file of torch's begins with."""
    return candidate.start[:5] == _STARTS[0][:5] or candidate.start.startswith(_STARTS[1])


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The rows, of which nothing is executed. Raises a FormatError."""
    if candidate.size > json_text.MAX_BYTES:
        raise TooLarge(f"base64 of {candidate.size} bytes", f"at most {json_text.MAX_BYTES}")
    label = os.path.basename(candidate.path)
    candidate.file.seek(0)
    text = b"".join(iter(lambda: candidate.file.read(npy.CHUNK), b""))
    data = json_text.decode_base64(memoryview(text), label)
    del text
    saved = torch_file.read(BoundedBytes(data))
    name, tensor = torch_file.chosen(saved.value, candidate.part, label)
    yield torch_file.source(saved, tensor, name[:100], {})


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the base64 that a request carries as ``prompt_embeds``."""
    file = BytesIO()
    write_members(file, torch_file.write_zip(softprompt.rows, dtype, softprompt.rows.shape))
    write_file(path, base64.b64encode(file.getvalue()))
