"""``kobold-sp serve``."""

import errno
import sys
from importlib import import_module
from pathlib import Path
from typing import Optional

import click

from .common import WrongUse, existing, line, load_engine, samples_folder

_DEFAULT_PORT = 5000


@click.command()
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
    folder = existing(softprompts or samples_folder())
    try:
        import_module("simple_websocket")  # Flask-SocketIO's transport; without it browsers could only poll
    except ImportError as error:
        raise WrongUse('`serve` needs a WebSocket library: pip install "kobold_sp_plugin[server]"') from error
    from ..server.app import Server
    from ..session import Session

    session = Session(folder)
    try:
        server = Server(session, host, port)  # binds first: a port that is taken shows before a model is loaded
    except (OSError, UnicodeError) as error:  # the latter: a host that can be no name
        session.close()
        reason = getattr(error, "strerror", None) or error
        is_port = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        advice = "Try another --port." if is_port else "Check --host."
        raise WrongUse(f"Cannot listen on {line(host)}:{port}: {reason}. {advice}") from error
    try:
        engine, _keep = load_engine(model)
        session.use(engine)
        session.watch()
        usable = sum(entry.verdict.usable for entry in session.entries())
        click.echo(f"{engine.name}: {usable} soft prompts to choose from in {line(str(folder))}")
        click.echo(f"Open {server.url} in a browser; Ctrl+C ends the server.")
        sys.stdout.flush()
        server.serve()
    finally:
        server.close()
        session.close()
