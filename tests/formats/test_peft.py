"""PEFT's adapters, both ways: the same logits in PEFT and here."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from models import CONFIGS, tiny_model

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.formats import load, save
from kobold_sp_plugin.formats.conversion import convert

peft = pytest.importorskip("peft")

OTHERS = {
    "gemma": (
        "Gemma",
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
    "xglm": (
        "XGLM",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128},
    ),
}
FAMILIES = [each for each in ("gpt2", "llama", "opt", "gemma", "xglm") if each in {**CONFIGS, **OTHERS}]
IDS = torch.tensor([[1, 5, 9, 40, 77]])


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    for name, config in OTHERS.items():
        monkeypatch.setitem(CONFIGS, name, config)
    if not hasattr(transformers, f"{CONFIGS[request.param][0]}Config"):
        pytest.skip("not in this release of transformers")
    return request.param


@torch.no_grad()
def in_peft(family, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_model(family), folder)
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@torch.no_grad()
def here(family, softprompt):
    model = tiny_model(family)
    handle = attach(model)
    handle.select(softprompt)
    return model(**handle.prepend(IDS)).logits


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_what_peft_writes(tmp_path, family, method, safe):
    base = tiny_model(family)
    options = {"encoder_hidden_size": 24} if method == "PromptEncoderConfig" else {}
    width = base.get_input_embeddings().embedding_dim
    config = getattr(peft, method)(
        task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=width, num_attention_heads=4, num_layers=2, **options
    )
    adapted = peft.get_peft_model(base, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path, safe_serialization=safe)
    wanted = in_peft(family, tmp_path)
    assert torch.equal(here(family, load(tmp_path)), wanted)
    save(load(tmp_path), tmp_path / "again", format="peft")
    assert torch.equal(in_peft(family, tmp_path / "again"), wanted)


def test_what_is_converted_for_peft(tmp_path, family):
    """From KoboldAI's convention: the rows are multiplied where the model multiplies, and only there."""
    scale = float(getattr(tiny_model(family).get_input_embeddings(), "embed_scale", 1.0))
    width = tiny_model(family).get_input_embeddings().embedding_dim
    rows = np.random.default_rng(1).normal(size=(5, width)).astype(np.float32)
    noir = SoftPrompt(rows, {"name": "Noir"})
    noir.save(tmp_path / "noir.zip")
    result = convert(tmp_path / "noir.zip", tmp_path / "adapter", "peft", scale)
    assert (result.factor, result.lost) == (scale, [])
    assert torch.equal(in_peft(family, tmp_path / "adapter"), here(family, noir))
    back = convert(tmp_path / "adapter", tmp_path / "back.zip", "zip", scale)
    assert np.allclose(load(tmp_path / "back.zip").rows, rows, rtol=1e-6)
    assert (back.scale, load(tmp_path / "back.zip").name) == ("matrix", "Noir")


def test_prefix_tuning_is_refused(tmp_path):
    from kobold_sp_plugin.errors import UnsupportedMethod

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(tiny_model("gpt2"), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedMethod, match="keys and values for each layer"):
        load(tmp_path)
