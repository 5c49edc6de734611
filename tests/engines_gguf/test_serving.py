"""``kobold-sp serve`` with a GGUF file, here and in a llama-server: the whole menu, and KoboldAI's API."""

from urllib.parse import urlsplit

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
import gguf_files
from llama_servers import PROGRAM, Server, softprompt
from serving import GREEDY, as_lite_reads, asking, connected, hears, reading, serving

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.cli import main

pytestmark = pytest.mark.llama_cpp


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    gguf_files.write(gguf_files.tiny("llama"), folder / "model.gguf")
    (folder / "softprompts").mkdir()
    (folder / "slots").mkdir()
    for seed, name in enumerate(("noir", "sea")):
        SoftPrompt(softprompt(seed).rows, {"name": name}).save(folder / "softprompts" / f"{name}.zip")
    SoftPrompt(np.ones((3, 32), np.float32), {"name": "wide"}).save(folder / "softprompts" / "wide.zip")
    return folder


@pytest.fixture(scope="module", params=["in process", "llama-server"])
def address(request, files):
    options = ["--model", files / "model.gguf", "--softprompts", files / "softprompts"]
    if request.param == "in process":
        with serving(*options, "--context", "400") as (url, _, _):
            yield url
        return
    if not PROGRAM:
        pytest.skip("KOBOLD_SP_LLAMA_SERVER names no llama-server")
    program = Server(files / "model.gguf", files / "slots", "-np", "1")
    try:
        options += ["--engine", "llama-server", "--url", program.url, "--slots", files / "slots"]
        with serving(*options) as (url, _, _):
            yield url
    finally:
        program.close()


class Host:
    """What the clients of :mod:`serving` want to know of a server."""

    def __init__(self, url):
        self.url = url
        self.port = urlsplit(url).port


@pytest.fixture
def server(address):
    return Host(address)


def test_the_menu(server):
    with connected(server) as client:
        status = hears(client, "softprompts")
        entries = {each["filename"]: each for each in status["entries"]}
        assert [entries[name]["usable"] for name in ("noir.zip", "sea.zip", "wide.zip")] == [True, True, False]
        assert entries["wide.zip"]["reason"] == "made for 32 columns, this model has 64"
        assert "model" in status["model"] and status["context"]

        client.emit("load_softprompt", "noir.zip")
        told = hears(client, "softprompts", selection=["noir.zip"])
        while told["effect"] is None:
            told = hears(client, "softprompts", 30, selection=["noir.zip"])
        assert 0.1 < told["effect"] < 1 and told["n_tokens"] == 37
        client.emit("load_softprompt", "wide.zip")
        assert "made for 32 columns" in hears(client, "softprompt_error", filename="wide.zip")["message"]

        client.emit("generate", {"id": "1", **GREEDY})
        pieces = []
        while (heard := hears(client, "generation", 30, id="1"))["state"] not in ("done", "error"):
            pieces.append(heard["text"])
        assert heard["state"] == "done" and len([piece for piece in pieces if piece]) > 3, "as it comes"
        client.emit("load_softprompt", "")
        assert hears(client, "softprompts", selection=[])["effect"] is None


def test_koboldais_api(server):
    ask = asking(server)
    plain = ask("POST", "/api/v1/generate", GREEDY).text
    texts = [ask("POST", "/api/v1/generate", {**GREEDY, "soft_prompt": name}).text for name in ("noir.zip", "sea.zip")]
    assert len({plain, *texts}) == 3
    assert ask("PUT", "/api/v1/config/soft_prompt", {"value": "noir.zip"}).status == 200
    assert ask("POST", "/api/v1/generate", GREEDY).text == texts[0]
    with reading(server, "/api/extra/generate/stream", GREEDY) as response:
        events = as_lite_reads(response.read())
    assert "".join(event["token"] for _, event in events) == texts[0] and len(events) > 3
    stop = texts[0][4:6]
    assert (
        ask("POST", "/api/v1/generate", {**GREEDY, "stop_sequence": [stop], "trim_stop": True}).text
        == (texts[0][: texts[0].index(stop)])
    )
    ask("PUT", "/api/v1/config/soft_prompt", {"value": ""})
    assert ask("POST", "/api/v1/generate", GREEDY).text == plain


@pytest.mark.parametrize(
    ("engine", "more", "said"),
    [
        ("llama-server", ("--slots", "slots"), "No answer from http://127.0.0.1:9"),
        ("vllm", (), "No answer from http://127.0.0.1:9"),
        ("llama-server", (), "needs --model"),
        (None, (), "--url goes with --engine"),
    ],
)
def test_an_engine_that_is_not_there(files, monkeypatch, engine, more, said):
    monkeypatch.chdir(files)
    chosen = () if engine is None else ("--engine", engine)
    command = ["serve", "--port", "0", "--model", "model.gguf", *chosen, "--url", "http://127.0.0.1:9", *more]
    answer = CliRunner().invoke(main, command)
    assert answer.exit_code == 2 and said in answer.output
    assert "Traceback" not in answer.output
