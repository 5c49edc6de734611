"""A real text-generation-webui as a process of its own, tiny checkpoints for it, and what they have to write.

``KOBOLD_SP_TEXTGEN`` names the folder of an installation and ``KOBOLD_SP_TEXTGEN_PYTHON`` its Python. Nothing
is written into that folder: the host is started with a ``user_data`` of the test's own.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
import transformers
from models import COMMON, CONFIGS, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
HOOK = REPOSITORY / "hooks" / "text_generation_webui" / "script.py"
FOLDER = os.environ.get("KOBOLD_SP_TEXTGEN", "")
PYTHON = os.environ.get("KOBOLD_SP_TEXTGEN_PYTHON", "")
MISSING = None if FOLDER and PYTHON else "KOBOLD_SP_TEXTGEN and KOBOLD_SP_TEXTGEN_PYTHON name no installation"
START_SECONDS = 200

LONG = {"max_position_embeddings": 2048}
GEMMA = {**CONFIGS["gemma2"][1], **LONG, "tie_word_embeddings": False}  # tied, a random one repeats a token for ever
CHECKPOINTS = {
    "llama": ("Llama", {**CONFIGS["llama"][1], **LONG}),
    "qwen3": ("Qwen3", {**CONFIGS["gemma2"][1], **LONG}),
    "gpt2": ("GPT2", {**CONFIGS["gpt2"][1], "n_positions": 2048}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "wide": ("Llama", {**CONFIGS["llama"][1], **LONG, "hidden_size": 64}),
    "short": ("Llama", {**CONFIGS["llama"][1], "max_position_embeddings": 64}),
}
"""Name of a checkpoint, what its classes' names begin with, and its configuration."""


def make_checkpoints(folder, names=tuple(CHECKPOINTS)):
    """Write random models with a tokenizer into ``folder``, one folder each."""
    for name in names:
        prefix, options = CHECKPOINTS[name]
        config = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
        model = getattr(transformers, f"{prefix}LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM")
        torch.manual_seed(5)
        made = model(config(**{**COMMON, **options}))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:  # as they are made, they repeat one token for ever
                    parameter.mul_(8.0 if prefix == "GPT2" else 5.0)
        made.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)


def make_lora(folder, checkpoint):
    """Write a PEFT adapter of ``checkpoint`` that changes what it writes into ``folder``."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    options = LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, options).save_pretrained(folder)


WITH_ROWS = """
import torch
from transformers import LlamaForCausalLM


class WithRows(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "use_cache": False})

    def forward(self, input_ids, **kwargs):
        text = self.config.text_vocab_size
        soft = torch.arange(text, self.config.vocab_size).expand(len(input_ids), -1)
        result = super().forward(torch.cat([soft, input_ids], dim=1), use_cache=False)
        result.logits = result.logits[:, soft.shape[1] :, :text]
        return result
"""


def make_with_rows(folder, checkpoint, softprompt):
    """Write a Llama checkpoint that reads the rows by itself, as code of its own, so that a bare host runs it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    text = model.config.vocab_size
    model.resize_token_embeddings(text + softprompt.n_tokens)
    with torch.no_grad():
        model.get_input_embeddings().weight[text:] = torch.tensor(softprompt.rows)
    model.config.text_vocab_size = text
    model.config.auto_map = {"AutoModelForCausalLM": "with_rows.WithRows"}
    model.save_pretrained(folder)
    (folder / "with_rows.py").write_text(WITH_ROWS)
    tiny_tokenizer().save_pretrained(folder)


class Truth:
    """What a checkpoint writes when the rows of soft prompts really stand in its embedding matrix.

    Without caches and without anything of ours: one forward pass per token, over the whole text.
    """

    def __init__(self, checkpoint, *softprompts, lora=None):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        if lora is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, lora).merge_and_unload()
        embedding = self.model.get_input_embeddings()
        self.vocabulary = embedding.num_embeddings
        parts = [torch.tensor(each.rows) for each in softprompts]
        self.soft = list(range(self.vocabulary, self.vocabulary + sum(len(part) for part in parts)))
        matrix = torch.cat([embedding.weight.detach(), *parts])
        embedding.weight = torch.nn.Parameter(matrix)  # the head keeps its own rows, where it shared them
        embedding.num_embeddings = len(matrix)

    def encode(self, text):
        """Ids as the host makes them: one beginning-of-sequence token, never two."""
        ids = self.tokenizer.encode(text)
        while ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        return ids if ids[:1] == [self.tokenizer.bos_token_id] else [self.tokenizer.bos_token_id, *ids]

    def logits(self, ids, soft=None):
        """``[len(ids), vocabulary]``: scores of the token after each of ``ids``."""
        soft = self.soft if soft is None else soft
        with torch.no_grad():
            logits = self.model(torch.tensor([soft + ids]), use_cache=False).logits
        return logits[0, len(soft) :, : self.vocabulary]

    def ids(self, text, n_tokens, *processors):
        """The ids that follow ``text`` (or ids), greedily; a processor maps (ids of the text, scores) to scores."""
        prompt = self.encode(text) if isinstance(text, str) else text
        ids = list(prompt)
        for _ in range(n_tokens):
            scores = self.logits(ids)[-1]
            for processor in processors:
                scores = processor(ids, scores)
            ids.append(int(scores.argmax()))
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        return ids[len(prompt) :]

    def text(self, text, n_tokens, *processors):
        return self.decode(self.ids(text, n_tokens, *processors))

    def decode(self, ids):
        """Text as the host makes it: the first token keeps its space."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        spaced = bool(ids) and self.tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁")
        return " " + text if spaced and not text.startswith(" ") else text


def user_data(folder, extension=True):
    """Make a ``user_data`` at ``folder`` from the installation's own, with the extension in it."""
    for name in ("characters", "grammars", "instruction-templates", "presets", "users"):
        shutil.copytree(Path(FOLDER) / "user_data" / name, folder / name)
    for name in ("models", "loras", "extensions", "logs", "softprompts"):
        (folder / name).mkdir()
    if extension:
        (folder / "extensions" / "soft_prompts").mkdir()
        shutil.copy(HOOK, folder / "extensions" / "soft_prompts" / "script.py")
    return folder


