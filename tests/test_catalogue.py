"""A folder as entries."""

import os
import time

import numpy as np
import pytest
from zips import kobold_zip, make_zip, npy, rows_of

from kobold_sp_plugin import Catalogue, SoftPrompt, Verdict, formats
from kobold_sp_plugin.compatibility import ModelFacts
from kobold_sp_plugin.errors import CorruptMember, NotFinite, UnknownSoftPrompt, UnsafeName

HERE = ModelFacts("here", width=4, context=100)


def save(path, seed=0, width=4, **metadata):
    SoftPrompt(rows_of(3, width, seed), {"name": path.stem.title(), **metadata}).save(path)


def with_nan(path):
    rows = rows_of()
    rows[1, 1] = np.nan
    path.write_bytes(make_zip(("tensor.npy", npy(rows)), ("meta.json", b'{"name": "Not a number"}')))


def settle(folder):
    """Wait until no file of the folder is so young that a change could hide behind the clock's tick."""
    newest = max((entry.stat().st_ctime for entry in os.scandir(folder)), default=0)
    while time.time() - newest < 0.15:
        time.sleep(0.01)


@pytest.fixture
def reads(monkeypatch):
    """The names of the files whose headers are read."""
    names = []
    read_header = formats.read_header

    def counted(path):
        names.append(os.path.basename(path))
        return read_header(path)

    monkeypatch.setattr(formats, "read_header", counted)
    return names


def test_entries_of_every_kind_sorted(tmp_path):
    save(tmp_path / "Zebra.zip", author="A", description="d", supported=["m"])
    save(tmp_path / "apple.zip")
    np.save(tmp_path / "bare.npy", rows_of())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tensor.npy").write_bytes(npy(rows_of(7)))
    (tmp_path / "broken.zip").write_bytes(b"nothing")
    entries = Catalogue(tmp_path).entries(HERE)
    assert [(entry.filename, entry.name) for entry in entries] == [
        ("apple.zip", "Apple"),
        ("bare.npy", "bare"),
        ("broken.zip", "broken"),
        ("folder", "folder"),
        ("Zebra.zip", "Zebra"),
    ]
    assert [entry.n_tokens for entry in entries] == [3, 3, None, 7, 3]
    assert [str(entry.verdict) for entry in entries] == ["unproven", "unproven", "unreadable", "unproven", "unproven"]
    zebra, broken = entries[4], entries[2]
    assert (zebra.author, zebra.description, zebra.supported) == ("A", "d", ("m",))
    assert (zebra.width, zebra.dtype, zebra.header.n_tokens) == (4, "float32", 3)
    expected = "a soft prompt in a format that `kobold-sp convert --help` lists"
    assert broken.reason == f"a file of another kind; expected {expected}"
    assert (broken.width, broken.dtype, broken.header) == (None, None, None)


