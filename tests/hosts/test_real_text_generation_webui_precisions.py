"""The extension in a real text-generation-webui, with models in 16, 8 and 4 bits on a CPU.

Run where ``KOBOLD_SP_TEXTGEN`` and ``KOBOLD_SP_TEXTGEN_PYTHON`` name an installation. On a CPU, the flags of its
command line all come to 32 bits. It has 16 bits for a model that is loaded without a limit of CPU memory (an empty
field in its Model tab), and 8 and 4 bits for checkpoints that are stored so, where it has bitsandbytes.
"""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hosts.real_text_generation_webui import MISSING, PYTHON, Host, Truth, has, make_checkpoints, make_lora, user_data

from kobold_sp_plugin import SoftPrompt

pytestmark = [pytest.mark.skipif(MISSING is not None, reason=str(MISSING)), pytest.mark.timeout(400)]

PROMPT = "The door opened and the rain came in. Nobody said a word; the door opened and the"
MESSAGES = [{"role": "user", "content": "The door opened"}]
N_TOKENS = 32
STORM = SoftPrompt(
    rows=2 * np.random.default_rng(6).normal(size=(60, 64)).astype(np.float32), metadata={"name": "Storm"}
)
UNLIMITED = {"cpu": False, "cpu_memory": None}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


class Precision(NamedTuple):
    """How a model is loaded, and how its like is made."""

    arguments: dict
    """What the host is told, beside the name."""
    dtype: str
    """Of what is not quantised."""
    quantised: dict
    """The ``BitsAndBytesConfig`` of its checkpoint; none: it is not."""

    def checkpoint(self, name):
        return f"wide-{name}" if self.quantised else "wide"


PRECISIONS = {
    "float32": Precision({"cpu": True}, "float32", {}),
    "bfloat16": Precision({**UNLIMITED, "bf16": True}, "bfloat16", {}),
    "float16": Precision(UNLIMITED, "float16", {}),
    "int8": Precision({"cpu": True}, "float32", {"load_in_8bit": True}),
    "nf4": Precision({"cpu": True}, "float32", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4": Precision(
        {"cpu": True},
        "float32",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    ),
}
LORA = ("without a LoRA", "with a LoRA", "its LoRA taken off")


@pytest.fixture(scope="module")
def precisions():
    """The names of those that the host's Python can make."""
    quantises = has("bitsandbytes")
    return [name for name, precision in PRECISIONS.items() if quantises or not precision.quantised]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    data = user_data(tmp_path_factory.mktemp("textgen") / "user_data")
    make_checkpoints(data / "models", ("wide",))  # 4 bits on a CPU take rows of 64 columns
    make_lora(data / "loras" / "lora", data / "models" / "wide")
    STORM.save(data / "softprompts" / "storm.zip")
    with Host(data, cpu=False, model=None) as host:
        yield host


@pytest.fixture(scope="module")
def tokenizer(host):
    return Truth(host.data / "models" / "wide")


@pytest.fixture(scope="module")
def chat_prompt(host):
    return host.post("/v1/internal/chat-prompt", {"messages": MESSAGES, "mode": "instruct"})["prompt"]


@pytest.fixture(scope="module")
def written(host, precisions, tokenizer, chat_prompt):
    """What the host has to write: text by precision, LoRA, whether the rows are read, and prompt.

    The host makes 16 bits of another kind float16 when it applies a LoRA, and leaves them so.
    """
    models = host.data / "models"
    prompts = [tokenizer.encode(PROMPT), tokenizer.encode(chat_prompt)]
    keys, jobs = [], []
    for name in precisions:
        precision = PRECISIONS[name]
        for lora in LORA:
            for rows in ([], STORM.rows.tolist()):
                keys.append((name, lora, bool(rows)))
                jobs.append(
                    {
                        "checkpoint": str(models / precision.checkpoint(name)),
                        "dtype": precision.dtype,
                        "lora": str(host.data / "loras" / "lora") if lora == "with a LoRA" else None,
                        "halved": lora != "without a LoRA" and not precision.arguments["cpu"],
                        "rows": rows,
                        "prompts": prompts,
                        "n_tokens": N_TOKENS,
                    }
                )
    quantise = [
        {
            "checkpoint": str(models / "wide"),
            "folder": str(models / PRECISIONS[name].checkpoint(name)),
            "options": PRECISIONS[name].quantised,
        }
        for name in precisions
        if PRECISIONS[name].quantised
    ]
    done = subprocess.run(
        [PYTHON, str(Path(__file__).with_name("precise_models.py"))],
        input=json.dumps({"quantise": quantise, "continue": jobs}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name in precisions:
        if PRECISIONS[name].quantised:
            tokenizer.tokenizer.save_pretrained(models / PRECISIONS[name].checkpoint(name))
    texts = {}
    for key, given in zip(keys, json.loads(done.stdout)):
        for prompt, ids in zip((PROMPT, chat_prompt), given):
            texts[(*key, prompt)] = tokenizer.decode(ids)
    return texts


@pytest.fixture
def loaded(host, request, precisions, written):
    """The host with the model of the test's precision, and its LoRA; loaded again only where another was."""
    name, lora = request.node.callspec.params["precision"], request.node.callspec.params["lora"]
    if name not in precisions:
        pytest.skip("the host's Python has no bitsandbytes")
    if getattr(host, "holds", None) != (name, lora):
        precision = PRECISIONS[name]
        host.load(precision.checkpoint(name), **precision.arguments)
        if lora != "without a LoRA":
            host.post("/v1/internal/lora/load", {"lora_names": ["lora"]})
        if lora == "its LoRA taken off":
            host.post("/v1/internal/lora/unload")
        host.holds = name, lora
    return host


@STREAMED
@pytest.mark.parametrize("path", ["completions", "chat"])
@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_writes_what_rows_in_its_matrix_give(
    loaded, written, chat_prompt, tokenizer, precision, lora, path, stream
):
    prompt = PROMPT if path == "completions" else chat_prompt
    for name in ("storm.zip", ""):
        if path == "completions":
            text = loaded.complete(PROMPT, N_TOKENS, stream, soft_prompt=name)
        else:
            text = loaded.chat(MESSAGES, N_TOKENS, stream, soft_prompt=name, mode="instruct")
        assert text.strip() == written[precision, lora, bool(name), prompt].strip()
    assert written[precision, lora, True, prompt] != written[precision, lora, False, prompt]


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "float32"])
def test_the_precisions_are_what_they_are_called(precisions, written, precision):
    """What a model in 32 bits writes is something else: were that loaded in its place, the test above would tell."""
    if precision not in precisions:
        pytest.skip("the host's Python has no bitsandbytes")
    assert any(text != written[("float32", *key[1:])] for key, text in written.items() if key[0] == precision)


@pytest.mark.parametrize("flag", ["bf16", "load_in_8bit", "load_in_4bit"])
def test_what_the_host_makes_32_bits_of_has_its_soft_prompt(host, written, flag):
    """On a CPU it says so in its log; a soft prompt is read there as in any other."""
    host.holds = None
    before = len(host.log.read_text())
    host.load("wide", cpu=False, **{flag: True})
    assert "Falling back to CPU mode" in host.log.read_text()[before:]
    assert (
        host.complete(PROMPT, N_TOKENS, soft_prompt="storm.zip") == written["float32", "without a LoRA", True, PROMPT]
    )
