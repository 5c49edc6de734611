"""``kobold-sp install``, ``uninstall``, ``status`` and ``run``: KoboldAI and text-generation-webui."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import click

from .common import WrongUse, line

_python = click.option(
    "--python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The Python that the host runs in. [default: the one that the host's installer made in its folder]",
)
_folder = click.argument("folder", metavar="PATH", type=click.Path(exists=True, file_okay=False, path_type=Path))


@click.command()
@_folder
@_python
def install(folder: Path, python: Optional[Path]) -> None:
    """Put soft prompts into the KoboldAI or text-generation-webui in the folder PATH.

    This package is copied into the program's own Python environment, whose other packages stay as they are, with a
    hook that is active from the program's next start on. Installing again upgrades or repairs it.

    \b
    Example:
      kobold-sp install ~/KoboldAI
    """
    from ..errors import HostError
    from ..hosts import install as installing
    from ..hosts.environments import probe

    try:
        done = installing.install(folder, python)
        environment = probe(done.environment.python)
    except HostError as error:
        raise WrongUse(line(str(error))) from error
    click.echo(f"{done.host.name} in {line(str(done.folder))}")
    click.echo(f"  its Python: {environment.version}, {line(str(environment.python))}")
    if done.is_there:
        click.echo("  kobold_sp_plugin: was there already; uninstalling leaves it there")
    else:
        click.echo(f"  kobold_sp_plugin: in {line(str(environment.site_packages))}")
    click.echo(f"  watchdog: {_watchdog(done, environment)}")
    for name in ("torch", "transformers", "numpy", "flask-socketio")[: 3 if done.host.destinations else 4]:
        if environment.packages[name] is None:
            click.echo(f"  {name}: missing; soft prompts need it")
    if not done.host.destinations and not environment.armed:
        raise click.ClickException("It is installed, but that Python does not load it: are .pth files switched off?")
    click.echo(f"Installed. {done.host.start} A host that is running now has to be started again.")


@click.command()
@_folder
def uninstall(folder: Path) -> None:
    """Take back what `install` put into the program in the folder PATH, to the byte.

    Files that were changed since are kept, and named.

    \b
    Example:
      kobold-sp uninstall ~/KoboldAI
    """
    from ..errors import HostError
    from ..hosts import install as installing

    try:
        done = installing.uninstall(folder)
    except HostError as error:
        raise WrongUse(line(str(error))) from error
    if done is None:
        raise click.ClickException(f"Nothing is installed in {line(str(folder))}.")
    for path in done.changed:
        click.echo(f"Kept, since it was changed after it was installed: {line(str(path))}")
    if done.blocked:
        for path, reason in done.blocked:
            click.echo(f"Still there: {line(str(path))}: {reason}", err=True)
        raise click.ClickException("Not everything could be removed. End the program, then uninstall again.")
    click.echo(f"Removed from {done.record.host}. If it is running now, start it again: it keeps what it has loaded.")


@click.command()
@_folder
@_python
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(folder: Path, python: Optional[Path], as_json: bool) -> None:
    """Say what the folder PATH is, what is installed there, and what `install` would change; nothing is changed.

    The exit status is 0 if soft prompts are installed and intact, else 1.

    \b
    Example:
      kobold-sp status ~/KoboldAI
    """
    from ..errors import UnknownHost
    from ..hosts import install as installing

    try:
        found = installing.status(folder, python)
    except UnknownHost as error:
        raise WrongUse(line(str(error))) from error
    about = _as_json(found)
    if as_json:
        click.echo(json.dumps(about, indent=2))
    else:
        _print(about)
    sys.exit(0 if about["intact"] and about["active"] is not False else 1)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_python
@click.argument("arguments", metavar="[aiserver.py] [ARGUMENTS]...", nargs=-1, type=click.UNPROCESSED)
def run(python: Optional[Path], arguments: Tuple[str, ...]) -> None:
    """Start KoboldAI with soft prompts, without installing anything: for installs that cannot be written to.

    ARGUMENTS are KoboldAI's own.

    \b
    Example:
      kobold-sp run aiserver.py --model ./my-model
    """
    from ..errors import HostError
    from ..hosts import launch
    from ..hosts.install import environment_of

    named = arguments[:1] if arguments and not arguments[0].startswith("-") else ()
    script = Path(*named) if named else Path("aiserver.py")
    if not script.is_file():
        raise WrongUse(f"There is no {line(str(script))}. Run this in KoboldAI's folder, or name its aiserver.py.")
    if not Path(launch.__file__).is_file():
        raise WrongUse("From a wheel that is not installed nothing can be run. Install kobold_sp_plugin with pip.")
    try:
        host, environment = environment_of(script.absolute().parent, python)
    except HostError as error:
        raise WrongUse(line(str(error))) from error
    if script.name != host.script or host.destinations:
        raise WrongUse(f"{line(str(script))} is not KoboldAI's aiserver.py. Use `kobold-sp install` for {host.name}.")
    command = [str(environment.python), launch.__file__, str(script), *arguments[len(named) :]]
    variables = {**os.environ, "PYTHONNOUSERSITE": "1"} if host.isolated else dict(os.environ)
    sys.stdout.flush()
    if os.name == "nt":  # where exec gives the console back at once
        sys.exit(subprocess.call(command, env=variables))
    os.execve(command[0], command, variables)


def _watchdog(plan: Any, environment: Any) -> str:
    if plan.watchdog is not None:
        return f"{plan.watchdog}, put there with it"
    if environment.packages["watchdog"] is not None:
        return f"{environment.packages['watchdog']}, the environment's own"
    return f"none ({line(plan.without_watchdog)}); the folder of soft prompts is polled instead"


def _as_json(found: Any) -> Dict[str, Any]:
    environment, record, plan = found.environment, found.record, found.plan
    return {
        "folder": str(found.folder),
        "host": found.host.name,
        "version": found.version,
        "commit": found.commit,
        "environment": environment
        and {
            "python": str(environment.python),
            "version": environment.version,
            "site_packages": str(environment.site_packages),
            "packages": environment.packages,
        },
        "installed": record
        and {
            "version": record.version,
            "complete": record.complete,
            "files": len(record.files),
            "changed": [str(path) for path in record.changed()],
            "missing": [str(path) for path in record.missing()],
            "watchdog": record.watchdog,
        },
        "intact": found.intact,
        "active": found.active,
        "would_change": plan
        and {
            "write": [str(path) for path in plan.to_write()],
            "remove": [str(path) for path in plan.to_remove()],
            "in_the_way": [str(path) for path in plan.in_the_way()],
        },
        "problem": found.problem or None,
    }


def _print(about: Dict[str, Any]) -> None:
    known = f" {about['version']}" if about["version"] else ""
    known += f" (commit {about['commit'][:7]})" if about["commit"] else ""
    click.echo(f"{about['host']}{known} in {line(about['folder'])}")
    environment, installed, change = about["environment"], about["installed"], about["would_change"]
    if environment:
        click.echo(f"  its Python: {environment['version']}, {line(environment['python'])}")
        packages = (f"{name} {version or '(missing)'}" for name, version in environment["packages"].items())
        click.echo(f"  with: {', '.join(packages)}")
    if installed is None:
        click.echo("  installed: nothing")
    elif not installed["complete"]:
        click.echo("  installed: in part, since it was interrupted; install again, or uninstall")
    else:
        click.echo(f"  installed: kobold_sp_plugin {installed['version']}, {installed['files']} files")
        for kind in ("changed", "missing"):
            for path in installed[kind]:
                click.echo(f"  {kind}: {line(path)}")
    if about["active"] is not None:
        click.echo(f"  active: {'yes, from the next start on' if about['active'] else 'no'}")
    elif installed:
        click.echo("  active: if the host's own settings say so")
    if change:
        counts = f"{len(change['write'])} files written, {len(change['remove'])} removed"
        click.echo(f"  installing now: {counts}")
        for path in change["in_the_way"]:
            click.echo(f"  in the way: {line(path)}")
    if about["problem"]:
        click.echo(f"  {line(about['problem'])}")
