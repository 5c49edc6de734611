"""Each sampler against KoboldAI's meaning of it, written down once more in plain NumPy."""

import numpy as np
import pytest
import torch
from models import FAMILY, tiny_model, tiny_tokenizer

from kobold_sp_plugin.engines import Ending, GenerationSettings
from kobold_sp_plugin.engines.samplers import Ban, Bias, CountPenalty, samplers
from kobold_sp_plugin.engines.transformers import TransformersEngine

OFF = {"temperature": 1.0, "top_p": 1.0}
LOGITS = [np.random.default_rng(seed).normal(0, spread, 60) for seed, spread in ((0, 1), (1, 3), (2, 0.1), (3, 8))]
IDS = [5, 3, 9, 3, 7, 1, 5]


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kept(logits, keep):
    return np.where(keep, logits, -np.inf)


def top_k(logits, k):
    return kept(logits, logits >= np.sort(logits)[-min(k, len(logits))])


def top_a(logits, a):
    p = softmax(logits)
    return kept(logits, (p >= a * p.max() ** 2) | (p == p.max()))


def top_p(logits, share):
    keep, total = np.zeros(len(logits), bool), 0.0
    for token in np.argsort(-logits):
        if total >= share:
            break
        keep[token] = True
        total += softmax(logits)[token]
    return kept(logits, keep)


def min_p(logits, share):
    p = softmax(logits)
    return kept(logits, p >= share * p.max())


def tail_free(logits, z):
    order = np.argsort(-logits)
    curvature = np.abs(np.diff(np.diff(softmax(logits)[order])))
    share = np.cumsum(curvature / curvature.sum())
    keep = np.zeros(len(logits), bool)
    keep[order[0]] = True
    keep[order[1:-1]] = share <= z
    return kept(logits, keep)


