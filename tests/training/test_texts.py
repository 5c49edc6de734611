import json

import pytest

from kobold_sp_plugin import errors
from kobold_sp_plugin.training.texts import decoded, other_documents, passages


class Template:
    """A chat template as tokenizers have it, in small."""

    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = "".join(f"<{each['role']}>{each['content']}</>" for each in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


def of(path, tokenizer=None):
    return [(each.source, each.parts) for each in passages(path, tokenizer)]


def learned(parts):
    return "".join(text for text, is_learned in parts if is_learned)


def test_a_folder_is_read_in_order_and_below_and_without_what_is_hidden(tmp_path):
    (tmp_path / "b.txt").write_text("two<|endoftext|>\n\nthree\n", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.TXT").write_text("one", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"no")
    assert [learned(parts) for _, parts in of(tmp_path)] == ["one", "two", "three"]


def test_a_training_among_the_texts_is_no_text_and_hides_none(tmp_path):
    (tmp_path / "tokens.json").write_text('[{"key": "Mira", "content": "mine"}]', encoding="utf-8")
    (tmp_path / "training").mkdir()
    for name in ("tokens.ids", "tokens.json", "report.html", "diary.txt"):
        (tmp_path / "training" / name).write_text(name, encoding="utf-8")
    assert [learned(parts) for _, parts in of(tmp_path)] == [" mine", "diary.txt"]
    assert other_documents(tmp_path) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_an_encoding_that_can_be_told_is_told(encoding):
    text = "„Naïve“ café – 物語\n"
    assert decoded(text.encode(encoding))[::2] == (text, False)


def test_another_encoding_is_a_guess_that_reads_well():
    text = "Die Tür öffnete sich, und der Regen kam herein; niemand hörte das Geräusch. " * 5
    found = decoded(text.encode("cp1252"))
    assert found.text == text and found.is_guess


def test_of_a_prompt_and_its_completion_only_the_completion_is_learned(tmp_path):
    lines = [{"text": "all of it"}, {"prompt": "Who?", "completion": "Nobody."}, {"prompt": "a ", "completion": "b"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert [parts for _, parts in of(tmp_path)] == [
        (("all of it", True),),
        (("Who?", False), (" Nobody.", True)),
        (("a ", False), ("b", True)),
    ]


def test_of_a_chat_only_what_the_assistant_says_is_learned(tmp_path):
    messages = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b")) * 2]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    ((_, parts),) = of(tmp_path, Template())
    assert "".join(text for text, _ in parts) == "<user>a</><assistant>b</>" * 2
    assert learned(parts) == "b</>b</>"
    with pytest.raises(errors.DataNotUnderstood, match="has none"):
        of(tmp_path)

    def refuse(*_, **__):
        raise RuntimeError("roles must alternate")

    refusing = Template()
    refusing.apply_chat_template = refuse
    with pytest.raises(errors.DataNotUnderstood, match=r"line 1.*roles must alternate"):
        of(tmp_path, refusing)


@pytest.mark.parametrize(
    "content",
    [
        [{"key": "Mira", "content": "A sailor."}],
        {"entries": [{"keys": ["Mira"], "text": "A sailor."}]},
        {"entries": {"0": {"key": ["Mira"], "content": "A sailor.", "comment": ""}}},
        {"data": [{"call": "Mira", "response": "A sailor."}]},
    ],
)
def test_world_info_is_read_in_the_forms_that_it_has(tmp_path, content):
    (tmp_path / "w.json").write_text(json.dumps(content), encoding="utf-8")
    assert of(tmp_path) == [("w.json", (("Mira", False), (" A sailor.", True)))]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("d.jsonl", '{"text": "a"}\n{', r"d.jsonl, line 2: this is no JSON"),
        ("d.jsonl", "[1]", "line 1: expected an object"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
        ("d.jsonl", '{"messages": [{"content": "a"}]}', 'needs "role"'),
        ("w.json", "[]", "expected World Info"),
        ("w.json", "[" * 100000, "no JSON"),
    ],
)
def test_what_is_not_understood_is_named_with_its_line(tmp_path, name, content, why):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(errors.DataNotUnderstood, match=why):
        of(tmp_path, Template())


def test_a_document_of_a_word_processor_is_not_taken_for_text(tmp_path):
    (tmp_path / "a.DOCX").write_bytes(b"PK\x03\x04\xfe\xff")
    (tmp_path / "a.md").write_text("one", encoding="utf-8")
    with pytest.raises(errors.NoData, match=r"a\.DOCX .* save it as plain text"):
        of(tmp_path / "a.DOCX")
    assert [learned(parts) for _, parts in of(tmp_path / "a.md")] == ["one"]


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(errors.NoData, match="no file or folder"):
        of(tmp_path / "missing")
    with pytest.raises(errors.NoData, match="Put the texts"):
        of(tmp_path)


def test_a_folder_that_is_not_there_is_said_with_what_was_meant(tmp_path):
    (tmp_path / "drive" / "Dataset").mkdir(parents=True)
    with pytest.raises(errors.NoData, match=r"In .*drive is no dataset; did you mean Dataset\?"):
        list(passages(tmp_path / "drive" / "dataset"))
    with pytest.raises(errors.NoData, match=r"is no gone\. Check the path"):
        list(passages(tmp_path / "gone" / "dataset"))
