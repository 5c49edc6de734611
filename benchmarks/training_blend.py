"""A soft prompt for a kind of text that the demonstration model never read: two genres, sentence by sentence.

    python benchmarks/training_blend.py

Each text takes its sentences in turn from a western and from a space story. The soft prompt is trained as
`kobold-sp train` trains by default. Printed: the loss on other such texts without a soft prompt, with each of the
shipped ones, with the two genres' own at once, and with the trained one; its effect; and, of continuations of one
neutral opening, the share of sentences of each of the two genres, and of texts that have both.
"""

import argparse
import re
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SENTENCE = re.compile(r"(?<=[.!?\"]) (?=[A-Z\"])")


def blends(pair, count, seed):
    """``count`` texts; their paragraphs are as long as those of the first genre."""
    from kobold_sp_plugin.demonstration.grammar import SEPARATOR, stories

    texts = []
    for one, other in zip(*(stories(genre, count, seed) for genre in pair)):
        others = SENTENCE.split(other.text.replace(SEPARATOR, " "))
        paragraphs = []
        for paragraph in one.paragraphs:
            told = SENTENCE.split(paragraph)
            for place in range(1, len(told), 2):
                if others:
                    told[place] = others.pop(0)
            paragraphs.append(" ".join(told))
        texts.append(SEPARATOR.join(paragraphs))
    return texts


def shares(classifier, texts, pair):
    """Of all sentences that are of one of the two genres, the first one's; and of texts, those that have both."""
    found = [[classifier.genre(sentence) for sentence in SENTENCE.split(text)] for text in texts]
    counts = np.array([[genres.count(genre) for genre in pair] for genres in found])
    all_sentences = sum(map(len, found))
    return counts.sum(axis=0) / all_sentences, float(np.mean(counts.min(axis=1) >= 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", nargs=2, default=["western", "space"])
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch

    from kobold_sp_plugin import SoftPrompt
    from kobold_sp_plugin.demonstration import report
    from kobold_sp_plugin.demonstration.classifier import Classifier
    from kobold_sp_plugin.demonstration.lexicon import GENRES
    from kobold_sp_plugin.editing import combine
    from kobold_sp_plugin.engines.transformers import TransformersEngine
    from kobold_sp_plugin.training import Settings, train

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, tokenizer = report.load()
    trained = train(model, tokenizer, blends(args.pair, args.texts, 6000 + args.seed), Settings(seed=args.seed))
    folder = Path(__file__).resolve().parent.parent / "softprompts"
    shipped = {genre: SoftPrompt.load(folder / f"{genre}.zip") for genre in GENRES}
    both = combine([shipped[genre] for genre in args.pair], name="both")
    held_out = blends(args.pair, 20, 7000)
    print(f"{' and '.join(args.pair)}, sentence by sentence; nats per token on {len(held_out)} such texts\n")
    print("| soft prompt | loss |\n|---|---|")
    for name, each in {"none": None, **shipped, "these two, one after the other": both, "trained": trained}.items():
        print(f"| {name} | {report.loss(model, tokenizer, held_out, each):.3f} |", flush=True)
    effect = TransformersEngine(model, tokenizer, "").effect([trained])
    print(f"\nEffect of the trained one: {float(effect):.2f}\n")
    classifier = Classifier.fitted()
    names = " | ".join(f"sentences that are {genre}" for genre in args.pair)
    print(f"| continuations with | {names} | texts with two or more sentences of each |\n|---|---|---|---|")
    for name, each in {"none": None, args.pair[0]: shipped[args.pair[0]], "both": both, "trained": trained}.items():
        texts = report.continuations(model, tokenizer, each, args.samples)
        of_each, having_both = shares(classifier, texts, args.pair)
        print(f"| {name} | {of_each[0]:.0%} | {of_each[1]:.0%} | {having_both:.0%} |", flush=True)
    print("\n> " + texts[0].replace("\n", "\n> "))


if __name__ == "__main__":
    main()
