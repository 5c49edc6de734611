"""Installing into made-up hosts with real Python environments, and taking it back to the byte."""

import base64
import csv
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import kobold_sp_plugin
from kobold_sp_plugin.errors import (
    BadRecord,
    FileInTheWay,
    ForeignPackage,
    HostError,
    NoEnvironment,
    ReadOnlyInstall,
    UnknownHost,
)
from kobold_sp_plugin.hosts import environments, install, payload

REPOSITORY = Path(kobold_sp_plugin.__file__).resolve().parents[1]
HOOKS = REPOSITORY / "hooks"
VERSION = kobold_sp_plugin.__version__
KINDS = {
    "KoboldAI Client": ("aiserver.py", "fileops.py"),
    "KoboldAI United": ("aiserver.py", "fileops.py", "koboldai_settings.py", "modeling/inference_model.py"),
    "text-generation-webui": ("server.py", "modules/extensions.py"),
}
ENVIRONMENT = {
    "KoboldAI Client": "runtime/envs/koboldai",
    "KoboldAI United": "venv",
    "text-generation-webui": "installer_files/env",
}


def make_host(folder, kind="KoboldAI Client", place=None):
    """A folder that looks like a host's, with a real environment."""
    for name in KINDS[kind]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# Version: 1.19.2\n")
    make_environment(folder / (place or ENVIRONMENT[kind]))
    return folder


def make_environment(place, **options):
    venv.create(place, symlinks=True, **options)
    return place / "bin" / "python"


@pytest.fixture
def host(tmp_path):
    return make_host(tmp_path / "host")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """pip has no index; and what our files make Python write is written."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


@pytest.fixture
def textgen_hook(monkeypatch):
    """A hook for text-generation-webui, whether or not this tree has one."""
    own = payload.package

    def package():
        return {**own(), "kobold_sp_plugin/hooks/text_generation_webui/script.py": b"# the extension\n"}

    monkeypatch.setattr(payload, "package", package)


def tree(folder):
    """All that ``diff -r`` and ``ls -l`` would show, but for times."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            content = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif os.path.isfile(path):
                content = Path(path).read_bytes()
            found[os.path.relpath(path, folder)] = (mode, content)
    return found


def site_packages(folder, place="runtime/envs/koboldai"):
    return next((folder / place).glob("lib/python*/site-packages"))


def start(folder, code="pass", place="runtime/envs/koboldai"):
    """Run ``code`` in a host's Python, as the host does."""
    done = subprocess.run(
        [str(folder / place / "bin" / "python"), "-s", "-c", code],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done


# The host and its environment


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_is_recognised_by_what_is_there(tmp_path, kind):
    assert environments.recognise(make_host(tmp_path, kind)).name == kind


def test_a_folder_that_is_no_host_is_named_with_what_was_looked_for(tmp_path):
    (tmp_path / "aiserver.py").touch()
    with pytest.raises(UnknownHost, match=r"missing: fileops\.py\).*missing: koboldai_settings\.py, modeling\)"):
        install.install(tmp_path)
    with pytest.raises(UnknownHost, match="no folder"):
        install.status(tmp_path / "nowhere")


LAYOUTS = [(host.name, place) for host in environments.HOSTS for place in host.environments]


@pytest.mark.parametrize("kind, place", LAYOUTS)
def test_the_environment_is_found_where_the_host_makes_it(tmp_path, kind, place):
    make_host(tmp_path, kind, place)
    found = environments.find_environment(tmp_path, environments.recognise(tmp_path))
    assert found.python == tmp_path / place / "bin" / "python"
    assert found.site_packages == site_packages(tmp_path, place)
    assert found.version == ".".join(map(str, sys.version_info[:3]))
    assert found.packages["torch"] is None and found.ours is None and not found.armed and not found.has_pip


@pytest.mark.parametrize(
    "place, executable",
    [
        ("miniconda3/python", "python.exe"),
        ("miniconda3", "python.exe"),
        ("runtime/envs/koboldai", "python.exe"),
        ("venv", "Scripts/python.exe"),
    ],
)
def test_the_environment_is_found_as_it_lies_on_windows(tmp_path, place, executable):
    (tmp_path / "aiserver.py").touch()
    (tmp_path / "fileops.py").touch()
    python = tmp_path / place / executable
    python.parent.mkdir(parents=True)
    python.symlink_to(os.path.realpath(sys.executable))
    (tmp_path / place / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
    found = environments.find_environment(tmp_path, environments.recognise(tmp_path))
    assert found.python == python


def test_no_python_is_guessed(tmp_path):
    shutil.rmtree(make_host(tmp_path) / "runtime")
    with pytest.raises(NoEnvironment, match=r"runtime/envs/koboldai, .*--python PATH"):
        install.install(tmp_path)


def test_of_several_environments_the_running_one_counts_and_else_none(tmp_path, monkeypatch):
    make_host(tmp_path)
    make_environment(tmp_path / "runtime/envs/koboldai-rocm")
    host = environments.recognise(tmp_path)
    with pytest.raises(NoEnvironment, match=r"several.*koboldai/bin/python, .*koboldai-rocm/bin/python"):
        environments.find_environment(tmp_path, host)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "runtime/envs/koboldai-rocm"))
    found = environments.find_environment(tmp_path, host)
    assert found.python == tmp_path / "runtime/envs/koboldai-rocm/bin/python"


