"""The hosts that we can be installed into, as data, and the Python environment that each of them runs in.

Standard library only: the same code runs from a wheel beside the host and in any Python that has us.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

from ..errors import NoEnvironment, UnknownHost

OLDEST_PYTHON = (3, 8)
_PROBE_SECONDS = 60.0
_LONGEST_HEADING = 4096
_LONGEST_REFERENCES = 1 << 20


@dataclass(frozen=True)
class Host:
    """A host application: how its folder is recognised, and what installing puts where."""

    name: str
    script: str
    """What its users start."""
    has: Tuple[str, ...]
    lacks: Tuple[str, ...]
    environments: Tuple[str, ...]
    """Where its own installers, and people, put its Python environment."""
    hook: str
    """The folder in ``hooks/``."""
    files: Tuple[str, ...]
    """What is copied from there; the last one is what makes the hook work, so it is written last."""
    destinations: Tuple[Tuple[str, str], ...]
    """Where to: the second of the first pair whose first is there; none: beside the environment's packages."""
    makes: Tuple[str, ...]
    """What the hook itself makes in the host's folder when it runs: a file of its state, a folder that may be empty."""
    isolated: bool
    """Whether its own start script keeps packages of the user's (``~/.local``) out."""
    start: str
    """What to do to have soft prompts, after installing."""

    def destination(self, folder: Path) -> Optional[Path]:
        """Where in ``folder`` the hook's files go; ``None`` for its environment."""
        return next((folder / into for there, into in self.destinations if (folder / there).is_dir()), None)


_KOBOLDAI: Dict[str, Any] = {
    "script": "aiserver.py",
    # play.sh: runtime/envs/...; play.bat: miniconda3/python, also as drive B: or K:, or miniconda3 itself.
    "environments": (
        "runtime/envs/koboldai",
        "runtime/envs/koboldai-rocm",
        "runtime/envs/koboldai-ipex",
        "miniconda3/python",
        "miniconda3",
        "venv",
        ".venv",
    ),
    "hook": "koboldai",
    "files": ("kobold_sp_koboldai.py", "kobold_sp_koboldai.pth"),
    "destinations": (),
    "makes": (),
    "start": "Start KoboldAI as always.",
}

HOSTS: Tuple[Host, ...] = (
    Host(
        name="KoboldAI Client",
        has=("aiserver.py", "fileops.py"),
        lacks=("koboldai_settings.py",),
        isolated=False,
        **_KOBOLDAI,
    ),
    Host(
        name="KoboldAI United",
        has=("aiserver.py", "koboldai_settings.py", "modeling"),
        lacks=(),
        isolated=True,
        **_KOBOLDAI,
    ),
    Host(
        name="text-generation-webui",
        script="server.py",
        has=("server.py", "modules/extensions.py"),
        lacks=(),
        environments=("installer_files/env", "portable_env", "venv", ".venv"),
        hook="text_generation_webui",
        files=("script.py",),
        destinations=(("user_data/extensions", "user_data/extensions/soft_prompts"), ("", "extensions/soft_prompts")),
        makes=("user_data/softprompts.json", "user_data/softprompts"),
        isolated=True,
        start="Start it with `--extensions soft_prompts`, or tick soft_prompts in its Session tab.",
    ),
)

_INTERPRETERS = ("bin/python", "bin/python3", "python.exe", "Scripts/python.exe")
PACKAGES = ("torch", "transformers", "numpy", "flask-socketio", "watchdog")

# Runs in the host's Python; what it says is the last line, since a start may print.
_PROBE = """
import json, sys, sysconfig
about = {"version": list(sys.version_info[:3]), "prefix": sys.prefix, "purelib": sysconfig.get_path("purelib")}
about["armed"] = "kobold_sp_koboldai" in sys.modules
if sys.version_info >= (3, 8):
    from importlib import metadata, util
    def version(name):
        try:
            return metadata.version(name)
        except Exception:
            return None
    about["packages"] = {name: version(name) for name in sys.argv[1:]}
    about["pip"] = util.find_spec("pip") is not None
    try:
        ours = metadata.distribution("kobold_sp_plugin")
        about["ours"] = [ours.metadata["Version"], str(ours.locate_file(""))]
    except Exception:
        about["ours"] = None
print(json.dumps(about))
"""


@dataclass(frozen=True)
class Environment:
    """A Python environment, as its own interpreter describes it."""

    python: Path
    version: str
    site_packages: Path
    packages: Dict[str, Optional[str]] = field(default_factory=dict)
    """Releases of what we work with, by their metadata; nothing is imported."""
    has_pip: bool = False
    armed: bool = False
    """Whether KoboldAI's hook takes effect: a start of this Python imports it."""
    ours: Optional[Tuple[str, Path]] = None
    """The ``kobold_sp_plugin`` in it: its release, and where."""

    @property
    def release(self) -> Tuple[int, ...]:
        return tuple(int(part) for part in self.version.split(".")[:2])


