"""The command line: ``kobold-sp``. Each command is a thin call into a room below.

Exit status: 0, 1 (the answer is no) or 2 (wrong use). Heavy libraries are imported by the command that
needs them, so that ``--help`` is quick.
"""

import sys

import click

from .. import __version__
from .catalogue import list_
from .common import WrongUse, samples_folder
from .convert import convert
from .dataset import dataset
from .edit import combine, edit
from .export import export
from .inspect import check, inspect
from .install import install, run, status, uninstall
from .serve import serve
from .train import train

__all__ = ["WrongUse", "main", "samples_folder"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kobold-sp")
def main() -> None:
    """Soft prompts for local language models.

    \b
    Example:
      kobold-sp serve
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a name may hold what the terminal's encoding has not


for _command in (serve, list_, inspect, check, convert, export, edit, combine, train, dataset):
    main.add_command(_command)
for _command in (install, uninstall, status, run):
    main.add_command(_command)
