"""What the commands share: their error, the folder and the model where none is named, and text for a terminal."""

from pathlib import Path
from typing import Any, Optional, Tuple

import click


class WrongUse(click.ClickException):
    """What was asked for cannot be done as it was asked."""

    exit_code = 2


def samples_folder() -> Path:
    """The folder of soft prompts where none is named: ``./softprompts`` if there is one, else the samples."""
    package = Path(__file__).resolve().parents[1]
    here = Path("softprompts")
    return next((each for each in (here, package / "softprompts") if each.is_dir()), package.parent / "softprompts")


def existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise WrongUse(f"There is no folder {line(str(folder))}.")
    return folder


def load_engine(
    path: Optional[str],
    quiet: bool = False,
    context: Optional[int] = None,
    gpu_layers: int = -1,
) -> Tuple[Any, Any]:
    """An engine with the model at ``path`` or the demonstration model, and the model, which the caller keeps.

    ``quiet``: without the progress bars that transformers writes to the terminal. ``context`` and ``gpu_layers``: of
    a GGUF file.
    """
    from ..errors import MissingLibrary, ModelError
    from ..gguf.reading import is_gguf

    try:
        if path is not None and is_gguf(path):
            from ..engines.llama_cpp import LlamaCppEngine

            return LlamaCppEngine(path, context=context, gpu_layers=gpu_layers), None
        from transformers.utils.logging import disable_progress_bar

        from ..demonstration import MODEL
        from ..engines.transformers import TransformersEngine, load_transformers

        if quiet or path is None:
            disable_progress_bar()
        model, tokenizer, name = load_transformers(path or MODEL)
        return TransformersEngine(model, tokenizer, name if path else "demonstration"), model
    except (MissingLibrary, ModelError, OSError) as error:
        raise WrongUse(line(str(error))) from error


def line(text: str) -> str:
    """``text`` as a terminal may be given it: file names can hold control characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
