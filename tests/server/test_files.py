"""The softprompts folder through HTTP: what is put in, taken out, renamed, deleted and brought back."""

import io
import json
import os
import zipfile
from functools import partial
from urllib.parse import quote

import numpy as np
import pytest
from models import FAMILY, softprompt, tiny_model, tiny_tokenizer

from kobold_sp_plugin import SoftPrompt, formats
from kobold_sp_plugin.engines.transformers import TransformersEngine
from kobold_sp_plugin.server import folder as folder_module
from kobold_sp_plugin.server.app import Server
from kobold_sp_plugin.server.folder import Folder, stem_of
from kobold_sp_plugin.session import Session

FILES = "/api/extra/softprompts/files"
TRASH = "/api/extra/softprompts/trash"


@pytest.fixture(scope="module")
def loaded():
    model = tiny_model(FAMILY)
    return model, tiny_tokenizer()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "softprompts"
    path.mkdir()
    softprompt(1, name="Noir", author="A").save(path / "noir.zip")
    softprompt(2, n_tokens=6, name="Space").save(path / "space.zip")
    (path / "broken.zip").write_bytes(b"not a zip")
    return path


@pytest.fixture
def session(path, loaded):
    session = Session(path, TransformersEngine(*loaded, "tiny"))
    yield session
    session.close()


@pytest.fixture
def client(session):
    server = Server(session, port=0)
    client = server.app.test_client()
    client.open = partial(client.open, buffered=True)  # an answer that is not read to its end is still under way
    yield client
    server.close()


def names(path):
    """What is in the folder; unfinished files would show."""
    return sorted(each.name for each in path.iterdir())


def as_file(path, made, format="zip", dtype="float32"):
    formats.save(made, path, dtype, format)
    return path.read_bytes()


def take(client, filename):
    return client.get(f"{FILES}/{quote(filename)}")


def put(client, filename, body):
    return client.post(f"{FILES}?filename={quote(filename)}", data=body)


def test_a_file_that_is_put_in_is_listed_and_can_be_taken_out(client, path, session, tmp_path):
    heard = []
    session.subscribe(heard.append)
    sent = as_file(tmp_path / "mine.zip", softprompt(3, name="Mine"))
    answer = put(client, "C:\\Users\\me\\Mine (1).zip", sent)
    assert answer.status_code == 201
    assert answer.json["filename"] == "Mine (1).zip" and answer.json["entry"]["name"] == "Mine"
    assert answer.json["converted_from"] == ""
    assert (path / "Mine (1).zip").read_bytes() == sent
    assert "Mine (1).zip" in [entry["filename"] for entry in heard[-1]["entries"]]

    taken = take(client, "Mine (1).zip")
    assert taken.data == sent
    assert "attachment" in taken.headers["Content-Disposition"]
    assert ".trash" not in names(path)


def test_a_file_in_another_format_is_converted_on_the_way_in(client, path, tmp_path):
    made = softprompt(3)
    answer = put(client, "rows.npy", as_file(tmp_path / "rows.npy", made, "npy", "float16"))
    assert answer.status_code == 201 and answer.json["filename"] == "rows.zip"
    assert "NumPy" in answer.json["converted_from"]
    assert formats.read_header(path / "rows.zip").format == "zip"
    assert formats.read_header(path / "rows.zip").dtype == "float16"
    np.testing.assert_array_equal(SoftPrompt.load(path / "rows.zip").rows, made.rows.astype(np.float16))
    assert names(path) == ["broken.zip", "noir.zip", "rows.zip", "space.zip"]


def test_nothing_is_overwritten(client, path, tmp_path):
    before = (path / "noir.zip").read_bytes()
    sent = as_file(tmp_path / "noir.zip", softprompt(9, name="Another"))
    assert put(client, "noir.zip", sent).json["filename"] == "noir-2.zip"
    assert put(client, "NOIR.zip", sent).json["filename"] == "NOIR-3.zip"  # some file systems tell no cases apart
    assert (path / "noir.zip").read_bytes() == before


def not_finite(folder):
    made = io.BytesIO()
    np.save(made, np.full((4, 32), np.nan, np.float32))
    return made.getvalue()


def zipped(tensor):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("tensor.npy", tensor)
    return made.getvalue()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: b"a story of mine", "it is no soft prompt"),
        (lambda folder: b"\0", "it is no soft prompt"),
        (lambda folder: as_file(folder / "torn.zip", softprompt(1))[:-200], "zip"),
        (not_finite, "nan"),
        (lambda folder: zipped(not_finite(folder)), "nan"),
        (lambda folder: b"cos\nsystem\n(S'true'\ntR.", "it is no soft prompt"),
    ],
)
def test_what_is_no_soft_prompt_is_refused_with_the_reason(client, path, tmp_path, make, reason):
    answer = put(client, "evil.zip", make(tmp_path))
    assert answer.status_code == 422
    assert reason in answer.json["detail"]["msg"]
    assert str(path) not in answer.json["detail"]["msg"]
    assert names(path) == ["broken.zip", "noir.zip", "space.zip"]


