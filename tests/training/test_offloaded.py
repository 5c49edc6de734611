"""A model that does not fit one device: its layers on several, in memory or on the disk, as accelerate spreads them."""

import numpy as np
import pytest
from models import tiny_model, tiny_tokenizer

from kobold_sp_plugin.training import Settings, train
from kobold_sp_plugin.training.loading import load_model

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", "4.44")

TEXTS = [f"The door opened and the rain came in. Nobody said {a} {b}." for a in "abcdefgh" for b in "abcdefgh"]
SETTINGS = Settings(n_tokens=4, steps=6, block=32, batch_tokens=200, evaluate_every=3, learning_rate=0.1)


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("offloaded", [["model.layers.1"], ["model.layers.0", "model.layers.2", "lm_head"]], ids=str)
def test_layers_on_the_disk_give_the_rows_of_the_whole_model(folder, tmp_path, offloaded):
    model, tokenizer, _ = load_model(folder)
    whole = train(model, tokenizer, TEXTS, SETTINGS).rows
    places = [*(f"model.layers.{number}" for number in range(3)), "model.embed_tokens", "model.norm", "lm_head"]
    places += ["model.rotary_emb"]
    device_map = {place: "disk" if place in offloaded else "cpu" for place in places}
    spread = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert any(parameter.device.type == "meta" for parameter in spread.parameters())
    rows = train(spread, tokenizer, TEXTS, SETTINGS).rows
    assert np.allclose(rows, whole, atol=1e-6)


def test_spread_over_the_devices_that_there_are_gives_the_same_rows(folder):
    model, tokenizer, _ = load_model(folder)
    spread, _, _ = load_model(folder, sharded=True)
    rows, whole = (train(each, tokenizer, TEXTS, SETTINGS).rows for each in (spread, model))
    assert np.allclose(rows, whole, atol=1e-6)
