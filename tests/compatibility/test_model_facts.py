"""What is known of a model: of a torch model, of a configuration, and of a folder that nothing is loaded from."""

import json
import os

import pytest
import torch
import transformers
from embeddings import Model, write_safetensors

from kobold_sp_plugin.compatibility import context_of, facts, fingerprint, width_of
from kobold_sp_plugin.compatibility.checkpoint import embedding
from kobold_sp_plugin.compatibility.claims import claims, same_size, written
from kobold_sp_plugin.compatibility.model_facts import matrix_in_folder
from kobold_sp_plugin.errors import ModelError, NoEmbedding

CONFIGS = [
    (transformers.GPT2Config(n_embd=24, n_positions=128), 24, 128),
    (transformers.OPTConfig(hidden_size=1024, word_embed_proj_dim=512, max_position_embeddings=2048), 512, 2048),
    (transformers.GPTJConfig(n_embd=4096, n_positions=2048), 4096, 2048),
    (transformers.BloomConfig(hidden_size=64), 64, None),
    (transformers.XGLMConfig(d_model=1024, max_position_embeddings=2048), 1024, 2048),
]


@pytest.mark.parametrize("config, width, context", CONFIGS, ids=lambda value: type(value).__name__)
def test_facts_of_a_configuration(tmp_path, config, width, context):
    assert (width_of(config), context_of(config)) == (width, context)
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        known = facts(path)
        assert (known.name, known.width, known.context, known.fingerprint) == (tmp_path.name, width, context, None)
        assert (known.base, known.size) == (facts(config).base, facts(config).size)
    assert facts(config, "mine").name == "mine"


def test_a_text_model_inside_another():
    class Config:
        text_config = transformers.GPT2Config(n_embd=24, n_positions=128)

    assert (width_of(Config()), context_of(Config())) == (24, 128)
    assert width_of({"text_config": {"hidden_size": 7}, "hidden_size": None}) == 7
    assert width_of({"hidden_size": True, "d_model": -1, "n_embd": "4"}) is None


def test_facts_of_a_model():
    config = transformers.OPTConfig(
        hidden_size=48, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=300, max_position_embeddings=128, do_layer_norm_before=False,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    known = facts(model, "opt")
    assert (known.name, known.width, known.context, known.refusal, known.base) == ("opt", 32, 128, None, "OPT")
    assert known.fingerprint == fingerprint(model)
    assert facts(known) is known
    assert facts(model) == facts(model)


def test_a_folder_tells_what_its_loaded_model_tells(tmp_path):
    config = transformers.GPT2Config(n_embd=24, n_positions=128, n_layer=1, n_head=2, vocab_size=300)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    config.save_pretrained(tmp_path)
    weights = {name: each.detach() for name, each in model.named_parameters() if each.dim() == 2}
    write_safetensors(tmp_path / "model.safetensors", weights)
    assert facts(tmp_path, "x") == facts(model, "x")


@pytest.mark.parametrize("text", ["[1]", "{", "\ud800"])
def test_a_configuration_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError):
        facts(tmp_path)
    with pytest.raises(OSError):
        facts(tmp_path / "missing")


def test_a_configuration_that_is_no_file_or_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    with open(tmp_path / "model.gguf", "wb") as file:
        file.truncate(2**33)
    for name in ("pipe", "folder", "model", "model.gguf"):
        with pytest.raises(ModelError, match="expected a model's configuration"):
            facts(tmp_path / name)


