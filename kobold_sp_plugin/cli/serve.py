"""``kobold-sp serve``."""

import errno
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Optional

import click

from .common import WrongUse, existing, line, load_engine, samples_folder

_DEFAULT_PORT = 5000


@click.command()
@click.option(
    "--model",
    metavar="PATH",
    help="A folder, a name on the hub, or a GGUF file. [default: the demonstration model]",
)
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
@click.option("--context", metavar="TOKENS", type=click.IntRange(16), help="Of a GGUF file. [default: 8192 at most]")
@click.option("--gpu-layers", default=-1, help="Of a GGUF file, how many go to the GPU. [default: all]")
@click.option(
    "--engine",
    type=click.Choice(["llama-server"]),
    help="Where the model runs, if not here: a llama-server that has loaded --model.",
)
@click.option("--url", help="The llama-server's address. [default: http://127.0.0.1:8080]")
@click.option(
    "--slots",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="The llama-server's --slot-save-path.",
)
@click.option(
    "--cache-type", default="f16", show_default=True, type=click.Choice(["f16", "f32"]), help="The llama-server's."
)
def serve(
    model: Optional[str],
    softprompts: Optional[Path],
    host: str,
    port: int,
    context: Optional[int],
    gpu_layers: int,
    engine: Optional[str],
    url: Optional[str],
    slots: Optional[Path],
    cache_type: str,
) -> None:
    """Serve a page with the Soft Prompts menu, and KoboldAI's HTTP API.

    \b
    Example:
      kobold-sp serve --model ./my-model --softprompts ./softprompts --port 5001
      kobold-sp serve --model model.gguf --context 4096
      kobold-sp serve --engine llama-server --url http://127.0.0.1:8080 --model model.gguf --slots ./slots
    """
    if engine is not None and (model is None or slots is None):
        raise WrongUse(
            "--engine llama-server needs --model, the GGUF file that it has loaded, and --slots, the folder that it "
            "was started with as --slot-save-path."
        )
    if engine is None and (url is not None or slots is not None):
        raise WrongUse("--url and --slots go with --engine llama-server.")
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
        if engine is None:
            used, _keep = load_engine(model, context=context, gpu_layers=gpu_layers)
        else:
            used = _llama_server(url or "http://127.0.0.1:8080", str(model), Path(str(slots)), cache_type)
        session.use(used)
        session.watch()
        usable = sum(entry.verdict.usable for entry in session.entries())
        click.echo(f"{used.name}: {usable} soft prompts to choose from in {line(str(folder))}")
        click.echo(f"Open {server.url} in a browser; Ctrl+C ends the server.")
        sys.stdout.flush()
        server.serve()
    finally:
        server.close()
        session.close()


def _llama_server(url: str, model: str, slots: Path, cache_type: str) -> Any:
    from ..engines.llama_server import LlamaServerEngine
    from ..errors import SoftPromptError

    try:
        return LlamaServerEngine(url, model, existing(slots), cache_type=cache_type)
    except (SoftPromptError, OSError) as error:
        raise WrongUse(line(str(error))) from error
