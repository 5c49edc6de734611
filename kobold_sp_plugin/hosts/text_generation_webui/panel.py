"""The Soft Prompts block of text-generation-webui's interface: what it shows, and what its controls do."""

import errno
import html
import importlib
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from ... import formats
from ...catalogue import EXTENSIONS
from ...errors import SoftPromptError, TooLarge

if TYPE_CHECKING:  # the two import each other
    from .attachment import Attachment

MAX_UPLOAD = 2**28
"""Bytes of an uploaded file: more than the largest soft prompt of the widest model."""
MOST_LISTED = 200
"""Files in the block's table; its menu has them all."""

_PLACING = threading.Lock()

POLL = "soft-prompts-poll"
CSS = f"""
#{POLL} {{ display: none; }}
.soft-prompts-light {{ display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; margin-right: 0.5em;
  background: var(--neutral-400); }}
.soft-prompts-light.on {{ background: #22a559; box-shadow: 0 0 5px #22a559; }}
.soft-prompts-light.waiting {{ background: #d9a514; }}
.soft-prompts-light.fault {{ background: #d64545; }}
.soft-prompts-notice {{ margin-top: 0.4em; }}
.soft-prompts-files {{ max-height: 16em; overflow: auto; margin-top: 0.6em; }}
.soft-prompts-files table {{ width: 100%; border-collapse: collapse; font-size: 0.9em; }}
.soft-prompts-files td, .soft-prompts-files th {{ text-align: left; vertical-align: top; padding: 0.15em 0.6em 0.15em 0;
  white-space: nowrap; }}
.soft-prompts-files td:nth-child(1), .soft-prompts-files td:nth-child(2) {{ white-space: normal; min-width: 8em;
  overflow-wrap: anywhere; }}
.soft-prompts-files td:nth-child(5) {{ white-space: normal; min-width: 12em; overflow-wrap: anywhere; }}
.soft-prompts-files tr.unfit {{ opacity: 0.65; }}
"""
JS = f"""
clearInterval(window.softPromptsPoll);
window.softPromptsPoll = setInterval(() => {{
  const button = document.getElementById("{POLL}");
  if (button && document.visibilityState === "visible") button.click();
}}, 1500);
"""
"""The release of Gradio that the host uses has no timer; a press of a hidden button is an event like any other."""


class Panel:
    """What the block shows and does, without Gradio: a view of the attachment, and one method per control."""

    def __init__(self, attachment: "Attachment"):
        self._attachment = attachment
        self.message = ""

    def choices(self) -> List[Tuple[str, str]]:
        """Label and file name, as text, of what may be selected, and of what is."""
        status = self._attachment.session.status()
        shown = [each for each in status["entries"] if each["usable"] or each["filename"] in status["selection"]]
        names = [each["name"] for each in shown]
        return [
            (
                _text(
                    each["name"]
                    + (f", {each['filename']}" if names.count(each["name"]) > 1 else "")
                    + (f" ({_tokens(each['n_tokens'])})" if each["n_tokens"] is not None else "")
                ),
                _text(each["filename"]),
            )
            for each in shown
        ]

    @property
    def selection(self) -> List[str]:
        """File names, as text, of what is selected, in order."""
        return [_text(name) for name in self._attachment.session.selection]

    def page(self, message: str = "") -> str:
        """The indicator, what is to be known, and the files with their verdicts, as HTML; all text is escaped."""
        status = self._attachment.session.status()
        by_name = {each["filename"]: each for each in status["entries"]}
        names = [by_name.get(name, {"name": name})["name"] for name in status["selection"]]
        takes = self._attachment.session.takes_softprompts
        if names and takes:
            effect = "" if status["effect"] is None else f", effect {status['effect']:.2f} of 1"
            light, text = "on", f"In use: {' + '.join(names)} ({_tokens(status['n_tokens'])}{effect})"
        elif names:
            light, text = "waiting", f"Waiting for a model: {' + '.join(names)} ({_tokens(status['n_tokens'])})"
        else:
            light, text = "", "No soft prompt in use"
        if status["model"]:
            text += f" · model: {status['model']}"
        notices = [each for each in (message, *self._attachment.notices) if each]
        lines = [f'<div><span class="soft-prompts-light {light}"></span>{html.escape(text)}</div>']
        lines += [f'<div class="soft-prompts-notice">{html.escape(each)}</div>' for each in notices]
        lines.append(_table(status["entries"]))
        return _text("".join(lines))

    def load(self, filenames: Optional[Sequence[str]]) -> str:
        """Select these files, in order, by their names as text; what is to be said of it."""
        names = [filenames] if isinstance(filenames, str) else list(filenames or [])
        known = {_text(each["filename"]): each["filename"] for each in self._attachment.session.status()["entries"]}
        try:
            self._attachment.select([known.get(name, name) for name in names])
        except SoftPromptError as error:
            return f"Not selected: {error}"
        return ""

    def refresh(self) -> str:
        """Read the folder again."""
        self._attachment.sync()
        self._attachment.session.refresh()
        return ""

    def upload(self, file: Any) -> str:
        """Put an uploaded file into the folder, under a name of ours, if it is a soft prompt; what is to be said."""
        if file is None:
            return ""
        path = Path(str(getattr(file, "name", file)))
        try:
            name = store(path, self._attachment.folder)
        except SoftPromptError as error:
            return f"{path.name[:100]} was not taken: {error}"
        except OSError as error:
            return f"{path.name[:100]} was not taken: {error.strerror or error}"
        self._attachment.session.refresh()
        return f"{name} is in the folder now."


