"""Soft prompts anywhere in a text, several, mixed in a batch: equal to a model whose matrix really has the rows."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers
from models import FAMILIES, FAMILY, VOCABULARY, softprompt, tiny_model, tiny_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import ContextExceeded, UnsupportedCall, WidthMismatch
from kobold_sp_plugin.soft_tokens.prefix import MOST_PREFIXES
from kobold_sp_plugin.soft_tokens.text import FIRST_ID, MOST_KEPT, with_softprompts

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
def llama_or_gptj():
    return tiny_model(FAMILY)


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
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
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
    with handle.reading(inputs["input_ids"], inputs["attention_mask"]) as arguments:
        logits = model(**arguments).logits
    torch.testing.assert_close(logits, larger(ids).logits, rtol=1e-5, atol=1e-5)


BATCH = (NOIR + "The door", "The door opened", "Once " + SEA + " upon a time " + ICE, NOIR + SEA, "The rain" + ICE)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=str,
)
def test_rows_of_a_batch_each_have_their_own(model, tokenizer, options):
    if model.config.model_type == "gemma2" and "num_return_sequences" in options and RELEASE < (4, 48):
        pytest.skip("the family's own cache in this release has no room for them")
    wanted = expected(model, BATCH, tokenizer, **options)
    attach(model)
    inputs = tokenizer(list(BATCH), return_tensors="pt", padding=True)
    result = generate(model, inputs, **options)
    length, times = inputs["input_ids"].shape[1], options.get("num_return_sequences", 1)
    assert torch.equal(result[:, :length], inputs["input_ids"].repeat_interleave(times, dim=0))
    found = [row[length:] for row in result.tolist()]
    assert [cut(row) for row in found] == [cut(row) for rows in wanted for row in rows]


class Witness(LogitsProcessor):
    """Keeps what it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


@pytest.mark.parametrize("text", [BATCH[2], NOIR + "The door", NOIR + ""], ids=str)
def test_nobody_sees_a_soft_token(llama_or_gptj, tokenizer, text):
    attach(llama_or_gptj)
    witness = Witness()
    inputs = tokenizer(text, return_tensors="pt")
    given = inputs["input_ids"].clone()
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    result = generate(llama_or_gptj, inputs, logits_processor=LogitsProcessorList([witness]), **options)
    own = [each for each in inputs["input_ids"][0].tolist() if each < FIRST_ID]
    assert witness.seen and all(int(ids.max()) < VOCABULARY for ids in witness.seen)
    assert witness.seen[0].tolist() == [own]
    assert torch.equal(inputs["input_ids"], given) and torch.equal(result[:, : given.shape[1]], given)
    assert tokenizer.decode(result[0]) == tokenizer.decode([*own, *result[0, given.shape[1] :].tolist()])


