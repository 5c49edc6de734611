"""The memory that a training is said to need, against what it takes: in a process of its own, at its peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model, tiny_tokenizer

from kobold_sp_plugin import training

pytest.importorskip("transformers", "4.57")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="nothing tells the peak of this process alone"
    ),
]

CHILD = """
import json, re, sys
from pathlib import Path
import torch, transformers
from kobold_sp_plugin.training import Settings, Training, preflight
from kobold_sp_plugin.training.loading import load_model

def resident(field):  # ru_maxrss is no less than the parent's own
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

torch.set_num_threads(1)
before = resident("VmRSS")
given = json.loads(sys.argv[1])
settings = Settings(n_tokens=20, steps=3, held_out=0.2, **given["settings"])
config = transformers.AutoConfig.from_pretrained("model").to_dict()
stored = preflight._stored_bytes_per_weight(config)
count = sum(file.stat().st_size for file in preflight._weights(Path("model"))) / stored
told = preflight._needed(count, config, settings, given["precision"], stored, False)
model, tokenizer, _ = load_model("model", given["precision"])
text = "The door opened and the rain came in. " * 100
training = Training(model, tokenizer, [text] * 12, settings, Path("work"))
for _ in training.run():
    pass
print(json.dumps({"told": told, "taken": resident("VmHWM") - before}))
"""

LAYERS = {"num_hidden_layers": 6, "num_attention_heads": 6, "max_position_embeddings": 512}
GATED = {"hidden_size": 384, "intermediate_size": 1024, **LAYERS}
GPT2 = {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 512, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "family, options, precision, settings",
    [
        ("gpt2", {"vocab_size": 32000, **GPT2}, "auto", {"batch_tokens": 1100}),
        ("llama", {"vocab_size": 8000, **GATED}, "auto", {"batch_tokens": 3300}),
        ("llama", {"vocab_size": 8000, **GATED}, "auto", {"batch_tokens": 3300, "checkpoint_layers": True}),
        ("llama", {"vocab_size": 8000, **GATED}, "bfloat16", {"batch_tokens": 3300}),
        ("gemma2", {"vocab_size": 32000, **GATED, "head_dim": 64}, "auto", {"batch_tokens": 1100}),
    ],
    ids=["gpt2", "llama", "llama-checkpointed", "llama-bfloat16", "gemma2"],
)
def test_what_is_told_is_what_is_taken(tmp_path, family, options, precision, settings):
    stored = torch.bfloat16 if precision == "bfloat16" else torch.float32
    tiny_model(family, **options).to(stored).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(training.__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", CHILD, json.dumps({"precision": precision, "settings": settings})]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 < found["told"] / found["taken"] < 1.25
