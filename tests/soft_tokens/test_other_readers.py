"""Models that read the ids of the text in other places than the input embedding."""

import copy

import numpy as np
import pytest
import torch
import transformers
from models import FAMILY, tiny_model

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import UnsupportedModel

VOCABULARY = 131
TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])
ROWS = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
COMMON = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
    **{"pad_token_id": 7, "bos_token_id": 1, "eos_token_id": None},
}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}


def scores(model, ids):
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True},
        )
    return torch.stack(out.scores)


def grown(weight, rows):
    return torch.nn.Parameter(torch.cat([weight.detach(), rows]))


def compare(model, larger):
    ids = torch.cat([torch.arange(VOCABULARY, VOCABULARY + 4)[None], TEXT], dim=1)
    embedding = larger.get_input_embeddings()
    embedding.weight = grown(embedding.weight, torch.tensor(ROWS))
    expected, logits = scores(larger, ids), larger(ids).logits
    handle = attach(model)
    for _ in range(2):  # the second time under other ids
        handle.select(SoftPrompt(rows=ROWS[::-1].copy()))
        handle.select(SoftPrompt(rows=ROWS))
        torch.testing.assert_close(model(**handle.prepend(TEXT)).logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores(model, TEXT), expected, rtol=1e-4, atol=1e-4)
    handle.detach()
    assert not [name for _, module in model.named_modules() for name in vars(module) if name == "forward"]


@pytest.mark.parametrize("name", ["Gemma4", "Gemma3n"])
def test_a_soft_token_has_the_padding_tokens_input_of_each_layer(name):
    options = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "global_head_dim": 8}
    if name == "Gemma3n":
        options.update(laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0, 0.0])
        options.update(pad_token_id=0)  # what Gemma 3n itself gives to ids that are not in its table
    kind = "Gemma4Text" if name == "Gemma4" else "Gemma3nText"
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this release has no {name}")
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **PER_LAYER, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    larger = copy.deepcopy(model)
    table = larger.model.embed_tokens_per_layer
    table.weight = grown(table.weight, table.weight.detach()[config.pad_token_id].expand(4, -1))
    compare(model, larger)


def test_a_soft_token_has_the_padding_tokens_experts():
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("this release has no DeepSeek V4")
    options = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "q_lora_rank": 16}
    config = transformers.DeepseekV4Config(**{**COMMON, **options, "qk_rope_head_dim": 8, "o_lora_rank": 16})
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    tables = [module for module in model.modules() if hasattr(module, "tid2eid")]
    if not tables:
        pytest.skip("no layer of this configuration chooses its experts by id")
    for module in tables:
        module.tid2eid.random_(0, 4)
    larger = copy.deepcopy(model)
    for module in larger.modules():
        if hasattr(module, "tid2eid"):
            module.tid2eid = torch.cat([module.tid2eid, module.tid2eid[7].expand(4, -1)])
    compare(model, larger)


def test_ids_past_the_text_that_mean_sounds_do_not_take_a_soft_tokens_place():
    class Sounds(torch.nn.Module):
        """Gemma 3n's module for them, in small: ids from ``vocab_offset`` on."""

        vocab_size = 5

        def __init__(self):
            super().__init__()
            self.vocab_offset = VOCABULARY - self.vocab_size
            self.embedding = torch.nn.Embedding(self.vocab_size, 32)

        def forward(self, input_ids=None, inputs_embeds=None):
            return self.embedding(input_ids - self.vocab_offset)

    model = tiny_model(FAMILY)
    model.sounds = Sounds()
    handle = attach(model)
    handle.select(SoftPrompt(rows=ROWS))
    ids = handle.prepend(TEXT)["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    are_sounds = ids >= model.sounds.vocab_offset
    sounds = model.sounds(input_ids=torch.where(are_sounds, ids, VOCABULARY - 1))
    assert torch.equal(torch.where(are_sounds[..., None], sounds, embedded)[0, :4], torch.tensor(ROWS))


def test_a_model_that_reads_bytes_is_refused_and_left_alone():
    model = tiny_model(FAMILY)
    model.encoder_hash_tok_embedding = torch.nn.Embedding(3, 32)
    before = dict(vars(model))
    with pytest.raises(UnsupportedModel, match="reads bytes"):
        attach(model)
    assert vars(model) == before and "forward" not in vars(model.get_input_embeddings())
