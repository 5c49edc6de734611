"""Kills an install (or upgrade, or uninstall) before each of its changes, and repeats it or takes it back.

Run by ``test_install.py``: the repository, the folder of a made-up host, and the task. Says how many steps there were.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import pytest
import test_install as tests

from kobold_sp_plugin.hosts import install, payload

folder, task = Path(sys.argv[2]), sys.argv[3]
wanted = ("hooks/koboldai/kobold_sp_koboldai.pth", "hooks/koboldai/kobold_sp_koboldai.py", "__init__.py", "menu.py")
few = {name: content for name, content in payload.package().items() if name[len("kobold_sp_plugin/") :] in wanted}
environment = install.environment_of(folder)[1]
install._environment = lambda *_: environment  # which is asked once: starting it is slow
payload.watchdog = lambda _: payload.Watchdog(None, {}, "")
os.fsync = lambda _: None  # a kill loses nothing that was written, and this is slow
pristine = tests.tree(folder)


payload.package = lambda: few


def prepare():
    """What the task that is to be killed finds."""
    if task != "install":
        with pytest.MonkeyPatch.context() as patches:
            if task == "upgrade":
                tests.older(patches)
            install.install(folder)


def killed(steps):
    """Whether the task was killed before it had changed the file system more often than that."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status == 0 or os.WIFSIGNALED(status)
        return status != 0
    left = [steps]

    def deadly(function):
        def call(*arguments, **options):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **options)

        return call

    def opened(path, mode="r"):
        file = open(path, mode)  # noqa: SIM115
        if "w" in mode and not left[0]:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= "w" in mode
        return file

    install.open = opened
    for name in ("replace", "unlink", "mkdir", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    (install.uninstall if task == "uninstall" else install.install)(folder)
    os._exit(0)


steps, going = 0, True
while going:
    for again in (False, True):
        prepare()
        going = killed(steps)
        site = tests.site_packages(folder)
        there = {name: (site / name).read_bytes() for name in few if (site / name).exists()}
        older = {**few, "kobold_sp_plugin/menu.py": b"", "kobold_sp_plugin/__init__.py": b""}
        is_whole = there in (few, older)  # not some files of the one release and some of the other
        assert is_whole or not (site / "kobold_sp_koboldai.pth").exists(), steps
        if again:
            install.install(folder)
            record = install.Record.load(folder)
            assert record.complete and not record.changed() and not record.missing(), steps
            assert not [path for path in tests.tree(folder) if path.endswith(".kobold-sp")], steps
        install.uninstall(folder)
        assert tests.tree(folder) == pristine, (steps, again, sorted(set(tests.tree(folder)) ^ set(pristine)))
    steps += 1
print(steps)