def test_an_environment_that_runs_in_the_hosts_folder_is_the_hosts(tmp_path, monkeypatch):
    shutil.rmtree(make_host(tmp_path) / "runtime")
    python = make_environment(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "executable", str(python))
    assert environments.find_environment(tmp_path, environments.recognise(tmp_path)).python == python


@pytest.mark.parametrize(
    "script, message",
    [
        ("#!/bin/sh\nexit 1", "does not answer"),
        ("#!/bin/sh\necho '{}'", "does not answer"),
        ("not a program", "cannot be used"),
        ("""#!/bin/sh\necho '{"version": [3, 7, 9], "purelib": "/"}'""", r"is Python 3\.7\.9; .* 3\.8 or newer"),
    ],
)
def test_a_python_that_cannot_be_used_is_named(tmp_path, script, message):
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(0o755)
    with pytest.raises(NoEnvironment, match=message) as caught:
        environments.probe(python)
    assert str(python) in str(caught.value)


def test_the_release_and_the_commit_are_read_from_the_hosts_own_files(host):
    commit = "1ce811c" + "0" * 33
    known = environments.recognise(host)
    assert environments.host_version(host, known) == ("1.19.2", None)
    (host / ".git").mkdir()
    (host / ".git" / "HEAD").write_text(commit + "\n")
    assert environments.host_version(host, known) == ("1.19.2", commit)
    (host / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (host / ".git" / "packed-refs").write_text(f"# pack-refs\n{'a' * 40} refs/heads/other\n{commit} refs/heads/main\n")
    assert environments.host_version(host, known) == ("1.19.2", commit)
    (host / ".git" / "HEAD").write_text("ref: ../../secret\n")
    assert environments.host_version(host, known) == ("1.19.2", None)


# There and back


@pytest.mark.parametrize(
    "kind, name",
    [
        ("KoboldAI Client", "Kobold AI (old) & 100% ü 猫"),
        ("KoboldAI United", "D\\Kobold\\AI"),
        ("text-generation-webui", 'it\'s "here"; $HOME\n'),
    ],
)
def test_uninstalling_leaves_the_tree_as_it_was_to_the_byte(tmp_path, kind, name, textgen_hook):
    folder = make_host(tmp_path / name, kind)
    (folder / "softprompts").mkdir(mode=0o700)
    (folder / "read-only").mkdir(mode=0o500)
    before = tree(folder)
    install.install(folder)
    assert install.status(folder).intact
    start(folder, "import kobold_sp_plugin.patching, kobold_sp_plugin.hosts.koboldai", ENVIRONMENT[kind])
    assert any("__pycache__" in path for path in tree(folder))
    done = install.uninstall(folder)
    assert not done.changed and not done.blocked
    assert tree(folder) == before
    assert install.uninstall(folder) is None


def test_nothing_of_the_host_is_changed_by_installing(host):
    before = tree(host)
    install.install(host)
    assert {path: entry for path, entry in tree(host).items() if path in before} == before


def test_asking_for_the_status_changes_nothing(host):
    before = tree(host)
    found = install.status(host)
    assert not found.intact and found.active is False and found.plan.to_write() and not found.problem
    assert tree(host) == before


def test_what_is_installed_is_the_package_and_takes_effect(host):
    install.install(host)
    code = "import sys; print('kobold_sp_koboldai' in sys.modules, 'kobold_sp_plugin' in sys.modules)"
    assert start(host, code).stdout == "True False\n"
    assert start(host, "import kobold_sp_plugin; print(kobold_sp_plugin.__version__)").stdout == f"{VERSION}\n"
    place = site_packages(host) / "kobold_sp_plugin"
    names = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {"hooks/koboldai/install.sh", "softprompts/noir.zip", "demonstration/model/model.safetensors"} <= names
    found = install.status(host)
    assert found.intact and found.active and not found.plan.to_write() and not found.plan.to_remove()


def test_pip_lists_only_what_was_added_and_its_record_is_true(host):
    def listed():
        command = [sys.executable, "-m", "pip", "list", "--format=json", "--path", str(site_packages(host))]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=50)
        return {each["name"].replace("-", "_"): each["version"] for each in json.loads(done.stdout)}

    before = listed()
    done = install.install(host)
    added = {"kobold_sp_plugin": VERSION, **({"watchdog": done.watchdog} if done.watchdog else {})}
    assert listed() == {**before, **added}
    record = site_packages(host) / f"kobold_sp_plugin-{VERSION}.dist-info" / "RECORD"
    rows = list(csv.reader(record.read_text().splitlines()))
    for name, digest, size in rows[:-1]:
        content = (site_packages(host) / name).read_bytes()
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={expected}", str(len(content)))
    assert {"kobold_sp_koboldai.pth", "kobold_sp_koboldai.py"} <= {row[0] for row in rows}


