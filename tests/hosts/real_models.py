"""Tiny random models that the real KoboldAI loads; run by its own Python: ``real_models.py FOLDER FAMILY ...``.

The vocabulary is padded to GPT-2's size: KoboldAI forbids some of GPT-2's tokens by number.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SIZE = 50257
TEXTS = (
    "The door opened and the rain came in. Nobody said a word; the clock on the wall had stopped.",
    "A ship sailed to the edge of the world, and the old captain laughed quietly.",
)
FAMILIES = {
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}),
    "gptj": ("GPTJ", "ForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048, "rotary_dim": 8}),
    "neo": (
        "GPTNeo",
        "ForCausalLM",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 2048,
        },
    ),
    "opt": (
        "OPT",
        "ForCausalLM",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": False,
        },
    ),
    "llama": (
        "Llama",
        "ForCausalLM",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
        },
    ),
}


def tokenizer_files():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(trained["vocab"])
    vocabulary.update({f"zz{index}": index for index in range(len(vocabulary), SIZE - 1)})
    vocabulary[END] = SIZE - 1
    merges = [each if isinstance(each, str) else " ".join(each) for each in trained["merges"]]
    special = {"bos_token": END, "eos_token": END, "unk_token": END}
    return {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 2048, **special}),
        "special_tokens_map.json": json.dumps(special),
    }


def main(folder, families):
    files = tokenizer_files()
    for family in families:
        prefix, suffix, options = FAMILIES[family]
        ids = {"vocab_size": SIZE, "bos_token_id": SIZE - 1, "eos_token_id": SIZE - 1}
        torch.manual_seed(1)
        model = getattr(transformers, prefix + suffix)(getattr(transformers, f"{prefix}Config")(**ids, **options))
        for name, weight in model.named_parameters():
            if weight.dim() > 1:  # the usual initialisation repeats one token for ever
                weight.data.mul_(3 if "wte" in name or "embed" in name else 6)
        place = Path(folder, f"tiny-{family}")
        model.save_pretrained(place, safe_serialization=False)
        for name, text in files.items():
            (place / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
