"""Soft tokens in a tiny random model of every causal family that the installed transformers registers.

    python benchmarks/families.py [--only NAME ...] [--output TABLE.md]

Every entry of ``MODEL_FOR_CAUSAL_LM_MAPPING``, and T5 and BART, is made from its configuration class,
shrunk by the rules below, and compared with a copy whose embedding matrix really holds the rows
(ids V to V+n-1). Columns of the Markdown table, each a mark or the reason:

- forward: the logits are equal;
- greedy: 12 tokens and their scores are equal;
- padding: a left-padded row equals the row alone ("bare: no" where the bare model's own does not);
- reuse: the same tokens and scores where the prefix is read from its cache, or why it is not;
- context: too long a text is refused ("no limit" where the configuration names none).

Each family runs in a process of its own, for at most ten minutes.
"""

import argparse
import copy
import inspect
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.compatibility import context_of
from kobold_sp_plugin.errors import ContextExceeded, SoftPromptError

VOCABULARY, WIDTH, LAYERS, HEADS = 131, 32, 2, 4
N_TOKENS, NEW = 5, 12
SECONDS = 600
COLUMNS = ("forward", "greedy", "padding", "reuse", "context")
YES = "✓"
ENCODER_DECODERS = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}

HELPERS = ("gemma4_assistant", "gemma4_unified_assistant")
"""No models of text: they guess what another writes, from its hidden states, keys and values."""