def test_the_text_generation_webui_gets_an_extension(tmp_path, textgen_hook):
    folder = make_host(tmp_path, "text-generation-webui")
    install.install(folder)
    assert (folder / "extensions/soft_prompts/script.py").read_bytes() == b"# the extension\n"
    install.uninstall(folder)
    (folder / "user_data").mkdir()  # releases 3.2 to 3.6.1 have it, and look for no extensions in it
    install.install(folder)
    assert (folder / "extensions/soft_prompts/script.py").is_file()
    install.uninstall(folder)
    (folder / "user_data/extensions").mkdir()
    before = tree(folder)
    install.install(folder)
    assert (folder / "user_data/extensions/soft_prompts/script.py").is_file()
    assert not (folder / "extensions").exists()
    assert install.status(folder).active is None
    (folder / "user_data/softprompts").mkdir()  # as the extension does when it runs
    (folder / "user_data/softprompts.json").touch()
    (folder / "user_data/extensions/soft_prompts/__pycache__").mkdir()
    (folder / "user_data/extensions/soft_prompts/__pycache__/script.cpython-311.pyc").touch()
    install.uninstall(folder)
    assert tree(folder) == before


def test_soft_prompts_that_the_user_put_into_the_extensions_folder_stay(tmp_path, textgen_hook):
    folder = make_host(tmp_path, "text-generation-webui")
    (folder / "user_data/softprompts").mkdir(parents=True)
    (folder / "user_data/softprompts.json").write_text("of an extension from before")
    before = tree(folder)
    install.install(folder)
    (folder / "user_data/softprompts.json").write_text("of ours")
    install.uninstall(folder)
    (folder / "user_data/softprompts.json").write_text("of an extension from before")
    assert tree(folder) == before
    (folder / "user_data/softprompts").rmdir()
    install.install(folder)
    (folder / "user_data/softprompts").mkdir()
    (folder / "user_data/softprompts/noir.zip").touch()
    install.uninstall(folder)
    assert (folder / "user_data/softprompts/noir.zip").is_file()


