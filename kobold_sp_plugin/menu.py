"""The Soft Prompts menu: its socket events in one table, and what each does to a session.

A host (KoboldAI, or the embedded server) hands incoming events to a :class:`Menu` and gives it a way to
emit. No web framework is imported here.

Text out of files is sent as it is, except where KoboldAI's own pages insert it as HTML: there it is
escaped (the author and the file name of the old page's list, both names in its status line, and errors).
"""

import html
import threading
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import PurePath
from typing import Any, Callable, Dict, List, Optional, Tuple

from .compatibility import Verdict
from .errors import SoftPromptError
from .session import Session

OLD_UI, UI2 = "UI_1", "UI_2"
"""KoboldAI's rooms: the clients of its old page and of its new one."""

RELAY_SECONDS = 0.05
"""How often the relay looks whether the session changed."""

Emit = Callable[[str, Any, Optional[str]], None]
"""``emit(event, payload, to)``: to one client, to one of KoboldAI's rooms, or to everyone (None)."""


@dataclass(frozen=True)
class Event:
    """One socket event, as the README tells it."""

    name: str
    direction: str
    """"in": from a client. "out": to clients."""
    payload: str
    sentence: str
    where: str
    """Whose word it is: "own", "KoboldAI" (both of its pages), "KoboldAI, old page" or "KoboldAI, UI2"."""


EVENTS: Tuple[Event, ...] = (
    Event(
        "softprompts",
        "out",
        '`{"model", "context", "selection": [filename], "n_tokens", "effect", "notice", "entries": [{"filename", '
        '"name", "author", "description", "supported", "n_tokens", "width", "verdict", "reason", "usable"}]}`',
        "The whole state of the menu: sent when a client connects and whenever anything in it changes.",
        "own",
    ),
    Event(
        "softprompt_error",
        "out",
        '`{"filename", "message"}`',
        "Why a choice could not be carried out, to the client that made it; the selection stays what it was.",
        "own",
    ),
    Event(
        "generate",
        "in",
        '`{"id", "prompt", "max_length", "temperature", ...}`: the fields of `POST generate`, and an id of the '
        "client's own",
        "Asks for text (embedded host); the soft prompts are those selected at this moment, unless `soft_prompt` "
        "names others.",
        "own",
    ),
    Event(
        "stop_generation",
        "in",
        '`{"id"}`',
        "Ends that generation within a token, or takes it out of the queue (embedded host).",
        "own",
    ),
    Event(
        "generation",
        "out",
        '`{"id", "state", "text", "position", "error"}`, `state` one of "queued", "started", "text", "done", '
        '"stopped", "error"',
        "What became of a `generate`, to the client that asked: its place in the queue, its text piece by piece, its "
        "end (embedded host).",
        "own",
    ),
    Event(
        "load_softprompt",
        "in",
        'filename, or `""` for none; a list of filenames (own extension) for several in order',
        "Selects a soft prompt.",
        "KoboldAI, UI2",
    ),
    Event(
        "sp_list_refresh",
        "in",
        '`""`',
        "Reads the folder again; the client is sent the list whether or not it changed.",
        "KoboldAI, UI2",
    ),
    Event(
        "load_softprompt_list",
        "in",
        '`""`',
        "Asks for the usable soft prompts as a popup.",
        "KoboldAI, UI2",
    ),
    Event(
        "load_popup",
        "out",
        '`{"popup_title", "call_back": "load_softprompt", ...}`',
        "Opens the popup that `load_softprompt_list` asked for.",
        "KoboldAI, UI2",
    ),
    Event(
        "popup_items",
        "out",
        '`{"items": [[false, filename, label, true, [name, description]]], "column_names", "show_filename", '
        '"column_widths"}`',
        "Its rows; where KoboldAI sends absolute paths, these are the file names that `load_softprompt` takes.",
        "KoboldAI, UI2",
    ),
    Event(
        "var_changed",
        "out",
        '`{"classname": "system", "name", "old_value", "value", "transmit_time"}`, `name` one of `spfilename`, '
        "`spmeta`, `spname`, `sp_length`, `splist` (`[[filename, [name, description]]]`), `allowsp`",
        "One variable of the menu; all of them when a client connects. Of several selected, the first stands for all, "
        "and `sp_length` counts all. In `splist`, the usable ones come first; the others' names end with the reason.",
        "KoboldAI, UI2",
    ),
    Event(
        "error",
        "out",
        "text, escaped for HTML",
        "Why a choice could not be carried out, to the client that made it.",
        "KoboldAI, UI2",
    ),
    Event(
        "message",
        "in",
        '`{"cmd": "splistrequest", "data": ""}`',
        "Asks for the usable soft prompts.",
        "KoboldAI, old page",
    ),
    Event(
        "message",
        "in",
        '`{"cmd": "spselect", "data": filename or ""}`',
        "Marks a row of the list, or none of them.",
        "KoboldAI, old page",
    ),
    Event(
        "message",
        "in",
        '`{"cmd": "sprequest", "data": ""}`',
        "Selects what this client marked last.",
        "KoboldAI, old page",
    ),
    Event(
        "from_server",
        "out",
        '`{"cmd": "allowsp", "data": true or false}`',
        "Whether the menu's button shows: when a client connects, and when a model is loaded or let go. It does for "
        "a backend that takes no soft prompts too: the list says why.",
        "KoboldAI, old page",
    ),
    Event(
        "from_server",
        "out",
        '`{"cmd": "buildsp", "data": [{"name", "author", "supported", "description", "filename", "n_tokens"}]}`',
        "The soft prompts, to the client that asked; behind the usable ones the others, each with the reason as its "
        "description.",
        "KoboldAI, old page",
    ),
    Event(
        "from_server",
        "out",
        '`{"cmd": "spstatitems", "data": {filename: {"name", "author", "supported", "description", "n_tokens"}}}`, '
        "or `{}` for none",
        "What is selected, for the status line and its indicator.",
        "KoboldAI, old page",
    ),
    Event(
        "from_server",
        "out",
        '`{"cmd": "warnmsg", "data": text}`, escaped for HTML',
        "What happened to the selection by itself: a file that was deleted or replaced, a model that cannot use it.",
        "KoboldAI, old page",
    ),
    Event(
        "from_server",
        "out",
        '`{"cmd": "errmsg", "data": text}`, escaped for HTML',
        "Why a choice could not be carried out, to the client that made it.",
        "KoboldAI, old page",
    ),
)


