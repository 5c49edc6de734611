import sys
import threading
import time

import pytest
import torch
import tqdm

tqdm.tqdm.monitor_interval = 0  # its progress bars leave a thread behind
torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """No thread and no import hook of ours outlives a test."""
    finders = our_finders()
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [each for each in threading.enumerate() if each not in before and each.is_alive()]
        if not left:
            break
        time.sleep(0.01)
    assert not left, f"threads left running: {left}"
    assert our_finders() == finders


def our_finders():
    return [each for each in sys.meta_path if type(each).__module__.startswith("kobold_sp_plugin")]