def test_a_package_without_a_hook_for_the_host_says_so(host, monkeypatch):
    monkeypatch.setattr(payload, "package", lambda: {"kobold_sp_plugin/__init__.py": b""})
    with pytest.raises(HostError, match=r"no hook for KoboldAI Client: kobold_sp_koboldai\.py"):
        install.install(host)
    assert "no hook" in install.status(host).problem


def test_the_hosts_folder_can_be_moved(host, tmp_path):
    before = tree(host)
    install.install(host)
    moved = host.rename(tmp_path / "moved")
    assert install.status(moved).intact
    install.uninstall(moved)
    assert tree(moved) == before


def test_an_environment_elsewhere_is_remembered(tmp_path):
    shutil.rmtree(make_host(tmp_path / "host") / "runtime")
    python = make_environment(tmp_path / "elsewhere")
    before = tree(tmp_path)
    install.install(tmp_path / "host", python)
    found = install.status(tmp_path / "host")
    assert found.intact and found.active and found.environment.python == python
    install.uninstall(tmp_path / "host")
    assert tree(tmp_path) == before


def test_a_host_that_has_moved_to_another_environment_is_followed(host, tmp_path):
    before = tree(host)
    install.install(host)
    python = make_environment(tmp_path / "elsewhere")
    install.install(host, python)
    left = set(tree(host)) - set(before)
    assert left == {install.RECORD}
    assert install.status(host).environment.python == python
    install.uninstall(host)
    assert tree(host) == before


def test_an_environment_that_was_made_anew_is_installed_into_again(host):
    install.install(host)
    shutil.rmtree(host / "runtime")
    make_environment(host / "runtime/envs/koboldai")
    found = install.status(host)
    assert not found.intact and found.record.missing() and not found.active
    install.install(host)
    assert install.status(host).intact


def test_samples_are_not_put_among_the_users_soft_prompts(host):
    (host / "softprompts").mkdir()
    install.install(host)
    assert not list((host / "softprompts").iterdir())


# Installing over something


def older(monkeypatch):
    """Make this package an older one, with another file in it."""
    files = dict(payload.package())
    for name in ("old.py", "old/older.py", "menu.py", "__init__.py"):
        files[f"kobold_sp_plugin/{name}"] = b""
    about = {
        "kobold_sp_plugin-0.0.9.dist-info/METADATA": b"Metadata-Version: 2.1\nName: kobold_sp_plugin\nVersion: 0.0.9"
    }
    about["kobold_sp_plugin-0.0.9.dist-info/INSTALLER"] = payload.INSTALLED_BY
    monkeypatch.setattr(payload, "package", lambda: files)
    monkeypatch.setattr(payload, "own_metadata", lambda: about)


def test_installing_again_upgrades(host, monkeypatch):
    before = tree(host)
    with monkeypatch.context() as patches:
        older(patches)
        install.install(host)
    start(host, "import kobold_sp_plugin.old")
    done = install.install(host)
    assert done.before.complete and done.to_write() == []
    versions = [path.name for path in site_packages(host).glob("kobold_sp_plugin-*")]
    assert versions == [f"kobold_sp_plugin-{VERSION}.dist-info"]
    assert not list((site_packages(host) / "kobold_sp_plugin").rglob("old*"))
    assert install.status(host).intact
    again = tree(host)
    install.install(host)
    assert tree(host) == again
    install.uninstall(host)
    assert tree(host) == before


def test_a_missing_file_is_put_back(host):
    install.install(host)
    (site_packages(host) / "kobold_sp_koboldai.pth").unlink()
    found = install.status(host)
    assert not found.intact and not found.active
    install.install(host)
    assert install.status(host).intact