def test_a_file_that_is_too_long_or_has_no_length_is_refused_unread(client, path, monkeypatch):
    monkeypatch.setattr(folder_module, "LONGEST_FILE", 1000)
    answer = put(client, "long.zip", b"x" * 1001)
    assert answer.status_code == 413 and "1,000 bytes" in answer.json["detail"]["msg"]
    answer = client.post(FILES)
    assert answer.status_code == 411
    assert names(path) == ["broken.zip", "noir.zip", "space.zip"]


def test_what_does_not_come_in_full_leaves_nothing(client, path):
    answer = client.post(FILES, data=b"PK", environ_overrides={"CONTENT_LENGTH": "500"})
    assert answer.status_code == 400 and "2 of 500" in answer.json["detail"]["msg"]
    assert names(path) == ["broken.zip", "noir.zip", "space.zip"]


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.zip", "boot"),
        (".hidden.zip", "hidden"),
        ("...", ""),
        ("", ""),
        ("<img src=x onerror=alert(1)>.zip", "img src x onerror alert(1)"),
        ("a\nb\tc\0d\u202ezip.exe", "a b c d zip.exe"),
        ("con", "con-softprompt"),
        ("Lpt1.zip", "Lpt1-softprompt"),
        ("модель v2.zip", "модель v2"),
        ("noir.tmp", "noir.tmp"),
        ("x" * 300, "x" * 120),
        ("é" * 100, "é" * 60),
    ],
)
def test_the_name_is_made_here(asked, made):
    assert stem_of(asked) == made


def test_whatever_the_name_the_file_is_in_the_folder(client, path, tmp_path):
    sent = as_file(tmp_path / "mine.zip", softprompt(3, name=""))
    for asked, made in (("../../etc/passwd", "passwd.zip"), ("...", "softprompt.zip"), ("x" * 300, "x" * 120 + ".zip")):
        assert put(client, asked, sent).json["filename"] == made
        assert names(path) == sorted(["broken.zip", "noir.zip", "space.zip", made])
        (path / made).unlink()


def test_a_file_is_renamed_and_the_selection_goes_with_it(client, path, session):
    session.select(["space.zip", "noir.zip"])
    characters = "/api/extra/softprompts/characters"
    assert (
        client.put(characters, json={"character": "Rita", "soft_prompt": ["noir.zip", "space.zip"]}).status_code == 200
    )
    answer = client.patch(f"{FILES}/noir.zip", json={"filename": "Black rain.zip", "name": " Black rain "})
    assert answer.status_code == 200 and answer.json["filename"] == "Black rain.zip"
    assert answer.json["entry"]["name"] == "Black rain"
    assert names(path) == ["Black rain.zip", "broken.zip", "space.zip"]
    assert session.selection == ("space.zip", "Black rain.zip")
    assert not session.status()["notice"]
    assert client.get(characters).json == {"characters": {"Rita": ["Black rain.zip", "space.zip"]}}
    assert SoftPrompt.load(path / "Black rain.zip").metadata["author"] == "A"

    assert client.patch(f"{FILES}/space.zip", json={"filename": "Space.zip"}).json["filename"] == "Space.zip"
    answer = client.patch(f"{FILES}/Space.zip", json={"filename": "black RAIN", "name": "Not this"})
    assert answer.status_code == 409
    assert SoftPrompt.load(path / "Space.zip").name == "Space"
    assert client.patch(f"{FILES}/Space.zip", json={"name": 5}).json == {
        "detail": {"name": ["Expected a text of 1 to 500 characters."]}
    }
    assert client.patch(f"{FILES}/broken.zip", json={"name": "Whole"}).status_code == 422
    assert client.patch(f"{FILES}/broken.zip", json={"filename": "whole"}).json["filename"] == "whole.zip"


def test_a_name_that_a_format_has_no_place_for_is_refused(client, path):
    formats.save(softprompt(4), path / "rows.npy", "float32", "npy")
    answer = client.patch(f"{FILES}/rows.npy", json={"name": "Rows", "filename": "other"})
    assert answer.status_code == 422 and "convert" in answer.json["detail"]["msg"].lower()
    assert "rows.npy" in names(path)