# What a size is called, by the whole name, and what it is made.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "dim", "model_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("emb_dim", "word_embed_proj_dim", "lru_width", "hidden_dim", "input_embedding_size"), WIDTH),
    **dict.fromkeys(("attention_hidden_size", "dim_model", "cross_attention_hidden_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "swa_num_key_value_heads"), 2
    ),
    **dict.fromkeys(("head_dim", "v_head_dim", "d_kv", "dim_head", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "kv_channels", "swa_head_dim", "swa_v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    "rotary_dim": 4,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "n_words"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 128),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "context_length", "max_sequence_length"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_state_dim"), 8),
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# And by its end, where the whole name is not in the list.
ENDINGS = {
    "intermediate_size": 64,
    "ffn_dim": 64,
    "_ff": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
# Families whose sizes depend on one another, or that are no decoder unless told.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": LAYERS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        **{"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
        **{"layer_types": ["sliding_attention", "full_attention"] * 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4": {"text_config": {"global_head_dim": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 16, "indexer_compress_ratio": 4},
    },
    "qwen4_exp": {
        "text_config": {
            **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
            **{"indexer_budget": 16, "indexer_compress_ratio": 4},
        }
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"mlstm_round_up_to_multiple_of": 1, "ffn_round_up_to_multiple_of": 1},
    "zamba": {
        **{"num_hidden_layers": 4, "mamba_dt_rank": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
        **{name: ["mamba", "hybrid", "mamba", "hybrid"] for name in ("layers_block_type", "layer_types")},
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
}


def shrunk(default, special):
    """A small configuration like ``default``; its sub-configurations are shrunk by the same rules."""
    config_class = type(default)
    given = {}
    parts = getattr(config_class, "sub_configs", None) or {}
    for name in parts:
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "to_dict"):
            own = {
                key: value
                for key, value in part.to_diff_dict().items()
                if key not in ("transformers_version", "per_layer_config")
            }
            given[name] = {**own, **shrunk(part, special.get(name, {})).to_dict()}
    known = {**default.to_dict(), **{name: value_of(default, name) for name in SIZES}}
    for name, value in known.items():
        if isinstance(value, bool) or name in parts or isinstance(getattr(config_class, name, None), property):
            continue
        ending = next((size for end, size in ENDINGS.items() if name.endswith(end)), None)
        size = SIZES.get(name, ending)
        may_be_none = name.endswith("token_id") or name == "head_dim"
        if size is not None and (isinstance(value, int) or (value is None and may_be_none)):
            given[name] = min(size, value) if isinstance(value, int) and value > 0 and not name.endswith("id") else size
    if "is_decoder" in known:
        given["is_decoder"] = True
    if "kv_lora_rank" in known:
        given["num_key_value_heads"] = HEADS  # latent attention has keys and values for every head
    given.update(one_layer_of_each_kind(default, known, given))
    given.update({name: value for name, value in special.items() if name not in parts})
    return config_class(**given)


def value_of(config, name):
    """A configuration's value, or None where it has none or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # each configuration has its own way to say that there is none
        return vars(config).get(name)


def one_layer_of_each_kind(default, known, given):
    """For lists with an entry per layer: the first layer of each combination, and their number."""
    name = next((each for each in ("num_hidden_layers", "n_layer", "num_layers") if each in given), None)
    count = known.get(name) if name else None
    lists = {key: value for key, value in known.items() if isinstance(value, list) and len(value) == count}
    if not lists or count < LAYERS:
        return {}
    kinds = {}
    for index in range(count):
        kinds.setdefault(str([value[index] for value in lists.values()]), index)
    kept = sorted(kinds.values())[:6]
    kept = kept if len(kept) > 1 else list(range(LAYERS))
    return {name: len(kept), **{key: [value[index] for index in kept] for key, value in lists.items()}}


def tiny_model(family):
    """A random model of ``family`` in evaluation mode whose continuations vary."""
    name, _, kind = family.partition(" ")
    config = shrunk(CONFIG_MAPPING[name](), SPECIAL.get(name, {}))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (
            getattr(transformers, ENCODER_DECODERS[name])(config) if kind else AutoModelForCausalLM.from_config(config)
        )
    model = model.float().eval()
    attach(model).detach()  # a refusal comes before anything that the model itself may not do
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        if kind:
            model.generation_config.decoder_start_token_id = 2
    model.config.eos_token_id = None
    first = {name: value.clone() for name, value in model.state_dict().items()}
    for factor in (6, 3, 1.5, 1):
        model.load_state_dict(first)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.is_floating_point():
                    parameter.mul_(factor)
            out = generate(model, text_of(7))
        scores = torch.stack(out.scores).float()
        if torch.isfinite(scores[:, :, 3:]).any() and not torch.isnan(scores).any() and scores.abs().max() < 1e4:
            break
    return model


def text_of(length, seed=0):
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, mask=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    if mask is not None or "attention_mask" in inspect.signature(model.forward).parameters:
        options["attention_mask"] = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model.generate(ids, output_scores=True, return_dict_in_generate=True, **options)


def forward(model, ids, **kwargs):
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = torch.tensor([[2, 9, 14]])
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def with_rows_in_place(model, rows):
    """A copy of ``model`` whose tables of ids really hold ``rows`` behind their ends."""
    larger = copy.deepcopy(model)
    reader = larger.get_encoder() if larger.config.is_encoder_decoder else larger
    embedding = reader.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    grow(embedding, torch.tensor(rows))
    # Entries per id that no soft prompt has: those of the padding token, as llama.cpp has it.
    for name, module in larger.named_modules():
        if name.endswith("embed_tokens_per_layer"):
            grow(module, module.weight.detach()[:1].expand(vocabulary + len(rows) - module.num_embeddings, -1))
        if hasattr(module, "tid2eid"):
            module.tid2eid = torch.cat([module.tid2eid, module.tid2eid[:1].expand(len(rows), -1)])
        if hasattr(module, "vocab_offset"):
            module.vocab_offset = 10**6  # else the new ids would be sounds
    return larger


def grow(embedding, rows):
    embedding.weight = torch.nn.Parameter(torch.cat([embedding.weight.detach(), rows]))
    embedding.num_embeddings = len(embedding.weight)


def difference(one, other):
    """Largest difference of two tensors, as a part of the spread of the first; infinite entries have to agree."""
    one, other = one[..., :VOCABULARY], other[..., :VOCABULARY]  # a head of the same matrix writes the new ids too
    if one.shape != other.shape:
        return float("inf")
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(other)):
        return float("inf")
    one, other = one[finite].double(), other[finite].double()
    return float((one - other).abs().max() / one.std().clamp(min=1e-9))


def compared(ours, expected, n_text, n_expected, row=0, expected_row=0):
    """A mark where tokens and scores are equal, else how far apart they are."""
    new = ours.sequences[row, n_text:].tolist(), expected.sequences[expected_row, n_expected:].tolist()
    scores = [
        torch.stack([step[index] for step in out.scores]) for out, index in ((ours, row), (expected, expected_row))
    ]
    worst = difference(*scores)
    if new[0] != new[1] or worst > 1e-3:
        return f"differs by {worst:.1e}"
    return YES


class Reasons(logging.Handler):
    """Keeps what the prefix cache says."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def examined(family):
    """The row of ``family``: column to mark or reason."""
    model = tiny_model(family)
    encoder = model.config.is_encoder_decoder
    text, hard = text_of(9), text_of(N_TOKENS, seed=1)
    row = {}
    bare = generate(model, torch.cat([hard, text], 1))
    out_of_loop = bare.sequences.shape[1] - NEW if encoder else 0

    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), text[:, :6]], 1), text])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    handle = attach(model)
    handle.detach()
    reader = model.get_encoder() if encoder else model
    embedding = reader.get_input_embeddings()
    generator = np.random.default_rng(0)
    rows = embedding.weight.detach()[hard[0]].numpy()
    rows = (rows + 0.5 * rows.std() * generator.standard_normal(rows.shape)).astype(np.float32)
    larger = with_rows_in_place(model, rows)
    vocabulary = embedding.weight.shape[0]
    new_ids = torch.arange(vocabulary, vocabulary + N_TOKENS).unsqueeze(0)
    whole = torch.cat([new_ids, text], 1)
    expected_logits = forward(larger, whole, attention_mask=torch.ones_like(whole))
    expected = generate(larger, whole)
    alone = [generate(model, torch.cat([hard, each], 1)) for each in (text[:, :6], text)]
    in_batch = padded(model, torch.cat([hard.expand(2, -1), batch], 1), mask, N_TOKENS)
    bare_pads = in_batch is not None and all(
        compared(in_batch, each, *lengths(encoder, out_of_loop, 9 + N_TOKENS, n), row=index) == YES
        for index, (each, n) in enumerate(zip(alone, (6 + N_TOKENS, 9 + N_TOKENS)))
    )

    reasons = Reasons()
    log = logging.getLogger("kobold_sp_plugin.soft_tokens")
    log.addHandler(reasons)
    log.setLevel(logging.DEBUG)
    handle = attach(model)
    handle.select(SoftPrompt(rows=rows))
    worst = difference(forward(model, **{"ids": None, **renamed(handle.prepend(text))}), expected_logits)
    row["forward"] = YES if worst < 1e-4 else f"differs by {worst:.1e}"
    sizes = lengths(encoder, out_of_loop, 9, 9 + N_TOKENS)
    first = generate(model, text)
    row["greedy"] = compared(first, expected, *sizes)
    again = generate(model, text)
    said = reasons.said[-1] if reasons.said else "no prefix reuse: the encoder sees all of the text"
    row["reuse"] = compared(again, expected, *sizes) if said.startswith("read") else said.split(": ", 1)[1]
    handle.select(SoftPrompt(rows=embedding.weight.detach()[hard[0]].numpy()))
    try:
        ours = generate(model, batch, mask)
        marks = [
            compared(ours, generate(model, each), *lengths(encoder, out_of_loop, 9, n), row=index)
            for index, (each, n) in enumerate(((text[:, :6], 6), (text, 9)))
        ]
        row["padding"] = next((mark for mark in marks if mark != YES), YES)
    except Exception as error:
        row["padding"] = short(error)
    if row["padding"] != YES and not bare_pads:
        row["padding"] = "bare: no"
    row["context"] = context_mark(model, handle)
    if len(set(expected.sequences[0].tolist()[-NEW:])) < 3:
        row["greedy"] += " (few distinct tokens)"
    return row


