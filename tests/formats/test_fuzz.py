"""Damaged files, some of them: whatever the damage, one of our errors or a soft prompt, soon and in little memory.

``tests/fuzz.py`` makes the damage; run by itself it makes as much of it as one likes.
"""

import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fuzz import KINDS, case, check

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.formats import FORMATS, load

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damaged_files(tmp_path, kind):
    read, refused = set(), set()
    names = {each.name for each in FORMATS}
    tracemalloc.start(1)
    try:
        for number in range(100):
            content = kind(random.Random(f"{kind.__name__} {number}"))
            tracemalloc.clear_traces()
            start = time.process_time()
            what = check(tmp_path / "damaged", content)
            assert time.process_time() - start < 1
            assert tracemalloc.get_traced_memory()[1] < 20e6
            (read if what in names else refused).add(what)
    finally:
        tracemalloc.stop()
    assert read and len(refused) > 1  # the damage is neither nothing nor everything


def test_what_survives_damage_can_be_saved_again(tmp_path):
    saved = 0
    for number in range(200):
        check(tmp_path / "damaged", case(random.Random(f"again {number}")))
        try:
            softprompt = load(tmp_path / "damaged")
        except Exception:
            continue
        softprompt.save(tmp_path / "again.zip")
        assert np.array_equal(SoftPrompt.load(tmp_path / "again.zip").rows, softprompt.rows)
        saved += 1
    assert saved


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_what_once_found_something(tmp_path, path):
    content = path.read_bytes()
    tracemalloc.start(1)
    try:
        check(tmp_path / "damaged", content)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