def test_what_the_user_has_changed_is_neither_overwritten_nor_removed(host):
    before = tree(host)
    install.install(host)
    changed = site_packages(host) / "kobold_sp_plugin" / "menu.py"
    changed.write_text("mine")
    assert install.status(host).record.changed() == [changed]
    now = tree(host)
    with pytest.raises(FileInTheWay, match=r"menu\.py would be overwritten"):
        install.install(host)
    assert tree(host) == now
    assert install.uninstall(host).changed == (changed,)
    assert changed.read_text() == "mine"
    assert set(tree(host)) - set(before) == {str(changed.relative_to(host)), str(changed.parent.relative_to(host))}


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_a_file_of_somebody_elses_is_not_overwritten(host, kind):
    path = site_packages(host) / "kobold_sp_koboldai.pth"
    {"file": lambda: path.write_text("other"), "folder": path.mkdir, "broken link": lambda: path.symlink_to("x")}[
        kind
    ]()
    before = tree(host)
    with pytest.raises(FileInTheWay, match=r"kobold_sp_koboldai\.pth"):
        install.install(host)
    assert install.status(host).plan.in_the_way() == [path]
    assert tree(host) == before


def test_what_was_there_before_in_the_same_words_stays(host):
    content = (HOOKS / "koboldai" / "kobold_sp_koboldai.py").read_bytes()
    (site_packages(host) / "kobold_sp_koboldai.py").write_bytes(content)
    before = tree(host)
    install.install(host)
    install.uninstall(host)
    assert tree(host) == before


def as_pip(host, version=VERSION):
    """Put the package into a host's environment as pip does."""
    place = site_packages(host)
    about = {f"kobold_sp_plugin-{version}.dist-info/METADATA": f"Name: kobold_sp_plugin\nVersion: {version}\n".encode()}
    about[f"kobold_sp_plugin-{version}.dist-info/INSTALLER"] = b"pip\n"
    for name, content in payload.with_record({**payload.package(), **about}).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


def test_a_package_that_pip_has_installed_is_used_and_left(host):
    as_pip(host)
    before = tree(host)
    done = install.install(host)
    assert done.is_there
    assert set(tree(host)) - set(before) >= {
        str((site_packages(host) / name).relative_to(host))
        for name in ("kobold_sp_koboldai.pth", "kobold_sp_koboldai.py")
    }
    assert install.status(host).intact and install.status(host).active
    install.uninstall(host)
    assert tree(host) == before


def test_another_release_that_pip_has_installed_is_left(host):
    as_pip(host, "0.0.1")
    before = tree(host)
    with pytest.raises(ForeignPackage, match=r"0\.0\.1, .*pip uninstall kobold_sp_plugin"):
        install.install(host)
    assert tree(host) == before


def test_a_package_that_pip_has_replaced_since_is_pips(host):
    install.install(host)
    as_pip(host)
    install.uninstall(host)
    start(host, "import kobold_sp_plugin.errors")
    assert not (site_packages(host) / "kobold_sp_koboldai.pth").exists()
    assert (site_packages(host) / "kobold_sp_plugin" / "menu.py").is_file()


def test_pip_can_remove_it_by_hand_and_python_starts_without_a_word(tmp_path):
    folder = tmp_path / "host"
    for name in KINDS["KoboldAI Client"]:
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    python = make_environment(folder / "venv", system_site_packages=True)  # which has pip
    before = tree(folder)
    install.install(folder)
    command = [
        str(python),
        "-B",
        "-m",
        "pip",
        "uninstall",
        "-q",
        "-y",
        "--disable-pip-version-check",
        "kobold_sp_plugin",
    ]
    subprocess.run(command, check=True, timeout=50)
    assert not list((folder / "venv").rglob("kobold_sp_*"))
    assert start(folder, place="venv").stderr == ""
    install.uninstall(folder)
    assert tree(folder) == before


