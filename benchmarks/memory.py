"""A thousand selects and generations, and what they leave in the process.

    python benchmarks/memory.py [--times 1000] [--json FILE]

A random model (12 layers of width 256) reads a soft prompt of 100 rows, another at each turn, and generates a few
tokens, every fourth time with a prompt that it has read before. After a warm-up of one fifth of the turns the
resident memory has to stay where it is, within one part in a hundred. Beside it: what selecting one soft prompt and
reading it first adds, in tensors that can be counted, against its rows and the keys and values of its prefix.
Linux only (``/proc/self/statm``). Exit status 1 where a figure is missed.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import SoftPrompt, attach

LAYERS, WIDTH, VOCABULARY, N_TOKENS, TEXT = 12, 256, 4096, 100, 40
MOST_GROWTH = 0.01


def model_of():
    torch.manual_seed(0)
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 8, "vocab_size": VOCABULARY, "n_positions": 512}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config).eval()


def softprompt(seed):
    return SoftPrompt(rows=0.02 * np.random.default_rng(seed).standard_normal((N_TOKENS, WIDTH)).astype(np.float32))


def generate(model):
    ids = torch.randint(3, VOCABULARY, (1, TEXT), generator=torch.Generator().manual_seed(0))
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)


def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bytes_in_tensors():
    """Of all tensors that Python can reach, each storage once."""
    gc.collect()
    sizes = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            storage = getattr(each, "untyped_storage", each.storage)()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of()
    generate(model)
    before = bytes_in_tensors()
    handle = attach(model)
    handle.select(softprompt(10**6))
    generate(model)
    rows = (N_TOKENS + 2) * WIDTH * 4
    prefix = 2 * LAYERS * N_TOKENS * WIDTH * 4
    added = bytes_in_tensors() - before
    print(f"selected and read: {added / 2**20:.2f} MB; its rows and its prefix: {(rows + prefix) / 2**20:.2f} MB")

    warm = 0
    seen = []
    for turn in range(args.times):
        handle.select(softprompt(turn - turn % 4 if turn % 4 == 3 else turn))
        generate(model)
        if turn % max(1, args.times // 20) == 0:
            seen.append(resident())
        if turn == args.times // 5:
            warm = resident()
    end = resident()
    growth = end / warm - 1
    handle.clear()
    handle.detach()
    generate(model)
    left = bytes_in_tensors() - before
    print(f"{args.times} selects and generations: {warm / 2**20:.1f} MB after a fifth of them, {end / 2**20:.1f} MB at")
    print(f"the end ({growth:+.2%}; allowed {MOST_GROWTH:.0%}); tensors left after detach(): {left} bytes")
    print("on the way: " + ", ".join(f"{each / 2**20:.1f}" for each in seen))
    figures = {"added": added, "rows_and_prefix": rows + prefix, "growth": growth, "left": left}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    # The prefix's text is not kept: nothing but its rows, its keys and values.
    return int(abs(growth) > MOST_GROWTH or added > rows + prefix or left > 0)


if __name__ == "__main__":
    sys.exit(main())
