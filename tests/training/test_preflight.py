"""What is advised where a training does not fit the memory."""

import json

import pytest
from models import FAMILY, tiny_model, tiny_tokenizer

from kobold_sp_plugin.training import Settings, preflight
from kobold_sp_plugin.training.places import places
from kobold_sp_plugin.training.preflight import Plan, look

WIDE = {"num_hidden_layers": 12, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """The problems of a training of a model of 50 million weights, as its folder has it, in ``free`` bytes."""
    tiny_model(FAMILY).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    known = {**json.loads(config.read_text()), **WIDE, "max_position_embeddings": 4096, "n_positions": 4096}
    config.write_text(json.dumps(known))
    with open(next((tmp_path / "model").glob("*model.[sb]*")), "ab") as file:
        file.truncate(200_000_000)
    (tmp_path / "rain.txt").write_text("The door opened and the rain came in. " * 99)

    def problems(free, precision="auto", **settings):
        monkeypatch.setattr(preflight, "free_memory", lambda *_: (free, "memory"))
        model = str(tmp_path / "model")
        plan = Plan(
            "Rain", tmp_path / "rain.txt", model, places(tmp_path / "rain.zip"), Settings(**settings), precision
        )
        return [each for each in look(plan).problems if "memory" in each]

    return problems


def advised(problem):
    """The options of each advice."""
    return [each.split(" (")[0] for each in problem.split("it would fit: ")[1].split("; ")]


def settings_of(options):
    words = iter(options.split())
    kinds = {"--precision": str, "--batch-tokens": int, "--block": int}
    return {
        word[2:].replace("-", "_"): True if word == "--checkpoint-layers" else kinds[word](next(words))
        for word in words
    }


@pytest.mark.parametrize(
    "free, block, first",
    [
        (10**9, 256, ["--batch-tokens"]),
        (500_000_000, 256, ["--batch-tokens", "--checkpoint-layers"]),
        (400_000_000, 2048, ["--block", "--batch-tokens", "--checkpoint-layers"]),
    ],
)
def test_what_is_advised_fits_and_changes_no_more_than_it_must(problems, free, block, first):
    (problem,) = problems(free, block=block)
    options = advised(problem)
    assert [word for word in options[0].split() if word.startswith("--")] == first
    assert any("--precision bfloat16" in each for each in options)
    for each in options:
        given = settings_of(each)
        assert not problems(free, **{"block": block, **given}), each
        if "batch_tokens" in given and "block" not in given:  # the largest that fits
            assert problems(free, **{"block": block, **given, "batch_tokens": given["batch_tokens"] + block + 20}), each


def test_where_nothing_fits_that_is_said(problems):
    (problem,) = problems(60_000_000)
    assert "has 60 MB left" in problem and "50 million weights" in problem and "No settings" in problem


def test_a_text_longer_than_a_batch_is_counted_whole(problems):
    assert not problems(2_000_000_000, block=256)
    assert problems(2_000_000_000, block=2048)


def test_no_larger_precision_is_advised(problems):
    (problem,) = problems(400_000_000, precision="bfloat16")
    assert len(advised(problem)) == 3 and "float32" not in problem and "float16" not in problem.replace("bfloat16", "")
