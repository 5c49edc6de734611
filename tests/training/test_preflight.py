"""What is advised where a training does not fit the memory."""

import json
import re

import pytest
import transformers
from models import FAMILY, tiny_model, tiny_tokenizer

from kobold_sp_plugin.errors import BadSetting
from kobold_sp_plugin.training import Settings, preflight
from kobold_sp_plugin.training.initial import words_of
from kobold_sp_plugin.training.places import places
from kobold_sp_plugin.training.preflight import Findings, Plan, look

WIDE = {"num_hidden_layers": 12, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}


@pytest.fixture
def findings(tmp_path, monkeypatch):
    """What is said of memory and words for a model of 50 million weights, as its folder has it, in ``free`` bytes."""
    tiny_model(FAMILY).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    known = {**json.loads(config.read_text()), **WIDE, "max_position_embeddings": 4096, "n_positions": 4096}
    config.write_text(json.dumps(known))
    with open(next((tmp_path / "model").glob("*model.[sb]*")), "ab") as file:
        file.truncate(200_000_000)
    (tmp_path / "rain.txt").write_text("The door opened and the rain came in. " * 99)

    def findings(free, precision="auto", **settings):
        monkeypatch.setattr(preflight, "free_memory", lambda *_: (free, "memory"))
        model = str(tmp_path / "model")
        plan = Plan(
            "Rain", tmp_path / "rain.txt", model, places(tmp_path / "rain.zip"), Settings(**settings), precision
        )
        found = look(plan)
        about = ("memory", "Words")
        return Findings(
            *([each for each in some if any(map(each.__contains__, about))] for some in (found.problems, found.remarks))
        )

    return findings


def test_words_are_parted_by_commas_and_line_ends_else_by_spaces():
    assert (
        words_of("the rain\ncity\r\n")
        == words_of("the rain, city")
        == words_of(", the rain,\ncity")
        == ["the rain", "city"]
    )
    assert words_of("rain city\n") == ["rain", "city"]


@pytest.mark.parametrize("text", ["", " , ,", ",\n,"])
def test_no_words_are_named_as_the_command_names_them(text):
    assert not words_of(text)
    with pytest.raises(BadSetting, match=r"there are none: give initial_text \(--initial-text\)"):
        Settings(initial="words", initial_text=text)


def test_attention_is_fused_only_where_this_torch_can(monkeypatch):
    class Fused:
        _supports_sdpa = True

    monkeypatch.setattr(transformers, "FusedForCausalLM", Fused, raising=False)
    for can in (True, False):
        monkeypatch.setattr(transformers.utils, "is_torch_sdpa_available", lambda can=can: can, raising=False)
        _, scores = preflight._of_attention({"architectures": ["FusedForCausalLM"]}, 1024, 16, 2.0)
        assert (scores == 0) == can


@pytest.mark.parametrize(
    "names",
    [
        ("n_layers", "d_model", "n_inner", "n_heads"),
        ("num_layers", "d_model", "ffn_dim", "attention_heads"),
        ("decoder_layers", "d_model", "decoder_ffn_dim", "decoder_attention_heads"),
    ],
)
def test_sizes_are_read_by_each_name_that_families_have_for_them(names):
    usual = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    one, other = (
        preflight._needed(1e6, dict(zip(each, (3, 512, 900, 4))), Settings(), "auto", 4.0, True)
        for each in (usual, names)
    )
    assert one == other


@pytest.mark.parametrize(
    "n_bytes, told",
    [(0, "0 bytes"), (840, "840 bytes"), (4200, "4.2 kB"), (64e6, "64 MB"), (1.5e6, "1.5 MB"), (12.34e9, "12.3 GB")],
)
def test_a_size_is_told_in_its_unit(n_bytes, told):
    assert preflight.size(n_bytes) == told


@pytest.fixture
def told(findings):
    """The problems and the remarks in one list."""

    def told(*arguments, **settings):
        found = findings(*arguments, **settings)
        return found.problems + found.remarks

    return told


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
def test_what_is_advised_fits_and_changes_no_more_than_it_must(told, free, block, first):
    (problem,) = told(free, block=block)
    options = advised(problem)
    assert [word for word in options[0].split() if word.startswith("--")] == first
    assert any("--precision bfloat16" in each for each in options)
    for each in options:
        given = settings_of(each)
        assert not told(free, **{"block": block, **given}), each
        if "batch_tokens" in given and "block" not in given:  # the largest that fits
            assert told(free, **{"block": block, **given, "batch_tokens": given["batch_tokens"] + block + 20}), each


def test_where_nothing_fits_that_is_said(told):
    (problem,) = told(60_000_000)
    assert "has 60 MB left" in problem and "50 million weights" in problem and "No settings" in problem


def test_a_text_longer_than_a_batch_is_counted_whole(told):
    assert not told(2_000_000_000, block=256)
    assert told(2_000_000_000, block=2048)


def test_no_larger_precision_is_advised(told):
    (problem,) = told(400_000_000, precision="bfloat16")
    assert len(advised(problem)) == 3 and "float32" not in problem and "float16" not in problem.replace("bfloat16", "")


def test_the_estimate_refuses_only_what_is_surely_too_much(findings):
    (problem,) = findings(10**8).problems
    size, unit = re.findall(r"need about ([\d.]+) (MB|GB)", problem)[0]
    found = findings(int(0.9 * float(size) * {"MB": 10**6, "GB": 10**9}[unit]))
    assert not found.problems
    (remark,) = found.remarks
    assert "it may not fit" in remark and advised(remark)


def test_a_training_that_is_begun_is_not_sent_to_settings_with_which_it_cannot_go_on(told, tmp_path):
    (tmp_path / "training" / "rain").mkdir(parents=True)
    (tmp_path / "training" / "rain" / "checkpoint.npz").touch()
    (problem,) = told(500_000_000)
    assert "Close other programs" in problem and "With another --name and one of these" in problem
    (problem,) = told(60_000_000)
    assert problem.endswith("cannot go on.")


def test_words_that_have_no_row_are_counted(findings):
    words = {"initial": "words", "initial_text": "rain, city, night"}
    assert not findings(10**11, **words, n_tokens=3).remarks
    (remark,) = findings(10**11, **words, n_tokens=2).remarks
    assert "the last 1 of 3" in remark and "--tokens 3" in remark
