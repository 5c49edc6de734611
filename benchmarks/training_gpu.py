"""Training over a 7-billion-parameter Llama shape on a GPU: speed, share of the chip's matrix peak, longest context.

    python benchmarks/training_gpu.py

Random weights in bfloat16, 20 rows, batches as they are found by trial. Printed, for texts of 512 and 2,048 tokens:
the tokens per second, soft ones included, the median of the timed steps; and the arithmetic that these tokens need
(forward, and backward to the inputs: the weights are frozen) as a share of what the chip reaches in a large product of
matrices, measured here, and of --peak, if it is given in TFLOP/s. Then the longest text of which one fits, without and
with gradient checkpointing, to within a sixteenth, and up to 131,072 tokens: longer ones take minutes each.

`--shape tiny` runs the same on a CPU, to try the script; its figures say nothing.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training import ROWS, Numbers

WARM_UP, TIMED = 3, 10
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
}
VOCABULARY = 32000
TOKENS, LONGEST = 2**20, 2**17
"""Of all texts: of little data the trainer makes small batches. And of the longest text that is looked for."""


def model_of(shape, device):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2**20, **SHAPES[shape])
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def matrix_peak(device, size):
    """FLOP/s of a product of two square matrices in bfloat16, the best of ten."""
    import torch

    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(12):
        began = time.perf_counter()
        float((one @ other)[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def needed(model, length):
    """FLOP of a token in a text of ``length``: forward, and backward to the inputs."""
    config = model.config
    weights = sum(each.numel() for each in model.parameters()) - model.get_input_embeddings().weight.numel()
    # Two products of the causal half of the attention forward, and the four that their gradients need.
    return 4 * weights + 3 * 2 * config.num_hidden_layers * config.hidden_size * length


def trained(model, length, texts, steps, **options):
    """Seconds of each of ``steps`` steps on texts of ``length`` tokens, and tokens of a step."""
    import numpy as np

    from kobold_sp_plugin.training import Settings, Training
    from kobold_sp_plugin.training.dataset import Dataset
    from kobold_sp_plugin.training.texts import Passage

    settings = Settings(n_tokens=ROWS, steps=steps, block=length, held_out=0.0, save_every=10**6, **options)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (texts, length))
    with tempfile.TemporaryDirectory() as folder:
        passages = [Passage(((" ".join(map(str, text)), True),), "") for text in ids]
        dataset = Dataset.write(passages, Numbers(), Path(folder), length)
        training = Training(model, Numbers(), dataset, settings, Path(folder))
        try:
            per_step = max(1, training.batch_tokens // (length + ROWS)) * (length + ROWS)
            took, began = [], time.perf_counter()
            for _ in training.run():  # each step reads the loss, and so waits for the device
                took.append(time.perf_counter() - began)
                began = time.perf_counter()
        finally:
            training.close()
    return took, per_step


def fits(model, length, checkpoint_layers, device):
    import torch

    try:
        trained(model, length, 1, 1, batch_tokens=length + ROWS, checkpoint_layers=checkpoint_layers)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()  # what an error keeps is kept in circles
        if device == "cuda":
            torch.cuda.empty_cache()


def longest(model, checkpoint_layers, device, most):
    """The longest text of which a step fits, to within a sixteenth; looked for up to ``most``."""
    low = 1024
    while low < most and fits(model, 2 * low, checkpoint_layers, device):
        low *= 2
    for part in (low // 2, low // 4, low // 8, low // 16):
        if low < most and fits(model, low + part, checkpoint_layers, device):
            low += part
    return low


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--peak", type=float, help="the chip's matrix peak by its data sheet, in TFLOP/s")
    args = parser.parse_args()

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.shape != "tiny":
        parser.error("there is no GPU; --shape tiny tries the script on a CPU")
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}, {args.shape}\n")
    best = matrix_peak(device, 8192 if device == "cuda" else 256)
    model = model_of(args.shape, device)
    print(f"Product of matrices: {best / 1e12:.4g} TFLOP/s\n")
    print("| text | tokens of a step | s/step | tokens/s | share of the product's | of --peak |\n" + "|---" * 6 + "|")
    for length in (512, 2048):
        took, per_step = trained(model, length, TOKENS // length if device == "cuda" else 4, WARM_UP + TIMED)
        middle = statistics.median(took[WARM_UP:])
        rate = per_step / middle
        reached = rate * needed(model, length)
        of_peak = f"{reached / args.peak / 1e12:.0%}" if args.peak else ""
        cells = [str(length), str(per_step), f"{middle:.3f}", f"{rate:.0f}", f"{reached / best:.0%}", of_peak]
        print("| " + " | ".join(cells) + " |", flush=True)
    print("\n| gradient checkpointing | longest text |\n|---|---|")
    most = LONGEST if device == "cuda" else 2048
    for checkpoint_layers in (False, True):
        found = longest(model, checkpoint_layers, device, most)
        print(f"| {'yes' if checkpoint_layers else 'no'} | {found}{' or more' * (found >= most)} |", flush=True)


if __name__ == "__main__":
    main()
