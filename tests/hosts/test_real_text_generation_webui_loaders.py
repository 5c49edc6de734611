"""The extension in a real text-generation-webui with loaders that take no soft prompts.

Run where ``KOBOLD_SP_TEXTGEN`` and ``KOBOLD_SP_TEXTGEN_PYTHON`` name an installation. llama.cpp runs if it has the
package ``llama_cpp_binaries``. The libraries of the others need an accelerator: where they are missing the host is
asked for them in vain, and then has stand-ins for them, below its own classes.
"""

import json
import os
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from hosts.real_text_generation_webui import MISSING, REPOSITORY, Host, Refused, Truth, has, make_checkpoints, user_data

from kobold_sp_plugin import SoftPrompt

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(400)]

PROMPT = "The door opened and the rain came in. Nobody said a word"
MESSAGES = [{"role": "user", "content": "The door opened"}]
STANDINS = Path(__file__).with_name("standin_accelerators")
REASON = "llama.cpp runs as a process of its own, which takes text and token ids only"
INSTEAD = "load the original model with the Transformers loader, which takes soft prompts"
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
RAIN = SoftPrompt(rows=np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32), metadata={"name": "Rain"})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The rain is selected."""
    data = user_data(tmp_path_factory.mktemp("textgen") / "user_data")
    make_checkpoints(data / "models", ("llama",))
    gguf_files.write(gguf_files.tiny("llama"), data / "models" / "story.gguf")
    RAIN.save(data / "softprompts" / "rain.zip")
    (data / "softprompts.json").write_text(json.dumps({"selection": ["rain.zip"]}))
    return data


@pytest.fixture(scope="module")
def host(data):
    with Host(data) as host:
        yield host


@pytest.fixture(scope="module")
def rain(data):
    return Truth(data / "models" / "llama", RAIN).text(PROMPT, 16)


def assert_refused(host, reason, path="/v1/completions", stream=False):
    body = {"prompt": PROMPT, "messages": MESSAGES, "max_tokens": 4, "stream": stream, "soft_prompt": "rain.zip"}
    del body["messages" if path == "/v1/completions" else "prompt"]
    with pytest.raises(Refused) as refused:
        host.post(path, body)
    assert refused.value.status == 400
    error = json.loads(refused.value.body)["error"]
    assert reason in error["message"] and INSTEAD in error["message"]
    assert error["param"] == "soft_prompt"


@pytest.fixture
def llama_cpp(host):
    """The host with a GGUF file in llama.cpp, and the llama checkpoint again in the end."""
    if not has("llama_cpp_binaries"):
        pytest.skip("the host's Python has no llama_cpp_binaries")
    host.load("story.gguf", loader="llama.cpp", ctx_size=512, gpu_layers=0)
    assert host.get("/v1/internal/model/info")["loader"] == "llama.cpp"
    yield host
    host.load("llama")


@pytest.fixture(scope="module")
def accelerated(data):
    """A host that finds libraries for accelerators, which only stand in for them."""
    if has("exllamav3") or has("tensorrt_llm"):
        pytest.skip("the host's Python has a library for accelerators of its own")
    with Host(data, packages=os.pathsep.join(map(str, (REPOSITORY, STANDINS)))) as host:
        yield host


@STREAMED
def test_llama_cpp_writes_what_it_writes_with_nothing_selected(llama_cpp, stream):
    """The selection waits; nothing of it is in the request, which the same process without one answers alike."""
    selected = llama_cpp.complete(PROMPT, stream=stream), llama_cpp.chat(MESSAGES, stream=stream)
    nothing = [llama_cpp.complete(PROMPT, stream=stream, soft_prompt="")]
    nothing += [llama_cpp.chat(MESSAGES, stream=stream, soft_prompt="")]
    assert all(selected)
    assert list(selected) == nothing


@STREAMED
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_llama_cpp_refuses_a_request_for_a_soft_prompt_and_says_why(llama_cpp, path, stream):
    assert_refused(llama_cpp, REASON, path, stream)


def test_a_transformers_model_after_llama_cpp_has_the_selection_again(host, llama_cpp, rain):
    assert host.complete(PROMPT) != rain
    host.load("llama")
    assert host.complete(PROMPT) == rain
    assert host.complete(PROMPT, stream=True) == rain


@pytest.mark.parametrize(
    "loader, package",
    [("ExLlamav3", "exllamav3"), ("ExLlamav3_HF", "exllamav3"), ("TensorRT-LLM", "tensorrt_llm")],
)
def test_a_loader_that_fails_leaves_the_selection_for_the_next_model(host, rain, loader, package):
    if has(package):
        pytest.skip(f"the host's Python has {package}")
    with pytest.raises(Refused) as refused:
        host.load("llama", loader=loader)
    assert refused.value.status == 500
    assert package in host.tail()
    assert host.get("/v1/internal/model/info")["loader"] == loader
    host.load("llama")
    assert host.complete(PROMPT) == rain


@pytest.mark.parametrize(
    "loader, reason, generates",
    [
        ("ExLlamav3", "ExLlamav3 reads its own embedding", True),
        ("ExLlamav3_HF", "ExLlamav3_HF reads token ids only", False),  # even with --cpu, it makes tensors on a GPU
        ("TensorRT-LLM", "TensorRT-LLM takes the prompt as text only", True),
    ],
)
def test_a_loader_whose_library_is_stood_in_for_refuses_and_says_why(accelerated, rain, loader, reason, generates):
    accelerated.load("llama", loader=loader)
    assert accelerated.get("/v1/internal/model/info")["loader"] == loader
    if generates:
        for stream in (False, True):
            text = accelerated.complete(PROMPT, 4, stream)
            assert text and text == accelerated.complete(PROMPT, 4, stream, soft_prompt="")
    for path in ("/v1/completions", "/v1/chat/completions"):
        for stream in (False, True):
            assert_refused(accelerated, reason, path, stream)
    accelerated.load("llama")
    assert accelerated.complete(PROMPT) == rain
