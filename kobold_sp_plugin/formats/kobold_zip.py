"""KoboldAI's zip: ``tensor.npy`` and ``meta.json``, at the root or in one folder."""

import zipfile
from contextlib import contextmanager
from typing import Dict, Iterator

from ..errors import NoTensor
from ..softprompt import SoftPrompt
from . import metadata, npy
from .archive import Member, write_members
from .source import Candidate, Source
from .writing import replacing


def detect(candidate: Candidate) -> bool:
    """Any zip that is not of another format: what is wrong with it, this one says."""
    return candidate.is_zip


@contextmanager
def opened(candidate: Candidate) -> Iterator[Source]:
    """The tensor and the metadata in the zip; every member's name is checked, none is extracted.

    Raises a :class:`~kobold_sp_plugin.errors.FormatError`: NotASoftPromptFile, NoTensor, EncryptedMember,
    UnsupportedCompression, CorruptMember, DuplicateMember, UnsafeName, TooLarge or one of the metadata's
    or the tensor's.
    """
    members = candidate.members
    folder = _folder_of_tensor(members)
    meta = None
    meta_info = members.get(folder + metadata.LABEL)
    if meta_info is not None:
        metadata.check_size(meta_info.file_size)
        member = Member(candidate.file, meta_info, metadata.LABEL)
        meta = member.read(meta_info.file_size)
        member.finish()
    info = members[folder + npy.TENSOR]
    tensor = Member(candidate.file, info, npy.TENSOR)
    found = npy.source(tensor.read, info.file_size, npy.TENSOR, metadata.parse(meta), tensor.finish, info.CRC)
    ours = (folder, folder + npy.TENSOR, folder + metadata.LABEL)
    others = tuple(name[:100] for name in members if name not in ours and not name.startswith("__MACOSX/"))
    yield found._replace(others=others)


def write(softprompt: SoftPrompt, path: str, dtype: str) -> None:
    """Write the zip. The members are stored: what a compressor puts out depends on its release."""
    tensor, meta = npy.tensor_and_metadata(softprompt, dtype)
    with replacing(path) as file:
        write_members(file, {npy.TENSOR: tensor, metadata.LABEL: meta})


def _folder_of_tensor(members: Dict[str, zipfile.ZipInfo]) -> str:
    """The folder inside the zip that holds the tensor: "" for the root, else "noir/"."""
    if npy.TENSOR in members:
        return ""
    folders = [
        name[: -len(npy.TENSOR)]
        for name in members
        if name.endswith("/" + npy.TENSOR) and name.count("/") == 1 and not name.startswith("__MACOSX/")
    ]
    if len(folders) > 1:
        raise NoTensor(f"a zip of {len(folders)} folders with a {npy.TENSOR} each", f"one {npy.TENSOR}")
    if not folders:
        names = ", ".join(list(members)[:5])[:100] or "nothing"
        raise NoTensor(f"a zip without {npy.TENSOR} (it holds {names})", f"{npy.TENSOR} at its root or in one folder")
    return folders[0]
