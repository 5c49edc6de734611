"""The OpenAPI document, and the running server held to it."""

import re
import shutil
import subprocess

import pytest

from kobold_sp_plugin.server.fields import CHAT, COMPLETION, GENERATION
from kobold_sp_plugin.server.openapi import document


def body_of(described, path, method="post"):
    return described["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]


@pytest.mark.parametrize("version", ["v1", "latest"])
def test_it_is_at_uniteds_path_and_names_what_can_be_chosen(ask, version):
    described = ask("GET", f"/api/{version}/openapi.json").json
    assert described["openapi"].startswith("3.") and described["info"]["version"] == "1.2.5"
    chosen = body_of(described, "/api/v1/config/soft_prompt", "put")["properties"]["value"]["anyOf"][0]
    assert chosen["enum"] == ["noir.zip", "space.zip"]


def test_everything_that_is_described_is_there_and_the_other_way_round(server):
    described = document("1", [])["paths"]
    there = {
        (re.sub(r"<(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in server.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.rule.startswith(("/api/", "/v1/"))
    }
    there = {each for each in there if not re.search(r"openapi|softprompts/(files|trash)", each[0])}
    assert {(path, method) for path, methods in described.items() for method in methods} == there


def test_uniteds_ranges_are_in_it():
    fields = body_of(document("1", []), "/api/v1/generate")["properties"]
    assert fields["n"]["minimum"] == 1 and fields["n"]["maximum"] == 5
    assert fields["rep_pen"]["minimum"] == 1
    for name in ("top_p", "tfs", "typical"):
        assert (fields[name]["minimum"], fields[name]["maximum"]) == (0, 1)
    assert fields["temperature"]["minimum"] == 0 and fields["temperature"]["exclusiveMinimum"] is True
    assert fields["sampler_order"]["minItems"] == 6


@pytest.mark.parametrize("table", [GENERATION, COMPLETION, CHAT])
def test_every_field_says_what_it_means(table):
    for name, field in table.items():
        assert field.meaning.endswith("."), name
        assert field.kind.schema, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_server_is_as_the_document_says(server, tmp_path):
    program = shutil.which("schemathesis")
    if program is None:
        pytest.skip("schemathesis is not installed: pip install schemathesis")
    url = server.url.rstrip("/")
    command = [program, "run", f"{url}/api/v1/openapi.json", "--url", url, "--no-color", "--max-examples", "20"]
    # A text may be right by every field and still not fit the context: that check cannot know.
    command += ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "60"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)
    print(result.stdout.decode())
    assert result.returncode == 0, result.stdout.decode()[-8000:]
