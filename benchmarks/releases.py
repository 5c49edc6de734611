"""The table of families, and the tests of soft tokens, on several releases of transformers with one command.

    python benchmarks/releases.py --output FOLDER [--tests] [--only FAMILY ...] [RELEASE ...]

Without any release named, all of ``RELEASES`` are run, one after the other; what they need is installed below
``FOLDER/environments`` first, where it is not there yet: a Python with torch for each of ``PYTHONS``, and a folder of
packages for each release, which takes 3 GB and the network. A release may also be an interpreter that has one, or an
interpreter and a folder in front of its packages (``/usr/bin/python3@/opt/transformers-4.57``).

For each, ``families.py`` writes a table to the folder, and with ``--tests`` pytest runs ``TESTS`` there too. The
counts, and what refuses or fails, come last. Exit status 1 where a family that runs is not equal, or a test fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLUMNS = ("forward", "greedy", "padding", "reuse", "context")
TESTS = ("tests/test_soft_tokens.py", "tests/soft_tokens", "tests/test_engine.py")
SHARED = ("flask-socketio", "watchdog", "pytest", "pytest-timeout", "hypothesis")

# What each Python has, whatever the release.
PYTHONS = {
    "3.8": ("torch==1.12.1", "numpy<1.25", "accelerate<0.30", *SHARED),
    "3.11": ("torch==2.13.0", "accelerate", *SHARED),
}
# A release to its Python, what is installed for it, and what is without its dependencies (torch is there).
RELEASES = {
    "4.24": ("3.8", ("transformers==4.24.0",), ()),
    "4.36": ("3.8", ("transformers==4.36.1",), ()),
    "4.44": ("3.11", ("transformers==4.44.2", "numpy<2"), ("peft==0.13.2",)),
    "4.57": ("3.11", ("transformers==4.57.6",), ("peft==0.17.1",)),
    "5": ("3.11", ("transformers>=5",), ("peft",)),
}


def run(command, environment, **options):
    return subprocess.run(command, env=environment, cwd=str(HERE.parent), **options)


def interpreter(version):
    """The path of that Python, by its name or as pyenv keeps it."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = [str(each) for each in sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    for found in [shutil.which(f"python{version}"), *reversed(kept)]:
        if found and subprocess.run([found, "-c", ""], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return found
    raise SystemExit(f"Python {version} is not installed")


def installed(release, folder):
    """The interpreter and the folder of packages of one of ``RELEASES``, made below ``folder`` where they are not."""
    version, packages, alone = RELEASES[release]
    python = folder / f"python-{version}" / "bin" / "python"
    target = folder / f"transformers-{release}"
    pip = [str(python), "-m", "pip", "install", "-q", "--prefer-binary", "--disable-pip-version-check"]
    complete = python.parents[1] / "complete"
    if not complete.exists():
        subprocess.run([interpreter(version), "-m", "venv", "--clear", str(python.parents[1])], check=True)
        subprocess.run([*pip, *PYTHONS[version]], check=True)
        complete.touch()
    if not target.exists():
        making = folder / f"making-{release}"
        shutil.rmtree(making, ignore_errors=True)
        subprocess.run([*pip, "--target", str(making), *packages], check=True)
        if alone:
            subprocess.run([*pip, "--target", str(making), "--no-deps", *alone], check=True)
        making.rename(target)
    return str(python), str(target)


def release_of(python, environment):
    code = "import transformers, torch; print(transformers.__version__, torch.__version__)"
    answer = run([python, "-W", "ignore", "-c", code], environment, stdout=subprocess.PIPE, check=True)
    return answer.stdout.decode().split()


def read(table):
    """A table's rows by family: cells, or one cell that says why there are none."""
    lines = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    rows = {}
    for line in lines:
        family, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[family] = dict(zip(COLUMNS, cells)) if any(cells[1:]) else cells[0]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"{', '.join(RELEASES)}, or PYTHON[@FOLDER]")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the tables")
    parser.add_argument("--tests", action="store_true", help="run the tests of soft tokens too")
    parser.add_argument("--only", nargs="*", help="these families")
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    wrong = False
    summary = []
    for each in args.releases or RELEASES:
        if each in RELEASES:
            python, path = installed(each, output / "environments")
        else:
            python, _, path = each.partition("@")
        environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
        version, torch_version = release_of(python, environment)
        table = output / f"families-{version}.md"
        only = ["--only", *args.only] if args.only else []
        run([python, str(HERE / "families.py"), "--output", str(table), *only], environment, check=True)
        rows = read(table)
        ran = {family: row for family, row in rows.items() if isinstance(row, dict)}
        marks = {column: sum(row[column].startswith("✓") for row in ran.values()) for column in COLUMNS}
        summary.append(
            f"transformers {version}, torch {torch_version}: {len(ran)} of {len(rows)} run; "
            + ", ".join(f"{column} {count}" for column, count in marks.items())
        )
        summary += [f"    {family}: {row}" for family, row in rows.items() if isinstance(row, str)]
        unequal = [
            f"    {family}, {column}: {row[column]}"
            for family, row in ran.items()
            for column in ("forward", "greedy", "padding")
            if not row[column].startswith(("✓", "bare: no"))
        ]
        summary += unequal
        wrong = wrong or bool(unequal)
        if args.tests:
            tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
            done = run([python, *tests], environment, stdout=subprocess.PIPE)
            summary.append("    tests: " + done.stdout.decode().strip().splitlines()[-1])
            wrong = wrong or done.returncode != 0
    print("\n" + "\n".join(summary))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
