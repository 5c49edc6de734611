"""The design's rooms: who may import whom, and what importing us costs a host."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kobold_sp_plugin

PACKAGE = Path(kobold_sp_plugin.__file__).parent
LAYERS = {
    "errors": 0,
    "patching": 0,
    "gguf": 1,
    "softprompt": 1,
    "compatibility": 2,
    "formats": 2,
    "catalogue": 3,
    "soft_tokens": 3,
    "editing": 3,
    "engines": 4,
    "watch": 4,
    "export": 5,
    "inspection": 5,
    "session": 5,
    "menu": 6,
    "training": 6,
    "demonstration": 7,
    "hosts": 7,
    "server": 7,
    "cli": 8,
}
# A value that can read and write itself is what every user reaches for first; it does so only when called.
ALLOWED_UPWARDS = {("softprompt", "formats")}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].replace(".py", "")


def imported_rooms(path):
    package = ["kobold_sp_plugin", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "kobold_sp_plugin" and len(parts) > 1 and parts[1] in LAYERS:
                yield parts[1]


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_lower_layers_only(path):
    room = room_of(path)
    assert room in LAYERS, f"{room} has no layer in the design"
    for other in imported_rooms(path):
        if other != room and (room, other) not in ALLOWED_UPWARDS:
            assert LAYERS[other] < LAYERS[room], f"{room} imports {other}"


def test_the_reader_of_imports_sees_them():
    assert set(imported_rooms(PACKAGE / "catalogue.py")) >= {"compatibility", "formats", "errors"}


def modules_after(statement):
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout.decode().split())


HEAVY = {"numpy", "torch", "transformers", "flask", "flask_socketio", "watchdog", "click"}


@pytest.mark.parametrize("module", ["kobold_sp_plugin", "kobold_sp_plugin.patching", "kobold_sp_plugin.errors"])
def test_importing_it_alone_imports_nothing_heavy(module):
    assert not modules_after(f"import {module}") & HEAVY


def test_listing_a_folder_needs_no_torch():
    assert "torch" not in modules_after("from kobold_sp_plugin import Catalogue; Catalogue('nowhere').entries()")


def test_every_public_name_is_there():
    for name in kobold_sp_plugin.__all__:
        assert getattr(kobold_sp_plugin, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        kobold_sp_plugin.missing  # noqa: B018
