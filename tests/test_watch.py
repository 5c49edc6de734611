"""A folder that is watched: every change reported once, when it has settled."""

import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from kobold_sp_plugin import watch as watching
from kobold_sp_plugin.watch import watch

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells when a writer is done")


class Reports:
    """Counts calls, and waits for them."""

    def __init__(self):
        self._called = threading.Condition()
        self.count = 0

    def __call__(self):
        with self._called:
            self.count += 1
            self._called.notify_all()

    def wait_for(self, count, seconds=10.0):
        """Wait until there are ``count``, and a while longer for one too many."""
        with self._called:
            assert self._called.wait_for(lambda: self.count >= count, seconds), f"{self.count} of {count} reports"
        time.sleep(0.3)
        assert self.count == count


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "softprompts"
    path.mkdir()
    (path / "old.zip").write_bytes(b"old")
    return path


@pytest.fixture(params=["events", "polling"])
def watched(request, folder):
    """The folder and the reports of its changes, by either way of watching."""
    reports = Reports()
    with watch(folder, reports, poll=request.param == "polling", interval=0.15) as watcher:
        assert watcher.polls == (request.param == "polling")
        yield folder, reports
    assert not [thread for thread in threading.enumerate() if thread.name == "kobold-sp-watch"]


def test_every_kind_of_change_is_one_report(watched):
    folder, reports = watched
    (folder / "new.zip").write_bytes(b"content")
    reports.wait_for(1)
    (folder / "new.zip").write_bytes(b"other content")
    reports.wait_for(2)
    (folder / ".new.tmp").write_bytes(b"replaced")
    os.replace(folder / ".new.tmp", folder / "new.zip")
    reports.wait_for(3)
    (folder / "new.zip").rename(folder / "renamed.zip")
    reports.wait_for(4)
    shutil.copy2(folder / "renamed.zip", folder / "copied.zip")
    reports.wait_for(5)
    (folder / "renamed.zip").unlink()
    reports.wait_for(6)
    (folder.parent / "elsewhere.zip").write_bytes(b"moved in")
    (folder.parent / "elsewhere.zip").rename(folder / "moved.zip")
    reports.wait_for(7)
    (folder / "moved.zip").rename(folder.parent / "elsewhere.zip")
    reports.wait_for(8)


def test_a_folder_with_a_tensor(watched):
    folder, reports = watched
    (folder / "noir").mkdir()
    (folder / "noir" / "tensor.npy").write_bytes(b"tensor")
    (folder / "noir" / "meta.json").write_bytes(b"{}")
    reports.wait_for(1)
    (folder / "noir" / "meta.json").write_bytes(b'{"name": "Noir"}')
    reports.wait_for(2)
    shutil.rmtree(folder / "noir")
    reports.wait_for(3)


def test_the_folder_goes_and_comes_again(watched):
    folder, reports = watched
    shutil.rmtree(folder)
    reports.wait_for(1)
    folder.mkdir()
    (folder / "new.zip").write_bytes(b"new")
    reports.wait_for(2)
    (folder / "new.zip").write_bytes(b"newer content")
    reports.wait_for(3)


def test_another_folder_in_its_place(watched):
    folder, reports = watched
    folder.rename(folder.parent / "away")
    folder.mkdir()
    reports.wait_for(1)
    (folder / "new.zip").write_bytes(b"new")
    reports.wait_for(2)


def test_many_files_at_once_are_one_report(watched):
    folder, reports = watched
    for number in range(50):
        (folder / f"{number}.zip").write_bytes(b"x")
    reports.wait_for(1)


def test_what_is_no_change_is_not_reported(watched):
    folder, reports = watched
    (folder / "old.zip").read_bytes()
    (folder / ".hidden").write_bytes(b"x")
    (folder / "download.zip.part").write_bytes(b"x")
    (folder / "empty folder").mkdir()
    os.listdir(folder)
    time.sleep(0.6)
    assert reports.count == 0


@pytest.mark.parametrize("poll", [pytest.param(False, marks=LINUX, id="events"), pytest.param(True, id="polling")])
def test_a_slow_copy_is_reported_when_it_is_done(folder, poll):
    reports = Reports()
    with watch(folder, reports, poll=poll, interval=0.5), open(folder / "slow.zip", "wb") as file:
        for _ in range(6):
            file.write(b"a piece")
            file.flush()
            time.sleep(0.2)
            assert reports.count == 0
        (folder / "quick.zip").write_bytes(b"not held up by the slow one")
        if not poll:
            reports.wait_for(1)
        file.close()
        reports.wait_for(1 if poll else 2)


@LINUX
def test_a_closed_file_is_reported_at_once(folder):
    reports = Reports()
    with watch(folder, reports):
        waits = []
        for number in range(5):
            (folder / "new.zip").write_bytes(b"x" * number)
            start = time.monotonic()
            reports.wait_for(number + 1)
            waits.append(time.monotonic() - start - 0.3)
    assert sorted(waits)[2] < 0.3


def test_a_folder_that_is_not_there_yet(tmp_path):
    reports = Reports()
    with watch(tmp_path / "a" / "b", reports):
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "new.zip").write_bytes(b"new")
        reports.wait_for(1)


