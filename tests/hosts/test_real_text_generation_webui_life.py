"""The extension in a real text-generation-webui over its life: models that come and go, restarts, files, loading.

Run where ``KOBOLD_SP_TEXTGEN`` and ``KOBOLD_SP_TEXTGEN_PYTHON`` name an installation.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hosts.real_text_generation_webui import (
    FOLDER,
    MISSING,
    Host,
    Refused,
    Truth,
    make_checkpoints,
    user_data,
    wait_for,
)

from kobold_sp_plugin import SoftPrompt

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(400)]

PROMPT = "The door opened and the rain came in. Nobody said a word"
SETTINGS = "mode: instruct\nmax_new_tokens: 16\n"


def softprompt(seed, n_tokens=5, width=32, **metadata):
    rows = np.random.default_rng(seed).normal(size=(n_tokens, width)).astype(np.float32)
    return SoftPrompt(rows=rows, metadata={"name": f"Test {seed}", **metadata})


RAIN, NOIR = softprompt(1), softprompt(2, n_tokens=3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(folder, ("llama", "qwen3", "wide"))
    return folder


@pytest.fixture
def data(tmp_path, checkpoints):
    """A ``user_data`` in which the rain was selected when the host ran last."""
    folder = user_data(tmp_path / "user_data")
    (folder / "models").rmdir()
    (folder / "models").symlink_to(checkpoints)
    RAIN.save(folder / "softprompts" / "rain.zip")
    NOIR.save(folder / "softprompts" / "noir.zip")
    (folder / "softprompts.json").write_text(json.dumps({"selection": ["rain.zip"]}))
    (folder / "settings.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def truths(checkpoints):
    llama, qwen3 = checkpoints / "llama", checkpoints / "qwen3"
    return {
        "bare": Truth(llama).text(PROMPT, 16),
        "rain": Truth(llama, RAIN).text(PROMPT, 16),
        "noir": Truth(llama, NOIR).text(PROMPT, 16),
        "qwen3": Truth(qwen3, RAIN).text(PROMPT, 16),
    }


def test_a_selection_outlasts_restarts_models_and_files_that_change(data, truths):
    wide = Truth(data / "models" / "wide").text(PROMPT, 16)
    with Host(data) as host:
        assert host.complete(PROMPT) == truths["rain"]
        assert host.complete(PROMPT, soft_prompt="") == truths["bare"]
        assert host.complete(PROMPT, soft_prompt="noir.zip") == truths["noir"]
        assert host.complete(PROMPT) == truths["rain"]

        # A model of the same width, one of another, and the first again.
        host.load("qwen3")
        assert host.complete(PROMPT) == truths["qwen3"]
        host.load("wide")
        assert host.complete(PROMPT) == wide
        host.load("llama")
        assert host.complete(PROMPT) == truths["rain"]
        host.load("llama")  # loaded over itself
        assert host.complete(PROMPT, stream=True) == truths["rain"]

        # No model, and a model again.
        host.unload()
        with pytest.raises((Refused, OSError)):
            host.complete(PROMPT)
        host.load("llama")
        assert host.complete(PROMPT) == truths["rain"]

        # Another file under the same name, and none.
        NOIR.save(data / "softprompts" / "rain.zip")
        wait_for(lambda: host.complete(PROMPT) == truths["noir"], 20)
        (data / "softprompts" / "rain.zip").unlink()
        wait_for(lambda: host.complete(PROMPT) == truths["bare"], 20)
        RAIN.save(data / "softprompts" / "rain.zip")
        wait_for(lambda: host.complete(PROMPT, soft_prompt="rain.zip") == truths["rain"], 20)

        host.restart()
        assert host.complete(PROMPT) == truths["rain"]
    assert (data / "settings.yaml").read_text() == SETTINGS
    assert json.loads((data / "softprompts.json").read_text()) == {"selection": ["rain.zip"]}


def test_other_apis_use_the_selection(data, truths):
    with Host(data) as host:
        messages = [{"role": "user", "content": "The door opened"}]
        body = {"messages": messages, "max_tokens": 16, "temperature": 0}
        prompt = host.post("/v1/internal/chat-prompt", body)["prompt"]
        for name, options in (("rain", {}), ("bare", {"soft_prompt": ""}), ("noir", {"soft_prompt": "noir.zip"})):
            rows = {"rain": (RAIN,), "bare": (), "noir": (NOIR,)}[name]
            expected = Truth(data / "models" / "llama", *rows).text(prompt, 16).strip()
            answer = host.post("/v1/messages", {**body, "model": "llama", "top_k": 1, **options})
            assert answer["content"][0]["text"].strip() == expected
            assert host.chat(messages, **options).strip() == expected
        before = host.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4, "soft_prompt": ""})["usage"]
        after = host.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})["usage"]
        assert after["prompt_tokens"] == before["prompt_tokens"]


def test_a_generation_keeps_its_soft_prompt_whatever_happens_to_the_file(data, checkpoints):
    expected = Truth(checkpoints / "llama", RAIN).text(PROMPT, 300)
    with Host(data) as host:
        events = host.stream("/v1/completions", {"prompt": PROMPT, "max_tokens": 300, "temperature": 0})
        text = next(events)["choices"][0]["text"] + next(events)["choices"][0]["text"]
        (data / "softprompts" / "rain.zip").unlink()
        assert text + "".join(event["choices"][0]["text"] for event in events) == expected


@pytest.mark.slow
def test_a_model_that_was_unloaded_for_idleness_comes_back_with_the_selection(data, truths):
    with Host(data, "--idle-timeout", "1") as host:
        assert host.complete(PROMPT) == truths["rain"]
        wait_for(lambda: "Unloading the model for inactivity" in host.tail(), 200, host.tail, every=1)
        assert host.complete(PROMPT, soft_prompt="noir.zip") == truths["noir"]
        assert host.complete(PROMPT) == truths["rain"]
        wait_for(lambda: host.tail().count("Unloading the model for inactivity") == 2, 200, host.tail, every=1)
        assert host.complete(PROMPT, stream=True) == truths["rain"]


def test_without_the_package_the_host_works_and_says_what_is_missing(data, truths, tmp_path):
    with Host(data, packages=tmp_path) as host:
        assert host.complete(PROMPT) == truths["bare"]
        assert "kobold_sp_plugin" in host.log.read_text()
        assert "kobold-sp install" in host.log.read_text()


def test_a_selection_file_that_is_broken_stops_nothing(data, truths):
    (data / "softprompts.json").write_text("{no json")
    with Host(data) as host:
        assert host.complete(PROMPT) == truths["bare"]


def test_without_a_model_the_host_starts_and_the_selection_waits(data, truths):
    with Host(data, model=None) as host:
        with pytest.raises((Refused, OSError)):
            host.complete(PROMPT)
        host.load("llama")
        assert host.complete(PROMPT) == truths["rain"]


@pytest.mark.parametrize("flags", [("--bf16",), ("--no-cache",), ("--attn-implementation", "eager")], ids=str)
def test_ways_of_loading(data, truths, flags):
    with Host(data, *flags) as host:
        assert host.complete(PROMPT) == truths["rain"]
        assert host.complete(PROMPT, soft_prompt="") == truths["bare"]


def test_nothing_is_written_into_the_installation(data):
    def files():
        return {
            (str(path), path.stat().st_mtime_ns)
            for path in Path(FOLDER).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    before = files()
    with Host(data) as host:
        host.complete(PROMPT)
    assert files() == before


def test_what_the_extension_adds_to_the_start(data, capsys):
    """A figure, not a limit: machines differ."""
    seconds = {}
    for extension in (False, True, False, True):
        began = time.monotonic()
        with Host(data, extension=extension):
            seconds.setdefault(extension, []).append(time.monotonic() - began)
    with capsys.disabled():
        print(f"\nstart without the extension: {seconds[False]} s, with it: {seconds[True]} s")
