"""Measure the demonstration model: ``python -m kobold_sp_plugin.demonstration.report``.

Prints two tables as Markdown. The first is the loss on held-out stories of each genre, without a soft
prompt, with the right one and with each wrong one. The second is the share of sampled continuations of
one neutral opening that classify as the selected genre.
"""

import argparse
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..soft_tokens import attach
from ..softprompt import SoftPrompt
from . import MODEL, OPENING
from .classifier import Classifier
from .grammar import SEPARATOR, stories
from .lexicon import GENRES

TEMPERATURE = 0.7
NEW_TOKENS = 400
HELD_OUT_SEED = 1001  # the build uses others
_BATCH = 100


def load(folder: Path = MODEL) -> Tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demonstration model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    return model, AutoTokenizer.from_pretrained(str(folder))


def held_out(count: int) -> Dict[str, List[str]]:
    """``count`` stories of each genre that neither the model nor a soft prompt was trained on."""
    return {genre: [s.text for s in stories(genre, count, HELD_OUT_SEED)] for genre in GENRES}


def loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    softprompt: Optional[SoftPrompt] = None,
    tokens: Optional[int] = None,
) -> float:
    """Mean loss in nats per token over ``texts``; with ``tokens``, over the first so many of each."""
    handle = attach(model)
    total = count = 0.0
    with torch.no_grad(), handle.override(*([softprompt] if softprompt else [])):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids[:, : tokens and tokens + 1]
            logits = model(**handle.prepend(ids)).logits[0, handle.n_tokens : -1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return total / count


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    softprompt: Optional[SoftPrompt],
    count: int,
    opening: str = OPENING,
    seed: int = 1,
) -> List[str]:
    """``count`` stories that begin with ``opening``, sampled to their end or to ``NEW_TOKENS`` tokens."""
    torch.manual_seed(seed)
    texts: List[str] = []
    with attach(model).override(*([softprompt] if softprompt else [])):
        while len(texts) < count:
            inputs = tokenizer([opening] * min(_BATCH, count - len(texts)), return_tensors="pt")
            generated = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                max_new_tokens=NEW_TOKENS,
            )
            texts += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return texts


def loss_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    softprompts: Dict[str, SoftPrompt],
    texts: Dict[str, List[str]],
    tokens: Optional[int] = None,
) -> str:
    """A Markdown table: a row for each genre of text, a column for each soft prompt; bold is the lowest."""
    lines = ["| text | none | " + " | ".join(softprompts) + " |", "|---" * (len(softprompts) + 2) + "|"]
    for genre, of_genre in texts.items():
        losses = [loss(model, tokenizer, of_genre, softprompt, tokens) for softprompt in [None, *softprompts.values()]]
        cells = [f"**{x:.3f}**" if x == min(losses) else f"{x:.3f}" for x in losses]
        lines.append(f"| {genre} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares(classifier: Classifier, texts: Sequence[str], genre: str) -> Tuple[float, float]:
    """The share of ``texts`` whose first paragraph, and which as a whole, classify as ``genre``."""
    first = classifier.share([text.split(SEPARATOR)[0] for text in texts], genre)
    return first, classifier.share(texts, genre)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--softprompts", type=Path, default=MODEL.parents[2] / "softprompts")
    parser.add_argument("--samples", type=int, default=200, help="continuations for each soft prompt")
    parser.add_argument("--stories", type=int, default=40, help="held-out stories of each genre")
    parser.add_argument("--threads", type=int, default=2)
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)

    model, tokenizer = load(parsed.model)
    softprompts = {genre: SoftPrompt.load(parsed.softprompts / f"{genre}.zip") for genre in GENRES}
    texts = held_out(parsed.stories)
    print(f"Loss in nats per token on {parsed.stories} held-out stories of each genre:\n")
    print(loss_table(model, tokenizer, softprompts, texts), flush=True)
    print("\nThe same over the first 64 tokens of each story:\n")
    print(loss_table(model, tokenizer, softprompts, texts, tokens=64), flush=True)

    classifier = Classifier.fitted()
    first, whole = classifier.accuracy()
    print(
        f'\n{parsed.samples} continuations of "{OPENING}" for each soft prompt, at temperature '
        f"{TEMPERATURE} and without top-k or top-p, to their end or to {NEW_TOKENS} tokens. The classifier's "
        f"accuracy on unseen stories of the grammar: first paragraph {first:.3f}, whole story {whole:.3f}.\n"
    )
    print("| soft prompt | first paragraph | whole story |\n|---|---|---|")
    samples = {}
    for genre, softprompt in softprompts.items():
        samples[genre] = continuations(model, tokenizer, softprompt, parsed.samples)
        first, whole = shares(classifier, samples[genre], genre)
        print(f"| {genre} | {first:.1%} | {whole:.1%} |", flush=True)
    bare = continuations(model, tokenizer, None, parsed.samples)
    print("\nWithout a soft prompt, by genre:\n\n| genre | first paragraph | whole story |\n|---|---|---|")
    for genre in GENRES:
        first, whole = shares(classifier, bare, genre)
        print(f"| {genre} | {first:.1%} | {whole:.1%} |")
    for genre, told in samples.items():
        print(f"\nWith {genre}:\n\n> " + told[0].replace("\n", "\n> "))


if __name__ == "__main__":
    main()
