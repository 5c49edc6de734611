"""Time to the first token with a soft prompt in front of the text: ours, ``inputs_embeds``, PEFT's.

    python benchmarks/prefix.py

One process, one thread, float32, random weights, 12 layers of width 768. Every round lets each contender
generate one token, in rotating order, and takes the CPU time of that. Printed are the median and
quartiles, over the rounds, of its ratio to the same text without a soft prompt.

Before that it is checked that the forward pass which reads the prompt reads the text's positions only, that
64 greedy tokens and their logits are those without reuse, and how far bfloat16 is from float32 with reuse
and without.
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
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import SoftPrompt, attach

VOCABULARY, WIDTH = 8192, 768


def generate(model, new, **inputs):
    given = inputs.get("input_ids", inputs.get("inputs_embeds"))
    mask = torch.ones(given.shape[:2], dtype=torch.long)
    return model.generate(
        **inputs,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
    )


def contenders(model, rows, text):
    """Name -> what generates one token; the bare model without a soft prompt first."""
    ours, without = copy.deepcopy(model), copy.deepcopy(model)
    attach(ours).select(SoftPrompt(rows=rows))
    attach(without).select(SoftPrompt(rows=rows))
    without.register_forward_pre_hook(lambda module, args: None)  # a model that somebody has hooked is read as a whole

    table, front = model.get_input_embeddings(), torch.tensor(rows)[None]
    found = {
        "the same text, no soft prompt": lambda: generate(model, 1, input_ids=text),
        "kobold_sp_plugin": lambda: generate(ours, 1, input_ids=text),
        "kobold_sp_plugin, no reuse": lambda: generate(without, 1, input_ids=text),
        "inputs_embeds": lambda: generate(model, 1, inputs_embeds=torch.cat([front, table(text)], 1)),
    }
    try:
        from peft import PromptTuningConfig, get_peft_model
    except ImportError:
        print("peft is not installed: pip install 'kobold_sp_plugin[benchmark]'")
    else:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(rows))
        tuned = get_peft_model(copy.deepcopy(model), config).eval()
        with torch.no_grad():
            next(iter(tuned.prompt_encoder.values())).embedding.weight.copy_(torch.tensor(rows))
        found["PEFT PromptTuning"] = lambda: generate(tuned, 1, input_ids=text)
    return found


def check(model, rows, text):
    """Assert what reuse must not change, and print how far the precisions are apart."""
    ours = copy.deepcopy(model)
    handle = attach(ours)
    handle.select(SoftPrompt(rows=rows))
    read = []
    hook = ours.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    without = generate(ours, 64, input_ids=text)  # somebody's hook: no reuse
    assert read[0] == len(rows) + text.shape[1]
    hook.remove()
    generate(ours, 1, input_ids=text)
    forward, read = ours.model.layers[0].mlp.forward, []
    ours.model.layers[0].mlp.forward = lambda x: (read.append(x.shape[1]), forward(x))[1]
    having = generate(ours, 64, input_ids=text)
    assert read[0] == text.shape[1] and set(read[1:]) == {1}, read[:3]
    assert having.sequences.tolist() == without.sequences.tolist()
    whole = torch.stack(without.logits)
    worst = float((torch.stack(having.logits) - whole).abs().max())
    assert worst < 1e-4, worst
    print(f"float32: 64 greedy tokens equal, logits of up to {float(whole.abs().max()):.1f} agree to {worst:.1e}")

    far = {"with reuse": [], "without": []}
    half = copy.deepcopy(model).bfloat16()
    attach(half).select(SoftPrompt(rows=rows))
    hook = None
    for name in far:
        for seed in range(6):
            ids = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(seed))
            exact, rounded = (generate(each, 1, input_ids=ids).logits[0].float() for each in (ours, half))
            far[name].append(float((rounded - exact).norm() / exact.norm()))
        hook = hook or half.register_forward_pre_hook(lambda module, args: None)
    means = {name: statistics.mean(each) for name, each in far.items()}
    print("bfloat16, relative distance from float32:", ", ".join(f"{m:.2e} {name}" for name, m in means.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--n-tokens", type=int, default=100)
    parser.add_argument("--text", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=args.layers,
        num_attention_heads=12,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    rows = 0.02 * np.random.default_rng(0).standard_normal((args.n_tokens, WIDTH)).astype(np.float32)
    text = torch.randint(VOCABULARY, (1, args.text))
    check(model, rows, text)
    entries = list(contenders(model, rows, text).items())
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
                ratios[name].append(seconds / taken[entries[0][0]])
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}; {args.layers} layers of {WIDTH}, "
        f"{args.n_tokens} rows, {args.text} tokens of text, {args.rounds} rounds; "
        f"the text alone: {1e3 * statistics.median(base):.0f} ms of CPU to the first token"
    )
    print("\n| | time to the first token, ratio to the text alone | quartiles |\n|---|---|---|")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
