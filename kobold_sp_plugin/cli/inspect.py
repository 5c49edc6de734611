"""``kobold-sp inspect`` and ``kobold-sp check``: what a soft prompt is, and whether a model can use it."""

import json
import sys
from pathlib import Path
from typing import Any, Optional

import click

from .common import WrongUse, line, load_engine

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("file", type=_FILE)
@click.option(
    "--model", metavar="PATH", help="What to hold it against; it is loaded. [default: the demonstration model]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--picture", metavar="PNG", type=_FILE, help="Draw it, too. Needs matplotlib.")
def inspect(file: Path, model: Optional[str], as_json: bool, picture: Optional[Path]) -> None:
    """Tell all there is to know of the soft prompt FILE.

    Rows, scale, lengths, what it was trained on, the tokens nearest to each row, its verdict for a model, and how
    far it moves what the model says next.

    \b
    Example:
      kobold-sp inspect softprompts/noir.zip --picture noir.png
    """
    from ..compatibility.matrix import matrix_of
    from ..compatibility.model_facts import matrix_in_folder
    from ..errors import FormatError, MissingLibrary, ModelError
    from ..formats import read_header
    from ..inspection import draw
    from ..inspection import inspect as inspected

    if picture is not None:
        _need_matplotlib()
    _existing_file(file)
    try:
        read_header(file)  # what cannot be read is told before a large model is loaded
    except (FormatError, OSError) as error:
        _unreadable(file, error, as_json)
    engine, loaded = load_engine(model, quiet=True)
    try:
        matrix = matrix_of(loaded) if loaded is not None else matrix_in_folder(str(model))
    except (MissingLibrary, ModelError):
        matrix = None
    try:
        found = inspected(file, engine, matrix, engine.token_text)
    except (FormatError, OSError) as error:
        _unreadable(file, error, as_json)
    if picture is not None:
        try:
            draw(found, picture)
        except OSError as error:
            raise WrongUse(f"Cannot write {line(str(picture))}: {error.strerror or error}.") from error
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    else:
        _print(found)


@click.command()
@click.argument("file", type=_FILE)
@click.option(
    "--model",
    metavar="PATH",
    type=_FILE,
    help="A model's folder, a GGUF file, or a config.json alone; nothing is loaded. [default: the demonstration model]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(file: Path, model: Optional[Path], as_json: bool) -> None:
    """Say whether a model can use the soft prompt FILE, and why: exit status 0 or 1.

    Of the model only its configuration and some rows of its embedding are read, so that this is quick and works
    with any size.

    \b
    Example:
      kobold-sp check noir.zip --model ./my-model
    """
    from ..demonstration import MODEL
    from ..errors import FormatError, MissingLibrary, ModelError
    from ..inspection import check as checked

    _existing_file(file)
    try:
        (verdict, reason), hint = checked(file, model or MODEL, None if model else "demonstration")
    except (FileNotFoundError, ModelError) as error:
        about = f" ({error})" if isinstance(error, ModelError) else ""
        raise WrongUse(
            f"There is no model's folder, GGUF file or config.json at {line(str(model))}{line(about)}."
        ) from error
    except MissingLibrary as error:
        raise WrongUse(str(error)) from error
    except (FormatError, OSError) as error:
        _unreadable(file, error, as_json)
    if as_json:
        answer = {"file": str(file), "verdict": str(verdict), "reason": reason, "usable": verdict.usable, "hint": hint}
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(f"{line(str(file))}: {verdict}: {line(reason)}")
        if hint:
            click.echo(f"  {line(hint)}")
    sys.exit(0 if verdict.usable else 1)


def _print(found: Any) -> None:
    header, softprompt = found.header, found.softprompt
    author = f", by {header.author}" if header.author else ""
    click.echo(f"{line(found.filename)}: {line(header.name or 'unnamed')}{line(author)}")
    if header.description:
        click.echo(f"  {line(header.description)}")
    where = {"before_bos": "before", "after_bos": "after"}[softprompt.order.value]
    click.echo(
        f"  {header.n_tokens} rows of width {header.width}, {header.dtype}, {softprompt.scale} scale, {where} the "
        f"beginning of the text; format {header.format}"
    )
    if header.supported:
        click.echo(f"  made for: {line(', '.join(header.supported))}")
    click.echo(f"  {line(found.model)}: {found.judgement.verdict}: {line(found.judgement.reason)}")
    if found.hint is not None:
        click.echo(f"  {found.hint.sentence}")
    if found.effect is not None:
        remark = getattr(found.effect, "remark", "")
        click.echo(f"  effect: moves {found.effect:.1%} of the next token's probability. {remark}".rstrip())
    if found.usual is not None:
        click.echo(f"  lengths: most tokens of the model have {found.usual[0]:.3g} to {found.usual[1]:.3g}")
    click.echo("\n row  length  nearest tokens")
    for number, row in enumerate(found.rows):
        near = ", ".join(f"{json.dumps(text, ensure_ascii=False)} {cosine:.2f}" for text, cosine in row.nearest)
        click.echo(f"{number:4d} {row.length:7.3g}  {line(near)}".rstrip())


def _existing_file(file: Path) -> None:
    if not file.exists():
        raise WrongUse(f"There is no file {line(str(file))}.")


def _unreadable(file: Path, error: Exception, as_json: bool) -> None:
    """Answer for a file that cannot be read, and end with 1."""
    from ..compatibility import Verdict

    reason = getattr(error, "sentence", None) or getattr(error, "strerror", None) or str(error)
    if as_json:
        answer = {"file": str(file), "verdict": str(Verdict.UNREADABLE), "reason": reason, "usable": False}
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(f"{line(str(file))}: {Verdict.UNREADABLE}: {line(reason)}")
    sys.exit(1)


def _need_matplotlib() -> None:
    from importlib import import_module

    try:
        import_module("matplotlib")
    except ImportError as error:
        raise WrongUse('`--picture` needs matplotlib: pip install "kobold_sp_plugin[picture]"') from error
