"""``kobold-sp export``."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, Optional

import click

from .common import WrongUse, existing, line

_KINDS = ("lora", "gguf", "slot")


@click.command()
@click.argument("softprompt", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL.gguf", required=True, type=click.Path(path_type=Path), help="A GGUF file.")
@click.option("--to", required=True, type=click.Choice(_KINDS), help="What to make of it.")
@click.option("--output", metavar="PATH", type=click.Path(path_type=Path), help="[default: beside the soft prompt]")
@click.option(
    "--cache-type",
    default="f16",
    show_default=True,
    type=click.Choice(["f16", "f32"]),
    help="For slots: as the server's --cache-type-k and --cache-type-v.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(
    softprompt: Path,
    model: Path,
    to: str,
    output: Optional[Path],
    cache_type: str,
    force: bool,
    as_json: bool,
) -> None:
    """Make of SOFTPROMPT what engines for GGUF files read, none of which has to be changed.

    lora: a small adapter, for a model with reserved tokens and a head of its own. gguf: a copy of the model with the
    soft prompt as tokens more, for every program. slot: a saved state for llama-server.

    \b
    Example:
      kobold-sp export noir.zip --model model.gguf --to lora --output noir-lora.gguf
    """
    from ..errors import FormatError, SoftPromptError
    from ..export import lora, model_copy
    from ..export.common import slug
    from ..softprompt import SoftPrompt

    for path in (softprompt, model):
        if not path.exists():
            raise WrongUse(f"There is no {line(str(path))}.")
    try:
        loaded = SoftPrompt.load(softprompt)
    except (FormatError, OSError) as error:
        _refused(softprompt, line(str(error)), as_json)
    names = {
        "lora": f"{softprompt.stem}.lora.gguf",
        "gguf": f"{model.stem}.{slug(loaded)}.gguf",
        "slot": f"{softprompt.stem}.slot",
    }
    out = output or softprompt.parent / names[to]
    if os.path.lexists(out) and not force:
        raise WrongUse(f"{line(str(out))} is there already. --force replaces it.")
    existing(out.absolute().parent)
    try:
        if to == "slot":
            from ..export import slot

            found: Any = slot.export(loaded, model, out, cache_type)
        else:
            found = {"lora": lora, "gguf": model_copy}[to].export(loaded, model, out)
    except (SoftPromptError, OSError) as error:
        _refused(softprompt, line(str(error)), as_json)
    if as_json:
        click.echo(json.dumps({"to": to, **found._asdict()}, indent=2))
        return
    click.echo(f"{line(str(out))}: {loaded.n_tokens} soft tokens, {found.size / 2**20:.1f} MB")
    for note in found.notes:
        click.echo(line(note))
    for each in found.usage:
        click.echo(f"- {line(each)}")
    if found.text:
        click.echo(f"The soft tokens as text:\n{line(found.text)}")


def _refused(softprompt: Path, reason: str, as_json: bool) -> NoReturn:
    """Answer for what cannot be exported, and end with 1."""
    if as_json:
        click.echo(json.dumps({"in": str(softprompt), "path": None, "error": reason}, indent=2))
    else:
        click.echo(f"Not exported: {reason}", err=True)
    sys.exit(1)