def typical(logits, mass):
    p = softmax(logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(p)
        entropy = np.nansum(p * surprise)
    keep, total = np.zeros(len(logits), bool), 0.0
    for token in np.argsort(np.abs(surprise - entropy)):
        keep[token] = True
        total += p[token]
        if total >= mass:
            break
    return kept(logits, keep)


def temperature(logits, value):
    return logits / value


def repetition_penalty(logits, ids, penalty, reach=0, slope=0.0):
    changed = logits.copy()
    ids = ids[-reach:] if reach else ids
    for token in set(ids):
        at = max(place for place, each in enumerate(ids) if each == token) + (max(0, reach - len(ids)) if reach else 0)
        own = penalty
        if slope and reach > 1:
            x = at / (reach - 1) * 2 - 1
            own = 1 + ((slope * x) / (1 + abs(x) * (slope - 1)) + 1) / 2 * (penalty - 1)
        changed[token] = logits[token] / own if logits[token] > 0 else logits[token] * own
    return changed


def ours(logits, greedy=False, ids=IDS, eos=(), texts=(), n_prompt=0, **settings):
    """What our samplers make of the logits; everything is off that is not named."""
    settings = GenerationSettings("", **{**OFF, **settings})
    chosen = samplers(settings, n_prompt, eos, lambda: texts, greedy)
    scores = torch.tensor(logits)[None]
    before = scores.clone()
    result = chosen(torch.tensor([ids], dtype=torch.long), scores)[0].numpy()
    assert torch.equal(scores, before), "what was handed in stays as it was"
    return result


@pytest.mark.parametrize("logits", LOGITS, ids=["soft", "sharp", "flat", "very sharp"])
@pytest.mark.parametrize(
    ("name", "reference", "values"),
    [
        ("top_k", top_k, [1, 5, 59, 60, 1000]),
        ("top_a", top_a, [0.1, 0.5, 1.0, 40.0]),
        ("top_p", top_p, [0.01, 0.3, 0.9, 0.999]),
        ("min_p", min_p, [0.01, 0.3, 1.0]),
        ("tfs", tail_free, [0.0, 0.3, 0.9, 0.999]),
        ("typical", typical, [0.0, 0.2, 0.95]),
        ("temperature", temperature, [0.1, 0.7, 2.5]),
    ],
)
def test_it_does_what_koboldai_says(logits, name, reference, values):
    for value in values:
        np.testing.assert_allclose(ours(logits, **{name: value}), reference(logits, value), rtol=1e-6)


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(("reach", "slope"), [(0, 0), (0, 2), (3, 0), (4, 1), (5, 0.3), (5, 4), (20, 2), (1, 2)])
def test_the_repetition_penalty_has_a_range_and_a_slope(logits, reach, slope):
    expected = repetition_penalty(logits, IDS, 1.3, reach, slope)
    result = ours(logits, rep_pen=1.3, rep_pen_range=reach, rep_pen_slope=slope)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert not np.allclose(result, logits)


def test_the_order_is_the_clients():
    logits = LOGITS[1]
    for order in ((6, 0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0, 6), (2, 5, 0, 1, 3, 4, 6)):
        steps = {
            0: lambda x: top_k(x, 30),
            1: lambda x: top_a(x, 0.05),
            2: lambda x: min_p(top_p(x, 0.9), 0.02),
            3: lambda x: tail_free(x, 0.95),
            4: lambda x: typical(x, 0.9),
            5: lambda x: temperature(x, 1.7),
            6: lambda x: repetition_penalty(x, IDS, 1.4),
        }
        expected = logits
        for each in order:
            expected = steps[each](expected)
        settings = {"top_k": 30, "top_a": 0.05, "top_p": 0.9, "min_p": 0.02, "tfs": 0.95, "typical": 0.9}
        result = ours(logits, sampler_order=order, temperature=1.7, rep_pen=1.4, **settings)
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_nothing_is_done_where_everything_is_off():
    assert len(samplers(GenerationSettings("", **OFF), 0, (2,), list, False)) == 0
    greedy = GenerationSettings("", top_k=5, top_p=0.5, temperature=0.7, rep_pen=1.1)
    assert [type(each).__name__ for each in samplers(greedy, 0, (), list, True)] == ["RepetitionPenalty"]


def test_the_likeliest_token_always_stays():
    extremes = {"top_a": 1e9, "min_p": 1.0, "tfs": 0.0, "typical": 0.0, "top_k": 1, "top_p": 1e-9}
    for name, value in extremes.items():
        for logits in LOGITS:
            result = ours(logits, **{name: value})
            assert np.isfinite(result).any(), name
            assert name == "typical" or np.isfinite(result[logits.argmax()]), name


def test_extremes_overflow_nowhere():
    for settings in (
        {"rep_pen": 5e-324},
        {"rep_pen": 1e308},
        {"rep_pen": 1.5, "rep_pen_range": 10**300, "rep_pen_slope": 1e308},
        {"rep_pen": 1.5, "rep_pen_range": 10**12, "rep_pen_slope": 5e-324},
        {"temperature": 1e308},
        {"temperature": 1e308, "top_p": 0.2},
        {"temperature": 1e-4},
        {"top_a": 1e308},
        {"top_k": 10**300},
    ):
        result = ours(LOGITS[3].astype(np.float32), **settings)
        assert not np.isnan(result).any() and np.isfinite(result.max()), settings


def test_openais_penalties_count_what_was_generated():
    scores = torch.zeros(1, 10)
    changed = CountPenalty(0.5, 0.25, n_prompt=3)(torch.tensor([[1, 2, 3, 3, 3, 4]]), scores)[0]
    assert changed.tolist() == [0, 0, 0, -1.0, -0.75, 0, 0, 0, 0, 0]


def test_a_bias_is_added_and_unknown_ids_are_left_aside():
    changed = Bias([(1, 2.5), (3, -100.0), (99, 5.0)])(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 5))[0]
    assert changed.tolist() == [0, 2.5, 0, -100.0, 0]


