"""Models with an encoder read their soft tokens there."""

import copy

import numpy as np
import pytest
import torch
import transformers

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import ContextExceeded, UnsupportedCall

VOCABULARY = 60
TEXT = torch.tensor([[5, 17, 44, 30, 23, 8, 2]])
ROWS = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
CONFIGS = {
    "T5": {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4},
    "Bart": {
        **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    },
}


@pytest.fixture(params=CONFIGS)
def model(request):
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **CONFIGS[request.param]
    )
    config.decoder_start_token_id = 2
    config.forced_eos_token_id = None
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
        model.generation_config.decoder_start_token_id = 2
    return model


@pytest.fixture
def larger(model):
    """A copy whose encoder's matrix really holds the rows."""
    larger = copy.deepcopy(model)
    encoder = larger.get_encoder()
    grown = copy.deepcopy(encoder.embed_tokens)
    grown.weight = torch.nn.Parameter(torch.cat([grown.weight.detach(), torch.tensor(ROWS)]))
    encoder.embed_tokens = grown
    return larger


def in_front(text):
    return torch.cat([torch.arange(VOCABULARY, VOCABULARY + 4).expand(text.shape[0], -1), text], dim=1)


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, **{"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **options}
    ).tolist()


def scores(model, ids, **options):
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{"max_new_tokens": 6, "do_sample": False, "eos_token_id": None},
        **{"output_scores": True, "return_dict_in_generate": True},
        **options,
    )
    return torch.stack(out.scores)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generate_equals_rows_really_placed_in_the_matrix(model, larger, options):
    expected = scores(larger, in_front(TEXT), **options)
    assert not torch.allclose(expected, scores(model, TEXT, **options))
    attach(model).select(SoftPrompt(rows=ROWS))
    torch.testing.assert_close(scores(model, TEXT, **options), expected, rtol=1e-5, atol=1e-5)


def test_processors_that_look_at_the_text_see_no_soft_token(model):
    attach(model).select(SoftPrompt(rows=ROWS))
    assert len(generate(model, TEXT, encoder_no_repeat_ngram_size=2)[0]) == 11


def test_a_forward_pass_equals_rows_really_placed_in_the_matrix(model, larger):
    decoder_ids = torch.tensor([[2, 9, 14]])
    expected = larger(in_front(TEXT), decoder_input_ids=decoder_ids).logits
    handle = attach(model)
    handle.select(SoftPrompt(rows=ROWS))
    found = model(**handle.prepend(TEXT), decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_right_padded_row_equals_the_row_alone(model):
    attach(model).select(SoftPrompt(rows=ROWS))
    batch = torch.cat([torch.nn.functional.pad(TEXT[:, :4], (0, 3)), TEXT])
    mask = (batch != 0).long()
    assert generate(model, batch, mask) == generate(model, TEXT[:, :4]) + generate(model, TEXT)


def test_detach_gives_the_model_back(model):
    plain, keys = scores(model, TEXT), set(vars(model))
    handle = attach(model)
    handle.select(SoftPrompt(rows=ROWS))
    assert not torch.equal(scores(model, TEXT), plain)
    handle.detach()
    assert torch.equal(scores(model, TEXT), plain) and set(vars(model)) == keys


def test_what_does_not_fit_or_was_read_before_is_refused(model):
    handle = attach(model)
    handle.select(SoftPrompt(rows=ROWS))
    with pytest.raises(UnsupportedCall, match="encoder_outputs"):
        generate(model, TEXT, encoder_outputs=model.get_encoder()(TEXT))
    if model.config.model_type == "bart":  # T5's positions have no limit
        handle.select(SoftPrompt(rows=np.ones((26, 16), dtype=np.float32)))
        with pytest.raises(ContextExceeded, match="shorten the text by 1"):
            generate(model, TEXT)
        assert len(generate(model, TEXT[:, :6])[0]) == 11
