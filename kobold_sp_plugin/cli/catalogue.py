"""``kobold-sp list``."""

import json
from pathlib import Path
from typing import Optional

import click

from .common import existing, line, load_engine, samples_folder


@click.command("list")
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
    from ..catalogue import Catalogue
    from ..session import entry_as_json

    folder = existing(folder or samples_folder())
    engine, _keep = load_engine(model, quiet=True)
    facts = engine.facts()
    entries = Catalogue(folder).entries(facts)
    if as_json:
        listed = [{**entry_as_json(entry), "dtype": entry.dtype} for entry in entries]
        about = {"folder": str(folder), "model": facts.name, "width": facts.width, "context": facts.context}
        click.echo(json.dumps({**about, "entries": listed}, indent=2))
        return
    click.echo(f"{len(entries)} soft prompts in {line(str(folder))}, judged for {facts.name}")
    for entry in entries:
        size = "" if entry.n_tokens is None else f" ({entry.n_tokens} tokens of width {entry.width})"
        author = f", by {entry.author}" if entry.author else ""
        click.echo(f"\n{line(entry.filename)}: {entry.name}{author}{size}")
        click.echo(f"  {entry.verdict}: {entry.reason}")
