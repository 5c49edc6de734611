"""The experiment behind the fingerprint: which short description of an embedding matrix tells models apart?

    python benchmarks/fingerprint.py [--plot benchmarks/fingerprint.png]

Simulated matrices of several widths, all of one imaginary tokenizer (frequencies, clusters and meanings of the
tokens are shared, as in models trained on the same text; only directions differ), with columns that outweigh the
others and rows of different lengths; copies of each in other precisions, and moved as training moves them. Then
real ones: the demonstration model, trained on; small models of other seeds, trained on the same text with the same
tokenizer. Prints how often each candidate is right, and how the one that the package uses judges each population.
One thread takes about ten minutes. Needs the `picture` extra for the plot.
"""

import argparse
import base64
import itertools
import math
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kobold_sp_plugin.compatibility.fingerprints import CLOSE, N_ROWS, RELATED, SAME, describe, sampled_ids  # noqa: E402

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
VOCABULARY = 32_000
N_CLUSTERS = 40
N_MEANINGS = 64

tokens = np.random.default_rng(7)
FREQUENCY = tokens.standard_normal((N_ROWS, 1), dtype=np.float32)
CLUSTER = tokens.integers(0, N_CLUSTERS, N_ROWS)
MEANING = tokens.standard_normal((N_ROWS, N_MEANINGS), dtype=np.float32)


# Simulated matrices: float32 [N_ROWS, width], the rows that a fingerprint looks at


def matrix(width, seed, same_columns=False):
    """One model's rows. ``same_columns``: the heavy columns are in the same places in all models, the worst case."""
    rng = np.random.default_rng((width, seed))

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    def between(low, high):
        return np.float32(rng.uniform(low, high))

    spectrum = (1 + np.arange(N_MEANINGS, dtype=np.float32)) ** -between(0.3, 1.5)
    rows = normal(N_ROWS, width) * between(0.2, 1)
    rows += MEANING * spectrum * between(0.5, 2) @ normal(N_MEANINGS, width)
    rows += between(0, 1.5) * normal(N_CLUSTERS, width)[CLUSTER]
    rows += between(0, 2) * FREQUENCY * normal(width)
    rows += between(0, 3) * normal(width)
    for column in range(1, 5) if same_columns else rng.integers(0, width, rng.integers(0, 5)):
        weight = math.sqrt(width) * between(0.2, 2) * rng.choice([-1, 1])
        own = between(0, 1) * FREQUENCY[:, 0] + between(0, 1) * normal(N_ROWS) + between(-2, 2)
        rows[:, column] += np.float32(weight) * own
    return rows * np.exp(between(0, 0.5) * (0.7 * FREQUENCY + 0.7 * normal(N_ROWS, 1))) * np.float32(0.02)


