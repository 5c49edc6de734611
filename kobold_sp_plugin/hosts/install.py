"""Installing into a host application, taking it back to the byte, and what is there now.

Everything that is written is first written down in a record, ``kobold_sp_plugin.json`` in the host's folder, with
its checksum; so an install that was interrupted anywhere can be repeated or taken back. What makes the hook work is
written last and removed first: half an install does nothing. A file that holds something else than what we wrote is
never overwritten and never removed.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

from .. import __version__
from ..errors import BadRecord, FileInTheWay, ForeignPackage, HostError, ReadOnlyInstall
from . import payload
from .environments import Environment, Host, find_environment, host_version, probe, recognise

RECORD = "kobold_sp_plugin.json"
_FORMAT = 1
_LARGEST_RECORD = 4 << 20
_PART = ".kobold-sp"
"""Ends the name of a file that is being written."""


@dataclass(frozen=True)
class Record:
    """What was written for a host, or is about to be: all that taking it back needs."""

    folder: Path
    """The host's."""
    host: str
    version: str
    complete: bool
    python: Path
    site_packages: Path
    watchdog: Optional[str]
    """Its release, if it is one of the files."""
    files: Dict[Path, Tuple[str, ...]] = field(default_factory=dict)
    """Every file with the SHA-256 of what we wrote or will write there; in the order of writing."""
    folders: Tuple[Path, ...] = ()
    """Folders that were not there before; they go when they are empty."""
    made: Tuple[Path, ...] = ()
    """Files that were not there before, and that the hook writes when it runs."""

    @classmethod
    def load(cls, folder: Path) -> Optional["Record"]:
        """The record in ``folder``, if there is one. Raises :class:`BadRecord` if it is damaged.

        Where pip has replaced the package since, its files are no longer in it.
        """
        path = folder / RECORD
        try:
            with open(path, "rb") as file:
                content = file.read(_LARGEST_RECORD)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadRecord(f"{path} cannot be read: {error.strerror}") from error
        try:
            record = cls._parsed(folder, json.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            advice = f"Run `python -m pip uninstall {payload.NAME}` with the host's Python, and delete that file."
            raise BadRecord(f"{path} is damaged ({type(error).__name__}: {error}). {advice}") from error
        installers = record.site_packages.glob(f"{payload.NAME}-*.dist-info/INSTALLER")
        if all(_sum_of(each) in (_sum(payload.INSTALLED_BY), "") for each in installers):
            return record
        return replace(record, files={path: sums for path, sums in record.files.items() if not record.is_package(path)})

    @classmethod
    def _parsed(cls, folder: Path, values: Dict[str, Any]) -> "Record":
        if values["format"] != _FORMAT:
            raise ValueError(f"format {values['format']!r} is not {_FORMAT}")
        site_packages = folder / values["site_packages"]

        def inside(name: str) -> Path:
            path = folder / name
            if ".." in path.parts or not {folder, site_packages} & set(path.parents):
                raise ValueError(f"{name!r} is neither in the host's folder nor in its environment")
            return path

        return cls(
            folder=folder,
            host=str(values["host"]),
            version=str(values["version"]),
            complete=values["complete"] is True,
            python=folder / values["python"],
            site_packages=site_packages,
            watchdog=values["watchdog"],
            files={inside(name): tuple(map(str, sums)) for name, sums in values["files"].items()},
            folders=tuple(inside(name) for name in values["folders"]),
            made=tuple(inside(name) for name in values["made"]),
        )

    def save(self) -> None:
        """Write the record to its folder, atomically; paths in the folder are relative, so that it can be moved."""
        content = {
            "format": _FORMAT,
            "about": f"What `kobold-sp install` put here, version {self.version}. `kobold-sp uninstall` takes it back.",
            "host": self.host,
            "version": self.version,
            "complete": self.complete,
            "python": self._name(self.python),
            "site_packages": self._name(self.site_packages),
            "watchdog": self.watchdog,
            "files": {self._name(path): list(sums) for path, sums in self.files.items()},
            "folders": [self._name(path) for path in self.folders],
            "made": [self._name(path) for path in self.made],
        }
        _write(self.folder / RECORD, json.dumps(content, indent=1).encode(), durable=True)

    def _name(self, path: Path) -> str:
        return (path.relative_to(self.folder) if self.folder in path.parents else path).as_posix()

    def is_package(self, path: Path) -> bool:
        """Whether a file belongs to the package itself, not to watchdog or the hook."""
        return self._top(path).split("-")[0] == payload.NAME

    def is_watchdog(self, path: Path) -> bool:
        return self._top(path).lstrip("_").startswith("watchdog")

    def _top(self, path: Path) -> str:
        return path.relative_to(self.site_packages).parts[0] if self.site_packages in path.parents else ""

    def changed(self) -> List[Path]:
        """Files that hold something else than what we wrote."""
        return [path for path, sums in self.files.items() if _sum_of(path) not in (None, *sums)]

    def missing(self) -> List[Path]:
        return [path for path in self.files if not os.path.lexists(path)]


@dataclass(frozen=True)
class Plan:
    """What an install would do."""

    folder: Path
    host: Host
    environment: Environment
    files: Dict[Path, bytes]
    """What is written, in order; files that are there already and are not ours are left out."""
    kept: Dict[Path, Tuple[str, ...]]
    """Files of the last install that stay as they are."""
    before: Optional[Record]
    watchdog: Optional[str]
    without_watchdog: str
    """Why watchdog is not installed with us, if neither the environment nor we have it."""

    @property
    def is_there(self) -> bool:
        """Whether somebody else, such as pip, put the package itself there; it is used, and stays."""
        return self.environment.site_packages / payload.METADATA not in self.files

    def to_write(self) -> List[Path]:
        return [path for path, content in self.files.items() if _sum_of(path) != _sum(content)]

    def to_remove(self) -> List[Path]:
        old = self.before.files if self.before else {}
        return [path for path in old if path not in self.files and path not in self.kept and _sum_of(path) in old[path]]

    def in_the_way(self) -> List[Path]:
        """Files that hold neither what would be written nor what was written before."""
        old = self.before.files if self.before else {}
        return [
            path
            for path, content in self.files.items()
            if os.path.lexists(path) and _sum_of(path) not in (_sum(content), *old.get(path, ()))
        ]


@dataclass(frozen=True)
class Removal:
    """What :func:`uninstall` did."""

    record: Record
    changed: Tuple[Path, ...]
    """Files that stay, since they were changed after they were installed."""
    blocked: Tuple[Tuple[Path, str], ...]
    """Files that the system did not let go, and why; the record stays, to try again."""


@dataclass(frozen=True)
class Status:
    """What is in a host's folder; ``problem`` says what keeps an install from being made or changed, if anything."""

    folder: Path
    host: Host
    version: Optional[str]
    commit: Optional[str]
    environment: Optional[Environment]
    record: Optional[Record]
    plan: Optional[Plan]
    problem: str

    @property
    def intact(self) -> bool:
        """Whether all is installed and nothing of it is missing or changed."""
        record = self.record
        return record is not None and record.complete and not record.changed() and not record.missing()

    @property
    def active(self) -> Optional[bool]:
        """Whether the hook takes effect; ``None`` where only the host's own settings tell."""
        if self.host.destinations:
            return None
        return self.environment is not None and self.environment.armed and self.environment.ours is not None


def environment_of(folder: Path, python: Optional[Path] = None) -> Tuple[Host, Environment]:
    """The host in ``folder``, and the environment that it is installed in, or runs in."""
    folder = Path(os.path.realpath(folder))
    host = recognise(folder)
    return host, _environment(folder, host, python, Record.load(folder))


def plan(folder: Path, python: Optional[Path] = None) -> Plan:
    """What installing into the host in ``folder`` would do; ``python`` names its interpreter if it cannot be found.

    Writes nothing. Raises :class:`~kobold_sp_plugin.errors.UnknownHost`, :class:`NoEnvironment` or
    :class:`ForeignPackage`.
    """
    folder = Path(os.path.realpath(folder))
    host = recognise(folder)
    before = Record.load(folder)
    return _plan(folder, host, _environment(folder, host, python, before), before)


def install(folder: Path, python: Optional[Path] = None) -> Plan:
    """Install into the host in ``folder``, or upgrade what is there; returns what was done.

    Raises what :func:`plan` does, and :class:`FileInTheWay` before anything is changed; :class:`ReadOnlyInstall` if the
    system does not let us write, and then nothing of ours is left there.
    """
    todo = plan(folder, python)
    places = (todo.folder, todo.environment.site_packages)
    for place in places:
        if not os.access(place, os.W_OK):
            raise ReadOnlyInstall(f"Nothing was changed: {place} cannot be written to. {_advice(todo.host)}")
    if todo.before is not None and todo.before.site_packages != todo.environment.site_packages:
        uninstall(folder)  # the host runs in another environment now
        todo = plan(folder, todo.environment.python)
    blocking = todo.in_the_way()
    if blocking:
        names = ", ".join(map(str, blocking))
        raise FileInTheWay(f"Nothing was changed: {names} would be overwritten. Move it away, then install again.")
    if todo.before is not None and todo.before.complete and not todo.to_write() and not todo.to_remove():
        return todo
    record = _record(todo)
    try:
        record.save()
        _carry_out(todo, record)
    except OSError as error:
        _take_back(record)
        where = error.filename or todo.folder
        said = error.strerror or error
        raise ReadOnlyInstall(f"Nothing is installed: {where}: {said}. {_advice(todo.host)}") from error
    return todo


def uninstall(folder: Path) -> Optional[Removal]:
    """Take back what was installed into the host in ``folder``; ``None`` if nothing was.

    Files that were changed since are kept. Raises :class:`BadRecord` and changes nothing if the record is damaged.
    """
    folder = Path(os.path.realpath(folder))
    record = Record.load(folder)
    if record is None:
        with contextlib.suppress(OSError):
            os.unlink(folder / (RECORD + _PART))  # of an install that was interrupted at its first step
        return None
    changed = tuple(record.changed())
    return Removal(record, changed, _take_back(record))


def status(folder: Path, python: Optional[Path] = None) -> Status:
    """What is found and installed in ``folder``, and what an install would change. Writes nothing.

    Raises :class:`~kobold_sp_plugin.errors.UnknownHost`.
    """
    folder = Path(os.path.realpath(folder))
    host = recognise(folder)
    version, commit = host_version(folder, host)
    environment = record = todo = None
    problem = ""
    try:
        record = Record.load(folder)
        environment = _environment(folder, host, python, record)
        todo = _plan(folder, host, environment, record, looks_for_watchdog=False)
    except HostError as error:
        problem = str(error)
    return Status(folder, host, version, commit, environment, record, todo, problem)


def _environment(folder: Path, host: Host, python: Optional[Path], before: Optional[Record]) -> Environment:
    if python is None and before is not None and before.python.is_file():
        return probe(before.python)
    return find_environment(folder, host, python)


def _plan(
    folder: Path, host: Host, environment: Environment, before: Optional[Record], looks_for_watchdog: bool = True
) -> Plan:
    site_packages = environment.site_packages
    here = before if before is not None and before.site_packages == site_packages else None
    known = here.files if here is not None else {}
    mine = payload.package()
    hook = payload.hook_files(mine, host.hook)
    lacking = [name for name in host.files if name not in hook]
    if lacking:
        raise HostError(f"This kobold_sp_plugin has no hook for {host.name}: {', '.join(lacking)} is missing.")
    destination = host.destination(folder)
    activating = {(destination or site_packages) / name: hook[name] for name in host.files}
    files: Dict[Path, bytes] = {}
    is_ours = here is not None and any(here.is_package(path) for path in known)
    if environment.ours is not None and not is_ours:
        release, place = environment.ours
        if release != __version__:
            raise ForeignPackage(
                f"{place} has kobold_sp_plugin {release or '(damaged)'}, which was not installed for {folder}; this is "
                f"{__version__}. Remove it first: {environment.python} -m pip uninstall {payload.NAME}"
            )
    else:
        listed = {**mine, **payload.own_metadata()}
        if destination is None:  # so that `pip uninstall` by hand takes them as well
            listed.update((path.name, content) for path, content in activating.items())
        files = {site_packages / name: content for name, content in payload.with_record(listed).items()}
    kept: Dict[Path, Tuple[str, ...]] = {}
    version: Optional[str] = None
    reason = ""
    if here is not None and here.watchdog is not None:
        kept = {path: sums for path, sums in known.items() if here.is_watchdog(path)}
        version = here.watchdog
    is_whole = here is not None and here.complete and all(_sum_of(path) in sums for path, sums in kept.items())
    if looks_for_watchdog and (not is_whole if kept else environment.packages["watchdog"] is None):
        (version, found, reason), kept = payload.watchdog(environment), {}
        files.update((site_packages / name, content) for name, content in found.items())
    for path, content in activating.items():
        files.pop(path, None)
        files[path] = content  # last
    # What is there already and was not written by us is not ours to take away.
    files = {path: content for path, content in files.items() if path in known or _sum_of(path) != _sum(content)}
    return Plan(folder, host, environment, files, kept, before, version, reason)


def _record(todo: Plan) -> Record:
    """The record of an install that is about to be carried out: what it will have written, and what it replaces."""
    old = todo.before.files if todo.before is not None else {}
    files = {path: sums for path, sums in old.items() if path not in todo.files}
    files.update((path, (_sum(content), *old.get(path, ()))) for path, content in todo.files.items())
    folders = dict.fromkeys(todo.before.folders if todo.before is not None else ())
    made = dict.fromkeys(todo.before.made if todo.before is not None else ())
    for path in map(todo.folder.joinpath, todo.host.makes):
        if not os.path.lexists(path):
            (made if path.suffix else folders)[path] = None
    for path in todo.files:
        around = [path.parent, *path.parent.parents]
        if path.suffix == ".py":
            around.insert(0, path.parent / "__pycache__")
        folders.update(dict.fromkeys(each for each in around if not os.path.lexists(each)))
    return Record(
        folder=todo.folder,
        host=todo.host.name,
        version=__version__,
        complete=False,
        python=todo.environment.python,
        site_packages=todo.environment.site_packages,
        watchdog=todo.watchdog,
        files=files,
        folders=tuple(folders),
        made=tuple(made),
    )


def _carry_out(todo: Plan, record: Record) -> None:
    writing = todo.to_write()
    activator = next(reversed(list(todo.files)), None)
    if activator is not None and os.path.lexists(activator):
        os.unlink(activator)  # an upgrade that is interrupted leaves nothing that starts half of it
        writing = [path for path in writing if path != activator] + [activator]
    for path in writing:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, todo.files[path])
    for path in todo.to_remove():
        _remove(path)
    files = {path: sums[:1] for path, sums in record.files.items() if path in todo.files or path in todo.kept}
    _remove_empty(record.folders)
    replace(record, complete=True, files=files).save()


