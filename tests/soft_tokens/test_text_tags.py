"""Text that soft prompts stand in: how it prints, how it is put together, and tags that come from outside."""

import copy
import gc
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import softprompt

from kobold_sp_plugin import Catalogue, SoftPrompt
from kobold_sp_plugin.errors import UnknownSoftPrompt
from kobold_sp_plugin.softprompt import TaggedText, count_tokens, has_tags, parts_of, read_tags

SEA, ICE = softprompt(2, 7, name="sea"), softprompt(3, 1, name="ice")


def test_a_soft_prompt_stands_anywhere_in_a_text():
    text = "Once " + SEA + " upon a time"
    assert isinstance(text, str)
    assert str(text) == f"{text}" == "Once <softprompt:sea> upon a time"
    assert text.parts == ("Once ", SEA, " upon a time")
    assert (SEA + ICE).parts == (SEA, ICE)
    assert ("A" + (SEA + "b" + ICE) + "c" + (ICE + "d")).parts == ("A", SEA, "b", ICE, "c", ICE, "d")
    assert ("" + SEA + "").parts == (SEA,)
    assert ("a" + text + "b").parts == ("aOnce ", SEA, " upon a timeb")
    assert text.softprompts == (SEA,)


def test_it_stays_itself_when_copied():
    text = "Once " + SEA + " upon a time"
    for each in (copy.copy(text), copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert isinstance(each, TaggedText) and each == text and each.parts == text.parts
    assert json.loads(json.dumps({"prompt": text}))["prompt"] == str(text)


@pytest.mark.parametrize("other", [1, None, b"bytes", ["text"]])
def test_only_text_and_soft_prompts_go_together(other):
    for text in (SEA, SEA + "text"):
        for act in (lambda a=text: a + other, lambda a=text: other + a):
            with pytest.raises(TypeError):
                act()
    with pytest.raises(TypeError, match="expected text or a SoftPrompt"):
        TaggedText([SEA, other])


def test_two_of_one_name_have_two_tags():
    first, second = softprompt(11, name="twin"), softprompt(12, name="twin")
    text = first + " and " + second
    tags = str(text).split(" and ")
    assert tags[0] == "<softprompt:twin>"
    assert tags[1].startswith("<softprompt:twin#") and tags[1] != tags[0]
    assert str(second + "") == tags[1] and str(first + "") == tags[0]
    assert (first + "x") != (second + "x")
    again = SoftPrompt(first.rows, first.metadata)
    assert (again + "x") == (first + "x")


def test_a_tag_is_free_again_when_nobody_has_its_soft_prompt():
    first = softprompt(13, name="gone")
    assert str(first + "") == "<softprompt:gone>"
    del first
    gc.collect()
    assert str(softprompt(14, name="gone") + "") == "<softprompt:gone>"


@pytest.mark.parametrize(
    "name", ["", "a>b", "<i>", "50% #1", "two\nlines", "\x00", "\u202egnp", "\ud800", "été 夜", "n" * 1000]
)
def test_every_name_prints_as_one_tag_on_one_line(name):
    sp = softprompt(15, name=name)
    printed = str("a " + sp + " b")
    assert printed.startswith("a <softprompt:") and printed.endswith("> b")
    assert printed.count("<") == printed.count(">") == 1 and printed.isprintable() and len(printed) < 400
    if 0 < len(name) < 80 and name != "\ud800":
        assert read_tags(printed, {name: sp}).softprompts == (sp,)


def test_a_budget_counts_with_any_tokenizer():
    text = "Once " + SEA + " upon " + ICE
    assert count_tokens(text, lambda piece: len(piece.split())) == 1 + 7 + 1 + 1
    assert count_tokens(SEA, len) == 7 and count_tokens("abc", len) == 3 and count_tokens("", len) == 0


def test_tags_from_outside_are_read_by_name():
    text = read_tags("Once <softprompt:sea> upon <softprompt:ice><softprompt:sea>", {"sea": SEA, "ice": ICE})
    assert text.parts == ("Once ", SEA, " upon ", ICE, SEA)
    asked = []
    assert read_tags("<softprompt:a b><softprompt:a b>", lambda name: asked.append(name) or SEA).softprompts == (
        SEA,
        SEA,
    )
    assert asked == ["a b"]
    assert read_tags(ICE + " <softprompt:sea>", {"sea": SEA}).parts == (ICE, " ", SEA)


def test_an_unknown_name_is_refused():
    with pytest.raises(UnknownSoftPrompt, match="no soft prompt named 'tide'; there are: ice, sea"):
        read_tags("<softprompt:sea> <softprompt:tide>", {"sea": SEA, "ice": ICE})
    with pytest.raises(UnknownSoftPrompt, match=r"no soft prompt named '\.\./\.\./etc/passwd'"):
        read_tags("<softprompt:../../etc/passwd>", lambda name: None)


@pytest.mark.parametrize(
    "text",
    [
        *("", "Once", "<softprompt:>", "<softprompt:sea", "< softprompt:sea>", "<softprompt:se\na>"),
        *("&lt;softprompt:sea&gt;", "<SOFTPROMPT:sea>", "<softprompt sea>", "<softprompt:" + "a" * 301 + ">"),
    ],
)
def test_what_only_looks_like_a_tag_is_text(text):
    assert read_tags(text, {}) is text
    assert not has_tags(text)


def test_what_is_joined_later_is_no_tag():
    text = read_tags("<softprompt:ice>", {"ice": ICE}) + "<softprompt:" + "sea>"
    assert text.parts == (ICE, "<softprompt:sea>")
    assert has_tags(text) and not has_tags(ICE + "<softprompt:")
    assert parts_of("<softprompt:sea>") == ("<softprompt:sea>",)


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from(["<softprompt:", ">", "sea", "<softprompt:sea>", "%3e", "#"]))))
def test_reading_is_safe_on_any_text(pieces):
    text = "".join(pieces)
    try:
        found = read_tags(text, {"sea": SEA})
    except UnknownSoftPrompt:
        return
    assert "".join("<softprompt:sea>" if part == SEA else part for part in parts_of(found)) == text


def test_a_catalogue_is_asked_by_file_name_or_name(tmp_path):
    SoftPrompt(SEA.rows, {"name": "The Sea"}).save(tmp_path / "sea.zip")
    for number in range(2):
        SoftPrompt(ICE.rows, {"name": "Ice"}).save(tmp_path / f"ice{number}.zip")
    named = Catalogue(tmp_path).named
    for name in ("sea.zip", "sea", "The Sea"):
        assert (read_tags(f"<softprompt:{name}>!", named).softprompts[0].rows == SEA.rows).all()
    with pytest.raises(UnknownSoftPrompt, match=r"may be any of ice0\.zip, ice1\.zip"):
        read_tags("<softprompt:Ice>", named)
    for name in ("../sea.zip", "tide", "sea.zip/x"):
        with pytest.raises(UnknownSoftPrompt, match="no soft prompt named"):
            read_tags(f"<softprompt:{name}>", named)


def test_text_needs_no_torch():
    code = "import sys; from kobold_sp_plugin.softprompt import read_tags; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
