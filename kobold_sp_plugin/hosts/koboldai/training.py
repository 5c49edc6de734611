"""One training at a time for a host's page: ``kobold-sp train`` in a process of its own, and what became of it.

The host's model goes on serving meanwhile. The process writes a line of JSON for each thing that happens into a file,
which is read from the host's own green thread: no pipe that fills up, and nothing that eventlet has to know of.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from ...errors import AlreadyRunning, BadSetting
from ...training.places import filename

_LOOK_SECONDS = 0.3
_LONGEST_TEXT = 20_000
_NICENESS = 10
"""The stories of the host go first."""
FIELDS = ("sp_title", "sp_prompt", "sp_dataset", "sp_author", "sp_description")
"""What United's form sends."""


def arguments(request: Any, model: str, precision: str, softprompts: Path, initial: Path) -> List[str]:
    """The command line, after ``kobold-sp``, of what United's form asks for; ``initial`` gets the first prompt.

    Raises :class:`BadSetting`, which says what is missing in the words of the form.
    """
    given = request if isinstance(request, dict) else {}
    form = {key: str(given.get(key) or "").strip()[:_LONGEST_TEXT] for key in FIELDS}
    title, data = form["sp_title"], form["sp_dataset"]
    if not filename(title):
        raise BadSetting("The title is missing: it becomes the name in the menu, and of the file.")
    if not data:
        raise BadSetting(
            "The dataset is missing: give the folder with your texts (.txt), by its whole path or as seen from "
            "KoboldAI's folder."
        )
    given_options = ["--data", str(Path(data).expanduser().absolute()), "--name", title, "--model", model]
    given_options += ["--output", str(softprompts / f"{filename(title)}.zip"), "--precision", precision]
    given_options += ["--author", form["sp_author"], "--description", form["sp_description"], "--json-lines"]
    if form["sp_prompt"]:
        initial.write_text(form["sp_prompt"], encoding="utf-8")
        given_options += ["--initial-text", f"@{initial}"]
    return ["train", *given_options]


class Trainings:
    """The training that runs or ran last. ``status`` is all that a page needs, also one that was loaded anew."""

    def __init__(self, tell: Callable[[Dict[str, Any]], None]):
        self._tell = tell
        self.status: Dict[str, Any] = {"state": "none"}
        """"state": "none", "running", "stopping", "done", "cancelled" or "failed"; and "name", "step", "steps",
        "loss", "held_out", "seconds_left", "message", as far as they are known."""
        self._process: Optional[subprocess.Popen[bytes]] = None

    @property
    def is_running(self) -> bool:
        """Whether it has not said how it ended."""
        return self.status["state"] in ("running", "stopping")

    def start(self, name: str, command: Callable[[Path], Sequence[str]]) -> Callable[[Callable[[float], Any]], None]:
        """Start the process; what is returned follows it to its end, with a ``sleep``, in a task of the host's.

        ``command`` makes the arguments, given a folder that is there while it runs. Raises :class:`AlreadyRunning`.
        """
        if self._process is not None:
            raise AlreadyRunning(
                f"{self.status['name']} is being trained; only one at a time. Wait for it, or cancel it."
            )
        folder = tempfile.TemporaryDirectory(prefix="kobold-sp-training-")
        place = Path(folder.name)
        try:
            given = list(command(place))
            with open(place / "lines", "wb") as lines, open(place / "log", "wb") as log:
                # In a folder of its own, where no file of the host's stands in for a library.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "kobold_sp_plugin.cli", *given],
                    cwd=place,
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=lines,
                    stderr=log,
                )
        except BaseException:
            folder.cleanup()
            raise
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)
        atexit.register(self.cancel)
        self.status = {"state": "running", "name": name, "message": "Looking at the texts and loading the model ..."}
        self._tell(self.status)
        process = self._process

        def follow(sleep: Callable[[float], Any]) -> None:
            with folder, open(place / "lines", "rb") as lines:
                has_ended, rest = False, b""
                while not has_ended:
                    has_ended = process.poll() is not None  # before reading: so that its last words are read
                    *whole, rest = (rest + lines.read()).split(b"\n")
                    if whole:
                        for line in whole:
                            self._hear(json.loads(line.decode("utf-8")))
                        if self.is_running:  # how it ended is told when it has: then another may begin
                            self._tell(self.status)
                    if not has_ended:
                        sleep(_LOOK_SECONDS)
                self._end((place / "log").read_text(encoding="utf-8", errors="replace"))

        return follow

    def cancel(self) -> None:
        """Have the process save and end after its step; it goes on from there when it is started again."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self.status = {**self.status, "state": "stopping", "message": "Ending after this step ..."}
            self._tell(self.status)

    def _hear(self, line: Dict[str, Any]) -> None:
        event = line.pop("event")
        if event == "begun":
            told = f"{line['documents']} documents, {line['tokens']} tokens."
            if line["resumed_at"]:
                told = f"Going on from step {line['resumed_at']}. {told}"
            line = {"step": line["step"], "steps": line["steps"], "message": " ".join([told, *line["remarks"]])}
        elif event == "step" and line["held_out"] is None:
            del line["held_out"]  # what it was last stays shown
        elif event == "done":
            line = {"state": "done", "message": f"{line['sentence']} Report: {line['report']}"}
        elif event == "interrupted":
            told = f"Saved at step {line['step']}. Start it again with the same words to go on from there."
            line = {"state": "cancelled", "message": told}
        elif event == "error":
            line = {"state": "failed", "message": line["message"]}
        if self.status["state"] == "stopping" and event in ("begun", "step"):
            line.pop("message", None)
        self.status = {**self.status, **line}

    def _end(self, log: str) -> None:
        process, self._process = self._process, None
        atexit.unregister(self.cancel)
        if self.status["state"] == "stopping":  # before it could say anything, or without being asked first
            self.status = {**self.status, "state": "cancelled", "message": "Ended. What was trained is saved."}
        elif self.status["state"] == "running":
            last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")
            code = process.returncode if process is not None else 0
            told = f"The training ended by itself (exit status {code}). {last}".strip()
            if code in (-9, 137):
                told += " The system ended it, most likely for want of memory."
            self.status = {**self.status, "state": "failed", "message": told}
        self._tell(self.status)


def _environment() -> Dict[str, str]:
    """For the process: the host's, and where this package is, if it is not where every Python looks."""
    found = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    folder = Path(__file__).resolve().parents[3]
    if folder.name not in ("site-packages", "dist-packages"):  # which would go before the standard library
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return found