def test_what_is_no_soft_prompt_is_left_out(tmp_path):
    save(tmp_path / "noir.zip")
    (tmp_path / "README.txt").write_text("hello")
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "letter.docx").write_bytes(make_zip(("word/document.xml", b"x")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.zip").write_bytes(kobold_zip(rows_of()))
    for name in (".hidden.zip", "a.zip.part", "a.zip.crdownload", "a.tmp", "a.zip~", "A.ZIP.TMP"):
        (tmp_path / name).write_bytes(kobold_zip(rows_of()))
    (tmp_path / "broken link.zip").symlink_to(tmp_path / "nowhere")
    (tmp_path / "content counts.dat").write_bytes(kobold_zip(rows_of()))
    (tmp_path / "meant as one.json").write_text("{}")
    (tmp_path / "meant as one.zip").write_bytes(make_zip(("x", b"x")))
    assert [(entry.filename, str(entry.verdict)) for entry in Catalogue(tmp_path).entries()] == [
        ("content counts.dat", "no model"),
        ("meant as one.json", "unreadable"),
        ("meant as one.zip", "unreadable"),
        ("noir.zip", "no model"),
    ]


def test_a_missing_folder_is_empty_and_may_come(tmp_path):
    catalogue = Catalogue(tmp_path / "later")
    assert catalogue.entries() == ()
    (tmp_path / "later").mkdir()
    save(tmp_path / "later" / "noir.zip")
    assert len(catalogue.entries()) == 1
    (tmp_path / "later" / "noir.zip").unlink()
    (tmp_path / "later").rmdir()
    assert catalogue.entries() == ()
    assert Catalogue(__file__).entries() == ()


def test_links_are_followed(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "prompts").mkdir()
    save(tmp_path / "drive" / "noir.zip")
    (tmp_path / "prompts" / "linked.zip").symlink_to(tmp_path / "drive" / "noir.zip")
    catalogue = Catalogue(tmp_path / "prompts")
    assert catalogue.entry("linked.zip").name == "Noir"
    assert catalogue.load("linked.zip").name == "Noir"


def test_only_what_changed_is_read_again(tmp_path, reads):
    for name in ("a", "b", "c"):
        save(tmp_path / f"{name}.zip")
    (tmp_path / "notes.txt").write_text("no soft prompt")
    settle(tmp_path)
    catalogue = Catalogue(tmp_path)
    first = catalogue.entries(HERE)
    assert sorted(reads) == ["a.zip", "b.zip", "c.zip", "notes.txt"]
    reads.clear()
    assert catalogue.entries(HERE) is first
    assert [entry.verdict for entry in catalogue.entries()] == [Verdict.NO_MODEL] * 3
    assert catalogue.entries(HERE) is first
    assert not reads

    save(tmp_path / "b.zip", seed=1, description="new")
    second = catalogue.entries(HERE)
    assert reads == ["b.zip"]
    assert second[0] is first[0] and second[2] is first[2]
    assert second[1].description == "new"
    assert first[1].description == ""

    (tmp_path / "b.zip").rename(tmp_path / "d.zip")
    (tmp_path / "a.zip").unlink()
    assert [entry.filename for entry in catalogue.entries(HERE)] == ["c.zip", "d.zip"]
    assert catalogue.entries(HERE)[0] is first[2]


def test_another_model_is_judged_anew_without_reading(tmp_path, reads):
    save(tmp_path / "a.zip")
    settle(tmp_path)
    catalogue = Catalogue(tmp_path)
    assert catalogue.entries()[0].verdict is Verdict.NO_MODEL
    assert catalogue.entries(HERE)[0].verdict is Verdict.UNPROVEN
    other = catalogue.entries(ModelFacts("other", width=5))[0]
    assert (other.verdict, other.reason) == (Verdict.INCOMPATIBLE, "made for 4 columns, this model has 5")
    assert reads == ["a.zip"]
    for width in range(6, 20):
        catalogue.entries(ModelFacts("other", width=width))
    assert catalogue.entries(HERE)[0].verdict is Verdict.UNPROVEN


def test_a_change_within_the_clocks_tick_is_seen(tmp_path):
    """Another file of the same size, with the same times: as after two writes in one tick of a coarse clock."""
    path = tmp_path / "a.zip"
    path.write_bytes(kobold_zip(rows_of(), name="One"))
    catalogue = Catalogue(tmp_path)
    whole_second = int(time.time()) * 10**9
    os.utime(path, ns=(whole_second, whole_second))
    assert catalogue.entries()[0].name == "One"
    with open(path, "r+b") as file:  # the same inode
        file.write(kobold_zip(rows_of(), name="Two"))
    os.utime(path, ns=(whole_second, whole_second))
    assert catalogue.entries()[0].name == "Two"


def test_a_young_file_read_twice_stays_the_same_entry(tmp_path, reads):
    save(tmp_path / "a.zip")
    catalogue = Catalogue(tmp_path)
    first = catalogue.entries(HERE)
    assert catalogue.entries(HERE) is first
    settle(tmp_path)
    catalogue.entries(HERE)
    count = len(reads)
    assert catalogue.entries(HERE) is first
    assert len(reads) == count


def test_other_rows_make_another_entry(tmp_path):
    """Whoever uses an entry's rows learns from it that they changed, even where nothing else did."""
    np.save(tmp_path / "a.npy", rows_of())
    settle(tmp_path)
    catalogue = Catalogue(tmp_path)
    first = catalogue.entries()[0]
    np.save(tmp_path / "a.npy", rows_of(seed=1))
    second = catalogue.entries()[0]
    assert second is not first
    assert second.header is not first.header


def test_a_file_of_a_folder_that_changes(tmp_path):
    folder = tmp_path / "noir"
    folder.mkdir()
    catalogue = Catalogue(tmp_path)
    assert catalogue.entries() == ()
    (folder / "tensor.npy").write_bytes(npy(rows_of()))
    assert catalogue.entry("noir").name == "noir"
    (folder / "meta.json").write_text('{"name": "Noir"}')
    assert catalogue.entry("noir").name == "Noir"
    (folder / "meta.json").write_text("{")
    assert catalogue.entry("noir").verdict is Verdict.UNREADABLE
    (folder / "tensor.npy").unlink()
    assert catalogue.entries() == ()


def test_what_loading_finds_is_remembered_until_the_file_changes(tmp_path):
    with_nan(tmp_path / "bad.zip")
    save(tmp_path / "good.zip")
    catalogue = Catalogue(tmp_path)
    before = catalogue.entries(HERE)
    assert before[0].verdict is Verdict.UNPROVEN
    with pytest.raises(NotFinite):
        catalogue.load("bad.zip")
    for _ in range(2):
        bad, good = catalogue.entries(HERE)
        assert bad.verdict is Verdict.UNREADABLE
        assert bad.reason == "nan in row 1, column 1; expected finite values"
        assert (bad.name, bad.n_tokens, bad.header) == ("Not a number", None, None)
        assert good is before[1]
        settle(tmp_path)
    save(tmp_path / "bad.zip")
    assert catalogue.entries(HERE)[0].verdict is Verdict.UNPROVEN
    assert catalogue.load("bad.zip").name == "Bad"


def test_loading_needs_no_listing_before(tmp_path):
    with_nan(tmp_path / "bad.zip")
    save(tmp_path / "good.zip")
    catalogue = Catalogue(tmp_path)
    with pytest.raises(NotFinite):
        catalogue.load("bad.zip")
    assert np.array_equal(catalogue.load("good.zip").rows, rows_of())
    assert [entry.verdict for entry in catalogue.entries(HERE)] == [Verdict.UNREADABLE, Verdict.UNPROVEN]


def test_a_file_mended_in_place_is_readable_again(tmp_path):
    """Same header, same size: only the rows, and so the checksum in the zip's directory, are others."""
    bad = rows_of()
    bad[0, 0] = np.inf
    path = tmp_path / "a.zip"
    path.write_bytes(kobold_zip(bad))
    catalogue = Catalogue(tmp_path)
    with pytest.raises(NotFinite):
        catalogue.load("a.zip")
    path.write_bytes(kobold_zip(rows_of()))
    assert catalogue.entries(HERE)[0].verdict is Verdict.UNPROVEN


@pytest.mark.parametrize("name", ["../a.zip", "/etc/passwd", "x/../a.zip", "..", ".", "", "a\\b.zip", "a\0.zip"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "inner").mkdir()
    save(tmp_path / "a.zip")
    catalogue = Catalogue(tmp_path / "inner")
    for ask in (catalogue.load, catalogue.entry):
        with pytest.raises(UnsafeName):
            ask(name)


@pytest.mark.parametrize("name", ["none.zip", ".hidden.zip", "a.zip.part", "other"])
def test_an_unknown_name(tmp_path, name):
    save(tmp_path / ".hidden.zip")
    save(tmp_path / "a.zip.part")
    (tmp_path / "other").mkdir()
    catalogue = Catalogue(tmp_path)
    for ask in (catalogue.load, catalogue.entry):
        with pytest.raises(UnknownSoftPrompt):
            ask(name)


def test_texts_are_fit_for_a_menu(tmp_path):
    save(tmp_path / "a.zip", description="one\ntwo\tthree\x00\u202efour\ud800." + "x" * 3000, author="é" * 300)
    SoftPrompt(rows_of(), {"name": " \n ", "supported": ["m" * 500] * 99}).save(tmp_path / "b.zip")
    first, second = Catalogue(tmp_path).entries()
    assert first.description.startswith("one two three four .xxx")
    assert len(first.description) == 2000
    assert first.author == "é" * 199 + "…"
    assert second.name == "b"
    assert len(second.supported) == 50 and len(second.supported[0]) == 200
    assert len(first.header.description) > 3000


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    save(tmp_path / "a.zip")
    (tmp_path / "a.zip").chmod(0)
    assert Catalogue(tmp_path).entries()[0].reason == "it cannot be opened: Permission denied"


def test_a_failing_drive_is_one_entrys_matter(tmp_path, monkeypatch):
    save(tmp_path / "a.zip")
    save(tmp_path / "b.zip")
    read_header = formats.read_header

    def failing(path):
        if path.endswith("a.zip"):
            raise OSError(5, "Input/output error")
        return read_header(path)

    monkeypatch.setattr(formats, "read_header", failing)
    catalogue = Catalogue(tmp_path)
    bad, good = catalogue.entries(HERE)
    assert (bad.verdict, bad.reason) == (Verdict.UNREADABLE, "it cannot be opened: Input/output error")
    assert good.verdict is Verdict.UNPROVEN
    monkeypatch.setattr(formats, "read_header", read_header)
    assert catalogue.entries(HERE)[0].verdict is Verdict.UNPROVEN


def test_an_error_that_nobody_foresaw_is_one_entrys_matter(tmp_path, monkeypatch):
    save(tmp_path / "a.zip")
    save(tmp_path / "b.zip")
    read_header = formats.read_header

    def failing(path):
        if path.endswith("a.zip"):
            raise ZeroDivisionError("surprise")
        return read_header(path)

    monkeypatch.setattr(formats, "read_header", failing)
    bad, good = Catalogue(tmp_path).entries(HERE)
    assert (bad.verdict, bad.reason) == (Verdict.UNREADABLE, "it cannot be read (ZeroDivisionError: surprise)")
    assert good.verdict is Verdict.UNPROVEN


def test_a_file_that_vanishes_while_it_is_loaded(tmp_path, monkeypatch):
    save(tmp_path / "a.zip")
    catalogue = Catalogue(tmp_path)
    load = formats.load

    def vanishing(path):
        os.unlink(path)
        return load(path)

    monkeypatch.setattr(formats, "load", vanishing)
    with pytest.raises(UnknownSoftPrompt):
        catalogue.load("a.zip")


def test_a_failure_of_a_file_that_was_replaced_meanwhile_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    with_nan(path)
    catalogue = Catalogue(tmp_path)
    load = formats.load

    def replaced(read):
        try:
            return load(read)
        finally:
            save(path)

    monkeypatch.setattr(formats, "load", replaced)
    with pytest.raises(NotFinite):
        catalogue.load("a.zip")
    assert catalogue.entries(HERE)[0].verdict is Verdict.UNPROVEN


def test_rows_that_were_swapped_are_found_by_their_checksum(tmp_path):
    folder = tmp_path / "noir"
    folder.mkdir()
    save(tmp_path / "a.zip")
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        (folder / "meta.json").write_bytes(archive.read("meta.json"))
        (folder / "tensor.npy").write_bytes(archive.read("tensor.npy"))
    catalogue = Catalogue(tmp_path)
    assert catalogue.load("noir") == catalogue.load("a.zip")
    (folder / "tensor.npy").write_bytes(npy(rows_of(seed=1)))
    with pytest.raises(CorruptMember, match="SHA-256"):
        catalogue.load("noir")


def test_many_threads_see_whole_listings(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    for name in "abc":
        save(tmp_path / f"{name}.zip")
    catalogue = Catalogue(tmp_path)

    def ask(number):
        if number % 10 == 0:
            save(tmp_path / "b.zip", seed=number)
        return [entry.filename for entry in catalogue.entries(ModelFacts("m", width=number % 6 or None))]

    with ThreadPoolExecutor(4) as pool:
        assert all(names == ["a.zip", "b.zip", "c.zip"] for names in pool.map(ask, range(100)))
