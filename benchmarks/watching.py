"""How long after its writer has closed it a changed soft prompt is reported.

    python benchmarks/watching.py

Files are written, copied and saved (a temporary sibling, renamed) into a folder of 20 and of 2,000 soft
prompts. Measured from the writer's close, or rename, to the watcher's callback, and to the event at a
Socket.IO client of the embedded host, which is another process, as a browser is.
"""

import contextlib
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import socketio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.server.app import Server
from kobold_sp_plugin.session import Session
from kobold_sp_plugin.watch import watch

CHANGES = 120
LONGEST_WAIT = 10.0


def latencies(
    folder: Path, subscribe: Callable[[Callable[[], None]], Callable[[], None]], changes: int = CHANGES
) -> List[float]:
    """Seconds from the close of each of ``changes`` writers to the report of the change.

    ``subscribe(report)`` begins to watch ``folder``, in whatever way is measured; it has to call ``report()``
    when word of a change has arrived at its end, and returns a function that stops it.
    """
    rows = np.random.RandomState(0).randn(20, 768).astype(np.float32)
    with tempfile.TemporaryDirectory() as elsewhere:
        original = Path(elsewhere) / "original.zip"

        def write(path: Path) -> None:
            path.write_bytes(original.read_bytes())

        def copy(path: Path) -> None:
            shutil.copy2(original, path)

        def save(path: Path) -> None:
            SoftPrompt.load(original).save(path)

        arrived = threading.Event()
        unsubscribe = subscribe(arrived.set)
        measured = []
        try:
            for change in range(changes):
                writer = (write, copy, save)[change % 3]
                SoftPrompt(rows, {"name": f"Change {change}"}).save(original)
                time.sleep(0.3)  # what the last change may still cause is no answer to this one
                arrived.clear()
                writer(folder / f"changed-{change % 5}.zip")
                closed = time.perf_counter()
                if not arrived.wait(LONGEST_WAIT):
                    raise RuntimeError(f"no word of a change within {LONGEST_WAIT} s")
                measured.append(time.perf_counter() - closed)
        finally:
            unsubscribe()
    return measured


def report(what: str, measured: List[float]) -> None:
    """Print the distribution."""
    ordered = sorted(measured)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    middle = ordered[len(ordered) // 2]
    print(
        f"{what:34} {middle * 1e3:7.1f} ms median {p95 * 1e3:7.1f} ms 95th percentile {ordered[-1] * 1e3:7.1f} ms most"
    )


def run_client(url: str, events: Any) -> None:
    """A client in a process of its own: says over the pipe ``events`` that the menu's state has arrived."""
    # This client would check a text's UTF-8 byte by byte in Python, which no browser does.
    client = socketio.Client(websocket_extra_options={"skip_utf8_validation": True})
    client.on("softprompts", lambda status: events.send(len(status["entries"])))
    client.connect(url, transports=["websocket"])
    client.wait()


def client_of(folder: Path, report: Callable[[], None]) -> Callable[[], None]:
    """Connect a client to an embedded host of ``folder`` and have it report; what is returned ends both."""
    session = Session(folder)
    server = Server(session, port=0)
    server.start()
    session.watch()
    ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=run_client, args=(server.url, theirs), daemon=True)
    process.start()
    theirs.close()
    ours.recv()  # the state that every client is sent when it connects

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                ours.recv()
                report()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()

    def close() -> None:
        process.terminate()
        process.join()
        listener.join()
        server.close()
        session.close()

    return close


def main() -> None:
    """Measure and print."""
    for files in (20, 2000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            original = folder / "0.zip"
            SoftPrompt(np.ones((20, 768), dtype=np.float32)).save(original)
            for index in range(1, files):
                shutil.copyfile(original, folder / f"{index}.zip")

            def subscribe(report: Callable[[], None], folder: Path = folder) -> Callable[[], None]:
                return watch(folder, report).close

            def connect(report: Callable[[], None], folder: Path = folder) -> Callable[[], None]:
                return client_of(folder, report)

            report(f"to the callback, {files} files", latencies(folder, subscribe))
            report(f"to a client, {files} files", latencies(folder, connect))


if __name__ == "__main__":
    main()
