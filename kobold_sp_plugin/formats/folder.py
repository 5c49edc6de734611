"""KoboldAI's soft prompt, not packed: a folder with ``tensor.npy`` and ``meta.json``."""

import os
from contextlib import contextmanager
from typing import Iterator

from ..softprompt import SoftPrompt
from . import metadata, npy
from .source import Candidate, Source, check_regular, read_part
from .writing import write_folder


def detect(candidate: Candidate) -> bool:
    """Any folder that is not of another format: what is wrong with it, this one says."""
    return candidate.is_folder


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The tensor and the metadata in the folder.

    Raises :class:`NoTensor`, :class:`NotASoftPromptFile`, :class:`UnsafeName`, :class:`OSError` or one of the
    metadata's or the tensor's errors.
    """
    meta = None
    if metadata.LABEL in candidate.names:
        path = candidate.part_path(metadata.LABEL)
        metadata.check_size(check_regular(path).st_size)
        meta = read_part(path, metadata.MAX_BYTES)
    with open(candidate.part_path(npy.TENSOR), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield npy.source(file.read, size, npy.TENSOR, metadata.parse(meta))


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the folder: the same two files that the zip holds."""
    tensor, meta = npy.tensor_and_metadata(softprompt, dtype)
    write_folder(path, {npy.TENSOR: tensor, metadata.LABEL: meta})
