"""``kobold-sp dataset``: what is to be said of texts before a soft prompt is trained on them."""

import json
from pathlib import Path
from typing import Any

import click

from .common import WrongUse, line

_PATH = click.Path(path_type=Path)


@click.group()
def dataset() -> None:
    """Look at texts before training on them, and clean them.

    \b
    Example:
      kobold-sp dataset check ./texts
    """


@dataset.command()
@click.argument("path", metavar="FOLDER", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(path: Path, as_json: bool) -> None:
    """Tell what is amiss in the texts in FOLDER, a file or a folder: exit status 1 where `clean` would change them.

    Size, encodings, documents that are there twice, markup, lines broken to fit a page.

    \b
    Example:
      kobold-sp dataset check ./texts
    """
    from ..errors import TrainingError
    from ..training.advice import advise
    from ..training.preflight import size

    _need_ftfy()
    try:
        found = advise(path)
    except (TrainingError, OSError) as error:
        raise WrongUse(line(str(error))) from error
    mended = any(remark.mended for remark in found.remarks)
    if as_json:
        remarks = [dict(remark._asdict()) for remark in found.remarks]
        answer: Any = {**found._asdict(), "remarks": remarks, "clean": not mended}
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(f"{found.files} files, {found.documents} documents, {size(found.n_bytes)} of text")
        for remark in found.remarks:
            click.echo(f"  {line(remark.sentence)}")
        if mended:
            target = path.resolve().with_name(f"{path.resolve().stem}-clean")
            click.echo(f'Mend a copy of them with: kobold-sp dataset clean "{line(str(path))}" "{line(str(target))}"')
    if mended:
        raise SystemExit(1)


@dataset.command()
@click.argument("path", metavar="FOLDER", type=_PATH)
@click.argument("target", metavar="OUT", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def clean(path: Path, target: Path, as_json: bool) -> None:
    """Write a cleaned copy of the texts in FOLDER, a file or a folder, into the new folder OUT.

    UTF-8, encodings and broken lines mended, no markup, every document once. Nothing in FOLDER changes.

    \b
    Example:
      kobold-sp dataset clean ./texts ./texts-clean
    """
    from ..errors import TrainingError
    from ..training import advice

    _need_ftfy()
    try:
        written = advice.clean(path, target)
    except (TrainingError, OSError) as error:
        raise WrongUse(line(str(error))) from error
    if as_json:
        click.echo(json.dumps({"files": [str(each) for each in written]}, indent=2))
    else:
        click.echo(f"{len(written)} files in {line(str(target))}")


def _need_ftfy() -> None:
    from importlib.util import find_spec

    if find_spec("ftfy") is None:
        raise WrongUse('`dataset` needs ftfy: pip install "kobold_sp_plugin[training]"')
