"""Several processes that train together, started as a user starts them; on a CPU, over gloo."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILY, tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt, training
from kobold_sp_plugin.training import Settings, processes, train

ROOT = Path(training.__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.timeout(240),  # processes that each import all that training needs
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
TEXTS = [f"The door opened and the rain came in. Nobody said {a} {b}." for a in "abcdefgh" for b in "abcdefgh"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
OPTIONS = ("--data", "texts", "--tokens", 4, "--block", 32, "--batch-tokens", 200, "--seed", 3)


@pytest.fixture
def place(tmp_path):
    tiny_model(FAMILY).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")
    return tmp_path


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from models import FAMILY, tiny_model, tiny_tokenizer
from kobold_sp_plugin.training import Settings, processes, train
processes.join()
assert processes.count() == 2
settings = Settings(n_tokens=4, steps=12, block=32, batch_tokens=200, evaluate_every=3, save_every=2, learning_rate=0.1)

def trained(folder, on_progress=None):
    return train(tiny_model(FAMILY), tiny_tokenizer(), {texts!r}, settings, folder, on_progress=on_progress).rows

def interrupt(progress):
    if progress.step == 5:
        raise InterruptedError

rows = trained("whole")
try:
    trained("again", interrupt)
except InterruptedError:
    pass
steps = []
resumed = trained("again", steps.append)
assert [each.step for each in steps] == list(range(6, 13))
assert resumed.tobytes() == rows.tobytes()
if processes.is_first():
    np.save("rows.npy", rows)
processes.leave()
"""


@pytest.mark.slow
def test_two_processes_make_the_rows_of_one_also_when_they_are_interrupted(tmp_path):
    settings = Settings(
        n_tokens=4, steps=12, block=32, batch_tokens=200, evaluate_every=3, learning_rate=0.1, accumulate=2
    )
    alone = train(tiny_model(FAMILY), tiny_tokenizer(), TEXTS, settings).rows
    code = WORKER.format(tests=str(Path(__file__).resolve().parents[1]), texts=TEXTS)
    list(workers_of(code, tmp_path))
    assert np.allclose(np.load(tmp_path / "rows.npy"), alone, atol=1e-5)


SHARED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from kobold_sp_plugin.training import processes
from kobold_sp_plugin.training.loading import load_model
processes.join()
model, _, _ = load_model("model", "auto", True)
with torch.no_grad():
    model(torch.arange(8)[None])
kept = sum(each.to_local().numel() if hasattr(each, "to_local") else 0 for each in model.model.layers.parameters())
print("kept", kept, "of", sum(each.numel() for each in model.model.layers.parameters()))
processes.leave()
"""


@pytest.mark.slow
@pytest.mark.skipif(not processes.can_share(), reason="this torch has no fully_shard")
def test_of_a_shared_model_each_process_keeps_its_part(place):
    for worker in workers_of(SHARED.format(tests=str(Path(__file__).resolve().parents[1])), place):
        _, kept, _, whole = worker.split()
        assert int(kept) == int(whole) // 2 > 0


def workers_of(code, folder):
    """What two processes print that run ``code`` together."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        workers = []
        for rank in range(2):
            own = {**ENVIRONMENT, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            workers.append(
                stack.enter_context(subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=own, **pipes))
            )
            stack.callback(workers[-1].kill)
        for worker in workers:
            out, err = (each.decode(errors="replace") for each in worker.communicate(timeout=200))
            assert worker.returncode == 0, err[-3000:]
            yield out


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
class TestCommand:
    """As a user starts them."""

    def start(self, place, count, *arguments):
        together = ["-m", "torch.distributed.run", "--nproc_per_node", count, "--master_addr", "127.0.0.1"]
        begun = [*together, "--master_port", free_port(), "-m"] if count > 1 else ["-m"]
        command = [sys.executable, *begun, "kobold_sp_plugin.cli", "train", "--model", "model", *OPTIONS, *arguments]
        return subprocess.Popen(
            [str(each) for each in command], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finished(self, process):
        out, err = (each.decode(errors="replace") for each in process.communicate(timeout=200))
        assert process.returncode in (0, 1), err[-3000:]
        return out, err

    def test_one_speaks_and_writes_and_an_interruption_is_gone_on_from(self, place):
        out, _ = self.finished(self.start(place, 2, "--name", "two", "--steps", 40, "--json-lines"))
        events = [json.loads(line)["event"] for line in out.splitlines()]
        assert events.count("step") == 40 and events[-1] == "done", "the first one speaks, and no other"
        interrupted = self.start(place, 2, "--name", "again", "--steps", 40, "--json-lines")
        for line in interrupted.stdout:
            if b'"step": 5,' in line:
                interrupted.send_signal(signal.SIGTERM)
                break
        interrupted.communicate(timeout=120)
        assert not (place / "softprompts" / "again.zip").exists()
        out, _ = self.finished(self.start(place, 2, "--name", "again", "--steps", 40, "--json"))
        assert json.loads(out)["resumed_at"] >= 5
        two, again = (SoftPrompt.load(place / "softprompts" / f"{name}.zip").rows for name in ("two", "again"))
        assert again.tobytes() == two.tobytes()

    def test_a_model_that_is_shared_gives_the_rows_of_one_that_is_not(self, place):
        if not processes.can_share():
            pytest.skip("this torch has no fully_shard")
        for name, more in (("whole", ()), ("shared", ("--sharded",))):
            self.finished(self.start(place, 2, "--name", name, "--steps", 25, *more))
        whole, shared = (SoftPrompt.load(place / "softprompts" / f"{name}.zip").rows for name in ("whole", "shared"))
        assert np.allclose(shared, whole, atol=1e-5)

    def test_what_is_wrong_is_said_once(self, place):
        process = self.start(place, 2, "--name", "../..", "--steps", 3)
        _, err = process.communicate(timeout=200)
        assert process.returncode != 0 and err.decode().count("No file name can be made of the name") == 1
