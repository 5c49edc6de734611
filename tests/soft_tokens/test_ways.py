"""Every way of generating that the installed release has, by its own lists of settings, processors and rules.

A way is exact if it gives what the bare model gives that reads the same tokens first in each forward pass: then
the text alone is in the decoding loop, and in all that sees it. What the bare model cannot do, ours cannot either.
"""

import copy
import functools
import importlib
import inspect
import warnings

import pytest
import torch
import transformers
from models import FAMILY, VOCABULARY, tiny_model, tiny_tokenizer
from transformers import LogitsProcessorList, StoppingCriteriaList

from kobold_sp_plugin import SoftPrompt, attach
from kobold_sp_plugin.errors import UnsupportedCall

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
HARD = [77, 12, 101, 5, 64]
TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])
SAMPLING = {"do_sample": True, "top_k": 0}
BEAMS = {"num_beams": 4}
STATIC = ("static", "sliding_window", "hybrid", "hybrid_chunked", "offloaded_static", "offloaded_hybrid")


def module_of(name):
    try:
        return importlib.import_module(f"transformers.generation.{name}")
    except ImportError:  # 4.24
        return importlib.import_module(f"transformers.generation_{name}")


def configured(name, *values):
    kind = getattr(transformers, name, None)
    return None if kind is None else kind(*values)


# A setting to the ways in which it is tried; options of generate() beside it where it needs them.
WAYS = {
    "do_sample": [SAMPLING, {**SAMPLING, **BEAMS}, {**SAMPLING, "num_return_sequences": 3}],
    "temperature": [{**SAMPLING, "temperature": 0.7}],
    "top_k": [{"do_sample": True, "top_k": 5}],
    "top_p": [{**SAMPLING, "top_p": 0.8}],
    "top_h": [{**SAMPLING, "top_h": 0.4}],
    "min_p": [{**SAMPLING, "min_p": 0.05}],
    "typical_p": [{**SAMPLING, "typical_p": 0.8}],
    "epsilon_cutoff": [{**SAMPLING, "epsilon_cutoff": 0.02}],
    "eta_cutoff": [{**SAMPLING, "eta_cutoff": 0.02}],
    "num_beams": [BEAMS],
    "early_stopping": [{**BEAMS, "early_stopping": True}],
    "length_penalty": [{**BEAMS, "length_penalty": 2.0}],
    "num_return_sequences": [{**BEAMS, "num_return_sequences": 3}],
    "num_beam_groups": [{**BEAMS, "num_beam_groups": 2, "diversity_penalty": 1.5}],
    "diversity_penalty": [{**BEAMS, "num_beam_groups": 4, "diversity_penalty": 0.5}],
    "force_words_ids": [{**BEAMS, "force_words_ids": [[33]]}],
    "constraints": [{**BEAMS, "constraints": lambda: [transformers.PhrasalConstraint([33, 71])]}],
    "penalty_alpha": [{"penalty_alpha": 0.6, "top_k": 4}],
    "low_memory": [{**BEAMS, "low_memory": True}],
    "dola_layers": [{"dola_layers": "low"}],
    "repetition_penalty": [{"repetition_penalty": 1.7}, {**BEAMS, "repetition_penalty": 1.7}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 2}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.7}],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 2}],
    "bad_words_ids": [{"bad_words_ids": [[33], [8, 120, 9]]}],
    "sequence_bias": [{"sequence_bias": {(33,): 9.0, (120, 9): 20.0}}],
    "min_length": [{"min_length": 12}],
    "min_new_tokens": [{"min_new_tokens": 5}],
    "max_length": [{"max_length": 11, "max_new_tokens": None}],
    "max_new_tokens": [{"max_new_tokens": 3}],
    "max_time": [{"max_time": 60.0}],
    "stop_strings": [{"stop_strings": ["e", "t"], "tokenizer": tiny_tokenizer}],
    "eos_token_id": [{"eos_token_id": 43}],
    "token_healing": [{"token_healing": True, "tokenizer": tiny_tokenizer}],
    "forced_bos_token_id": [{"forced_bos_token_id": 9}],
    "forced_eos_token_id": [{"forced_eos_token_id": 2}],
    "forced_decoder_ids": [{"forced_decoder_ids": [[8, 33]]}],
    "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (3, 1.5)}],
    "suppress_tokens": [{"suppress_tokens": [33, 120]}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": [33, 120]}],
    "remove_invalid_values": [{"remove_invalid_values": True}],
    "renormalize_logits": [{"renormalize_logits": True, **BEAMS}],
    "watermarking_config": [
        {"watermarking_config": lambda: configured("WatermarkingConfig", 0.5, 4.0)},
        {**SAMPLING, "watermarking_config": lambda: configured("SynthIDTextWatermarkingConfig", 3, [9, 8, 7])},
    ],
    "guidance_scale": [
        {"guidance_scale": 1.6},
        {"guidance_scale": 1.6, "negative_prompt_ids": torch.tensor([[1, 50, 51]])},
        {"guidance_scale": 1.6, "use_cache": False},
    ],
    "use_cache": [{"use_cache": False}, {"use_cache": False, **BEAMS}],
    "cache_implementation": [{"cache_implementation": name} for name in ("offloaded", "dynamic", *STATIC)]
    + [{"cache_implementation": name, **BEAMS} for name in ("offloaded", "static")],
    "max_cache_len": [{"cache_implementation": "static", "max_cache_len": 40}],
    "prefill_chunk_size": [{"prefill_chunk_size": size} for size in (1, 4, 100)],
    "prompt_lookup_num_tokens": [{"prompt_lookup_num_tokens": 3}],
    "max_matching_ngram_size": [{"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}],
    "num_assistant_tokens": [{"assistant_model": "helper", "num_assistant_tokens": 3}],
    "num_assistant_tokens_schedule": [{"assistant_model": "helper", "num_assistant_tokens_schedule": "heuristic"}],
    "assistant_confidence_threshold": [{"assistant_model": "helper", "assistant_confidence_threshold": 0.2}],
    "assistant_ensemble_weight": [{"assistant_model": "helper", "assistant_ensemble_weight": 0.999999}],
    "return_dict_in_generate": [{**BEAMS, "return_dict_in_generate": True, "output_scores": True}],
    "return_legacy_cache": [{"return_legacy_cache": True, "return_dict_in_generate": True}],
    # Options of generate() that are no settings
    "prefix_allowed_tokens_fn": [{"prefix_allowed_tokens_fn": lambda batch, ids: [33, 71, int(ids[-1])]}],
    "assistant_model": [{"assistant_model": "helper"}, {"assistant_model": "helper", "repetition_penalty": 1.5}],
}

# Settings that decide nothing about the way, or that other tests are about.
OTHERS = {
    **dict.fromkeys(("transformers_version", "generation_kwargs", "decoder_start_token_id"), "nothing to do here"),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), "in all of the tests"),
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), "of the results"),
    **dict.fromkeys(("compile_config", "disable_compile"), "only on a GPU"),
    **dict.fromkeys(("assistant_lookbehind", "target_lookbehind"), "with a helper of another vocabulary: below"),
    "assistant_early_exit": "refused: below",
    **dict.fromkeys(("use_mtp", "speculation_type"), "for models with heads of their own for it"),
    "continuous_batching_config": "in test_batching.py",
    "is_assistant": "set on the helper by transformers",
    "cache_config": "of quantised caches: below",
    **dict.fromkeys(("self", "inputs", "model_kwargs", "logits_processor", "stopping_criteria"), "4.24: not settings"),
    "synced_gpus": "several processes",
}

