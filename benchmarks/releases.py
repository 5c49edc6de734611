"""The table of families, and the tests of soft tokens, on several releases of transformers with one command.

    python benchmarks/releases.py --output FOLDER [--tests] [--only FAMILY ...] INTERPRETER[@PYTHONPATH] ...

Each release is named by the Python that has it, or by a Python and a folder in front of its packages
(``/usr/bin/python3@/opt/transformers-4.57``). One after the other, ``families.py`` writes a table to the folder, and
with ``--tests`` pytest runs ``tests/soft_tokens`` and ``tests/test_soft_tokens.py`` there too. The counts, and what
refuses or fails, come last. Exit status 1 where a family that runs is not equal, or a test fails.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLUMNS = ("forward", "greedy", "padding", "reuse", "context")


def run(command, environment, **options):
    return subprocess.run(command, env=environment, cwd=str(HERE.parent), **options)


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
    parser.add_argument("releases", nargs="+", metavar="INTERPRETER[@PYTHONPATH]")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the tables")
    parser.add_argument("--tests", action="store_true", help="run the tests of soft tokens too")
    parser.add_argument("--only", nargs="*", help="these families")
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    wrong = False
    summary = []
    for each in args.releases:
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
            tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/soft_tokens", "tests/test_soft_tokens.py"]
            done = run([python, *tests], environment, stdout=subprocess.PIPE)
            summary.append("    tests: " + done.stdout.decode().strip().splitlines()[-1])
            wrong = wrong or done.returncode != 0
    print("\n" + "\n".join(summary))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