def test_a_package_that_was_deleted_by_hand_does_no_harm(host):
    install.install(host)
    shutil.rmtree(site_packages(host) / "kobold_sp_plugin")
    assert start(host).stderr == ""
    (host / "flask_session.py").write_text("class Session: pass")
    done = start(host, "import flask_session; print(flask_session.Session)")
    assert "Session" in done.stdout
    assert re.fullmatch(r"kobold_sp_plugin stays out of this host: ModuleNotFoundError.*\n", done.stderr)


# Interruptions


@pytest.mark.parametrize("task", ["install", "upgrade", "uninstall"])
def test_a_kill_at_any_step_can_be_repeated_or_taken_back(host, task):
    script = Path(__file__).with_name("interrupted_install.py")
    command = [sys.executable, str(script), str(REPOSITORY), str(host), task]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 15


@pytest.mark.parametrize("allowed", [0, 1, 2, 30, 60])
def test_a_disk_that_is_full_leaves_nothing(host, monkeypatch, allowed):
    before = tree(host)
    own, left = install._write, [allowed]

    def write(path, content, **options):
        if not left[0]:
            path.with_name(path.name + ".kobold-sp").write_bytes(content[:1])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        left[0] -= 1
        own(path, content, **options)

    monkeypatch.setattr(install, "_write", write)
    with pytest.raises(ReadOnlyInstall, match=r"Nothing is installed: .*No space left on device"):
        install.install(host)
    assert tree(host) == before


READ_ONLY = """
import sys
sys.path.insert(0, sys.argv[1])
from kobold_sp_plugin.errors import ReadOnlyInstall
from kobold_sp_plugin.hosts import install
from pathlib import Path
try:
    install.install(Path(sys.argv[2]))
except ReadOnlyInstall as error:
    print(error)
"""


@pytest.mark.parametrize("place", [".", "runtime/envs/koboldai"])
def test_an_install_that_cannot_be_written_to_is_told_about_run(host, place):
    bound = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if bound and not shutil.which(bound[0]):
        pytest.skip("this user may write everywhere")
    closed = host if place == "." else site_packages(host)
    closed.chmod(0o555)
    before = tree(host)
    command = [*bound, sys.executable, "-c", READ_ONLY, str(REPOSITORY), str(host)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    closed.chmod(0o755)
    assert f"Nothing was changed: {closed} cannot be written to." in done.stdout, done.stderr
    assert "kobold-sp run aiserver.py" in done.stdout
    before[os.path.relpath(closed, host)] = tree(host).get(os.path.relpath(closed, host))
    assert tree(host) == {path: entry for path, entry in before.items() if entry}


def test_what_the_system_does_not_let_go_is_named_and_can_be_tried_again(host, monkeypatch):
    before = tree(host)
    install.install(host)
    held, own = site_packages(host) / "kobold_sp_plugin" / "menu.py", os.unlink

    def unlink(path, *arguments, **options):
        if Path(path) == held:
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
        own(path, *arguments, **options)

    with monkeypatch.context() as patches:
        patches.setattr(os, "unlink", unlink)
        assert install.uninstall(host).blocked == ((held, "The process cannot access the file"),)
    assert not (site_packages(host) / "kobold_sp_koboldai.pth").exists()
    assert install.uninstall(host).blocked == ()
    assert tree(host) == before


# The record


def damage(folder, change):
    path = folder / install.RECORD
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(format=2),
        lambda record: record.pop("files"),
        lambda record: record.update(files=["a"]),
        lambda record: record["files"].update({"../outside": [hashlib.sha256(b"").hexdigest()]}),
        lambda record: record["files"].update({"/tmp/outside": [hashlib.sha256(b"").hexdigest()]}),
        lambda record: record["folders"].append("runtime/../../outside"),
        lambda record: record["made"].append("../outside"),
        lambda record: record["files"].update({".": []}),
        lambda record: record.update(site_packages=None),
    ],
)
def test_a_damaged_record_is_named_and_nothing_is_removed_by_it(host, change):
    outside = host.parent / "outside"
    outside.touch()
    install.install(host)
    damage(host, change)
    before = tree(host.parent)
    for task in (install.install, install.uninstall):
        with pytest.raises(BadRecord, match=re.escape(install.RECORD)):
            task(host)
    assert install.RECORD in install.status(host).problem
    assert tree(host.parent) == before