def store(path: Path, folder: Path) -> str:
    """Copy a soft prompt into ``folder`` in one step and return its name there; never over another file.

    What is checked is the copy, whole. Raises a :class:`~kobold_sp_plugin.errors.FormatError` or :class:`OSError`.
    """
    size = path.stat().st_size
    if size > MAX_UPLOAD:
        raise TooLarge(f"a file of {size} bytes", f"at most {MAX_UPLOAD}")
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as copy, open(path, "rb") as original:
            shutil.copyfileobj(original, copy)
        try:
            formats.load(temporary)
        except SoftPromptError as error:
            vars(error)["path"] = None  # its name tells nobody anything
            raise
        os.chmod(temporary, 0o644)
        return _placed(temporary, path.name, folder)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _placed(temporary: str, asked: str, folder: Path) -> str:
    stem, extension = os.path.splitext(asked)
    stem = re.sub(r"[^\w\- ]+", "_", stem).strip("_ ")[:80] or "soft prompt"
    extension = extension.lower() if extension.lower() in EXTENSIONS else ".zip"
    for number in range(1, 1000):
        name = f"{stem}{extension}" if number == 1 else f"{stem} {number}{extension}"
        with _PLACING:
            if not os.path.lexists(folder / name):
                os.replace(temporary, folder / name)
                return name
    raise FileExistsError(errno.EEXIST, f"the folder has too many files named {stem}")


def build(attachment: Optional["Attachment"], fault: str) -> None:
    """Build the block inside the host's interface; one line where the extension stays out of it."""
    gr: Any = importlib.import_module("gradio")
    with gr.Accordion("Soft prompts", open=True):
        if attachment is None:
            text = html.escape(f"Soft prompts are not available: {fault or 'the extension is not set up'}")
            gr.HTML(f'<div><span class="soft-prompts-light fault"></span>{text}</div>')
            return
        _build(gr, attachment, Panel(attachment))


def _build(gr: Any, attachment: "Attachment", panel: Panel) -> None:
    has_labels = int(gr.__version__.split(".")[0]) >= 4

    def menu() -> Dict[str, Any]:
        choices = panel.choices()
        return {"choices": choices if has_labels else [name for _, name in choices]}

    mine = not attachment.shared.args.multi_user if hasattr(attachment.shared.args, "multi_user") else True
    with gr.Row():
        files = gr.Dropdown(
            **menu(),
            value=panel.selection,
            multiselect=True,
            label="Soft prompts, read in this order",
            elem_id="soft-prompts-menu",
            elem_classes=["slim-dropdown"],
            interactive=mine,
        )
        small: Dict[str, Any] = {"elem_classes": ["refresh-button"], "interactive": mine}
        load = gr.Button("Load", elem_id="soft-prompts-load", **small)
        none = gr.Button("None", elem_id="soft-prompts-none", **small)
        icon = {**small, "elem_classes": ["refresh-button", "refresh-icon-btn"]}  # the host draws its own over it
        refresh = gr.Button("🔄", elem_id="soft-prompts-refresh", **icon)
        upload = gr.UploadButton("Upload", file_types=list(EXTENSIONS), elem_id="soft-prompts-upload", **small)
    page = gr.HTML(panel.page(), elem_id="soft-prompts-page")
    poll = gr.Button("Poll", elem_id=POLL)
    seen = gr.State((-1, []))

    def shown(message: str = "", picked: Any = None) -> List[Any]:
        """Everything anew; ``picked``: what the menu keeps, though it is not what is selected."""
        revision, selection = attachment.revision, panel.selection
        value = selection if picked is None else picked
        return [gr.update(**menu(), value=value), gr.update(value=panel.page(message)), (revision, selection)]

    def polled(known: Any) -> List[Any]:
        attachment.sync()
        if list(known) == [attachment.revision, panel.selection]:
            return [gr.update(), gr.update(), known]
        menu_only = [gr.update(**menu()), *shown()[1:]]
        return menu_only if known[1] == panel.selection else shown()

    def loaded(filenames: Any) -> List[Any]:
        message = panel.load(filenames)
        return shown(message, filenames if message else None)

    outputs: Dict[str, Any] = {"outputs": [files, page, seen], "show_progress": False}
    load.click(loaded, files, **outputs)
    none.click(lambda: shown(panel.load([])), None, **outputs)
    refresh.click(lambda: shown(panel.refresh()), None, **outputs)
    upload.upload(lambda file, picked: shown(panel.upload(file), picked), [upload, files], **outputs)
    poll.click(polled, seen, queue=False, **outputs)
    interface = attachment.shared.gradio.get("interface")
    if interface is not None:
        interface.load(lambda: shown(panel.refresh()), None, **outputs)


def _text(text: str) -> str:
    """``text`` as a page can hold it: a file's name need not be UTF-8, and Gradio's JSON has to be."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _tokens(n_tokens: Optional[int]) -> str:
    return "1 token" if n_tokens == 1 else f"{n_tokens} tokens"


def _table(entries: Sequence[Dict[str, Any]]) -> str:
    if not entries:
        return '<div class="soft-prompts-notice">The folder of soft prompts is empty: drop files into it.</div>'
    rows = []
    for each in entries[:MOST_LISTED]:
        tokens = "" if each["n_tokens"] is None else str(each["n_tokens"])
        cells = (each["name"], each["filename"], tokens, each["verdict"], each["reason"])
        columns = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr class="{"fit" if each["usable"] else "unfit"}">{columns}</tr>')
    if len(entries) > MOST_LISTED:
        rows.append(f'<tr><td colspan="5">and {len(entries) - MOST_LISTED} more</td></tr>')
    head = "<tr><th>Name</th><th>File</th><th>Tokens</th><th>Verdict</th><th>Reason</th></tr>"
    return f'<div class="soft-prompts-files"><table>{head}{"".join(rows)}</table></div>'
