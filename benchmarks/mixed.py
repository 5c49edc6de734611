"""Throughput of a batch in which every row has a soft prompt of its own, against a batch that shares one.

    python benchmarks/mixed.py

One process, one thread, float32, random weights. Every round lets each contender generate for a batch of 8
texts, in rotating order, and takes the CPU time of that. Printed are the median and quartiles, over the rounds,
of its throughput as a ratio to that of 8 texts with one and the same soft prompt in front. What a user would
do instead, with PEFT or KoboldAI, whose soft prompt is that of the whole batch, is one row after the other.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.demonstration import MODEL
from kobold_sp_plugin.soft_tokens import with_softprompts

ROWS = 8
STORY = "The door opened and the rain came in. Nobody said a word; the clock on the wall had stopped. "


def contenders(model, softprompts, text, new):
    """Name -> what generates ``new`` tokens behind ``text`` for each of 8 rows; the one that shares first."""
    tokenizer = with_softprompts(AutoTokenizer.from_pretrained(str(MODEL)))
    ours, whole = copy.deepcopy(model), copy.deepcopy(model)
    attach(ours)
    attach(whole)
    whole.register_forward_pre_hook(lambda module, args: None)  # a model that somebody has hooked is read as a whole

    def generate(model, texts):
        inputs = tokenizer(texts, return_tensors="pt")
        result = model.generate(
            **inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None
        )
        assert result.shape == (len(texts), inputs["input_ids"].shape[1] + new)

    same = [softprompts[0] + text] * ROWS
    different = [each + text for each in softprompts]
    return {
        "8 rows, one soft prompt": lambda: generate(ours, same),
        "8 rows, 8 soft prompts": lambda: generate(ours, different),
        "8 rows, one soft prompt, no reuse": lambda: generate(whole, same),
        "8 soft prompts, row by row": lambda: [generate(ours, [each]) for each in different],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--n-tokens", type=int, default=20)
    parser.add_argument("--new", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        max_position_embeddings=2048,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    generator = np.random.default_rng(0)
    softprompts = [
        SoftPrompt(0.02 * generator.standard_normal((args.n_tokens, args.width)).astype(np.float32))
        for _ in range(ROWS)
    ]
    text = STORY * 3
    entries = list(contenders(model, softprompts, text, args.new).items())
    ratios = {name: [] for name, _ in entries}
    base = []
    for number in range(args.rounds + 2):
        shift = number % len(entries)
        taken = {}
        for name, act in entries[shift:] + entries[:shift]:
            began = time.thread_time()
            act()
            taken[name] = time.thread_time() - began
        if number >= 2:  # two rounds to warm up
            base.append(taken[entries[0][0]])
            for name, seconds in taken.items():
                ratios[name].append(taken[entries[0][0]] / seconds)
    n_text = len(AutoTokenizer.from_pretrained(str(MODEL))(text)["input_ids"])
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}; {args.layers} layers of {args.width}, "
        f"{args.n_tokens} rows a soft prompt, {n_text} tokens of text, {args.new} new ones, {args.rounds} rounds; "
        f"a batch with one soft prompt: {statistics.median(base):.2f} s of CPU"
    )
    print("\n| | throughput, ratio to a batch with one soft prompt | quartiles |\n|---|---|---|")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