def bfloat16(rows):
    return ((np.ascontiguousarray(rows).view(np.uint32) + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def integers(bits, block):
    """Rounded to whole steps of the largest value in each block; None: of each row."""

    def change(rows, rng=None):
        blocks = rows.reshape(-1, block or rows.shape[1])
        step = np.abs(blocks).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        return (np.round(blocks / np.where(step > 0, step, 1)) * step).reshape(rows.shape)

    return change


def normal_float_4(rows, rng=None, block=32):
    """4 bits, with levels where normally distributed values lie, in blocks with one scale each."""
    from statistics import NormalDist

    share = np.linspace(0.0333, 0.5, 8)
    half = np.array([-NormalDist().inv_cdf(each) for each in share[:-1]] + [0.0], dtype=np.float32)
    levels = np.sort(np.unique(np.concatenate([half, -half]))) / half.max()
    blocks = rows.reshape(-1, block)
    scale = np.abs(blocks).max(1, keepdims=True)
    found = np.searchsorted((levels[1:] + levels[:-1]) / 2, blocks / np.where(scale > 0, scale, 1))
    return (levels[found] * scale).reshape(rows.shape).astype(np.float32)


def moved(by):
    """Every value moved by noise of ``by`` times the row's root mean square."""

    def change(rows, rng):
        size = np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
        return rows + np.float32(by) * size * rng.standard_normal(rows.shape, dtype=np.float32)

    return change


def stepped(by):
    """Adam's way: rows of frequent tokens moved, each value by one step up or down."""

    def change(rows, rng):
        step = by * rows.std() * np.clip(np.exp(FREQUENCY - 1), 0, 1)
        return rows + (step * rng.choice([-1, 1], size=rows.shape)).astype(np.float32)

    return change


def shifted(by):
    """All rows moved the same way, and each a little by itself."""

    def change(rows, rng):
        common = np.float32(by * rows.std()) * rng.standard_normal(rows.shape[1], dtype=np.float32)
        return moved(by / 3)(rows, rng) + common

    return change


COPIES = {
    "float16": lambda rows, rng: rows.astype(np.float16).astype(np.float32),
    "bfloat16": lambda rows, rng: bfloat16(rows),
    "int8, a scale per row": integers(8, None),
    "int8, blocks of 32": integers(8, 32),
    "scaled by 22.6": lambda rows, rng: rows * np.float32(22.6),
}
COARSE = {"4 bits, blocks of 32": integers(4, 32), "4 bits, normal floats": normal_float_4}
TUNED = {
    **{f"moved by {by}": moved(by) for by in (0.01, 0.03, 0.1, 0.3, 0.5)},
    **{f"stepped by {by}": stepped(by) for by in (0.01, 0.1, 0.5)},
    **{f"shifted by {by}": shifted(by) for by in (0.1, 0.5)},
}


# Candidates: rows -> numbers that would be stored, and how alike two rows of such numbers are


def centred(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    unit = unit - unit.mean(0)
    return unit / np.linalg.norm(unit, axis=1, keepdims=True)


def clipped(rows):
    centred = rows - rows.mean(0)
    deviations = centred.std(0)
    centred = centred / np.maximum(deviations, 2 * np.median(deviations))
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


@lru_cache(maxsize=5)  # what one width needs
def directions(n_rows, per_row, width):
    signs = np.random.default_rng((n_rows, per_row)).integers(0, 2, (n_rows, width, per_row), dtype=np.int8)
    return signs.astype(np.float32) * 2 - 1


def projections(rows, n_rows, per_row):
    return np.matmul(rows[:n_rows, None], directions(n_rows, per_row, rows.shape[1]))[:, 0].ravel()


def signs_of(n_rows, per_row, prepared=centred):
    return lambda rows: np.where(projections(prepared(rows), n_rows, per_row) >= 0, 1, -1).astype(np.float32)


def version_2(rows):
    bits = np.frombuffer(base64.b64decode(describe(rows, VOCABULARY)["signs"]), dtype=np.uint8)
    return np.unpackbits(bits).astype(np.float32) * 2 - 1


def bytes_of(n_rows, per_row):
    """8 bits for each projection, up to 4 standard deviations."""
    return lambda rows: np.clip(np.floor(projections(clipped(rows), n_rows, per_row) * 32), -128, 127) + 0.5


def whole_rows(count, prepared):
    return lambda rows: prepared(rows)[:count].ravel() / math.sqrt(count)


def lengths(rows):
    log = np.log(np.linalg.norm(rows, axis=1))
    return np.round((log - log.mean()) / log.std() * 32)


def angles(rows):
    """Cosines between rows: they do not depend on directions, and so say what all models of a language share."""
    unit = centred(rows)
    cosines = (unit[:-1] * unit[1:]).sum(1)
    return np.round((cosines - cosines.mean()) / cosines.std() * 32)


CANDIDATES = {
    "64 rows, 32 signs each (version 1)": (signs_of(64, 32), 256, True),
    "64 rows, 64 signs": (signs_of(64, 64), 512, True),
    "512 rows, 8 signs": (signs_of(512, 8), 512, True),
    "512 rows, 8 signs, heavy columns clipped (version 2)": (version_2, 512, True),
    "512 rows, 8 signs, nothing subtracted": (signs_of(512, 8, prepared=lambda rows: rows), 512, True),
    "512 rows, one projection of 8 bits, clipped": (bytes_of(512, 1), 512, False),
    "16 whole rows, cosine": (whole_rows(16, lambda r: r / np.linalg.norm(r, axis=1, keepdims=True)), None, False),
    "lengths of 512 rows": (lengths, 512, False),
    "angles between 512 rows": (angles, 512, False),
}
CHOSEN = "512 rows, 8 signs, heavy columns clipped (version 2)"


def alike(first, second, is_signs):
    """Similarity of every row of ``first`` with every one of ``second``, as a cosine."""
    cosines = first @ second.T
    cosines = cosines / np.linalg.norm(first, axis=1)[:, None] / np.linalg.norm(second, axis=1)[None]
    return np.sin(np.pi / 2 * np.clip(cosines, -1, 1)) if is_signs else cosines


# Populations of pairs: {candidate: {population: similarities}}


def simulate(n_models, n_bases):
    found = {name: {} for name in CANDIDATES}

    def add(name, population, values):
        found[name].setdefault(population, []).append(np.ravel(values))

    pairs = np.triu_indices(n_models, 1)
    changes = {**COPIES, **COARSE, **TUNED}
    names = ["", *changes]
    for width in WIDTHS:
        started = time.time()
        for same_columns in (False, True):
            kept = {name: [] for name in CANDIDATES}
            for seed in range(n_models):
                rows = matrix(width, seed, same_columns)
                for name, (describe_rows, _, _) in CANDIDATES.items():
                    kept[name].append(describe_rows(rows).astype(np.float32))
            for name, (_, _, is_signs) in CANDIDATES.items():
                codes = np.stack(kept.pop(name))
                population = "unrelated, same heavy columns" if same_columns else "unrelated"
                add(name, population, alike(codes, codes, is_signs)[pairs])
        for seed in range(n_bases):
            rng, rows = np.random.default_rng(seed), matrix(width, seed)
            family = [rows, *(change(rows, rng) for change in changes.values())]
            for name, (describe_rows, _, is_signs) in CANDIDATES.items():
                codes = np.stack([describe_rows(each) for each in family])
                values = alike(codes, codes, is_signs)
                for (i, one), (j, other) in itertools.combinations(enumerate(names), 2):
                    both = {one, other} - {""}
                    kind = "a fine-tune" if both & TUNED.keys() else "coarse" if both & COARSE.keys() else "same"
                    add(name, kind, values[i, j])
                    if one == "":
                        add(name, other, values[i, j])
        print(f"width {width}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    return {name: {key: np.concatenate(parts) for key, parts in each.items()} for name, each in found.items()}


def trained(n_steps):
    """Similarities of real pairs, {population: [(name, similarity)]}, by the package's own functions."""
    import torch

    from kobold_sp_plugin.compatibility import fingerprint
    from kobold_sp_plugin.compatibility.fingerprints import similarity
    from kobold_sp_plugin.compatibility.matrix import Matrix

    def of(weight, change=None):
        rows = weight.detach().float().numpy()
        rows = rows if change is None else change(rows, np.random.default_rng(0))
        return fingerprint(Matrix(len(rows), rows.shape[1], lambda ids: rows[ids]))

    torch.set_num_threads(1)
    found = {"same": [], "coarse": [], "a fine-tune": [], "unrelated": [], "same first noise, other text": []}
    demonstration, tokenizer = demonstration_model()
    weight = demonstration.get_input_embeddings().weight
    mark = of(weight)
    for name, change in {**COPIES, **COARSE}.items():
        kind = "coarse" if name in COARSE else "same"
        found[kind].append((name, similarity(mark, of(weight, change))))
    grown = torch.cat([weight, weight.mean(0).expand(64, -1)])
    found["same"].append(("64 more tokens, int8", similarity(mark, of(grown, COPIES["int8, a scale per row"]))))

    texts = {"noir stories": genre_texts(tokenizer), "English manuals": manual_texts(tokenizer)}
    for topic, rate in itertools.product(texts, (1e-4, 5e-4, 2e-3)):
        model, _ = demonstration_model()
        for step in train(model, texts[topic], rate, n_steps):
            if step in (n_steps // 8, n_steps // 3, n_steps):
                weight = model.get_input_embeddings().weight
                label = f"{topic}, rate {rate:g}, {step} steps"
                found["a fine-tune"].append((label, similarity(mark, of(weight))))
                label += ", 4 bits"
                found["a fine-tune"].append((label, similarity(mark, of(weight, COARSE["4 bits, blocks of 32"]))))
        print(found["a fine-tune"][-2], file=sys.stderr, flush=True)

    marks = {}
    stories = genre_texts(tokenizer)
    for width, seed in itertools.product((64, 160), range(6)):
        model = small_model(width, seed)
        for _ in train(model, stories, 4e-3, n_steps):
            pass
        marks[width, seed] = of(model.get_input_embeddings().weight)
    for one, other in itertools.combinations(marks, 2):
        if one[0] == other[0]:
            found["unrelated"].append((f"seeds {one}, {other}", similarity(marks[one], marks[other])))
    for (width, seed), theirs in marks.items():
        if width == 160:
            found["unrelated"].append((f"demonstration, seed {seed}", similarity(mark, theirs)))
    for width in (64, 160):
        model = small_model(width, 0)
        for _ in train(model, texts["English manuals"], 4e-3, n_steps):
            pass
        again = of(model.get_input_embeddings().weight)
        found["same first noise, other text"].append((f"width {width}", similarity(marks[width, 0], again)))
    return found


def demonstration_model():
    from kobold_sp_plugin.demonstration.report import load

    return load()


def small_model(width, seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kobold_sp_plugin.demonstration.build import CONFIG

    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    known = {key: value for key, value in CONFIG.items() if key not in ("architectures", "torch_dtype")}
    return LlamaForCausalLM(LlamaConfig(**{**known, **shape, "num_key_value_heads": 4}))


def genre_texts(tokenizer):
    from kobold_sp_plugin.demonstration.grammar import stories

    return [tokenizer(story.text)["input_ids"][:96] for story in stories("noir", 400, seed=99)]


def manual_texts(tokenizer):
    """Text unlike anything that the demonstration model has seen: the manuals that come with Python."""
    from pydoc_data.topics import topics

    return [tokenizer(text)["input_ids"][:96] for text in topics.values()]


def train(model, texts, rate, n_steps):
    """Plain training, in place; yields the number of steps done after each."""
    import torch

    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    rng = np.random.default_rng(0)
    for step in range(1, n_steps + 1):
        chosen = [texts[i] for i in rng.integers(0, len(texts), 8)]
        length = max(map(len, chosen))
        ids = torch.tensor([text + [2] * (length - len(text)) for text in chosen])
        labels = torch.tensor([text + [-100] * (length - len(text)) for text in chosen])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


# What is printed


def fewest_errors(low, high):
    """By the best threshold between what should be low and what should be high: the share told wrong, the threshold."""
    edges = np.unique(np.concatenate([low, high]))
    wrong_low = 1 - np.searchsorted(np.sort(low), edges, "left") / len(low)
    wrong_high = np.searchsorted(np.sort(high), edges, "left") / len(high)
    best = int(np.argmin(wrong_low + wrong_high))
    return (wrong_low[best] + wrong_high[best]) / 2, edges[best]


def print_candidates(found):
    print(
        "| what is kept | bytes | unrelated: spread | highest | the same, heavy columns in the same places: highest "
        "| related: lowest | told wrong | same or fine-tune: told wrong |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (_, size, _) in CANDIDATES.items():
        groups = found[name]
        unrelated, worst = groups["unrelated"], groups["unrelated, same heavy columns"]
        related = np.concatenate([groups["same"], groups["coarse"], groups["a fine-tune"]])
        wrong, _ = fewest_errors(np.concatenate([unrelated, worst]), related)
        same_wrong, threshold = fewest_errors(groups["a fine-tune"], groups["same"])
        print(
            f"| {name} | {size or 'all'} | {unrelated.std():.3f} | {unrelated.max():.2f} | {worst.max():.2f} "
            f"| {related.min():.2f} | {wrong:.3%} | {same_wrong:.2%} (at {threshold:.4f}) |"
        )


def judged(values):
    values = np.asarray(values)
    limits = (values >= SAME, (values >= CLOSE) & (values < SAME), (values >= RELATED) & (values < CLOSE))
    return [float(np.mean(each)) for each in limits] + [float(np.mean(values < RELATED))]


def print_judgements(populations):
    print("| pairs | number | median | lowest | highest | same | close | distant | unrelated |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, values in populations.items():
        shares = " | ".join(f"{share:.3%}" if 0 < share < 1 else f"{share:.0%}" for share in judged(values))
        low, middle, high = np.min(values), np.median(values), np.max(values)
        print(f"| {name} | {len(values)} | {middle:.4f} | {low:.4f} | {high:.4f} | {shares} |")


def draw(populations, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), width_ratios=(3, 2), layout="constrained")
    colours = {
        "unrelated": "#b03a2e",
        "unrelated, same heavy columns": "#e59866",
        "a fine-tune": "#2471a3",
        "coarse": "#8e44ad",
        "same": "#1e8449",
    }
    labels = {"coarse": "copies in 4 bits", "same": "copies in other precisions", "a fine-tune": "simulated fine-tunes"}
    for name, colour in colours.items():
        values = np.asarray(populations[name])
        style = {"color": colour, "alpha": 0.6, "label": f"{labels.get(name, name)} ({len(values):,} pairs)"}
        left.hist(values, bins=np.linspace(-0.2, 1, 121), weights=np.full(len(values), 1 / len(values)), **style)
        if not name.startswith("unrelated"):
            distance = np.maximum(1 - values, 1e-6)
            right.hist(distance, bins=np.logspace(-6, 0, 61), weights=np.full(len(values), 1 / len(values)), **style)
    trained_on = 1 - np.asarray(populations["trained: a fine-tune"])
    ticks = right.plot(
        np.maximum(trained_on, 1e-6), np.full(len(trained_on), 2e-3), "k|", label="the demonstration model, trained on"
    )
    for axes, limits in ((left, (RELATED, CLOSE, SAME)), (right, (1 - RELATED, 1 - CLOSE, 1 - SAME))):
        axes.set_yscale("log")
        axes.set_ylim(1e-5, 1)
        for limit in limits:
            axes.axvline(limit, color="#555", linewidth=0.8, linestyle="--")
    left.set_xlabel("similarity")
    left.set_ylabel("share of pairs")
    right.set_xscale("log")
    right.invert_xaxis()
    right.set_xlabel("1 − similarity")
    left.legend(fontsize=7, loc="upper center")
    right.legend(fontsize=7, loc="upper left", handles=ticks)
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--models", type=int, default=100, help="unrelated matrices of each width")
    parser.add_argument("--bases", type=int, default=12, help="matrices of each width that have copies and fine-tunes")
    parser.add_argument("--steps", type=int, default=120, help="of each training")
    parsed = parser.parse_args()
    assert len(sampled_ids(VOCABULARY)) == N_ROWS

    found = simulate(parsed.models, parsed.bases)
    print_candidates(found)
    real = trained(parsed.steps)
    populations = {**found[CHOSEN], **{f"trained: {key}": [v for _, v in pairs] for key, pairs in real.items()}}
    print(f"\nThe package's fingerprint; same from {SAME}, close from {CLOSE}, distant from {RELATED}:\n")
    print_judgements(populations)
    print("\nThe demonstration model, trained on:\n")
    for label, value in real["a fine-tune"] + real["same"] + real["coarse"] + real["same first noise, other text"]:
        print(f"  {value:.4f}  {label}")
    if parsed.plot:
        draw(populations, parsed.plot)


if __name__ == "__main__":
    main()
