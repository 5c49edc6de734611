"""A plain file of ``torch.save``: the rows as a tensor, or as the one such tensor in a dictionary."""

import os
from contextlib import contextmanager
from typing import Iterator

from ..softprompt import SoftPrompt
from . import torch_file
from .archive import write_members
from .source import Candidate, Source
from .writing import replacing


def detect(candidate: Candidate) -> bool:
    """Whether it is a zip of torch's, or begins with the magic number of its older files."""
    if candidate.start.startswith(torch_file.LEGACY_MAGIC):
        return True
    return candidate.is_zip and torch_file.is_zip(candidate.members)


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The rows, of which nothing is executed. Raises a FormatError."""
    label = os.path.basename(candidate.path)
    saved = torch_file.of(candidate)
    name, tensor = torch_file.chosen(saved.value, candidate.part, label)
    yield torch_file.source(saved, tensor, name[:100], {})


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the tensor as ``torch.save(tensor, path)`` would."""
    members = torch_file.write_zip(softprompt.rows, dtype, softprompt.rows.shape)
    with replacing(path) as file:
        write_members(file, members)
