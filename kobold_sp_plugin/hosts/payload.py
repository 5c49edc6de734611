"""What an install puts into a host's environment: this package as its wheel holds it, and watchdog.

They are unpacked here and not by pip: pip compiles, writes scripts and its own caches, may be missing, and can be
killed between two files; none of that could be taken back to the byte. pip still lists and removes them, by their
``.dist-info``.
"""

import base64
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Dict, Iterator, NamedTuple, Optional, Tuple

from .. import __version__
from .environments import Environment

NAME = "kobold_sp_plugin"
INSTALLER = "kobold-sp"
INSTALLED_BY = f"{INSTALLER}\n".encode()
"""What the file INSTALLER of a ``.dist-info`` holds."""
METADATA = f"{NAME}-{__version__}.dist-info/METADATA"
_BESIDE = ("hooks", "softprompts")
"""Folders that lie beside the package in a checkout and in it elsewhere."""
_FROM_OURS = ("METADATA", "licenses/LICENSE")
_PIP_SECONDS = 120.0
_LARGEST_WHEEL = 16 << 20
_WHEEL = f"Wheel-Version: 1.0\nGenerator: {INSTALLER} ({__version__})\nRoot-Is-Purelib: true\nTag: py3-none-any\n"

Files = Dict[str, bytes]
"""Contents by path in ``site-packages``, with ``/``; in the order in which they are written."""


def package() -> Files:
    """Every file of this package, wherever it was imported from: site-packages, a checkout, or a wheel on the path."""
    root = Path(__file__).parents[2]
    found = dict(_in_zip(root) if root.is_file() else _in_folder(root))
    files = {}
    for name, content in sorted(found.items()):
        top = PurePosixPath(name).parts[0]
        files[f"{NAME}/{name}" if top in _BESIDE else name] = content
    return files


def own_metadata() -> Files:
    """The ``.dist-info`` of this package but for its RECORD."""
    folder = PurePosixPath(METADATA).parent
    try:
        installed: Optional[metadata.Distribution] = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        installed = None
    files = {}
    if installed is not None and installed.version == __version__:  # another release may be installed beside a checkout
        texts = ((name, installed.read_text(name)) for name in _FROM_OURS)
        files = {f"{folder}/{name}": text.encode() for name, text in texts if text}
    files.setdefault(
        METADATA, f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {__version__}\nRequires-Python: >=3.8\n".encode()
    )
    return {**files, f"{folder}/WHEEL": _WHEEL.encode(), f"{folder}/INSTALLER": INSTALLED_BY}


def with_record(files: Files) -> Files:
    """``files`` with the RECORD that their ``.dist-info`` needs, so that pip can list and remove them."""
    folder = next(PurePosixPath(name).parent for name in files if name.endswith(".dist-info/METADATA"))
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow((name, f"sha256={digest}", len(content)))
    writer.writerow((f"{folder}/RECORD", "", ""))
    return {**files, f"{folder}/RECORD": rows.getvalue().encode()}


class Watchdog(NamedTuple):
    """A watchdog to put into an environment that has none, or why there is none to put."""

    version: Optional[str]
    files: Files
    reason: str = ""


def watchdog(environment: Environment) -> Watchdog:
    """watchdog as it suits ``environment``: the one that runs here, or else what the environment's pip downloads."""
    found = _own_watchdog(environment)
    if found is not None:
        return found
    if not environment.has_pip:
        return Watchdog(None, {}, "the environment has no pip to download it with")
    with tempfile.TemporaryDirectory() as folder:
        command = [str(environment.python), "-I", "-B", "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--disable-pip-version-check", "--no-cache-dir", "--no-input"]
        command += ["--retries", "0", "--timeout", "10", "--dest", folder, "watchdog>=2.1"]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PIP_SECONDS)
            wheel = next(iter(sorted(Path(folder).glob("watchdog-*.whl"))), None)
            if done.returncode or wheel is None:
                return Watchdog(None, {}, "pip could not download it")
            return _unpacked(wheel)
        except (OSError, ValueError, zipfile.BadZipFile, subprocess.TimeoutExpired) as error:
            return Watchdog(None, {}, f"it could not be downloaded: {error}")


