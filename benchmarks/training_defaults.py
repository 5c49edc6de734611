"""Our defaults against the best of a grid of PEFT's settings: what it takes to reach the same held-out loss.

    python benchmarks/training_defaults.py results.jsonl

On the demonstration model, for each of its five genres and three seeds: PromptTuning in the Hugging Face Trainer, with
what Trainer does unless told otherwise (8 texts a batch, 3 epochs, AdamW, a linear decay), for each of three learning
rates and two beginnings of the rows: a text (the opening of one of the stories) and sampled vocabulary. And
`kobold_sp_plugin.training` with its defaults, on the same 100 stories. Both have 20 rows and read at most 256 tokens at
once: longer stories are read in parts. Looked at on the way, by one function for both and outside the clock: the loss
on 48 other stories, read in the same way.

The mark is the best loss that PEFT reaches in any of its six runs. Printed is the ratio, ours to PEFT's, of what the
first look at the mark or below took: CPU seconds, and tokens read (soft ones and padding included); the median over
genres and seeds, the quartiles and the range. PEFT's is that of the run that made the mark.

A line is added to the file after each run, of a minute at most on one quiet core; the same command goes on from there.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROWS, BLOCK, STORIES, HELD_OUT = 20, 256, 100, 48
RATES = (1e-2, 3e-2, 1e-1)
BEGINNINGS = ("text", "vocabulary")
SEEDS = (0, 1, 2)
LOOKS = 20


class Run:
    """The clocks of one training, and the curve that they give: lines of CPU seconds, tokens read, loss."""

    def __init__(self, model, held_out):
        self.model, self.held_out = model, held_out
        self.seconds, self.tokens, self.curve = 0.0, 0, []
        model.model.layers[0].register_forward_pre_hook(self.count)
        self.began = time.process_time()

    def count(self, module, args):
        import torch

        if torch.is_grad_enabled():
            self.tokens += args[0].shape[0] * args[0].shape[1]

    def look(self, rows):
        """Stop the clock for a look at the held-out loss with ``rows``."""
        import torch

        self.seconds += time.process_time() - self.began
        total, count = 0.0, 0
        with torch.no_grad():
            table = self.model.get_input_embeddings().weight
            for ids in self.held_out:
                embedded = torch.cat([torch.as_tensor(rows), table[ids]])[None]
                logits = self.model(inputs_embeds=embedded, use_cache=False).logits[0, ROWS:-1]
                total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
                count += len(ids) - 1
        self.curve.append([self.seconds, self.tokens, total / count])
        self.began = time.process_time()


def ours(run, tokenizer, dataset, folder, seed, _):
    from kobold_sp_plugin.training import Settings, Training

    training = Training(run.model, tokenizer, dataset, Settings(seed=seed), Path(folder))
    for progress in training.run():
        if progress.step % max(1, progress.steps // LOOKS) == 0 or progress.step == progress.steps:
            run.look(training.rows.rows)
    training.close()


def peft(run, tokenizer, dataset, folder, seed, setting):
    import torch
    from peft import PromptTuningConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    from kobold_sp_plugin.demonstration import MODEL
    from kobold_sp_plugin.training.dataset import IGNORED

    rate, beginning = setting
    set_seed(seed)
    options = {"prompt_tuning_init": "SAMPLE_VOCAB"}
    if beginning == "text":
        opening = tokenizer.decode(dataset.batch([0]).ids[0, len(dataset.prefix) :][: 2 * ROWS])
        options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": opening}
        options["tokenizer_name_or_path"] = str(MODEL)
    tuned = get_peft_model(run.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ROWS, **options))
    rows = next(iter(tuned.prompt_encoder.values())).embedding.weight

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % max(1, state.max_steps // LOOKS) == 0 or state.global_step == state.max_steps:
                run.look(rows.detach())

    def padded(texts):
        def together(name, value):
            return torch.nn.utils.rnn.pad_sequence([torch.tensor(text[name]) for text in texts], True, value)

        ids = together("input_ids", tokenizer.pad_token_id)
        mask = together("attention_mask", 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": together("labels", IGNORED)}

    batches = [dataset.batch([piece]) for piece in range(len(dataset))]
    texts = [
        {"input_ids": each.ids[0], "labels": each.labels[0], "attention_mask": [1] * each.ids.shape[1]}
        for each in batches
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=rate,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=tuned, args=arguments, train_dataset=texts, data_collator=padded, callbacks=[Looks()])
    run.began = time.process_time()
    trainer.train()


def curve_of(genre, seed, setting):
    """What one run gives; ``setting`` is None for ours."""
    import torch

    from kobold_sp_plugin.demonstration import report
    from kobold_sp_plugin.demonstration.grammar import stories
    from kobold_sp_plugin.training.dataset import Dataset
    from kobold_sp_plugin.training.texts import Passage

    model, tokenizer = report.load()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        dataset, held_out = (
            Dataset.write([Passage(((story.text, True),), "") for story in told], tokenizer, Path(where), BLOCK)
            for told, where in ((stories(genre, STORIES, 5000 + seed), folder), (stories(genre, HELD_OUT, 1001), other))
        )
        pieces = [torch.tensor(held_out.batch([piece]).ids[0]) for piece in range(len(held_out))]
        run = Run(model, pieces)
        (peft if setting else ours)(run, tokenizer, dataset, folder, seed, setting)
    return run.curve


def summary(lines):
    """What is known until now, as Markdown."""
    yield "| genre, seed | best of PEFT | its setting | ours, best | CPU s, ours / PEFT | ratio | tokens, ratio |"
    yield "|---" * 7 + "|"
    ratios = []
    groups = {}
    for line in lines:
        groups.setdefault((line["genre"], line["seed"]), {})[tuple(line["setting"] or ())] = line["curve"]
    for (genre, seed), curves in groups.items():
        if len(curves) < 1 + len(RATES) * len(BEGINNINGS):
            continue
        own = curves.pop(())
        best = {setting: min(loss for *_, loss in curve) for setting, curve in curves.items()}
        setting = min(best, key=best.get)
        mark = best[setting]
        theirs, reached = ([at for at in curve if at[2] <= mark] for curve in (curves[setting], own))
        cells = [f"{genre}, {seed}", f"{mark:.4f}", " ".join(map(str, setting)), f"{min(at[2] for at in own):.4f}"]
        if reached:
            ratios.append([mine / other for mine, other in zip(reached[0][:2], theirs[0][:2])])
            cells += [f"{reached[0][0]:.1f} / {theirs[0][0]:.1f}"] + [f"{ratio:.2f}" for ratio in ratios[-1]]
        else:
            ratios.append([float("inf")] * 2)
            cells += ["not reached", "inf", "inf"]
        yield "| " + " | ".join(cells) + " |"
    for number, name in enumerate(("CPU time", "tokens")):
        values = sorted(pair[number] for pair in ratios)
        if len(values) > 1:
            # The nearest values, and nothing between: some may be infinite.
            low, middle, high = (values[round(share * (len(values) - 1))] for share in (0.25, 0.5, 0.75))
            spread = f"quartiles {low:.2f} to {high:.2f}, range {values[0]:.2f} to {values[-1]:.2f}"
            yield f"\nRatio of {name}: median {middle:.2f}, {spread}, {len(values)} of {len(SEEDS) * 5} cases"


def main():
    from kobold_sp_plugin.demonstration.lexicon import GENRES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="file of JSON lines; what is in it is not run again")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {(line["genre"], line["seed"], tuple(line["setting"] or ())) for line in lines}
    settings = [*((rate, beginning) for rate in RATES for beginning in BEGINNINGS), ()]
    left = [(genre, seed, setting) for seed in SEEDS for genre in GENRES for setting in settings]
    if not args.table_only:
        import torch

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        for genre, seed, setting in left:
            if (genre, seed, setting) not in done:
                curve = curve_of(genre, seed, setting)
                lines.append({"genre": genre, "seed": seed, "setting": setting, "curve": curve})
                with open(args.results, "a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    print("\n".join(summary(lines)))


if __name__ == "__main__":
    main()