class TestBans:
    TEXTS = ("a", " b", "ab", "the", " cat", " c", "at", "[x", "!")

    def banned(self, words, ids, eos=()):
        scores = torch.zeros(1, len(self.TEXTS))
        result = Ban(eos, words, self.TEXTS, n_prompt=1)(torch.tensor([[8, *ids]]), scores)[0]
        return {self.TEXTS[at] for at in range(len(self.TEXTS)) if result[at] == -np.inf}

    def test_a_token_that_holds_the_word_never_comes(self):
        assert self.banned(["["], []) == {"[x"}
        assert self.banned(["A"], []) == {"a", "ab", " cat", "at"}

    def test_a_word_cannot_be_put_together_either(self):
        assert self.banned([" cat"], []) == {" cat"}
        assert self.banned([" cat"], [5]) == {" cat", "at"}, "after ' c'"
        assert self.banned(["the cat"], [3]) == {" cat"}
        assert self.banned(["the cat"], [3, 5]) == {"at"}
        assert self.banned(["the cat"], [5]) == set()

    def test_what_the_prompt_holds_is_no_beginning(self):
        scores = torch.zeros(1, len(self.TEXTS))
        result = Ban((), [" cat"], self.TEXTS, n_prompt=2)(torch.tensor([[8, 5]]), scores)[0]
        assert torch.isfinite(result[6])

    def test_ends_are_banned_by_their_ids(self):
        assert self.banned([], [], eos=(8, 400)) == {"!"}

    def test_where_nothing_would_be_left_nothing_is_removed(self):
        assert self.banned([text.strip() or text for text in self.TEXTS], []) == set()


@pytest.fixture(scope="module")
def model():
    return tiny_model(FAMILY, eos_token_id=None)


@pytest.fixture(scope="module")
def engine(model):
    return TransformersEngine(model, tiny_tokenizer(), "tiny")


def text_of(engine, **settings):
    """(text, how it ended)"""
    pieces = engine.generate(GenerationSettings("The door opened and", **{"max_length": 20, **settings}))
    text = ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            return text, end.value


def test_generation_tells_how_it_ended(engine):
    whole, ending = text_of(engine, temperature=0.0)
    n_prompt = len(engine.token_ids("The door opened and"))
    assert ending == Ending("length", n_prompt, 20)
    stop = whole[8:10]
    text, ending = text_of(engine, temperature=0.0, stop_sequence=(stop,))
    assert text == whole[: whole.index(stop)] and ending.reason == "stop" and 0 < ending.n_new <= 20
    kept, _ = text_of(engine, temperature=0.0, stop_sequence=(stop,), keep_stop=True)
    assert kept == text + stop


def test_bad_words_stay_out_of_a_whole_text(engine):
    whole, _ = text_of(engine, seed=3, temperature=1.5, top_p=1.0, max_length=60)
    word = whole[10:13].lower()
    without, ending = text_of(engine, seed=3, temperature=1.5, top_p=1.0, max_length=60, bad_words=(word,))
    assert word in whole.lower() and word not in without.lower()
    assert ending.n_new == 60


def test_the_end_can_be_banned(engine, model):
    config = getattr(model, "generation_config", None) or model.config
    prompt = engine.token_ids("The door opened and")
    whole, _ = text_of(engine, temperature=0.0)
    config.eos_token_id = engine.token_ids("The door opened and" + whole)[len(prompt) + 2]
    try:
        assert text_of(engine, temperature=0.0)[1].reason == "stop"
        text, ending = text_of(engine, temperature=0.0, ban_eos=True)
        assert ending == Ending("length", len(prompt), 20) and text
    finally:
        config.eos_token_id = None


def test_the_models_own_configuration_does_not_sample(engine, model):
    config = getattr(model, "generation_config", None)
    if config is None:
        pytest.skip("before generation_config")
    expected = text_of(engine, seed=1, temperature=2.0, top_p=1.0)
    own = {"top_k": 1, "temperature": 0.1, "top_p": 0.1, "repetition_penalty": 5.0, "min_p": 0.9, "eta_cutoff": 0.5}
    before = {name: getattr(config, name) for name in own if hasattr(config, name)}
    for name in before:
        setattr(config, name, own[name])
    try:
        assert text_of(engine, seed=1, temperature=2.0, top_p=1.0) == expected
    finally:
        for name, value in before.items():
            setattr(config, name, value)