def _take_back(record: Record) -> Tuple[Tuple[Path, str], ...]:
    """Remove what holds what the record says we wrote, and the record; returns what could not be removed, and why."""
    blocked = []
    for path in (*reversed(list(record.files)), *record.made):  # what makes the hook work was written last
        try:
            if path in record.made or _sum_of(path) in (None, *record.files[path]):
                _remove(path)
        except OSError as error:
            blocked.append((path, error.strerror or str(error)))
    _remove_empty(record.folders)
    if not blocked:
        for name in (RECORD + _PART, RECORD):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(record.folder / name)
    return tuple(blocked)


def _remove(path: Path) -> None:
    """Remove a file, what is left of writing it, and what Python has compiled of it."""
    leftovers = [path, path.with_name(path.name + _PART)]
    if path.suffix == ".py":
        leftovers += _compiled(path)
    for each in leftovers:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(each)


def _compiled(source: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        cache = source.parent / "__pycache__"
        for name in os.listdir(cache):
            if name.startswith(source.stem + ".") and ".pyc" in name:
                yield cache / name


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
        with contextlib.suppress(OSError):  # not there, or with something of somebody else's
            os.rmdir(folder)


def _write(path: Path, content: bytes, durable: bool = False) -> None:
    part = path.with_name(path.name + _PART)
    with open(part, "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, path)


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sum_of(path: Path) -> Optional[str]:
    """The SHA-256 of a file; ``None`` if there is none, and empty if it cannot be told."""
    try:
        return _sum(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return "" if os.path.lexists(path) else None
    except OSError:
        return ""


def _advice(host: Host) -> str:
    if host.destinations:
        return "Make it writable, then install again."
    return f"`kobold-sp run {host.script}` starts the host with soft prompts and installs nothing."