# Processors that no setting of a language model's makes: those of models of sounds, and bases.
NOT_FOR_TEXT = ("AlternatingCodebooks", "Bark", "Dia", "Whisper", "ClassifierFreeGuidance")
BASES = {"LogitsProcessor", "LogitsWarper", "LogitsProcessorList", "SynthIDTextWatermarkState"}
# Rules that are not made by a setting of this kind of model, or only inside a helper.
OTHER_RULES = {"StoppingCriteria", "StoppingCriteriaList", "ConfidenceCriteria", "MaxNewTokensCriteria"}


def options_of_generate():
    return set(inspect.signature(transformers.GPT2LMHeadModel.generate).parameters)


def settings_of_release():
    if hasattr(transformers, "GenerationConfig"):
        return {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    return options_of_generate()


def ways_of_release():
    known = settings_of_release() | options_of_generate()
    return [(name, options) for name, each in WAYS.items() if name in known for options in each]


def test_every_setting_of_the_release_is_tried_or_named():
    assert not settings_of_release() - set(WAYS) - set(OTHERS)


@pytest.fixture(scope="module")
def model():
    return tiny_model(FAMILY)


@pytest.fixture(autouse=True)
def plain_again(model):
    yield
    attach(model).detach()
    vars(model).pop("_cache", None)  # 4.57 keeps a static cache on the model, even one that it could not make


def rows_of(model, ids):
    return SoftPrompt(rows=model.get_input_embeddings().weight.detach()[ids].numpy())


def reads_first(model, ids):
    """A copy that reads ``ids`` before the text in every forward pass, without a cache; its caller sees the text."""
    other = copy.deepcopy(model)
    own = other.forward

    @functools.wraps(own)
    def forward(input_ids=None, attention_mask=None, **kwargs):
        batch = input_ids.shape[0]
        known = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
        out = own(
            input_ids=torch.cat([torch.tensor([ids]).expand(batch, -1), input_ids], dim=1),
            attention_mask=torch.cat([mask.new_ones(batch, len(ids)), mask], dim=1),
            use_cache=False,
            **known,
        )
        out["logits"] = out.logits[:, len(ids) :]
        return out

    other.forward = forward
    return other


def generate(model, ids, **options):
    options = {name: value for name, value in options.items() if name == "max_new_tokens" or value is not None}
    for name, value in options.items():
        if callable(value) and name in ("constraints", "watermarking_config", "tokenizer"):
            options[name] = value()
    if options.get("assistant_model") == "helper":
        options["assistant_model"] = tiny_model(FAMILY, seed=0, num_hidden_layers=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    if options["max_new_tokens"] is None:
        del options["max_new_tokens"]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about settings that have no effect in this release
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return (out if isinstance(out, torch.Tensor) else out.sequences).tolist()


class Eyes:
    """What sees ids inside ``generate``, and what it saw."""

    def __init__(self, patch):
        self.ids, self.kinds = [], set()
        self._watch(patch, LogitsProcessorList, "__call__")
        self._watch(patch, StoppingCriteriaList, "__call__")
        if RELEASE >= (4, 38):
            for kind in vars(module_of("candidate_generator")).values():
                if inspect.isclass(kind) and "get_candidates" in vars(kind):
                    self._watch(patch, kind, "get_candidates")

    def _watch(self, patch, owner, name):
        own = getattr(owner, name)

        @functools.wraps(own)
        def seen(this, input_ids, *args, **kwargs):
            self.ids.append(input_ids.clone())
            self.kinds.update(type(each).__name__ for each in (this if isinstance(this, list) else []))
            return own(this, input_ids, *args, **kwargs)

        patch.setattr(owner, name, seen)

    def saw_text_only(self):
        return all(
            int(ids.min()) >= 0 and int(ids.max()) < VOCABULARY and (ids[:, 0] == TEXT[0, 0]).all() for ids in self.ids
        )


def expected(model, options):
    if "guidance_scale" in options or "penalty_alpha" in options or "dola_layers" in options:
        # What is compared with the text has the soft prompt in it, or is read without: as behind ordinary tokens.
        found = generate(model, torch.cat([torch.tensor([HARD]), TEXT], dim=1), **options)
        return [row[len(HARD) :] for row in found]
    without = {"cache_implementation", "max_cache_len", "prefill_chunk_size", "prompt_lookup_num_tokens"}
    without |= {"max_matching_ngram_size", "use_cache", "return_legacy_cache", "return_dict_in_generate"}
    plain = {
        name: value
        for name, value in options.items()
        if name not in without and not name.startswith(("assist", "num_as"))
    }
    return generate(reads_first(model, HARD), TEXT, **{**plain, "use_cache": False})


@pytest.mark.parametrize(("name", "options"), ways_of_release(), ids=lambda value: str(value)[:60])
def test_a_way_of_generating(model, monkeypatch, name, options):
    try:
        generate(model, TEXT, **options)
    except Exception as error:
        reason = type(error)
    else:
        reason = None
    vars(model).pop("_cache", None)
    if reason is not None:
        attach(model).select(rows_of(model, HARD))
        with pytest.raises(reason):
            generate(model, TEXT, **options)
        pytest.skip(f"the bare model of this release cannot: {reason.__name__}")
    wanted = expected(model, options)
    eyes = Eyes(monkeypatch)
    attach(model).select(rows_of(model, HARD))
    assert generate(model, TEXT, **options) == wanted
    assert eyes.ids and eyes.saw_text_only()


def test_every_processor_and_rule_of_the_release_is_among_the_ways(model, monkeypatch):
    """And none of them sees a soft token in the first steps."""
    eyes = Eyes(monkeypatch)
    attach(model).select(rows_of(model, HARD))
    for name, options in ways_of_release():
        if any(each in name for each in ("cache", "chunk", "assist", "lookup", "matching")):
            continue
        try:
            generate(model, TEXT, **{"max_new_tokens": 5 if name == "min_length" else 1, **options})
        except Exception:
            continue
    assert eyes.ids and eyes.saw_text_only()
    for module, known in (("logits_process", BASES), ("stopping_criteria", OTHER_RULES)):
        kinds = {
            name
            for name, kind in vars(module_of(module)).items()
            if inspect.isclass(kind) and kind.__module__ == module_of(module).__name__
        }
        missing = {name for name in kinds - known - eyes.kinds if not name.startswith(NOT_FOR_TEXT)}
        if RELEASE >= (4, 57):
            missing.discard("HammingDiversityLogitsProcessor")  # group beams are no part of this release any more
        if RELEASE < (4, 30):
            missing.discard("EncoderNoRepeatNGramLogitsProcessor")  # for models with an encoder only
        assert not missing, module


def test_a_model_that_is_its_own_helper_is_refused(model):
    if "assistant_early_exit" not in settings_of_release():
        pytest.skip("this release has it not")
    attach(model).select(rows_of(model, HARD))
    with pytest.raises(UnsupportedCall, match="assistant_early_exit"):
        generate(model, TEXT, assistant_early_exit=1)


def test_states_of_the_prompt_are_those_of_all_its_positions(model):
    """Also the second time, when the soft prompt's keys and values could be taken from their cache."""
    attach(model).select(rows_of(model, HARD))
    for _ in range(2):
        output = model.generate(
            TEXT,
            attention_mask=torch.ones_like(TEXT),
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        assert output.hidden_states[0][0].shape[1] == len(HARD) + TEXT.shape[1]
