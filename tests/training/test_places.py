import pytest

from kobold_sp_plugin.training.places import filename, of_version, places


@pytest.mark.parametrize(
    "name, title, file",
    [
        ("Noir", "Noir v2", "Noir-v2"),
        ("Noir v3", "Noir v4", "Noir v4"),
        ("Noir V2", "Noir V3", "Noir V3"),
        ("Noir v3.", "Noir v4.", "Noir v4"),
        ("Noir v3?", "Noir v4?", "Noir v4"),
        ("Noir/v3", "Noir/v4", "Noir-v4"),
        ("Noir (v3)", "Noir (v4)", "Noir (v4)"),
        ("v3", "v3 v2", "v3-v2"),
    ],
)
def test_the_menu_and_the_file_name_the_same_version(tmp_path, name, title, file):
    assert of_version(name, 2, " v") == title
    (tmp_path / f"{filename(name)}.zip").touch()
    found = places(tmp_path / f"{filename(name)}.zip")
    assert (found.output.name, found.work.name, found.version) == (f"{file}.zip", file, 2)