def _own_watchdog(environment: Environment) -> Optional[Watchdog]:
    """The pure part of the watchdog that is installed where this runs, if it runs in ``environment`` as well."""
    try:
        installed = metadata.distribution("watchdog")
        needs = re.fullmatch(r">=\s*(\d+)\.(\d+)", installed.metadata["Requires-Python"] or "")
        if needs is None or environment.release < tuple(map(int, needs.groups())):
            return None
        names = [PurePosixPath(each.as_posix()) for each in installed.files or ()]
        kept = [each for each in names if each.parts[0] == "watchdog" and each.suffix in (".py", ".typed")]
        folder = next(each.parent for each in names if each.match("watchdog-*.dist-info/METADATA"))
        kept += [each for each in names if each.parent == folder and each.name in ("METADATA", "LICENSE", "COPYING")]
        files = {str(each): Path(str(installed.locate_file(each))).read_bytes() for each in kept}
    except (metadata.PackageNotFoundError, OSError, StopIteration):
        return None
    return Watchdog(installed.version, _completed(files, folder))


def _unpacked(wheel: Path) -> Watchdog:
    """The files of a downloaded wheel. Raises :class:`ValueError` for one that is not plain files of watchdog's."""
    with zipfile.ZipFile(wheel) as archive:
        members = [each for each in archive.infolist() if not each.is_dir()]
        if sum(each.file_size for each in members) > _LARGEST_WHEEL:
            raise ValueError(f"{wheel.name} is larger than a watchdog")
        folder = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
        tops = ("watchdog", folder)
        for each in members:
            parts = each.filename.split("/")
            if parts[0] not in (*tops, "_watchdog_fsevents") and not parts[0].startswith("_watchdog_fsevents."):
                raise ValueError(f"{wheel.name} holds {each.filename}")
            if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
                raise ValueError(f"{wheel.name} holds {each.filename}")
        wanted = [each for each in members if each.filename.split("/")[-1] not in ("RECORD", "entry_points.txt")]
        files = {each.filename: archive.read(each) for each in wanted}
    return Watchdog(wheel.name.split("-")[1], _completed(files, PurePosixPath(folder)))


def _completed(files: Files, folder: PurePosixPath) -> Files:
    """``files`` of a wheel as an installer leaves them, the ``.dist-info`` last: it says that all is there."""
    about = {name: content for name, content in files.items() if PurePosixPath(name).parts[0] == folder.name}
    first = {name: content for name, content in files.items() if name not in about}
    tag = {f"{folder}/WHEEL": _WHEEL.encode()} if f"{folder}/WHEEL" not in about else {}
    return with_record({**first, **tag, f"{folder}/INSTALLER": INSTALLED_BY, **about})


def _in_folder(root: Path) -> Iterator[Tuple[str, bytes]]:
    for top in (NAME, *_BESIDE):
        if top != NAME and (root / NAME / top).is_dir():  # installed: they are in the package
            continue
        for place, folders, names in os.walk(root / top):
            folders[:] = [each for each in folders if each != "__pycache__" and not each.startswith(".")]
            for name in names:
                path = Path(place, name)
                if not name.startswith(".") and path.suffix not in (".pyc", ".pyo"):
                    yield path.relative_to(root).as_posix(), path.read_bytes()


def _in_zip(root: Path) -> Iterator[Tuple[str, bytes]]:
    with zipfile.ZipFile(root) as archive:
        for name in archive.namelist():
            if name.startswith(f"{NAME}/") and not name.endswith("/"):
                yield name, archive.read(name)


def hook_files(files: Files, hook: str) -> Files:
    """What ``files`` of the package hold of the folder ``hooks/<hook>``, by name."""
    start = f"{NAME}/hooks/{hook}/"
    return {name[len(start) :]: content for name, content in files.items() if name.startswith(start)}


def is_from_archive() -> bool:
    """Whether this package runs from a wheel on ``sys.path``: there are then no files of it to start a process with."""
    return not Path(sys.modules[NAME].__file__ or "").is_file()
