"""Build the demonstration model and its soft prompts: ``python -m kobold_sp_plugin.demonstration.build``.

Writes the corpus (in memory), trains the tokenizer, the model on the unlabelled mix of all genres, and
one soft prompt per genre with a plain loop. Everything follows from one seed; on one machine, with the
same number of threads, the result is the same to the byte.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from ..compatibility import fingerprint
from ..softprompt import OWN_KEY, SoftPrompt
from . import MODEL
from .grammar import SEPARATOR, mix, story
from .lexicon import GENRES

BOS, EOS, PAD = 0, 1, 2
CONTEXT = 1024  # tokens
N_ROWS = 20
BATCH_TOKENS = 2000
PROMPT_STEPS = 240
PROMPT_STORIES = 1000
PROMPT_BATCH_TOKENS = 1200
PROMPT_LIMIT = 192  # tokens of a text

# Written as they stand: plain keys that every release of transformers with Llama reads. The file is
# stored in float16; declaring float32 keeps releases that obey the declaration from computing in
# float16, which is slow or missing on CPUs.
CONFIG: Dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2560,
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.04,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "torch_dtype": "float32",
}
GENERATION = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "do_sample": True,
    "temperature": 0.7,
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "model_max_length": CONTEXT,
    "model_input_names": ["input_ids", "attention_mask"],
    "clean_up_tokenization_spaces": False,
}

Labelled = Tuple[List[int], List[int]]
"""Token ids, and what is to be predicted at each of them: the id itself, or -100 for nothing."""


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE; encoding puts the beginning-of-sequence token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def labelled(tokenizer: Tokenizer, text: str, given: str = "", limit: int = CONTEXT) -> Labelled:
    """A text to learn, after a text that is ``given`` and not to be learned; cut to ``limit`` tokens."""
    before = tokenizer.encode(given).ids
    after = [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]
    labels = [-100] * len(before) + after
    return (before + after)[:limit], labels[:limit]


def batches(texts: Sequence[Labelled], tokens: int, rng: random.Random) -> Iterator[List[Labelled]]:
    """Batches of texts of similar length, at most ``tokens`` with padding each, in random order."""
    by_length = sorted(texts, key=lambda text: (len(text[0]), rng.random()))
    result: List[List[Labelled]] = [[]]
    for text in by_length:
        if (len(result[-1]) + 1) * len(text[0]) > tokens:
            result.append([])
        result[-1].append(text)
    rng.shuffle(result)
    return iter(result)


def loss_of(model: LlamaForCausalLM, batch: Sequence[Labelled], rows: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Cross-entropy in nats, a scalar: the mean over all positions of a batch that have a label.

    ``rows``: float ``[n_tokens, width]``, read before the beginning-of-sequence token. Padding stands
    on the right, where a causal model does not see it, so that no mask is needed.
    """
    length = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), length), PAD)
    labels = torch.full((len(batch), length), -100)
    for i, (text, wanted) in enumerate(batch):
        ids[i, : len(text)] = torch.tensor(text)
        labels[i, : len(text)] = torch.tensor(wanted)
    embedded = model.get_input_embeddings()(ids)
    if rows is not None:
        embedded = torch.cat([rows.expand(len(batch), -1, -1), embedded], dim=1)
    hidden = model.model(inputs_embeds=embedded, use_cache=False)[0][:, -length:-1]
    wanted = labels[:, 1:]
    here = wanted != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[here]), wanted[here])


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.475 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


def initialise(model: LlamaForCausalLM) -> None:
    """Let every attention head begin by looking for tokens like its own and copying what it finds.

    Queries begin equal to keys, and outputs as the transpose of values: a story's words come back, and
    training gets to looking them up sooner from here than from noise.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        width = attention.q_proj.weight.shape[1]
        torch.nn.init.normal_(attention.q_proj.weight, std=0.8 * width**-0.5)
        torch.nn.init.normal_(attention.v_proj.weight, std=0.6 * width**-0.5)
        with torch.no_grad():
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def train_model(texts: Sequence[Labelled], seed: int) -> LlamaForCausalLM:
    """The small causal model, trained on every text once."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    known = {key: value for key, value in CONFIG.items() if key not in ("architectures", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**known))
    initialise(model)
    order = list(batches(texts, BATCH_TOKENS, rng))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, len(order), 60))
    average = None
    for step, batch in enumerate(order):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 0 or step == len(order) - 1:
            print(f"  step {step} of {len(order)}: loss {average:.3f}", flush=True)
    return model.eval()


