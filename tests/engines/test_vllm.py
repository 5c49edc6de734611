"""vLLM, as it is, against transformers with the same weights. Runs where KOBOLD_SP_VLLM_PYTHON names an interpreter
that has vLLM (0.21 or later; a build for CPUs will do), in about two minutes a family."""

import json
import math
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import transformers

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.engines import GenerationSettings, Tokenizing
from kobold_sp_plugin.engines.samplers import samplers
from kobold_sp_plugin.engines.transformers import TransformersEngine
from kobold_sp_plugin.engines.vllm import VllmServer, lacking_in_vllm
from kobold_sp_plugin.errors import ContextExceeded, EngineRefused, EngineUnreachable, WidthMismatch, WrongModel
from kobold_sp_plugin.server import app as host
from kobold_sp_plugin.session import Session
from kobold_sp_plugin.soft_tokens import attached
from kobold_sp_plugin.softprompt import Order, Scale
from tests.models import COMMON, softprompt, tiny_tokenizer
from tests.serving import GREEDY, asking, outlives

PYTHON = os.environ.get("KOBOLD_SP_VLLM_PYTHON")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="KOBOLD_SP_VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.timeout(900),
]

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,  # vLLM on a CPU has no smaller ones
    "max_position_embeddings": 256,
}
FAMILIES = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2", "gemma3": "Gemma3Text"}
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": str(ROOT),
}


def tiny(family):
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**{**COMMON, **SHAPE})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A folder with a model, and the same model in transformers."""
    folder = tmp_path_factory.mktemp("models") / request.param
    model, tokenizer = tiny(request.param), tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    engine = TransformersEngine(model, tokenizer, request.param)
    engine.model = model
    return folder, engine


@contextmanager
def server(folder, log, *more):
    """A vLLM server with the model in ``folder``, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "250"]
    command += ["--block-size", "32", "--enable-prompt-tokens-details", *more]
    with open(log, "wb") as output:
        # Its engine is a process of its own, which outlives it when it is killed: hence a group that can be ended.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=ENVIRONMENT, cwd=log.parent, start_new_session=True
        )
    try:
        until = time.monotonic() + 600
        while b"Application startup complete" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < until, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


INSIDE = softprompt(5, 6, 128)
SOFT = {
    "none": [],
    "before": [softprompt(1, 37, 128)],
    "after": [SoftPrompt(softprompt(2, 5, 128).rows, {"name": "after"}, order=Order.AFTER_BOS)],
    "several": [softprompt(3, 40, 128), SoftPrompt(softprompt(4, 3, 128).rows * 0.3, {}, scale=Scale.MODULE)],
}
SETTINGS = {
    "greedy": GenerationSettings("The door opened and", max_length=16, temperature=0),
    # Of words that are one token each: as text, a story cannot begin within a word.
    "cut": GenerationSettings(" the the the" * 100, memory="Nobody said.", max_length=16, temperature=0),
    "inside": GenerationSettings("The door" + INSIDE + " opened and", max_length=16, temperature=0),
    "in front": GenerationSettings(INSIDE + "The door", max_length=16, temperature=0),
    "stop": GenerationSettings("and", max_length=24, temperature=0, rep_pen=1.3, stop_sequence=("O",)),
    "empty": GenerationSettings("", max_length=8, temperature=0),
    "samplers": GenerationSettings(
        "The door opened and",
        max_length=24,
        temperature=0,
        presence_penalty=2.0,
        frequency_penalty=0.5,
        logit_bias=((40, 3.0), (41, -3.0)),
        bad_words=("e",),
        ban_eos=True,
    ),
}


OTHERS = {"like several": [softprompt(9, 40, 128), softprompt(10, 3, 128)]}


