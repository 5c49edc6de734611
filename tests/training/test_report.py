import re
from html.parser import HTMLParser

import numpy as np
import pytest

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.softprompt import OWN_KEY
from kobold_sp_plugin.training.report import Result, page, write_report
from kobold_sp_plugin.training.samples import Sample

EVIL = '<script>alert("x")</script>\x07'


def result(without=2.0, after=1.5, steps=5000, text=EVIL):
    about = {
        "data_sha256": "0" * 64,
        "documents": 3,
        "tokens": 1000,
        "steps": steps,
        "settings": {"seed": 0, "initial_text": text},
        "held_out_without": without,
        "held_out_before": without,
        "held_out_after": after,
        "versions": {"torch": "1"},
    }
    metadata = {"name": text, "description": text, OWN_KEY: {"training": about}}
    history = [{"step": 0, "held_out": 2.0, "without": 2.0}]
    history += [{"step": step, "loss": 2 - step / steps, "held_out": 2 - step / steps} for step in range(1, steps + 1)]
    for entry in history[1:]:
        if entry["step"] % (steps // 5 or 1):
            del entry["held_out"]
    near = [[(text, 0.5)] * 3] * 2000
    softprompt = SoftPrompt(np.ones((3, 2), np.float32), metadata)
    return Result(softprompt, history, text, near, [Sample(text, text * 200, text * 200)] * 3, [text])


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def test_it_is_one_small_file_that_needs_nothing_else(tmp_path):
    write_report(result(), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 200_000
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for tag, attributes in Tags(text).seen:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & set(attributes)


def test_whatever_it_is_told_is_text_on_it():
    text = page(result())
    assert "<script" not in text and "\x07" not in text
    assert text.count("&lt;script&gt;") > 5


def test_the_curve_ends_where_the_loss_does():
    text = page(result(steps=10))
    training = re.search(r'<polyline points="([^"]*)"', text).group(1).split()
    heights = [float(point.split(",")[1]) for point in training]
    assert len(heights) == 10 and heights == sorted(heights)


def test_one_hard_batch_does_not_flatten_the_held_out_curve():
    found = result(steps=100)
    found.history[50]["loss"] = 40.0
    held = re.findall(r"<circle cx=[\d.]+ cy=([\d.]+)", page(found))
    spread = max(map(float, held)) - min(map(float, held))
    drawn = re.findall(r'<polyline points="([^"]*)"', page(found))
    heights = [float(point.split(",")[1]) for line in drawn for point in line.split()]
    assert spread > 15 and 0 <= min(heights) <= max(heights) <= 260


@pytest.mark.parametrize(
    "without, after, sentence, helps",
    [(2.0, 1.5, "helps: ", True), (2.0, 2.5, "does not help: ", False), (None, None, "Nothing was held out", None)],
)
def test_the_answer_is_told(without, after, sentence, helps):
    found = result(without, after, text="Rain")
    assert found.helps is helps
    assert sentence in found.sentence and sentence in page(found)


def test_a_training_without_a_step_has_a_page():
    assert "No step was done" in page(result()._replace(history=[]))