def genre_texts(tokenizer: Tokenizer, genre: str, count: int, seed: int) -> List[Labelled]:
    """What a soft prompt learns from: beginnings of stories of the genre, and of stories that turn to it.

    Of the latter, the paragraph before the turn is given and only the rest is learned. With them more
    continuations stay in the genre; a story that is well under way in another one goes on in that one.
    """
    rng = random.Random(f"soft prompt:{genre}:{seed}")
    others = [other for other in GENRES if other != genre]
    result = []
    for number in range(count):
        if number % 5 < 4:
            text, given = story(genre, rng).text, ""
        else:
            turning = story(rng.choice(others), rng, turns_to=genre)
            before = turning.paragraphs[turning.genres.index(genre) - 1]
            text, given = turning.part(genre), before + SEPARATOR
        result.append(labelled(tokenizer, text, given, PROMPT_LIMIT))
    return result


def train_rows(model: LlamaForCausalLM, texts: Sequence[Labelled], seed: int) -> np.ndarray:
    """A soft prompt for ``texts``: float32 ``[N_ROWS, width]``, by a plain loop of Adam.

    It begins as the words of one of the texts: closer to the genre, and less harm to begin with, than
    random rows of the matrix.
    """
    rng = random.Random(seed)
    model.requires_grad_(False)
    first = torch.tensor(texts[0][0][1 : N_ROWS + 1])  # after the beginning-of-sequence token
    rows = model.get_input_embeddings()(first).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([rows], lr=3e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, PROMPT_STEPS, 10))
    pending: Iterator[List[Labelled]] = iter(())
    for _ in range(PROMPT_STEPS):
        batch = next(pending, None)
        if batch is None:
            pending = batches(texts, PROMPT_BATCH_TOKENS, rng)
            batch = next(pending)
        loss = loss_of(model, batch, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    print(f"  loss {loss.item():.3f}", flush=True)
    return np.asarray(rows.detach().numpy())


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what ``from_pretrained`` reads, old releases included; the weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding matrix
    }
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    content = json.loads(tokenizer.to_str())
    # Releases of tokenizers before 0.20 read merges as strings only, later ones both.
    content["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
    ]
    files = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": TOKENIZER,
        "tokenizer.json": content,
    }
    for name, data in files.items():
        indent = None if name == "tokenizer.json" else 2
        text = json.dumps(data, indent=indent, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def build(model_folder: Path, softprompts: Path, seed: int, count: int = 12000) -> None:
    """Write the model to one folder and the soft prompts to another."""
    started = time.time()

    def tell(what: str) -> None:
        print(f"{time.time() - started:5.0f} s  {what}", flush=True)

    tell(f"writing {count} stories")
    corpus = [told.text for told in mix(count, seed)]
    tokenizer = train_tokenizer(corpus)
    texts = [labelled(tokenizer, text) for text in corpus]
    tell(f"training the model on {sum(len(ids) for ids, _ in texts)} tokens")
    model = train_model(texts, seed)
    save_model(model, tokenizer, model_folder)
    # What is shipped is float16; the soft prompts are trained for what is shipped.
    model = LlamaForCausalLM.from_pretrained(str(model_folder), torch_dtype=torch.float32).eval()
    softprompts.mkdir(parents=True, exist_ok=True)
    for genre in GENRES:
        tell("training the soft prompt " + genre)
        rows = train_rows(model, genre_texts(tokenizer, genre, PROMPT_STORIES, seed), seed)
        SoftPrompt(rows=rows, metadata=metadata(genre, model)).save(softprompts / f"{genre}.zip")
    tell("done")


def metadata(genre: str, model: LlamaForCausalLM) -> Dict[str, object]:
    """What the soft prompt's file says about itself."""
    return {
        "name": genre.capitalize(),
        "author": "kobold_sp_plugin",
        "supported": ["kobold_sp_plugin demonstration model"],
        "description": f"Turns the stories of the demonstration model into {genre} stories.",
        OWN_KEY: {"fingerprint": fingerprint(model)},
    }


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for model/ and softprompts/ (default: in place)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="the shipped files were made with 1")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    if parsed.output is None:
        build(MODEL, MODEL.parents[2] / "softprompts", parsed.seed)
    else:
        build(parsed.output / "model", parsed.output / "softprompts", parsed.seed)


if __name__ == "__main__":
    main()