def events_table() -> str:
    """The events as the README's table."""
    lines = ["| event | | payload | what it does | whose |", "|---|---|---|---|---|"]
    lines += [
        f"| `{event.name}` | {event.direction} | {event.payload.replace('|', chr(92) + '|')} | {event.sentence} "
        f"| {event.where} |"
        for event in EVENTS
    ]
    return "\n".join(lines) + "\n"


class Menu:
    """The menu of one session, for all clients of a host.

    The host calls what :attr:`handlers` gives for each incoming event, :meth:`connected` and
    :meth:`disconnected`, and runs :meth:`relay` in a background task of its server. Changes of the session
    reach the clients from the relay alone: the folder's watcher has a thread of its own, and under
    eventlet an emit from there leaves the server hanging.
    """

    def __init__(self, session: Session, emit: Emit):
        self.session = session
        self._emit = emit
        self._marked: Dict[str, str] = {}
        """What each client of the old page marked last."""
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._sent = _View(session)
        self._unsubscribe = session.subscribe(lambda status: self._changed.set())
        self.handlers: Dict[str, Callable[[str, Any], None]] = {
            "load_softprompt": self.load_softprompt,
            "sp_list_refresh": self.sp_list_refresh,
            "load_softprompt_list": self.load_softprompt_list,
            "message": self.message,
        }
        """What to call with the client and the payload, by the incoming event's name."""

    def connected(self, client: str, rooms: Tuple[str, ...] = (OLD_UI, UI2)) -> None:
        """Send a new client the state in its own words; ``rooms``: which of KoboldAI's pages it may be."""
        view = _View(self.session)
        self._emit("softprompts", view.status, client)
        if OLD_UI in rooms:
            self._emit("from_server", {"cmd": "allowsp", "data": view.has_model}, client)
            self._emit("from_server", {"cmd": "spstatitems", "data": view.status_line}, client)
        if UI2 in rooms:
            for name, value in view.variables.items():
                self._emit("var_changed", _variable(name, None, value), client)

    def disconnected(self, client: str) -> None:
        """Forget what the client marked."""
        self._marked.pop(client, None)

    def load_softprompt(self, client: str, payload: Any) -> None:
        """Select the file, or the list of files in order; "" is none."""
        error = self._select(client, payload)
        if error is not None:
            self._emit("error", html.escape(error), client)
            filename = _View(self.session).variables["spfilename"]  # its list shows what it asked for
            self._emit("var_changed", _variable("spfilename", None, filename), client)

    def sp_list_refresh(self, client: str, payload: Any = "") -> None:
        """Read the folder again and send the client the list."""
        self.session.refresh()
        view = _View(self.session)
        self._emit("softprompts", view.status, client)
        for name in ("splist", "spfilename"):  # the page builds its list anew, and then marks nothing in it
            self._emit("var_changed", _variable(name, None, view.variables[name]), client)

    def load_softprompt_list(self, client: str, payload: Any = "") -> None:
        """Send the client the popup and its rows."""
        self.session.refresh()
        view = _View(self.session)
        if not view.allowed:
            self._emit("error", "Soft prompts are not supported by the current model or backend.", client)
            return
        can_do = dict.fromkeys(("renameable", "deleteable", "editable", "upload"), False)
        title = {"popup_title": "Select a soft prompt", "call_back": "load_softprompt"}
        self._emit("load_popup", {**title, **can_do, "rename_return_emit_name": "popup_rename"}, client)
        items = [
            [False, entry["filename"], PurePath(entry["filename"]).stem, True, [entry["name"], entry["description"]]]
            for entry in view.usable
        ]
        columns = {"column_names": ["Soft prompt", "Description"], "column_widths": ["150px", "auto"]}
        self._emit("popup_items", {"items": items, "show_filename": False, **columns}, client)

    def message(self, client: str, payload: Any) -> None:
        """The old page's three commands; any other command is the host's."""
        command = payload.get("cmd") if isinstance(payload, dict) else None
        if command == "splistrequest":
            self.session.refresh()
            self._emit("from_server", {"cmd": "buildsp", "data": _View(self.session).old_list()}, client)
        elif command == "spselect":
            self._marked[client] = payload.get("data")
        elif command == "sprequest" and client in self._marked:
            error = self._select(client, self._marked[client])
            if error is not None:
                self._emit("from_server", {"cmd": "errmsg", "data": html.escape(error)}, client)

    def status_line(self) -> Dict[str, Any]:
        """What the old page's status line shows, as it takes it: filename → metadata, escaped for HTML."""
        return _View(self.session).status_line

    def variables(self) -> Dict[str, Any]:
        """KoboldAI's variables of the menu, as ``var_changed`` tells them."""
        return _View(self.session).variables

    def relay(self, sleep: Callable[[float], Any]) -> None:
        """Send clients what changes, until :meth:`close`; ``sleep`` is the server's own."""
        while not self._closed.is_set():
            if self._changed.is_set():
                self._changed.clear()
                self._send_changes()
            else:
                sleep(RELAY_SECONDS)

    def close(self) -> None:
        """End the relay."""
        self._unsubscribe()
        self._closed.set()

    def _send_changes(self) -> None:
        before, self._sent = self._sent, _View(self.session)
        now = self._sent
        if now.status != before.status:
            self._emit("softprompts", now.status, None)
        if now.has_model != before.has_model:
            self._emit("from_server", {"cmd": "allowsp", "data": now.has_model}, OLD_UI)
        if now.status_line != before.status_line:
            self._emit("from_server", {"cmd": "spstatitems", "data": now.status_line}, OLD_UI)
        notice = now.status["notice"]
        if notice and notice != before.status["notice"]:
            self._emit("from_server", {"cmd": "warnmsg", "data": html.escape(notice)}, OLD_UI)
        old_values = before.variables
        has_new_list = now.variables["splist"] != old_values["splist"]
        for name, value in now.variables.items():
            if value != old_values[name] or (name == "spfilename" and has_new_list):  # its page marks nothing then
                self._emit("var_changed", _variable(name, old_values[name], value), UI2)

    def _select(self, client: str, filenames: Any) -> Optional[str]:
        """Select; what went wrong is sent as our own event, and returned for the page's own."""
        try:
            if not isinstance(filenames, (str, list)):
                raise SoftPromptError("Expected a file name, or a list of file names.")
            self.session.select(filenames)
            return None
        except SoftPromptError as error:
            message = str(error)
        self._emit("softprompt_error", {"filename": filenames, "message": message}, client)
        return message


