"""Time to the first token in llama.cpp with a soft prompt of 100 rows in front of the text, and without.

    python benchmarks/llama_cpp.py [MODEL.gguf]

Needs llama-cpp-python. Without a file: random weights in float32, 8 layers of width 512. One process;
``OMP_NUM_THREADS`` says how many threads. Every round lets each contender generate one token after a text that was
not read before, in rotating order. Printed are medians, and the median over the rounds of the ratio to the same
text without a soft prompt: CPU time of the process, and wall time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # in place of this folder, where a library's name is this file's

from kobold_sp_plugin import SoftPrompt  # noqa: E402
from kobold_sp_plugin.engines import GenerationSettings  # noqa: E402
from kobold_sp_plugin.engines.llama_cpp import LlamaCppEngine  # noqa: E402

N_ROWS, N_TEXT = 100, 200


def made(folder):
    """A model of random weights, large enough that reading takes time."""
    import gguf_files

    gguf_files.WIDTH, gguf_files.LAYERS, gguf_files.HEADS, gguf_files.KEYS = 512, 8, 32, 16
    gguf_files.COMMON.update(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=16
    )
    return gguf_files.write(gguf_files.tiny("llama"), Path(folder) / "model.gguf")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = LlamaCppEngine(options.model or made(folder), context=512)
        rows = np.random.default_rng(0).normal(size=(N_ROWS, engine.facts().width)).astype(np.float32) * 0.05
        chosen = (SoftPrompt(rows),)
        words = ["the", "door", "rain", "and", "said", "was", "he", "she"]

        def first_token(number, softprompts, keep=True):
            if not keep:
                engine._kept = engine._story = type(engine._kept)()  # as if nothing were kept: the rows are read again
            text = " ".join([words[number % 8], *words[number // 8 % 8 :], *(["the rain"] * 200)])
            ids = engine._decoder.ids_of(text)[:N_TEXT]
            settings = GenerationSettings(engine._decoder.text_of(ids[1:]), max_length=1, temperature=0.0)
            wall, cpu = time.perf_counter(), time.process_time()
            list(engine.generate(settings, softprompts))
            return time.process_time() - cpu, time.perf_counter() - wall

        contenders = {
            "the same text, no soft prompt": lambda number: first_token(number, ()),
            "kobold_sp_plugin": lambda number: first_token(number, chosen),
            "without what is kept": lambda number: first_token(number, chosen, keep=False),
        }
        names = list(contenders)
        times = {name: [] for name in names}
        number = 0
        for turn in range(-1, options.rounds):
            for at in range(len(names)):
                name = names[(turn + at) % len(names)]
                number += 1
                took = contenders[name](number)
                if turn >= 0:
                    times[name].append(took)
        plain = times[names[0]]
        print(f"{N_ROWS} rows, {N_TEXT} tokens of text, {options.rounds} rounds")
        for name in names:
            ratios = [
                statistics.median(mine[kind] / other[kind] for mine, other in zip(times[name], plain))
                for kind in (0, 1)
            ]
            cpu, wall = (statistics.median(each[kind] for each in times[name]) * 1000 for kind in (0, 1))
            print(f"{name:32} {cpu:7.1f} ms CPU  {wall:7.1f} ms wall   ratio {ratios[0]:.2f} CPU, {ratios[1]:.2f} wall")
        engine.close()


if __name__ == "__main__":
    main()