def test_a_callback_that_fails_is_called_again(folder, caplog):
    reports = Reports()

    def failing():
        reports()
        raise RuntimeError("no")

    with watch(folder, failing):
        (folder / "a.zip").write_bytes(b"a")
        reports.wait_for(1)
        (folder / "b.zip").write_bytes(b"b")
        reports.wait_for(2)
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2


def test_closing_from_inside_the_callback(folder):
    done = threading.Event()

    def close():
        watcher.close()
        done.set()

    watcher = watch(folder, close)
    (folder / "a.zip").write_bytes(b"a")
    assert done.wait(5)
    watcher.close()


def test_closing_is_quick_and_final(folder):
    reports = Reports()
    watcher = watch(folder, reports)
    (folder / "a.zip").write_bytes(b"a")
    start = time.monotonic()
    watcher.close()
    watcher.close()
    assert time.monotonic() - start < 2
    count = reports.count
    (folder / "b.zip").write_bytes(b"b")
    time.sleep(0.3)
    assert reports.count == count


def test_without_watchdog_it_polls(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "watchdog.observers", None)
    reports = Reports()
    with watch(folder, reports, interval=0.1) as watcher:
        assert watcher.polls
        (folder / "a.zip").write_bytes(b"a")
        reports.wait_for(1)


class Clock:
    """Stands for a watcher's waits: says how long each would be, and looks at once."""

    def __init__(self, monkeypatch, seconds_of_a_look=0.0):
        self.now, self.looks = 0.0, []
        monkeypatch.setattr(watching.time, "monotonic", lambda: self.now)
        stamps = watching.stamps

        def slow(folder):
            self.now += seconds_of_a_look
            self.looks.append(self.now)
            return stamps(folder)

        monkeypatch.setattr(watching, "stamps", slow)


@pytest.mark.parametrize(
    "seconds_of_a_look, on_network, slowest",
    [(0.001, False, 0.7), (0.008, False, 0.9), (0.1, False, 1.6), (0.001, True, 2.1)],
)
def test_how_soon_polling_reports_a_change_and_what_that_costs(
    folder, monkeypatch, seconds_of_a_look, on_network, slowest
):
    """By a clock of the test's own: seconds from a change that comes just after a look to its report."""
    monkeypatch.setitem(sys.modules, "watchdog.observers", None)
    monkeypatch.setattr(watching, "_is_on_network", lambda folder: on_network)
    reports = Reports()
    with watch(folder, reports) as watcher:
        assert watcher.polls
    clock = Clock(monkeypatch, seconds_of_a_look)
    idle = watcher._look()
    assert seconds_of_a_look <= idle * 0.021 or idle == 1.0
    (folder / "new.zip").write_bytes(b"new")
    start = clock.now
    clock.now += idle
    while not reports.count:
        assert clock.now - start < 10
        clock.now += watcher._look()
    assert clock.looks[-1] - start <= slowest and len(clock.looks) == 3


def test_where_the_system_refuses_it_polls(folder, monkeypatch):
    from watchdog.observers import Observer

    def refuse(self, *arguments, **options):
        raise OSError(24, "inotify instance limit reached")

    monkeypatch.setattr(Observer, "schedule", refuse)
    reports = Reports()
    with watch(folder, reports, interval=0.1) as watcher:
        assert watcher.polls
        (folder / "a.zip").write_bytes(b"a")
        reports.wait_for(1)


@pytest.mark.parametrize(
    "mounts, polls",
    [
        ("drive {} fuse.drive rw 0 0", True),
        ("server:/x {} nfs4 rw 0 0", True),
        ("//server/x {} cifs rw 0 0", True),
        ("/dev/sdb1 {} fuseblk rw 0 0", False),
        ("/dev/sda1 {} ext4 rw 0 0", False),
        ("server:/x {}er nfs4 rw 0 0", False),
        ("", False),
    ],
)
def test_network_drives_are_known_by_their_file_system(tmp_path, monkeypatch, mounts, polls):
    drive = tmp_path / "my drive"
    drive.mkdir()
    table = tmp_path / "mounts"
    escaped = str(drive).replace(" ", "\\040")
    table.write_text(f"/dev/sda1 / ext4 rw 0 0\n{mounts.format(escaped)}\n")
    monkeypatch.setattr(watching, "_MOUNTS", str(table))
    monkeypatch.setattr(sys, "platform", "linux")
    with watch(drive / "softprompts", Reports()) as watcher:
        assert watcher.polls == polls


@pytest.mark.skipif(find_spec("eventlet") is None, reason="eventlet is not installed")
def test_under_eventlet_nothing_hangs(tmp_path):
    """As in KoboldAI: socket, select and time are patched, threads are not."""
    script = """
        import eventlet
        eventlet.monkey_patch(all=True, thread=False, os=False)
        import signal, sys, time
        signal.alarm(40)
        from pathlib import Path
        from kobold_sp_plugin.watch import watch
        folder, reports = Path(sys.argv[1]), []
        watcher = watch(folder, lambda: reports.append(1))
        for number in range(3):
            (folder / f"{number}.zip").write_bytes(b"x")
            end = time.time() + 10
            while len(reports) == number and time.time() < end:
                eventlet.sleep(0.01)
        watcher.close()
        print(len(reports), watcher.polls)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        cwd=Path(__file__).parent.parent,
        timeout=50,
        check=False,
    )
    assert done.stdout.decode().split() == ["3", "False"], done.stderr.decode()