def test_a_record_that_is_no_json_is_named(host):
    (host / install.RECORD).write_bytes(b"\xff")
    with pytest.raises(BadRecord, match="is damaged"):
        install.uninstall(host)


# watchdog


def test_without_watchdog_it_is_installed_all_the_same(host, monkeypatch):
    monkeypatch.setattr(payload, "_own_watchdog", lambda _: None)
    done = install.install(host)
    assert done.watchdog is None and "no pip" in done.without_watchdog
    assert install.status(host).intact


def test_the_watchdog_that_runs_here_is_put_where_none_is(host):
    before = tree(host)
    done = install.install(host)
    assert done.watchdog == metadata.version("watchdog")
    code = "import watchdog.events, watchdog.utils, importlib.metadata as m; print(m.version('watchdog'))"
    assert start(host, code).stdout.strip() == done.watchdog
    again = install.install(host)
    assert again.watchdog == done.watchdog and install.status(host).intact
    install.uninstall(host)
    assert tree(host) == before


def test_a_watchdog_of_the_hosts_own_stays(host):
    for name, content in payload.with_record(
        {"watchdog-2.1.0.dist-info/METADATA": b"Name: watchdog\nVersion: 2.1.0\n"}
    ).items():
        (site_packages(host) / name).parent.mkdir(exist_ok=True)
        (site_packages(host) / name).write_bytes(content)
    before = tree(host)
    assert install.install(host).watchdog is None
    install.uninstall(host)
    assert tree(host) == before


def watchdog_wheel(folder, names=("watchdog/__init__.py", "watchdog/py.typed")):
    about = "watchdog-2.1.9.dist-info"
    with zipfile.ZipFile(folder / "watchdog-2.1.9-py3-none-any.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, "")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: watchdog\nVersion: 2.1.9\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/entry_points.txt", "[console_scripts]\nwatchmedo = watchdog.watchmedo:main\n")
        wheel.writestr(f"{about}/RECORD", "")
    return folder / "watchdog-2.1.9-py3-none-any.whl"


def test_watchdog_is_downloaded_with_the_hosts_pip(tmp_path, monkeypatch):
    folder = make_host(tmp_path / "host")
    shutil.rmtree(folder / "runtime")
    make_environment(folder / "venv", system_site_packages=True)  # which has pip
    before = tree(folder)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(payload, "_own_watchdog", lambda _: None)
    assert install.install(folder).without_watchdog == "pip could not download it"
    install.uninstall(folder)
    watchdog_wheel(tmp_path / "index")
    assert install.install(folder).watchdog == "2.1.9"
    assert start(folder, "import importlib.metadata as m; print(m.version('watchdog'))", "venv").stdout == "2.1.9\n"
    install.uninstall(folder)
    assert tree(folder) == before


@pytest.mark.parametrize(
    "name", ["torch/__init__.py", "watchdog/../torch.py", "/watchdog/x.py", "watchdog/..\\x.py", "x.pth"]
)
def test_a_wheel_that_holds_anything_else_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="holds"):
        payload._unpacked(watchdog_wheel(tmp_path, [name]))


# The files that are dropped into a host


def test_the_hooks_files_are_the_ones_that_are_installed():
    names = {path.name for path in (HOOKS / "koboldai").iterdir() if path.is_file()}
    known = next(host for host in environments.HOSTS if host.hook == "koboldai")
    assert names == {*known.files, "install.bat", "install.sh"}
    assert (HOOKS / "koboldai" / "kobold_sp_koboldai.pth").read_text() == "import kobold_sp_koboldai\n"
    assert len((HOOKS / "koboldai" / "kobold_sp_koboldai.py").read_text().splitlines()) < 40


