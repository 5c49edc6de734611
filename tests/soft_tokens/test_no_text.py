"""A soft prompt and no text at all: KoboldAI lets its users begin with nothing."""

import pytest
import torch
from models import FAMILIES, tiny_model

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import UnsupportedCall

HARD = [77, 12, 101, 5, 64]
NOTHING = torch.zeros((1, 0), dtype=torch.long)


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param)


def rows_of(model, ids):
    return SoftPrompt(rows=model.get_input_embeddings().weight.detach()[ids].numpy())


@pytest.mark.parametrize("hard", [HARD, HARD[:1]])
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 8},
        {"max_length": 8},
        {"max_new_tokens": 8, "use_cache": False},
        {"max_new_tokens": 8, "num_beams": 3},
        {"max_new_tokens": 6, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_the_text_is_that_behind_the_rows_alone(model, hard, options):
    expected_options = dict(options)
    if "max_length" in options:
        expected_options = {"max_new_tokens": options["max_length"]}
    behind = torch.tensor([hard])
    mask = torch.ones_like(behind)
    expected = model.generate(behind, attention_mask=mask, do_sample=False, **expected_options)
    expected = expected if isinstance(expected, torch.Tensor) else expected.sequences
    handle = attach(model)
    handle.select(rows_of(model, hard))
    found = model.generate(NOTHING, do_sample=False, **options)
    found = found if isinstance(found, torch.Tensor) else found.sequences
    assert found.tolist() == expected[:, len(hard) :].tolist()


def test_several_rows_of_nothing_are_sampled_each(model):
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    torch.manual_seed(0)
    found = model.generate(NOTHING.expand(3, 0), do_sample=True, max_new_tokens=8)
    assert found.shape[0] == 3 and len({tuple(row) for row in found.tolist()}) > 1


def test_a_streamer_would_see_the_stand_in_and_is_refused(model):
    handle = attach(model)
    handle.select(rows_of(model, HARD))
    with pytest.raises(UnsupportedCall, match="no streamer"):
        model.generate(NOTHING, streamer=object(), max_new_tokens=2)
