"""A tokenizer of transformers, as engines read texts with it, and text for servers that read it themselves."""

import pytest
from models import softprompt, tiny_tokenizer
from tokenizers import pre_tokenizers

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.engines import GenerationSettings
from kobold_sp_plugin.engines.fitting import fit, in_front
from kobold_sp_plugin.engines.tokenizer import Tokenizer
from kobold_sp_plugin.soft_tokens.text import runs_of

NIGHT, DAY = softprompt(1, 5, name="night"), softprompt(2, 9, name="day")
LONG = "The clock on the wall. " * 40
TEXTS = {
    "short": ("The door opened and", ""),
    "empty": ("", ""),
    "memory": ("The door", "Nobody said. "),
    "long": (LONG, "Nobody said."),
    "long, without memory": (LONG, ""),
    "a soft prompt inside": ("The door " + NIGHT + " opened" + DAY + "and", ""),
    "a soft prompt inside what is long": (LONG + NIGHT + " and " + LONG, "Nobody " + DAY + " said."),
    "at the end": ("The door" + NIGHT, ""),
}


@pytest.fixture(params=["always", "first", "bytes", "no beginning"])
def tokenizer(request):
    made = tiny_tokenizer()
    if request.param == "bytes":
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    elif request.param == "first":
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    elif request.param == "no beginning":
        from tokenizers import processors

        made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return made


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_server_makes_of_the_parts_is_what_was_fitted(tokenizer, name):
    prompt, memory = TEXTS[name]
    reader = Tokenizer(tokenizer, "tiny")
    settings = GenerationSettings(prompt, memory, max_length=10)
    ids = fit(settings, 0, 120, reader)
    begins = reader.begins(ids)
    found = list(ids[:begins])
    for number, part in enumerate(reader.written(settings, ids, is_first=not begins)):
        if isinstance(part, SoftPrompt):
            found += TOKENS[part]
        else:  # a server has a special token before all but the first
            alone = not (number or begins)
            found += tokenizer(part if alone else "<s>" + part, add_special_tokens=False)["input_ids"][not alone :]
    wanted = [each for run, sp, _ in runs_of(ids) for each in (run if sp is None else TOKENS[sp])]
    if "long" not in name:
        assert found == wanted
    else:  # it begins with a whole word
        n_lost = len(wanted) - len(found)
        assert 0 <= n_lost < 6
        assert any(found == wanted[:at] + wanted[at + n_lost :] for at in range(len(reader.prefix()), len(found)))


TOKENS = {NIGHT: [-1] * 5, DAY: [-2] * 9}


def test_soft_prompts_in_front_are_taken_off():
    def taken(prompt, memory="", softprompts=()):
        settings, chosen = in_front(GenerationSettings(prompt, memory), softprompts)
        return settings.memory, settings.prompt, chosen

    assert taken(NIGHT + "The door", "", [DAY]) == ("", "The door", (DAY, NIGHT))
    assert taken("The " + DAY, NIGHT + "") == ("", "The " + DAY, (NIGHT,))
    assert taken(DAY + "The " + DAY, NIGHT + "") == ("", "The " + DAY, (NIGHT, DAY))
    assert taken(DAY + "The", NIGHT + "door")[2] == (NIGHT,)
    assert taken("The door") == ("", "The door", ())
    assert type(in_front(GenerationSettings(NIGHT + "The door"), ())[0].prompt) is str
