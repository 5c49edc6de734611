"""Soft prompts that belong to characters."""

import json
import os

import pytest
from models import softprompt
from serving import GREEDY

from kobold_sp_plugin.errors import SelectionError
from kobold_sp_plugin.server.characters import Characters

PATH = "/api/extra/softprompts/characters"


@pytest.fixture
def kept(tmp_path):
    return Characters(tmp_path / "softprompts")


def test_they_are_kept_on_disk_beside_the_folder(kept, tmp_path):
    assert kept.all() == {}
    kept.keep(" Aria ", ["noir.zip", "space.zip"])
    kept.keep("Żółw", ["noir.zip"])
    assert [each.name for each in tmp_path.iterdir()] == ["softprompts.characters.json"], "and nothing half-written"
    assert Characters(tmp_path / "softprompts").all() == {"Aria": ("noir.zip", "space.zip"), "Żółw": ("noir.zip",)}
    kept.keep("Aria", [])
    assert kept.all() == {"Żółw": ("noir.zip",)}


def test_what_somebody_else_writes_is_read(kept):
    kept.keep("Aria", ["noir.zip"])
    kept.path.write_text('{"characters": {"Bob": ["space.zip"]}}')
    assert kept.all() == {"Bob": ("space.zip",)}
    kept.path.unlink()
    assert kept.all() == {}


@pytest.mark.parametrize(
    "content", [b"not json", b"\xff", b"[]", b'{"characters": {"A": "noir.zip"}}', b'{"characters": {"A": [5]}}']
)
def test_a_file_that_is_damaged_is_said_to_be_and_not_written_over(kept, content):
    kept.path.write_bytes(content)
    for act in (kept.all, lambda: kept.keep("A", ["noir.zip"]), lambda: kept.speaking("A", "")):
        with pytest.raises(SelectionError, match=r"softprompts\.characters\.json cannot be read"):
            act()
    assert kept.path.read_bytes() == content


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions")
def test_a_folder_that_cannot_be_written_to_is_said_to_be(kept, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SelectionError, match="cannot be written"):
        kept.keep("A", ["noir.zip"])
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["", "  ", "a" * 201, "two\nlines", "\x00"])
def test_a_name_is_one_line_of_text(kept, name):
    with pytest.raises(SelectionError, match="name"):
        kept.keep(name, ["noir.zip"])


@pytest.mark.parametrize(
    ("prompt", "name", "found"),
    [
        ("You: Hello\nAria:", "", True),
        ("Aria:", "", True),
        ("\nAria: \n", "", True),
        ("You: Hello\nAria: I", "", False),
        ("Aria:\nYou:", "", False),
        ("Daria:", "", False),
        ("Aria", "", False),
        ("", "", False),
        ("anything", "Aria", True),
        ("Aria:", "Bob", False),
    ],
)
def test_who_speaks_is_said_or_stands_at_the_prompts_end(kept, prompt, name, found):
    kept.keep("Aria", ["noir.zip"])
    assert kept.speaking(name, prompt) == (("noir.zip",) if found else None)


def test_a_character_has_its_soft_prompt_through_the_api(ask, session, folder):
    def text(**fields):
        return ask("POST", "/api/v1/generate", {**GREEDY, **fields}).text

    plain, noir, both = text(), text(soft_prompt="noir.zip"), text(soft_prompt=["noir.zip", "space.zip"])
    assert ask("PUT", PATH, {"character": "Aria", "soft_prompt": "noir.zip"}).json == {
        "characters": {"Aria": ["noir.zip"]}
    }
    assert ask("PUT", PATH, {"character": "Bob", "soft_prompt": ["noir.zip", "space.zip"]}).status == 200
    assert ask("GET", PATH).json == {"characters": {"Aria": ["noir.zip"], "Bob": ["noir.zip", "space.zip"]}}
    assert text(character="Aria") == noir and text(character="Bob") == both
    assert text(character="Nobody") == plain == text(character="Aria", soft_prompt="")
    said = {"prompt": "You: Hello\nAria:"}
    assert text(**said) == text(**said, soft_prompt="noir.zip") != text(**said, soft_prompt="")
    session.select("space.zip")
    assert text(character="Aria") == noir and text(character="Nobody") == text(soft_prompt="space.zip")

    assert ask("PUT", PATH, {"character": "Aria"}).json == {"characters": {"Bob": ["noir.zip", "space.zip"]}}
    refused = ask("PUT", PATH, {"character": "Aria", "soft_prompt": "wide.zip"})
    assert refused.status == 422 and "64 columns" in refused.json["detail"]["soft_prompt"][0]
    assert ask("PUT", PATH, {"character": "\n", "soft_prompt": "noir.zip"}).json["detail"]["character"]
    assert json.loads((folder.parent / "softprompts.characters.json").read_text())["characters"].keys() == {"Bob"}

    (folder / "space.zip").unlink()
    softprompt(5).save(folder / "other.zip")
    gone = ask("POST", "/api/v1/generate", {**GREEDY, "character": "Bob"})
    assert gone.status == 422 and "space.zip" in gone.json["detail"]["soft_prompt"][0]
