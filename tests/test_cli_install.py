"""The commands `install`, `uninstall`, `status` and `run`, as their users run them."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from click.testing import CliRunner

from kobold_sp_plugin import __version__, cli
from kobold_sp_plugin.cli import main

ROOT = Path(cli.__file__).resolve().parents[2]


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A folder that looks like KoboldAI's, with an environment."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = tmp_path / "KoboldAI"
    folder.mkdir()
    (folder / "aiserver.py").write_text("# Version: 1.19.2\n")
    (folder / "fileops.py").touch()
    venv.create(folder / "runtime" / "envs" / "koboldai", symlinks=True)
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_status_install_status_uninstall(host):
    before = run("status", host)
    assert before.exit_code == 1
    assert "KoboldAI Client 1.19.2" in before.output and "installed: nothing" in before.output
    assert run("uninstall", host).exit_code == 1
    installed = run("install", host)
    assert installed.exit_code == 0
    assert "Start KoboldAI as always." in installed.output and "has to be started again" in installed.output
    assert "torch: missing; soft prompts need it" in installed.output
    after = run("status", host)
    assert after.exit_code == 0
    assert f"kobold_sp_plugin {__version__}" in after.output and "active: yes" in after.output
    removed = run("uninstall", host)
    assert removed.exit_code == 0 and "If it is running now, start it again" in removed.output
    assert run("status", host).exit_code == 1


def test_status_as_json_says_what_installing_would_change(host):
    before = json.loads(run("status", host, "--json").output)
    assert before["installed"] is None and before["active"] is False and before["intact"] is False
    assert before["host"] == "KoboldAI Client" and before["version"] == "1.19.2" and before["commit"] is None
    assert before["environment"]["python"] == str(host / "runtime/envs/koboldai/bin/python")
    written = set(before["would_change"]["write"])
    run("install", host)
    assert all(Path(path).is_file() for path in written)
    after = json.loads(run("status", host, "--json").output)
    assert after["intact"] and after["active"] and after["installed"]["version"] == __version__
    assert after["would_change"] == {"write": [], "remove": [], "in_the_way": []}


def test_a_changed_and_a_missing_file_are_named(host):
    run("install", host)
    package = next(host.rglob("kobold_sp_plugin"))
    (package / "menu.py").write_text("mine\n")
    (package / "watch.py").unlink()
    found = run("status", host)
    assert found.exit_code == 1
    assert f"changed: {package / 'menu.py'}" in found.output and f"missing: {package / 'watch.py'}" in found.output
    assert f"in the way: {package / 'menu.py'}" in found.output
    again = run("install", host)
    assert again.exit_code == 2 and "Move it away" in again.output
    removed = run("uninstall", host)
    assert removed.exit_code == 0 and f"Kept, since it was changed after it was installed: {package / 'menu.py'}" in (
        removed.output
    )


def test_what_cannot_be_done_is_wrong_use(host, tmp_path):
    for command in ("install", "status"):
        failed = run(command, tmp_path)
        assert failed.exit_code == 2 and "KoboldAI Client has aiserver.py and fileops.py" in failed.output
    shutil.rmtree(host / "runtime")
    failed = run("install", host)
    assert failed.exit_code == 2 and "--python PATH" in failed.output
    failed = run("status", host)
    assert failed.exit_code == 1 and "--python PATH" in failed.output
    (host / "kobold_sp_plugin.json").write_text("{}")
    assert run("uninstall", host).exit_code == 2


def test_a_name_cannot_control_the_terminal(tmp_path):
    folder = tmp_path / "\x1b[31m"
    folder.mkdir()
    assert "\x1b" not in run("install", folder).output


SCRIPT = '''"""A host that says how it was started."""
import json, sys
early = sorted(name for name in sys.modules if name.split(".")[0] in ("click", "numpy", "torch", "flask"))
from flask_session import Session
from beside import BESIDE

def where():
    return sys._getframe().f_code.co_filename

if __name__ == "__main__":
    Session("app")
    ours = sys.modules.get("kobold_sp_plugin")
    print(json.dumps({
        "arguments": sys.argv, "path": sys.path[0], "file": where(), "early": early, "beside": BESIDE,
        "prefix": sys.prefix, "package": ours and ours.__file__, "main": sys.modules["__main__"].where is where,
        "ours": [each for each in sys.path if "kobold_sp" in each or each == sys.argv[-1]],
    }))
    sys.exit(7)
'''


@pytest.fixture
def runnable(host):
    (host / "aiserver.py").write_text(SCRIPT)
    (host / "beside.py").write_text("BESIDE = 1\n")
    (host / "flask_session.py").write_text("class Session:\n    def __init__(self, app):\n        pass\n")
    return host


def launch(host, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "kobold_sp_plugin.cli", "run", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=cwd or host,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("named", [True, False])
def test_run_starts_the_host_in_its_own_python_with_the_hook_armed(runnable, named):
    done = launch(runnable, *(["aiserver.py"] if named else []), "--model", "a b", "--help", "--python", "x")
    assert done.returncode == 7, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["arguments"] == [str(runnable / "aiserver.py"), "--model", "a b", "--help", "--python", "x"]
    assert said["path"] == str(runnable) and said["file"] == str(runnable / "aiserver.py") and said["main"]
    assert said["prefix"] == str(runnable / "runtime/envs/koboldai")
    assert said["package"] == str(ROOT / "kobold_sp_plugin" / "__init__.py")
    assert said["early"] == []
    # The hook saw the session, and this is no host that it knows.
    assert "kobold_sp_plugin stays out of this host" in done.stderr


def test_run_shows_the_host_none_of_the_packages_beside_us(runnable, tmp_path):
    site_packages = tmp_path / "site-packages"
    shutil.copytree(ROOT / "kobold_sp_plugin", site_packages / "kobold_sp_plugin")
    (site_packages / "flask_session.py").write_text("raise SystemExit('the wrong one')")
    (runnable / "flask_session.py").rename(next((runnable / "runtime").rglob("site-packages")) / "flask_session.py")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site_packages)!r})\n"
         "from kobold_sp_plugin.cli import main; main()", "run", "aiserver.py"],
        capture_output=True, text=True, timeout=50, cwd=runnable,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["package"] == str(site_packages / "kobold_sp_plugin" / "__init__.py")


def test_run_with_the_hook_installed_arms_it_once(runnable):
    assert run("install", runnable).exit_code == 0
    done = launch(runnable, "aiserver.py")
    assert done.returncode == 7, done.stderr
    assert done.stderr.count("kobold_sp_plugin stays out of this host") == 1


def test_run_names_what_it_cannot_run(runnable, tmp_path):
    done = launch(runnable, cwd=tmp_path)
    assert done.returncode == 2 and "There is no aiserver.py" in done.stderr
    done = launch(runnable, "fileops.py")
    assert done.returncode == 2 and "fileops.py is not KoboldAI's aiserver.py" in done.stderr
    (tmp_path / "aiserver.py").touch()
    done = launch(runnable, cwd=tmp_path)
    assert done.returncode == 2 and "none of the programs" in done.stderr


def test_the_text_generation_webui_is_installed_into_not_run(tmp_path):
    (tmp_path / "modules").mkdir()
    for name in ("server.py", "modules/extensions.py"):
        (tmp_path / name).touch()
    venv.create(tmp_path / "venv", symlinks=True)
    done = launch(tmp_path, "server.py")
    assert done.returncode == 2 and "Use `kobold-sp install` for text-generation-webui" in done.stderr