def has(package):
    """Whether the host's Python can import ``package``."""
    return subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True).returncode == 0


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Refused(Exception):
    """An answer of the API that is not 200."""

    def __init__(self, status, body):
        super().__init__(f"{status}: {body}")
        self.status, self.body = status, body


class Host:
    """``server.py`` over ``data``, a folder of :func:`user_data`.

    ``arguments`` go to its command line; it finds our package in ``packages``. ``cpu``: in 32 bits, whatever else it
    is told.
    """

    def __init__(self, data, *arguments, extension=True, webui=False, model="llama", packages=REPOSITORY, cpu=True):
        self.data = Path(data)
        self.port, self.page_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.page = f"http://127.0.0.1:{self.page_port}/"
        self.webui = webui
        self.packages = packages
        self.command = [PYTHON, "server.py", "--user-data-dir", str(data), "--api"]
        self.command += ["--cpu"] if cpu else []
        self.command += ["--api-port", str(self.port), "--loader", "Transformers"]
        self.command += ["--listen-port", str(self.page_port)] if webui else ["--nowebui"]
        self.command += ["--model", model] if model else []
        self.command += ["--extensions", "soft_prompts"] if extension else []
        self.command += arguments
        self.log = self.data / "server.log"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Start the process; ``seconds`` is how long it takes until API and page answer (8 s or more for the page).

        On a busy machine the host may fail by itself: Gradio asks for its own page and waits three seconds.
        """
        for _ in range(5):
            self._began = time.monotonic()
            self._start()
            wait_for(lambda: self.failed or self._answers(), START_SECONDS, self.tail, every=0.5)
            self.seconds = time.monotonic() - self._began
            if not self.failed:
                return
            assert "ReadTimeout" in self.tail(), self.tail()
            self.stop()
        raise AssertionError(self.tail())

    def _start(self):
        self._log_before, self._opened = self.log.stat().st_size if self.log.exists() else 0, None
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=FOLDER,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": str(self.packages),
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                },
            )

    @property
    def failed(self):
        """Whether it has ended, or its page has."""
        return self.process.poll() is not None or "ReadTimeout: timed out" in self._new_log()

    @property
    def announced(self):
        """How often this process has opened its page."""
        return self._new_log().count("Running on local URL")

    def _new_log(self):
        return self.log.read_bytes()[self._log_before :].decode(errors="replace")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    def restart(self):
        self.stop()
        self.start()

    def _answers(self):
        try:
            self.get("/v1/internal/health")
        except (OSError, Refused):
            return False
        if not self.webui:
            return True
        if not self.announced:
            return False
        self._opened = self._opened or time.monotonic()
        patience = max(8, (self._opened - self._began) / 4)  # by then Gradio has had its answer, or has ended
        return time.monotonic() - self._opened > patience

    def tail(self):
        return self.log.read_text(errors="replace")[-6000:]

    def get(self, path):
        return self._read(urllib.request.Request(self.url + path))

    def post(self, path, body=None):
        return self._read(self._request(path, body))

    def stream(self, path, body):
        """The events of a streamed answer, one by one."""
        with urllib.request.urlopen(self._request(path, {**body, "stream": True}), timeout=60) as reply:
            for line in reply:
                data = line.decode().strip()
                if data.startswith("data:") and data != "data: [DONE]":
                    yield json.loads(data[len("data:") :])

    def _request(self, path, body):
        headers = {"Content-Type": "application/json"}
        return urllib.request.Request(self.url + path, json.dumps(body or {}).encode(), headers)

    def _read(self, request):
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from None

    def complete(self, prompt, n_tokens=16, stream=False, **options):
        """The text that ``/v1/completions`` gives; greedy unless told otherwise."""
        body = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, **options}
        if stream:
            return "".join(each["choices"][0]["text"] for each in self.stream("/v1/completions", body))
        return self.post("/v1/completions", body)["choices"][0]["text"]

    def chat(self, messages, n_tokens=16, stream=False, **options):
        """The text that ``/v1/chat/completions`` gives; greedy unless told otherwise."""
        body = {"messages": messages, "max_tokens": n_tokens, "temperature": 0, **options}
        if stream:
            events = self.stream("/v1/chat/completions", body)
            return "".join(each["choices"][0]["delta"].get("content") or "" for each in events)
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def load(self, model, loader="Transformers", **arguments):
        self.post("/v1/internal/model/load", {"model_name": model, "args": {"loader": loader, **arguments}})

    def unload(self):
        self.post("/v1/internal/model/unload")


def wait_for(condition, seconds, explain=str, every=0.1):
    """Wait until ``condition()`` is true; after ``seconds``, fail with what ``explain()`` says."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(every)
