"""Training speed and memory against PEFT's PromptTuning in the Hugging Face Trainer.

    python benchmarks/training.py

Six layers of width 384, a vocabulary of 50,257, random weights, float32, on the CPU; 20 rows, batches of 4 texts of
256 tokens. Both sides learn from the same rows, on the same batches, with the same AdamW. Each side is a process of
its own, and they take turns, a step each; printed are, for each shape and number of threads, the medians of a step,
the ratios of tokens per second by CPU time and by wall time (the median over the steps of their ratio), how far the
two loss curves are apart at most, and the peak of resident memory: in all, and above what the process had before its
first step, with its model loaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

VOCABULARY, WIDTH, LAYERS = 50257, 384, 6
ROWS, BATCH, LENGTH = 20, 4, 256
RATE = 0.1
"""In units of the embedding matrix's root mean square."""
WARM_UP = 2
"""Steps of which no time is taken."""


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}

    def __len__(self):
        return VOCABULARY


def model_of(shape):
    import torch
    import transformers

    torch.manual_seed(0)
    if shape == "gpt2":
        options = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 6, "n_positions": 1024}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **options, **no_dropout))
    options = {"hidden_size": WIDTH, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "num_attention_heads": 6}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **options)
    return transformers.LlamaForCausalLM(config)


def dataset_of(steps, folder):
    """Texts of exactly 256 ids, frequent ones frequent, as in a language."""
    import numpy as np

    from kobold_sp_plugin.training.dataset import Dataset
    from kobold_sp_plugin.training.texts import Passage

    ids = np.minimum(np.random.default_rng(0).zipf(1.2, (steps * BATCH, LENGTH)), VOCABULARY) - 1
    passages = [Passage(((" ".join(map(str, text)), True),), "") for text in ids]
    return Dataset.write(passages, Numbers(), Path(folder), LENGTH)


def initial_rows(model):
    import numpy as np

    weight = model.get_input_embeddings().weight.detach().numpy()
    return weight[np.random.default_rng(1).choice(5000, ROWS)].copy()


def ours(model, dataset, steps, folder, after_step):
    from kobold_sp_plugin import SoftPrompt
    from kobold_sp_plugin.training import Settings, Training

    settings = Settings(n_tokens=ROWS, steps=steps, block=LENGTH, held_out=0.0, **shared(), save_every=10**6)
    start = SoftPrompt(initial_rows(model))
    training = Training(model, Numbers(), dataset, settings, Path(folder), start)
    run = training.run()
    after_step(None)
    for progress in run:
        after_step(progress.loss)


def shared():
    """What both sides are told, a constant learning rate among it."""
    return {
        "optimizer": "adamw",  # Trainer's
        "learning_rate": RATE,
        "batch_tokens": BATCH * (LENGTH + ROWS),
        "warmup": 0.0,
        "final": 1.0,
        "clip": 1.0,
        "seed": 0,
    }


def peft(model, dataset, steps, folder, after_step):
    import torch
    from peft import PromptTuningConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from kobold_sp_plugin.training.trainable import unit_of

    losses = []

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            after_step(None)

        def on_step_end(self, *args, **kwargs):
            after_step(losses[-1])

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS))
    with torch.no_grad():
        next(iter(tuned.prompt_encoder.values())).embedding.weight.copy_(torch.tensor(initial_rows(model)))
    told = shared()
    # Our rows are in units of the matrix's root mean square: the same step, clip and epsilon in the matrix's own.
    unit = unit_of(model.get_input_embeddings())
    pieces = [piece for batch in in_order(dataset, told) for piece in batch]
    texts = [{"input_ids": ids, "labels": ids} for ids in (dataset.batch([piece]).ids[0] for piece in pieces)]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=told["learning_rate"] * unit,
        adam_epsilon=1e-8 / unit,
        max_grad_norm=told["clip"] / unit,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        seed=told["seed"],
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = InOrder(model=tuned, args=arguments, train_dataset=texts, callbacks=[Turns()])
    # Trainer counts a text's tokens but for its first, which PEFT's rows do predict: the model's own mean is over all.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()


def in_order(dataset, told):
    """The batches of our first epoch."""
    return dataset.batches(range(len(dataset)), told["batch_tokens"], ROWS, f"{told['seed']}:0")


def worker(side, shape, threads, steps):
    """One side: a line of JSON on the standard output after each step, and a line read before the next."""
    import resource
    import warnings

    import psutil
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints
    model, before = model_of(shape), 0
    began = [0.0, 0.0]

    def after_step(loss):
        nonlocal before
        took = [time.process_time() - began[0], time.perf_counter() - began[1]]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if loss is None:
            before = psutil.Process().memory_info().rss
        told = {"loss": loss, "cpu": took[0], "wall": took[1], "peak": peak, "before": before}
        os.write(out, json.dumps(told).encode() + b"\n")
        if not sys.stdin.readline():
            sys.exit("the other side of the pipe is gone")
        began[:] = time.process_time(), time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        dataset = dataset_of(steps, folder)
        SIDES[side](model, dataset, steps, folder, after_step)


SIDES = {"kobold_sp_plugin": ours, "PEFT": peft}


def compare(shape, threads, steps):
    """What both sides told of each step, their first line (before any) left out."""
    processes = {
        side: subprocess.Popen(
            [sys.executable, __file__, "--worker", side, "--shapes", shape, f"--threads={threads}", f"--steps={steps}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        for side in SIDES
    }
    told = {side: [json.loads(process.stdout.readline())] for side, process in processes.items()}
    for number in range(steps):
        for side in list(SIDES)[:: 1 if number % 2 else -1]:
            processes[side].stdin.write(b"\n")
            processes[side].stdin.flush()
            told[side].append(json.loads(processes[side].stdout.readline()))
    for process in processes.values():
        process.communicate(b"\n")
    return {side: lines[1:] for side, lines in told.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "llama"], choices=["gpt2", "llama"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.shapes[0], args.threads[0], args.steps)
        return
    print(f"{LAYERS} layers of {WIDTH}, vocabulary {VOCABULARY}, {ROWS} rows, {BATCH} x {LENGTH}, {args.steps} steps\n")
    print(
        "| shape, threads | side | s/step CPU | wall | tokens/s, ratio by CPU | by wall | peak MB | above the model "
        "| ratio | losses differ by |\n|" + "---|" * 10
    )
    for shape in args.shapes:
        for threads in args.threads:
            told = compare(shape, threads, args.steps)
            ours_told, theirs = told.values()
            apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours_told, theirs))
            for side, lines in told.items():
                middle = {key: statistics.median(line[key] for line in lines[WARM_UP:]) for key in ("cpu", "wall")}
                peak, before = lines[-1]["peak"] / 1e6, lines[-1]["before"] / 1e6
                cells = [f"{shape}, {threads}", side, f"{middle['cpu']:.3f}", f"{middle['wall']:.3f}"]
                ratios = [
                    statistics.median(b[key] / a[key] for a, b in zip(lines[WARM_UP:], theirs[WARM_UP:]))
                    for key in ("cpu", "wall")
                ]
                cells += [f"{ratio:.2f}" for ratio in ratios] + [f"{peak:.0f}", f"{peak - before:.0f}"]
                of = theirs[-1]["peak"] / 1e6, (theirs[-1]["peak"] - theirs[-1]["before"]) / 1e6
                cells += [f"{peak / of[0]:.2f}, {(peak - before) / of[1]:.2f}", f"{apart:.1e}"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
