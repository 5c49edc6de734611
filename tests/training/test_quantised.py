"""A model in 8 and in 4 bit, as bitsandbytes loads it; on a CPU."""

import numpy as np
import pytest
import torch
from models import tiny_model, tiny_tokenizer

from kobold_sp_plugin import errors
from kobold_sp_plugin.softprompt import OWN_KEY
from kobold_sp_plugin.training import Settings, Training, train
from kobold_sp_plugin.training.loading import load_model

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
pytest.importorskip("transformers", "5.0")

TEXTS = [f"The door opened and the rain came in. Nobody said {a} {b}." for a in "abcdefgh" for b in "abcdefgh"]
SETTINGS = Settings(n_tokens=4, steps=30, block=32, batch_tokens=400, learning_rate=0.1, patience=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    with torch.no_grad():  # of the outsized weights of the tiny models little is left in four bits
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def gradient(model, tokenizer, folder):
    """Of the first step; held-out texts have been looked at before, as in every training."""
    training = Training(model, tokenizer, TEXTS, SETTINGS, folder)
    training.held_out_loss()
    training._one_step([(training.dataset, training._pieces)])
    training.close()
    return training.rows.parameter.grad.flatten()


@pytest.mark.parametrize("precision, least", [("8bit", 0.98), ("4bit", 0.8)])
def test_the_gradient_is_that_of_the_whole_model_but_for_the_bits(folder, tmp_path, precision, least):
    model, tokenizer, _ = load_model(folder, precision)
    whole, _, _ = load_model(folder, "float32")
    found, wanted = (gradient(each, tokenizer, tmp_path / name) for each, name in ((model, "a"), (whole, "b")))
    assert torch.cosine_similarity(found, wanted, dim=0) > least


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_training_lowers_the_held_out_loss(folder, precision):
    model, tokenizer, _ = load_model(folder, precision)
    trained = train(model, tokenizer, TEXTS, SETTINGS)
    about = trained.metadata[OWN_KEY]["training"]
    assert about["held_out_after"] < 0.97 * about["held_out_before"]
    assert np.isfinite(trained.rows).all()


def test_one_that_has_generated_where_that_leaves_no_gradients_is_refused(folder):
    model, tokenizer, _ = load_model(folder, "4bit")
    model.eval().generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2, do_sample=False)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    if not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers):
        pytest.skip("a processor for which bitsandbytes does not pack them")
    with pytest.raises(errors.UnsupportedModel, match="Load it anew"):
        train(model, tokenizer, TEXTS, SETTINGS)