def recognise(folder: Path) -> Host:
    """The host application in ``folder``. Raises :class:`UnknownHost`, which says what was looked for."""
    looked_for = []
    for host in HOSTS:
        missing = [name for name in host.has if not (folder / name).exists()]
        if not missing and not any((folder / name).exists() for name in host.lacks):
            return host
        looked_for.append(f"{host.name} has {' and '.join(host.has)} (missing: {', '.join(missing) or 'nothing'})")
    found = "It is no folder." if not folder.is_dir() else f"{'; '.join(looked_for)}."
    raise UnknownHost(f"{folder} is none of the programs that soft prompts can be installed into. {found}")


def find_environment(folder: Path, host: Host, python: Optional[Path] = None) -> Environment:
    """The Python environment that ``host`` in ``folder`` runs in; ``python`` names its interpreter.

    Else it is the one that the host's installers made in its folder; the Python that runs now counts only if it
    is in there. Raises :class:`NoEnvironment`, which says where was looked.
    """
    if python is not None:
        return probe(_absolute(python))
    found = list(_interpreters(folder, host))
    prefixes = [Path(os.path.realpath(each.parents[depth])) for each, depth in found]
    running = Path(os.path.realpath(sys.prefix))
    if running in prefixes:
        return probe(found[prefixes.index(running)][0])
    if Path(os.path.realpath(folder)) in running.parents:
        return probe(_absolute(Path(sys.executable)))
    advice = "Name the Python that it runs in: --python PATH."
    if not found:
        places = ", ".join(host.environments)
        raise NoEnvironment(f"{host.name} has no Python environment in {folder} (looked for {places}). {advice}")
    if len(found) > 1:
        names = ", ".join(str(each) for each, _ in found)
        raise NoEnvironment(f"{host.name} has several Python environments: {names}. {advice}")
    return probe(found[0][0])


def probe(python: Path) -> Environment:
    """Ask an interpreter about its environment; it is started without writing anything.

    Raises :class:`NoEnvironment` if it cannot be run, or is too old for us.
    """
    try:
        done = subprocess.run(
            [str(python), "-I", "-B", "-c", _PROBE, *PACKAGES],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_SECONDS,
        )
        about = json.loads(done.stdout.decode("utf-8", "replace").strip().splitlines()[-1])
        release, purelib = tuple(about["version"]), about["purelib"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        said = error if isinstance(error, (OSError, subprocess.TimeoutExpired)) else "it does not answer as Python does"
        raise NoEnvironment(f"{python} cannot be used: {said}. Name the Python that the host runs in: --python PATH.")
    version = ".".join(map(str, release))
    if release < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise NoEnvironment(f"{python} is Python {version}; soft prompts need {oldest} or newer.")
    ours = about["ours"]
    return Environment(
        python=python,
        version=version,
        site_packages=Path(os.path.realpath(purelib)),
        packages=about["packages"],
        has_pip=about["pip"],
        armed=about["armed"],
        ours=(ours[0] or "", Path(os.path.realpath(ours[1]))) if ours else None,
    )


def host_version(folder: Path, host: Host) -> Tuple[Optional[str], Optional[str]]:
    """The release that the host's script names in its heading, and the commit of its checkout, if they can be told."""
    heading = _text(folder / host.script)
    named = re.search(r"^# Version: *(\S+)", heading, re.MULTILINE)
    return (named.group(1) if named else None), _commit(folder / ".git")


def _commit(git: Path) -> Optional[str]:
    head = _text(git / "HEAD").strip()
    if head.startswith("ref: "):
        reference = head[len("ref: ") :]
        if ".." in reference.split("/"):
            return None
        head = _text(git / reference).strip()
        if not head:
            packed = re.search(
                rf"^([0-9a-f]{{40}}) {re.escape(reference)}$", _text(git / "packed-refs", 1 << 20), re.MULTILINE
            )
            head = packed.group(1) if packed else ""
    return head if re.fullmatch(r"[0-9a-f]{40}", head) else None


def _text(path: Path, limit: int = _LONGEST_HEADING) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""


def _interpreters(folder: Path, host: Host) -> Iterator[Tuple[Path, int]]:
    """The interpreters in the host's folder, each with which of its parents is the environment."""
    for place in host.environments:
        for name in _INTERPRETERS:
            python = folder / place / name
            if python.is_file():
                yield _absolute(python), name.count("/")
                break


def _absolute(python: Path) -> Path:
    """``python`` as an absolute path whose last part is not followed: a venv's interpreter is a link out of it."""
    return Path(os.path.realpath(python.parent)) / python.name
