import pytest

from kobold_sp_plugin import errors
from kobold_sp_plugin.training.advice import advise, clean, mend

pytest.importorskip("ftfy")

PARAGRAPH = (
    "The lighthouse keeper had counted the ships every evening for thirty years, and not once in all that time had "
    "the number come out the same twice. He wrote them down with a pencil in a book that nobody would ever read, "
    "and then he trimmed the lamp and went to bed. That night the sea was still and a ship came in without lights."
)


def wrapped(text, columns=70):
    lines, line = [], ""
    for word in text.split():
        if len(line) + 1 + len(word) > columns:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def kinds(path):
    return {remark.kind for remark in advise(path).remarks}


def test_clean_text_has_no_remark_but_on_its_size(tmp_path):
    (tmp_path / "a.txt").write_text(PARAGRAPH + "\n\n" + PARAGRAPH[::-1], encoding="utf-8")
    assert kinds(tmp_path) == {"size"}


@pytest.mark.parametrize(
    "kind, text",
    [
        ("wrap", wrapped(PARAGRAPH)),
        ("markup", "<p>Hello <b>you</b></p>"),
        ("entity", "salt &amp; pepper"),
        ("mojibake", "The cafÃ© was closed, and the naÃ¯ve waiter slept."),
        ("control", "a\x07b"),
    ],
)
def test_each_trouble_is_found_and_mended_for_good(tmp_path, kind, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text(text, encoding="utf-8")
    assert kind in kinds(tmp_path / "data")
    clean(tmp_path / "data", tmp_path / "clean")
    assert kind not in kinds(tmp_path / "clean")
    mended = (tmp_path / "clean" / "a.txt").read_text(encoding="utf-8")
    assert mend(mended) == mended
    assert (tmp_path / "data" / "a.txt").read_text(encoding="utf-8") == text


def test_a_paragraph_that_was_broken_is_whole_again():
    assert mend(wrapped(PARAGRAPH) + "\n\n" + wrapped(PARAGRAPH, 70)) == f"{PARAGRAPH}\n\n{PARAGRAPH}"


@pytest.mark.parametrize(
    "text", ["Roses are red,\nViolets are blue,\nSugar is sweet,\nAnd so are you.", "a\nb\nc\nd\ne\nf"]
)
def test_lines_that_are_meant_stay(text):
    assert mend(text) == text


def test_a_document_that_is_there_twice_is_kept_once(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("One.<|endoftext|>Two.", encoding="utf-8")
    (tmp_path / "data" / "b.txt").write_text("Two. ", encoding="utf-8")
    assert "duplicate" in kinds(tmp_path / "data")
    assert [path.name for path in clean(tmp_path / "data", tmp_path / "clean")] == ["a.txt"]
    assert (tmp_path / "clean" / "a.txt").read_text(encoding="utf-8") == "One.\n<|endoftext|>\nTwo."


def test_a_guessed_encoding_is_named_and_becomes_utf_8(tmp_path):
    text = "Die Tür öffnete sich, und der Regen kam herein; niemand hörte das Geräusch. " * 3
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(text.encode("cp1252"))
    assert "encoding" in kinds(tmp_path / "data")
    clean(tmp_path / "data", tmp_path / "clean")
    assert (tmp_path / "clean" / "a.txt").read_text(encoding="utf-8").strip() == text.strip()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.txt").write_text("One.", encoding="utf-8")
    with pytest.raises(FileExistsError, match="holds something"):
        clean(tmp_path / "a.txt", tmp_path)


def test_files_without_text_are_no_data(tmp_path):
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(errors.NoData):
        advise(tmp_path)


def test_pairs_and_messages_are_counted_and_kept_once(tmp_path):
    pair = '{"prompt": "Rain", "completion": "It rained."}'
    chat = '{"messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Rain."}]}'
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(f"{pair}\n{chat}\n{pair}", encoding="utf-8")
    (tmp_path / "data" / "b.json").write_text('{"entries": [{"key": "Aria", "content": "An elf."}]}', encoding="utf-8")
    found = advise(tmp_path / "data")
    assert found.documents == 4
    assert "duplicate" in kinds(tmp_path / "data")
    clean(tmp_path / "data", tmp_path / "clean")
    assert (tmp_path / "clean" / "a.jsonl").read_text(encoding="utf-8") == f"{pair}\n{chat}"
    assert (advise(tmp_path / "clean").documents, kinds(tmp_path / "clean")) == (3, {"size"})
    (tmp_path / "data" / "a.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(errors.DataNotUnderstood, match=r"a\.jsonl, line 1"):
        advise(tmp_path / "data")


def test_documents_of_another_kind_are_told(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(errors.NoData, match=r"plain text.*a\.docx"):
        advise(tmp_path)
    (tmp_path / "a.txt").write_text(PARAGRAPH, encoding="utf-8")
    (tmp_path / "b.md").write_text("two", encoding="utf-8")
    assert [remark.times for remark in advise(tmp_path).remarks if "a.docx, b.md" in remark.sentence] == [2]


def test_one_file_of_another_name_is_a_text_and_its_copy_is_found_again(tmp_path):
    (tmp_path / "a.md").write_text("One.<|endoftext|>One.", encoding="utf-8")
    clean(tmp_path / "a.md", tmp_path / "clean")
    assert advise(tmp_path / "clean").documents == 1


def test_a_copy_that_cannot_be_finished_is_not_there(tmp_path, monkeypatch):
    from kobold_sp_plugin.training import advice

    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/a.txt", "a/b/a.txt", "b.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    whole = advice.write_file

    def full(path, data):
        if path.endswith("b.txt"):
            raise OSError(28, "No space left on device")
        whole(path, data)

    monkeypatch.setattr(advice, "write_file", full)
    with pytest.raises(OSError):
        clean(tmp_path, tmp_path / "clean")
    monkeypatch.undo()
    assert len(clean(tmp_path, tmp_path / "clean")) == 3
