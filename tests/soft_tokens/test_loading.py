"""However the model was loaded: soft tokens read the same."""

import copy
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from models import FAMILY, VOCABULARY, softprompt, tiny_model

from kobold_sp_plugin import SoftPrompt, attach

ROOT = Path(__file__).resolve().parents[2]
TEXT = torch.tensor([[1, 17, 44, 90, 23, 8, 120]])
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def generate(model, ids=TEXT):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False).tolist()


def check(model, rows, reference=None):
    """The model with ``rows`` as a soft prompt against a copy whose matrix holds them."""
    larger = copy.deepcopy(reference or model)
    embedding = larger.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(
        torch.cat([embedding.weight.detach(), torch.tensor(rows).to(embedding.weight)])
    )
    ids = torch.cat([torch.arange(VOCABULARY, VOCABULARY + len(rows))[None], TEXT], dim=1)
    with torch.no_grad():
        expected = larger(ids).logits
        handle = attach(model)
        handle.select(SoftPrompt(rows=rows))
        found = model(**handle.prepend(TEXT)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert generate(model) == [[*TEXT[0].tolist(), *generate(larger, ids)[0][ids.shape[1] :]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    if dtype is not torch.float32 and not hasattr(torch, "compiler"):
        pytest.skip("this torch has not all of the model's operators for it on a CPU")
    check(tiny_model(FAMILY).to(dtype), softprompt().rows)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied):
    check(tiny_model(FAMILY, tie_word_embeddings=tied), softprompt().rows)


# What is offloaded lies on the meta device until it is used, of which releases before 5.0 warn, attached or not.
@pytest.mark.filterwarnings("ignore:You are calling .generate")
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("first", ["attach", "offload"])
def test_offloaded(tmp_path, offload, first):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(FAMILY)
    plain, rows = copy.deepcopy(model), softprompt().rows
    if first == "attach":
        attach(model).select(SoftPrompt(rows=rows))
    if offload == "cpu":
        accelerate.cpu_offload(model)
    else:
        accelerate.disk_offload(model, str(tmp_path))
    assert model.get_input_embeddings().weight.device.type == "meta"
    check(model, rows, plain)


def test_a_device_map_with_disk(tmp_path):
    pytest.importorskip("accelerate")
    plain = tiny_model(FAMILY)
    plain.save_pretrained(str(tmp_path / "model"))
    layers = next(name for name, module in plain.named_modules() if isinstance(module, torch.nn.ModuleList))
    parts = {
        name: "cpu" for name, module in plain.named_modules() if not list(module.children()) and layers not in name
    }
    parts.update({f"{layers}.0": "cpu", f"{layers}.1": "disk"})
    model = (
        type(plain)
        .from_pretrained(str(tmp_path / "model"), device_map=parts, offload_folder=str(tmp_path / "offload"))
        .eval()
    )
    check(model, softprompt().rows, plain)


def test_weights_that_come_later_are_no_hindrance():
    if not hasattr(torch, "compiler"):
        pytest.skip("torch.device() is no context in this torch")
    plain = tiny_model(FAMILY)
    with torch.device("meta"):
        model = type(plain)(plain.config).eval()
    handle = attach(model)
    handle.select(softprompt())
    model.load_state_dict(plain.state_dict(), assign=True)
    for name, buffer in plain.named_buffers():  # those that no file holds
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.clone()
    handle.select(softprompt())
    attach(plain).select(softprompt())
    assert generate(model) == generate(plain)


def test_compiled_without_a_graph_break():
    if not hasattr(torch, "compiler") or RELEASE < (4, 57):
        pytest.skip("this model does not compile as a whole")
    model = tiny_model(FAMILY, num_hidden_layers=1)
    handle = attach(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # a break would be an error
    try:
        with torch.no_grad():
            for seed in range(2):
                handle.select(softprompt(seed))
                inputs = handle.prepend(TEXT)
                found = compiled(**inputs, use_cache=False).logits
                torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny_model(FAMILY, **sizes).save_pretrained(str(tmp_path))
    how = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), quantization_config=how, device_map="cpu"
    ).eval()
    check(model, softprompt(width=64).rows)


@pytest.mark.timeout(300)  # two more processes, on a machine that may be busy
def test_tensor_parallel_ranks(tmp_path):
    """``tp_plan="auto"`` on two gloo ranks, where the embedding is split between them."""
    if RELEASE < (5, 0):
        pytest.skip("transformers splits embeddings from 5.0")
    tiny_model(FAMILY).save_pretrained(str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import torch, transformers
        from models import softprompt
        from kobold_sp_plugin import attach
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, tp_plan="auto").eval()
        handle = attach(model)
        handle.select(softprompt())
        text = torch.tensor({TEXT.tolist()})
        with torch.no_grad():
            logits = model(**handle.prepend(text)).logits
            for _ in range(2):
                ids = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=12, do_sample=False)
        torch.save((logits, ids), {str(tmp_path)!r} + f"/{{torch.distributed.get_rank()}}.pt")
        torch.distributed.destroy_process_group()
    """)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            },
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        errors = [each.communicate(timeout=240)[1].decode()[-2000:] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
            each.communicate()
    assert [each.returncode for each in ranks] == [0, 0], errors
    model = tiny_model(FAMILY)
    handle = attach(model)
    handle.select(softprompt())
    with torch.no_grad():
        expected = model(**handle.prepend(TEXT)).logits
    for rank in range(2):
        logits, ids = torch.load(str(tmp_path / f"{rank}.pt"), weights_only=True)
        np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=1e-3, atol=1e-3)
        assert ids.tolist() == generate(model)
