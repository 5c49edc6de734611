"""``kobold-sp serve``."""

import errno
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, Tuple
from urllib.parse import quote, urlsplit

import click

from .common import WrongUse, existing, line, samples_folder
from .engines import check, chosen_engine, engine_options

_DEFAULT_PORT = 5000
_LITE = "https://lite.koboldai.net"
"""KoboldAI Lite, as its makers host it."""


@click.command()
@engine_options
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
@click.option(
    "--cors",
    "origins",
    metavar="ORIGIN",
    multiple=True,
    help=f"A web site whose pages may use the server, such as {_LITE}; * is any. Can be given several times.",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="KOBOLD_SP_API_KEY",
    help="Answer only who has this key. [env: KOBOLD_SP_API_KEY]",
)
def serve(
    softprompts: Optional[Path],
    host: str,
    port: int,
    origins: Tuple[str, ...],
    api_key: Optional[str],
    **engine: Any,
) -> None:
    """Serve a page with the Soft Prompts menu, and the APIs of KoboldAI, KoboldCpp and OpenAI.

    \b
    Example:
      kobold-sp serve --model ./my-model --softprompts ./softprompts --port 5001
      kobold-sp serve --model model.gguf --context 4096
      kobold-sp serve --engine llama-server --url http://127.0.0.1:8080 --model model.gguf --slots ./slots
      kobold-sp serve --engine vllm --url http://127.0.0.1:8000 --model ./its-model
    """
    for origin in origins:
        if origin != "*" and not (urlsplit(origin).scheme in ("http", "https") and urlsplit(origin).netloc):
            raise WrongUse(f"--cors takes an origin such as {_LITE}, or *; not {line(origin)}.")
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise WrongUse("--api-key takes letters, digits and signs of ASCII, without spaces.")
    check(**engine)
    folder = existing(softprompts or samples_folder())
    try:
        import_module("simple_websocket")  # Flask-SocketIO's transport; without it browsers could only poll
    except ImportError as error:
        raise WrongUse('`serve` needs a WebSocket library: pip install "kobold_sp_plugin[server]"') from error
    from ..server.app import Server
    from ..session import Session

    session = Session(folder)
    try:
        server = Server(
            session, host, port, origins, api_key
        )  # binds first: a port that is taken shows before a model is loaded
    except (OSError, UnicodeError) as error:  # the latter: a host that can be no name
        session.close()
        reason = getattr(error, "strerror", None) or error
        is_port = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        advice = "Try another --port." if is_port else "Check --host."
        raise WrongUse(f"Cannot listen on {line(host)}:{port}: {reason}. {advice}") from error
    before = signal.signal(signal.SIGTERM, _end)
    try:
        used, _keep = chosen_engine(**engine)
        session.use(used)
        session.watch()
        usable = sum(entry.verdict.usable for entry in session.entries())
        click.echo(f"{used.name}: {usable} soft prompts to choose from in {line(str(folder))}")
        page = server.url if api_key is None else f"{server.url}?key={quote(api_key, safe='')}"
        click.echo(f"Open {page} in a browser; Ctrl+C ends the server.")
        click.echo(f"SillyTavern: KoboldAI Classic, or Text Completion with KoboldCpp, at {server.url}")
        if not {"*", _LITE} & {origin.rstrip("/") for origin in origins}:
            click.echo(f"KoboldAI Lite: start with --cors {_LITE}")
        else:
            click.echo(f"KoboldAI Lite: {_LITE}/?local=1&port={server.port}")
        sys.stdout.flush()
        server.serve()
    except _Ended:
        click.echo("Ended.")
    finally:
        server.close()
        session.close()
        signal.signal(signal.SIGTERM, before)


class _Ended(BaseException):
    """The process was told to end."""


def _end(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: closing goes on to its end
    raise _Ended
