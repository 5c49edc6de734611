"""Build the demonstration model and its soft prompts: ``python -m kobold_sp_plugin.demonstration.build``.

Writes the corpus (in memory), trains the tokenizer, the model on the unlabelled mix of all genres, and
one soft prompt per genre as :mod:`kobold_sp_plugin.training` does by default. Everything follows from one
seed; on one machine, with the same number of threads, the result is the same to the byte.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ..softprompt import OWN_KEY, SoftPrompt
from ..training import Settings, train
from ..training.dataset import Dataset
from ..training.texts import Passage
from . import MODEL
from .grammar import SEPARATOR, mix, story
from .lexicon import GENRES

BOS, EOS, PAD = 0, 1, 2
CONTEXT = 1024  # tokens
BATCH_TOKENS = 2000
PROMPT_STORIES = 1000

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


def tokens_of(tokenizer: Tokenizer, text: str) -> List[int]:
    """The ids of a text to its end, at most as many as the model reads."""
    return [*tokenizer.encode(text).ids, EOS][:CONTEXT]


def batches(texts: Sequence[List[int]], tokens: int, rng: random.Random) -> Iterator[List[List[int]]]:
    """Batches of texts of similar length, at most ``tokens`` with padding each, in random order."""
    by_length = sorted(texts, key=lambda text: (len(text), rng.random()))
    result: List[List[List[int]]] = [[]]
    for text in by_length:
        if (len(result[-1]) + 1) * len(text) > tokens:
            result.append([])
        result[-1].append(text)
    rng.shuffle(result)
    return iter(result)


def loss_of(model: LlamaForCausalLM, batch: Sequence[List[int]]) -> torch.Tensor:
    """Cross-entropy in nats, a scalar: the mean over all tokens of a batch but the first of each text.

    Padding stands on the right, where a causal model does not see it, so that no mask is needed.
    """
    length = max(map(len, batch))
    ids = torch.full((len(batch), length), PAD)
    for row, text in enumerate(batch):
        ids[row, : len(text)] = torch.tensor(text)
    here = torch.arange(1, length) < torch.tensor([[len(text)] for text in batch])
    hidden = model.model(input_ids=ids, use_cache=False)[0][:, :-1]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[here]), ids[:, 1:][here])


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


def train_model(texts: Sequence[List[int]], seed: int) -> LlamaForCausalLM:
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


def genre_passages(genre: str, count: int, seed: int) -> Iterator[Passage]:
    """What a soft prompt learns from: stories of the genre, and what follows where a story turns to it.

    With the latter more continuations stay in the genre; a story that is well under way in another one goes on
    in that one.
    """
    rng = random.Random(f"soft prompt:{genre}:{seed}")
    others = [other for other in GENRES if other != genre]
    for number in range(count):
        if number % 5 < 4:
            yield Passage(((story(genre, rng).text, True),), genre)
        else:
            turning = story(rng.choice(others), rng, turns_to=genre)
            before = turning.paragraphs[turning.genres.index(genre) - 1]
            yield Passage(((before + SEPARATOR, False), (turning.part(genre), True)), genre)


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
    texts = [tokens_of(tokenizer, text) for text in corpus]
    tell(f"training the model on {sum(map(len, texts))} tokens")
    model = train_model(texts, seed)
    save_model(model, tokenizer, model_folder)
    build_softprompts(model_folder, softprompts, seed)
    tell("done")


def build_softprompts(model_folder: Path, softprompts: Path, seed: int) -> None:
    """Write a soft prompt for each genre, trained for the model in the folder: what is shipped is its float16."""
    model = LlamaForCausalLM.from_pretrained(str(model_folder), torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
    # Stories cost nothing here: each is read once, most of them whole; of so many, large batches and a larger rate.
    settings = Settings(
        block=CONTEXT // 2,
        epochs=1,
        patience=0,
        seed=seed,
        optimizer="adamw",
        learning_rate=0.3,
        batch_tokens=1024,
        evaluate_every=18,
    )
    softprompts.mkdir(parents=True, exist_ok=True)
    for genre in GENRES:
        started = time.time()
        with tempfile.TemporaryDirectory() as folder:
            texts = genre_passages(genre, PROMPT_STORIES, seed)
            dataset = Dataset.write(texts, tokenizer, Path(folder), settings.block)
            trained = train(model, tokenizer, dataset, settings)
        own = trained.metadata[OWN_KEY]
        losses = ", ".join(
            f"{own['training'][f'held_out_{when}']:.3f} {when}" for when in ("without", "before", "after")
        )
        print(f"{time.time() - started:5.0f} s  {genre}: held-out loss {losses}", flush=True)
        SoftPrompt(trained.rows, {**metadata(genre), OWN_KEY: own}).save(softprompts / f"{genre}.zip")


def metadata(genre: str) -> Dict[str, object]:
    """What the soft prompt's file says about itself."""
    return {
        "name": genre.capitalize(),
        "author": "kobold_sp_plugin",
        "supported": ["kobold_sp_plugin demonstration model"],
        "description": f"Turns the stories of the demonstration model into {genre} stories.",
    }


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for model/ and softprompts/ (default: in place)")
    parser.add_argument("--softprompts-only", action="store_true", help="for the model that is there")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="the shipped files were made with 1")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    model = MODEL if parsed.output is None else parsed.output / "model"
    softprompts = (MODEL.parents[2] if parsed.output is None else parsed.output) / "softprompts"
    if parsed.softprompts_only:
        build_softprompts(model, softprompts, parsed.seed)
    else:
        build(model, softprompts, parsed.seed)


if __name__ == "__main__":
    main()