class _View:
    """One moment of a session in the words of each page."""

    def __init__(self, session: Session):
        self.status = session.status()
        self.has_model = session.engine is not None
        self.allowed = session.takes_softprompts
        self.usable = [entry for entry in self.status["entries"] if entry["usable"]]

    def ordered(self) -> List[Dict[str, Any]]:
        """All entries, the usable ones first."""
        return sorted(self.status["entries"], key=lambda entry: not entry["usable"])

    def old_list(self) -> List[Dict[str, Any]]:
        return [
            {
                **_meta(entry),
                "filename": html.escape(entry["filename"]),
                "author": html.escape(entry["author"]),
                "description": described(entry),
            }
            for entry in self.ordered()
        ]

    @cached_property
    def status_line(self) -> Dict[str, Any]:
        return {
            html.escape(entry["filename"]): {**_meta(entry), "name": html.escape(entry["name"])}
            for entry in self._selected()
        }

    @cached_property
    def variables(self) -> Dict[str, Any]:
        selected = self._selected()
        n_tokens = self.status["n_tokens"]
        return {
            "allowsp": self.allowed,
            "splist": [[entry["filename"], [labelled(entry), described(entry)]] for entry in self.ordered()],
            "spfilename": selected[0]["filename"] if selected else "",
            "spname": selected[0]["name"] if selected else "Not in Use",
            "spmeta": {**_meta(selected[0]), "n_tokens": n_tokens} if selected else None,
            "sp_length": n_tokens,
        }

    def _selected(self) -> List[Dict[str, Any]]:
        by_name = {entry["filename"]: entry for entry in self.status["entries"]}
        return [by_name[filename] for filename in self.status["selection"] if filename in by_name]


def labelled(entry: Dict[str, Any]) -> str:
    """The name that a list shows which has place for nothing else: with the reason, where it cannot be used."""
    return str(entry["name"]) if entry["usable"] else f"{entry['name']} ({entry['reason']})"


def described(entry: Dict[str, Any]) -> str:
    """The description that a menu shows which has no place for a verdict: why not, or what to mind, first."""
    if not entry["usable"]:
        return f"Cannot be used: {entry['reason']}"
    if entry["verdict"] == str(Verdict.DIFFERENT):
        return f"Mind: {entry['reason']}. {entry['description']}".strip()
    return str(entry["description"])


def _meta(entry: Dict[str, Any]) -> Dict[str, Any]:
    return {key: entry[key] for key in ("name", "author", "supported", "description", "n_tokens")}


def _variable(name: str, old_value: Any, value: Any) -> Dict[str, Any]:
    return {
        "classname": "system",
        "name": name,
        "old_value": old_value,
        "value": value,
        "transmit_time": str(datetime.now()),
    }