class TestCheckpoints:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_rows_are_those_of_the_matrix(self, tmp_path, dtype):
        weight = Model(50, 8).embedding.weight.detach().to(dtype)
        noise = torch.randn(50, 8, dtype=dtype)
        tensors = {
            "model.layers.0.weight": noise,
            "model.embed_positions.weight": noise,
            "model.embed_tokens.weight": weight,
            "lm_head.weight": noise,
        }
        write_safetensors(tmp_path / "model.safetensors", tensors)
        tensor = embedding(tmp_path, 8)
        assert (tensor.rows([3, 49, 0]) == weight[[3, 49, 0]].float().numpy()).all()

    def test_only_the_file_that_the_index_names_is_opened(self, tmp_path):
        weight = Model(50, 8).embedding.weight.detach()
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"never opened")
        write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {"transformer.wte.weight": weight})
        index = {"weight_map": {"transformer.wte.weight": "model-00002-of-00002.safetensors", "x": "../../secret"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert embedding(tmp_path, 8).shape == [50, 8]

    @pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 5}', '{"weight_map": {"wte.weight": ["x"]}}'])
    def test_an_index_that_is_none_is_done_without(self, tmp_path, index):
        write_safetensors(tmp_path / "model.safetensors", {"wte.weight": Model(50, 8).embedding.weight.detach()})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert embedding(tmp_path, 8).shape == [50, 8]

    def test_an_index_cannot_name_a_file_elsewhere(self, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        write_safetensors(tmp_path / "other.safetensors", {"wte.weight": torch.zeros(50, 8)})
        write_safetensors(folder / "model.safetensors", {"wte.weight": torch.ones(40, 8)})
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../other.safetensors"}}')
        assert embedding(folder, 8).shape == [40, 8]

    def test_of_several_the_one_of_the_models_size(self, tmp_path):
        tensors = {
            "encoder.embeddings.weight": torch.zeros(90, 8),
            "text.embed_tokens.weight": torch.zeros(50, 8),
            "narrow.embed_tokens.weight": torch.zeros(99, 4),
        }
        write_safetensors(tmp_path / "model.safetensors", tensors)
        assert embedding(tmp_path, 8, 50).shape == [50, 8]
        assert embedding(tmp_path, 8).shape == [90, 8]

    @pytest.mark.parametrize(
        "lie",
        [
            {"shape": [50, 9]},
            {"shape": [2**40, 2**40]},
            {"shape": [-50, -8]},
            {"shape": [50.0, 8.0]},
            {"shape": "50"},
            {"shape": [50]},
            {"shape": None},
            {"dtype": "U8"},
            {"dtype": 5},
            {"data_offsets": [0, 10]},
            {"data_offsets": [1600, 3200]},
            {"data_offsets": [-8, 1592]},
            {"data_offsets": None},
        ],
    )
    def test_a_header_that_lies_is_refused(self, tmp_path, lie):
        write_safetensors(tmp_path / "model.safetensors", {"wte.weight": torch.zeros(50, 8)}, {"wte.weight": lie})
        with pytest.raises(NoEmbedding):
            embedding(tmp_path, None)

    @pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x05" + b"\0" * 7 + b"[" * 5, b"\x02" + b"\0" * 7 + b"[]"])
    def test_a_file_that_is_none_is_refused(self, tmp_path, data):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(NoEmbedding):
            embedding(tmp_path, None)

    def test_what_is_there_instead_is_said(self, tmp_path):
        with pytest.raises(NoEmbedding, match="no weights"):
            embedding(tmp_path, 8)
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(NoEmbedding, match="not in safetensors"):
            embedding(tmp_path, 8)

    def test_a_folder_without_readable_weights_still_has_its_other_facts(self, tmp_path):
        transformers.GPT2Config(n_embd=24).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"broken")
        assert (facts(tmp_path).width, facts(tmp_path).fingerprint) == (24, None)
        with pytest.raises(NoEmbedding):
            matrix_in_folder(tmp_path)


class TestClaims:
    @pytest.mark.parametrize(
        ("text", "base", "size"),
        [
            ("gpt-j-6b", "GPT-J", 6e9),
            ("EleutherAI/gpt-j-6B", "GPT-J", 6e9),
            ("GPTJ", "GPT-J", None),
            ("Generic 6B", "GPT-J", 6e9),
            ("pygmalion-6b", "GPT-J", 6e9),
            ("fairseq-13b", "fairseq dense", 13e9),
            ("KoboldAI/fairseq-dense-2.7B-Nerys", "fairseq dense", 2.7e9),
            ("OPT 6,7B", "OPT", 6.7e9),
            ("facebook/opt-350m", "OPT", 350e6),
            ("KoboldAI/OPT-6B-nerys-v2", "OPT", 6e9),
            ("GPT-NeoX-20B", "GPT-NeoX", 20e9),
            ("pythia-410m", "GPT-NeoX", 410e6),
            ("GPT-Neo 2.7B", "GPT-Neo", 2.7e9),
            ("gpt2-xl", "GPT-2", None),
            ("Llama-2-7b-hf", "Llama", 7e9),
            ("adopted", None, None),
            ("Generic 13B", None, 13e9),
            ("my model", None, None),
        ],
    )
    def test_names_as_people_write_them(self, text, base, size):
        (claim,) = claims([text])
        assert (claim.base, claim.size) == (base, size)

    def test_several_in_one_text(self):
        assert [claim.text for claim in claims(["GPT-J 6B, OPT  2.7B", "", "x"])] == ["GPT-J 6B", "OPT 2.7B", "x"]
        assert len(claims(["a," * 10**6] * 10**3)) < 20_000

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "vocab_size": 50400}, "GPT-J 5.8B"),
            (
                {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32, "ffn_dim": 10240,
                 "num_attention_heads": 32, "vocab_size": 50272},
                "OPT 2.6B",
            ),
            (
                {"model_type": "xglm", "d_model": 5120, "num_layers": 40, "ffn_dim": 20480, "attention_heads": 40,
                 "vocab_size": 50261},
                "fairseq dense 12.8B",
            ),
            (
                {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008,
                 "num_attention_heads": 32, "vocab_size": 32000},
                "Llama 6.6B",
            ),
            ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "vocab_size": 50257}, "GPT-2 124M"),
            ({"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_local_experts": 8}, ""),
            ({"model_type": ["gptj"], "n_embd": "x"}, ""),
            (
                {"model_type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 2048,
                 "num_attention_heads": 8, "vocab_size": 50304, "tie_word_embeddings": False},
                "GPT-NeoX 70M",
            ),
            (
                {"model_type": "gemma", "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 24576,
                 "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000},
                "Gemma 8.5B",
            ),
            (
                {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
                 "num_kv_heads": 71, "multi_query": True, "new_decoder_architecture": False, "vocab_size": 65024},
                "Falcon 6.9B",
            ),
            (
                {"model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
                 "num_kv_heads": 8, "multi_query": True, "new_decoder_architecture": True, "vocab_size": 65024},
                "Falcon 41.3B",
            ),
        ],
    )  # fmt: skip
    def test_base_and_size_of_a_configuration(self, config, expected):
        known = facts(config)
        assert written(known.base, known.size) == expected

    def test_sizes_as_names_round_them(self):
        assert same_size(6.05e9, 6e9) and same_size(6.6e9, 7e9) and same_size(None, 1.0)
        assert same_size(1.236e9, 1e9) and same_size(2.51e9, 2e9) and same_size(8.54e9, 7e9)
        assert not same_size(2.7e9, 6e9)
