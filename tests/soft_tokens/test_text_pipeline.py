"""The Soft Prompt Tuner's example, word for word but for the import, with real pipelines."""

from pathlib import Path

import pytest
import torch
import transformers
from models import FAMILY, softprompt, tiny_model, tiny_tokenizer
from transformers import pipeline

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.demonstration import MODEL
from kobold_sp_plugin.soft_tokens import ModelWithSoftPrompts as LlamaSoftPromptLM
from kobold_sp_plugin.soft_tokens import TokenizerWithSoftPrompts as LlamaSPTokenizerFast
from kobold_sp_plugin.softprompt import TaggedText

SAMPLES = Path(__file__).parents[2] / "softprompts"
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# What transformers says of its own defaults, in a pipeline and of the demonstration model's settings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*max_length.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*do_sample.*:UserWarning"),
]


@pytest.fixture
def folder(tmp_path):
    """A tiny model and its tokenizer, saved, and a soft prompt beside them."""
    longer = {"n_positions" if FAMILY == "gptj" else "max_position_embeddings": 1024}
    tiny_model(FAMILY, eos_token_id=None, **longer).save_pretrained(str(tmp_path))
    tiny_tokenizer().save_pretrained(str(tmp_path))
    softprompt(n_tokens=5, name="neuromancer").save(tmp_path / "neuromancer.zip")
    return str(tmp_path)


def behind(model, sp, text, tokenizer, **options):
    """What the model writes with the soft prompt selected; pipelines before 4.40 add no special token to a text."""
    special = {"add_special_tokens": False} if RELEASE < (4, 40) else {}
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False, **special)
    with attach(model).override(sp), torch.no_grad():
        result = model.generate(**inputs, do_sample=False, pad_token_id=0, **options)
    return tokenizer.decode(result[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_example_of_the_seed(folder):
    # Its checkpoint and its file are others; every other word is as it stands there.
    model = LlamaSoftPromptLM.from_pretrained(folder)
    tokenizer = LlamaSPTokenizerFast.from_pretrained(folder)
    generator = pipeline('text-generation', model=model, tokenizer=tokenizer)  # fmt: skip

    sp = SoftPrompt.from_file(folder + "/neuromancer.zip")
    prompt = sp + "The sky over the port"
    output = generator(prompt)

    text = output[0]["generated_text"]
    assert isinstance(text, TaggedText) and text.softprompts == (sp,)
    assert str(text).startswith("<softprompt:neuromancer>The sky over the port")
    assert len(text) > len(prompt)
    assert generator(text, max_new_tokens=3)[0]["generated_text"].softprompts == (sp,)


@pytest.mark.parametrize("which", ["tiny", "demonstration"])
def test_a_pipeline_writes_what_the_model_writes_with_the_soft_prompt_selected(folder, which):
    path = folder if which == "tiny" else str(MODEL)
    if which == "demonstration" and RELEASE < (4, 28):
        pytest.skip("this release knows no Llama")
    model, tokenizer = LlamaSoftPromptLM.from_pretrained(path), LlamaSPTokenizerFast.from_pretrained(path)
    sp = softprompt(3, 6, name="noir") if which == "tiny" else SoftPrompt.load(SAMPLES / "noir.zip")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"do_sample": False, "max_new_tokens": 12}
    plain = transformers.AutoTokenizer.from_pretrained(path)
    wanted = behind(model, sp, "The door opened", plain, max_new_tokens=12)
    found = generator(sp + "The door opened", return_full_text=False, **options)[0]["generated_text"]
    assert wanted and found.strip() == wanted.strip()
    without = behind(model, (), "The door opened", plain, max_new_tokens=12)
    assert without != wanted
    assert (
        generator("The door opened", return_full_text=False, **options)[0]["generated_text"].strip() == without.strip()
    )


def test_a_pipeline_takes_several_texts_at_once(folder):
    model, tokenizer = LlamaSoftPromptLM.from_pretrained(folder), LlamaSPTokenizerFast.from_pretrained(folder)
    tokenizer.padding_side = "left"
    first, second = softprompt(1, 3, name="one"), softprompt(2, 6, name="other")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [first + "The door", "Nobody said " + second + " a word", "The rain"]
    options = {"do_sample": False, "max_new_tokens": 8}
    alone = [generator(text, **options)[0]["generated_text"] for text in texts]
    together = [each[0]["generated_text"] for each in generator(texts, batch_size=3, **options)]
    assert together == alone
    assert [str(text).split(">")[0] for text in alone[:2]] == ["<softprompt:one", "Nobody said <softprompt:other"]
