"""Tiny random models of the families that tests need, and a tokenizer trained on the spot."""

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kobold_sp_plugin import SoftPrompt

VOCABULARY = 131
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": (
        "OPT",
        {
            "hidden_size": 48,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 128,
            "do_layer_norm_before": False,
        },
    ),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "llama": (
        "Llama",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gemma2": (
        "Gemma2",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
        },
    ),
}
FAMILIES = [family for family, (prefix, _) in CONFIGS.items() if hasattr(transformers, f"{prefix}Config")]

CACHE = "past_key_values" if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24) else "cache"
"""The name by which ``generate`` takes a cache, and gives it back."""

FAMILY = "llama" if "llama" in FAMILIES else "gptj"
"""The one to use where any will do: 4.24 has no Llama."""


def tiny_model(family, seed=0, **overrides):
    """A random model whose continuations vary: the usual initialisation repeats one token for ever."""
    prefix, options = CONFIGS[family]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **options, **overrides})
    torch.manual_seed(seed)
    causal = [f"{prefix}ForCausalLM", f"{prefix}LMHeadModel"]
    model = next(getattr(transformers, name) for name in causal if hasattr(transformers, name))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0 if family in ("gpt2", "opt", "gptj", "bloom") else 5.0)
    model.generation_config = (
        transformers.GenerationConfig.from_model_config(config) if hasattr(transformers, "GenerationConfig") else None
    )
    return model.eval()


def tiny_tokenizer():
    """A tokenizer of 131 tokens trained on the spot; it begins a text with its beginning-of-sequence token."""
    sentence = "The door opened and the rain came in. Nobody said a word; the clock on the wall had stopped. "
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,;!?'0123456789")
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=letters)
    tokenizer.train_from_iterator([sentence, sentence.upper(), sentence[::-1]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def softprompt(seed=0, n_tokens=4, width=32, **metadata):
    """A random soft prompt; of the tiny models' width unless told otherwise."""
    rows = np.random.default_rng(seed).normal(size=(n_tokens, width)).astype(np.float32)
    return SoftPrompt(rows, metadata)