def test_a_row_is_penalised_for_nothing_that_it_does_not_have(llama_or_gptj, tokenizer):
    attach(llama_or_gptj)
    options = {"repetition_penalty": 3.0}
    texts = [SEA + "The door", ICE + "The rain", SEA + NOIR + "Nobody"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    together = generate(llama_or_gptj, inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    for text, row in zip(texts, together):
        inputs = tokenizer(text, return_tensors="pt")
        alone = generate(llama_or_gptj, inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
        assert cut(row) == cut(alone)


def test_lengths_of_the_call_count_the_soft_tokens_of_the_text(llama_or_gptj, tokenizer):
    attach(llama_or_gptj)
    inputs = tokenizer("Once " + SEA + " upon a time", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": inputs["attention_mask"]}
    assert llama_or_gptj.generate(inputs["input_ids"], max_length=length + 6, **options).shape == (1, length + 6)
    assert llama_or_gptj.generate(inputs["input_ids"], max_new_tokens=3, **options).shape == (1, length + 3)


def test_guessing_ahead_changes_nothing(llama_or_gptj, tokenizer):
    if RELEASE < (4, 40):
        pytest.skip("this release has no prompt lookup, or in another form")
    attach(llama_or_gptj)
    inputs = tokenizer("The door " + NOIR + " The door " + SEA, return_tensors="pt")
    plain = generate(llama_or_gptj, inputs)
    assert generate(llama_or_gptj, inputs, prompt_lookup_num_tokens=3).tolist() == plain.tolist()


@pytest.mark.parametrize("selected", [NOIR, AFTER], ids=["before", "after"])
def test_a_selection_stands_in_front_of_the_text(llama_or_gptj, tokenizer, selected):
    handle = attach(llama_or_gptj)
    inputs = tokenizer(selected + SEA + "The door" + ICE, return_tensors="pt")
    wanted = generate(llama_or_gptj, inputs)[:, inputs["input_ids"].shape[1] :]
    handle.select(selected)
    inputs = tokenizer(SEA + "The door" + ICE, return_tensors="pt")
    assert torch.equal(generate(llama_or_gptj, inputs)[:, inputs["input_ids"].shape[1] :], wanted)


def test_what_stands_at_the_front_is_read_once(llama_or_gptj, tokenizer, caplog):
    if FAMILY != "llama":
        pytest.skip("one family is enough")
    attach(llama_or_gptj)
    inputs = tokenizer(NOIR + "The door " + ICE + "opened", return_tensors="pt")
    caplog.set_level("DEBUG", "kobold_sp_plugin.soft_tokens.prefix")
    first = generate(llama_or_gptj, inputs)
    assert f"read {NOIR.n_tokens} soft tokens from the cache" in caplog.text
    assert torch.equal(generate(llama_or_gptj, inputs), first)


def test_refusals(llama_or_gptj, tokenizer):
    attach(llama_or_gptj)
    with pytest.raises(WidthMismatch, match="made for 16 columns"):
        generate(llama_or_gptj, tokenizer(softprompt(1, 2, 16) + "The door", return_tensors="pt"))
    with pytest.raises(ContextExceeded, match="150 soft tokens"):
        generate(llama_or_gptj, tokenizer(softprompt(1, 150) + "The door", return_tensors="pt"))
    with pytest.raises(UnsupportedCall, match="takes no streamer"):
        generate(llama_or_gptj, tokenizer(NOIR + "", add_special_tokens=False, return_tensors="pt"), streamer=object())
    with pytest.raises(UnsupportedCall, match="truncation"):
        tokenizer(NOIR + "The door", truncation=True)


def test_a_soft_prompt_that_nobody_has_any_more_is_said_to_be_gone(llama_or_gptj, tokenizer):
    attach(llama_or_gptj)
    inputs = tokenizer(softprompt(99, 2) + "The door", return_tensors="pt")
    for seed in range(MOST_KEPT):
        tokenizer(softprompt(1000 + seed, 2) + "The door")
    with pytest.raises(UnsupportedCall, match="tokenise the text again"):
        generate(llama_or_gptj, inputs)


def test_a_soft_prompt_has_its_ids_for_ever_and_alone(tokenizer):
    first = tokenizer(NOIR + "")["input_ids"][:4]
    assert tokenizer("The " + SoftPrompt(NOIR.rows, NOIR.metadata))["input_ids"][-4:] == first
    other = softprompt(50, 4, name="noir")
    assert not set(tokenizer(other + "", add_special_tokens=False)["input_ids"]) & set(first)


def test_the_tokenizer_is_otherwise_the_same(tokenizer, tmp_path, caplog):
    plain = tiny_tokenizer()
    text = "Once " + NOIR + " upon"
    assert dict(tokenizer("The door")) == dict(plain("The door")) and type(tokenizer).__name__ == type(plain).__name__
    assert isinstance(tokenizer, type(plain)) and with_softprompts(tokenizer) is tokenizer
    for made in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert made(text)["input_ids"] == tokenizer(text)["input_ids"] == made.encode(text)
    tokenizer.save_pretrained(str(tmp_path))
    assert (
        transformers.AutoTokenizer.from_pretrained(str(tmp_path))("The door")["input_ids"]
        == plain("The door")["input_ids"]
    )
    assert len(plain(text)["input_ids"]) != len(tokenizer(text)["input_ids"])
    assert not caplog.records
    tokenizer(f"{text}!")
    assert "read as ordinary text" in caplog.text


def test_rows_are_padded_on_the_left_as_generate_needs_them():
    texts = [NOIR + "The door", "The " + ICE]
    made = with_softprompts(tiny_tokenizer())
    lengths = [len(made(text)["input_ids"]) for text in texts]
    short = [0] * (lengths[0] - lengths[1])
    assert made(texts, padding=True)["attention_mask"] == [[1] * lengths[0], short + [1] * lengths[1]]
    assert made(texts, padding=True, padding_side="right")["attention_mask"][1] == [1] * lengths[1] + short
    assert len(made(texts, padding="max_length", max_length=40)["input_ids"][1]) == 40
    assert len(made(texts, padding=True, pad_to_multiple_of=16)["input_ids"][1]) % 16 == 0


def test_eight_different_ones_side_by_side(tokenizer):
    model = tiny_model("gpt2")
    several = [softprompt(seed, 5) for seed in range(8)]
    attach(model)
    result = generate(model, tokenizer([each + "The door" for each in several], return_tensors="pt"))
    for softprompt_, row in zip(several, result[:, -10:]):
        with attach(model).override(softprompt_):
            alone = generate(model, tokenizer("The door", return_tensors="pt"))
        assert cut(row.tolist()) == cut(alone[0, -10:].tolist())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_as_long_ones_at_the_front_of_each_row_are_read_once(llama_or_gptj, tokenizer, caplog, options):
    """Each row's keys and values are those of its own; the next time, its text alone is forwarded."""
    model = llama_or_gptj
    attach(model)
    texts = [softprompt(seed, 5) + "The door" + ICE for seed in (1, 2, 1, 3)]
    wanted = [row for text in texts for row in generate(model, tokenizer([text], return_tensors="pt"), **options)]
    attach(model).detach()
    handle = attach(model)  # which has no prefixes
    inputs = tokenizer(texts, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    embedding, read = model.get_input_embeddings(), []
    inner = vars(embedding)["forward"]
    vars(embedding)["forward"] = lambda ids, *args, **kwargs: (read.append(ids.shape), inner(ids, *args, **kwargs))[1]
    caplog.set_level("DEBUG", "kobold_sp_plugin.soft_tokens.prefix")
    try:
        for _ in range(2):
            read.clear()
            result = generate(model, inputs, **options)
            assert caplog.messages[-1] == "read 5 soft tokens from the cache of their prefix"
            assert [cut(row[length:].tolist()) for row in result] == [cut(row[length:].tolist()) for row in wanted]
    finally:
        vars(embedding)["forward"] = inner
    assert tuple(read[0]) == (4 * options.get("num_beams", 1), length - 5)
    assert len(handle._adapter._prefixes._kept) == 3
    assert len({str(row) for row in result.tolist()}) > 2


def test_too_many_different_ones_are_read_as_a_whole(llama_or_gptj, tokenizer, caplog):
    attach(llama_or_gptj)
    caplog.set_level("DEBUG", "kobold_sp_plugin.soft_tokens.prefix")
    texts = [softprompt(seed, 5) + "The door" for seed in range(MOST_PREFIXES + 1)]
    generate(llama_or_gptj, tokenizer(texts, return_tensors="pt"))
    assert "more than" in caplog.text
