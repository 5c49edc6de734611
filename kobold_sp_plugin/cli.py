"""The command line: ``kobold-sp``. Each command is a thin call into a room below.

Exit status: 0, 1 (the answer is no) or 2 (wrong use). Heavy libraries are imported by the command that
needs them, so that ``--help`` is quick.
"""

import errno
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, Tuple

import click

from . import __version__

_DEFAULT_PORT = 5000


class WrongUse(click.ClickException):
    """What was asked for cannot be done as it was asked."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kobold-sp")
def main() -> None:
    """Soft prompts for local language models.

    \b
    Example:
      kobold-sp serve
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a name may hold what the terminal's encoding has not


@main.command()
@click.option("--model", metavar="PATH", help="A folder, or a name on the hub. [default: the demonstration model]")
@click.option(
    "--softprompts",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder of soft prompts. [default: ./softprompts, else the samples]",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen on; with another one, everybody who can reach it can use the server.",
)
@click.option(
    "--port", default=_DEFAULT_PORT, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one."
)
def serve(model: Optional[str], softprompts: Optional[Path], host: str, port: int) -> None:
    """Serve a page with the Soft Prompts menu, and KoboldAI's HTTP API.

    \b
    Example:
      kobold-sp serve --model ./my-model --softprompts ./softprompts --port 5001
    """
    folder = _existing(softprompts or samples_folder())
    try:
        import_module("simple_websocket")  # Flask-SocketIO's transport; without it browsers could only poll
    except ImportError as error:
        raise WrongUse('`serve` needs a WebSocket library: pip install "kobold_sp_plugin[server]"') from error
    from .server.app import Server
    from .session import Session

    session = Session(folder)
    try:
        server = Server(session, host, port)  # binds first: a port that is taken shows before a model is loaded
    except (OSError, UnicodeError) as error:  # the latter: a host that can be no name
        session.close()
        reason = getattr(error, "strerror", None) or error
        is_port = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        advice = "Try another --port." if is_port else "Check --host."
        raise WrongUse(f"Cannot listen on {_line(host)}:{port}: {reason}. {advice}") from error
    try:
        engine, _keep = _load(model)
        session.use(engine)
        session.watch()
        usable = sum(entry.verdict.usable for entry in session.entries())
        click.echo(f"{engine.name}: {usable} soft prompts to choose from in {_line(str(folder))}")
        click.echo(f"Open {server.url} in a browser; Ctrl+C ends the server.")
        sys.stdout.flush()
        server.serve()
    finally:
        server.close()
        session.close()


@main.command("list")
@click.argument("folder", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--model", metavar="PATH", help="What to judge them for; it is loaded. [default: the demonstration model]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(folder: Optional[Path], model: Optional[str], as_json: bool) -> None:
    """List the soft prompts in FOLDER, each with its verdict for a model and the reason.

    FOLDER is ./softprompts unless given, or the samples where there is none.

    \b
    Example:
      kobold-sp list ./softprompts --model ./my-model
    """
    from .catalogue import Catalogue
    from .session import entry_as_json

    folder = _existing(folder or samples_folder())
    engine, _keep = _load(model, quiet=True)
    facts = engine.facts()
    entries = Catalogue(folder).entries(facts)
    if as_json:
        listed = [{**entry_as_json(entry), "dtype": entry.dtype} for entry in entries]
        about = {"folder": str(folder), "model": facts.name, "width": facts.width, "context": facts.context}
        click.echo(json.dumps({**about, "entries": listed}, indent=2))
        return
    click.echo(f"{len(entries)} soft prompts in {_line(str(folder))}, judged for {facts.name}")
    for entry in entries:
        size = "" if entry.n_tokens is None else f" ({entry.n_tokens} tokens of width {entry.width})"
        author = f", by {entry.author}" if entry.author else ""
        click.echo(f"\n{_line(entry.filename)}: {entry.name}{author}{size}")
        click.echo(f"  {entry.verdict}: {entry.reason}")


def samples_folder() -> Path:
    """The folder of soft prompts where none is named: ``./softprompts`` if there is one, else the samples."""
    package = Path(__file__).resolve().parent
    here = Path("softprompts")
    return next((each for each in (here, package / "softprompts") if each.is_dir()), package.parent / "softprompts")


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise WrongUse(f"There is no folder {_line(str(folder))}.")
    return folder


def _load(path: Optional[str], quiet: bool = False) -> Tuple[Any, Any]:
    """An engine with the model at ``path`` or the demonstration model, and the model, which the caller keeps.

    ``quiet``: without the progress bars that transformers writes to the terminal.
    """
    from transformers.utils.logging import disable_progress_bar

    from .demonstration import MODEL
    from .engines.transformers import TransformersEngine, load_transformers
    from .errors import ModelError

    if quiet or path is None:
        disable_progress_bar()
    try:
        model, tokenizer, name = load_transformers(path or MODEL)
        return TransformersEngine(model, tokenizer, name if path else "demonstration"), model
    except ModelError as error:
        raise WrongUse(str(error)) from error


def _line(text: str) -> str:
    """``text`` as a terminal may be given it: file names can hold control characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


if __name__ == "__main__":
    main()