def test_what_is_deleted_comes_back(client, path, session, tmp_path):
    session.select("noir.zip")
    before = (path / "noir.zip").read_bytes()
    deletion = client.delete(f"{FILES}/noir.zip").json["deletion"]
    assert session.selection == ()
    assert "noir.zip" not in names(path)
    assert [entry.filename for entry in session.entries()] == ["broken.zip", "space.zip"]
    (listed,) = client.get(TRASH).json["values"]
    assert listed["filename"] == "noir.zip" and listed["deletion"] == deletion

    put(client, "noir.zip", as_file(tmp_path / "new.zip", softprompt(9)))
    answer = client.post(f"{TRASH}/{deletion}")
    assert answer.json["filename"] == "noir-2.zip"
    assert (path / "noir-2.zip").read_bytes() == before
    assert client.get(TRASH).json == {"values": []}
    assert client.post(f"{TRASH}/{deletion}").status_code == 404
    assert client.post(f"{TRASH}/..").status_code == 404


def test_a_folder_is_taken_out_as_a_zip_and_deleted_whole(client, path, tmp_path):
    made = softprompt(5, name="Adapter")
    formats.save(made, path / "adapter", "float32", "folder")
    taken = tmp_path / "taken.zip"
    answer = take(client, "adapter")
    assert "adapter.zip" in answer.headers["Content-Disposition"]
    taken.write_bytes(answer.data)
    np.testing.assert_array_equal(SoftPrompt.load(taken).rows, made.rows)
    deletion = client.delete(f"{FILES}/adapter").json["deletion"]
    assert names(path / ".trash" / deletion) == ["adapter"]
    assert client.post(f"{TRASH}/{deletion}").json["filename"] == "adapter"
    assert formats.read_header(path / "adapter").format == "folder"


def test_nothing_outside_the_folder_is_reached(client, path):
    softprompt(1).save(path.parent / "secret.zip")
    for name in ("..", "%2e%2e%2fsecret.zip", "..%5csecret.zip", "missing.zip", ".trash", "%00", "C:x"):
        for method in (client.get, client.patch, client.delete):
            assert method(f"{FILES}/{name}", json={"filename": "mine"}).status_code in (404, 405), name
    assert (path.parent / "secret.zip").exists()
    assert names(path) == ["broken.zip", "noir.zip", "space.zip"]


def test_what_is_no_soft_prompt_is_not_given_out(client, path):
    os.symlink("/etc/hostname", path / "link.zip")
    for filename in ("link.zip", "broken.zip"):
        answer = client.get(f"{FILES}/{filename}")
        assert answer.status_code == 422 and "cannot be read" in answer.json["detail"]["msg"]


def test_a_file_name_is_no_header(client, path):
    softprompt(1).save(path / 'a"\r\nX-Evil: 1.zip')
    answer = take(client, 'a"\r\nX-Evil: 1.zip')
    assert answer.status_code == 200
    assert "X-Evil" not in answer.headers
    assert "a X-Evil 1.zip" in answer.headers["Content-Disposition"]


def test_the_details_tell_what_inspecting_tells_without_the_effect(client, path):
    made = softprompt(1, name="Told")
    about = {"steps": 100, "documents": 3}
    SoftPrompt(made.rows, {"name": "Told", "kobold_sp_plugin": {"training": about}}).save(path / "told.zip")
    found = client.get(f"{FILES}/told.zip/details").json
    assert found["n_tokens"] == made.n_tokens == len(found["rows"])
    assert found["width"] == made.width and found["verdict"] == "unproven"
    assert found["training"] == about and found["effect"] is None
    assert all(len(row["nearest"]) == 3 for row in found["rows"])
    np.testing.assert_allclose([row["length"] for row in found["rows"]], np.linalg.norm(made.rows, axis=1), rtol=1e-5)
    assert 0 < client.get(f"{FILES}/told.zip/effect").json["effect"] <= 1
    assert client.get(f"{FILES}/broken.zip/details").status_code == 422
    assert client.get(f"{FILES}/broken.zip/effect").status_code == 422


def test_without_a_model_there_is_nothing_to_hold_it_against(client, session):
    session.use(None)
    assert client.get(f"{FILES}/noir.zip/details").status_code == 503
    assert take(client, "noir.zip").status_code == 200


def test_a_folder_that_cannot_be_changed_says_so(path, monkeypatch, client):
    def full(*_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folder_module, "_receive", full)
    answer = put(client, "mine.zip", b"x")
    assert answer.status_code == 507
    assert "No space left" in answer.json["detail"]["msg"] and str(path) not in json.dumps(answer.json)


def test_a_file_system_without_links_overwrites_nothing_either(path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    folder = Folder(path)
    deletion = folder.delete("noir.zip")
    softprompt(7).save(path / "noir.zip")
    assert folder.restore(deletion) == "noir-2.zip"
    with pytest.raises(FileExistsError):
        folder_module._move(str(path / "noir.zip"), str(path / "space.zip"))