def test_a_start_of_python_imports_nothing_for_it(host):
    (site_packages(host) / "another.pth").write_text("# which Python reads, as it does in any host's environment\n")
    before = set(start(host, "import sys; print(*sys.modules)").stdout.split())
    install.install(host)
    after = set(start(host, "import sys; print(*sys.modules)").stdout.split())
    assert after - before == {"kobold_sp_koboldai"}


def make_wheel(folder):
    """The wheel as users get it."""
    path = folder / f"kobold_sp_plugin-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in payload.with_record({**payload.package(), **payload.own_metadata()}).items():
            wheel.writestr(name, content)
    return path


@pytest.fixture
def koboldai(tmp_path):
    """A host whose environment has what KoboldAI's has and installing needs: click."""
    folder = make_host(tmp_path / "Kobold AI ü")
    import click

    shutil.copytree(
        Path(click.__file__).parent, site_packages(folder) / "click", ignore=shutil.ignore_patterns("*.pyc")
    )
    shutil.copy(HOOKS / "koboldai" / "install.sh", folder)
    return folder


def double_click(folder, **environment):
    return subprocess.run(
        ["sh", str(folder / "install.sh")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        cwd="/",
        env={**os.environ, **environment},
    )


def test_install_sh_does_it_all_with_the_hosts_own_python(koboldai):
    make_wheel(koboldai)
    before = tree(koboldai)
    done = double_click(koboldai, PYTHONPATH=str(REPOSITORY / "tests"))
    assert done.returncode == 0, done.stdout
    assert "Installed. Start KoboldAI as always." in done.stdout and "runtime/envs/koboldai/bin/python" in done.stdout
    assert install.status(koboldai).intact and install.status(koboldai).active
    assert {path: entry for path, entry in tree(koboldai).items() if path in before} == before
    assert (site_packages(koboldai) / "kobold_sp_plugin/hooks/koboldai/install.sh").read_bytes() == (
        koboldai / "install.sh"
    ).read_bytes()
    install.uninstall(koboldai)
    assert tree(koboldai) == before


def test_install_sh_says_what_is_missing(koboldai):
    before = tree(koboldai)
    done = double_click(koboldai)
    assert done.returncode == 2 and "beside install.sh, then start it again" in done.stdout
    assert tree(koboldai) == before
    (koboldai / "aiserver.py").unlink()
    done = double_click(koboldai)
    assert done.returncode == 2 and "Copy install.sh into the folder with aiserver.py" in done.stdout


def test_install_bat_is_one_for_windows():
    content = (HOOKS / "koboldai" / "install.bat").read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 40
    lines = content.decode("ascii").splitlines()
    for line in lines:
        if line.startswith(("rem", "echo")) and "%" not in line:
            continue
        # A path may hold spaces and ampersands: what may be one stands in quotes.
        bare = re.sub(r'"[^"]*"', "", line)
        assert not re.search(r"%(~|HOST|WHEEL|DOWNLOAD|CD|TEMP|PATH|ANSWER)", bare), line
        assert line.count('"') % 2 == 0, line
    labels = {line[1:] for line in lines if line.startswith(":")}
    assert {goto for line in lines for goto in re.findall(r"goto (\w+)", line)} <= labels
    assert lines[-2:] == ["pause", "exit /B %RESULT%"]
    known = next(host for host in environments.HOSTS if host.hook == "koboldai")
    places = re.search(r"for %%P in \((.*)\) do", content.decode()).group(1)
    for place in re.findall(r'"(.*?)"', places):
        assert place.replace("\\", "/").replace("/Scripts", "") in known.environments


def test_both_scripts_run_the_same_program():
    texts = [(HOOKS / "koboldai" / name).read_text() for name in ("install.sh", "install.bat")]
    programs = [re.search(r"-c (['\"])(import sys;.*?\))\1", text).group(2).replace('"', "'") for text in texts]
    assert programs[0] == programs[1]
