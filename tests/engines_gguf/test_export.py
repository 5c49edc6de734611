"""What is written for other engines, read back with the library that they share."""

import json
import os

import numpy as np
import pytest
from click.testing import CliRunner

gguf = pytest.importorskip("gguf", reason="the gguf library is not installed")
import gguf_files  # noqa: E402

from kobold_sp_plugin import SoftPrompt  # noqa: E402
from kobold_sp_plugin.cli import main  # noqa: E402
from kobold_sp_plugin.compatibility import facts  # noqa: E402
from kobold_sp_plugin.errors import ExportError, NoReservedTokens, TiedEmbedding, WidthMismatch  # noqa: E402
from kobold_sp_plugin.export import lora, model_copy  # noqa: E402

Kind = gguf.GGMLQuantizationType


def softprompt(n_tokens=37, width=gguf_files.WIDTH, seed=1, **options):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, width)).astype(np.float32) * 0.3
    return SoftPrompt(rows, {"name": "Noir & Co."}, **options)


def model(folder, family="llama", kind=None):
    path = folder / f"{family}.gguf"
    return path if path.exists() else gguf_files.write(gguf_files.tiny(family), path, kind)


def tensors(path):
    return {each.name: each for each in gguf.GGUFReader(str(path)).tensors}


def values(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("family", gguf_files.FAMILIES)
def test_a_file_has_the_facts_of_the_model_that_it_was_made_of(tmp_path, family):
    known, own = facts(model(tmp_path, family)), facts(gguf_files.tiny(family))
    assert (known.width, known.context, known.fingerprint) == (own.width, own.context, own.fingerprint)
    assert known.base == own.base and known.size == pytest.approx(own.size, rel=0.01)


def test_a_quantised_file_is_known_for_a_relative_of_its_model(tmp_path):
    softprompts = tmp_path / "soft.zip"
    own = facts(gguf_files.tiny("llama")).fingerprint
    SoftPrompt(softprompt().rows, {"kobold_sp_plugin": {"fingerprint": own}}).save(softprompts)
    path = model(tmp_path, kind=Kind.Q4_0)
    answer = CliRunner().invoke(main, ["check", str(softprompts), "--model", str(path), "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.output)["verdict"] == "compatible"


def test_check_has_a_hint_from_the_rows_of_a_file(tmp_path):
    softprompt().save(tmp_path / "soft.zip")
    answer = CliRunner().invoke(main, ["check", str(tmp_path / "soft.zip"), "--model", str(model(tmp_path))])
    assert answer.exit_code == 0 and "hint" in answer.output


class TestLora:
    @pytest.mark.parametrize("kind", [None, Kind.Q8_0])
    def test_reserved_tokens_read_as_the_rows_and_all_others_as_before(self, tmp_path, kind):
        path, wanted = model(tmp_path, kind=kind), softprompt()
        made = lora.export(wanted, path, tmp_path / "lora.gguf")
        found = tensors(made.path)
        selecting, up = (values(found[f"token_embd.weight.lora_{part}"]) for part in "ab")
        base = values(tensors(path)["token_embd.weight"])
        read = base + selecting @ up.T  # alpha is the rank: the adapter counts once
        assert np.abs(read[list(made.tokens)] - wanted.rows).max() < 1e-6
        others = np.setdiff1d(np.arange(len(base)), made.tokens)
        assert np.array_equal(read[others], base[others])
        reader = gguf.GGUFReader(made.path)
        assert reader.fields["adapter.lora.alpha"].contents() == selecting.shape[1] == up.shape[1]
        assert made.text.startswith("<|reserved_special_token_0|><|reserved_special_token_1|>")

    def test_rows_as_they_leave_the_module_are_brought_back(self, tmp_path):
        path = model(tmp_path)
        made = [lora.export(softprompt(scale=scale), path, tmp_path / scale) for scale in ("matrix", "module")]
        one, other = (values(tensors(each.path)["token_embd.weight.lora_b"]) for each in made)
        assert np.array_equal(one, other), "Llama scales nothing"

    def test_a_tied_model_is_refused_and_told_the_way_that_works(self, tmp_path):
        with pytest.raises(TiedEmbedding, match="--to gguf"):
            lora.export(softprompt(), model(tmp_path, "gemma2"), tmp_path / "lora.gguf")
        assert os.listdir(tmp_path) == ["gemma2.gguf"]

    def test_too_few_reserved_tokens(self, tmp_path):
        with pytest.raises(NoReservedTokens, match=r"40 tokens .* needs 41"):
            lora.export(softprompt(41), model(tmp_path), tmp_path / "lora.gguf")


class TestCopy:
    @pytest.mark.parametrize("family", ["llama", "tied llama", "gemma2"])
    @pytest.mark.parametrize("kind", [None, Kind.Q8_0, Kind.Q4_0, Kind.BF16])
    def test_everything_but_the_two_matrices_stays_to_the_byte(self, tmp_path, family, kind):
        path, wanted = model(tmp_path, family, kind), softprompt()
        made = model_copy.export(wanted, path, tmp_path / "copy.gguf")
        before, after = tensors(path), tensors(made.path)
        for name, tensor in before.items():
            if name not in ("token_embd.weight", "output.weight"):
                assert tensor.tensor_type == after[name].tensor_type
                assert tensor.data.tobytes() == after[name].data.tobytes(), name
        base, grown = (values(each["token_embd.weight"]) for each in (before, after))
        assert np.abs(grown[: len(base)] - base).max() <= np.abs(base).max() * 2**-11
        tolerance = {None: 0, Kind.BF16: 2**-9}.get(kind, 2**-11)
        assert np.abs(grown[len(base) :] - wanted.rows).max() <= np.abs(wanted.rows).max() * tolerance
        if "output.weight" in after:
            head = before.get("output.weight", before["token_embd.weight"])
            assert after["output.weight"].tensor_type == head.tensor_type, "quantised as it was"
            size = len(head.data)
            assert np.array_equal(after["output.weight"].data[:size], head.data)
            assert (after["output.weight"].data[size:] == head.data[0]).all(), "as likely as <unk>"
        else:
            assert family == "gemma2"

    def test_the_vocabulary_has_the_soft_tokens(self, tmp_path):
        made = model_copy.export(softprompt(), model(tmp_path), tmp_path / "copy.gguf")
        fields = gguf.GGUFReader(made.path).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        count = len(gguf_files.TOKENS)
        assert "".join(tokens[count:]) == made.text and tokens[count] == "<|noir_co_0|>"
        assert fields["tokenizer.ggml.token_type"].contents()[count:] == [3] * 37
        assert len(fields["tokenizer.ggml.scores"].contents()) == count + 37
        assert fields["llama.vocab_size"].contents() == count + 37
        assert fields["tokenizer.ggml.suppress_tokens"].contents() == list(made.tokens)

    def test_a_second_soft_prompt_goes_behind_the_first(self, tmp_path):
        first = model_copy.export(softprompt(), model(tmp_path), tmp_path / "one.gguf")
        second = model_copy.export(softprompt(3, seed=2), first.path, tmp_path / "two.gguf")
        assert second.text == "<|noir_co2_0|><|noir_co2_1|><|noir_co2_2|>"
        rows = values(tensors(second.path)["token_embd.weight"])
        assert np.array_equal(rows[list(first.tokens)], softprompt().rows)
        assert np.array_equal(rows[list(second.tokens)], softprompt(3, seed=2).rows)

    def test_what_fails_leaves_nothing(self, tmp_path):
        path = model(tmp_path)
        before = path.read_bytes()
        with pytest.raises(ExportError, match="another name"):
            model_copy.export(softprompt(), path, path)
        with pytest.raises(WidthMismatch, match="has 8 columns, this model has 64"):
            model_copy.export(softprompt(width=8), path, tmp_path / "copy.gguf")
        assert os.listdir(tmp_path) == ["llama.gguf"] and path.read_bytes() == before


class TestCommand:
    def run(self, folder, *options):
        softprompt().save(folder / "noir.zip")
        return CliRunner().invoke(main, ["export", str(folder / "noir.zip"), *map(str, options)])

    def test_it_says_how_each_front_end_uses_it(self, tmp_path):
        answer = self.run(tmp_path, "--model", model(tmp_path), "--to", "lora")
        assert answer.exit_code == 0 and (tmp_path / "noir.lora.gguf").is_file()
        assert [each for each in answer.output.splitlines() if each.startswith("- ")][1].startswith("- koboldcpp: ")
        assert answer.output.count("\n- ") == 3

    def test_a_refusal_is_an_answer_and_a_file_in_the_way_is_wrong_use(self, tmp_path):
        tied = model(tmp_path, "gemma2")
        answer = self.run(tmp_path, "--model", tied, "--to", "lora", "--json")
        assert answer.exit_code == 1 and "--to gguf" in json.loads(answer.output)["error"]
        (tmp_path / "there.gguf").write_bytes(b"")
        options = ("--model", tied, "--to", "gguf", "--output", tmp_path / "there.gguf")
        assert self.run(tmp_path, *options).exit_code == 2
        assert self.run(tmp_path, *options, "--force").exit_code == 0
