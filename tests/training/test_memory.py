"""The memory that a training is said to need, against what it takes: in a process of its own, at its peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_model, tiny_tokenizer

from kobold_sp_plugin import training

psutil = pytest.importorskip("psutil")
pytest.importorskip("transformers", "4.57")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no resource module"),
]

CHILD = """
import json, resource, sys
from pathlib import Path
import psutil, torch, transformers
from kobold_sp_plugin.training import Settings, Training, preflight
from kobold_sp_plugin.training.loading import load_model

torch.set_num_threads(1)
before = psutil.Process().memory_info().rss
settings = Settings(n_tokens=20, steps=2, batch_tokens=1100, held_out=0.2)
config = transformers.AutoConfig.from_pretrained("model").to_dict()
stored = preflight._stored_bytes_per_weight(config)
count = sum(file.stat().st_size for file in preflight._weights(Path("model"))) / stored
told = preflight._needed(count, config, settings, "auto", stored, False)
model, tokenizer, _ = load_model("model", "auto")
text = "The door opened and the rain came in. " * 100
training = Training(model, tokenizer, [text] * 12, settings, Path("work"))
for _ in training.run():
    pass
taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) - before
print(json.dumps({"told": told, "taken": taken}))
"""


def test_what_is_told_is_what_is_taken(tmp_path):
    options = {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 512}
    model = tiny_model("gpt2", vocab_size=32000, tie_word_embeddings=True, **options)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(training.__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.75 < found["told"] / found["taken"] < 1.35
