"""``kobold-sp edit`` and ``kobold-sp combine``: other metadata, and several soft prompts as one."""

import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click

from .common import WrongUse, existing, line

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("file", type=_FILE)
@click.option("--name", help="What menus show.")
@click.option("--author", multiple=True, help="Who made it; may be given several times.")
@click.option("--description", help="What it does.")
@click.option("--supported", multiple=True, help="A model that it is made for; may be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def edit(
    file: Path,
    name: Optional[str],
    author: Tuple[str, ...],
    description: Optional[str],
    supported: Tuple[str, ...],
    as_json: bool,
) -> None:
    """Change what the soft prompt FILE says of itself, in place; all else stays. An empty text takes one away.

    \b
    Example:
      kobold-sp edit noir.zip --name "Noir, second edition" --supported "GPT-J 6B"
    """
    from ..editing import edit as edited
    from ..errors import SoftPromptError

    given: Dict[str, Any] = {"name": name, "description": description}
    changes = {key: value for key, value in given.items() if value is not None}
    if author:
        changes["author"] = author[0] if len(author) == 1 else list(author)
    if supported:
        changes["supported"] = [text for text in supported if text]
    if not changes:
        raise WrongUse("Nothing to change: give --name, --author, --description or --supported.")
    if not file.exists():
        raise WrongUse(f"There is no file {line(str(file))}.")
    try:
        changed = edited(file, changes)
    except (SoftPromptError, OSError) as error:
        _fail(f"Not changed: {error}")
    fields = ("name", "author", "description", "supported")
    values = {key: getattr(changed, key) for key in fields}
    if as_json:
        click.echo(json.dumps({"file": str(file), **values}, indent=2))
        return
    for key in changes:
        shown = values[key] if isinstance(values[key], str) else ", ".join(values[key])
        click.echo(f"{line(str(file))}: {key}: {line(shown)}")


@click.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option("-o", "--output", "out", required=True, metavar="OUT", type=_FILE, help="The new file, KoboldAI's zip.")
@click.option("--rows", "n_tokens", type=click.IntRange(min=1), help="Keep only the first so many rows of them all.")
@click.option("--name", default="", help="[default: the names of the parts]")
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def combine(files: Tuple[Path, ...], out: Path, n_tokens: Optional[int], name: str, force: bool, as_json: bool) -> None:
    """Make one soft prompt of the rows of FILES, in order; of one FILE, a shorter one.

    \b
    Example:
      kobold-sp combine noir.zip space.zip -o space-noir.zip --rows 30
    """
    from .. import formats
    from ..editing import combine as combined
    from ..errors import SoftPromptError

    for file in files:
        if not file.exists():
            raise WrongUse(f"There is no file {line(str(file))}.")
    if os.path.lexists(out) and not force:
        raise WrongUse(f"{line(str(out))} is there already. --force replaces it.")
    if out.is_dir():
        raise WrongUse(f"{line(str(out))} is a folder; name a file.")
    if out.suffix.lower() != ".zip" and out.suffix.lower() in formats.EXTENSIONS:
        raise WrongUse(f"What is written is a zip, not a {out.suffix}. Name it so, and use `kobold-sp convert` then.")
    existing(out.absolute().parent)
    try:
        dtypes: List[str] = [formats.read_header(file).dtype for file in files]
        made = combined([formats.load(file) for file in files], n_tokens, name)
        dtype = dtypes[0] if set(dtypes) == {dtypes[0]} and dtypes[0] in formats.DTYPES else "float32"
        formats.save(made, out, dtype)
    except (SoftPromptError, OSError) as error:
        _fail(f"Not combined: {error}")
    if as_json:
        answer = {"file": str(out), "name": made.name, "n_tokens": made.n_tokens, "width": made.width, "dtype": dtype}
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(f"{line(str(out))}: {line(made.name)}, {made.n_tokens} rows of width {made.width}, {dtype}")


def _fail(message: str) -> None:
    click.echo(line(message), err=True)
    sys.exit(1)
