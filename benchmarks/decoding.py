"""What a soft prompt costs per generated token: ours, PEFT's, and a class-wide embedding patch.

    python benchmarks/decoding.py

One process, one thread, float32, random weights. Every round generates the same number of tokens with
each contender, in rotating order. A round's figure is the median CPU time of its decode steps; printed
are the median and quartiles, over the rounds, of its ratio to the bare model with as many ordinary
tokens in front of the text.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import SoftPrompt, attach

VOCABULARY, WIDTH = 8192, 384


class StepClock(LogitsProcessor):
    """CPU seconds of this thread between one step of ``generate`` and the next."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores):
        self.times.append(time.thread_time())
        return scores


@contextmanager
def class_wide_patch(rows):
    """KoboldAI's way, in our words: every embedding of the process looks for ids past its end at every call."""
    call = torch.nn.Embedding.__call__
    table = torch.tensor(rows)

    def patched(self, ids, *args, **kwargs):
        own = self.num_embeddings
        embedded = call(self, ids.clamp(max=own - 1), *args, **kwargs)
        soft = table.to(embedded.dtype).to(embedded.device)
        return torch.where((ids >= own).unsqueeze(-1), soft[(ids - own).clamp(min=0, max=len(soft) - 1)], embedded)

    torch.nn.Embedding.__call__ = patched
    try:
        yield
    finally:
        del torch.nn.Embedding.__call__


def contenders(model, rows, text):
    """Name -> (model, ids, context manager), the bare one first."""
    n_tokens = len(rows)
    hard = torch.randint(VOCABULARY, (1, n_tokens))
    ours = copy.deepcopy(model)
    attach(ours).select(SoftPrompt(rows=rows))
    past_the_end = torch.arange(VOCABULARY, VOCABULARY + n_tokens).unsqueeze(0)
    found = {
        "bare model, ordinary tokens in front": (model, torch.cat([hard, text], 1), nullcontext),
        "kobold_sp_plugin": (ours, text, nullcontext),
        "class-wide embedding patch": (
            copy.deepcopy(model),
            torch.cat([past_the_end, text], 1),
            lambda: class_wide_patch(rows),
        ),
    }
    try:
        from peft import PromptTuningConfig, get_peft_model
    except ImportError:
        print("peft is not installed: pip install 'kobold_sp_plugin[benchmark]'")
    else:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n_tokens)
        tuned = get_peft_model(copy.deepcopy(model), config).eval()
        with torch.no_grad():
            next(iter(tuned.prompt_encoder.values())).embedding.weight.copy_(torch.tensor(rows))
        found["PEFT PromptTuning"] = (tuned, text, nullcontext)
    return found


def step_seconds(model, ids, patched, n_new):
    """Median CPU seconds of a decode step; the first step reads the prompt and is left out."""
    clock = StepClock()
    with patched():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n_new,
            logits_processor=LogitsProcessorList([clock]),
        )
    assert len(clock.times) == n_new
    return statistics.median(np.diff(clock.times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--n-tokens", type=int, default=20)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--new", type=int, default=33)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=args.layers,
        num_attention_heads=6,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    rows = 0.02 * np.random.default_rng(0).standard_normal((args.n_tokens, WIDTH)).astype(np.float32)
    entries = list(contenders(model, rows, torch.randint(VOCABULARY, (1, args.text))).items())
    ratios = {name: [] for name, _ in entries}
    base = []
    for number in range(args.rounds + 2):
        shift = number % len(entries)
        taken = {name: step_seconds(*entry, args.new) for name, entry in entries[shift:] + entries[:shift]}
        if number >= 2:  # two rounds to warm up
            base.append(taken[entries[0][0]])
            for name, seconds in taken.items():
                ratios[name].append(seconds / taken[entries[0][0]])
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}; {args.layers} layers of {WIDTH}, "
        f"{args.n_tokens} rows, {args.text} tokens of text, {args.rounds} rounds; "
        f"a bare decode step: {1e3 * statistics.median(base):.2f} ms of CPU"
    )
    print("\n| | CPU time of a decode step, ratio to bare | quartiles |\n|---|---|---|")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
