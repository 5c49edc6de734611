"""Soft prompts anywhere in a text, several, mixed in a batch: equal to a model whose matrix really has the rows."""

import copy

import numpy as np
import pytest
import torch
import transformers
from models import FAMILIES, VOCABULARY, softprompt, tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.soft_tokens.text import with_softprompts

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NOIR, SEA, ICE = (
    softprompt(seed, n_tokens, name=name) for seed, n_tokens, name in ((1, 4, "noir"), (2, 7, "sea"), (3, 1, "ice"))
)
AFTER = SoftPrompt(softprompt(4, 3).rows, order="after_bos")
ALL = (NOIR, SEA, ICE, AFTER)

TEXTS = {
    "in the middle": "Once " + NOIR + " upon a time",
    "in front": NOIR + "The door opened",
    "behind the beginning": AFTER + "The door opened",
    "at the very end": "The door opened" + SEA,
    "two": "The " + NOIR + " door opened " + SEA + " and",
    "three, side by side and apart": NOIR + SEA + "The door " + ICE + "opened",
    "the same twice": "The " + NOIR + " door " + NOIR + " opened",
    "alone": NOIR + "",
    "two alone": NOIR + SEA,
}


def mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    return model


@pytest.fixture(params=[*FAMILIES, *(["mamba"] if RELEASE >= (4, 57) else [])])
def model(request):
    return mamba() if request.param == "mamba" else tiny_model(request.param)


@pytest.fixture
def tokenizer():
    made = with_softprompts(tiny_tokenizer())
    made.padding_side = "left"
    return made


def with_rows(model):
    """The model with a larger matrix, and where each soft prompt's rows are in it: the reference."""
    larger = copy.deepcopy(model)
    embedding = copy.deepcopy(model.get_input_embeddings())
    rows = np.concatenate([each.rows for each in ALL])
    embedding.weight = torch.nn.Parameter(torch.cat([embedding.weight, torch.tensor(rows)]))
    embedding.num_embeddings = len(embedding.weight)
    larger.set_input_embeddings(embedding)
    larger.config.tie_word_embeddings = False
    starts = np.cumsum([VOCABULARY, *(each.n_tokens for each in ALL)])
    return larger, {each: list(range(start, start + each.n_tokens)) for each, start in zip(ALL, starts)}


def placed(text, tokenizer, ids_of):
    """The ids of a text, written down by hand."""
    ids = []
    front = [part for part in getattr(text, "parts", ()) if isinstance(part, SoftPrompt)]
    parts = list(getattr(text, "parts", (text,)))
    begun = False
    for part in parts:
        if isinstance(part, SoftPrompt):
            if not begun and part is AFTER:
                ids, begun = [*ids, 1], True
            ids += ids_of[part]
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"] if begun else tokenizer(part)["input_ids"]
            begun = True
    return ids if begun or not front else [*ids, 1]


def generate(model, inputs, **options):
    return model.generate(**inputs, **{"max_new_tokens": 10, "do_sample": False, **options})


def expected(model, texts, tokenizer, **options):
    """What the reference writes behind each text, one at a time."""
    larger, ids_of = with_rows(model)
    found = []
    for text in texts:
        ids = torch.tensor([placed(text, tokenizer, ids_of)])
        result = generate(larger, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **options)
        found.append(result[:, ids.shape[1] :].tolist())
    return found


def cut(ids, eos=2):
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_reads_as_if_the_matrix_had_the_rows(model, tokenizer, name):
    text = TEXTS[name]
    larger, ids_of = with_rows(model)
    ids = torch.tensor([placed(text, tokenizer, ids_of)])
    wanted = generate(larger, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    handle = attach(model)
    inputs = tokenizer(text, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert length == ids.shape[1]
    result = generate(model, inputs)
    assert torch.equal(result[:, :length], inputs["input_ids"])
    assert result[:, length:].tolist() == wanted[:, length:].tolist()
    assert int(result[:, length:].max()) < VOCABULARY
    with handle.reading(**inputs) as arguments:
        logits = model(**arguments).logits
    torch.testing.assert_close(logits, larger(ids).logits, rtol=1e-5, atol=1e-5)


BATCH = (NOIR + "The door", "The door opened", "Once " + SEA + " upon a time " + ICE, NOIR + SEA, "The rain" + ICE)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=str,
)
def test_rows_of_a_batch_each_have_their_own(model, tokenizer, options):
    wanted = expected(model, BATCH, tokenizer, **options)
    attach(model)
    inputs = tokenizer(list(BATCH), return_tensors="pt", padding=True)
    result = generate(model, inputs, **options)
    length, times = inputs["input_ids"].shape[1], options.get("num_return_sequences", 1)
    assert torch.equal(result[:, :length], inputs["input_ids"].repeat_interleave(times, dim=0))
    found = [row[length:] for row in result.tolist()]
    assert [cut(row) for row in found] == [cut(row) for rows in wanted for row in rows]


def test_eight_different_ones_side_by_side(tokenizer):
    model = tiny_model("gpt2")
    several = [softprompt(seed, 5) for seed in range(8)]
    attach(model)
    result = generate(model, tokenizer([each + "The door" for each in several], return_tensors="pt"))
    for softprompt_, row in zip(several, result[:, -10:]):
        with attach(model).override(softprompt_):
            alone = generate(model, tokenizer("The door", return_tensors="pt"))
        assert cut(row.tolist()) == cut(alone[0, -10:].tolist())
