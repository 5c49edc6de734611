"""Time to the first token of a story that grows by a paragraph a turn: with conversation reuse, and reading all again.

    python benchmarks/conversation.py

One process, one thread, float32, a random model of 4,096 tokens of context, and the engine of the embedded host.
Two copies of the model write the same story in turn, one of them with reuse, the other as every host does it: the
whole text is read at each turn. Printed are, of CPU and wall time to the first token:

- the second turn of a story of 2,000 tokens, as a ratio to the first turn, over several stories;
- twenty turns past a full context, as a ratio to reading everything again at the same turn.

Before that it is checked that both write the same, in float32, and that each turn forwards what is new and no more.
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.engines import GenerationSettings
from kobold_sp_plugin.engines.transformers import TransformersEngine

VOCABULARY, CONTEXT, NEW, SAID = 2048, 4096, 80, 40


def tokenizer():
    """One token for each word w0, w1, ...: what is generated is read again as the same tokens."""
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def words(random, n):
    return " ".join(f"w{number}" for number in random.integers(VOCABULARY, size=n))


class Side:
    """One copy of the model, and what it took: CPU and wall seconds to the first token, positions read."""

    def __init__(self, model, rows, name):
        self.model = copy.deepcopy(model)
        self.handle = attach(self.model)
        self.engine = TransformersEngine(self.model, tokenizer(), name)
        self.softprompts = [SoftPrompt(rows)]
        self.forgets = name == "reading all again"
        self.forwards = []
        inner = self.model.model.layers[0].mlp.forward

        def counted(x):
            self.forwards.append((x.shape[1], time.process_time(), time.perf_counter()))
            return inner(x)

        self.model.model.layers[0].mlp.forward = counted  # a hook would switch reuse off

    def turn(self, story, new=NEW):
        """(text, (CPU seconds, wall seconds) to the end of the first token, positions of the first forward pass)."""
        if self.forgets:
            self.handle.forget()
        self.forwards.clear()
        settings = GenerationSettings(story, max_length=new, temperature=0.0)
        began = time.process_time(), time.perf_counter()
        text = "".join(self.engine.generate(settings, self.softprompts))
        # The second forward pass begins when the first token is there.
        read = [each for each in self.forwards if each[0] > 1] or self.forwards[:1]
        second = self.forwards[self.forwards.index(read[0]) + 1]
        return text, (second[1] - began[0], second[2] - began[1]), read[0][0]


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} | {low:.3f} to {high:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--stories", type=int, default=5)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--n-tokens", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    rows = 0.02 * np.random.default_rng(0).standard_normal((args.n_tokens, args.width)).astype(np.float32)
    reused, again = Side(model, rows, "reuse"), Side(model, rows, "reading all again")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}; {args.layers} layers of {args.width}, "
        f"{args.n_tokens} rows; a turn is {NEW} new tokens and {SAID} of the user's"
    )
    random = np.random.default_rng(1)

    for side in (reused, again):  # warm up
        side.turn(words(random, 200), 4)
    second = {"reuse": [], "reading all again": []}
    for number in range(args.stories):
        story = words(random, 2000)
        written = {}
        sides = [("reuse", reused), ("reading all again", again)]
        for name, side in sides[:: 1 if number % 2 else -1]:
            side.handle.forget()
            text, first, _ = side.turn(story)
            said = words(np.random.default_rng(number), SAID)
            text_2, then, read = side.turn(f"{story}{text} {said}")
            written[name] = (text, text_2)
            second[name].append([t / f for t, f in zip(then, first)])
            assert read == (SAID + 1 if name == "reuse" else 2000 + NEW + SAID), read
        assert written["reuse"] == written["reading all again"]
    print("\n| second turn of 2,000 tokens, ratio to the first | CPU | quartiles | wall | quartiles |")
    print("|---|---|---|---|---|")
    for name, values in second.items():
        print(f"| {name} | {quartiles([cpu for cpu, _ in values])} | {quartiles([wall for _, wall in values])} |")

    story = words(random, CONTEXT)
    ratios, counts = [], []
    reused.handle.forget()
    reused.turn(story, 4)
    for number in range(args.turns):
        story += " " + words(random, SAID)
        sides = [reused, again] if number % 2 else [again, reused]
        taken = {side: side.turn(story) for side in sides}
        assert taken[reused][0] == taken[again][0], f"turn {number}"
        story += taken[again][0]
        counts.append(taken[reused][2])
        ratios.append([mine / whole for mine, whole in zip(taken[reused][1], taken[again][1])])
    print(f"\n| {args.turns} turns past a full context | CPU | quartiles | wall | quartiles |\n|---|---|---|---|---|")
    cpu, wall = zip(*ratios)
    print(f"| ratio to reading all again | {quartiles(cpu)} | {quartiles(wall)} |")
    print(f"| mean of the ratios | {statistics.mean(cpu):.3f} | | {statistics.mean(wall):.3f} | |")
    print(f"\npositions read at each of these turns: {counts}")


if __name__ == "__main__":
    main()