def n_from_cache(url):
    """Tokens of prompts that the server has found in its prefix cache since it was started, as it counts them."""
    with urllib.request.urlopen(url + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total{"))


def expected(engine):
    """What transformers writes, with the context that the server was started for."""
    engine._context = 250
    return {
        f"{soft} {case}": "".join(engine.generate(settings, SOFT[soft]))
        for soft in SOFT
        for case, settings in SETTINGS.items()
    }


def largest_difference(engine, of, softprompts):
    """Between the logarithms of the likeliest tokens' probabilities, and whose they should be."""
    found = of._next_tokens("The door opened and", softprompts)
    handle_ids = torch.tensor([engine.token_ids("The door opened and")])
    with torch.no_grad(), engine.override(softprompts):
        logits = engine.model(**attached(engine.model).prepend(handle_ids)).logits[0, -1].log_softmax(-1)
    return max(abs(logits[int(str(token).rpartition(":")[2])].item() - math.log(p)) for token, p in found.items())


@pytest.mark.parametrize("trusted", [True, False], ids=["chat", "completions"])
def test_a_server_writes_what_transformers_writes(family, tmp_path, trusted):
    folder, engine = family
    flags = ["--enable-prompt-embeds", *(["--trust-request-chat-template"] if trusted else [])]
    with server(folder, tmp_path / "log", *flags) as (url, process):
        vllm = VllmServer(url, str(folder))
        assert (vllm._matrix is None) is trusted
        assert isinstance(vllm, Tokenizing)
        written = {
            f"{soft} {case}": "".join(vllm.generate(settings, SOFT[soft]))
            for soft in SOFT
            for case, settings in SETTINGS.items()
        }
        differences = {name: largest_difference(engine, vllm, soft) for name, soft in SOFT.items()}
        print(folder.name, "trusted" if trusted else "not trusted", differences)
        if trusted or "stop" not in SETTINGS:
            assert written == expected(engine)
        else:  # a penalty on the prompt's tokens cannot fall on what the server sees as rows
            assert {k: v for k, v in written.items() if "stop" not in k or "none" in k} == {
                k: v for k, v in expected(engine).items() if "stop" not in k or "none" in k
            }
        assert max(differences.values()) < 1e-3

        # The soft prompts' rows are read once: of 43, a whole block of 32 is found in the cache, whatever text follows.
        counted = [n_from_cache(url)]
        for prompt, soft in [("Nobody", "several"), ("Rain", "several"), ("Rain", "like several"), ("He", "several")]:
            "".join(vllm.generate(GenerationSettings(prompt, max_length=2, temperature=0), {**SOFT, **OTHERS}[soft]))
            counted.append(n_from_cache(url))
        found = [after - before for before, after in zip(counted, counted[1:])]
        print("tokens from the prefix cache, by the server's counter:", found)
        assert found == [32, 32, 0, 32], "they were read above; others of the same length never share"

        with pytest.raises(WidthMismatch):
            vllm.select([softprompt(0, 4, 32)])
        with pytest.raises(ContextExceeded):
            vllm.generate(GenerationSettings("a", max_length=249), SOFT["before"])

        stop = threading.Event()
        pieces = vllm.generate(GenerationSettings("a", max_length=200, ban_eos=True), SOFT["before"], stop)
        next(pieces)
        stop.set()
        assert len(list(pieces)) < 100

        other = tiny("llama")
        other.config.hidden_size = 64
        other.config.save_pretrained(tmp_path / "other")
        tiny_tokenizer().save_pretrained(tmp_path / "other")
        with pytest.raises(WrongModel, match="64 columns"):
            VllmServer(url, str(tmp_path / "other"))

        assert vllm.effect(SOFT["before"]) == pytest.approx(engine.effect(SOFT["before"]), abs=0.15)
        softprompts = tmp_path / "softprompts"
        softprompts.mkdir()
        for name in ("noir", "sea"):
            SOFT["before"][0].save(softprompts / f"{name}.zip")
        session = Session(softprompts, vllm)
        with host.Server(session, port=0) as ours:
            outlives(ours, process.kill, {"prompt": "The door", "max_length": 150, "ban_eos_token": True})
            process.wait()
            session.use(engine)
            assert asking(ours)("POST", "/api/v1/generate", GREEDY).text
        session.close()
        with pytest.raises(EngineUnreachable, match="No answer"):
            list(vllm.generate(SETTINGS["greedy"]))
        with pytest.raises(EngineUnreachable, match="No answer"):
            VllmServer(url, str(folder))


def test_a_server_without_the_flag_says_which(family, tmp_path):
    folder, _ = family
    if folder.name != "llama":
        pytest.skip("one family is enough")
    with server(folder, tmp_path / "log") as (url, _), pytest.raises(EngineRefused, match="--enable-prompt-embeds"):
        VllmServer(url, str(folder))


IN_PROCESS = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM
    from kobold_sp_plugin.engines.vllm_in_process import VllmInProcess
    from tests.engines import test_vllm as cases
    llm = LLM(sys.argv[1], enable_prompt_embeds=True, dtype="float32", enforce_eager=True, max_model_len=250,
              block_size=32, tensor_parallel_size=int(sys.argv[2]), disable_log_stats=False)
    engine = VllmInProcess(llm)
    written = {f"{soft} {case}": "".join(engine.generate(settings, cases.SOFT[soft]))
               for soft in cases.SOFT for case, settings in cases.SETTINGS.items()}
    tokens = {soft: engine._next_tokens("The door opened and", cases.SOFT[soft]) for soft in cases.SOFT}
    try:
        engine.generate(cases.SETTINGS["greedy"], [cases.softprompt(0, 4, 32)])
    except cases.WidthMismatch:
        again = "".join(engine.generate(cases.SETTINGS["greedy"], cases.SOFT["before"]))
    def hits():
        return sum(each.value for each in llm.get_metrics() if each.name == "vllm:prefix_cache_hits")
    counted = [hits()]
    for prompt, soft in [("Nobody", "several"), ("Rain", "several"), ("Rain", "like several"), ("He", "several")]:
        settings = cases.GenerationSettings(prompt, max_length=2, temperature=0)
        "".join(engine.generate(settings, {**cases.SOFT, **cases.OTHERS}[soft]))
        counted.append(hits())
    print("\\n" + json.dumps([written, tokens, again, counted]), flush=True)
"""


def in_process(folder, tmp_path, script, *more):
    """What a script says, in its last line of JSON, in an interpreter with vLLM."""
    (tmp_path / "script.py").write_text(script)
    command = [PYTHON, str(tmp_path / "script.py"), str(folder), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith("[{")]
    return json.loads(lines[-1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_its_own_process_it_writes_what_transformers_writes(family, tmp_path, ranks):
    folder, engine = family
    written, tokens, again, counted = in_process(folder, tmp_path, IN_PROCESS, str(ranks))

    class Told:
        def __init__(self, soft):
            self._next_tokens = lambda *_: tokens[soft]

    differences = {soft: largest_difference(engine, Told(soft), SOFT[soft]) for soft in SOFT}
    found = [after - before for before, after in zip(counted, counted[1:])]
    print(folder.name, f"{ranks} ranks", differences, "from the prefix cache:", found)
    texts = expected(engine)
    assert written == texts
    assert again == texts["before greedy"]
    assert max(differences.values()) < 1e-3
    assert found == [32, 32, 0, 32], "as the engine counts them; others of the same length never share"


SAMPLERS = """
import json, math, sys, threading
if __name__ == "__main__":
    from vllm import LLM
    from kobold_sp_plugin.engines.vllm import sampling
    from kobold_sp_plugin.engines.vllm_in_process import VllmInProcess
    from tests.engines import test_vllm as cases
    llm = LLM(sys.argv[1], enable_prompt_embeds=True, dtype="float32", enforce_eager=True, max_model_len=250,
              block_size=32, logprobs_mode="processed_logprobs", max_logprobs=-1)
    engine = VllmInProcess(llm)
    left = {}
    for name, given in cases.DRAWN.items():
        settings = cases.drawn(given)
        body = {**sampling(settings, engine._banned(settings)), "max_tokens": 1, "logprobs": -1}
        body["logit_bias"] = {int(token): bias for token, bias in body.get("logit_bias", {}).items()} or None
        prompt = engine._prompt(engine._reader.ids(settings.prompt), cases.SOFT["before"])
        (output,) = engine._outputs(prompt, body, threading.Event())
        told = {token: each.logprob for token, each in output.logprobs[0].items()}
        left[name] = {token: math.exp(value) for token, value in told.items() if value > -50}
    print("\\n" + json.dumps([left]), flush=True)
"""

DRAWN = {
    "temperature": {"temperature": 1.7},
    "top-k": {"temperature": 0.7, "top_k": 12},
    "top-p": {"top_p": 0.8},
    "top-p, temperature first": {"temperature": 1.5, "top_p": 0.8, "sampler_order": (6, 5, 0, 1, 2, 3, 4)},
    "min-p": {"min_p": 0.05},
    "min-p, temperature last": {"temperature": 2.0, "min_p": 0.05},
    "min-p, temperature first": {"temperature": 2.0, "min_p": 0.05, "sampler_order": (6, 5, 0, 1, 2, 3, 4)},
    "repetition penalty": {"rep_pen": 1.4},
    "logit bias": {"logit_bias": ((40, 4.0), (41, -4.0))},
    "banned": {"bad_words": ("e", "a"), "ban_eos": True},
    "together": {"temperature": 0.8, "top_k": 20, "rep_pen": 1.2, "logit_bias": ((40, 4.0),)},
}


def drawn(given):
    return GenerationSettings("The door opened and", **{"temperature": 1.0, "top_p": 1.0, "max_length": 1, **given})


def test_its_samplers_leave_what_koboldais_leave(family, tmp_path):
    folder, engine = family
    if folder.name != "llama":
        pytest.skip("one family is enough")
    (told,) = in_process(folder, tmp_path, SAMPLERS)
    ids = torch.tensor([engine.token_ids("The door opened and")])
    with torch.no_grad(), engine.override(SOFT["before"]):
        logits = engine.model(**attached(engine.model).prepend(ids)).logits[:, -1]
    for name, given in DRAWN.items():
        settings = drawn(given)
        assert not lacking_in_vllm(settings), name
        chosen = samplers(settings, ids.shape[1], engine._end_ids(), engine._reader.texts, False)
        expected = chosen(ids, logits).softmax(-1)[0]
        found = torch.zeros_like(expected)
        for token, probability in told[name].items():
            found[int(token)] = probability
        assert (found - expected).abs().max() < 1e-4, name
        assert torch.equal(found > 1e-9, expected > 1e-9), name
