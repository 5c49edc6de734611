"""``kobold-sp convert``."""

import json
import os
import sys
from pathlib import Path
from typing import Optional

import click

from .common import WrongUse, existing, line

_WRITTEN = ("zip", "folder", "npy", "safetensors", "pt", "mkultra", "peft", "vllm", "upload", "exelents")
_READ_ONLY = ("mtjsp", "mkusp", "google", "novelai")


@click.command()
@click.argument("path", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", metavar="FORMAT", help=f"One of {', '.join(_WRITTEN)}. [default: by OUT's extension]")
@click.option(
    "--model", metavar="PATH", help="The model, where formats differ in how rows are scaled; only its config is read."
)
@click.option("--part", metavar="NAME", help="Which soft prompt, where IN holds several: a tensor's name, or a number.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def convert(
    path: Path, out: Path, to: Optional[str], model: Optional[str], part: Optional[str], force: bool, as_json: bool
) -> None:
    """Convert the soft prompt IN, of whatever format, to OUT.

    The rows keep their dtype, and the file all of its metadata that OUT has a place for; the rest is listed.
    Read, but not written: mtj-softtuner's and KoboldAI's .mtjsp, Google's checkpoints.

    \b
    Example:
      kobold-sp convert noir.json noir.zip
      kobold-sp convert noir.zip noir-adapter --to peft --model ./my-model
    """
    from ..errors import CompatibilityError, FormatError, ModelError, UnknownScale
    from ..formats import FORMATS, format_of, parts_of, read_header
    from ..formats.conversion import Conversion
    from ..formats.conversion import convert as converted

    to = to or next((each.name for each in FORMATS if out.suffix.lower() in each.extensions and each.write), None)
    to = to or next((each.name for each in FORMATS if out.suffix.lower() in each.extensions), None)
    if to not in _WRITTEN + _READ_ONLY:
        what = (
            f"There is no format {line(to)!r}." if to else f"{line(str(out))} does not tell which format it shall be."
        )
        raise WrongUse(f"{what} Name one with --to: {', '.join(_WRITTEN)}.")
    if not os.path.exists(path):
        raise WrongUse(f"There is no {line(str(path))}.")
    if os.path.lexists(out) and not force:
        raise WrongUse(f"{line(str(out))} is there already. --force replaces it.")
    folders = [each.name for each in FORMATS if not each.extensions]
    if out.is_dir() and to not in folders:
        raise WrongUse(f"{line(str(out))} is a folder; {to} is a file.")
    if out.is_file() and to in folders:
        raise WrongUse(f"{line(str(out))} is a file; {to} is a folder.")
    if out.is_dir() and any(out.iterdir()) and (not parts_of(str(out)) or format_of(out).name != to):
        raise WrongUse(f"{line(str(out))} is a folder with something else in it than a soft prompt to replace ({to}).")
    existing(out.absolute().parent)
    try:
        factor = None
        if model is not None:
            from transformers.utils.logging import disable_progress_bar

            from ..engines.embed_scale import embed_scale

            disable_progress_bar()
            factor = embed_scale(model, read_header(path, part).width)
        result: Conversion = converted(path, out, to, factor, part)
    except UnknownScale as error:
        raise WrongUse(f"{line(str(error))}. Use --model PATH.") from error
    except ModelError as error:
        raise WrongUse(line(str(error))) from error
    except (FormatError, CompatibilityError, OSError) as error:
        reason = line(str(error))
        if as_json:
            click.echo(json.dumps({"in": str(path), "out": None, "error": reason}, indent=2))
        else:
            click.echo(f"Not converted: {reason}", err=True)
        sys.exit(1)
    if as_json:
        about = {"in": str(path), "out": str(out), **result._asdict(), "scale": result.scale.value}
        click.echo(json.dumps(about, indent=2))
        return
    n_tokens, width = result.shape
    click.echo(
        f"{line(str(out))}: {n_tokens} rows of {width} columns, {result.dtype}, {result.to} from {result.format}"
    )
    if result.factor != 1:
        click.echo(f"Rows multiplied by {result.factor:g}: they are in {result.scale} scale now.")
    if result.dtype != result.dtype_before:
        click.echo(f"They were {result.dtype_before}, and are {result.dtype} now.")
    exact = f"differ by up to {result.difference:g}" if result.difference else "are the same, bit for bit"
    click.echo(f"Read back, the rows {exact}.")
    if result.lost:
        click.echo(f"No place in this format: {line(', '.join(result.lost))}")
    for note in result.notes:
        click.echo(note)
