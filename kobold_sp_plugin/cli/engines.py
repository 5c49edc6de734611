"""Which engine ``kobold-sp serve`` generates with: the options, and what is made of them."""

from pathlib import Path
from typing import Any, Callable, Optional, Tuple

import click

from ..errors import SoftPromptError
from .common import WrongUse, existing, line, load_engine

_URLS = {"llama-server": "http://127.0.0.1:8080", "vllm": "http://127.0.0.1:8000"}

_OPTIONS = [
    click.option(
        "--model",
        metavar="PATH",
        help="A folder, a name on the hub, or a GGUF file. [default: the demonstration model]",
    ),
    click.option(
        "--context", metavar="TOKENS", type=click.IntRange(16), help="Of a GGUF file. [default: 8192 at most]"
    ),
    click.option("--gpu-layers", default=-1, help="Of a GGUF file, how many go to the GPU. [default: all]"),
    click.option(
        "--engine",
        type=click.Choice(list(_URLS)),
        help="Where the model runs, if not here: a llama-server that has loaded --model, or a vLLM server.",
    ),
    click.option("--url", help=f"That server's address. [default: {', '.join(_URLS.values())}]"),
    click.option(
        "--engine-key",
        metavar="KEY",
        envvar="KOBOLD_SP_ENGINE_KEY",
        help="The vLLM server's. [env: KOBOLD_SP_ENGINE_KEY]",
    ),
    click.option(
        "--slots",
        metavar="FOLDER",
        type=click.Path(file_okay=False, path_type=Path),
        help="The llama-server's --slot-save-path.",
    ),
    click.option(
        "--cache-type", default="f16", show_default=True, type=click.Choice(["f16", "f32"]), help="The llama-server's."
    ),
]


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that :func:`chosen_engine` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check(model: Optional[str], engine: Optional[str], url: Optional[str], slots: Optional[Path], **_: Any) -> None:
    """Raise :class:`WrongUse` for options that do not go together, before anything is loaded."""
    if engine == "llama-server" and (model is None or slots is None):
        raise WrongUse(
            "--engine llama-server needs --model, the GGUF file that it has loaded, and --slots, the folder that it "
            "was started with as --slot-save-path."
        )
    if engine is None and url is not None:
        raise WrongUse("--url goes with --engine, which says what answers there.")
    if engine != "llama-server" and slots is not None:
        raise WrongUse("--slots goes with --engine llama-server.")


def chosen_engine(
    model: Optional[str],
    context: Optional[int],
    gpu_layers: int,
    engine: Optional[str],
    url: Optional[str],
    engine_key: Optional[str],
    slots: Optional[Path],
    cache_type: str,
) -> Tuple[Any, Any]:
    """The engine, and what the caller has to keep for it."""
    if engine is None:
        return load_engine(model, context=context, gpu_layers=gpu_layers)
    try:
        if engine == "vllm":
            from ..engines.vllm import VllmServer

            return VllmServer(url or _URLS[engine], model, engine_key), None
        from ..engines.llama_server import LlamaServerEngine

        return (
            LlamaServerEngine(url or _URLS[engine], str(model), existing(Path(str(slots))), cache_type=cache_type),
            None,
        )
    except (SoftPromptError, OSError) as error:
        raise WrongUse(line(str(error))) from error
