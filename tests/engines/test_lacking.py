"""What engines outside this process do not do of KoboldAI's samplers is named, and what they do is not."""

import pytest

from kobold_sp_plugin.engines import Ending, GenerationSettings
from kobold_sp_plugin.engines.lacking import lacking
from kobold_sp_plugin.engines.vllm import lacking_in_vllm, sampling
from kobold_sp_plugin.server.generation_queue import GenerationQueue

OFF = {"temperature": 1.0, "top_p": 1.0}
DEFAULT_ORDER = (6, 0, 1, 2, 3, 4, 5)


def settings(**given):
    return GenerationSettings("", **{**OFF, **given})


UNKNOWN = ("top_a", "tfs", "typical", "rep_pen_range", "rep_pen_slope")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, []),
        ({"top_a": 0.2}, ["top_a"]),
        ({"tfs": 0.9, "typical": 0.9}, ["tfs", "typical"]),
        ({"tfs": 0.9, "top_a": 0.2, "typical": 0.9, "top_k": 1}, []),
        ({"tfs": 0.9, "temperature": 0.0}, []),
        ({"rep_pen": 1.1}, []),
        ({"rep_pen_range": 100, "rep_pen_slope": 0.7}, []),
        ({"rep_pen": 1.1, "rep_pen_range": 100, "rep_pen_slope": 0.7}, ["rep_pen_range", "rep_pen_slope"]),
        ({"rep_pen": 1.1, "rep_pen_slope": 0.7}, []),
    ],
)
def test_a_field_is_named_where_it_would_change_something(given, named):
    assert lacking(settings(**given), UNKNOWN, "It") == [f"It has no {name}; it was left out." for name in named]


@pytest.mark.parametrize(
    ("given", "is_named"),
    [
        ({"temperature": 0.7, "top_k": 40}, False),
        ({"temperature": 0.7, "top_p": 0.9}, True),
        ({"temperature": 0.7, "top_p": 0.9, "sampler_order": (6, 5, 0, 1, 2, 3, 4)}, False),
        ({"temperature": 0.7, "min_p": 0.1}, False),
        ({"top_p": 0.9, "min_p": 0.1}, True),
        ({"top_k": 40, "top_p": 0.9}, False),
        ({"top_k": 40, "top_p": 0.9, "sampler_order": (6, 2, 0, 1, 3, 4, 5)}, True),
        ({"rep_pen": 1.1, "top_k": 40, "sampler_order": (0, 1, 2, 3, 4, 5, 6)}, True),
        ({"rep_pen": 1.1, "temperature": 0.7, "sampler_order": (0, 1, 2, 3, 4, 5, 6)}, False),
    ],
)
def test_vllms_own_order_is_named_where_it_makes_a_difference(given, is_named):
    assert any("order" in each for each in lacking_in_vllm(settings(**given))) is is_named


def test_min_p_keeps_the_same_tokens_whichever_side_of_the_temperature_it_has():
    probabilities = [0.5, 0.3, 0.15, 0.05]
    for temperature in (0.5, 2.0):
        for order in (DEFAULT_ORDER, (5, 6, 0, 1, 2, 3, 4)):
            given = settings(temperature=temperature, min_p=0.25, sampler_order=order)
            flattened = [each ** (1 / temperature) for each in probabilities]
            compared = probabilities if order == DEFAULT_ORDER else flattened
            wanted = [each >= 0.25 * compared[0] for each in compared]
            assert [each >= sampling(given, ())["min_p"] * flattened[0] for each in flattened] == wanted


def test_what_is_banned_gets_vllms_lowest_bias():
    body = sampling(settings(logit_bias=((3, 2.0), (4, 1.0)), bad_words=("[", "the cat"), ban_eos=True), [4, 9])
    assert body["logit_bias"] == {"3": 2.0, "4": -100.0, "9": -100.0}
    assert body["bad_words"] == ["the cat"] and body["ignore_eos"]


class Partial:
    """An engine that does not do everything."""

    def generate(self, settings, softprompts, stop):
        yield "text"
        return Ending("length", 1, 1)

    def lacking(self, settings):
        return ("It has no tfs; it was left out.",) if settings.tfs < 1 else ()


def test_the_queue_tells_who_asked_and_once_the_log(caplog):
    queue = GenerationQueue()
    try:
        asked = [queue.submit(Partial(), settings(tfs=tfs), ()) for tfs in (0.9, 0.8, 1.0)]
        assert [each.notices for each in asked] == [("It has no tfs; it was left out.",)] * 2 + [()]
        assert caplog.text.count("has no tfs") == 1
    finally:
        queue.close()