def renamed(arguments):
    return {"ids": arguments["input_ids"], "attention_mask": arguments["attention_mask"]}


def lengths(encoder, out_of_loop, *usual):
    return [out_of_loop] * len(usual) if encoder else list(usual)


def padded(model, ids, mask, n_tokens):
    """What the bare model generates for ``[pad][front][text]``; ``ids`` have the front first. None: it cannot."""
    front, batch = ids[:, :n_tokens], ids[:, n_tokens:]
    rows = [torch.cat([line[:pad], f, line[pad:]]) for line, f, pad in zip(batch, front, (mask == 0).sum(1).tolist())]
    masks = [
        torch.cat([torch.zeros(pad), torch.ones(ids.shape[1] - pad)]).long() for pad in (mask == 0).sum(1).tolist()
    ]
    try:
        return generate(model, torch.stack(rows), torch.stack(masks))
    except Exception:
        return None


def context_mark(model, handle):
    context = context_of(model)
    if context is None:
        return "no limit"
    width = model.get_input_embeddings().weight.shape[1]
    handle.select(SoftPrompt(rows=np.ones((context - 4, width), dtype=np.float32)))
    try:
        generate(model, text_of(9))
    except ContextExceeded:
        return YES
    return "no error"


def short(error):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def work(family, verbose, pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sys.stdout.flush()
    try:
        row = {"failed": "a helper, which reads no ids"} if family in HELPERS else examined(family)
    except SoftPromptError as error:
        row = {"refused": f"{type(error).__name__}: {error}"}
    except Exception as error:
        if verbose:
            traceback.print_exc()
        row = {"failed": short(error)}
    pipe.send(row)
    pipe.close()


def in_a_process(family, verbose):
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(family, verbose, its))
    process.start()
    its.close()
    row = {"failed": f"no answer within {SECONDS} s"}
    try:
        if mine.poll(SECONDS):
            row = mine.recv()
    except EOFError:
        row = {"failed": "its process ended"}
    process.kill()
    process.join()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="these families")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of each failure")
    parser.add_argument("--output", type=Path, help="write the table here too")
    args = parser.parse_args()
    families = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(f"{name} (encoder-decoder)" for name in ENCODER_DECODERS)]
    if args.only:
        families = [family for family in families if family.split(" ")[0] in args.only]
    torch.set_num_threads(1)
    generate(tiny_model("gpt2"), text_of(3))  # so that what all need is imported once, before the processes part
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    print("\n".join(lines), flush=True)
    rows = {}
    for family in families:
        rows[family] = row = in_a_process(family, args.verbose)
        if "failed" in row or "refused" in row:
            kind = "failed" if "failed" in row else "refused"
            cells = [f"{kind}: {row[kind]}"] + [""] * (len(COLUMNS) - 1)
        else:
            cells = [row[column] for column in COLUMNS]
        lines.append(f"| {family} | {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        print(lines[-1], flush=True)
    ran = [row for row in rows.values() if "forward" in row]
    counts = {column: sum(row[column].startswith(YES) for row in ran) for column in COLUMNS}
    lines.append(
        f"\ntransformers {transformers.__version__}, torch {torch.__version__}: {len(ran)} of {len(rows)} run; "
        + ", ".join(f"{column} {count}" for column, count in counts.items())
    )
    print(lines[-1])
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
