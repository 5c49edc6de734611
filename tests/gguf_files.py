"""Tiny models of transformers as GGUF files in float32, written with the ``gguf`` library."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the gguf library is not installed")
transformers = pytest.importorskip("transformers", minversion="4.51")  # the first with Gemma 3 and Qwen 3

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;!?'\n0123456789"
WORDS = ["the", "door", "open", "ed", "and", "rain", "ing", "was", "he", "she", "said"]
N_RESERVED = 40
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6

TOKENS = (
    [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    + [(f"<0x{value:02X}>", BYTE) for value in range(256)]
    + [(f"<|reserved_special_token_{number}|>", CONTROL) for number in range(N_RESERVED)]
    + [(text, NORMAL) for text in ["▁", *LETTERS, *["▁" + word for word in WORDS], *WORDS]]
)
WIDTH, LAYERS, HEADS, KEYS, CONTEXT = 64, 2, 4, 2, 512
COMMON = {
    "vocab_size": len(TOKENS),
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 32, "tie_word_embeddings": True}
FAMILIES = {
    "llama": ("Llama", {}),
    "tied llama": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def tiny(family, seed=0):
    """A random model in float32, whose continuations vary; an untied one prefers tokens that are text."""
    prefix, options = FAMILIES[family]
    name = "Gemma3Text" if prefix == "Gemma3" else prefix
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
        if not config.tie_word_embeddings:
            model.lm_head.weight[[number for number, (_, kind) in enumerate(TOKENS) if kind != NORMAL]] = 0
    return model


@contextmanager
def as_llama_cpp_computes(model):
    """Have Gemma's activation be computed as llama.cpp does on a CPU: read from a table of half precision."""

    def of_table(x):
        half = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, half))

    layers = [layer.mlp for layer in model.model.layers if "gelu" in str(getattr(layer.mlp, "act_fn", "")).lower()]
    hooks = [each.act_fn.register_forward_hook(lambda _, given, __: of_table(given[0])) for each in layers]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def write(model, path, embedding=None, unlike=None, template=None):
    """Write ``model`` to ``path``. ``embedding``: the type of its embedding and output matrices; None: float32."""
    config = model.config
    arch = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(unlike or f"tiny {arch}")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    if arch == "llama":
        writer.add_rope_dimension_count(16)
    parameters = getattr(config, "rope_parameters", None) or {}
    base = parameters.get("rope_theta") or parameters.get("full_attention", {}).get("rope_theta") or config.rope_theta
    writer.add_rope_freq_base(base)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in TOKENS])
    writer.add_token_scores([-float(len(text) == 1) - number / 1e4 for number, (text, _) in enumerate(TOKENS)])
    writer.add_token_types([kind for _, kind in TOKENS])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    if template is not None:
        writer.add_chat_template(template)
    names = {**_NAMES, **(_GEMMA_NAMES if arch.startswith("gemma") else {})}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = HEADS if "q_proj" in name else KEYS
            values = values.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(values.shape)
        stem, kind = name.rsplit(".", 1)
        parts = stem.split(".")
        if "layers" in parts:
            called = f"blk.{parts[2]}.{names['.'.join(parts[3:])]}.{kind}"
        else:
            called = f"{names[stem]}.{kind}"
        if embedding is not None and called in ("token_embd.weight", "output.weight"):
            packed = gguf.quants.quantize(values.astype(np.float32), embedding)
            writer.add_tensor(called, packed, raw_dtype=embedding)
        else:
            writer.add_tensor(called, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
