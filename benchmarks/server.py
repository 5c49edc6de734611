"""What the embedded host costs: per streamed token, with many streams at once, and at its start.

    python benchmarks/server.py

1. Overhead of a streamed token. A small random model writes the same texts in process (``model.generate`` with a
   streamer; the engine's iterator) and through the server, streamed as KoboldAI Lite and as OpenAI's clients read
   it; round by round in rotating order. A round's figure is its time divided by its tokens; printed are the medians
   and what each has more than ``model.generate``, as wall time and as CPU time of the whole process.
2. 64 streams at once, each with a soft prompt and a seed of its own: every text is compared with what the same
   request gives alone.
3. ``kobold-sp serve`` with the demonstration model, in a process of its own: seconds from its start until
   ``/api/v1/model`` answers, and of CPU time until then.
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import SoftPrompt
from kobold_sp_plugin.demonstration import MODEL
from kobold_sp_plugin.engines import GenerationSettings
from kobold_sp_plugin.engines.transformers import TransformersEngine
from kobold_sp_plugin.server.app import Server
from kobold_sp_plugin.session import Session

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The door opened and the rain came in. Nobody said a word."
OFF = {"temperature": 1.0, "top_p": 1.0}


def read(port, path, body):
    """All events of a stream, as the data that they hold."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, json.dumps(body).encode())
        response = connection.getresponse()
        assert response.status == 200, response.read()
        lines = [line.decode() for line in response if line.startswith(b"data: ")]
    finally:
        connection.close()
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]\n"]


def kobold(port, **fields):
    return "".join(event["token"] for event in read(port, "/api/extra/generate/stream", fields))


def openai(port, **fields):
    fields = {**fields, "max_tokens": fields["max_length"], "seed": fields["sampler_seed"], "stream": True}
    return "".join(event["choices"][0]["text"] for event in read(port, "/v1/completions", fields))


class Sink:
    """The least that a streamer can do."""

    def __init__(self):
        self.n_tokens = 0

    def put(self, value):
        self.n_tokens += 1

    def end(self):
        pass


def overhead(engine, model, tokenizer, port, rounds, length):
    ids = torch.tensor([engine.token_ids(PROMPT)])
    request = {"prompt": PROMPT, "max_length": length, "sampler_seed": 1, "soft_prompt": "", **OFF}

    def bare():
        torch.manual_seed(1)
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
                streamer=Sink(),
            )

    contenders = {
        "model.generate, a streamer": bare,
        "the engine's iterator": lambda: list(
            engine.generate(GenerationSettings(PROMPT, max_length=length, seed=1, **OFF), ())
        ),
        "streamed, KoboldAI Lite": lambda: kobold(port, **request),
        "streamed, OpenAI": lambda: openai(port, **request),
    }
    wall, cpu = ({name: [] for name in contenders} for _ in range(2))
    entries = list(contenders.items())
    for number in range(rounds + 1):
        shift = number % len(entries)
        for name, act in entries[shift:] + entries[:shift]:
            began, worked = time.perf_counter(), time.process_time()
            act()
            if number:  # the first round warms up
                wall[name].append((time.perf_counter() - began) / length * 1e3)
                cpu[name].append((time.process_time() - worked) / length * 1e3)
    print(f"\n{rounds} rounds of {length} tokens; milliseconds per token, medians\n")
    print("| | wall | more than model.generate | CPU | more |\n|---|---|---|---|---|")
    base = entries[0][0]
    for name in contenders:
        more = [
            statistics.median(each - least for each, least in zip(figures[name], figures[base]))
            for figures in (wall, cpu)
        ]
        print(
            f"| {name} | {statistics.median(wall[name]):.3f} | {more[0]:.3f} "
            f"| {statistics.median(cpu[name]):.3f} | {more[1]:.3f} |"
        )


def many_streams(port, folder, width, count, length):
    requests = []
    for number in range(count):
        rows = 0.3 * np.random.default_rng(number).standard_normal((4, width)).astype(np.float32)
        SoftPrompt(rows, {"name": str(number)}).save(folder / f"{number}.zip")
        requests.append(
            {"prompt": PROMPT, "max_length": length, "sampler_seed": number, "soft_prompt": f"{number}.zip", **OFF}
        )
    alone = [kobold(port, **request) for request in requests]
    together = [""] * count

    def one(number):
        together[number] = (openai if number % 2 else kobold)(port, **requests[number])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    wrong = sum(first != second for first, second in zip(alone, together))
    print(
        f"\n{count} streams at once, {len(set(alone))} different texts of {length} tokens, {seconds:.1f} s: "
        f"{wrong} texts are not what they are alone"
    )
    return wrong


def start(runs):
    seconds, worked = [], []
    for _ in range(runs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", "from kobold_sp_plugin.cli import main; main()", "serve", "--port", str(port)]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        try:
            while True:
                assert process.poll() is None, "it has ended"
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    connection.request("GET", "/api/v1/model")
                    assert json.loads(connection.getresponse().read()) == {"result": "demonstration"}
                    break
                except OSError:
                    time.sleep(0.02)
                finally:
                    connection.close()
            seconds.append(time.perf_counter() - began)
            fields = Path(f"/proc/{process.pid}/stat")
            if fields.is_file():
                ticks = fields.read_text().rpartition(")")[2].split()[11:13]
                worked.append(sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"))
        finally:
            process.terminate()
            process.wait(30)
    print(
        f"\n`kobold-sp serve` with the demonstration model answers after {statistics.median(seconds):.1f} s "
        f"(median of {runs}; {min(seconds):.1f} to {max(seconds):.1f})"
        + (f", of {statistics.median(worked):.1f} s of CPU" if worked else "")
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--starts", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(MODEL))
    width = 128
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "softprompts"
        folder.mkdir()
        engine = TransformersEngine(model, tokenizer, "random")
        session = Session(folder, engine)
        try:
            with Server(session, port=0) as server:
                overhead(engine, model, tokenizer, server.port, args.rounds, args.length)
                wrong = many_streams(server.port, folder, width, args.streams, 32)
        finally:
            session.close()
    start(args.starts)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
